//! [`Pace`]: how long the tiering thread waits between two passes.
//!
//! What is cold is a matter of time: a page goes when two to three passes in a row found it unused.
//! A guest that needs longer than that to come round to a page gets it taken away again and again,
//! and the more pages come back the slower it comes round: it thrashes. The pages then come back
//! while the generation that they left is hardly older, which [`Refault::is_recent`] tells; and the
//! passes are spread until that ends. Passes that find nothing to do are spread too, because each
//! costs the guest the walks for all that was cleared.
//!
//! [`Refault::is_recent`]: lru_age::Refault::is_recent

use std::time::Duration;

/// Passes may be this many times as far apart as asked for, while a guest thrashes.
const SLOWEST: u32 = 32;
/// And this many times while there is nothing to do.
const IDLE: u32 = 4;
/// Of the pages in memory so many parts may come back too early in one turn.
const TOO_EARLY: u64 = 64;
/// Of all pages fewer than one in so many taken away or come back is nothing to do.
const NOTHING: u64 = 128;

/// What came of one turn, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// All of the VM.
    pub pages: u64,
    /// Pages in memory.
    pub here: u64,
    /// Taken away.
    pub gone: u64,
    /// Come back since the turn before.
    pub back: u64,
    /// Of those, so soon that they should not have gone.
    pub early: u64,
}

/// The time between two passes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    base: Duration,
    factor: u32,
}

impl Pace {
    /// As asked for.
    pub fn new(base: Duration) -> Self {
        Self { base, factor: 1 }
    }

    /// The time to wait now.
    pub fn now(&self) -> Duration {
        self.base * self.factor
    }

    /// A turn is over. True if the guest thrashes.
    pub fn after(&mut self, turn: &Turn) -> bool {
        let thrashes = turn.early > turn.here / TOO_EARLY;
        let idle = turn.gone.max(turn.back) < turn.pages / NOTHING;
        self.factor = match (thrashes, idle) {
            (true, _) => (self.factor * 2).min(SLOWEST),
            // From above too: by halves, so that a guest that would thrash again is not tried out
            // at once.
            (false, _) if self.factor > IDLE => self.factor / 2,
            (false, true) => (self.factor * 2).min(IDLE),
            (false, false) => (self.factor / 2).max(1),
        };
        thrashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_millis(100);

    fn turn(gone: u64, back: u64, early: u64) -> Turn {
        Turn { pages: 4096, here: 1024, gone, back, early }
    }

    /// The factor after each of these turns.
    fn factors(turns: impl IntoIterator<Item = Turn>) -> Vec<u32> {
        let mut pace = Pace::new(BASE);
        let after = |turn| {
            let _ = pace.after(&turn);
            pace.now().as_millis() as u32 / 100
        };
        turns.into_iter().map(after).collect()
    }

    #[test]
    fn a_guest_that_thrashes_is_given_time_and_then_tried_again_gently() {
        let thrash = [turn(500, 500, 100); 7];
        let calm = [turn(500, 0, 0); 5];
        let seen = factors(thrash.into_iter().chain(calm));
        assert_eq!(seen, [2, 4, 8, 16, 32, 32, 32, 16, 8, 4, 2, 1]);
        assert!(Pace::new(BASE).after(&turn(0, 17, 17)), "more than 1 of 64 that are here");
        assert!(!Pace::new(BASE).after(&turn(0, 500, 16)), "old pages may come back");
    }

    #[test]
    fn passes_without_work_are_spread_and_closed_up_when_there_is_some() {
        let idle = [turn(31, 31, 0); 4];
        let work = [turn(32, 0, 0); 3];
        let seen = factors(idle.into_iter().chain(work));
        assert_eq!(seen, [2, 4, 4, 4, 2, 1, 1]);
    }
}
