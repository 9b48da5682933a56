//! The four top entries of a PAE guest's tables, which an entry takes from the VMCS and not from
//! memory (SDM 3C 27.3.2.4).
//!
//! The processor itself reads them when the guest loads CR3. A guest that *begins* with PAE, or
//! whose CR3 the program changed, has done no such thing: so they are read here, through the
//! extended tables as MOV to CR3 would, and if that fails the guest exits as MOV to CR3 would. No
//! A bit is set on the way. No locks: entries are read as the atomic words they are.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::access::EptViolation;
use mmu_core::addr::{Gfn, Gpa};
use x86::controlregs::{Cr0, Cr4};
use x86::vmx::vmcs::guest;

use super::instr;
use crate::virt::{GuestState, NestedFault, RawFault, Root};

/// Address bits of an extended entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Present in any way; readable; a leaf above level 1.
const PRESENT: u64 = 7;
const READABLE: u64 = 1;
const LEAF: u64 = 1 << 7;
/// EFER.LMA.
const LONG_ACTIVE: u64 = 1 << 10;

/// Does the guest page with PAE, outside long mode?
pub const fn applies(state: &GuestState) -> bool {
    state.cr0 & Cr0::CR0_ENABLE_PAGING.bits() as u64 != 0
        && state.cr4 & Cr4::CR4_ENABLE_PAE.bits() as u64 != 0
        && state.efer & LONG_ACTIVE == 0
}

/// Give the current VMCS the entries at `cr3`, a guest physical address under `root`.
///
/// # Errors
/// The fault that the processor's own read would exit with.
pub fn load(root: Root, cr3: u64) -> Result<(), NestedFault> {
    let table = cr3 & 0xffff_ffe0;
    let fields = [guest::PDPTE0_FULL, guest::PDPTE1_FULL, guest::PDPTE2_FULL, guest::PDPTE3_FULL];
    // The four of them lie in one page.
    let physical = translate(root, table)?;
    for (index, field) in (0_u64..).zip(fields) {
        instr::write_guest(field, word(physical + 8 * index));
    }
    Ok(())
}

/// Physical address behind guest physical address `gpa`, to be read.
fn translate(root: Root, gpa: u64) -> Result<u64, NestedFault> {
    let mut level = root.levels;
    let mut table = root.frame.get() << 12;
    loop {
        let index = Gfn::containing(Gpa::new(gpa)).index(level) as u64;
        let entry = word(table + index * 8);
        if entry & READABLE == 0 {
            return Err(fault(gpa, entry));
        }
        match level.down() {
            Some(lower) if entry & LEAF == 0 => {
                table = entry & ADDRESS;
                level = lower;
            }
            _ => {
                let inside = (level.pages() << 12) - 1;
                return Ok(entry & ADDRESS & !inside | gpa & inside);
            }
        }
    }
}

fn fault(gpa: u64, entry: u64) -> NestedFault {
    // No linear address led here.
    let violation = EptViolation::READ | EptViolation::from_bits_retain((entry & PRESENT) << 3);
    NestedFault { gpa: Gpa::new(gpa), linear: None, raw: RawFault::Violation(violation) }
}

/// The word at a physical address in the direct map.
fn word(at: u64) -> u64 {
    assert!(at % 8 == 0 && at != 0, "{at:#x} is no place for an entry");
    // SAFETY: table frames and guest memory are RAM in the direct map for good (`machine/memory`),
    // aligned (asserted), and seen by all as atomic words.
    let word = unsafe { &*(at as *const AtomicU64) };
    word.load(Ordering::Acquire)
}
