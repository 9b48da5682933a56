//! The virtual machine control block (APM 2, appendix B): offsets as hardware has them.

use core::mem::offset_of;

use crate::virt::Segment;

/// Intercepts of instructions and events: the third word of the vector.
pub mod intercept {
    /// External interrupts.
    pub const INTR: u32 = 1 << 0;
    /// NMIs.
    pub const NMI: u32 = 1 << 1;
    /// INIT signals.
    pub const INIT: u32 = 1 << 3;
    /// CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// INVLPG.
    pub const INVLPG: u32 = 1 << 25;
    /// INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// I/O, by the permission map.
    pub const IO: u32 = 1 << 27;
    /// MSRs, by the permission map.
    pub const MSR: u32 = 1 << 28;
    /// Triple faults.
    pub const SHUTDOWN: u32 = 1 << 31;
    /// The fourth word: VMRUN (which must be set), VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT.
    pub const SVM_INSTRUCTIONS: u32 = 0x7f;
    /// The first word: writes of CR0, CR3, CR4.
    pub const CONTROL_WRITES: u32 = 1 << 16 | 1 << 19 | 1 << 20;
    /// The same word: reads of CR0, CR3, CR4.
    pub const CONTROL_READS: u32 = 1 << 0 | 1 << 3 | 1 << 4;
    /// The second word: #PF.
    pub const PAGE_FAULT: u32 = 1 << 14;
}

/// Values of the TLB control field.
pub mod tlb {
    /// Forget nothing.
    pub const KEEP: u32 = 0;
    /// Forget everything of every ASID.
    pub const FLUSH_ALL: u32 = 1;
    /// Forget what is tagged with this ASID.
    pub const FLUSH_ASID: u32 = 3;
}

/// V_INTR_MASKING: the host's interrupt flag, not the guest's, masks host interrupts.
pub const MASK_BY_HOST: u64 = 1 << 24;
/// Nested paging.
pub const NESTED: u64 = 1;

/// Events: to be injected, and whose delivery an exit cut short.
pub mod event {
    /// There is one.
    pub const VALID: u64 = 1 << 31;
    /// #PF: its vector, an exception, with an error code in the upper half.
    pub const PAGE_FAULT: u64 = VALID | 1 << 11 | 3 << 8 | 14;
}

/// Exit codes.
pub mod code {
    /// A read of CR0.
    pub const READ_CR0: u64 = 0x00;
    /// A read of CR3.
    pub const READ_CR3: u64 = 0x03;
    /// A read of CR4.
    pub const READ_CR4: u64 = 0x04;
    /// First of the control register writes.
    pub const WRITE_CR0: u64 = 0x10;
    /// Last of those that are intercepted.
    pub const WRITE_CR4: u64 = 0x14;
    /// #PF.
    pub const PAGE_FAULT: u64 = 0x4e;
    /// Interrupt.
    pub const INTR: u64 = 0x60;
    /// NMI.
    pub const NMI: u64 = 0x61;
    /// CPUID.
    pub const CPUID: u64 = 0x72;
    /// HLT.
    pub const HLT: u64 = 0x78;
    /// INVLPG.
    pub const INVLPG: u64 = 0x79;
    /// I/O.
    pub const IO: u64 = 0x7b;
    /// Triple fault.
    pub const SHUTDOWN: u64 = 0x7f;
    /// VMMCALL.
    pub const CALL: u64 = 0x81;
    /// Nested page fault.
    pub const NESTED: u64 = 0x400;
    /// VMRUN found the block illegal: all ones, in 64 bits or (older emulators) 32.
    pub const INVALID: [u64; 2] = [u64::MAX, 0xffff_ffff];
}

/// The control area.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// Control registers, debug registers, exceptions, and [`intercept`]'s two words.
    pub intercept_cr: u32,
    pub intercept_dr: u32,
    pub intercept_exceptions: u32,
    pub intercept: [u32; 2],
    reserved_14: [u32; 11],
    /// Physical addresses of the permission maps.
    pub io_map: u64,
    pub msr_map: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u32,
    pub virtual_interrupt: u64,
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info: [u64; 2],
    pub exit_interrupt: u64,
    pub nested: u64,
    reserved_98: [u64; 2],
    pub inject: u64,
    /// Root of the nested tables.
    pub nested_cr3: u64,
    reserved_b8: [u8; 0x400 - 0xb8],
}

/// A segment register.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    selector: u16,
    /// Access rights without the hole in the middle.
    attributes: u16,
    limit: u32,
    base: u64,
}

