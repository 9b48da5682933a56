//! A virtual CPU of SVM: its block between two exits.
//!
//! Owns [`SvmVcpu`]. The block is written anew before each entry: some emulators leave it in a
//! state of their own after a refused one. No locks.

use alloc::boxed::Box;

use mmu_core::access::NpfInfo;
use mmu_core::addr::{Gfn, Gpa, Level, Pfn};
use x86::controlregs;

use super::EFER_SVME;
use super::enter::{enter, invalidate};
use super::tag::Tag;
use super::vmcb::{Descriptor, MASK_BY_HOST, NESTED, Save, Vmcb, code, event, intercept, tlb};
use crate::machine::memory::physical;
use crate::machine::{cpu, paging};
use crate::virt::state::gpr::{RAX, RSP};
use crate::virt::{
    Exit, GuestPageFault, GuestState, LocalFlush, NestedFault, RawFault, Root, Segment, Table,
    Translation, Vcpu, VcpuSetup,
};

/// Exit on every port and every MSR.
#[repr(C, align(4096))]
struct Map([u8; 3 * 4096]);

static EVERYTHING: Map = Map([0xff; 3 * 4096]);

/// PAT as a reset leaves it.
const PAT: u64 = 0x0007_0406_0007_0406;
/// DR6 and DR7 as a reset leaves them.
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
/// What a processor that walks shadow tables has on: CR0.PG and WP, CR4.PAE, EFER.NXE.
const SHADOW_CR0: u64 = 1 << 31 | 1 << 16;
const SHADOW_CR4: u64 = 1 << 5;
const SHADOW_EFER: u64 = 1 << 11;

/// A virtual CPU.
pub struct SvmVcpu {
    vmcb: Box<Vmcb>,
    state: GuestState,
    setup: VcpuSetup,
    root: Root,
    /// Physical address of the page for the host's VMSAVE.
    host: u64,
    tags: u32,
    /// Can one ASID be flushed?
    by_asid: bool,
    tag: Tag,
    flush: Option<LocalFlush>,
    /// The event that the next entry delivers; 0 for none.
    event: u64,
}

impl SvmVcpu {
    pub fn new(setup: VcpuSetup, host: u64, tags: u32, by_asid: bool) -> Self {
        let root = Root { frame: Pfn::new(0), levels: Level::L4, accessed_dirty: true };
        let (vmcb, state) = (Box::new(Vmcb::zeroed()), GuestState::default());
        let (tag, flush, event) = (Tag::NONE, None, 0);
        Self { vmcb, state, setup, root, host, tags, by_asid, tag, flush, event }
    }

    /// The TLB control of the next entry; chooses the ASID.
    fn settle_flush(&mut self) -> u32 {
        let wanted = self.flush.take();
        if !self.tag.is_current() {
            let (tag, all) = Tag::take(self.tags);
            self.tag = tag;
            let all = all || wanted == Some(LocalFlush::All);
            return if all { tlb::FLUSH_ALL } else { tlb::KEEP };
        }
        match wanted {
            None => tlb::KEEP,
            Some(LocalFlush::All) => tlb::FLUSH_ALL,
            Some(LocalFlush::Context) if self.by_asid => tlb::FLUSH_ASID,
            // Nothing is cached under an ASID that nobody had.
            Some(LocalFlush::Context) => {
                let (tag, all) = Tag::take(self.tags);
                self.tag = tag;
                if all { tlb::FLUSH_ALL } else { tlb::KEEP }
            }
            Some(LocalFlush::Linear(address)) => {
                invalidate(address, self.tag.asid);
                tlb::KEEP
            }
        }
    }

