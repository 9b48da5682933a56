//! [`SlowTier`]: a file that holds the pages which are not in memory, and where each page is.
//!
//! A page's place changes as drawn here; each change is one compare-exchange or the store of
//! whoever alone may make it.
//!
//! ```text
//!           unmapped, flushed        all of it written          memory given back
//!   Here ---------------------> Leaving ------------> Going ---------------------> Away
//!    ^                             |                                                |
//!    |<----- a fault: it is -------+                                                |
//!    |       still in memory                                                        |
//!    +<------------- Coming <--- a fault: read in, its sum compared -----------------+
//! ```
//!
//! Why nothing is lost. A page is copied only after no vCPU can write to it: when it is Leaving,
//! which it becomes inside the invalidation that unmapped it, flush included. From then on it is
//! mapped again only by a fault that takes it back first, and then the copy is thrown away. Nobody
//! takes it back once it is Going, so giving its memory back destroys nothing but the original of
//! a finished copy. A fault that meets Going or Coming waits: both end by themselves.
//!
//! One thread takes pages out ([`SlowTier::leave`] to [`SlowTier::go`]) and frees room in the file
//! ([`SlowTier::tidy`]); faults of all vCPUs bring pages back beside it.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::host::Pager;
use crate::machine::{self, FACTOR, Machine, PAGE};
use crate::vmm::Error;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// In memory. Mapped, or any fault may map it.
    Here,
    /// In memory, mapped by nobody, being written out.
    Leaving,
    /// Written out; its memory is being given back.
    Going,
    /// In the file only.
    Away,
    /// Being read in.
    Coming,
}

impl Place {
    const ALL: [Self; 5] = [Self::Here, Self::Leaving, Self::Going, Self::Away, Self::Coming];
}

/// What happened, in pages.
#[derive(Debug, Default)]
pub struct Moves {
    /// Written out and their memory given back.
    pub out: AtomicU64,
    /// Read in again.
    pub back: AtomicU64,
    /// Taken back by a fault while they were being written out.
    pub taken_back: AtomicU64,
    /// Times that a fault had to wait for somebody else's move.
    pub waits: AtomicU64,
    /// Read in with contents that were not what had been written.
    pub damaged: AtomicU64,
}

/// Page counts of a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// See [`Moves`].
    pub out: u64,
    /// See [`Moves`].
    pub back: u64,
    /// See [`Moves`].
    pub taken_back: u64,
}

/// The slow tier of one VM.
pub struct SlowTier {
    machine: Arc<dyn Machine>,
    /// First physical page of the data.
    data: u64,
    file: File,
    /// A [`Place`] for each page.
    places: Vec<AtomicU8>,
    /// Sum of the contents of each page that is Away.
    sums: Vec<AtomicU64>,
    /// Pages that came back and stand in the file still.
    arrived: Mutex<Vec<u64>>,
    /// Time each page took to come back.
    back_ns: Mutex<Vec<u64>>,
    /// What happened.
    pub moves: Moves,
}

impl SlowTier {
    /// A tier for `pages` data pages of `machine`, the first of which is physical page `data`; a
    /// file without a name in folder `folder`. All pages are Here.
    pub fn new(
        machine: Arc<dyn Machine>,
        data: u64,
        pages: u64,
        folder: &Path,
    ) -> Result<Self, Error> {
        Ok(Self {
            machine,
            data,
            file: nameless(folder)?,
            places: (0..pages).map(|_| AtomicU8::new(Place::Here as u8)).collect(),
            sums: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            arrived: Mutex::default(),
            back_ns: Mutex::default(),
            moves: Moves::default(),
        })
    }

    fn at(&self, page: u64) -> &AtomicU8 {
        &self.places[page as usize]
    }

    /// Where a page is.
    pub fn place(&self, page: u64) -> Place {
        // ORDERING[tier-place]: Acquire. Pairs with the Release in `change`: who finds a page Here
        // finds its contents.
        Place::ALL[usize::from(self.at(page).load(Ordering::Acquire))]
    }

