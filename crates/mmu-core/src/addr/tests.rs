//! Addresses and levels: shifts, ranges and the edges of the number line.

use alloc::vec::Vec;

use super::*;

#[test]
fn level_sizes_are_those_of_x86() {
    let pages: [u64; 5] = [1, 512, 512 * 512, 512 * 512 * 512, 512 * 512 * 512 * 512];
    for (level, want) in Level::ALL.into_iter().zip(pages) {
        assert_eq!(level.pages(), want, "{level:?}");
        assert_eq!(level.table_pages(), want * 512, "{level:?}");
    }
}

#[test]
fn wrong_level_numbers_are_named() {
    for number in [0u8, 6, 255] {
        assert_eq!(Level::new(number), Err(BadLevel { number }));
    }
}

#[test]
fn index_takes_the_nine_bits_of_its_level() {
    let gfn = Gfn::new(1 << 36 | 2 << 27 | 3 << 18 | 4 << 9 | 5);
    let want = [5, 4, 3, 2, 1];
    for (level, want) in Level::ALL.into_iter().zip(want) {
        assert_eq!(gfn.index(level), want);
    }
}

#[test]
fn ranges_agree_with_a_naive_set_on_all_small_inputs() {
    let small = 0..7u64;
    for a in small.clone() {
        for b in small.clone() {
            for c in small.clone() {
                for d in small.clone() {
                    let x = GfnRange::new(Gfn::new(a), Gfn::new(b));
                    let y = GfnRange::new(Gfn::new(c), Gfn::new(d));
                    let both = (0..7).filter(|g| (a..b).contains(g) && (c..d).contains(g)).count();
                    assert_eq!(x.intersection(y).len(), to_u64(both), "{x} {y}");
                    if !x.is_empty() && !y.is_empty() {
                        assert_eq!(x.overlaps(y), both > 0, "{x} {y}");
                        assert!(x.hull(y).covers(x) && x.hull(y).covers(y));
                    }
                }
            }
        }
    }
}

#[test]
fn lengths_stop_at_the_end_of_the_number_line() {
    let range = GfnRange::from_len(Gfn::new(u64::MAX - 1), 5);
    assert_eq!(range.end, Gfn::new(u64::MAX));
    assert_eq!(Gfn::new(u64::MAX).checked_add(1), None);
}

/// KVM rows 6.2 and B45.
#[test]
fn a_masked_index_is_itself_inside_and_zero_outside() {
    let edges: Vec<u64> = (0..64)
        .flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1])
        .chain([u64::MAX - 1, u64::MAX])
        .collect();
    for &length in edges.iter().filter(|length| **length <= 1 << 63) {
        for &index in &edges {
            let want = if index < length { index } else { 0 };
            assert_eq!(mask_index(index, length), want, "index {index:#x} of {length:#x}");
        }
    }
}
