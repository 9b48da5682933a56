//! CPUs by number, and work for all of them.
//!
//! CPU 0 runs the program; the others wait for what [`on_all`] gives them. A CPU knows its number
//! from its task register, which every guest exit restores. Interrupts are off but in
//! [`take_interrupts`], in an idle CPU's halt, and where a guest runs.
//!
//! Lock: one a CPU, around its mail box; leaves.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::lock::Lock;
use super::{apic, descriptors};

/// As many CPUs as are used.
pub const MAX_CPUS: usize = 8;

/// Work to be done: a borrow whose end [`on_all`] waits for.
struct Job(&'static (dyn Fn(usize) + Sync));

static JOBS: [Lock<Option<Job>>; MAX_CPUS] = [const { Lock::new(None) }; MAX_CPUS];
/// Jobs given and not finished.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// CPUs that wait for work, CPU 0 counted.
static READY: AtomicUsize = AtomicUsize::new(0);
static APIC_IDS: [AtomicU8; MAX_CPUS] = [const { AtomicU8::new(0) }; MAX_CPUS];

/// Make the calling CPU number `number`: descriptors, APIC.
pub fn begin(number: usize) {
    descriptors::begin(number);
    apic::begin();
    APIC_IDS[number].store(apic::id(), Ordering::Release);
    READY.fetch_add(1, Ordering::AcqRel);
}

/// How many CPUs have begun.
pub fn count() -> usize {
    READY.load(Ordering::Acquire)
}

/// Number of the calling CPU.
pub fn current() -> usize {
    let selector: u16;
    // SAFETY: STR reads the task register's selector; `begin` loaded it.
    unsafe { asm!("str {:x}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    descriptors::number_of(selector)
}

/// Ring at a CPU: if it runs a guest it leaves it, if it sleeps it wakes.
pub fn ring(cpu: usize) {
    apic::ring(APIC_IDS[cpu].load(Ordering::Acquire));
}

/// Take the interrupts that are pending.
pub fn take_interrupts() {
    // SAFETY: the handlers keep all registers and have stacks of their own (`descriptors.rs`), so
    // that not even a red zone is touched.
    unsafe { asm!("sti", "nop", "nop", "cli", options(nomem)) };
}

/// Sleep until an interrupt; none is missed that came since interrupts were turned off.
fn sleep() {
    // SAFETY: as for `take_interrupts`; an interrupt that is pending ends the halt at once, because
    // STI takes effect after the instruction behind it.
    unsafe { asm!("sti", "hlt", "cli", options(nomem)) };
}

/// Never go on.
pub fn stop() -> ! {
    loop {
        // SAFETY: HLT with interrupts off waits for what does not come.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// What every CPU but 0 does.
pub fn serve(number: usize) -> ! {
    loop {
        let job = JOBS[number].lock().take();
        match job {
            Some(Job(work)) => {
                work(number);
                // Release: what the job did is seen by who waits for it.
                RUNNING.fetch_sub(1, Ordering::Release);
            }
            None => sleep(),
        }
    }
}

/// Call `work` with their numbers on CPUs 0 to `cpus`, all at once; returns when all have returned.
/// For CPU 0, and not from inside `work`.
///
/// # Panics
/// When there are not so many CPUs, or another CPU calls.
pub fn on_all(cpus: usize, work: &(dyn Fn(usize) + Sync)) {
    assert!(current() == 0 && cpus <= count() && RUNNING.load(Ordering::Acquire) == 0);
    RUNNING.store(cpus - 1, Ordering::Release);
    // SAFETY: the two types differ in the lifetime alone. No CPU uses the borrow after it has
    // counted itself out of RUNNING, and this function returns only when all have; nothing
    // unwinds here.
    let lasting = unsafe {
        core::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work)
    };
    for (cpu, job) in JOBS.iter().enumerate().take(cpus).skip(1) {
        *job.lock() = Some(Job(lasting));
        ring(cpu);
    }
    work(0);
    // Acquire: pairs with the Release in `serve`.
    while RUNNING.load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
}

/// Value of the calling CPU's time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter; nothing here sets CR4.TSD.
    unsafe { x86::time::rdtsc() }
}
