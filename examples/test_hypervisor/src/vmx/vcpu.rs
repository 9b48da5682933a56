//! A virtual CPU of VMX.
//!
//! Owns [`VmxVcpu`]: a VMCS, the guest's registers, the tables in use, flushes that are owed to
//! the next entry. Belongs to the CPU that made it. No locks; interrupts are off around the guest.

use core::sync::atomic::{AtomicU32, Ordering};

use mmu_core::addr::Gfn;
use x86::controlregs;
use x86::vmx::vmcs::{control, guest, ro};

use super::abilities::{Abilities, EptVpid};
use super::enter::{self, By, Entered};
use super::ept::{self, Context, Eptp};
use super::exit::{self, Decoded};
use super::guest::Shadowed;
use super::instr;
use super::vmcs::{Event, GuestMode, Vmcs};
use super::wanted::Wanted;
use crate::machine::cpu;
use crate::println;
use crate::virt::state::gpr;
use crate::virt::{
    Exit, GuestPageFault, GuestState, LocalFlush, Root, Translation, Vcpu, VcpuSetup, VirtError,
};

/// EFER.LMA.
const LONG_ACTIVE: u64 = 1 << 10;

/// A virtual CPU.
#[derive(Debug)]
pub struct VmxVcpu {
    abilities: Abilities,
    vmcs: Vmcs,
    held: Shadowed,
    /// The guest's registers, but for what the VMCS holds unless `state_held`.
    state: GuestState,
    /// `state` is complete, and may differ from what the VMCS holds.
    state_held: bool,
    translation: Translation,
    context: Context,
    /// What the next entry has to forget.
    owed: Option<LocalFlush>,
    /// The event that the next entry delivers.
    event: Option<Event>,
    by: By,
}

/// Tags in use, over all CPUs. Reused after 65535 of them, when their first owner is long gone.
static TAGS: AtomicU32 = AtomicU32::new(0);

impl VmxVcpu {
    /// A vCPU of this CPU.
    ///
    /// # Errors
    /// [`VirtError`] names the step.
    pub fn new(abilities: Abilities, setup: VcpuSetup) -> Result<Self, VirtError> {
        let wanted = Wanted::new(&abilities, setup)?;
        let tag = TAGS.fetch_add(1, Ordering::Relaxed) % u32::from(u16::MAX) + 1;
        let vpid = if wanted.has_vpid() { tag as u16 } else { 0 };
        let vmcs = Vmcs::new(&abilities, &wanted, setup.log, vpid)?;
        let held = Shadowed::new(setup.translation);
        let context = Context { eptp: None, vpid };
        // Whoever had the tag before may have left something under it.
        if abilities.ept_vpid.contains(EptVpid::INVVPID) {
            ept::flush(&abilities, context, LocalFlush::Context);
        }
        Ok(Self {
            abilities,
            vmcs,
            held,
            state: GuestState::default(),
            state_held: true,
            translation: setup.translation,
            context,
            owed: None,
            event: None,
            by: By::Launch,
        })
    }

    fn make_current(&self) {
        if let Err(error) = self.vmcs.make_current() {
            panic!("VMPTRLD: {error:?}");
        }
    }

    fn owe(&mut self, what: LocalFlush) {
        self.owed = self.owed.max(Some(what));
    }

    /// What the state asks of the VMCS.
    fn prepare(&mut self) {
        self.make_current();
        if let Some(what) = self.owed.take() {
            ept::flush(&self.abilities, self.context, what);
        }
        if self.state_held {
            let long = self.state.efer & LONG_ACTIVE != 0;
            self.vmcs.set_guest_mode(if long { GuestMode::Long } else { GuestMode::Other });
            self.held.store(&self.state);
        }
        if let Some(event) = self.event.take() {
            self.vmcs.deliver(event);
        }
    }

    fn enter(&mut self) -> Entered {
        // SAFETY: the host takes no page fault between here and the guest, and reads CR2 only
        // after one.
        unsafe { controlregs::cr2_write(self.state.cr2) };
        // SAFETY: `Vmcs` has set up the host half on this CPU; the controls confine the guest to
        // the tables of `set_root`, which its caller answers for.
        let entered = unsafe { enter::enter(&mut self.state.gpr, self.by) };
        // SAFETY: reads a register.
        self.state.cr2 = unsafe { controlregs::cr2() } as u64;
        entered
    }

