//! Shadow paging: faults on tables that follow a guest's, aging over reverse maps, root switches.
//!
//! The guest maps its pages to themselves by four levels of 4 KiB tables, so the shadow of a page
//! is one leaf. A fault includes the walk over the guest's tables; KVM's figures do too. A nested
//! guest's fault is walked over the EPT of its hypervisor and ends in the EPT that the CPU walks.

use std::sync::{Arc, Mutex};

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Gva, Level, PAGE_SIZE};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Ept, Legacy, SpteConfig, SpteFormat};
use mmu_core::sync::relax;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use shadow_mmu::guest::{
    EptCpu, GuestControls, GuestCpu, GuestRoot, GuestWalker, NestedRequest, NestedWalker,
    Operation, Privilege, Purpose, Request,
};
use shadow_mmu::rmap::{RmapKey, Rmaps};
use shadow_mmu::{
    PageId, PageRole, RoleFlags, ShadowMmu, ShadowVcpu, ShadowWriter, SpteRef, WriterLock,
};

use crate::guest::Tables;
use crate::harness::{Bench, Random, time};
use crate::host::{BenchHost, vm_core};

/// The embedder's mutex.
struct Lock<F: SpteFormat>(Mutex<ShadowWriter<F, BenchHost>>);

impl<F: SpteFormat> WriterLock<F, BenchHost> for Lock<F> {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<F, BenchHost>) -> R) -> R {
        work(&mut self.0.lock().expect("no panic"))
    }
}

/// A VM on shadow tables, with one vCPU.
pub struct Vm {
    mmu: Arc<ShadowMmu<Legacy, BenchHost>>,
    lock: Lock<Legacy>,
    vcpu: ShadowVcpu<Legacy, BenchHost>,
    guest: GuestWalker,
    tables: Tables,
    pages: u64,
}

/// A nested guest's handle on shadow tables.
pub struct NestedVm {
    lock: Lock<Ept>,
    vcpu: ShadowVcpu<Ept, BenchHost>,
    nested: NestedWalker,
    tables: Tables,
}

const ROLES: [RoleFlags; 2] = [RoleFlags::empty(), RoleFlags::WP];

impl Vm {
    pub fn new(pages: u64) -> Self {
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

    pub fn fault(&mut self, page: u64) {
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

    /// Age the first pages once; the young among them.
    pub fn age(&mut self, pages: u64) -> u64 {
        let request = AgeRequest::new(GfnRange::from_len(Gfn::new(0), pages), AgeMode::Clear);
        self.mmu.age(self.vcpu.actor(), request, &mut CountOnly).young
    }
}

impl NestedVm {
    pub fn new(pages: u64) -> Self {
        let config = SpteConfig::<Ept>::new(Capabilities::ept()).expect("possible tables");
        let (core, _slots) = vm_core(pages, pages / 256 + 1024, config.max_gfn_exclusive());
        let (mmu, writer) = ShadowMmu::create(core, config, u32::MAX);
        let mut vcpu = ShadowVcpu::new(&mmu).expect("room");
        let nested = NestedWalker::ept(Level::L4, &EptCpu::baseline()).expect("four levels");
        let (lock, tables) = (Lock(Mutex::new(writer)), Tables::new(pages));
        let eptp = tables.eptp() * PAGE_SIZE;
        let _ = vcpu.load_nested_root(&lock, &nested, &tables, eptp, 0).expect("memory");
        Self { lock, vcpu, nested, tables }
    }

    pub fn fault(&mut self, page: u64) {
        let read =
            NestedRequest { operation: Operation::Read, purpose: Purpose::Final(Access::ALL) };
        let (eptp, gpa) = (self.tables.eptp() * PAGE_SIZE, Gpa::new(page * PAGE_SIZE));
        let walk = self.nested.walk(&self.tables, eptp, gpa, read).expect("mapped");
        let done = self.vcpu.nested_fault(&self.lock, &self.nested, &self.tables, &walk, read);
        assert!(matches!(done, Ok(FaultOutcome::Fixed)), "{done:?}");
    }
}

/// `shadow_fault` and `shadow_fault_nested` in random order, `shadow_age` with all young and
/// `shadow_age_idle` with none, `cr3_switch` between two roots that the vCPU keeps.
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
    if wanted("shadow_fault_nested") {
        bench.repeat("shadow_fault_nested", pages, || {
            let mut vm = NestedVm::new(pages);
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
                time(|| assert_eq!(vm.age(pages), pages))
            });
        }
        if wanted("shadow_age_idle") {
            let _ = vm.age(pages);
            bench.repeat("shadow_age_idle", pages, || time(|| assert_eq!(vm.age(pages), 0)));
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
