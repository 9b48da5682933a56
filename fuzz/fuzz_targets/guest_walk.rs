//! Any memory as a guest's tables, under any processor and any access, in one dimension and in two:
//! the walk ends, and ends as the independent model says, with the same reads and the same changes.

#![no_main]

#[path = "../../tests/guest_support/mod.rs"]
mod guest_support;

use arbitrary::Arbitrary;
use guest_support::any::{Any, check, plausible};
use libfuzzer_sys::fuzz_target;

/// Words of memory that an input sets at most.
const WORDS: usize = 256;

#[derive(Arbitrary, Debug)]
struct Input {
    mode: u8,
    width: u8,
    machine: u16,
    nested: u8,
    access: u8,
    pkru: u32,
    cr3: u16,
    cr3_high: u32,
    nested_root: u8,
    /// Shifted right by `address_shift`: short addresses meet tables sooner.
    address: u64,
    address_shift: u8,
    /// Page and table entry; or, with the top bit of the choice, the entry that the address meets
    /// at one level of that page.
    words: Vec<(u16, u8, u64)>,
}

fuzz_target!(|input: Input| {
    let address = input.address >> (input.address_shift & 63);
    let words = input.words.iter().take(WORDS).map(|(number, choice, value)| {
        let level = u32::from(choice >> 4 & 7) % 5;
        let number = if choice & 0x80 != 0 {
            let index = address >> (12 + 9 * level) & 511;
            (number & !511) | index as u16
        } else {
            *number
        };
        (number, plausible(*value, u64::from(choice & 15)))
    });
    check(&Any {
        mode: input.mode,
        width: input.width,
        machine: input.machine,
        nested: input.nested,
        access: input.access,
        pkru: input.pkru,
        // Mostly a page that is there.
        cr3: (u64::from(input.cr3) & 0xffff) | (u64::from(input.cr3_high) << 32 & !0xff_ffff_ffff),
        nested_root: input.nested_root,
        address,
        words: words.collect(),
    });
});
