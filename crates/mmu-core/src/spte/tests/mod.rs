//! Tests of the entry algebra: exhaustive over flag bits where that is feasible, against a second
//! description of the formats ([`model`]) that was written from the rules and not from the code.

use alloc::vec::Vec;

use super::*;
use crate::access::Access;
use crate::addr::{Gfn, to_u64};

mod config;
mod format;
mod legal;
mod make;
mod mmio;
mod model;
mod permit;
mod random;
// The bit positions of hardware, which the small tables of loom models do not have.
#[cfg(not(loom))]
mod reserved;
mod track;

/// A configuration that is known to be valid.
#[track_caller]
fn config<F: SpteFormat>(caps: Capabilities) -> SpteConfig<F> {
    SpteConfig::new(caps).unwrap()
}

/// A test that runs for every format.
trait ForFormat {
    fn run<F: model::Rules>(&mut self);
}

fn each_format(test: &mut impl ForFormat) {
    test.run::<Ept>();
    test.run::<Npt>();
    test.run::<Legacy>();
}

/// The three A/D types, each as the capabilities that lead to it.
fn ad_variants(caps: Capabilities) -> Vec<Capabilities> {
    let mut all = Vec::new();
    for (accessed_dirty, write_protect_only) in [(true, false), (false, false), (true, true)] {
        let variant = Capabilities { accessed_dirty, write_protect_only, ..caps };
        if !caps.is_pae() || variant.ad_type() == AdType::Enabled {
            all.push(variant);
        }
    }
    all
}

/// Configurations that differ in everything that changes what an entry may look like.
fn variants<F: model::Rules>() -> Vec<SpteConfig<F>> {
    let base = F::baseline();
    let mut shapes = Vec::from([
        base,
        Capabilities { levels: 5, max_phys_bits: 52, ..base },
        Capabilities { huge_1g: false, max_phys_bits: 36, ..base },
        Capabilities { huge_1g: false, huge_2m: false, mmio_caching: false, ..base },
        Capabilities { nx_huge_pages: true, ..base },
    ]);
    if F::NAME == "EPT" {
        shapes.push(Capabilities { exec_only: false, ..base });
        shapes.push(Capabilities { mode_based_exec: true, ..base });
        shapes.push(Capabilities { mode_based_exec: true, exec_only: false, ..base });
    } else {
        shapes.push(Capabilities { nx: false, ..base });
    }
    if F::NAME == "legacy" {
        shapes.push(Capabilities { nx: false, ..Capabilities::pae() });
        shapes.push(Capabilities { nx_huge_pages: true, ..Capabilities::pae() });
    }
    shapes.into_iter().flat_map(ad_variants).map(config).collect()
}

/// Every value of the bits of `flags`, as if they stood together in a counter.
fn scatter(counter: u64, flags: &[u32]) -> u64 {
    flags
        .iter()
        .enumerate()
        .map(|(place, &flag)| ((counter >> place) & 1) << flag)
        .fold(0, |all, bit| all | bit)
}

/// Every leaf that `config` can make for `pfn` at `level`: all access sets and flags.
fn all_specs(pfn: Pfn, level: Level) -> impl Iterator<Item = LeafSpec> {
    (0u32..16 * 64).map(move |n| {
        let on = |place: u32| (n >> (4 + place)) & 1 != 0;
        LeafSpec {
            pfn,
            level,
            access: (0..4)
                .filter(|bit| (n >> bit) & 1 != 0)
                .fold(Access::empty(), |all, bit| all | Access::from_bits_truncate(1 << bit)),
            host_writable: on(0),
            map_writable: on(1),
            mmu_writable: on(2),
            accessed: on(3),
            memory_type: on(4).then_some(MemType::WB),
            host_mmio: on(5),
        }
    })
}
