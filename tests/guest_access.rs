//! Guest walks against the independent model on whole spaces of cases, modelled on the case space
//! of kvm-unit-tests' access test: every combination of the bits of the two last entries, of the
//! access, of the control registers. Compared: fault or not, every bit of the error code, the
//! address, what the entries permit together, which entries were read in which order, which were
//! changed in which order, and to what.
//!
//! The counts are asserted: a space that shrinks by mistake is noticed. `GUEST_WALK_CASES=long`,
//! which `cargo xtask long` sets, multiplies the main space by vendors, address widths and SMAP
//! (more than 500 million cases).

mod guest_support;
#[path = "common/skip.rs"]
mod skip;

use std::time::Instant;

use guest_support::chain::{Pair, asked, table};
use guest_support::{A, D, EVERYBODY, KERNEL, KINDS, LINK, NX, P, PS, U, W, machine};
use mmu_model::{GuestMachine, GuestMode, Vendor, Who};

const LONG4: u64 = 0xffff_8123_4567_8abc;
const LONG5: u64 = 0xff12_3456_789a_bcde;
const LOW: u64 = 0x1234_5678;
/// Where leaves lead, in all formats: aligned for 1 GiB.
const PAGE: u64 = 0x4000_0000;

/// Bits that say nothing about a translation: caching, and those left to software.
const fn ignored(machine: &GuestMachine) -> u64 {
    match machine.mode {
        GuestMode::TwoLevel | GuestMode::Pae => 0xe18,
        _ => 0x07f0_0000_0000_0e18,
    }
}

/// All subsets of `flags`, each alone and with one of `singles`.
fn entries(flags: &[u64], singles: &[u64]) -> Vec<u64> {
    let subsets = 0..1_u64 << flags.len();
    let subsets = subsets.map(|set| {
        let chosen = flags.iter().enumerate().filter(|(bit, _)| set >> bit & 1 != 0);
        chosen.map(|(_, flag)| flag).sum::<u64>()
    });
    subsets
        .flat_map(|value| {
            let single = singles.iter().map(move |single| value | single);
            std::iter::once(value).chain(single)
        })
        .collect()
}

/// Reserved bits to try in a format.
fn reserved(machine: &GuestMachine) -> Vec<u64> {
    let bits: &[u8] = match machine.mode {
        GuestMode::Pae if machine.max_phys_bits == 36 => &[62, 36],
        GuestMode::Pae => &[62],
        _ => &[51, 36],
    };
    let high = bits.iter().filter(|bit| **bit >= machine.max_phys_bits);
    high.map(|bit| 1 << bit).collect()
}

/// The two last entries in every combination with at most one reserved bit between them.
struct LastTwo {
    pdes: Vec<u64>,
    ptes: Vec<u64>,
    reserved: u64,
    ignored: u64,
}

impl LastTwo {
    fn new(machine: &GuestMachine) -> Self {
        let high = reserved(machine);
        let mut large = high.clone();
        large.push(1 << 13);
        let pdes = entries(&[P, W, U, A, D, PS, NX], &large);
        // Bit 13 of an entry that leads to a table is an address bit.
        let pdes = pdes.into_iter().filter(|pde| pde & PS != 0 || pde & 1 << 13 == 0).collect();
        let ptes = entries(&[P, W, U, A, D, NX], &high);
        let unless_nxe = if machine.nxe { 0 } else { NX };
        let reserved = high.iter().sum::<u64>() | 1 << 13 | unless_nxe;
        Self { pdes, ptes, reserved, ignored: ignored(machine) }
    }

    /// Call `each` with every combination. `noise` goes into bits that are ignored.
    #[inline]
    fn each(&self, mut each: impl FnMut(u64, u64)) {
        let mut noise = 0_u64;
        for pde in &self.pdes {
            let rejected = (pde & self.reserved).count_ones();
            let leads = if pde & PS != 0 { PAGE } else { table(1) };
            for pte in &self.ptes {
                if rejected + (pte & self.reserved).count_ones() > 1 {
                    continue;
                }
                noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767);
                each(pde | leads | noise & self.ignored, pte | PAGE | noise << 1 & self.ignored);
            }
        }
    }
}

/// Every setting of some control registers.
fn settings(base: GuestMachine, flags: usize) -> impl Iterator<Item = GuestMachine> {
    (0..1_u32 << flags).map(move |bits| GuestMachine {
        nxe: bits & 1 != 0,
        wp: bits & 2 != 0,
        smep: bits & 4 != 0,
        ..base
    })
}

