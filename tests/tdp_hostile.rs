//! Garbage from callers and lies from the embedder (T19): no panic, errors name the values, the
//! trees stay well-formed.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, linear};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{SlotError, SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::traits::{AgeMode, HostPage, ResolveError};
use mmu_model::{AccessKind, Random};
use proptest::prelude::*;
use tdp_mmu::{Cursor, LogError, TdpIter};

/// Numbers that break things: near powers of two, near the ends, and near what is mapped.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..64_u32, 0..3_u64)
            .prop_map(|(bit, off)| (1_u64 << bit).wrapping_add(off).wrapping_sub(1)),
        (0..4_u64).prop_map(|off| u64::MAX - off),
        (0..2 * M2).prop_map(|off| BASE + off),
        0..8_u64,
    ]
}

fn numbers() -> impl Strategy<Value = (u64, u64)> {
    (number(), number())
}

/// Calls: which, two numbers, a level.
fn call_list() -> impl Strategy<Value = Vec<(u8, (u64, u64), u8)>> {
    prop::collection::vec((any::<u8>(), numbers(), any::<u8>()), 1..24)
}

type SlotNumbers = ((u64, u64), u64, (u16, u16, u32), u8);

/// Slot requests: base and length, host address, names and flags, and which fields are sane.
fn slot_list() -> impl Strategy<Value = Vec<SlotNumbers>> {
    let one = (numbers(), number(), any::<(u16, u16, u32)>(), any::<u8>());
    prop::collection::vec(one, 1..12)
}

fn guest<F: Modelled>(caps: Capabilities) -> Guest<F> {
    let mut guest = Guest::<F>::with(Shape { frames: 128, ..Shape::new(caps) });
    // PAE tables end at 4 GiB.
    let base = if caps.levels == 3 { 0 } else { BASE };
    guest.slot(0, base, 2 * M2, DATA, SlotFlags::empty());
    guest.host().set_resolver(linear(Level::L2));
    guest.map([base, base + M2 + 3], AccessKind::Write, Level::L1);
    guest
}

fn any_call<F: Modelled>(guest: &mut Guest<F>, what: u8, a: u64, b: u64, level: Level) {
    let range = GfnRange::new(Gfn::new(a), Gfn::new(b));
    let config_max = guest.config().max_gfn_exclusive();
    match what % 12 {
        0 | 1 => {
            let code = PfErrorCode::from_bits_retain(b);
            let prefetch = what % 12 == 1;
            let fault = PageFault { prefetch, ..PageFault::new(Gpa::new(a), code).at_most(level) };
            match guest.vcpu.fault(&fault) {
                Ok(_) => assert!(fault.gfn() < config_max && level.may_be_leaf()),
                Err(FaultError::BeyondPhysical { gpa, max_gfn }) => {
                    assert!(gpa == fault.gpa && max_gfn == config_max && fault.gfn() >= max_gfn);
                }
                Err(FaultError::NotALeafLevel { level: named }) => assert_eq!(named, level),
                Err(error) => panic!("{fault:?}: {error}"),
            }
        }
        2 => {
            // Long ranges end at the first hole.
            let access = Access::from_bits_truncate(b.to_le_bytes()[0]);
            match guest.vcpu.prefault(range, access) {
                Ok(done) => assert!(range.is_empty() || (range.start <= done.next)),
                Err(FaultError::BeyondPhysical { max_gfn, .. }) => {
                    assert!(range.start >= max_gfn, "{range:?}");
                }
                Err(error) => panic!("{range:?}: {error}"),
            }
        }
        3 => {
            let _ = guest.unmap(range);
        }
        4 => {
            for mode in [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush] {
                let report = guest.age_into(range, mode, a ^ b, &mut mmu_core::traits::CountOnly);
                assert!(report.next <= range.end || range.is_empty(), "{range:?} {report:?}");
            }
        }
        5 => {
            let space = b.to_le_bytes()[1];
            let walk = guest.mmu.lookup(&mut guest.actor, space, Gfn::new(a));
            assert!(walk.is_empty() || (space == 0 && Gfn::new(a) < config_max));
        }
        6 => {
            let root = guest.vcpu.load_root().expect("a root");
            let top = guest.config().levels();
            let work = guest.actor.pinned();
            let cursor = Cursor::new(range, level);
            let iter = TdpIter::new(work.vm.pool(), &work.section, root, top, cursor);
            assert!(iter.take(4096).all(|step| step.level >= level.min(top)));
        }
        7 => {
            let mut zap = guest.mmu.invalidate_roots(&mut guest.actor);
            let _ = zap.step(&mut guest.actor, usize::try_from(a).unwrap_or(usize::MAX));
        }
        9..=11 => any_log_call(guest, what, (a, b), range),
        _ => {
            let begun = guest.mmu.vm().notify().begin(guest.actor.participant(), range);
            let fault = PageFault::new(Gpa::new(BASE << 12), PfErrorCode::empty());
            let _ = guest.vcpu.fault(&fault);
            drop(begun);
        }
    }
}