impl From<Segment> for Descriptor {
    fn from(segment: Segment) -> Self {
        let Segment { selector, base, limit, access } = segment;
        Self { selector, attributes: access & 0xff | access >> 4 & 0xf00, limit, base }
    }
}

impl From<Descriptor> for Segment {
    fn from(descriptor: Descriptor) -> Self {
        let Descriptor { selector, attributes, limit, base } = descriptor;
        Self { selector, base, limit, access: attributes & 0xff | (attributes & 0xf00) << 4 }
    }
}

impl Descriptor {
    /// A descriptor table's register, or an LDT that does not exist.
    pub const fn table(base: u64, limit: u32) -> Self {
        Self { selector: 0, attributes: 0, limit, base }
    }

    /// Base and limit.
    pub const fn base_limit(&self) -> (u64, u32) {
        (self.base, self.limit)
    }

    /// DPL.
    pub const fn privilege(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
}

/// The state save area.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Save {
    pub es: Descriptor,
    pub cs: Descriptor,
    pub ss: Descriptor,
    pub ds: Descriptor,
    pub fs: Descriptor,
    pub gs: Descriptor,
    pub gdtr: Descriptor,
    pub ldtr: Descriptor,
    pub idtr: Descriptor,
    pub tr: Descriptor,
    reserved_a0: [u8; 0xcb - 0xa0],
    pub cpl: u8,
    reserved_cc: u32,
    pub efer: u64,
    reserved_d8: [u8; 0x148 - 0xd8],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_180: [u8; 0x1d8 - 0x180],
    pub rsp: u64,
    reserved_1e0: [u8; 0x1f8 - 0x1e0],
    pub rax: u64,
    reserved_200: [u8; 0x240 - 0x200],
    pub cr2: u64,
    reserved_248: [u8; 0x268 - 0x248],
    pub pat: u64,
    reserved_270: [u8; 0xc00 - 0x270],
}

/// The block.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Vmcb {
    pub control: Control,
    pub save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096 && offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Control, io_map) == 0x40 && offset_of!(Control, asid) == 0x58);
    assert!(offset_of!(Control, exit_code) == 0x70 && offset_of!(Control, nested) == 0x90);
    assert!(offset_of!(Control, inject) == 0xa8 && offset_of!(Control, nested_cr3) == 0xb0);
    assert!(offset_of!(Save, cpl) == 0xcb && offset_of!(Save, efer) == 0xd0);
    assert!(offset_of!(Save, cr4) == 0x148 && offset_of!(Save, rflags) == 0x170);
    assert!(offset_of!(Save, rsp) == 0x1d8 && offset_of!(Save, rax) == 0x1f8);
    assert!(offset_of!(Save, cr2) == 0x240 && offset_of!(Save, pat) == 0x268);
};

impl Vmcb {
    /// All zero.
    pub const fn zeroed() -> Self {
        let none = Descriptor { selector: 0, attributes: 0, limit: 0, base: 0 };
        let control = Control {
            intercept_cr: 0,
            intercept_dr: 0,
            intercept_exceptions: 0,
            intercept: [0; 2],
            reserved_14: [0; 11],
            io_map: 0,
            msr_map: 0,
            tsc_offset: 0,
            asid: 0,
            tlb_control: 0,
            virtual_interrupt: 0,
            interrupt_shadow: 0,
            exit_code: 0,
            exit_info: [0; 2],
            exit_interrupt: 0,
            nested: 0,
            reserved_98: [0; 2],
            inject: 0,
            nested_cr3: 0,
            reserved_b8: [0; 0x400 - 0xb8],
        };
        let save = Save {
            es: none,
            cs: none,
            ss: none,
            ds: none,
            fs: none,
            gs: none,
            gdtr: none,
            ldtr: none,
            idtr: none,
            tr: none,
            reserved_a0: [0; 0xcb - 0xa0],
            cpl: 0,
            reserved_cc: 0,
            efer: 0,
            reserved_d8: [0; 0x148 - 0xd8],
            cr4: 0,
            cr3: 0,
            cr0: 0,
            dr7: 0,
            dr6: 0,
            rflags: 0,
            rip: 0,
            reserved_180: [0; 0x1d8 - 0x180],
            rsp: 0,
            reserved_1e0: [0; 0x1f8 - 0x1e0],
            rax: 0,
            reserved_200: [0; 0x240 - 0x200],
            cr2: 0,
            reserved_248: [0; 0x268 - 0x248],
            pat: 0,
            reserved_270: [0; 0xc00 - 0x270],
        };
        Self { control, save }
    }
}