/// What a space came to.
#[derive(Clone, Copy, Default)]
struct Count {
    cases: u64,
    again: u64,
    reached: u64,
}

impl Count {
    fn add(&mut self, pair: &Pair) {
        self.cases += pair.cases;
        self.again += pair.again;
        self.reached += pair.reached;
    }

    fn print(&self, name: &str, begun: Instant) {
        eprintln!(
            "CASES {name}: {} compared, and {} second accesses; {} reached a page; {:.1} s",
            self.cases,
            self.again,
            self.reached,
            begun.elapsed().as_secs_f64()
        );
        assert!(self.reached > self.cases / 100, "{name}: next to nothing is permitted");
    }
}

/// The access test's own space: P, W, U, A, D, NX and reserved bits of the two last entries, PS, W
/// of the third, keys, read, write, fetch, user or not, NXE, WP, SMEP, PKE. Upper entries have
/// accessed bits clear.
fn access_space(base: GuestMachine, address: u64) -> Count {
    let mut count = Count::default();
    for machine in settings(base, 3) {
        for pke in [false, true] {
            let machine = GuestMachine { pke, ..machine };
            access_setting(machine, address, &mut count);
        }
    }
    count
}

fn access_setting(machine: GuestMachine, address: u64, count: &mut Count) {
    let last = LastTwo::new(&machine);
    let mut pair = Pair::new(machine, address);
    for level in 4..=machine.first_level() {
        pair.chain.set(level, LINK | table(level - 1));
    }
    // A and D of the other keys are set, and must not matter.
    let rights: &[u32] = if machine.pke { &[0, 1, 2, 3] } else { &[0] };
    for who in [Who::User, KERNEL] {
        for kind in KINDS {
            for rights in rights {
                let pkru = 0xffff_ffc0 | rights << 2;
                let (access, request) = asked(&machine, kind, who, pkru & !0b11);
                for key in [0, 1 << 59] {
                    for writable in [0, W] {
                        let pdpte = P | U | writable | table(2);
                        last.each(|pde, pte| {
                            for level in 4..=machine.first_level() {
                                pair.chain.set(level, LINK | table(level - 1));
                            }
                            pair.chain.set(3, pdpte);
                            pair.chain.set(2, pde | key);
                            pair.chain.set(1, pte | key);
                            pair.compare(access, request);
                        });
                    }
                }
            }
        }
    }
    count.add(&pair);
}

/// 19,169,280 for widths of 37 to 51 bits: 39 ways to place NX and at most one reserved bit, P, W,
/// U, A and D of two entries, W of a third, 3 operations, 2 privileges, WP, SMEP, and 10 for keys.
const ACCESS_CASES: u64 = 39 * (1 << 10) * 2 * 3 * 2 * 2 * 2 * 10;

/// Ways to place NX and at most one reserved bit in the two last entries: 1, 39, 59 or 19 by the
/// number of reserved bits that the width leaves.
const fn ways(machine: &GuestMachine) -> u64 {
    match (machine.mode, machine.max_phys_bits) {
        (GuestMode::Pae, 36) | (_, ..=36) => 59,
        (GuestMode::Pae, _) | (_, ..=51) => 39,
        _ => 19,
    }
}

#[test]
fn the_access_space_of_four_levels_agrees_with_the_model() {
    let begun = Instant::now();
    let count = access_space(machine(GuestMode::FourLevel), LONG4);
    count.print("access, 4 levels", begun);
    assert_eq!(count.cases, ACCESS_CASES);
}

#[test]
fn the_access_space_of_five_levels_agrees_with_the_model() {
    let begun = Instant::now();
    let vendor = Vendor::Amd;
    let amd = GuestMachine { max_phys_bits: 39, vendor, ..machine(GuestMode::FiveLevel) };
    let count = access_space(amd, LONG5);
    count.print("access, 5 levels", begun);
    assert_eq!(count.cases, ACCESS_CASES);
}

/// The two last entries for every privilege, with SMAP on.
fn smap_space(base: GuestMachine, address: u64, count: &mut Count) {
    for machine in settings(GuestMachine { smap: true, ..base }, 3) {
        let last = LastTwo::new(&machine);
        let mut pair = Pair::new(machine, address);
        for who in EVERYBODY {
            for kind in KINDS {
                let (access, request) = asked(&machine, kind, who, 0);
                last.each(|pde, pte| {
                    for level in 3..=machine.first_level() {
                        pair.chain.set(level, LINK | A | table(level - 1));
                    }
                    pair.chain.set(2, pde);
                    pair.chain.set(1, pte);
                    pair.compare(access, request);
                });
            }
        }
        count.add(&pair);
    }
}

