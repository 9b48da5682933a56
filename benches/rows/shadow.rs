//! Shadow paging: faults on tables that follow a guest's, aging over reverse maps, root switches.
//!
//! The guest maps its pages to themselves by four levels of 4 KiB tables, so the shadow of a page
//! is one leaf. A fault includes the walk over the guest's tables; KVM's figures do too.

use std::sync::{Arc, Mutex};

use mmu_core::addr::{Gfn, GfnRange, Gva, Level, PAGE_SIZE};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Legacy, SpteConfig};
use mmu_core::sync::relax;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Operation, Privilege, Request,
};
use shadow_mmu::rmap::{RmapKey, Rmaps};
use shadow_mmu::{
    PageId, PageRole, RoleFlags, ShadowMmu, ShadowVcpu, ShadowWriter, SpteRef, WriterLock,
};

use crate::guest::Tables;
use crate::harness::{Bench, Random, time};
use crate::host::{BenchHost, vm_core};

/// The embedder's mutex.
struct Lock(Mutex<ShadowWriter<Legacy, BenchHost>>);

impl WriterLock<Legacy, BenchHost> for Lock {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<Legacy, BenchHost>) -> R) -> R {
        work(&mut self.0.lock().expect("no panic"))
    }
}

/// A VM on shadow tables, with one vCPU.
struct Vm {
    mmu: Arc<ShadowMmu<Legacy, BenchHost>>,
    lock: Lock,
    vcpu: ShadowVcpu<Legacy, BenchHost>,
    guest: GuestWalker,
    tables: Tables,
    pages: u64,
}

const ROLES: [RoleFlags; 2] = [RoleFlags::empty(), RoleFlags::WP];

impl Vm {
    fn new(pages: u64) -> Self {
        let config = SpteConfig::<Legacy>::new(Capabilities::legacy()).expect("possible tables");
        // Leaf tables twice, for two roles.
        let (core, _slots) = vm_core(pages, pages / 256 + 1024, config.max_gfn_exclusive());
        let (mmu, writer) = ShadowMmu::create(core, config, u32::MAX);
        let vcpu = ShadowVcpu::new(&mmu).expect("room");
        let guest = GuestWalker::new(&GuestCpu::baseline(), GuestControls::LONG);
        let guest = guest.expect("a processor that exists");
        let lock = Lock(Mutex::new(writer));
        let mut vm = Self { mmu, lock, vcpu, guest, tables: Tables::new(pages), pages };
        vm.load(ROLES[0]);
        vm
    }

    fn load(&mut self, flags: RoleFlags) {
        let (root, role) = (Gfn::new(self.tables.root()), PageRole::new(Level::L4, flags));
        let loaded = self.vcpu.load_root(&self.lock, &self.guest, &self.tables, root, role);
        let _ = loaded.expect("memory");
    }

    fn fault(&mut self, page: u64) {
        let root = GuestRoot::Cr3(self.tables.root() * PAGE_SIZE);
        let read = Request::new(Operation::Read, Privilege::User);
        let gva = Gva::new(page * PAGE_SIZE);
        let walk = self.guest.walk(&self.tables, &root, gva, read).expect("mapped");
        let done = self.vcpu.fault(&self.lock, &self.guest, &self.tables, &walk, read);
        assert!(matches!(done, Ok(FaultOutcome::Fixed | FaultOutcome::Spurious)), "{done:?}");
    }

    fn all(&self) -> GfnRange {
        GfnRange::from_len(Gfn::new(0), self.pages)
    }

    /// Age everything once; the young pages.
    fn age(&mut self) -> u64 {
        let request = AgeRequest::new(self.all(), AgeMode::Clear);
        self.mmu.age(self.vcpu.actor(), request, &mut CountOnly).young
    }
}

/// `shadow_fault` in random order, `shadow_age` with all young and `shadow_age_idle` with none,
/// `cr3_switch` between two roots that the vCPU keeps.
pub fn rows(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    // 1 GiB, as KVM was measured.
    let pages = bench.pages() / 4;
    let order = Random::new(3).permutation(pages);
    if wanted("shadow_fault") {
        bench.repeat("shadow_fault", pages, || {
            let mut vm = Vm::new(pages);
            time(|| order.iter().for_each(|page| vm.fault(u64::from(*page))))
        });
    }
    if ["shadow_age", "shadow_age_idle", "cr3_switch"].into_iter().any(wanted) {
        let mut vm = Vm::new(pages);
        (0..pages).for_each(|page| vm.fault(page));
        if wanted("shadow_age") {
            // Each repetition finds entries that faults made young anew.
            bench.repeat("shadow_age", pages, || {
                let range = vm.all();
                let core = Arc::clone(vm.mmu.vm());
                let actor = vm.vcpu.actor();
                let invalidation = core.notify().begin(actor.participant(), range);
                let _ = vm.mmu.unmap_in(actor, &vm.lock, &invalidation, range);
                drop(invalidation);
                (0..pages).for_each(|page| vm.fault(page));
                time(|| assert_eq!(vm.age(), pages))
            });
        }
        if wanted("shadow_age_idle") {
            let _ = vm.age();
            bench.repeat("shadow_age_idle", pages, || time(|| assert_eq!(vm.age(), 0)));
        }
        if wanted("cr3_switch") {
            ROLES.into_iter().for_each(|role| vm.load(role));
            let switches = 10_000;
            bench.repeat("cr3_switch", switches, || {
                time(|| (0..switches).for_each(|n| vm.load(ROLES[(n % 2) as usize])))
            });
        }
    }
}

/// `rmap_add_remove`: an entry is put on the list of a page and taken off again; with 1, 2 and 9
/// entries on each list, what one costs in memory.
pub fn rmaps(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages() / 4;
    let key = |page: u64| RmapKey { space: 0, level: Level::L1, gfn: Gfn::new(page) };
    let entry = |number: u64| {
        let page = PageId::new((number / 512) as u32).expect("few pages");
        SpteRef::new(page, (number % 512) as usize)
    };
    if wanted("rmap_add_remove") {
        let (_rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
        bench.repeat("rmap_add_remove", pages, || {
            time(|| {
                for page in 0..pages {
                    writer.reserve(key(page)).expect("memory");
                    let _ = writer.add(key(page), entry(page)).expect("reserved");
                }
                (0..pages).for_each(|page| writer.remove(key(page), entry(page)).expect("there"));
            })
        });
    }
    let sizes = [
        ("rmap_bytes_per_mapping_1", 1),
        ("rmap_bytes_per_mapping_2", 2),
        ("rmap_bytes_per_mapping_9", 9),
    ];
    for (row, aliases) in sizes {
        if wanted(row) {
            let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
            for number in 0..pages * aliases {
                writer.reserve(key(number % pages)).expect("memory");
                let _ = writer.add(key(number % pages), entry(number)).expect("reserved");
            }
            let each = rmaps.bytes() as f64 / (pages * aliases) as f64;
            bench.record(row, pages * aliases, vec![each], "counted".into());
        }
    }
}
