//! Time: delays by the interval timer.

use super::port;

/// Ticks of the timer in a second.
const HZ: u64 = 1_193_182;
const CHANNEL_2: u16 = 0x42;
const COMMAND: u16 = 0x43;
/// Gate and output of channel 2.
const GATE: u16 = 0x61;
const OUTPUT: u8 = 1 << 5;

/// Wait for at least `us` microseconds, at most 50,000.
pub fn delay_us(us: u64) {
    let ticks = (us.min(50_000) * HZ / 1_000_000 + 1) as u16;
    // Gate on, speaker off; mode 0: the output goes up at the end.
    port::write8(GATE, port::read8(GATE) & !3 | 1);
    port::write8(COMMAND, 0xb0);
    port::write8(CHANNEL_2, ticks as u8);
    port::write8(CHANNEL_2, (ticks >> 8) as u8);
    // Machines without this timer answer ones.
    while port::read8(GATE) & OUTPUT == 0 {
        core::hint::spin_loop();
    }
}
