//! The machine behind /dev/kvm: a real processor walks the tables that the MMU under test builds,
//! guest-virtual to guest-physical, as an ordinary guest's page tables.
//!
//! | file | owns |
//! |---|---|
//! | `memory` | the memfd, its two mappings, the ranged flush |
//! | `stub` | descriptor tables, handlers, the guest program |
//! | `vcpu` | registers and exits |
//! | `trap`, `code` | a vCPU for machine code: every exception leaves, registers in memory |
//! | `door` | who is inside KVM_RUN, kicks, closed doors |
//! | `autopsy` | what is said of a triple fault |
//! | `flush` | which flush this host needs, the structural flush |
//!
//! A page fault of the guest takes this way: the processor delivers #PF to the stub's handler at
//! CPL 0, whose first instruction is an `out`, so KVM_RUN returns; CR2 comes in the shared
//! registers and the error code from the handler's stack; the next `run` finishes the handler, and
//! the guest tries the access again with all its registers as they were.

mod autopsy;
mod code;
pub(crate) mod door;
mod flush;
pub(crate) mod memory;
#[cfg(test)]
#[path = "../../../tests/common/skip.rs"]
pub(crate) mod skip;
mod stub;
mod trap;
mod vcpu;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_bindings::{KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::machine::{Flush, Layout, Machine, MachineError, Memory, Vcpu};
use door::Door;
use flush::HostPaging;
use memory::GuestMemory;
use vcpu::KvmVcpu;

/// What a machine and its vCPUs hold in common.
#[derive(Debug)]
struct Shared {
    // The VM goes before the memory that it uses.
    vm: VmFd,
    memory: GuestMemory,
    layout: Layout,
    paging: HostPaging,
    /// One for each vCPU.
    doors: Vec<Door>,
    /// Held during a structural flush.
    structural: Mutex<()>,
}

impl Shared {
    fn vcpus(&self) -> u32 {
        self.doors.len() as u32
    }
}

/// A machine whose vCPUs are those of /dev/kvm.
#[derive(Debug)]
pub struct KvmMachine {
    shared: Arc<Shared>,
    cpuid: CpuId,
}

/// Whether this machine can be had here; if not, what is missing, in words.
pub fn available() -> Result<(), String> {
    open().map(drop)
}

fn open() -> Result<Kvm, String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm does not open: {error}"))?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(format!("/dev/kvm speaks API version {version}, not {KVM_API_VERSION}"));
    }
    let needed = [
        (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
        (Cap::ExtCpuid, "CPUID (KVM_CAP_EXT_CPUID)"),
        (Cap::SyncMmu, "an MMU notifier, which flushes rely on (KVM_CAP_SYNC_MMU)"),
        (Cap::ImmediateExit, "kicks (KVM_CAP_IMMEDIATE_EXIT)"),
    ];
    for (cap, what) in needed {
        if !kvm.check_extension(cap) {
            return Err(format!("/dev/kvm does not offer {what}"));
        }
    }
    let sync = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    let offered = kvm.check_extension_int(Cap::SyncRegs);
    if u32::try_from(offered).unwrap_or(0) & sync != sync {
        return Err(format!(
            "/dev/kvm does not offer registers in the shared page (KVM_CAP_SYNC_REGS is \
             {offered:#x})"
        ));
    }
    Ok(kvm)
}

/// Names the call that `map_err` is used on.
fn kvm_error(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |error| MachineError::System { call, source: error.into() }
}

impl KvmMachine {
    /// A machine with `vcpus` vCPUs, none of which exists yet, and memory of zeroes.
    ///
    /// # Errors
    /// `Unsupported` if there is no usable /dev/kvm or the layout does not fit; `System` if a call
    /// fails.
    pub fn new(layout: &Layout, vcpus: u32) -> Result<Self, MachineError> {
        let unsupported = |detail| MachineError::Unsupported { detail };
        let kvm = open().map_err(unsupported)?;
        let most = kvm.get_max_vcpus();
        if vcpus == 0 || vcpus as usize > most {
            return Err(unsupported(format!("{vcpus} vCPUs: 1 to {most} will do")));
        }
        let pages = stub::pages(vcpus);
        let stub = &layout.stub;
        let apart = [&layout.tables, &layout.data].iter().all(|range| range.start >= stub.end);
        if stub.start != 0 || stub.end < pages || !apart {
            return Err(unsupported(format!("{layout:?}: the stub takes the first {pages} pages")));
        }
        let memory = GuestMemory::new(layout.data.end.max(layout.tables.end))?;
        stub::install(&memory, vcpus)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("KVM_GET_SUPPORTED_CPUID"))?;
        let shared = Shared {
            vm: kvm.create_vm().map_err(kvm_error("KVM_CREATE_VM"))?,
            memory,
            layout: layout.clone(),
            paging: HostPaging::detect(),
            doors: (0..vcpus).map(|_| Door::default()).collect(),
            structural: Mutex::new(()),
        };
        shared.set_slot(shared.memory.bytes())?;
        Ok(Self { shared: Arc::new(shared), cpuid })
    }
}

impl Machine for KvmMachine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn description(&self) -> String {
        let unlinked = match self.shared.paging {
            HostPaging::TwoDimensional => "the same",
            HostPaging::Shadowing => "all vCPUs out and the memory slot deleted",
        };
        format!(
            "/dev/kvm ({}); leaves are flushed by MADV_DONTNEED on KVM's mapping of the memory, \
             unlinked tables by {unlinked}",
            self.shared.paging.description()
        )
    }

    fn memory(&self) -> Memory {
        self.shared.memory.memory()
    }

    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, MachineError> {
        if id >= self.shared.vcpus() {
            return Err(MachineError::Unsupported {
                detail: format!("vCPU {id}: there are {}", self.shared.vcpus()),
            });
        }
        let vcpu = KvmVcpu::new(Arc::clone(&self.shared), id, &self.cpuid)?;
        Ok(Box::new(vcpu))
    }

    fn flush(&self, flush: &Flush<'_>) -> Result<(), MachineError> {
        self.shared.flush(flush)
    }

    fn kick_all(&self) {
        self.shared.doors.iter().for_each(Door::kick);
    }

    fn has_huge_pages(&self) -> bool {
        // KVM keeps shadows of the guest's tables by their place; a 2M entry that changes from the
        // VMM's side, unseen, corrupts kernels before the fixes of 2026.
        self.shared.paging == HostPaging::TwoDimensional
    }

    fn allocated(&self) -> Result<u64, MachineError> {
        self.shared.memory.allocated()
    }

    fn give_back(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        self.shared.memory.give_back(pages)
    }

    fn pinned(&self) -> Vec<(u64, u64, u64)> {
        vec![(0, 0, stub::pages(self.shared.vcpus()))]
    }
}
