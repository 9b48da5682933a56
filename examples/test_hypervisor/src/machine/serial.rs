//! The serial line: where everything that is judged goes.
//!
//! Lock: one, around a line.

use core::fmt::{self, Write};

use super::lock::Lock;
use super::port;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
/// The transmitter takes another byte.
const READY: u8 = 1 << 5;
/// All bytes are on the wire.
const DRAINED: u8 = 1 << 6;

struct Line;

static LINE: Lock<Line> = Lock::new(Line);

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    while port::read8(LINE_STATUS) & READY == 0 {
        core::hint::spin_loop();
    }
    port::write8(COM1, byte);
}

/// 115200 baud, 8 bits, no interrupts.
pub fn begin() {
    for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        port::write8(COM1 + offset, value);
    }
}

/// Print.
pub fn print(text: fmt::Arguments<'_>) {
    // `put` does not fail.
    let _ = LINE.lock().write_fmt(text);
}

/// Print though another CPU, or this one, may be in the middle of a line.
pub fn print_anyway(text: fmt::Arguments<'_>) {
    let _ = Line.write_fmt(text);
}

/// Wait until everything is out.
pub fn drain() {
    while port::read8(LINE_STATUS) & DRAINED == 0 {
        core::hint::spin_loop();
    }
}

/// Print a line.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {
        $crate::machine::serial::print(format_args!("{}\n", format_args!($($argument)*)))
    };
}
