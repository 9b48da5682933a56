//! Random requests against the most naive set there is: one vector, scanned.

use alloc::vec::Vec;

use super::*;

/// Gfns, host pages and ids in use: few, so that requests collide.
const GFNS: u64 = 64;
const HOST_PAGES: u64 = 48;
const IDS: u16 = 12;
const STEPS: u32 = 200;

#[derive(Default)]
struct Naive(Vec<Memslot>);

impl Naive {
    fn by_id(&self, as_id: u16, id: u16) -> Option<Memslot> {
        self.0.iter().find(|slot| (slot.as_id, slot.id) == (as_id, id)).copied()
    }

    fn find(&self, as_id: u16, gfn: Gfn) -> Option<Memslot> {
        self.0.iter().find(|slot| slot.as_id == as_id && slot.contains(gfn)).copied()
    }

    /// What must become of a request whose numbers are in range, decided page by page.
    fn expect(&self, new: &Memslot) -> Result<SlotChange, ()> {
        let free = |gfn| self.find(new.as_id, Gfn::new(gfn)).is_none_or(|slot| slot.id == new.id);
        let start = new.base_gfn.get();
        let fits = (start..start + new.npages).all(free);
        match self.by_id(new.as_id, new.id) {
            None if new.npages == 0 || !fits => Err(()),
            None => Ok(SlotChange::Create(*new)),
            Some(old) if new.npages == 0 => Ok(SlotChange::Delete(old)),
            Some(old) if old == *new => Ok(SlotChange::Nothing),
            Some(old) => {
                let fixed = |slot: &Memslot| (slot.npages, slot.hva, slot.is_read_only());
                if fixed(&old) != fixed(new) || !fits {
                    Err(())
                } else if old.base_gfn == new.base_gfn {
                    Ok(SlotChange::Flags { old, new: *new })
                } else {
                    Ok(SlotChange::Move { old, new: *new })
                }
            }
        }
    }

    fn apply(&mut self, change: &SlotChange) {
        let (old, new) = match *change {
            SlotChange::Nothing => (None, None),
            SlotChange::Create(new) => (None, Some(new)),
            SlotChange::Delete(old) => (Some(old), None),
            SlotChange::Move { old, new } | SlotChange::Flags { old, new } => {
                (Some(old), Some(new))
            }
        };
        self.0.retain(|slot| Some(*slot) != old);
        self.0.extend(new);
    }
}

/// A slot made up, or one that exists with something about it changed.
fn wanted(rng: &mut Rng, naive: &Naive) -> Memslot {
    let (as_id, id) = (rng.small(2), rng.small(IDS));
    let flags = SlotFlags::from_bits_truncate(u32::from(rng.small(4)));
    let base_gfn = Gfn::new(rng.below(GFNS));
    let fresh = at_host_page(
        Memslot { flags, base_gfn, ..slot(as_id, id, 0, rng.below(9)) },
        rng.below(HOST_PAGES),
    );
    match (naive.by_id(as_id, id), rng.below(5)) {
        (Some(old), 0) => Memslot { base_gfn, ..old },
        (Some(old), 1) => Memslot { flags: old.flags ^ SlotFlags::LOG_DIRTY, ..old },
        (Some(old), 2) => Memslot { npages: 0, ..old },
        (Some(old), 3) => old,
        _ => fresh,
    }
}

#[track_caller]
fn assert_same(set: &Memslots, naive: &Naive, seed: u64, step: u32) {
    let mut total = 0;
    for as_id in 0..2 {
        let mut want: Vec<_> = naive.0.iter().filter(|s| s.as_id == as_id).copied().collect();
        want.sort_by_key(|slot| slot.base_gfn);
        total += want.iter().map(|slot| slot.npages).sum::<u64>();
        let got: Vec<_> = set.iter(as_id).copied().collect();
        assert_eq!(got, want, "seed {seed} step {step}");
        for id in 0..IDS {
            let got = set.by_id(as_id, id).copied();
            assert_eq!(got, naive.by_id(as_id, id), "seed {seed} step {step}");
        }
        for gfn in (0..GFNS + 10).map(Gfn::new) {
            let got = set.find(as_id, gfn).copied();
            assert_eq!(got, naive.find(as_id, gfn), "seed {seed} step {step} gfn {gfn}");
        }
    }
    assert_eq!(set.total_pages(), total, "seed {seed} step {step}");
    // Its indexes, too, depend on the slots only, not on how they came to be.
    assert_eq!(*set, set_of(&naive.0), "seed {seed} step {step}");
}

