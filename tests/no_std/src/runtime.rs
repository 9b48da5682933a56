//! What an operating system's library would have given: entry, system calls, heap, panic. Linux
//! on x86-64 only.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::panic::PanicInfo;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

const SYS_WRITE: usize = 1;
const SYS_EXIT: usize = 60;
const STDOUT: usize = 1;

// The kernel enters with a stack that the ABI of a function call does not describe.
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {entry}",
    "ud2",
    entry = sym entry,
);

extern "C" fn entry() -> ! {
    exit(crate::run())
}

fn exit(status: u8) -> ! {
    // SAFETY: exit(2) takes one integer and does not return.
    unsafe {
        asm!("syscall", in("rax") SYS_EXIT, in("rdi") usize::from(status), options(noreturn));
    }
}

/// Print on standard output.
pub(crate) fn say(text: &str) {
    // SAFETY: write(2) reads `len` bytes from `ptr`, both from one str; the kernel changes nothing
    // but rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_WRITE => _,
            in("rdi") STDOUT,
            in("rsi") text.as_ptr(),
            in("rdx") text.len(),
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack, readonly),
        );
    }
}

/// Print a number in decimal.
pub(crate) fn say_number(number: u32) {
    if number >= 10 {
        say_number(number / 10);
    }
    let digits = "0123456789";
    let digit = usize::try_from(number % 10).unwrap_or(0);
    say(digits.get(digit..=digit).unwrap_or("?"));
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say("no_std gate: panic: ");
    say(info.message().as_str().unwrap_or("(formatted message)"));
    say("\n");
    exit(2)
}

const HEAP: usize = 64 << 20;

/// Hands out memory from the front and never takes it back: the gate runs for a moment.
#[repr(C, align(4096))]
struct Bump {
    memory: UnsafeCell<[u8; HEAP]>,
    used: AtomicUsize,
}

// SAFETY: `memory` is only handed out in disjoint pieces, which `used` counts atomically.
unsafe impl Sync for Bump {}

// SAFETY: every block lies inside `memory`, aligned as asked, and is never handed out twice.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let base = self.memory.get().cast::<u8>();
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            // `memory` is page aligned: aligning the offset aligns the address.
            let Some(start) = used.checked_next_multiple_of(layout.align()) else {
                return ptr::null_mut();
            };
            let end = match start.checked_add(layout.size()) {
                Some(end) if end <= HEAP && layout.align() <= 4096 => end,
                _ => return ptr::null_mut(),
            };
            let taken = self.used.compare_exchange(used, end, Ordering::Relaxed, Ordering::Relaxed);
            match taken {
                Ok(_) => return base.wrapping_add(start),
                Err(now) => used = now,
            }
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ALLOCATOR: Bump = Bump { memory: UnsafeCell::new([0; HEAP]), used: AtomicUsize::new(0) };

/// Named by the unwind tables of the prebuilt `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(2)
}
