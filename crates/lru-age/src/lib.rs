//! Generational aging of guest memory: which pages of a VM are cold, and how cold.
//!
//! Principles:
//!
//! 1. **Ask about tables, not pages.** An MMU answers 512 pages with two masks
//!    ([`AgeSink`](mmu_core::traits::AgeSink)); they are taken in 64 pages at a time. A table that
//!    nobody used costs one word.
//! 2. **Pay for what was used, not for what is mapped.** A page that stays cold is never rewritten,
//!    not even when its generation is folded into the next. A 2 MiB leaf is one word.
//! 3. **Count exactly.** The pages of every generation are known at any time and equal a recount
//!    ([`AgeTable::check`]).
//! 4. **One hand writes, anybody reads.** A pass holds the table's one editor, so its stores are
//!    plain; histograms and victims are read beside it without a lock.
//! 5. **Never guess a page colder than it is.** A lost race, an entry that changed, a label that
//!    was reused: all count as young. Victims are checked again before they go.
//! 6. **Nothing fails half-way.** Memory is allocated when a range is added; a pass needs none.
//!
//! The pieces:
//!
//! - [`AgeTable`] keeps 4 bits per page, [`GenWindow`] says which generations exist.
//! - [`AgePass`] walks an MMU in slices and opens a generation; [`Scan`] lets it leave out what was
//!   not worth a look, [`ScanPlan`] lets several threads ask for it.
//! - [`candidates`], [`cold_blocks`] and [`cold_ranges`] list what is old.
//!   [`AgeEditor::evict`] takes it away: checked once more, with a look-around, by an
//!   [`EvictPolicy`]. [`Refaults`] knows what came back, and how soon.
//! - [`Histogram`] is the VM's page ages, [`WorkingSet`] what it uses, with an error bound;
//!   [`write_lru_gen`] and [`run`] speak the kernel's text form.
//! - [`Fleet`] gives turns to many VMs. [`IdleBitmap`] and [`RegionSampler`] serve who wants
//!   accessed bits without generations.
//!
//! The MMU is any [`AgeRange`](mmu_core::traits::AgeRange); how it takes part is its own to say at
//! run time ([`Participation`]). The standard is KVM's multi-generational LRU over a secondary MMU,
//! rows 5.19 to 5.41 of its behaviour.
//!
//! Memory is allocated where something is built: 0.52 bytes per 4 KiB page of a range, 8 KiB for
//! filters, 8 bytes per remembered eviction, 1 bit per page of an idle bitmap. There are no
//! floating point numbers.
//!
//! # Example
//!
//! ```
//! use std::cell::RefCell;
//!
//! use lru_age::{AgePass, AgeTable, Histogram, Recheck, candidates};
//! use mmu_core::addr::{Gfn, GfnRange};
//! use mmu_core::traits::{AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink};
//!
//! /// 512 mapped pages; one accessed bit each.
//! struct VecMmu {
//!     young: RefCell<[u64; 8]>,
//! }
//!
//! impl AgeRange for VecMmu {
//!     type Reader = ();
//!
//!     fn age<S: AgeSink>(&self, _: &mut (), request: AgeRequest, sink: &mut S) -> AgeReport {
//!         let mut report = AgeReport::empty(request.range.end);
//!         let (mut present, mut young) = ([0; 8], [0; 8]);
//!         for page in request.range.start.get()..request.range.end.get() {
//!             let (word, bit) = (page as usize / 64, 1 << (page % 64));
//!             present[word] |= bit;
//!             young[word] |= self.young.borrow()[word] & bit;
//!             report.mapped += 1;
//!             report.entries += 1;
//!         }
//!         report.young = young.iter().map(|word| u64::from(word.count_ones())).sum();
//!         if request.mode != AgeMode::Test {
//!             self.young.borrow_mut().iter_mut().zip(young).for_each(|(all, seen)| *all &= !seen);
//!         }
//!         sink.table(Gfn::new(0), &present, &young);
//!         report
//!     }
//!
//!     fn abilities(&self) -> AgeAbilities {
//!         AgeAbilities::FAST
//!     }
//!
//!     fn flush_aged(&self, _: &mut (), _: GfnRange) {
//!         // No cache, nothing to flush.
//!     }
//! }
//!
//! let mmu = VecMmu { young: RefCell::new([0; 8]) };
//! let mut table = AgeTable::new(0);
//! table.add_range(GfnRange::from_len(Gfn::new(0), 512))?;
//!
//! // The guest uses page 7 all the time and nothing else.
//! for second in 1..=4_u64 {
//!     mmu.young.borrow_mut()[0] |= 1 << 7;
//!     let mut pass = AgePass::start(&table, AgeMode::Clear)?;
//!     while pass.step(&mmu, &mut (), 1024).next.is_some() {}
//!     let report = pass.finish(second * 1000);
//!     assert_eq!((report.counts.mapped, report.counts.young), (512, 1));
//! }
//!
//! let histogram = Histogram::of(&table, 4500);
//! assert_eq!((histogram.pages(), histogram.active_pages()), (512, 1));
//!
//! // Coldest first; asked again, since the guest went on meanwhile.
//! mmu.young.borrow_mut()[0] |= 1 << 3;
//! let cold: Vec<u64> = candidates(&table)
//!     .filter(|victim| victim.recheck(&mmu, &mut ()) == Recheck::Cold)
//!     .map(|victim| victim.range.start.get())
//!     .take(5)
//!     .collect();
//! assert_eq!(cold, [0, 1, 2, 4, 5]);
//! # Ok::<(), lru_age::AgeError>(())
//! ```

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod cold;
mod command;
mod editor;
mod error;
mod estimate;
mod evict;
mod figures;
mod filter;
mod fleet;
mod r#gen;
mod harvest;
mod idle;
mod index;
mod kind;
mod lookaround;
mod observer;
mod pass;
mod policy;
mod random;
mod reclaim;
mod refault;
mod region;
mod runs;
mod sampler;
mod summary;
mod table;
mod text;
mod word;
mod workingset;

pub use cold::{ColdRanges, cold_ranges};
pub use command::{Command, CommandError, Commander, VmNode, parse, run, run_aging, run_eviction};
pub use editor::{AgeEditor, Arrival, Promotion};
pub use error::{AgeError, Inconsistency};
pub use estimate::{SampledWorkingSet, WorkingSet};
pub use evict::{
    Candidate, Candidates, ColdBlocks, Recheck, candidates, candidates_of, cold_blocks,
    cold_blocks_of,
};
pub use fleet::{Fleet, FleetVm, Outcome, Turn};
pub use r#gen::{ACTIVE_GENS, GenWindow, Generation, MAX_NR_GENS, MIN_NR_GENS, Seq};
pub use harvest::{Harvest, ScanPlan};
pub use idle::IdleBitmap;
pub use kind::{Kind, Tier};
pub use lookaround::{
    LookAround, LookOptions, Participation, WINDOW_PAGES, is_dense, window_around,
};
pub use pass::{
    AgePass, PassCounts, PassOptions, PassProgress, PassReport, PausedPass, Scan, SlowMmu,
};
pub use policy::{EvictPolicy, POLICY_BATCH, PidPolicy, Plain, Swappiness};
pub use reclaim::{EvictEnd, EvictOptions, EvictReport, Take, Unit};
pub use refault::{Refault, RefaultCounts, Refaults};
pub use runs::{Heard, Unheard};
pub use sampler::{RegionSampler, SampledRegion, SamplerLimits};
pub use table::{AgeTable, PageAge};
pub use text::{Switches, VmView, write_lru_gen, write_lru_gen_full};
pub use workingset::{Bin, Histogram};
