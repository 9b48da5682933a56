//! AMD's extension: SVM with nested paging.
//!
//! Owns [`Svm`]: what the CPU offers, and turning it on. `vmcb` is the control block, `enter` the
//! instruction, `tag` the ASIDs, `vcpu` the rest. The `x86` crate has no names for SVM, so they
//! stand here. No locks.

mod enter;
mod tag;
mod vcpu;
mod vmcb;

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::spte::{Capabilities, Npt};
use x86::cpuid::native_cpuid::cpuid_count;
use x86::msr::{IA32_EFER, rdmsr, wrmsr};

use crate::machine::cpu::{self, MAX_CPUS};
use crate::machine::memory::physical;
use crate::virt::{Features, VcpuSetup, Virt, VirtError};
pub use vcpu::SvmVcpu;

/// EFER.SVME.
const EFER_SVME: u64 = 1 << 12;
/// VM_CR, and its bit SVMDIS.
const VM_CR: u32 = 0xc001_0114;
const SVM_DISABLED: u64 = 1 << 4;
/// VM_HSAVE_PA: where VMRUN keeps the host's state.
const HOST_SAVE: u32 = 0xc001_0117;

/// CPUID 8000_000A, EDX.
const NESTED_PAGING: u32 = 1 << 0;
const FLUSH_BY_ASID: u32 = 1 << 6;

/// A page that the processor writes.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Physical address of each CPU's page for the host's VMSAVE; 0 before [`Svm::enable`].
static HOST_PAGES: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// See the file's head.
#[derive(Clone, Copy, Debug)]
pub struct Svm;

/// CPUID 8000_000A: how many ASIDs, and the feature bits.
fn identify() -> (u32, u32) {
    let answer = cpuid_count(0x8000_000a, 0);
    (answer.ebx, answer.edx)
}

impl Virt for Svm {
    type Format = Npt;
    type Vcpu = SvmVcpu;
    const NAME: &'static str = "npt on svm";
    const WORD: &'static str = "npt";

    fn detect() -> Option<Features> {
        let highest = cpuid_count(0x8000_0000, 0).eax;
        let extended = cpuid_count(0x8000_0001, 0);
        if highest < 0x8000_000a || extended.ecx & 1 << 2 == 0 {
            return None;
        }
        // SAFETY: every CPU with SVM has VM_CR.
        let control = unsafe { rdmsr(VM_CR) };
        let (tags, bits) = identify();
        if control & SVM_DISABLED != 0 || bits & NESTED_PAGING == 0 {
            return None;
        }
        Some(Features {
            levels_5: cpuid_count(7, 0).ecx & 1 << 16 != 0,
            huge_1g: extended.edx & 1 << 26 != 0,
            accessed_dirty: true,
            accessed_dirty_off: false,
            exec_only: false,
            log: false,
            flush_linear: true,
            flush_context: bits & FLUSH_BY_ASID != 0,
            phys_bits: cpuid_count(0x8000_0008, 0).eax as u8,
            tags,
        })
    }

    fn enable() -> Result<(), VirtError> {
        // SAFETY: long mode has EFER.
        let efer = unsafe { rdmsr(IA32_EFER) };
        // SAFETY: SVME may be set where CPUID has SVM and VM_CR does not forbid it (`detect`); the
        // instructions it allows are used by `enter.rs` alone.
        unsafe { wrmsr(IA32_EFER, efer | EFER_SVME) };
        let save = physical(Box::leak(Box::new(Page([0; 4096]))));
        // SAFETY: a page that nobody else uses, for good.
        unsafe { wrmsr(HOST_SAVE, save) };
        let host = physical(Box::leak(Box::new(Page([0; 4096]))));
        HOST_PAGES[cpu::current()].store(host, Ordering::Release);
        Ok(())
    }

    fn vcpu(setup: VcpuSetup) -> Result<SvmVcpu, VirtError> {
        let host = HOST_PAGES[cpu::current()].load(Ordering::Acquire);
        if host == 0 {
            return Err(VirtError { step: "a vCPU before SVM is on", value: 0 });
        }
        let (tags, bits) = identify();
        let by_asid = bits & FLUSH_BY_ASID != 0;
        Ok(SvmVcpu::new(setup, host, tags, by_asid))
    }

    fn capabilities(features: &Features) -> Capabilities {
        Capabilities {
            max_phys_bits: features.phys_bits,
            huge_1g: features.huge_1g,
            ..Capabilities::npt()
        }
    }
}
