//! [`AgeTable`]: how old every page of a VM is.
//!
//! Owns the ranges, the window, and exact counts of pages per generation and page size. Anybody may
//! read through `&AgeTable` at any time; changes go through the one [`AgeEditor`] (a pass holds it)
//! and ranges come and go through `&mut AgeTable`.
//!
//! INVARIANT[I26]: with no editor open, the counts equal a recount of all pages
//! ([`AgeTable::check`]).

use alloc::vec::Vec;

use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::sync::{AtomicU64, Ordering, plain};

use crate::editor::AgeEditor;
use crate::error::{AgeError, Inconsistency};
use crate::figures::{Figures, FiguresCell};
use crate::filter::Filters;
use crate::r#gen::{GenWindow, Generation, Label, Seq, WindowCell};
use crate::kind::{KINDS, Kind};
use crate::region::Region;
use crate::summary::{self, Summary, Tally};
use crate::word::{self, FULL, Planes};

/// Retries of a read that the editor disturbed; each needs another change to the same block or a
/// whole pass in between.
const MAX_READ_TRIES: u32 = 8;

/// Leaf sizes: 4 KiB, 2 MiB, 1 GiB.
pub(crate) const PAGE_SIZES: usize = 3;

/// Generations of the pages of a set of gfn ranges.
///
/// Cost: 4 bits per 4 KiB page, 8 bytes per 2 MiB block and about 8 more bits per block for the
/// victim index: 4.14 bits, 0.52 bytes per page, allocated when a range is added
/// ([`memory_bytes`](Self::memory_bytes)). Blocks that huge leaves map use 9 of their 265 bytes.
///
/// Concurrency: every read is of values that were true at one moment of the call; counts of
/// different generations may be of different moments while a pass runs.
#[derive(Debug)]
pub struct AgeTable {
    /// Sorted, disjoint.
    regions: Vec<Region>,
    window: WindowCell,
    /// By kind.
    totals: [Totals; KINDS],
    /// When each generation was opened, by slot.
    births_ms: [AtomicU64; 4],
    /// What the pass of each generation counted, by slot.
    figures: [FiguresCell; 4],
    filters: Option<Filters>,
    /// Pages found used outside of passes since the last one.
    heard: plain::AtomicU64,
    /// 1 while an editor is open.
    editing: AtomicU64,
}

/// How old a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAge {
    /// Its generation. Higher is younger.
    pub seq: Seq,
    /// Was it seen used since it was mapped? Then the next access promotes it (row 5.22).
    pub referenced: bool,
    /// Size of the leaf that maps it. A huge leaf cut by the border of a range counts as 4 KiB.
    pub level: Level,
}

impl AgeTable {
    /// A table without ranges, at [`GenWindow::START`]. `now_ms` is the embedder's clock: any
    /// origin, milliseconds, the same one that [`AgePass::finish`](crate::AgePass::finish) gets.
    #[must_use]
    pub fn new(now_ms: u64) -> Self {
        Self::with_window(GenWindow::START, now_ms)
    }

    /// The same at another window: fewer generations, or numbers that go on from elsewhere.
    #[must_use]
    pub fn with_window(window: GenWindow, now_ms: u64) -> Self {
        Self {
            regions: Vec::new(),
            window: WindowCell::new(window),
            totals: Default::default(),
            births_ms: [(); 4].map(|()| AtomicU64::new(now_ms)),
            figures: Default::default(),
            filters: None,
            heard: plain::AtomicU64::new(0),
            editing: AtomicU64::new(0),
        }
    }

    /// Let passes leave out what was not worth a look ([`Scan`](crate::Scan)). Takes 8 KiB. The
    /// first pass after it looks at everything.
    ///
    /// # Errors
    /// [`AgeError::NoMemoryFor`]; nothing changed.
    pub fn enable_filters(&mut self) -> Result<(), AgeError> {
        if self.filters.is_none() {
            let bytes = Filters::BYTES;
            self.filters = Some(Filters::new().ok_or(AgeError::NoMemoryFor { bytes })?);
        }
        Ok(())
    }