    fn write_control(&mut self, tlb_control: u32) {
        let shadow = self.setup.translation == Translation::Shadow;
        let control = &mut self.vmcb.control;
        let control_registers = intercept::CONTROL_WRITES | intercept::CONTROL_READS;
        control.intercept_cr = if shadow { control_registers } else { 0 };
        let faults_exit = shadow || self.setup.page_faults_exit;
        control.intercept_exceptions = if faults_exit { intercept::PAGE_FAULT } else { 0 };
        let always = intercept::INTR
            | intercept::NMI
            | intercept::INIT
            | intercept::CPUID
            | intercept::HLT
            | intercept::INVLPGA
            | intercept::IO
            | intercept::MSR
            | intercept::SHUTDOWN;
        let invlpg = if shadow { intercept::INVLPG } else { 0 };
        control.intercept = [always | invlpg, intercept::SVM_INSTRUCTIONS];
        control.io_map = physical(&EVERYTHING);
        control.msr_map = physical(&EVERYTHING);
        control.asid = self.tag.asid;
        control.tlb_control = tlb_control;
        control.virtual_interrupt = MASK_BY_HOST;
        control.nested = if shadow { 0 } else { NESTED };
        control.nested_cr3 = self.root.frame.address().get();
        control.exit_code = 0;
        control.inject = core::mem::take(&mut self.event);
        control.interrupt_shadow = 0;
    }

    fn write_state(&mut self) {
        let state = &self.state;
        let shadow = self.setup.translation == Translation::Shadow;
        let table = |table: Table| Descriptor::table(table.base, table.limit.into());
        let save = &mut self.vmcb.save;
        save.es = state.es.into();
        save.cs = state.cs.into();
        save.ss = state.ss.into();
        save.ds = state.ds.into();
        save.fs = state.fs.into();
        save.gs = state.gs.into();
        save.ldtr = state.ldtr.into();
        save.tr = state.tr.into();
        save.gdtr = table(state.gdtr);
        save.idtr = table(state.idtr);
        save.cpl = save.ss.privilege();
        save.efer = state.efer | EFER_SVME | if shadow { SHADOW_EFER } else { 0 };
        save.cr0 = state.cr0 | if shadow { SHADOW_CR0 } else { 0 };
        save.cr2 = state.cr2;
        save.cr3 = if shadow { self.root.frame.address().get() } else { state.cr3 };
        save.cr4 = state.cr4 | if shadow { SHADOW_CR4 } else { 0 };
        save.dr6 = DR6;
        save.dr7 = DR7;
        save.rflags = state.rflags;
        save.rip = state.rip;
        save.rsp = state.gpr[RSP];
        save.rax = state.gpr[RAX];
        save.pat = PAT;
    }

    fn read_state(&mut self) {
        let shadow = self.setup.translation == Translation::Shadow;
        let table = |descriptor: Descriptor| {
            let (base, limit) = descriptor.base_limit();
            Table { base, limit: limit as u16 }
        };
        let (state, save) = (&mut self.state, &self.vmcb.save);
        state.es = Segment::from(save.es);
        state.cs = Segment::from(save.cs);
        state.ss = Segment::from(save.ss);
        state.ds = Segment::from(save.ds);
        state.fs = Segment::from(save.fs);
        state.gs = Segment::from(save.gs);
        state.ldtr = Segment::from(save.ldtr);
        state.tr = Segment::from(save.tr);
        state.gdtr = table(save.gdtr);
        state.idtr = table(save.idtr);
        state.cr2 = save.cr2;
        // With shadow paging they are what the guest believes, and it does not write them unseen.
        if !shadow {
            state.efer = save.efer & !EFER_SVME;
            (state.cr0, state.cr3, state.cr4) = (save.cr0, save.cr3, save.cr4);
        }
        state.rflags = save.rflags;
        state.rip = save.rip;
        state.gpr[RSP] = save.rsp;
        state.gpr[RAX] = save.rax;
    }

