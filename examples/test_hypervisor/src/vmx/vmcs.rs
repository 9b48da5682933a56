//! A VMCS with what it points to: the hardware log.
//!
//! Owns [`Vmcs`]: made, current when told, cleared when dropped. The host half is this CPU's state
//! at the time of making, which this program does not change afterwards. Neighbours: `guest` for
//! the guest half, `wanted` for the controls. No locks: used by the CPU that made it.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::Gfn;
use x86::vmx::vmcs::{control, guest, host, ro};
use x86::{controlregs, dtables, msr, segmentation, task};

use super::abilities::Abilities;
use super::enter;
use super::instr::{self, Failed};
use super::region::Region;
use super::wanted::{LONG_GUEST, PAGE_FAULT, Wanted};
use crate::machine::cpu::{self, MAX_CPUS};
use crate::virt::{HardwareLog, VirtError};

/// Entries of the hardware log; it is filled from the last one down.
const LOG_ENTRIES: u64 = 512;

/// The current VMCS of each CPU, 0 for none; used by that CPU alone.
static CURRENT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// A VMCS of this CPU.
#[derive(Debug)]
pub struct Vmcs {
    region: Region,
    log: Option<Region>,
    /// The entry controls, without the guest's mode.
    entry: u32,
}

/// An event for the guest: what the VM-entry fields are to hold.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    information: u64,
    code: u64,
}

/// Interruption information: there is an event; it has an error code.
const VALID: u64 = 1 << 31;
const HAS_CODE: u64 = 1 << 11;
/// Type 10:8: an exception.
const EXCEPTION: u64 = 3 << 8;
/// Of an event whose delivery was cut short, what says how to deliver it: bit 12 is undefined.
const EVENT: u64 = VALID | HAS_CODE | 0x7ff;

impl Event {
    /// #PF with this error code. CR2 is not part of it.
    pub const fn page_fault(code: u32) -> Self {
        let information = VALID | HAS_CODE | EXCEPTION | PAGE_FAULT as u64;
        Self { information, code: code as u64 }
    }
}

/// What an entry must know of the guest's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMode {
    /// EFER.LMA is set.
    Long,
    /// It is not.
    Other,
}

fn named(step: &'static str) -> impl Fn(Failed) -> VirtError {
    move |Failed(value)| VirtError { step, value }
}

impl Vmcs {
    /// A VMCS with these controls and this CPU as its host; current. The guest half but for what
    /// `guest` never touches is undefined.
    ///
    /// # Errors
    /// [`VirtError`] names the step and holds the instruction error.
    pub fn new(
        abilities: &Abilities,
        wanted: &Wanted,
        log: HardwareLog,
        vpid: u16,
    ) -> Result<Self, VirtError> {
        let log = match log {
            HardwareLog::On => Some(Region::zeroed()),
            HardwareLog::Off => None,
        };
        let this =
            Self { region: Region::with_revision(abilities.revision), log, entry: wanted.entry };
        instr::vmclear(&this.region).map_err(named("VMCLEAR"))?;
        this.make_current().map_err(named("VMPTRLD"))?;
        this.write_controls(wanted, vpid).map_err(named("VMWRITE of a control"))?;
        write_host().map_err(named("VMWRITE of host state"))?;
        for (field, value) in [
            // No shadow VMCS.
            (guest::LINK_PTR_FULL, u64::MAX),
            (guest::IA32_DEBUGCTL_FULL, 0),
            (guest::DR7, 0x400),
            (guest::IA32_SYSENTER_CS, 0),
            (guest::IA32_SYSENTER_ESP, 0),
            (guest::IA32_SYSENTER_EIP, 0),
            (guest::INTERRUPTIBILITY_STATE, 0),
            (guest::ACTIVITY_STATE, 0),
            (guest::PENDING_DBG_EXCEPTIONS, 0),
        ] {
            instr::write_guest(field, value);
        }
        if this.log.is_some() {
            instr::write_guest(guest::PML_INDEX, LOG_ENTRIES - 1);
        }
        Ok(this)
    }

