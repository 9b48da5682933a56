//! An MMU that finds the mappings of a gfn by a list of its aliases, as shadow paging does: the
//! proof that [`AgeRange`] can be implemented over reverse maps, without the MMU lock.
//!
//! Owns [`AliasMmu`]. Entries stand in shadow pages, in any place; each gfn has a chain of
//! descriptors that name the entries which map it, under a lock bit in the chain's head. Who maps
//! and unmaps holds the MMU lock; who ages takes the lock bit only (KVM rows 5.6, R14 to R16). What
//! is freed is poisoned, so whoever still reads it is found out.
//!
//! Shared by the behaviour suite of the root package and by the loom models of this one.

#![allow(dead_code, reason = "each user takes its own part")]

use std::sync::Mutex;

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn, to_index, to_u64};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Capabilities, LeafSpec, Legacy, Spte, SpteConfig};
use mmu_core::sync::{AtomicU64, Ordering, relax};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Effort, MASK_WORDS,
};

/// Set in the head of a chain while somebody holds it.
const HELD: u64 = 1;
/// What a freed descriptor names.
const POISON: u64 = u64::MAX;
/// Aliases in a descriptor.
const SLOTS: usize = 2;
/// gfns that one answer covers.
const TABLE: u64 = 512;

/// Names up to [`SLOTS`] entries, by index + 1; 0 where there is none. Protected by the lock bit of
/// the chain it is in; free, by the MMU lock.
struct Desc {
    entries: [AtomicU64; SLOTS],
    /// Index + 1 of the next one.
    next: AtomicU64,
}

/// What only the holder of the MMU lock may touch.
struct Free {
    descs: Vec<usize>,
    cells: Vec<usize>,
    /// Pages mapped, over all chains.
    mapped: u64,
}

/// Where the processor has been: entries that it caches.
#[derive(Default)]
struct Tlb(Vec<usize>);

/// Called with an entry that an ager has read and is about to exchange.
type Between = dyn Fn(&SpteCell) + Send + Sync;

/// See the file's head.
pub(crate) struct AliasMmu {
    config: SpteConfig<Legacy>,
    /// By gfn: index + 1 of the first descriptor, shifted, and [`HELD`].
    chains: Vec<AtomicU64>,
    descs: Vec<Desc>,
    cells: Vec<SpteCell>,
    /// The MMU lock, and what it protects. No ager takes it.
    lock: Mutex<Free>,
    tlb: Mutex<Tlb>,
    /// gfns that map anything, for who asks what can be promised.
    used: AtomicU64,
    between: Mutex<Option<Box<Between>>>,
}

/// The lock bit of a chain.
struct Held<'a> {
    head: &'a AtomicU64,
    /// The chain, without the bit; stored when the guard goes.
    chain: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // ORDERING[model]: Release. Pairs with the Acquire in `AliasMmu::try_hold`.
        self.head.store(self.chain, Ordering::Release);
    }
}

impl AliasMmu {
    /// gfns `0..gfns`, `entries` entries for their aliases.
    pub(crate) fn new(gfns: u64, entries: usize) -> Self {
        let config = SpteConfig::<Legacy>::new(Capabilities::legacy()).expect("a baseline");
        let desc = || Desc {
            entries: [(); SLOTS].map(|()| AtomicU64::new(POISON)),
            next: AtomicU64::new(POISON),
        };
        Self {
            config,
            chains: (0..gfns).map(|_| AtomicU64::new(0)).collect(),
            descs: (0..entries).map(|_| desc()).collect(),
            cells: (0..entries).map(|_| SpteCell::new(Spte::INVALID)).collect(),
            lock: Mutex::new(Free {
                descs: (0..entries).rev().collect(),
                cells: (0..entries).rev().collect(),
                mapped: 0,
            }),
            tlb: Mutex::new(Tlb::default()),
            used: AtomicU64::new(0),
            between: Mutex::new(None),
        }
    }

