//! The `lru_gen` text form (KVM rows 5.36, 5.37): page ages per VM as the kernel's debugfs files
//! print them, so that what reads those reads these.
//!
//! Differences that a reader sees: a VM stands where a memcg does; both kinds share one oldest
//! generation; of the four tiers the last two stay empty; averages are not kept apart from counts.

use core::fmt::{self, Write};

use crate::figures::Figures;
use crate::r#gen::Seq;
use crate::kind::{Kind, Tier};
use crate::refault::{RefaultCounts, Refaults};
use crate::table::AgeTable;
use crate::workingset::Histogram;

/// Tiers of the text form.
const TEXT_TIERS: u64 = 4;

/// One VM to print.
#[derive(Clone, Copy, Debug)]
pub struct VmView<'a> {
    /// The number that commands name it by.
    pub id: u32,
    /// Its name, where upstream prints the path of the memcg.
    pub path: &'a str,
    /// The NUMA node.
    pub node: u32,
    /// Its pages.
    pub table: &'a AgeTable,
    /// Its refaults, for the full form.
    pub refaults: Option<&'a Refaults>,
}

/// Head and one line per generation, oldest first: number, age in milliseconds, anonymous pages,
/// file pages.
///
/// # Errors
/// Those of `out`.
pub fn write_lru_gen(out: &mut impl Write, vm: &VmView<'_>, now_ms: u64) -> fmt::Result {
    write_head(out, vm)?;
    let histogram = Histogram::of(vm.table, now_ms);
    histogram.bins().try_for_each(|bin| {
        let [anon, file] = Kind::ALL.map(|kind| bin.pages_of(kind));
        write_generation(out, bin.seq, bin.age_ms, anon, file)
    })
}

/// The same with four lines of tiers and one line of what the generation's pass counted: pages
/// seen (`T`), used (`Y`), tables that a filter named (`F`), tables written down for the next pass
/// (`A`). Refaults, evictions and protected pages stand with the oldest generation, and with the
/// youngest as refaults and total.
///
/// # Errors
/// Those of `out`.
pub fn write_lru_gen_full(out: &mut impl Write, vm: &VmView<'_>, now_ms: u64) -> fmt::Result {
    write_head(out, vm)?;
    let histogram = Histogram::of(vm.table, now_ms);
    let window = histogram.window();
    for bin in histogram.bins() {
        let [anon, file] = Kind::ALL.map(|kind| bin.pages_of(kind));
        write_generation(out, bin.seq, bin.age_ms, anon, file)?;
        for tier in 0..TEXT_TIERS {
            write!(out, "            {tier:10}")?;
            for kind in Kind::ALL {
                let counts = counts(vm.refaults, kind, tier);
                let total = counts.evicted.saturating_add(counts.protected);
                if bin.seq == window.max_seq() {
                    write!(out, " {:10}R {total:10}T {:10}x", counts.refaulted, 0)?;
                } else if bin.seq == window.min_seq() {
                    let RefaultCounts { refaulted, evicted, protected } = counts;
                    write!(out, " {refaulted:10}r {evicted:10}e {protected:10}p")?;
                } else {
                    write!(out, " {:10}x {:10}x {:10}x", 0, 0, 0)?;
                }
            }
            out.write_char('\n')?;
        }
        let Figures { mapped, young, found, dense, .. } = vm.table.figures(bin.generation());
        // The open generation has no pass yet; upstream marks numbers that mean nothing with x.
        let marks = if bin.seq == window.max_seq() { ['x'; 4] } else { ['T', 'Y', 'F', 'A'] };
        write!(out, "                      ")?;
        for (number, mark) in [mapped, young, found, dense].into_iter().zip(marks) {
            write!(out, " {number:10}{mark}")?;
        }
        out.write_char('\n')?;
    }
    Ok(())
}

fn write_head(out: &mut impl Write, vm: &VmView<'_>) -> fmt::Result {
    writeln!(out, "memcg {:5} {}", vm.id, vm.path)?;
    writeln!(out, " node {:5}", vm.node)
}

fn write_generation(
    out: &mut impl Write,
    seq: Seq,
    age_ms: u64,
    anon: u64,
    file: u64,
) -> fmt::Result {
    writeln!(out, " {:10} {age_ms:10} {anon:10}  {file:10} ", seq.get())
}

fn counts(refaults: Option<&Refaults>, kind: Kind, tier: u64) -> RefaultCounts {
    let tier = Tier::ALL.into_iter().find(|known| known.number() == tier);
    let counts = refaults.zip(tier).map(|(refaults, tier)| refaults.counts(kind, tier));
    counts.unwrap_or_default()
}

/// The switches of `/sys/kernel/mm/lru_gen/enabled` (row 5.37): what the aging of a VM may use.
/// What it can use is the MMU's to say ([`Participation`](crate::Participation)). They take effect
/// through [`PassOptions::within`](crate::PassOptions::within).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switches(u8);

impl Switches {
    /// Generations at all.
    pub const CORE: Self = Self(0x1);
    /// Passes over the MMU's tables.
    pub const WALK: Self = Self(0x2);
    /// Accessed bits of upper entries.
    pub const NONLEAF: Self = Self(0x4);
    /// All of them.
    pub const ALL: Self = Self(0x7);
    /// None.
    pub const NONE: Self = Self(0);

    /// Both sets.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Is every switch of `other` on?
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What a user wrote: a word that starts with `y` or `Y` (all), `n` or `N` (none), or a number,
    /// also in the form `0x7`. Bits that are not switches are ignored.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.trim_ascii();
        match word.chars().next()? {
            'y' | 'Y' => return Some(Self::ALL),
            'n' | 'N' => return Some(Self::NONE),
            _ => {}
        }
        let hex = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X"));
        let number = match hex {
            Some(digits) => u32::from_str_radix(digits, 16).ok()?,
            None => word.parse().ok()?,
        };
        u8::try_from(number & u32::from(Self::ALL.0)).ok().map(Self)
    }
}

impl fmt::Display for Switches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}
