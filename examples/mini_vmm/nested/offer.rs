//! Whether /dev/kvm lends hardware virtualisation to its guests.

use std::fmt;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// CPUID 1, ECX: VMX.
const VMX: u32 = 1 << 5;
/// CPUID 8000_0001h, ECX: SVM.
const SVM: u32 = 1 << 2;

/// What a guest of this /dev/kvm may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Intel's, with EPT.
    Vmx,
    /// AMD's, with nested paging.
    Svm,
}

impl fmt::Display for Extension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "VMX",
            Self::Svm => "SVM",
        })
    }
}

/// Why there is nothing to run the test hypervisor on. Nothing was checked then.
#[derive(Debug)]
pub enum Missing {
    /// There is no usable /dev/kvm.
    Kvm(String),
    /// KVM cannot keep the state of a guest that is a hypervisor (KVM_CAP_NESTED_STATE).
    NestedState,
    /// A guest's CPUID shows neither SVM nor VMX.
    Extension,
    /// The test hypervisor was not built, or not here.
    Image(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm(why) => f.write_str(why),
            Self::NestedState => f.write_str(
                "/dev/kvm offers no nested virtualisation (KVM_CAP_NESTED_STATE is 0): it takes \
                 kvm_amd or kvm_intel with nested=1, on a processor or a host that has it; \
                 `cargo xtask emulate nested` brings both along",
            ),
            Self::Extension => f.write_str(
                "/dev/kvm keeps nested state but shows its guests neither SVM nor VMX: load \
                 kvm_amd or kvm_intel with nested=1",
            ),
            Self::Image(path) => write!(
                f,
                "the test hypervisor is not at {path}: build it with `cargo build --release \
                 --manifest-path examples/test_hypervisor/Cargo.toml --target-dir \
                 target/hypervisor`, or say --image PATH"
            ),
        }
    }
}

impl std::error::Error for Missing {}

/// What a guest of /dev/kvm may use, and the CPUID that says so.
///
/// # Errors
/// What is missing.
pub fn offered(kvm: &Kvm) -> Result<(Extension, CpuId), Missing> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| Missing::Kvm(format!("KVM_GET_SUPPORTED_CPUID: {error}")))?;
    if kvm.check_extension_int(Cap::NestedState) <= 0 {
        return Err(Missing::NestedState);
    }
    let ecx = |leaf| {
        let entry = cpuid.as_slice().iter().find(|entry| entry.function == leaf);
        entry.map_or(0, |entry| entry.ecx)
    };
    if ecx(1) & VMX != 0 {
        Ok((Extension::Vmx, cpuid))
    } else if ecx(0x8000_0001) & SVM != 0 {
        Ok((Extension::Svm, cpuid))
    } else {
        Err(Missing::Extension)
    }
}