    /// Put RIP behind the instruction that exited. It has been executed as far as the guest can
    /// tell, so it also ends the shadow of an STI.
    fn step_over(&self) {
        let length = instr::field(ro::VMEXIT_INSTRUCTION_LEN);
        let rip = instr::field(guest::RIP).wrapping_add(length);
        instr::write_guest(guest::RIP, rip);
        instr::write_guest(guest::INTERRUPTIBILITY_STATE, 0);
    }

    /// One entry; `None` when the guest is to go on.
    fn once(&mut self) -> Option<Exit> {
        self.prepare();
        match self.enter() {
            Entered::Exited => {}
            Entered::Failed => return Some(refused(instr::instruction_error())),
            Entered::NoVmcs => return Some(refused(instr::NO_VMCS)),
        }
        self.state_held = false;
        let decoded = exit::decode(&self.state.gpr);
        if let Decoded::On(Exit::Invalid { value }) = decoded {
            // A guest that was not entered is no more launched than before.
            let detail = instr::field(ro::EXIT_QUALIFICATION);
            println!("vmx: entry failed: {} ({detail:#x})", exit::entry_failure(value));
        } else {
            self.by = By::Resume;
            self.event = self.vmcs.cut_short();
        }
        match decoded {
            Decoded::On(exit) => Some(exit),
            Decoded::Behind(exit) => {
                self.step_over();
                Some(exit)
            }
            Decoded::Interrupt => {
                cpu::take_interrupts();
                Some(Exit::Interrupt)
            }
            Decoded::ReadCr3 { register } => {
                let cr3 = self.state.cr3;
                if register == gpr::RSP {
                    instr::write_guest(guest::RSP, cr3);
                } else if let Some(general) = self.state.gpr.get_mut(register) {
                    *general = cr3;
                }
                self.step_over();
                None
            }
        }
    }
}

/// The instruction that enters the guest failed.
fn refused(error: u64) -> Exit {
    println!("vmx: entry refused: {}", exit::spelled(error));
    Exit::Invalid { value: error }
}

impl Vcpu for VmxVcpu {
    fn state(&mut self) -> &mut GuestState {
        // Only now: inside a hypervisor each VMREAD may be an exit, and for most exits of a guest
        // nobody asks.
        if !self.state_held {
            self.make_current();
            self.held.load(&mut self.state);
            self.state_held = true;
        }
        &mut self.state
    }

    fn set_root(&mut self, root: Root) {
        match self.translation {
            Translation::Nested => {
                let eptp = Eptp::new(root);
                self.make_current();
                // SAFETY: the guest is confined to what the tree maps, which the caller answers
                // for; the processor accesses its frames as `PhysMap` allows page walkers to.
                let written = unsafe { instr::write(control::EPTP_FULL, eptp.get()) };
                if let Err(error) = written {
                    panic!("VMWRITE of the EPTP: {error:?}");
                }
                self.context.eptp = Some(eptp);
            }
            Translation::Shadow => {
                // Part of the state that the next entry writes.
                self.state();
                self.held.set_shadow_root(root.frame.get() << 12);
            }
        }
        self.owe(LocalFlush::Context);
    }

    fn flush(&mut self, what: LocalFlush) {
        match what {
            // There may be several of these, so none is kept.
            LocalFlush::Linear(_) => ept::flush(&self.abilities, self.context, what),
            LocalFlush::Context | LocalFlush::All => self.owe(what),
        }
    }

    fn run(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.once() {
                return exit;
            }
        }
    }

    fn inject(&mut self, fault: GuestPageFault) {
        // CR2 is exchanged at each entry.
        self.state.cr2 = fault.address;
        self.event = Some(Event::page_fault(fault.code));
    }

    fn take_log(&mut self, page: &mut dyn FnMut(Gfn)) {
        self.make_current();
        self.vmcs.take_log(page);
    }

    fn tag(&self) -> u64 {
        u64::from(self.context.vpid)
    }
}
