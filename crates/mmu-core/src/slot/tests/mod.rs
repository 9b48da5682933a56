//! Behaviour of slots: sets against a naive model, requests against the rules, geometry against
//! brute force.

mod geometry;
mod hugepage;
mod lookup;
mod model;
mod overhead;
mod publish;
mod rules;
mod track;

use super::*;
use crate::addr::{Gpa, Level};

/// Room for four gfn bits more than any test uses on purpose.
const LIMITS: SlotLimits = SlotLimits::new(2, Gfn::new(1 << 40));

/// A slot far from everything else on the host.
fn slot(as_id: u16, id: u16, base: u64, npages: u64) -> Memslot {
    let hva = Hva::new((1 << 40) + (u64::from(as_id) << 39) + (base << PAGE_SHIFT));
    let flags = SlotFlags::empty();
    Memslot { as_id, id, flags, base_gfn: Gfn::new(base), npages, hva }
}

fn at_host_page(slot: Memslot, page: u64) -> Memslot {
    Memslot { hva: Hva::new(page << PAGE_SHIFT), ..slot }
}

/// The request that creates `slot`, or leaves it as it is.
fn request(slot: &Memslot) -> SlotRequest {
    let &Memslot { as_id, id, flags, base_gfn, npages, hva } = slot;
    SlotRequest { as_id, id, base: base_gfn.address(), bytes: npages << PAGE_SHIFT, hva, flags }
}

#[track_caller]
fn set_of(slots: &[Memslot]) -> Memslots {
    let mut set = Memslots::new(&LIMITS);
    for slot in slots {
        assert_eq!(set.insert(*slot), Ok(()));
    }
    set
}

/// SplitMix64: small, and the same on every machine, so a printed seed is enough to run again.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn small(&mut self, limit: u16) -> u16 {
        u16::try_from(self.below(u64::from(limit))).unwrap_or(0)
    }

    /// A number at or next to a power of two, or any number at all.
    fn edge(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(5) {
            0 => power,
            1 => power - 1,
            2 => power | 1,
            3 => power.wrapping_neg(),
            _ => self.next(),
        }
    }
}