#[test]
fn smap_agrees_with_the_model_for_every_privilege_and_address_width() {
    let begun = Instant::now();
    let mut count = Count::default();
    let mut expected = 0;
    for (max_phys_bits, vendor) in
        [(36, Vendor::Intel), (39, Vendor::Amd), (46, Vendor::Intel), (52, Vendor::Amd)]
    {
        let base = GuestMachine { max_phys_bits, vendor, ..machine(GuestMode::FourLevel) };
        smap_space(base, LONG4, &mut count);
        // A, D, P, W, U of both entries; WP, SMEP; 3 operations, 4 privileges.
        expected += ways(&base) * (1 << 10) * 4 * 12;
    }
    count.print("SMAP, AC and implicit accesses", begun);
    assert_eq!(count.cases, expected);
    assert_eq!(expected, 7_667_712);
}

/// The two entries that decide about a page of 1 GiB.
fn gigabyte_space(base: GuestMachine, address: u64, count: &mut Count) {
    let pml4es = entries(&[P, W, U, NX], &[PS, 1 << 8, 1 << 51, 1 << 36]);
    let pdptes = entries(&[P, W, U, A, D, PS, NX], &[1 << 12, 1 << 13, 1 << 29, 1 << 51]);
    for machine in settings(base, 2) {
        let mut pair = Pair::new(machine, address);
        for who in [Who::User, KERNEL] {
            for kind in KINDS {
                let (access, request) = asked(&machine, kind, who, 0);
                for pml4e in &pml4es {
                    for pdpte in &pdptes {
                        let leads =
                            if pdpte & PS != 0 { PAGE } else { table(2) & !(pdpte & 0x3000) };
                        pair.chain.set(5, LINK | table(4));
                        pair.chain.set(4, pml4e | table(3));
                        pair.chain.set(3, pdpte | leads);
                        pair.chain.set(2, LINK | table(1));
                        pair.chain.set(1, LINK | PAGE);
                        pair.compare(access, request);
                    }
                }
            }
        }
        count.add(&pair);
    }
}

#[test]
fn pages_of_1_gib_agree_with_the_model_where_they_exist_and_where_not() {
    let begun = Instant::now();
    let mut count = Count::default();
    for gbpages in [false, true] {
        for (vendor, max_phys_bits) in [(Vendor::Intel, 36), (Vendor::Amd, 46), (Vendor::Intel, 52)]
        {
            for (mode, address) in [(GuestMode::FourLevel, LONG4), (GuestMode::FiveLevel, LONG5)] {
                let base = GuestMachine { vendor, max_phys_bits, gbpages, ..machine(mode) };
                gigabyte_space(base, address, &mut count);
            }
        }
    }
    count.print("1 GiB", begun);
    assert_eq!(count.cases, 2 * 3 * 2 * 4 * 6 * (16 * 5) * (128 * 5));
}

#[test]
fn thirty_two_bit_paging_agrees_with_the_model() {
    let begun = Instant::now();
    let mut count = Count::default();
    let pdes = entries(&[P, W, U, A, D, PS], &[1 << 13, 1 << 16, 1 << 17, 1 << 20, 1 << 21]);
    let ptes = entries(&[P, W, U, A, D], &[]);
    for (pse, pse36, max_phys_bits) in
        [(false, true, 36), (true, false, 40), (true, true, 32), (true, true, 36), (true, true, 46)]
    {
        for smap in [false, true] {
            let base = machine(GuestMode::TwoLevel);
            let base = GuestMachine { pse, pse36, max_phys_bits, smap, ..base };
            for machine in settings(base, 3) {
                let mut pair = Pair::new(machine, LOW);
                for who in EVERYBODY {
                    for kind in KINDS {
                        // Keys do not exist here, whatever PKRU says.
                        let (access, request) = asked(&machine, kind, who, u32::MAX);
                        for pde in &pdes {
                            let small = pde & PS == 0 || !pse;
                            let leads = if small { table(1) & !(pde & 0x3f_2000) } else { PAGE };
                            for pte in &ptes {
                                pair.chain.set(2, pde | leads);
                                pair.chain.set(1, pte | 0xdead_b000);
                                pair.compare(access, request);
                            }
                        }
                    }
                }
                count.add(&pair);
            }
        }
    }
    count.print("32-bit", begun);
    assert_eq!(count.cases, 5 * 2 * 8 * 12 * (64 * 6) * 32);
}

