//! Intel's extension: VMX with extended page tables, which the crates' `Ept` format is for.
//!
//! Owns [`Vmx`]. `abilities` and `wanted` say what the CPU can and the program wants, `instr` and
//! `enter` hold the instructions, `region` the pages that the processor is given, `vmcs` and
//! `guest` the two halves of a VMCS, `ept` the pointer and the flushes, `exit` the decoding, and
//! `vcpu` all of it together. No locks: everything belongs to one CPU.

mod abilities;
mod enter;
mod ept;
mod exit;
mod guest;
mod instr;
mod region;
mod vcpu;
mod vmcs;
mod wanted;

use mmu_core::spte::{Capabilities, Ept};
use x86::controlregs::{self, Cr0, Cr4};

use crate::virt::{Features, LocalFlush, VcpuSetup, Virt, VirtError};
use abilities::Abilities;
use ept::Context;
use instr::Failed;
use region::Region;
pub use vcpu::VmxVcpu;

/// VMX.
#[derive(Clone, Copy, Debug)]
pub struct Vmx;

/// The CPU has VMX, or this was not its backend.
fn abilities() -> Result<Abilities, VirtError> {
    Abilities::detect().ok_or(VirtError { step: "finding VMX", value: 0 })
}

impl Virt for Vmx {
    type Format = Ept;
    type Vcpu = VmxVcpu;
    const NAME: &'static str = "ept on vmx";
    const WORD: &'static str = "ept";

    fn detect() -> Option<Features> {
        Some(Abilities::detect()?.features())
    }

    fn enable() -> Result<(), VirtError> {
        let abilities = abilities()?;
        Abilities::unlock();
        // SAFETY: reads a register.
        let cr0 = unsafe { controlregs::cr0() };
        // SAFETY: NE, which VMX insists on, changes how errors of the x87 are reported, of which
        // this program has none.
        unsafe { controlregs::cr0_write(cr0 | Cr0::CR0_NUMERIC_ERROR) };
        // SAFETY: reads a register.
        let cr4 = unsafe { controlregs::cr4() };
        // SAFETY: the CPU has VMX (`detect`), so the bit exists.
        unsafe { controlregs::cr4_write(cr4 | Cr4::CR4_ENABLE_VMX) };
        let region = Region::with_revision(abilities.revision);
        instr::vmxon(&region).map_err(|Failed(value)| VirtError { step: "VMXON", value })?;
        // The processor's for good: VMX operation is never left.
        core::mem::forget(region);
        // Whoever used VMX before may have left translations behind.
        ept::flush(&abilities, Context { eptp: None, vpid: 0 }, LocalFlush::All);
        Ok(())
    }

    fn vcpu(setup: VcpuSetup) -> Result<VmxVcpu, VirtError> {
        VmxVcpu::new(abilities()?, setup)
    }

    fn capabilities(features: &Features) -> Capabilities {
        Capabilities {
            accessed_dirty: features.accessed_dirty,
            exec_only: features.exec_only,
            huge_1g: features.huge_1g,
            max_phys_bits: features.phys_bits,
            ..Capabilities::ept()
        }
    }
}
