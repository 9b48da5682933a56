//! The VMM's own translation of a page, against everything that ends one (KVM rows 6.22, B40).

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{BASE, DATA, Guest, M2, StopOnDrop, linear, range};
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::gfn_cache::{GfnCache, GfnCacheError};
use mmu_core::slot::{GfnToHvaError, SlotFlags};
use mmu_core::spte::{Capabilities, Ept};
use mmu_core::traits::{HostPage, ResolveError};
use mmu_core::vm::Actor;

use common::TestHost;

const READ_WRITE: Access = Access::READ.union(Access::WRITE);

fn pfn(cache: &GfnCache, actor: &mut Actor<TestHost>) -> Option<u64> {
    cache.get(&actor.shared()).map(|page| page.pfn().get())
}

#[test]
fn a_translation_holds_until_its_page_is_taken_away() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    let mut cache = GfnCache::new(0, Gfn::new(BASE + 5), READ_WRITE);
    assert_eq!(pfn(&cache, &mut guest.actor), None, "empty");
    cache.refresh(&mut guest.actor).unwrap();
    for _ in 0..3 {
        assert_eq!(pfn(&cache, &mut guest.actor), Some(DATA + 5));
    }
    let hva = cache.get(&guest.actor.shared()).map(|page| page.hva().get());
    assert_eq!(hva, Some((DATA + 5) << 12));
    let _ = guest.unmap(range(BASE + 4, BASE + 8));
    assert_eq!(pfn(&cache, &mut guest.actor), None, "taken away");
    cache.refresh(&mut guest.actor).unwrap();
    assert_eq!(pfn(&cache, &mut guest.actor), Some(DATA + 5));
    // Slots: moved memory, then none.
    guest.slot(0, 0, 0, DATA, SlotFlags::empty());
    assert_eq!(pfn(&cache, &mut guest.actor), None, "the slot is gone");
    let missing = GfnToHvaError::NoSlot { as_id: 0, gfn: Gfn::new(BASE + 5) };
    assert_eq!(cache.refresh(&mut guest.actor), Err(GfnCacheError::Slot(missing)));
    guest.slot(0, BASE, 64, DATA + M2, SlotFlags::READ_ONLY);
    let error = cache.refresh(&mut guest.actor).unwrap_err();
    assert!(matches!(error, GfnCacheError::Slot(GfnToHvaError::ReadOnly { .. })), "{error}");
    let mut reader = GfnCache::new(0, Gfn::new(BASE + 5), Access::READ);
    reader.refresh(&mut guest.actor).unwrap();
    assert_eq!(pfn(&reader, &mut guest.actor), Some(DATA + M2 + 5));
    reader.clear();
    assert_eq!(pfn(&reader, &mut guest.actor), None);
    guest.host().set_resolver(Arc::new(|_, _, _| Err(ResolveError::NeedsIo)));
    let source = ResolveError::NeedsIo;
    let failed = GfnCacheError::Resolve { gfn: Gfn::new(BASE + 5), source };
    assert_eq!(reader.refresh(&mut guest.actor), Err(failed));
    guest.finish();
}

/// KVM row B40: the host has announced that it takes the page, and has not done it yet. What it
/// answers now is the page that goes.
#[test]
fn a_refresh_in_the_middle_of_an_invalidation_is_never_used() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    let vm = Arc::clone(guest.mmu.vm());
    let mut other = vm.actor().unwrap();
    let mut cache = GfnCache::new(0, Gfn::new(BASE + 5), READ_WRITE);
    cache.refresh(&mut guest.actor).unwrap();
    let going = vm.notify().begin(other.participant(), range(BASE + 5, BASE + 6));
    assert_eq!(pfn(&cache, &mut guest.actor), None, "before the MMU has unmapped anything");
    cache.refresh(&mut guest.actor).unwrap();
    assert_eq!(pfn(&cache, &mut guest.actor), None, "refreshed too early");
    guest.host().set_resolver(Arc::new(|_, _, _| {
        Ok(HostPage { pfn: Pfn::new(DATA + 99), writable: true, level: Level::L1 })
    }));
    drop(going);
    assert_eq!(pfn(&cache, &mut guest.actor), None, "the old page is not the page");
    cache.refresh(&mut guest.actor).unwrap();
    assert_eq!(pfn(&cache, &mut guest.actor), Some(DATA + 99));
    // One elsewhere does not disturb while it lasts.
    let elsewhere = vm.notify().begin(other.participant(), range(BASE + 9, BASE + 10));
    assert_eq!(pfn(&cache, &mut guest.actor), Some(DATA + 99));
    drop(elsewhere);
    drop((other, vm));
    guest.finish();
}

/// The host moves the page about; the VMM never uses a page that the host has taken back.
#[test]
fn a_page_in_use_is_not_taken_away_before_the_section_ends() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    let (now, uses) = (Arc::new(AtomicU64::new(DATA)), AtomicU64::new(0));
    let answer = Arc::clone(&now);
    guest.host().set_resolver(Arc::new(move |_, _, _| {
        let pfn = Pfn::new(answer.load(Ordering::Acquire));
        Ok(HostPage { pfn, writable: true, level: Level::L1 })
    }));
    let stop = AtomicBool::new(false);
    let mmu = Arc::clone(&guest.mmu);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut actor = mmu.vm().actor().unwrap();
            let mut cache = GfnCache::new(0, Gfn::new(BASE), READ_WRITE);
            while !stop.load(Ordering::Acquire) {
                cache.refresh(&mut actor).unwrap();
                let work = actor.shared();
                if let Some(page) = cache.get(&work) {
                    for _ in 0..20 {
                        // The host changes its answer inside an invalidation only.
                        assert_eq!(page.pfn().get(), now.load(Ordering::Acquire));
                    }
                    uses.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let _stop = StopOnDrop(&stop);
        let mut round = 0;
        while round < 2_000 || uses.load(Ordering::Relaxed) < 100 {
            round += 1;
            let vm = Arc::clone(guest.mmu.vm());
            let going = vm.notify().begin(guest.actor.participant(), range(BASE, BASE + 1));
            now.store(DATA + round % 7, Ordering::Release);
            drop(going);
        }
    });
    drop(mmu);
    guest.host().set_resolver(linear(Level::L1));
    guest.finish();
}