    fn chain(&self, gfn: u64) -> &AtomicU64 {
        &self.chains[to_index(gfn)]
    }

    fn try_hold<'a>(&self, head: &'a AtomicU64) -> Option<Held<'a>> {
        // ORDERING[model]: Relaxed. The exchange decides.
        let chain = head.load(Ordering::Relaxed);
        if chain & HELD != 0 {
            return None;
        }
        // ORDERING[model]: Acquire. Pairs with the Release of the last holder.
        let held = head.compare_exchange(chain, chain | HELD, Ordering::Acquire, Ordering::Relaxed);
        // Lazily: a guard that is made and dropped would free the lock.
        held.is_ok().then(|| Held { head, chain })
    }

    fn hold<'a>(&self, head: &'a AtomicU64) -> Held<'a> {
        loop {
            if let Some(held) = self.try_hold(head) {
                return held;
            }
            relax();
        }
    }

    /// The entries that a chain names, in order. The caller holds it.
    fn aliases(&self, held: &Held<'_>) -> Vec<usize> {
        let mut found = Vec::new();
        let mut at = held.chain >> 1;
        while at != 0 {
            assert!(at != POISON, "a freed descriptor is in a chain (R14)");
            let desc = &self.descs[to_index(at - 1)];
            for entry in &desc.entries {
                // ORDERING[model]: Relaxed. Under the lock bit.
                match entry.load(Ordering::Relaxed) {
                    0 => {}
                    POISON => panic!("a freed descriptor is read (R14)"),
                    entry => found.push(to_index(entry - 1)),
                }
            }
            // ORDERING[model]: Relaxed. Under the lock bit.
            at = desc.next.load(Ordering::Relaxed);
        }
        found
    }

    /// Map `gfn` once more, accessed or not. Returns the entry.
    pub(crate) fn map(&self, gfn: u64, accessed: bool) -> usize {
        let mut free = self.lock.lock().expect("no panic");
        let entry = free.cells.pop().expect("an entry");
        let desc = free.descs.pop().expect("a descriptor");
        let spec = LeafSpec {
            pfn: Pfn::new(0x1000 + gfn),
            level: Level::L1,
            access: mmu_core::access::Access::ALL,
            host_writable: true,
            map_writable: false,
            mmu_writable: true,
            accessed,
            memory_type: None,
            host_mmio: false,
        };
        self.cells[entry].init(self.config.leaf(&spec));
        let mut held = self.hold(self.chain(gfn));
        let [first, second] = &self.descs[desc].entries;
        // ORDERING[model]: Relaxed. Published by the chain's Release.
        first.store(to_u64(entry) + 1, Ordering::Relaxed);
        // ORDERING[model]: Relaxed. As above.
        second.store(0, Ordering::Relaxed);
        // ORDERING[model]: Relaxed. As above.
        self.descs[desc].next.store(held.chain >> 1, Ordering::Relaxed);
        held.chain = (to_u64(desc) + 1) << 1;
        drop(held);
        free.mapped += 1;
        // ORDERING[model]: Relaxed. A hint.
        self.used.fetch_add(1, Ordering::Relaxed);
        entry
    }

    /// Take out the mapping of `gfn` in `entry`: the entry first, then its alias, then the shadow
    /// page and the descriptor are freed (R15, R16). Was it young?
    pub(crate) fn unmap(&self, gfn: u64, entry: usize) -> bool {
        let mut free = self.lock.lock().expect("no panic");
        let old = self.cells[entry].exchange(Spte::EMPTY);
        assert!(old.is_mmu_present(), "unmapped twice");
        let desc = self.remove_alias(gfn, entry);
        if let Some(desc) = desc {
            let Desc { entries, next } = &self.descs[desc];
            for word in entries.iter().chain([next]) {
                // ORDERING[model]: Relaxed. Nobody may look.
                word.store(POISON, Ordering::Relaxed);
            }
            free.descs.push(desc);
        }
        self.cells[entry].init(Spte::INVALID);
        free.cells.push(entry);
        free.mapped -= 1;
        // ORDERING[model]: Relaxed. A hint.
        self.used.fetch_sub(1, Ordering::Relaxed);
        self.tlb.lock().expect("no panic").0.retain(|cached| *cached != entry);
        self.config.is_accessed(old)
    }

    /// Take an entry out of a chain. Returns the descriptor that is no longer needed.
    #[cfg(not(busted = "alias_freed_without_lock"))]
    fn remove_alias(&self, gfn: u64, entry: usize) -> Option<usize> {
        let mut held = self.hold(self.chain(gfn));
        self.unlink(&mut held.chain, entry)
    }

    #[cfg(busted = "alias_freed_without_lock")]
    fn remove_alias(&self, gfn: u64, entry: usize) -> Option<usize> {
        // ORDERING[model]: Acquire. The mutant's read.
        let mut chain = self.chain(gfn).load(Ordering::Acquire) & !HELD;
        let gone = self.unlink(&mut chain, entry);
        // ORDERING[model]: Release. The mutant's store.
        self.chain(gfn).store(chain, Ordering::Release);
        gone
    }

    fn unlink(&self, chain: &mut u64, entry: usize) -> Option<usize> {
        let (mut at, mut before) = (*chain >> 1, None::<usize>);
        while at != 0 {
            let desc = to_index(at - 1);
            // ORDERING[model]: Relaxed. Under the lock bit.
            let next = self.descs[desc].next.load(Ordering::Relaxed);
            let [first, _] = &self.descs[desc].entries;
            // ORDERING[model]: Relaxed. Under the lock bit.
            if first.load(Ordering::Relaxed) == to_u64(entry) + 1 {
                match before {
                    None => *chain = next << 1,
                    // ORDERING[model]: Relaxed. Under the lock bit.
                    Some(before) => self.descs[before].next.store(next, Ordering::Relaxed),
                }
                return Some(desc);
            }
            (at, before) = (next, Some(desc));
        }
        panic!("the alias is not in its chain");
    }

    /// The processor uses `entry`: through its TLB, or by a walk that sets A.
    pub(crate) fn touch(&self, entry: usize) {
        if self.tlb.lock().expect("no panic").0.contains(&entry) {
            return;
        }
        loop {
            let old = self.cells[entry].load();
            assert!(old.is_mmu_present(), "only what is mapped is touched");
            if self.cells[entry].try_change(old, old.with(1 << 5)).is_ok() {
                self.tlb.lock().expect("no panic").0.push(entry);
                return;
            }
        }
    }

    /// Hold the MMU lock for as long as `work` takes.
    pub(crate) fn locked<R>(&self, work: impl FnOnce() -> R) -> R {
        let _lock = self.lock.lock().expect("no panic");
        work()
    }

    /// Hold a gfn's chain for as long as `work` takes.
    pub(crate) fn chain_held<R>(&self, gfn: u64, work: impl FnOnce() -> R) -> R {
        let _held = self.hold(self.chain(gfn));
        work()
    }

    /// Step in between an ager's look and its exchange from now on.
    pub(crate) fn step_in(&self, between: Option<Box<Between>>) {
        *self.between.lock().expect("no panic") = between;
    }

    pub(crate) fn entry(&self, entry: usize) -> Spte {
        self.cells[entry].load()
    }

    pub(crate) fn cell(&self, entry: usize) -> &SpteCell {
        &self.cells[entry]
    }

    pub(crate) fn config(&self) -> &SpteConfig<Legacy> {
        &self.config
    }

    /// Ask the aliases of one gfn: `None` when it would take waiting, or more than `budget`.
    fn ask_chain(
        &self,
        gfn: u64,
        request: &AgeRequest,
        budget: u64,
        report: &mut AgeReport,
        flush: &mut Vec<usize>,
    ) -> Option<(bool, bool)> {
        let head = self.chain(gfn);
        let held = match request.effort {
            Effort::Full => self.hold(head),
            Effort::Fast => self.try_hold(head)?,
        };
        let aliases = self.aliases(&held);
        if request.effort == Effort::Fast && to_u64(aliases.len()) > budget {
            return None;
        }
        let (mut present, mut young) = (false, false);
        for entry in aliases {
            report.entries += 1;
            let cell = &self.cells[entry];
            let old = cell.load();
            assert!(old != Spte::INVALID, "a freed page is read (R16)");
            // Zapped with its alias still in the chain (R15).
            present |= old.is_leaf(Level::L1);
            if !self.config.is_accessed(old) {
                continue;
            }
            young = true;
            if request.mode != AgeMode::Test {
                if let Some(between) = &*self.between.lock().expect("no panic") {
                    between(cell);
                }
                // A lost exchange: used or going away. No second try.
                report.lost += u64::from(cell.try_change(old, self.config.age(old)).is_err());
                if request.mode == AgeMode::ClearFlush {
                    flush.push(entry);
                }
            }
        }
        Some((present, young))
    }

    /// One block's worth of answers, from `from` on. Returns where it stopped.
    fn age_block<S: AgeSink>(
        &self,
        from: u64,
        request: &AgeRequest,
        report: &mut AgeReport,
        flush: &mut Vec<usize>,
        sink: &mut S,
    ) -> u64 {
        let base = from / TABLE * TABLE;
        let end = (base + TABLE).min(request.range.end.get()).min(to_u64(self.chains.len()));
        let (mut present, mut young) = ([0u64; MASK_WORDS], [0u64; MASK_WORDS]);
        let mut unknown = Vec::new();
        for gfn in from..end {
            let left = request.budget.saturating_sub(report.entries);
            let (word, bit) = (to_index((gfn - base) / 64), 1 << (gfn % 64));
            match self.ask_chain(gfn, request, left, report, flush) {
                None => unknown.push(gfn),
                Some((is_present, is_young)) => {
                    present[word] |= if is_present { bit } else { 0 };
                    young[word] |= if is_present && is_young { bit } else { 0 };
                }
            }
        }
        let ones =
            |mask: &[u64; MASK_WORDS]| mask.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        report.mapped += ones(&present);
        report.young += ones(&young);
        report.unknown += to_u64(unknown.len());
        sink.table(Gfn::new(base), &present, &young);
        for gfn in unknown {
            sink.unknown(GfnRange::from_len(Gfn::new(gfn), 1));
        }
        end
    }
}

