//! Models of invalidations and of slot changes against faults, with one entry for a tree.
#![cfg(loom)]

#[path = "loom_common/host.rs"]
mod host;
mod loom_common;

use std::sync::Arc;

use host::ModelHost;
use loom::cell::UnsafeCell;
use loom::thread;
use loom_common::{explore, explore_up_to};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, PAGE_SIZE};
use mmu_core::epoch::{EpochDomain, Participant};
use mmu_core::lock::MmuLock;
use mmu_core::notify::Invalidations;
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::Spte;
use mmu_core::spte::cell::SpteCell;
use mmu_core::sync::{AtomicU64, Ordering, relax};
use mmu_core::vm::{Actor, VmCore};

const GFN: Gfn = Gfn::new(1);

/// An entry that says which host page it maps.
fn entry(page: u64) -> Spte {
    Spte::from_raw(page << 12 | Spte::MMU_PRESENT)
}

/// One gfn: its page at the host, its entry, and what a TLB holds for it.
struct Page {
    domain: Arc<EpochDomain>,
    lock: MmuLock,
    notify: Invalidations,
    /// The host's page, which changes with every invalidation of the gfn.
    host: AtomicU64,
    cell: SpteCell,
    tlb: AtomicU64,
}

impl Page {
    fn new(mapped: Spte) -> Arc<Self> {
        let domain = EpochDomain::new(3, relax).expect("in range");
        Arc::new(Self {
            lock: MmuLock::new(Arc::clone(&domain)),
            notify: Invalidations::new(Arc::clone(&domain), 0),
            host: AtomicU64::new(1),
            cell: SpteCell::new(mapped),
            tlb: AtomicU64::new(1),
            domain,
        })
    }

    fn fault(&self, own: &mut Participant) {
        let snapshot = self.notify.snapshot();
        // Relaxed: the snapshot alone must order it after the invalidations that it counts.
        let page = self.host.load(Ordering::Relaxed);
        let section = self.lock.shared(own);
        if !self.notify.must_retry(&section, snapshot, GfnRange::from_len(GFN, 1)) {
            let _ = self.cell.try_change(Spte::EMPTY, entry(page));
        }
    }

    /// The host takes the pages of `range` away.
    fn invalidate(&self, own: &mut Participant, range: GfnRange) {
        let invalidation = self.notify.begin(own, range);
        if range.contains(GFN) {
            self.host.fetch_add(1, Ordering::Relaxed);
            let _section = self.lock.shared(own);
            let _ = self.cell.exchange(Spte::EMPTY);
        }
        drop(invalidation);
    }

    /// Take the entry away and flush; when this returns no TLB holds it.
    fn unmap(&self, own: &mut Participant) {
        let invalidation = self.notify.begin(own, GfnRange::from_len(GFN, 1));
        let section = self.lock.shared(own);
        let gone = !self.cell.exchange(Spte::EMPTY).is_empty();
        drop(section);
        if gone || invalidation.others_in_progress() {
            self.tlb.store(0, Ordering::Release);
        }
        assert_eq!(self.tlb.load(Ordering::Acquire), 0, "returned before the other's flush (I11)");
        drop(invalidation);
    }

    fn assert_maps_what_the_host_has(&self) {
        let (spte, page) = (self.cell.load(), self.host.load(Ordering::Relaxed));
        assert!(spte.is_empty() || spte == entry(page), "{spte:?}, the host has {page} (I11)");
        assert_eq!(self.notify.in_progress(), 0);
    }
}

/// One fault against invalidations, one thread for each list.
fn fault_against(name: &str, mine: &'static [GfnRange], other: Option<GfnRange>) {
    explore(name, move || {
        let page = Page::new(Spte::EMPTY);
        let mut own = page.domain.register().expect("room");
        let mut vcpu = page.domain.register().expect("room");
        let fault = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                page.fault(&mut vcpu);
                vcpu
            })
        };
        let other = other.map(|range| {
            let page = Arc::clone(&page);
            let mut own = page.domain.register().expect("room");
            thread::spawn(move || {
                page.invalidate(&mut own, range);
                own
            })
        });
        mine.iter().for_each(|&range| page.invalidate(&mut own, range));
        fault.join().unwrap();
        if let Some(other) = other {
            other.join().unwrap();
        }
        page.assert_maps_what_the_host_has();
    });
}

#[test]
fn a_fault_installs_nothing_that_was_taken_away() {
    const RANGES: [GfnRange; 1] = [GfnRange::new(Gfn::new(1), Gfn::new(2))];
    fault_against("notify::fault_against_invalidation", &RANGES, None);
}

