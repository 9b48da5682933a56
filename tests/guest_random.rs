//! Random memory as tables, random machines, random accesses, against the independent model: the
//! same check that the fuzz target `guest_walk` makes, from a seed.

mod guest_support;

use guest_support::any::{Any, Compared, End, PAGES, check, plausible};
use mmu_model::Random;

const SEED: u64 = 0x9e55_0001;
const CASES: u64 = 60_000;

#[test]
fn random_tables_agree_with_the_model_in_one_dimension_and_in_two() {
    let mut random = Random::new(SEED);
    let mut counts = [0_u64; 4];
    let mut whole = 0;
    for case in 0..CASES {
        let address = match random.below(8) {
            0 => random.next_u64(),
            1..=3 => random.next_u64() >> 17,
            _ => random.below(1 << 31),
        };
        let mut any = Any {
            mode: random.below(5) as u8,
            width: 4 + random.below(17) as u8,
            machine: random.next_u64() as u16,
            nested: random.below(16) as u8,
            access: random.below(12) as u8,
            pkru: if random.chance(1, 2) { 0 } else { random.next_u64() as u32 },
            cr3: random.below(PAGES) << 12,
            nested_root: random.below(PAGES) as u8,
            address,
            words: Vec::new(),
        };
        // Few places in each page: those that the address meets, and those that tables of tables
        // meet.
        for page in 0..PAGES {
            for shift in [12, 21, 30, 39, 48] {
                let indices = [address >> shift & 511, page, (address >> shift & 1023) / 2];
                for index in indices {
                    let value = plausible(random.next_u64(), random.next_u64());
                    any.words.push(((page * 512 + index) as u16, value));
                }
            }
        }
        let end = std::panic::catch_unwind(|| check(&any));
        let (end, compared) = end.unwrap_or_else(|_| panic!("seed {SEED:#x}, case {case}"));
        counts[end as usize] += 1;
        whole += u64::from(compared == Compared::Whole);
    }
    let [reached, faulted, nested, refused] = counts;
    eprintln!(
        "CASES random tables, seed {SEED:#x}: {reached} reached, {faulted} faults, {nested} nested \
         faults, {refused} refused; {whole} compared in everything"
    );
    assert!(whole > CASES / 2, "{whole}");
    assert!(counts.iter().all(|count| *count > CASES / 200), "{counts:?}");
    assert_eq!(End::Reached as usize, 0);
}
