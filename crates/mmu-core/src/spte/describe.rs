//! An entry in words, for dumps and messages.
//!
//! Owns [`Described`], which reads the layout tables of `format`: what a bit is called is said once
//! (KVM row 1.33 asks for a dump of the path to an entry that hardware rejected). No ordering.

use core::fmt;

use super::bits::{FRAME, lowest};
use super::format::{Fields, SpteFormat};
use super::{Spte, SpteConfig, SpteKind};
use crate::addr::Level;

/// An entry at a level, ready to print: class, frame or gfn, and the name of every field that is
/// not 0.
#[derive(Clone, Copy, Debug)]
pub struct Described<'c, F: SpteFormat> {
    config: &'c SpteConfig<F>,
    spte: Spte,
    level: Level,
}

impl<F: SpteFormat> SpteConfig<F> {
    /// `spte` at `level` in words.
    #[must_use]
    pub const fn describe(&self, spte: Spte, level: Level) -> Described<'_, F> {
        Described { config: self, spte, level }
    }
}

impl<F: SpteFormat> fmt::Display for Described<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config, spte, level } = *self;
        match config.kind(spte, level) {
            SpteKind::Empty => f.write_str("empty"),
            SpteKind::Frozen => f.write_str("frozen"),
            SpteKind::Mmio => {
                let gfn = config.mmio_gfn(spte).unwrap_or_default();
                let generation = config.mmio_generation(spte).unwrap_or_default();
                write!(f, "mmio gfn {gfn} generation {generation}")
            }
            SpteKind::Table => {
                write!(f, "table {}", config.pfn(spte))?;
                fields(f, spte, F::TABLE)
            }
            SpteKind::Leaf => {
                write!(f, "leaf {level} {}", config.pfn(spte))?;
                let tracked = config.is_access_tracked(spte);
                fields(f, spte, if tracked { F::TRACKED_LEAF } else { F::LEAF })
            }
            SpteKind::Corrupt => write!(f, "corrupt {spte:#x}"),
        }
    }
}

/// The name of each field that is not 0, with its value if it is wider than a bit, and the bits
/// that no field claims.
fn fields(f: &mut fmt::Formatter<'_>, spte: Spte, fields: Fields) -> fmt::Result {
    let mut unclaimed = spte.raw() & !FRAME;
    for &(name, mask) in fields {
        let value = spte.raw() & mask;
        unclaimed &= !mask;
        if mask == FRAME || mask == Spte::MMU_PRESENT || value == 0 {
            continue;
        }
        if mask.is_power_of_two() {
            write!(f, " {name}")?;
        } else {
            write!(f, " {name}={}", value >> lowest(mask))?;
        }
    }
    if unclaimed == 0 { Ok(()) } else { write!(f, " unknown={unclaimed:#x}") }
}