    fn write_controls(&self, wanted: &Wanted, vpid: u16) -> Result<(), Failed> {
        let fields = [
            (control::PINBASED_EXEC_CONTROLS, u64::from(wanted.pin)),
            (control::PRIMARY_PROCBASED_EXEC_CONTROLS, u64::from(wanted.primary)),
            (control::SECONDARY_PROCBASED_EXEC_CONTROLS, u64::from(wanted.secondary)),
            (control::VMEXIT_CONTROLS, u64::from(wanted.exit)),
            (control::VMENTRY_CONTROLS, u64::from(wanted.entry)),
            (control::EXCEPTION_BITMAP, u64::from(wanted.exceptions)),
            // Every page fault's code matches: the exception bitmap alone decides.
            (control::PAGE_FAULT_ERR_CODE_MASK, 0),
            (control::PAGE_FAULT_ERR_CODE_MATCH, 0),
            (control::CR3_TARGET_COUNT, 0),
            (control::VMEXIT_MSR_STORE_COUNT, 0),
            (control::VMEXIT_MSR_LOAD_COUNT, 0),
            (control::VMENTRY_MSR_LOAD_COUNT, 0),
            (control::VMENTRY_INTERRUPTION_INFO_FIELD, 0),
        ];
        for (field, value) in fields {
            // SAFETY: controls that make more exit, and no MSRs or events to load.
            unsafe { instr::write(field, value) }?;
        }
        if wanted.has_vpid() {
            // SAFETY: a tag of translations; the vCPU's own.
            unsafe { instr::write(control::VPID, u64::from(vpid)) }?;
        }
        if let Some(log) = &self.log {
            // SAFETY: the page is ours as long as the VMCS, and accessed as the processor may.
            unsafe { instr::write(control::PML_ADDR_FULL, log.physical()) }?;
        }
        Ok(())
    }