#[track_caller]
fn assert_same_on_host(set: &Memslots, naive: &Naive, seed: u64, rng: &mut Rng) {
    let limit = (HOST_PAGES + 10) << PAGE_SHIFT;
    let (start, end) = (rng.below(limit), rng.below(limit));
    let mut got = Vec::new();
    set.for_each_hva_range(Hva::new(start), Hva::new(end), |slot, range| {
        got.extend((range.start.get()..range.end.get()).map(|gfn| (slot.as_id, slot.id, gfn)));
    });
    let mut want = Vec::new();
    for slot in &naive.0 {
        for n in 0..slot.npages {
            let page = slot.hva.get() + n * PAGE_SIZE;
            if start < end && page < end && start < page + PAGE_SIZE {
                want.push((slot.as_id, slot.id, slot.base_gfn.get() + n));
            }
        }
    }
    got.sort_unstable();
    want.sort_unstable();
    assert_eq!(got, want, "seed {seed} {start:#x}..{end:#x}");
}

/// Two sets as a publisher uses them: the change goes into the spare one, they swap, and it is
/// replayed on the other. Some deletions and moves fail halfway and are taken back.
#[test]
fn random_requests_agree_with_a_naive_vector() {
    let mut kinds = [0u32; 6];
    for seed in 0..150 {
        let mut rng = Rng(seed);
        let mut naive = Naive::default();
        let (mut live, mut spare) = (Memslots::new(&LIMITS), Memslots::new(&LIMITS));
        for step in 0..STEPS {
            let new = wanted(&mut rng, &naive);
            let planned = plan(&live, &LIMITS, &request(&new));
            assert_eq!(planned.map_err(|_| ()), naive.expect(&new), "seed {seed} step {step}");
            let kind = match planned {
                Err(_) => 0,
                Ok(SlotChange::Nothing) => 1,
                Ok(SlotChange::Create(_)) => 2,
                Ok(SlotChange::Delete(_)) => 3,
                Ok(SlotChange::Move { .. }) => 4,
                Ok(SlotChange::Flags { .. }) => 5,
            };
            if let Some(count) = kinds.get_mut(kind) {
                *count += 1;
            }
            let Ok(change) = planned else { continue };
            assert_eq!(spare.reserve_like(&live, 1), Ok(()), "seed {seed} step {step}");
            spare.apply_invalid(&change);
            if rng.below(8) == 0 {
                spare.undo_invalid(&change);
                assert_eq!(spare, live, "seed {seed} step {step}");
                continue;
            }
            spare.apply(&change);
            core::mem::swap(&mut live, &mut spare);
            naive.apply(&change);
            assert_same(&live, &naive, seed, step);
            assert_same_on_host(&live, &naive, seed, &mut rng);
            if rng.below(4) == 0 {
                spare.copy_from(&live)
            } else {
                spare.apply(&change)
            }
            assert_eq!(spare, live, "seed {seed} step {step}");
        }
    }
    assert!(kinds.iter().all(|count| *count > 200), "too few of some change: {kinds:?}");
}

/// Whatever the numbers, a request is refused or gives a slot that a set takes.
#[test]
fn no_request_panics_and_every_plan_fits() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let mut set = Memslots::new(&LIMITS);
        let limits = SlotLimits {
            address_spaces: rng.small(5),
            slots_per_space: rng.small(u16::MAX),
            max_gfn_exclusive: Gfn::new(rng.edge()),
            total_pages: rng.edge(),
            hva_bits: u32::from(rng.small(70)),
            first_generation: rng.edge(),
        };
        for _ in 0..300 {
            let aligned = |value: u64| value & !(PAGE_SIZE - 1);
            let align = |rng: &mut Rng| {
                let value = rng.edge();
                if rng.below(8) == 0 { value } else { aligned(value) }
            };
            let asked = SlotRequest {
                as_id: rng.small(3),
                id: rng.small(20),
                base: Gpa::new(align(&mut rng)),
                bytes: align(&mut rng),
                hva: Hva::new(align(&mut rng)),
                flags: SlotFlags::from_bits_retain(u32::from(rng.small(5))),
            };
            if let Ok(change) = plan(&set, &limits, &asked) {
                // `apply` asserts that it fits.
                set.apply_invalid(&change);
                set.apply(&change);
                if asked.bytes != 0 {
                    let gfn = Gfn::containing(asked.base);
                    let hva = set.resolve_hva(asked.as_id, gfn, Access::READ);
                    assert_eq!(hva, Ok(asked.hva), "seed {seed}: {asked:?}");
                }
            }
        }
    }
}