    /// From one place to another; false if it was not there.
    fn change(&self, page: u64, from: Place, to: Place) -> bool {
        // ORDERING[tier-place]: AcqRel. Pairs with itself and with the load in `place`: contents,
        // sum and hole were made before the place that promises them.
        let change = self.at(page).compare_exchange(
            from as u8,
            to as u8,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        change.is_ok()
    }

    /// The move of a page that nobody else may move.
    fn advance(&self, page: u64, from: Place, to: Place) {
        let alone = self.change(page, from, to);
        assert!(alone, "page {page} is {:?}, not {from:?}", self.place(page));
    }

    /// These pages, all Here, were unmapped and flushed, and the invalidation in which that was
    /// done has not ended.
    pub fn leave(&self, pages: Range<u64>) {
        pages.for_each(|page| self.advance(page, Place::Here, Place::Leaving));
    }

    /// Write pages out as they are in memory. What it returns is as good as the promise that
    /// nobody wrote to them meanwhile: those that are Leaving when it returns.
    pub fn write(&self, pages: Range<u64>) -> Result<(), Error> {
        let memory = self.machine.memory();
        let mut bytes = Vec::with_capacity(((pages.end - pages.start) * PAGE) as usize);
        for page in pages.clone() {
            let mut sum = Sum::new(page);
            let start = (self.data + page) * PAGE;
            for at in (start..start + PAGE).step_by(8) {
                let word = memory.load(at);
                sum.add(word);
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            // ORDERING[tier-place]: Relaxed. Published by the place that becomes Going.
            self.sums[page as usize].store(sum.0, Ordering::Relaxed);
        }
        let written = self.file.write_all_at(&bytes, pages.start * PAGE);
        written.map_err(|error| format!("writing pages {pages:?} to the slow tier: {error}"))?;
        Ok(())
    }

    /// Give back the memory of those of `pages` that are Leaving, and were written. The others were
    /// taken back. Returns how many are Away now.
    pub fn go(&self, pages: Range<u64>) -> Result<u64, Error> {
        let mut gone = 0;
        let mut next = pages.start;
        while next < pages.end {
            let mut run = next..next;
            while run.end < pages.end && self.change(run.end, Place::Leaving, Place::Going) {
                run.end += 1;
            }
            // The page that ends a run was taken back, or is beyond the last.
            next = run.end + 1;
            self.forget(run.clone())?;
            gone += run.end - run.start;
        }
        let taken_back = pages.end - pages.start - gone;
        self.moves.out.fetch_add(gone, Ordering::Relaxed);
        self.moves.taken_back.fetch_add(taken_back, Ordering::Relaxed);
        self.lock_arrived().extend(pages.filter(|page| self.place(*page) == Place::Here));
        Ok(gone)
    }

    /// What must never be done, to see that it is found out: those of `pages` that faults took back
    /// are treated as if they had not.
    pub fn drop_taken_back(&self, pages: Range<u64>) {
        pages.for_each(|page| {
            let _ = self.change(page, Place::Here, Place::Leaving);
        });
    }

    /// Give back the memory of pages that are Going.
    fn forget(&self, run: Range<u64>) -> Result<(), Error> {
        if !run.is_empty() {
            self.machine.give_back(&(self.data + run.start..self.data + run.end))?;
            run.for_each(|page| self.advance(page, Place::Going, Place::Away));
        }
        Ok(())
    }

    fn lock_arrived(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        // A list of numbers is never half-way.
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Free the room of pages that came back, and name them, ascending; to be called by the thread
    /// that takes pages out. A page that is out again by its doing is not named.
    pub fn tidy(&self) -> Result<Vec<u64>, Error> {
        let mut pages = std::mem::take(&mut *self.lock_arrived());
        pages.sort_unstable();
        pages.dedup();
        // Whoever finds a page Here as this thread knows that it stays so.
        pages.retain(|page| self.place(*page) == Place::Here);
        let mut rest = pages.iter().copied().peekable();
        while let Some(first) = rest.next() {
            let mut run = first..first + 1;
            while rest.next_if_eq(&run.end).is_some() {
                run.end += 1;
            }
            machine::punch(&self.file, run.start * PAGE..run.end * PAGE)?;
        }
        Ok(pages)
    }

    /// Pages that are not in memory.
    pub fn away(&self) -> u64 {
        let moved = self.moved();
        moved.out - moved.back
    }

    /// The counts of this moment.
    pub fn moved(&self) -> Moved {
        // In this order: a page comes back after it went out.
        let back = self.moves.back.load(Ordering::Acquire);
        let taken_back = self.moves.taken_back.load(Ordering::Acquire);
        Moved { out: self.moves.out.load(Ordering::Acquire).max(back), back, taken_back }
    }

    /// Bytes of the disk that the file occupies.
    pub fn file_bytes(&self) -> Result<u64, Error> {
        Ok(machine::blocks(&self.file)?)
    }

    /// The time that each page took to come back, since the last call.
    pub fn take_back_ns(&self) -> Vec<u64> {
        std::mem::take(&mut *self.back_ns.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Read in a page that is Coming, which is this thread's.
    fn read(&self, page: u64) -> Result<(), Error> {
        let mut bytes = [0; PAGE as usize];
        let read = self.file.read_exact_at(&mut bytes, page * PAGE);
        read.map_err(|error| format!("reading page {page} from the slow tier: {error}"))?;
        let memory = self.machine.memory();
        let mut sum = Sum::new(page);
        let start = (self.data + page) * PAGE;
        for (at, word) in (start..).step_by(8).zip(bytes.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            sum.add(word);
            memory.store(at, word);
        }
        // ORDERING[tier-place]: Relaxed. The place that was Away published it.
        let expected = self.sums[page as usize].load(Ordering::Relaxed);
        if sum.0 != expected {
            self.moves.damaged.fetch_add(1, Ordering::Relaxed);
            return Err(format!(
                "page {page} came back with sum {:#x}, not {expected:#x}: the slow tier is damaged",
                sum.0
            )
            .into());
        }
        Ok(())
    }
}

impl Pager for SlowTier {
    fn is_here(&self, page: u64) -> bool {
        match self.place(page) {
            Place::Here => true,
            // Lost to the thread that writes it out: ask again when that is over. Lost to another
            // fault: it is Here.
            Place::Leaving => {
                self.change(page, Place::Leaving, Place::Here) || self.place(page) == Place::Here
            }
            Place::Going | Place::Away | Place::Coming => false,
        }
    }

    fn bring_in(&self, page: u64) -> Result<(), Error> {
        let begun = Instant::now();
        if !self.change(page, Place::Away, Place::Coming) {
            if self.place(page) != Place::Here {
                self.moves.waits.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            return Ok(());
        }
        if let Err(error) = self.read(page) {
            self.advance(page, Place::Coming, Place::Away);
            return Err(error);
        }
        // Before it is Here: `tidy` then knows of it before it can leave again.
        self.lock_arrived().push(page);
        self.moves.back.fetch_add(1, Ordering::AcqRel);
        self.advance(page, Place::Coming, Place::Here);
        let mut times = self.back_ns.lock().unwrap_or_else(PoisonError::into_inner);
        times.push(begun.elapsed().as_nanos() as u64);
        Ok(())
    }
}

/// A file that is gone when it is closed.
fn nameless(folder: &Path) -> Result<File, Error> {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let name = format!("mini_vmm-slow-{}-{number}", std::process::id());
    let path = folder.join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
    let file = file.map_err(|error| format!("{}: {error}", path.display()))?;
    std::fs::remove_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file)
}

/// A sum of the words of a page, in their order, and of its number.
struct Sum(u64);

impl Sum {
    fn new(page: u64) -> Self {
        Self(page ^ FACTOR)
    }

    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(FACTOR).rotate_left(29);
    }
}

#[cfg(test)]
mod tests {
    use mmu_model::{Format, Npt};

    use super::*;
    use crate::machine::Layout;
    use crate::soft::SoftMachine;

    const FIRST: u64 = 8;
    const PAGES: u64 = 4;

    /// A tier all of whose pages hold their number plus one.
    fn tier() -> SlowTier {
        let layout = Layout { stub: 0..1, tables: 1..FIRST, data: FIRST..FIRST + PAGES };
        let machine = SoftMachine::new(&layout, 1, Format::Npt(Npt::new())).expect("memory");
        let folder = std::env::temp_dir();
        let tier = SlowTier::new(Arc::new(machine), FIRST, PAGES, &folder).expect("a file");
        (0..PAGES).for_each(|page| tier.machine.memory().store((FIRST + page) * PAGE, page + 1));
        tier
    }

    fn word(tier: &SlowTier, page: u64) -> u64 {
        tier.machine.memory().load((FIRST + page) * PAGE)
    }

    #[test]
    fn a_page_that_is_taken_back_stays_and_the_others_go_and_come_back() {
        let tier = tier();
        let full = tier.machine.allocated().expect("a count");
        tier.leave(0..PAGES);
        tier.write(0..PAGES).expect("room");
        assert!(tier.is_here(1), "it is in memory still");
        tier.machine.memory().store((FIRST + 1) * PAGE, 77);
        assert_eq!(tier.go(0..PAGES).expect("holes"), 3);
        let places: Vec<_> = (0..PAGES).map(|page| tier.place(page)).collect();
        assert_eq!(places, [Place::Away, Place::Here, Place::Away, Place::Away]);
        assert_eq!((tier.away(), tier.machine.allocated().expect("a count")), (3, full - 3 * PAGE));
        assert!(!tier.is_here(3));
        tier.bring_in(3).expect("contents");
        assert_eq!((word(&tier, 1), word(&tier, 3)), (77, 4));
        assert_eq!(tier.tidy().expect("holes"), [1, 3]);
        assert!(tier.tidy().expect("holes").is_empty());
        [0, 2].into_iter().for_each(|page| tier.bring_in(page).expect("contents"));
        assert_eq!(tier.tidy().expect("holes"), [0, 2]);
        assert_eq!((word(&tier, 0), word(&tier, 2)), (1, 3));
        assert_eq!((tier.away(), tier.file_bytes().expect("a count")), (0, 0));
    }

    #[test]
    fn a_page_that_left_again_keeps_its_room_in_the_file() {
        let tier = tier();
        for _ in 0..2 {
            tier.leave(2..3);
            tier.write(2..3).expect("room");
            assert_eq!(tier.go(2..3).expect("holes"), 1);
            assert!(tier.tidy().expect("holes").is_empty(), "it is away");
            tier.bring_in(2).expect("contents");
        }
        assert_eq!(word(&tier, 2), 3);
    }

    #[test]
    fn a_damaged_file_is_found_out() {
        let tier = tier();
        tier.leave(0..2);
        tier.write(0..2).expect("room");
        assert_eq!(tier.go(0..2).expect("holes"), 2);
        tier.file.write_all_at(&[9], PAGE + 123).expect("room");
        tier.bring_in(0).expect("contents");
        assert!(tier.bring_in(1).is_err());
        assert_eq!((tier.place(1), tier.moves.damaged.load(Ordering::Relaxed)), (Place::Away, 1));
    }
}
