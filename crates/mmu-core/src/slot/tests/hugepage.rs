//! Huge-page permission against brute force over every page of the block.

use super::*;

/// One entry maps `pages` guest pages to host memory that starts at a multiple of its size: every
/// page must be in the slot, and stand as far from the start on the host as in the guest.
fn allowed(slot: &Memslot, gfn: u64, pages: u64, step: usize) -> bool {
    let first = gfn / pages * pages;
    let last = first + pages - 1;
    let Some(start) = slot.hva_of(Gfn::new(first)) else { return false };
    let mapped =
        |page| slot.hva_of(Gfn::new(page)) == start.checked_add((page - first) * PAGE_SIZE);
    start.get() % (pages * PAGE_SIZE) == 0
        && (first..=last).step_by(step).all(mapped)
        && mapped(last)
}

#[track_caller]
fn check(slot: &Memslot, gfn: u64, cap: Level) {
    // A level is never allowed without the one below it, so the search may stop at the first.
    let l2 = allowed(slot, gfn, Level::L2.pages(), 1);
    let l3 = allowed(slot, gfn, Level::L3.pages(), 97);
    assert!(l2 || !l3, "{slot:?} {gfn}");
    let want = match (l3, l2) {
        (true, _) => Level::L3,
        (_, true) => Level::L2,
        _ => Level::L1,
    };
    assert_eq!(max_level(slot, Gfn::new(gfn), cap), want.min(cap), "{slot:?} gfn {gfn:#x} {cap:?}");
}

// INVARIANT[I12].
#[test]
fn two_mib_blocks_agree_with_brute_force_for_every_offset() {
    let block = Level::L2.pages();
    let near = |at: u64| [at.saturating_sub(1), at, at + 1];
    for base in (0..2).flat_map(|n| near(n * block)).chain([block / 2]) {
        for npages in (1..4).flat_map(|n| near(n * block)).chain([1, 3 * block / 2]) {
            for host in [base, base + block, base + 1, base + block / 2, base + 3 * block - 1] {
                let slot = at_host_page(slot(0, 0, base, npages.max(1)), (1 << 20) + host);
                let ends = near(base).into_iter().chain(near(base + slot.npages));
                for gfn in ends.chain((0..6 * block).step_by(31)).chain(near(block)) {
                    check(&slot, gfn, Level::L3);
                }
            }
        }
    }
}

#[test]
fn one_gib_blocks_agree_with_brute_force() {
    let (big, block) = (Level::L3.pages(), Level::L2.pages());
    for base in [0, 1, block, big - block, big - 1, big, big + block] {
        for npages in [big - 1, big, big + 1, 2 * big - block, 2 * big, 2 * big + block] {
            for host in [base, base + big, base + block, base + 1] {
                let slot = at_host_page(slot(0, 0, base, npages), (1 << 20) + host);
                for gfn in [0, base, base + block, big - 1, big, big + 5, 2 * big, 3 * big] {
                    check(&slot, gfn, Level::L3);
                }
            }
        }
    }
}

#[test]
fn the_cap_holds_and_nothing_above_one_gib_is_a_leaf() {
    let slot = at_host_page(slot(0, 0, 0, Level::L4.pages()), 0);
    let gfn = Gfn::new(Level::L4.pages() / 2 + 1);
    for cap in Level::ALL {
        assert_eq!(max_level(&slot, gfn, cap), cap.min(Level::L3), "{cap:?}");
    }
}

#[test]
fn a_gfn_outside_the_slot_gets_the_smallest_page() {
    let block = Level::L2.pages();
    let slot = at_host_page(slot(0, 0, block, block), block);
    for gfn in [0, block - 1, 2 * block, u64::MAX] {
        assert_eq!(max_level(&slot, Gfn::new(gfn), Level::L3), Level::L1, "{gfn}");
    }
    assert_eq!(max_level(&slot, Gfn::new(block), Level::L3), Level::L2);
}