/// The slot of [`guest`], logged or not, and calls for its log, for others' and for nobody's.
fn any_log_call<F: Modelled>(guest: &mut Guest<F>, what: u8, (a, b): (u64, u64), range: GfnRange) {
    let base = if guest.config().levels() == Level::L3 { 0 } else { BASE };
    let flags = if what & 16 == 0 { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
    let change = common::request(0, base, 2 * M2, DATA, flags);
    match guest.set_slot_logging(&change, a..b) {
        Ok(_) => {}
        Err(SlotError::LogRange { start, end, pages }) => {
            assert!((start, end, pages) == (a, b, 2 * M2) && (start >= end || end > pages));
        }
        Err(error) => panic!("{a}..{b}: {error}"),
    }
    if what & 32 != 0 {
        let _ = guest.set_slot(&change).expect("a legal change");
    }
    let (as_id, id) = if what & 64 == 0 { (0, 0) } else { (number_of(a), number_of(b)) };
    let mut words = [u64::MAX; 16];
    let short = if what & 128 == 0 { 16 } else { 1 + (a % 16) as usize };
    let (mmu, actor) = (&guest.mmu, &mut guest.actor);
    let _ = mmu.harvest_log(actor, as_id, id, &mut words[..short]);
    let _ = mmu.peek_log(actor, as_id, id, &mut words[..short]);
    let bits = &words[..usize::try_from(b.div_ceil(64)).map_or(16, |words| words.min(16))];
    if let Ok(done) = mmu.clear_log(actor, (as_id, id), a, b, bits) {
        assert!(a % 64 == 0 && a + b <= 2 * M2 && done.pages <= b);
    }
    let _ = mmu.split(actor, as_id, range);
    assert_eq!(mmu.reset_rings(actor), Err(LogError::NoRings));
    let marked = actor.mark_dirty(as_id, range).expect("no ring to be full");
    assert!(marked <= range.len().min(2 * M2));
    let _ = guest.vcpu.log_hardware([a, b, u64::MAX].map(Gfn::new)).expect("no ring");
}

fn number_of(word: u64) -> u16 {
    (word & 0xffff) as u16
}

fn calls<F: Modelled>(caps: Capabilities, list: &[(u8, (u64, u64), u8)]) {
    let mut guest = guest::<F>(caps);
    for &(what, (a, b), level) in list {
        let _ = guest.vcpu.load_root().expect("a root");
        any_call(&mut guest, what, a, b, Level::ALL[usize::from(level % 5)]);
    }
    guest.mmu.check(&mut guest.actor).expect("well-formed trees");
    guest.finish();
}

/// Failures are printed with their input, not written to a file.
fn config() -> ProptestConfig {
    ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_arguments_make_a_call_panic(
        list in call_list(),
        kind in 0..6_u8,
    ) {
        match kind {
            0 => calls::<Ept>(Capabilities::ept(), &list),
            1 => calls::<Ept>(common::no_ad(common::five(Capabilities::ept())), &list),
            2 => calls::<Npt>(Capabilities::npt(), &list),
            3 => calls::<Legacy>(Capabilities::pae(), &list),
            4 => calls::<Legacy>(common::no_ad(Capabilities::legacy()), &list),
            _ => calls::<Npt>(Capabilities { max_phys_bits: 36, ..Capabilities::npt() }, &list),
        }
    }

    /// Whatever is asked of slots: done, or refused with the values, and then nothing changed.
    #[test]
    fn no_slot_request_panics_and_refusals_name_values(
        list in slot_list(),
    ) {
        let mut guest = guest::<Ept>(Capabilities::ept());
        for ((base, bytes), hva, (as_id, id, flags), tame) in list {
            // Mostly garbage in one field at a time, or nothing would ever pass the first check.
            let pick = |bit: u8, garbage: u64, sane: u64| {
                if tame >> bit & 1 != 0 { sane } else { garbage }
            };
            let request = SlotRequest {
                as_id: if tame & 1 != 0 { 0 } else { as_id },
                id: if tame & 2 != 0 { id % 3 } else { id },
                base: Gpa::new(pick(2, base, (BASE + 4 * M2) << 12)),
                bytes: pick(3, bytes, (u64::from(id) % 64) << 12),
                hva: Hva::new(pick(4, hva, DATA << 12)),
                flags: SlotFlags::from_bits_retain(if tame & 32 != 0 { flags & 3 } else { flags }),
            };
            let before = guest.check();
            match guest.set_slot(&request) {
                Ok(change) => { let _ = change; }
                Err(error) => {
                    let text = error.to_string();
                    prop_assert!(text.chars().any(|c| c.is_ascii_digit()), "{}", text);
                    let internal = matches!(
                        error,
                        SlotError::Malformed { .. } | SlotError::IdTaken { .. }
                    );
                    prop_assert!(!internal, "{}", text);
                    prop_assert_eq!(guest.check(), before);
                }
            }
            let fault = PageFault::new(request.base, PfErrorCode::WRITE);
            let _ = guest.vcpu.fault(&fault);
        }
        guest.check();
        guest.finish();
    }
}

/// A gfn whose address does not fit in 64 bits is beyond the tables; it is not gfn 0.
#[test]
fn a_prefault_beyond_all_addresses_does_not_wrap() {
    let mut guest = Guest::<Ept>::new(Capabilities::ept());
    guest.slot(0, 0, 64, DATA, SlotFlags::empty());
    for start in [1 << 52, (1 << 52) + 5, 1 << 63, u64::MAX - 1, 1 << 40] {
        let range = GfnRange::new(Gfn::new(start), Gfn::new(u64::MAX));
        let error = guest.vcpu.prefault(range, Access::READ).unwrap_err();
        assert!(matches!(error, FaultError::BeyondPhysical { .. }), "{start:#x}: {error}");
    }
    // A range that begins inside ends where the slot does.
    let done = guest.vcpu.prefault(GfnRange::ALL, Access::READ).unwrap();
    assert_eq!(done.next, Gfn::new(64));
    assert_eq!(guest.check().leaves, [64, 0, 0]);
    guest.finish();
}

/// T19: the host changes its answer and says nothing: the old mapping stays, the error names both.
#[test]
fn another_page_without_an_invalidation_is_refused() {
    let mut guest = guest::<Ept>(Capabilities::ept());
    let read_only = Arc::new(AtomicU64::new(1));
    let (flag, lie) = (Arc::clone(&read_only), Arc::new(AtomicU64::new(0)));
    let offset = Arc::clone(&lie);
    guest.host().set_resolver(Arc::new(move |slot, gfn, want| {
        let page = linear(Level::L1)(slot, gfn, want)?;
        let pfn = Pfn::new(page.pfn.get() + offset.load(Ordering::Relaxed));
        Ok(HostPage { pfn, writable: flag.load(Ordering::Relaxed) == 0, level: Level::L1 })
    }));
    let gfn = Gfn::new(BASE + 9);
    guest.map([BASE + 9], AccessKind::Read, Level::L1);
    read_only.store(0, Ordering::Relaxed);
    lie.store(77, Ordering::Relaxed);
    let error = guest.try_fault(BASE + 9, AccessKind::Write, Level::L1).unwrap_err();
    let (mapped, resolved) = (Pfn::new(DATA + 9), Pfn::new(DATA + 86));
    assert_eq!(error, FaultError::StaleMapping { gfn, mapped, resolved });
    assert_eq!(guest.found(BASE + 9).map(|found| found.pfn), Some(DATA + 9));
    // As the error says: unmap, and all is well.
    let _ = guest.unmap(GfnRange::from_len(gfn, 1));
    guest.map([BASE + 9], AccessKind::Write, Level::L1);
    assert_eq!(guest.found(BASE + 9).map(|found| found.pfn), Some(DATA + 86));
    guest.check();
    guest.finish();
}

/// T19: huge, then small, then huge again.
#[test]
fn a_host_that_changes_its_mind_about_sizes_is_followed() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), G1, Level::L3);
    for (round, level) in [3, 1, 2, 1, 3, 2, 1, 3_u8].into_iter().enumerate() {
        let level = Level::new(level).unwrap();
        guest.host().set_resolver(linear(level));
        let gfn = BASE + round as u64 * M2 + 5;
        let fault = PageFault::prefetch(common::gpa(gfn), Access::WRITE);
        let outcome = guest.vcpu.fault(&fault).unwrap();
        assert!(matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious));
        let found = guest.found(gfn).unwrap();
        // With tables below, a fault takes the largest size for which one table goes.
        let expected = if round == 0 { level } else { level.min(Level::L2) };
        assert_eq!((found.pfn, found.level), (DATA + gfn - BASE, expected.number()), "{round}");
        guest.check();
    }
    guest.finish();
}