impl AgeRange for AliasMmu {
    type Reader = ();

    fn abilities(&self) -> AgeAbilities {
        // ORDERING[model]: Relaxed. A hint: chains may be held by somebody while there are any.
        let none = self.used.load(Ordering::Relaxed) == 0;
        let fast = if none { AgeAbilities::FAST } else { AgeAbilities::empty() };
        AgeAbilities::HARDWARE_BITS | fast
    }

    fn age<S: AgeSink>(&self, _: &mut (), request: AgeRequest, sink: &mut S) -> AgeReport {
        let mut report = AgeReport::empty(request.range.end);
        let mut flush = Vec::new();
        let last = request.range.end.get().min(to_u64(self.chains.len()));
        let mut at = request.range.start.get();
        while at < last {
            at = self.age_block(at, &request, &mut report, &mut flush, sink);
            if request.effort == Effort::Full && report.entries >= request.budget && at < last {
                report.next = Gfn::new(at);
                break;
            }
        }
        if request.mode == AgeMode::ClearFlush && request.effort == Effort::Full {
            let done = GfnRange::new(request.range.start, report.next);
            self.flush_aged(&mut (), done);
        }
        report
    }

    /// Forgets everything: a flush of more than was asked for is one.
    fn flush_aged(&self, _: &mut (), _: GfnRange) {
        self.tlb.lock().expect("no panic").0.clear();
    }
}