    /// Make it the current one: every other function of this file that names `self` needs it.
    ///
    /// # Errors
    /// The processor refuses.
    pub fn make_current(&self) -> Result<(), Failed> {
        let physical = self.region.physical();
        let current = &CURRENT[cpu::current()];
        if current.load(Ordering::Relaxed) != physical {
            instr::vmptrld(&self.region)?;
            current.store(physical, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The guest goes on in 64-bit mode, or in another. An exit writes this control too.
    pub fn set_guest_mode(&self, mode: GuestMode) {
        let entry = match mode {
            GuestMode::Long => self.entry | LONG_GUEST,
            GuestMode::Other => self.entry,
        };
        // SAFETY: `Wanted` has the word but for the guest's mode, which is the guest's business.
        let written = unsafe { instr::write(control::VMENTRY_CONTROLS, u64::from(entry)) };
        if let Err(error) = written {
            panic!("VMWRITE of the entry controls: {error:?}");
        }
    }

    /// Deliver `event` at the next entry; the processor forgets it then.
    pub fn deliver(&self, event: Event) {
        let fields = [
            (control::VMENTRY_INTERRUPTION_INFO_FIELD, event.information),
            (control::VMENTRY_EXCEPTION_ERR_CODE, event.code),
        ];
        for (field, value) in fields {
            // SAFETY: the event is the guest's: its handlers run, with its tables and registers.
            if let Err(error) = unsafe { instr::write(field, value) } {
                panic!("VMWRITE of {field:#x}: {error:?}");
            }
        }
    }

    /// The event whose delivery the last exit cut short.
    pub fn cut_short(&self) -> Option<Event> {
        let information = instr::field(ro::IDT_VECTORING_INFO);
        (information & VALID != 0).then(|| Event {
            information: information & EVENT,
            code: instr::field(ro::IDT_VECTORING_ERR_CODE),
        })
    }

    /// Hand over what the log holds, oldest first, and empty it.
    pub fn take_log(&self, page: &mut dyn FnMut(Gfn)) {
        let Some(log) = &self.log else { return };
        // The next entry to be written; beyond the last one when the log is full, below 0.
        let next = instr::field(guest::PML_INDEX);
        let first = if next >= LOG_ENTRIES { 0 } else { next + 1 };
        for index in (first..LOG_ENTRIES).rev() {
            page(Gfn::new(log.word(index as usize) >> 12));
        }
        instr::write_guest(guest::PML_INDEX, LOG_ENTRIES - 1);
    }
}

impl Drop for Vmcs {
    fn drop(&mut self) {
        // The processor may keep parts of a VMCS and write them back later: not any more. Nor is
        // it the current one now, if it was.
        let current = &CURRENT[cpu::current()];
        if current.load(Ordering::Relaxed) == self.region.physical() {
            current.store(0, Ordering::Relaxed);
        }
        if let Err(error) = instr::vmclear(&self.region) {
            panic!("VMCLEAR: {error:?}");
        }
    }
}

/// Base of the TSS that `selector` names in the GDT at `gdt`.
///
/// # Safety
/// The GDT holds a TSS's descriptor, of 16 bytes, there.
unsafe fn task_base(gdt: *const u64, selector: u64) -> u64 {
    let entry = gdt.wrapping_add(selector as usize / size_of::<u64>());
    // SAFETY: the caller's promise.
    let low = unsafe { entry.read_volatile() };
    // SAFETY: the caller's promise; volatile, because the processor sets the busy bit.
    let high = unsafe { entry.wrapping_add(1).read_volatile() };
    high << 32 | (low >> 32 & 0xff00_0000) | (low >> 16 & 0xff_ffff)
}

/// The host half: this CPU as it is, so that an exit changes nothing but RIP and RSP.
fn write_host() -> Result<(), Failed> {
    let mut gdt = dtables::DescriptorTablePointer::<u64>::default();
    // SAFETY: stores the register.
    unsafe { dtables::sgdt(&mut gdt) };
    let mut idt = dtables::DescriptorTablePointer::<u64>::default();
    // SAFETY: stores the register.
    unsafe { dtables::sidt(&mut idt) };
    // SAFETY: reading it at CPL 0 has no effect.
    let cr0 = unsafe { controlregs::cr0() }.bits() as u64;
    // SAFETY: as above.
    let cr3 = unsafe { controlregs::cr3() };
    // SAFETY: as above.
    let cr4 = unsafe { controlregs::cr4() }.bits() as u64;
    let msr = |number| {
        // SAFETY: reading MSRs of every 64-bit processor at CPL 0 has no effect.
        unsafe { msr::rdmsr(number) }
    };
    // SAFETY: as above.
    let task = u64::from(unsafe { task::tr() }.bits());
    // SAFETY: the task register was loaded from this GDT.
    let task_base = unsafe { task_base(gdt.base, task) };
    let selector = |selector: segmentation::SegmentSelector| u64::from(selector.bits() & !7);
    let fields = [
        (host::CR0, cr0),
        (host::CR3, cr3),
        (host::CR4, cr4),
        (host::IA32_EFER_FULL, msr(msr::IA32_EFER)),
        (host::CS_SELECTOR, selector(segmentation::cs())),
        (host::SS_SELECTOR, selector(segmentation::ss())),
        (host::DS_SELECTOR, selector(segmentation::ds())),
        (host::ES_SELECTOR, selector(segmentation::es())),
        (host::FS_SELECTOR, selector(segmentation::fs())),
        (host::GS_SELECTOR, selector(segmentation::gs())),
        (host::TR_SELECTOR, task),
        (host::FS_BASE, msr(msr::IA32_FS_BASE)),
        (host::GS_BASE, msr(msr::IA32_GS_BASE)),
        (host::TR_BASE, task_base),
        (host::GDTR_BASE, gdt.base.addr() as u64),
        (host::IDTR_BASE, idt.base.addr() as u64),
        (host::IA32_SYSENTER_CS, 0),
        (host::IA32_SYSENTER_ESP, 0),
        (host::IA32_SYSENTER_EIP, 0),
        (host::RIP, enter::exit_address()),
    ];
    for (field, value) in fields {
        // SAFETY: an exit leaves this CPU with the registers that it has now, and goes to the code
        // that `enter` has for it, which also notes RSP.
        unsafe { instr::write(field, value) }?;
    }
    Ok(())
}
