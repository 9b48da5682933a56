//! Flushes: which kind this host needs, and the structural one.
//!
//! The ranged flush is [`GuestMemory::forget`](super::memory::GuestMemory::forget): vCPUs go on
//! running. It is enough for changes of leaves and for fresh links.
//!
//! A host that *shadows* (KVM without two-dimensional paging) keeps tables of its own, derived from
//! the guest's, and identifies a linked table by its place: after a non-leaf entry was changed from
//! the VMM's side the old shadow may go on serving the place, and older kernels can corrupt
//! themselves over it. There an unlinked table costs the *structural flush*: all vCPUs out of
//! KVM_RUN, the memory slot deleted and added again, which destroys all shadows, then in again.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::PoisonError;

use kvm_bindings::kvm_userspace_memory_region;

use super::super::machine::{Flush, MachineError};
use super::door::Door;
use super::{Shared, kvm_error};

/// Ranges this many pages apart or less are flushed as one. A range costs a system call and may
/// interrupt every vCPU (20 us, measured); a page too many costs the guest one walk (below 1 us).
const MERGE_GAP: u64 = 16;

/// How the host runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostPaging {
    /// EPT or NPT: the processor walks our tables.
    TwoDimensional,
    /// The processor walks tables that KVM derives from ours.
    Shadowing,
}

impl HostPaging {
    /// Asks the host.
    pub(super) fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::judge(Path::new("/sys/module"), &cpuinfo)
    }

    /// Asks the parameters of the kvm modules. Shadowing if they do not tell: it owes the more
    /// thorough flush.
    fn judge(modules: &Path, cpuinfo: &str) -> Self {
        // Virtualisation in software, never two-dimensional, whatever the other modules say.
        if modules.join("kvm_pvm").exists() {
            return Self::Shadowing;
        }
        let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
        // By the processor's vendor: the other vendor's module may be built in, with parameters
        // that mean nothing. `kvm/parameters/tdp_mmu` does not do: some kernels say Y there even
        // with `npt=0`.
        let parameter = match (has("vmx"), has("svm")) {
            (true, false) => "kvm_intel/parameters/ept",
            (false, true) => "kvm_amd/parameters/npt",
            _ => return Self::Shadowing,
        };
        match fs::read_to_string(modules.join(parameter)) {
            Ok(value) if matches!(value.trim(), "Y" | "1") => Self::TwoDimensional,
            _ => Self::Shadowing,
        }
    }

    /// In words.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::TwoDimensional => "EPT or NPT: the processor walks our tables",
            Self::Shadowing => "KVM shadows our tables",
        }
    }
}

/// All doors closed, until this is dropped.
struct Closed<'a>(&'a [Door]);

impl<'a> Closed<'a> {
    fn new(doors: &'a [Door]) -> Self {
        // First all, then wait: the vCPUs come out at the same time.
        doors.iter().for_each(Door::close);
        doors.iter().for_each(Door::wait_empty);
        Self(doors)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(Door::open);
    }
}

impl Shared {
    /// [`Machine::flush`](super::super::machine::Machine::flush).
    pub(super) fn flush(&self, flush: &Flush<'_>) -> Result<(), MachineError> {
        let unlinked = !flush.tables.is_empty();
        let shadowing = self.paging == HostPaging::Shadowing;
        if flush.everything || (unlinked && shadowing) {
            return self.structural_flush();
        }
        // A processor may have cached an upper entry without having reached a leaf below it. It
        // read the table through its second-level translation: dropping that drops both.
        let tables: Vec<_> = flush.tables.iter().map(|page| *page..page + 1).collect();
        self.forget(&tables)?;
        if flush.pfns.is_empty() && !flush.gfns.is_empty() {
            // Where the old translations led is not known: KVM's index is by physical page.
            return self.memory.forget(&self.layout.data);
        }
        self.forget(flush.pfns)
    }

    fn forget(&self, ranges: &[Range<u64>]) -> Result<(), MachineError> {
        let mut merged = merge(ranges);
        merged.try_for_each(|range| self.memory.forget(&range))
    }

    /// Destroys everything that KVM derived from our tables. Not to be called inside `run`.
    pub(super) fn structural_flush(&self) -> Result<(), MachineError> {
        // One at a time: the second would open the doors for the first.
        let _turn = self.structural.lock().unwrap_or_else(PoisonError::into_inner);
        let _closed = Closed::new(&self.doors);
        self.set_slot(0)?;
        self.set_slot(self.memory.bytes())
    }

    /// Makes the memory slot `bytes` long; 0 deletes it.
    pub(super) fn set_slot(&self, bytes: u64) -> Result<(), MachineError> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: bytes,
            userspace_addr: self.memory.alias_address(),
        };
        // SAFETY: the region is empty or the whole alias, which stays mapped as long as `self`,
        // and `self` holds the VM. What the guest writes there this process reads atomically.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// The ranges in order, close neighbours as one.
fn merge(ranges: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut sorted = sorted.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut range = sorted.next()?;
        while let Some(next) = sorted.next_if(|next| next.start <= range.end + MERGE_GAP) {
            range.end = range.end.max(next.end);
        }
        Some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_ranges_are_merged_and_no_page_is_left_out() {
        let merged = |ranges: &[Range<u64>]| merge(ranges).collect::<Vec<_>>();
        assert!(merged(&[]).is_empty());
        let one = |range| vec![range];
        assert_eq!(merged(&[5..6, 1..2, 3..9]), one(1..9));
        assert_eq!(merged(&[1..30, 2..3, 30 + MERGE_GAP..50]), one(1..50));
        let apart = 31 + MERGE_GAP..50;
        assert_eq!(merged(&[apart.clone(), 1..30]), [1..30, apart]);
    }

    #[test]
    fn the_kind_of_host_is_told_by_the_modules() {
        let modules = std::env::temp_dir().join(format!("mini_vmm-modules-{}", std::process::id()));
        let put = |parameter: &str, value: &str| {
            let path = modules.join(parameter);
            fs::create_dir_all(path.parent().expect("a folder")).expect("mkdir");
            fs::write(path, value).expect("write");
        };
        let judge = |flags| HostPaging::judge(&modules, flags);
        assert_eq!(judge("vmx"), HostPaging::Shadowing);
        put("kvm_intel/parameters/ept", "Y\n");
        put("kvm_amd/parameters/npt", "N\n");
        put("kvm/parameters/tdp_mmu", "Y\n");
        assert_eq!(judge("flags : sse vmx"), HostPaging::TwoDimensional);
        assert_eq!(judge("flags : sse svm"), HostPaging::Shadowing);
        assert_eq!(judge("flags : sse"), HostPaging::Shadowing);
        put("kvm_amd/parameters/npt", "1\n");
        assert_eq!(judge("flags : sse svm"), HostPaging::TwoDimensional);
        put("kvm_pvm/parameters/force", "N\n");
        assert_eq!(judge("flags : sse svm"), HostPaging::Shadowing);
        fs::remove_dir_all(&modules).expect("rmdir");
    }
}