    /// Something happened in the 2 MiB block of `gfn`: the next pass that leaves blocks out shall
    /// look there. For who maps pages; from any thread, without a lock. Writes only when the block
    /// was not noted yet. A hint: one that comes while a pass starts may be lost, and its block
    /// then waits for the next full pass.
    pub fn note(&self, gfn: Gfn) {
        if let Some(filters) = &self.filters {
            let seq = self.window().max_seq();
            filters.add(seq, gfn);
            filters.add(Seq::new(seq.get() + 1), gfn);
        }
    }

    /// Would a pass that starts now and leaves blocks out ([`Scan`](crate::Scan)) look at the block
    /// of `gfn`? False outside the ranges.
    #[must_use]
    pub fn is_worth_a_look(&self, gfn: Gfn) -> bool {
        self.region_at(gfn).is_some_and(|region| {
            let seq = self.window().max_seq();
            self.is_wanted(region, region.block_of(gfn), seq)
        })
    }

    /// Blocks of huge leaves cost one entry, and blocks in which nothing is known may hold
    /// anything: filters are asked about the others only.
    pub(crate) fn is_wanted(&self, region: &Region, block: u64, seq: Seq) -> bool {
        let Some((cell, _)) = region.block(block) else { return false };
        let seen = summary::load(cell);
        seen.is_huge() || seen == Summary::EMPTY || self.is_named(region.base_of(block), seq)
    }

    /// Does a filter name the block, or is there none?
    pub(crate) fn is_named(&self, base: Gfn, seq: Seq) -> bool {
        self.filters.as_ref().is_none_or(|filters| filters.contains(seq, base))
    }

    pub(crate) const fn filters(&self) -> Option<&Filters> {
        self.filters.as_ref()
    }

    /// Start to keep ages for `range`, usually a new memslot, whose content only the guest has.
    /// Nothing is tracked in it yet. A huge leaf that reaches into two ranges has one accessed bit:
    /// the lower range gets to see it.
    ///
    /// # Errors
    /// Nothing changed: [`AgeError::EmptyRange`], [`AgeError::OutOfAddressSpace`],
    /// [`AgeError::Overlap`] with a range that is there, [`AgeError::OutOfMemory`].
    pub fn add_range(&mut self, range: GfnRange) -> Result<(), AgeError> {
        self.add_range_of(range, Kind::Anon)
    }

    /// The same for a range of either kind.
    ///
    /// # Errors
    /// As [`add_range`](Self::add_range).
    pub fn add_range_of(&mut self, range: GfnRange, kind: Kind) -> Result<(), AgeError> {
        if range.is_empty() {
            return Err(AgeError::EmptyRange { range });
        }
        if !GfnRange::ALL.covers(range) {
            return Err(AgeError::OutOfAddressSpace { range });
        }
        let at = self.position(range.start);
        let above = self.regions.get(at).map(Region::range);
        if let Some(existing) = above.filter(|existing| existing.overlaps(range)) {
            return Err(AgeError::Overlap { range, existing });
        }
        let no_memory = AgeError::OutOfMemory { range, bytes: Region::bytes(range) };
        self.regions.try_reserve(1).map_err(|_| no_memory)?;
        self.regions.insert(at, Region::new(range, kind).ok_or(no_memory)?);
        Ok(())
    }

    /// Forget `range`, usually a deleted memslot, and free its memory.
    ///
    /// # Errors
    /// [`AgeError::UnknownRange`] unless exactly this range was added.
    pub fn remove_range(&mut self, range: GfnRange) -> Result<(), AgeError> {
        let at = self.position(range.start);
        if self.regions.get(at).is_none_or(|region| region.range() != range) {
            return Err(AgeError::UnknownRange { range });
        }
        let region = self.regions.remove(at);
        for block in 0..region.len() {
            if let Some((cell, _)) = region.block(block) {
                region.kind().of(&self.totals).replace(summary::load_own(cell), Summary::EMPTY);
            }
        }
        Ok(())
    }