#[test]
fn pae_agrees_with_the_model() {
    let begun = Instant::now();
    let mut count = Count::default();
    let mut expected = 0;
    for max_phys_bits in [36, 52] {
        for smap in [false, true] {
            let base = machine(GuestMode::Pae);
            let base = GuestMachine { max_phys_bits, smap, ..base };
            for machine in settings(base, 3) {
                let last = LastTwo::new(&machine);
                let mut pair = Pair::new(machine, LOW);
                for who in EVERYBODY {
                    for kind in KINDS {
                        let (access, request) = asked(&machine, kind, who, u32::MAX);
                        last.each(|pde, pte| {
                            pair.chain.set(2, pde);
                            pair.chain.set(1, pte);
                            pair.compare(access, request);
                        });
                    }
                }
                count.add(&pair);
            }
            expected += ways(&base) * (1 << 10) * 4 * 12;
        }
    }
    count.print("PAE", begun);
    assert_eq!(count.cases, expected);
    assert_eq!(expected, 9_633_792);
}

/// A walk in which nothing is wrong, to a leaf of each size, with each bit of each entry the other
/// way.
fn one_bit_each(pair: &mut Pair, leaves: u8, bits: u32) {
    let machine = pair.machine;
    for leaf in 1..=leaves {
        for changed in leaf..=machine.first_level() {
            for bit in 0..bits {
                for kind in KINDS {
                    for who in [Who::User, KERNEL] {
                        let (access, request) = asked(&machine, kind, who, 0);
                        for level in leaf..=machine.first_level() {
                            let large = if level > 1 { PS } else { 0 };
                            let leads = if level > leaf { table(level - 1) } else { PAGE | large };
                            let flipped = if level == changed { 1 << bit } else { 0 };
                            pair.chain.set(level, (LINK | leads) ^ flipped);
                        }
                        pair.compare(access, request);
                    }
                }
            }
        }
    }
}

#[test]
fn every_bit_of_a_guest_entry_agrees_with_the_model() {
    let begun = Instant::now();
    let mut count = Count::default();
    let modes = [
        (GuestMode::TwoLevel, LOW, 2, 32),
        (GuestMode::Pae, LOW, 2, 64),
        (GuestMode::FourLevel, LONG4, 3, 64),
        (GuestMode::FiveLevel, LONG5, 3, 64),
    ];
    for (mode, address, leaves, bits) in modes {
        for max_phys_bits in 32..=52 {
            for vendor in [Vendor::Intel, Vendor::Amd] {
                for flags in 0..16 {
                    let machine = GuestMachine {
                        max_phys_bits,
                        vendor,
                        nxe: flags & 1 != 0,
                        pse: flags & 2 != 0,
                        pse36: flags & 4 != 0,
                        gbpages: flags & 8 != 0,
                        ..machine(mode)
                    };
                    let mut pair = Pair::new(machine, address);
                    one_bit_each(&mut pair, leaves, bits);
                    count.add(&pair);
                }
            }
        }
    }
    count.print("bits of guest entries", begun);
    // Entries on the way to leaves of every size, by mode; widths, vendors, flags; 6 accesses.
    let entries = (2 + 1) * 32 + (2 + 1) * 64 + (4 + 3 + 2) * 64 + (5 + 4 + 3) * 64;
    assert_eq!(count.cases, entries * 21 * 2 * 16 * 6);
}

/// Both modes, both vendors, SMAP or not, four widths with 59, 39, 39 and 19 ways.
const LONG_CASES: u64 = ACCESS_CASES / 39 * 156 * 8;

#[test]
fn half_a_billion_cases_agree_when_asked_for() {
    let name = "half_a_billion_cases_agree_when_asked_for";
    if std::env::var("GUEST_WALK_CASES").as_deref() != Ok("long") {
        let cases = format_args!("{LONG_CASES} cases");
        skip::aloud("GUEST_WALK_CASES is not `long`", name, cases);
        return;
    }
    let begun = Instant::now();
    let mut count = Count::default();
    for (mode, address) in [(GuestMode::FourLevel, LONG4), (GuestMode::FiveLevel, LONG5)] {
        for vendor in [Vendor::Intel, Vendor::Amd] {
            for max_phys_bits in [36, 39, 46, 52] {
                for smap in [false, true] {
                    let base = GuestMachine { vendor, max_phys_bits, smap, ..machine(mode) };
                    let more = access_space(base, address);
                    count.cases += more.cases;
                    count.again += more.again;
                    count.reached += more.reached;
                    println!("{} of {LONG_CASES} cases", count.cases);
                }
            }
        }
    }
    count.print("access, long", begun);
    assert_eq!(count.cases, LONG_CASES);
}