    /// What the exit means; moves RIP behind instructions that are done.
    fn decode(&mut self) -> Exit {
        let control = &self.vmcb.control;
        let (reason, [first, second]) = (control.exit_code, control.exit_info);
        // Not every CPU says where the next instruction is; these have one length each.
        let mut skip = |bytes: u64| self.state.rip += bytes;
        match reason {
            code::NESTED => Exit::Nested(NestedFault {
                gpa: Gpa::new(second),
                linear: None,
                raw: RawFault::Npf(NpfInfo::from_bits_retain(first)),
            }),
            // Bit 0: IN; bit 2: a string instruction. The other number is where to go on.
            code::IO if first & 5 == 0 => {
                let size = (first >> 4 & 7) as u8;
                let mask = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
                self.state.rip = second;
                let value = self.state.gpr[RAX] as u32 & mask;
                Exit::Out { port: (first >> 16) as u16, size, value }
            }
            code::HLT => {
                skip(1);
                Exit::Halt
            }
            code::CALL => {
                skip(3);
                Exit::Call
            }
            code::CPUID => {
                skip(2);
                Exit::Cpuid
            }
            code::PAGE_FAULT => Exit::PageFault { address: second, code: first },
            code::WRITE_CR0..=code::WRITE_CR4 => {
                let register = (reason - code::WRITE_CR0) as u8;
                Exit::ControlWrite { register, value: self.state.gpr[RAX] }
            }
            code::INVLPG => Exit::InvalidatePage { address: first },
            code::INTR => Exit::Interrupt,
            code::NMI => Exit::Nmi,
            code::SHUTDOWN => Exit::Shutdown,
            reason if code::INVALID.contains(&reason) => Exit::Invalid { value: first },
            reason => Exit::Other { reason, detail: first },
        }
    }

    /// One entry.
    fn once(&mut self) -> Exit {
        // Nested tables have as many levels as the host's own.
        if self.setup.translation == Translation::Nested {
            paging::use_levels(self.root.levels);
        }
        let tlb_control = self.settle_flush();
        self.write_control(tlb_control);
        self.write_state();
        // VMRUN loads it, too (APM 2, 15.5.1), but in Bochs 2.7.
        // SAFETY: the host takes no page fault between here and the guest, and reads CR2 only after
        // one.
        unsafe { controlregs::cr2_write(self.state.cr2) };
        // SAFETY: SVM is on (`Svm::vcpu` found the host's page, which `Svm::enable` made); all
        // ports and MSRs exit; the nested tables are the MMU's, or the caller's own in suites that
        // try tables by hand, and name the guest's memory only; interrupts are off by the trait's
        // contract.
        unsafe { enter(&mut self.state.gpr, &mut self.vmcb, self.host) };
        self.read_state();
        // An event that was being delivered begins anew.
        let cut_short = self.vmcb.control.exit_interrupt;
        self.event = if cut_short & event::VALID != 0 { cut_short } else { 0 };
        let exit = self.decode();
        if exit == Exit::Interrupt {
            cpu::take_interrupts();
        }
        exit
    }
}

impl Vcpu for SvmVcpu {
    fn state(&mut self) -> &mut GuestState {
        &mut self.state
    }

    fn set_root(&mut self, root: Root) {
        self.root = root;
        self.flush(LocalFlush::Context);
    }

    fn flush(&mut self, what: LocalFlush) {
        // Two different addresses are more than one entry can name.
        let both = match self.flush {
            None => what,
            Some(before) if before == what => what,
            Some(before) => before.max(what).max(LocalFlush::Context),
        };
        self.flush = Some(both);
    }

    fn run(&mut self) -> Exit {
        loop {
            let exit = self.once();
            match exit {
                // The guest's own is not the processor's. Not every CPU says where it is to go:
                // the guest programs use RAX. The instruction has three bytes.
                Exit::Other {
                    reason: reason @ (code::READ_CR0 | code::READ_CR3 | code::READ_CR4),
                    ..
                } => {
                    self.state.gpr[RAX] = match reason {
                        code::READ_CR0 => self.state.cr0,
                        code::READ_CR3 => self.state.cr3,
                        _ => self.state.cr4,
                    };
                    self.state.rip += 3;
                }
                exit => return exit,
            }
        }
    }

    fn inject(&mut self, fault: GuestPageFault) {
        self.state.cr2 = fault.address;
        self.event = event::PAGE_FAULT | u64::from(fault.code) << 32;
    }

    fn take_log(&mut self, _: &mut dyn FnMut(Gfn)) {}

    fn tag(&self) -> u64 {
        self.tag.asid.into()
    }
}

/// Only to keep the layout's user in sight: the save area is part of the block.
const _: () = assert!(size_of::<Save>() == 0xc00);