    /// The ranges, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = GfnRange> {
        self.regions.iter().map(Region::range)
    }

    /// The generations that exist now.
    #[inline]
    #[must_use]
    pub fn window(&self) -> GenWindow {
        self.window.load()
    }

    /// Bytes that the table occupies, itself included.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let regions = to_u64(self.regions.capacity() * size_of::<Region>());
        let heap: u64 = self.regions.iter().map(|region| Region::bytes(region.range())).sum();
        let filters = self.filters.as_ref().map_or(0, |_| Filters::BYTES);
        to_u64(size_of::<Self>()) + regions + heap + filters
    }

    /// Pages (4 KiB) in generation `seq`; 0 for one that does not exist.
    #[must_use]
    pub fn pages_in(&self, seq: Seq) -> u64 {
        self.pages_by_size(seq).iter().flatten().sum()
    }

    /// The same by kind and by size of the leaf: 4 KiB, 2 MiB, 1 GiB, each counted in 4 KiB pages.
    pub(crate) fn pages_by_size(&self, seq: Seq) -> [[u64; PAGE_SIZES]; KINDS] {
        let mut pages = [[0; PAGE_SIZES]; KINDS];
        for _ in 0..MAX_READ_TRIES {
            let window = self.window();
            if !window.contains(seq) {
                return [[0; PAGE_SIZES]; KINDS];
            }
            let label = window.label(seq);
            pages = self.totals.each_ref().map(|totals| totals.of(label));
            // Unchanged after the counts were read: they are of that generation.
            if window == self.window() {
                break;
            }
        }
        pages
    }

    /// Pages (4 KiB) tracked, in all generations.
    #[must_use]
    pub fn tracked_pages(&self) -> u64 {
        let of_label = |&label: &Label| self.totals.each_ref().map(|totals| totals.of(label));
        Label::ALL.iter().flat_map(of_label).flatten().sum()
    }

    /// How old a page is; `None` when it is outside the ranges or was not mapped when last looked
    /// at. A page that changes faster than it can be read counts as just used.
    #[must_use]
    pub fn page_age(&self, gfn: Gfn) -> Option<PageAge> {
        let region = self.region_at(gfn)?;
        for _ in 0..MAX_READ_TRIES {
            let window = self.window();
            let Some(seen) = read_page(region, gfn) else { continue };
            let (label, referenced, level) = seen?;
            // Unchanged after the label was read: the label means what this window says.
            let seq = window.seq_of(label);
            if let (Some(seq), true) = (seq, window == self.window()) {
                return Some(PageAge { seq, referenced, level });
            }
        }
        let seq = self.window().max_seq();
        Some(PageAge { seq, referenced: true, level: Level::L1 })
    }

    /// When generation `generation`'s current holder was opened, on the embedder's clock.
    pub(crate) fn birth_ms(&self, generation: Generation) -> u64 {
        // ORDERING[age-birth]: Acquire. Pairs with Release in `set_birth_ms`. A reader that sees
        // the birth of a new generation and then looks at the window no longer finds the one whose
        // slot it took.
        self.births_ms
            .get(to_index(generation.get()))
            .map_or(0, |birth| birth.load(Ordering::Acquire))
    }

    pub(crate) fn set_birth_ms(&self, generation: Generation, now_ms: u64) {
        if let Some(birth) = self.births_ms.get(to_index(generation.get())) {
            // ORDERING[age-birth]: Release. Pairs with Acquire in `birth_ms`. Publishes: the window
            // in which the slot is free.
            birth.store(now_ms, Ordering::Release);
        }
    }

    /// What the pass of generation `generation`'s current holder counted.
    pub(crate) fn figures(&self, generation: Generation) -> Figures {
        let slot = self.figures.get(to_index(generation.get()));
        slot.map(FiguresCell::load).unwrap_or_default()
    }

    pub(crate) fn set_figures(&self, generation: Generation, figures: Figures) {
        if let Some(slot) = self.figures.get(to_index(generation.get())) {
            slot.store(figures);
        }
    }

    /// `pages` were found used outside of a pass. For the holder of the editor.
    pub(crate) fn hear(&self, pages: u64) {
        // ORDERING[age-editor]: Relaxed. The editor is ours: only its holder stores.
        let heard = self.heard.load(plain::Ordering::Relaxed);
        self.heard.store(heard.saturating_add(pages), plain::Ordering::Relaxed);
    }

    /// How many that were since the last call.
    pub(crate) fn take_heard(&self) -> u64 {
        // ORDERING[age-editor]: Relaxed. The editor is ours: only its holder stores.
        let heard = self.heard.load(plain::Ordering::Relaxed);
        self.heard.store(0, plain::Ordering::Relaxed);
        heard
    }

    /// Become the one who may change the table.
    ///
    /// # Errors
    /// [`AgeError::Busy`] while another editor or a pass is open. Never waits.
    pub fn edit(&self) -> Result<AgeEditor<'_>, AgeError> {
        // ORDERING[age-editor]: Acquire. Pairs with Release in `close`. Everything that earlier
        // editors stored is visible to this one, whose own loads may then be Relaxed.
        let claim = self.editing.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        claim.map(|_| AgeEditor::opened(self)).map_err(|_| AgeError::Busy)
    }

    /// The end of [`edit`](Self::edit), called by the editor's drop only.
    pub(crate) fn close(&self) {
        // ORDERING[age-editor]: Release. Pairs with Acquire in `edit`. Publishes: everything that
        // the editor stored.
        self.editing.store(0, Ordering::Release);
    }

    pub(crate) const fn window_cell(&self) -> &WindowCell {
        &self.window
    }

    pub(crate) const fn totals(&self, kind: Kind) -> &Totals {
        kind.of(&self.totals)
    }

    #[inline]
    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where the first range stands that ends after `gfn`.
    #[inline]
    pub(crate) fn position(&self, gfn: Gfn) -> usize {
        self.regions.partition_point(|region| region.range().end <= gfn)
    }

    /// The ranges that share a page with `range`.
    pub(crate) fn regions_in(&self, range: GfnRange) -> impl Iterator<Item = &Region> {
        let rest = self.regions.get(self.position(range.start)..).unwrap_or_default();
        rest.iter().take_while(move |region| region.range().start < range.end)
    }

    pub(crate) fn region_at(&self, gfn: Gfn) -> Option<&Region> {
        self.regions.get(self.position(gfn)).filter(|region| region.range().contains(gfn))
    }

    /// Recount everything and compare with what is kept (invariants I26 and I27).
    /// Reads every block: for tests and for the `prove` builds of embedders.
    ///
    /// # Errors
    /// [`AgeError::Inconsistent`] names the first difference; [`AgeError::Busy`] while an editor is
    /// open, since counts lag behind pages then.
    pub fn check(&self) -> Result<(), AgeError> {
        let _editor = self.edit()?;
        let window = self.window();
        let recount: [Totals; KINDS] = Default::default();
        for region in &self.regions {
            let recount = region.kind().of(&recount);
            for block in 0..region.len() {
                recount.replace(Summary::EMPTY, check_block(region, block, window)?);
            }
            region.index().check().map_err(|column| {
                inconsistent(Inconsistency::Index, region.base_of(column * 64), 0, 0)
            })?;
        }
        self.totals.iter().zip(&recount).try_for_each(|(kept, new)| kept.compare(new, window))
    }
}

