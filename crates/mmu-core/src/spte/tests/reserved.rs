//! Reserved bits, bit by bit, against tables from the manuals (KVM rows 1.31 and 1.32).

use super::*;
use crate::spte::reserved::ReservedParams;
use model::is;

const WIDTHS: [u8; 5] = [36, 39, 46, 51, 52];

fn params(root: Level, max_phys_bits: u8) -> ReservedParams {
    ReservedParams {
        root,
        max_phys_bits,
        nx: true,
        huge_2m: true,
        huge_1g: true,
        exec_only: true,
        mode_based_exec: false,
        upper_global_reserved: false,
        accepted: 0,
        refused: 0,
    }
}

/// Every single bit on top of `base`, which is fine by itself: reserved exactly if the table says
/// so. The table lists ranges `(high, low)`.
#[track_caller]
fn check<F: SpteFormat>(params: &ReservedParams, level: Level, base: u64, table: &[(u32, u32)]) {
    let reserved = ReservedBits::new::<F>(params);
    assert_eq!(reserved.check(base, level), 0, "{base:#x}");
    for number in (0..64).filter(|&number| number != 7) {
        let listed = table.iter().any(|&(high, low)| (low..=high).contains(&number));
        let above = (u32::from(params.max_phys_bits)..52).contains(&number);
        let got = reserved.check(base | 1 << number, level);
        let want = if listed || above { 1 << number } else { 0 };
        // Bit 4 alone is memory type 2, for which all of bits 5:0 are reported.
        if F::NAME == "EPT" && number == 4 && listed {
            assert!(is(got, 4), "{level:?} {got:#x}");
        } else {
            assert_eq!(got & !base, want & !base, "{} {level:?} bit {number}", F::NAME);
        }
    }
}

#[test]
fn ept_single_bits() {
    for width in WIDTHS {
        let params = params(Level::L5, width);
        let link = 0b111;
        let large = link | 1 << 7;
        for level in [Level::L5, Level::L4] {
            check::<Ept>(&params, level, link, &[(7, 3)]);
        }
        for level in [Level::L3, Level::L2] {
            check::<Ept>(&params, level, link, &[(6, 3)]);
        }
        check::<Ept>(&params, Level::L3, large, &[(29, 12), (4, 4)]);
        check::<Ept>(&params, Level::L2, large, &[(20, 12), (4, 4)]);
        check::<Ept>(&params, Level::L1, link, &[(4, 4)]);
        check::<Ept>(&params, Level::L1, large, &[(4, 4)]);
    }
}

#[test]
fn four_and_five_level_legacy_single_bits() {
    for width in WIDTHS {
        for nx in [true, false] {
            for amd in [false, true] {
                let params =
                    ReservedParams { nx, upper_global_reserved: amd, ..params(Level::L5, width) };
                let nx_bit = if nx { (1, 2) } else { (63, 63) };
                let global = if amd { (8, 8) } else { (1, 2) };
                for level in [Level::L5, Level::L4] {
                    check::<Legacy>(&params, level, 1, &[nx_bit, global]);
                    check::<Npt>(&params, level, 1, &[nx_bit, global]);
                }
                for level in [Level::L3, Level::L2, Level::L1] {
                    check::<Legacy>(&params, level, 1, &[nx_bit]);
                }
                check::<Legacy>(&params, Level::L3, 0x81, &[nx_bit, (29, 13)]);
                check::<Legacy>(&params, Level::L2, 0x81, &[nx_bit, (20, 13)]);
                // PAT.
                check::<Legacy>(&params, Level::L1, 0x81, &[nx_bit]);
            }
        }
    }
}

#[test]
fn pae_single_bits() {
    for width in WIDTHS {
        for nx in [true, false] {
            let params = ReservedParams { nx, huge_1g: false, ..params(Level::L3, width) };
            let nx_bit = if nx { (1, 2) } else { (63, 63) };
            check::<Legacy>(&params, Level::L3, 1, &[(63, 52), (8, 5), (2, 1)]);
            check::<Legacy>(&params, Level::L2, 1, &[(62, 52), nx_bit]);
            check::<Legacy>(&params, Level::L2, 0x81, &[(62, 52), nx_bit, (20, 13)]);
            check::<Legacy>(&params, Level::L1, 1, &[(62, 52), nx_bit]);
        }
    }
}

#[test]
fn bit_7_is_reserved_where_no_such_page_exists() {
    // (level, 2M pages, 1G pages) -> reserved?
    for level in Level::ALL {
        for (huge_2m, huge_1g) in [(true, true), (true, false), (false, false)] {
            let params = ReservedParams { huge_2m, huge_1g, ..params(Level::L5, 46) };
            let want = match level {
                Level::L1 => false,
                Level::L2 => !huge_2m,
                Level::L3 => !huge_1g,
                Level::L4 | Level::L5 => true,
            };
            let ept = ReservedBits::new::<Ept>(&params).check(0x87, level);
            let legacy = ReservedBits::new::<Legacy>(&params).check(0x81, level);
            assert_eq!((is(ept, 7), is(legacy, 7)), (want, want), "{level:?}");
        }
    }
    let pae = ReservedBits::new::<Legacy>(&params(Level::L3, 46));
    assert_eq!(pae.check(0x81, Level::L3), 0x80);
}

/// SDM 3C 28.3.3.1, all 64 values of bits 5:0, with and without fetch-only entries, bit 10 and
/// mode-based execute control.
#[test]
fn ept_misconfigurations_of_the_low_bits() {
    for counter in 0..64u64 * 8 {
        let low = counter & 63;
        let [exec_only, mode_based_exec, user] = [6, 7, 8].map(|place| is(counter, place));
        let params = ReservedParams { exec_only, mode_based_exec, ..params(Level::L4, 46) };
        let raw = low | u64::from(user) << 10;
        let (r, w) = (is(low, 0), is(low, 1));
        let x = is(low, 2) || (user && mode_based_exec);
        let bad_access = (w && !r) || (x && !r && !exec_only);
        let bad_type = matches!(low >> 3, 2 | 3 | 7);
        let present = r || w || x;
        let want = present && (bad_access || bad_type);
        let got = ReservedBits::new::<Ept>(&params).check(raw, Level::L1);
        assert_eq!(got != 0, want, "{raw:#x} {params:?}");
    }
}

#[test]
fn bits_of_an_entry_that_is_not_present_are_not_looked_at() {
    let params = params(Level::L4, 46);
    let ept = ReservedBits::new::<Ept>(&params);
    let legacy = ReservedBits::new::<Legacy>(&params);
    for level in Level::ALL {
        assert_eq!(ept.check(!0b111, level), 0);
        assert_eq!(legacy.check(!1, level), 0);
    }
}
