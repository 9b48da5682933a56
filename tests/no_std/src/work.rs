//! The crates at work. Each function is one piece; an error names what did not hold.

use alloc::vec::Vec;

use mmu_core::access::{Access, EptViolation, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Level};

use lru_age as _;
use shadow_mmu as _;
use tdp_mmu as _;

type Checked = Result<u32, &'static str>;

fn ensure(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(what) }
}

/// Everything; the number of checks that held.
pub(crate) fn all() -> Checked {
    Ok(addresses()? + faults()?)
}

/// Address arithmetic, and the heap by way of a `Vec`.
fn addresses() -> Checked {
    let range = GfnRange::from_len(Gfn::new(0x1ff), 1024);
    let blocks: Vec<Gfn> = (range.start.get()..range.end.get())
        .map(Gfn::new)
        .filter(|gfn| gfn.is_aligned(Level::L2))
        .collect();
    ensure(blocks == [Gfn::new(0x200), Gfn::new(0x400)], "2M boundaries of a range")?;
    ensure(Gfn::containing(Gpa::new(0x12_3456)).get() == 0x123, "page of an address")?;
    Ok(2)
}

/// Decoding of what hardware reports.
fn faults() -> Checked {
    let code = EptViolation::from_bits_retain(0x18a).to_error_code();
    ensure(code.access() == Access::WRITE, "access of an EPT violation")?;
    ensure(code.contains(PfErrorCode::PRESENT), "presence of an EPT violation")?;
    Ok(2)
}