/// One page: `None` when the block changed its kind meanwhile, `Some(None)` when not tracked.
fn read_page(region: &Region, gfn: Gfn) -> Option<Option<(Label, bool, Level)>> {
    let (cell, pages) = region.block(region.block_of(gfn))?;
    let seen = summary::load(cell);
    if seen.is_huge() {
        return Some(Some((seen.huge_label(), seen.referenced(), seen.level())));
    }
    let page = word::page(word::load(pages.get(word::group_of(gfn))?), gfn);
    // A collapse stores its summary before it clears the words.
    if summary::load(cell).is_huge() {
        return None;
    }
    Some(page.map(|(label, referenced)| (label, referenced, Level::L1)))
}

fn inconsistent(what: Inconsistency, gfn: Gfn, kept: u64, recounted: u64) -> AgeError {
    AgeError::Inconsistent { what, gfn, kept, recounted }
}

/// Recount one block. The caller is the editor.
fn check_block(region: &Region, block: u64, window: GenWindow) -> Result<Summary, AgeError> {
    let base = region.base_of(block);
    let Some((cell, pages)) = region.block(block) else { return Ok(Summary::EMPTY) };
    let kept = summary::load_own(cell);
    let inside = region.mask(block, region.range());
    let mut tally = Tally::default();
    for (group, inside) in pages.iter().zip(inside) {
        let planes = Planes::from_words(word::load_own(group));
        let stray = planes.stray() | planes.tracked & !inside;
        if stray != 0 {
            return Err(inconsistent(Inconsistency::Untracked, base, 0, stray));
        }
        tally.add(planes, u64::MAX);
    }
    let words = tally.summary();
    let recounted = if kept.is_huge() {
        Summary::huge(kept.level(), kept.huge_label(), kept.referenced())
    } else {
        words
    };
    let words_agree = !kept.is_huge() || (words == Summary::EMPTY && inside == FULL);
    if kept != recounted || !words_agree {
        return Err(inconsistent(Inconsistency::Summary, base, kept.bits(), words.bits()));
    }
    let (indexed, expected) = (region.index().maps_of(block), maps(kept, window.by_age()));
    if indexed != expected {
        return Err(inconsistent(Inconsistency::Index, base, indexed, expected));
    }
    Ok(kept)
}