#[test]
fn a_fault_installs_nothing_when_an_invalidation_elsewhere_follows() {
    const RANGES: [GfnRange; 2] =
        [GfnRange::new(Gfn::new(1), Gfn::new(2)), GfnRange::new(Gfn::new(8), Gfn::new(9))];
    fault_against("notify::fault_against_two_in_turn", &RANGES, None);
}

#[test]
fn two_unmaps_of_a_page_both_return_after_its_flush() {
    explore("notify::unmap_against_unmap", || {
        let page = Page::new(entry(1));
        let mut own = page.domain.register().expect("room");
        let other = {
            let page = Arc::clone(&page);
            let mut own = page.domain.register().expect("room");
            thread::spawn(move || {
                page.unmap(&mut own);
                own
            })
        };
        page.unmap(&mut own);
        other.join().unwrap();
        assert!(page.cell.load().is_empty());
    });
}

const PAGES: u64 = 4;

fn slot(bytes: u64) -> SlotRequest {
    let flags = SlotFlags::empty();
    SlotRequest { as_id: 0, id: 0, base: Gpa::new(0), bytes, hva: Hva::new(1 << 20), flags }
}

/// A VM with one slot and one entry, and the thread that changes the slot.
struct Slots {
    vm: Arc<VmCore<ModelHost>>,
    cell: SpteCell,
}

impl Slots {
    fn new() -> (Arc<Self>, SlotWriter, Actor<ModelHost>) {
        let limits = SlotLimits::new(1, Gfn::new(64));
        let (vm, mut writer) = VmCore::new(ModelHost::new(1), 2, limits, relax).expect("memory");
        let mut owner = vm.actor().expect("room");
        let request = slot(PAGES * PAGE_SIZE);
        let _ = vm.set_slot(&mut writer, &mut owner, &request, |_, _| ()).expect("legal");
        (Arc::new(Self { vm, cell: SpteCell::new(Spte::EMPTY) }), writer, owner)
    }

    fn fault(&self, actor: &mut Actor<ModelHost>) {
        let found = actor.find_slot(0, GFN);
        let Some(slot) = found.slot.filter(|slot| !slot.is_invalid()) else { return };
        let page = slot.hva.get() >> 12;
        let work = actor.shared();
        let current = work.vm.slots().generation() == found.generation;
        if !current && !mmu_core::busted!("skip_generation_recheck") {
            return;
        }
        let _ = self.cell.try_change(Spte::EMPTY, entry(page));
        drop(work);
    }

    fn delete(&self, writer: &mut SlotWriter, owner: &mut Actor<ModelHost>) {
        let zap = |owner: &mut Actor<ModelHost>, _: &_| {
            let _section = owner.shared();
            let _ = self.cell.exchange(Spte::EMPTY);
        };
        let _ = self.vm.set_slot(writer, owner, &slot(0), zap).expect("legal");
        assert!(self.cell.load().is_empty(), "mapped after its slot was deleted (I11)");
    }
}

fn fault_against_slot_deletion(name: &str, copy: bool) {
    explore(name, move || {
        let (slots, mut writer, mut owner) = Slots::new();
        let mut actor = slots.vm.actor().expect("room");
        if copy {
            assert!(actor.find_slot(0, GFN).slot.is_some());
        }
        let fault = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || {
                slots.fault(&mut actor);
                actor
            })
        };
        slots.delete(&mut writer, &mut owner);
        let mut actor = fault.join().unwrap();
        assert!(slots.cell.load().is_empty(), "installed after the deletion (I11)");
        assert_eq!(actor.find_slot(0, GFN).slot, None, "a copy outlived its slot");
    });
}

#[test]
fn a_fault_with_a_copied_slot_installs_nothing_after_its_deletion() {
    fault_against_slot_deletion("slots::copied_slot_against_deletion", true);
}

#[test]
fn a_fault_that_looks_its_slot_up_installs_nothing_after_its_deletion() {
    fault_against_slot_deletion("slots::looked_up_slot_against_deletion", false);
}

/// Slot changes wait until no invalidation is in progress (KVM row 6.8).
#[test]
fn a_slot_change_and_an_invalidation_do_not_overlap() {
    // `when_idle` takes and drops its lock as often as it waits; unbounded that does not end.
    explore_up_to("slots::when_idle_against_invalidation", Some(2), || {
        let page = Page::new(Spte::EMPTY);
        // loom reports an access that is not ordered after every earlier one.
        let turn = Arc::new(UnsafeCell::new(()));
        let other = {
            let (page, turn) = (Arc::clone(&page), Arc::clone(&turn));
            let mut own = page.domain.register().expect("room");
            thread::spawn(move || {
                let invalidation = page.notify.begin(&mut own, GfnRange::from_len(GFN, 1));
                turn.with_mut(|_| ());
                drop(invalidation);
                own
            })
        };
        page.notify.when_idle(|| turn.with_mut(|_| ()));
        other.join().unwrap();
    });
}