/// T19: random errors, sizes and refusals; pages never move. Whatever is mapped is right.
#[test]
fn a_moody_resolver_never_leads_to_a_wrong_page() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), G1, Level::L3);
        let state = Arc::new(AtomicU64::new(seed));
        guest.host().set_resolver(Arc::new(move |slot, gfn, want| {
            let mut mood = Random::new(state.fetch_add(1, Ordering::Relaxed));
            let errors = [
                ResolveError::NeedsIo,
                ResolveError::HwPoison,
                ResolveError::ReadOnly,
                ResolveError::Interrupted,
                ResolveError::NoMemory,
            ];
            let page = linear(Level::ALL[mood.below(5) as usize])(slot, gfn, want)?;
            match mood.below(8) {
                0 => Err(errors[mood.below(5) as usize]),
                1 => Ok(HostPage { pfn: Pfn::new(u64::MAX - mood.below(9)), ..page }),
                2 => Ok(HostPage { writable: false, ..page }),
                _ => Ok(page),
            }
        }));
        for _ in 0..1500 {
            let gfn = BASE + random.below(3) * M2 + random.below(5) * 100;
            let kind = if random.chance(1, 2) { AccessKind::Write } else { AccessKind::Read };
            let level = Level::ALL[random.below(3) as usize];
            let _ = guest.try_fault(gfn, kind, level);
            if let Some(found) = guest.found(gfn) {
                assert_eq!(found.pfn, DATA + gfn - BASE, "seed {seed}");
            }
            if random.chance(1, 40) {
                let _ = guest.unmap(GfnRange::from_len(Gfn::new(gfn), 1 + random.below(M2)));
            }
        }
        guest.check();
        guest.finish();
    }
}