/// The maps of the index that name a block with this summary: one bit per label it holds, and one
/// for the label of its youngest page. `by_age` is youngest first.
pub(crate) fn maps(summary: Summary, by_age: [Label; 4]) -> u64 {
    let held = summary.labels();
    let youngest = by_age.into_iter().find(|label| held >> label.get() & 1 == 1);
    held | youngest.map_or(0, |label| 16 << label.get())
}

/// Pages per label and leaf size, written by the holder of the editor.
#[derive(Debug, Default)]
pub(crate) struct Totals([[AtomicU64; 4]; PAGE_SIZES]);

impl Totals {
    /// Pages with `label`, by leaf size.
    pub(crate) fn of(&self, label: Label) -> [u64; PAGE_SIZES] {
        self.0.each_ref().map(|sizes| {
            // ORDERING[age-totals]: Acquire. Pairs with Release in `adjust`. A reader that sees
            // pages counted under a label also sees the window that gave the label its meaning, if
            // it looks at the window afterwards.
            sizes.get(to_index(label.get())).map_or(0, |total| total.load(Ordering::Acquire))
        })
    }

    /// Is every count what a recount says, and no page in a generation that does not exist?
    fn compare(&self, recount: &Self, window: GenWindow) -> Result<(), AgeError> {
        for label in Label::ALL {
            for (kept, recounted) in self.of(label).into_iter().zip(recount.of(label)) {
                if kept != recounted {
                    let gfn = Gfn::new(0);
                    return Err(inconsistent(Inconsistency::Totals, gfn, kept, recounted));
                }
            }
            if window.seq_of(label).is_none() && recount.of(label) != [0; PAGE_SIZES] {
                let pages = recount.of(label).iter().sum();
                return Err(inconsistent(Inconsistency::Window, Gfn::new(0), 0, pages));
            }
        }
        Ok(())
    }

    /// A block's summary went from `old` to `new`.
    #[inline]
    pub(crate) fn replace(&self, old: Summary, new: Summary) {
        let (old_size, new_size) = (old.level().slot(), new.level().slot());
        for label in Label::ALL {
            let (left, entered) = (old.count(label), new.count(label));
            if old_size == new_size {
                if left != entered {
                    self.adjust(new_size, label, left, entered);
                }
            } else {
                self.adjust(old_size, label, left, 0);
                self.adjust(new_size, label, 0, entered);
            }
        }
    }

    #[inline]
    fn adjust(&self, size: usize, label: Label, left: u64, entered: u64) {
        let total = self.0.get(size).and_then(|sizes| sizes.get(to_index(label.get())));
        if let Some(total) = total {
            // ORDERING[age-editor]: Relaxed. The editor is ours: only its holder stores, so load
            // and store need not be one operation.
            let old = total.load(Ordering::Relaxed);
            // ORDERING[age-totals]: Release. Pairs with Acquire in `of`. Publishes: the window
            // under which the labels were chosen.
            total.store(old + entered - left, Ordering::Release);
        }
    }
}
