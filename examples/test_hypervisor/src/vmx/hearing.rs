//! Does a guest hear the doorbell? A machine's deviation, found out and made up for.
//!
//! With external-interrupt exiting, an interrupt for the host ends the guest's run whatever the
//! guest's IF is (SDM 3C 26.4.1: "If the external-interrupt exiting VM-execution control is 1,
//! RFLAGS.IF does not control the blocking of external interrupts"). Bochs 2.7 decides what is
//! masked before it is in the guest, so that one entered with IF = 0 hears nothing. There guests
//! run with the preemption timer, and interrupts that are pending are taken before each entry.
//!
//! CPU 0 finds out, in a guest of its own, before there are others. No locks.

use core::sync::atomic::{AtomicU8, Ordering};

use mmu_core::addr::{Level, Pfn};

use super::abilities::Abilities;
use super::region::Region;
use super::vcpu::VmxVcpu;
use crate::machine::{cpu, descriptors};
use crate::println;
use crate::virt::{Exit, GuestState, Mode, Root, Vcpu, VcpuSetup, VirtError};

/// What is known of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// Nothing yet: as if it were deaf.
    Unknown,
    /// It does as the manual says.
    Sound,
    /// Interrupts do not reach guests with IF = 0.
    Deaf,
}

static HEARING: AtomicU8 = AtomicU8::new(Hearing::Unknown as u8);

/// What is known.
pub fn hearing() -> Hearing {
    // Written before other CPUs use VMX; nothing else depends on it.
    match HEARING.load(Ordering::Relaxed) {
        value if value == Hearing::Sound as u8 => Hearing::Sound,
        value if value == Hearing::Deaf as u8 => Hearing::Deaf,
        _ => Hearing::Unknown,
    }
}

/// Time stamps to a turn of a guest on a deaf machine.
pub const TURN: u64 = 1 << 16;

/// Take the interrupts that are pending. Did one come?
pub fn take_interrupts() -> bool {
    let before = descriptors::doorbells();
    cpu::take_interrupts();
    // Another CPU's counts as well: the guest leaves once too often.
    descriptors::doorbells() != before
}

/// Entries of extended tables: a table that allows everything, a leaf of memory that is cached
/// write-back.
const TABLE: u64 = 7;
const LEAF: u64 = 7 | 6 << 3;
/// A jump to itself.
const LOOP: u64 = 0xfeeb;
/// Turns that the guest is given.
const TURNS: usize = 4;

/// Find out, on CPU 0 with VMX on.
///
/// # Errors
/// The guest could not be run.
pub fn find_out(abilities: Abilities) -> Result<(), VirtError> {
    let mut pages: [Region; 5] = core::array::from_fn(|_| Region::zeroed());
    for level in 0..4 {
        let kind = if level == 3 { LEAF } else { TABLE };
        let below = pages[level + 1].physical();
        pages[level].set_word(0, below | kind);
    }
    pages[4].set_word(0, LOOP);
    let mut vcpu = VmxVcpu::new(abilities, VcpuSetup::NESTED)?;
    *vcpu.state() = GuestState::new(Mode::Real, 0, 0x1000, 0);
    let frame = Pfn::new(pages[0].physical() >> 12);
    vcpu.set_root(Root { frame, levels: Level::L4, accessed_dirty: false });
    cpu::ring(cpu::current());
    let mut exit = vcpu.once();
    // A turn that ends by the clock is not an answer yet: the doorbell may be on its way.
    for _ in 1..TURNS {
        if exit.is_none() {
            exit = vcpu.once();
        }
    }
    let found = match exit {
        Some(Exit::Interrupt) => Hearing::Sound,
        None if take_interrupts() => Hearing::Deaf,
        Some(exit) => {
            println!("vmx: a guest that loops: {exit}");
            return Err(VirtError { step: "running a guest that loops", value: 0 });
        }
        None => return Err(VirtError { step: "ringing the doorbell", value: 0 }),
    };
    HEARING.store(found as u8, Ordering::Relaxed);
    if found == Hearing::Deaf {
        println!(
            "  [note] interrupts do not end the run of a guest with IF = 0 (SDM 3C 26.4.1: \"If \
             the external-interrupt exiting VM-execution control is 1, RFLAGS.IF does not control \
             the blocking of external interrupts\"); the preemption timer does"
        );
    }
    Ok(())
}
