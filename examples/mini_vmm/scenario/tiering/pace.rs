//! [`Pace`]: when the tiering thread looks at the pages again, and when it takes some.
//!
//! Three things spread its passes:
//!
//! - What a pass costs the guest. Accessed bits that were cleared are set again by walks, of which
//!   the flush spares the guest none: fractions of a microsecond where the CPU walks these tables,
//!   tens where a hypervisor shadows them. It is measured once; then passes are so far apart that
//!   the walks for pages in use take a small part of the guest's time, a smaller one while there is
//!   nothing to gain.
//! - Thrashing. What is cold is a matter of time: a page goes when two or three passes in a row
//!   found it unused. A guest that needs longer than that to come round to a page has it taken away
//!   again and again, and the more pages come back the slower it comes round. Such pages come back
//!   while the generation that they left is hardly older ([`Refault::is_recent`]).
//! - What was asked for, which is the least.
//!
//! [`Refault::is_recent`]: lru_age::Refault::is_recent

use std::time::Duration;

/// Turns may be this many times as far apart as asked for, while a guest thrashes.
const SLOWEST: u32 = 32;
/// Of the pages in memory one in so many may come back too early in one turn.
const TOO_EARLY: u64 = 64;
/// Of all pages fewer than one in so many taken away or come back is nothing to gain.
const NOTHING: u64 = 128;
/// One part in so many of the guest's time may go into walks because of passes, if those find cold
/// pages ...
const SHARE_WORKING: u32 = 10;
/// ... and if they do not.
const SHARE_IDLE: u32 = 50;

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

/// The time between two turns, and between two passes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    base: Duration,
    factor: u32,
    is_idle: bool,
    /// Of one page, by one vCPU.
    walk: Duration,
    vcpus: u32,
}

impl Pace {
    /// Turns as far apart as asked for, for a VM of `vcpus` that need `walk` to use a page again
    /// whose accessed bit was cleared.
    pub fn new(base: Duration, walk: Duration, vcpus: u32) -> Self {
        Self { base, factor: 1, is_idle: false, walk, vcpus }
    }

    /// The time to wait for the next turn.
    pub fn turn(&self) -> Duration {
        self.base * self.factor
    }

    /// The time from a pass that found `young` pages in use to the next.
    pub fn pass(&self, young: u64) -> Duration {
        let share = if self.is_idle { SHARE_IDLE } else { SHARE_WORKING };
        let walks = u32::try_from(young / u64::from(self.vcpus)).unwrap_or(u32::MAX);
        let spread = self.walk.saturating_mul(walks).saturating_mul(share);
        spread.max(self.turn())
    }

    /// A turn is over. True if the guest thrashes.
    pub fn after(&mut self, turn: &Turn) -> bool {
        let thrashes = turn.early > turn.here / TOO_EARLY;
        // By halves, so that a guest that would thrash again is not tried out at once.
        self.factor =
            if thrashes { (self.factor * 2).min(SLOWEST) } else { (self.factor / 2).max(1) };
        self.is_idle = turn.gone.max(turn.back) < turn.pages / NOTHING;
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

    #[test]
    fn a_guest_that_thrashes_is_given_time_and_then_tried_again_gently() {
        let mut pace = Pace::new(BASE, Duration::ZERO, 2);
        let thrash = [turn(500, 500, 100); 7];
        let calm = [turn(500, 0, 0); 6];
        let after = |turn| {
            let _ = pace.after(&turn);
            pace.turn().as_millis() / 100
        };
        let seen: Vec<_> = thrash.into_iter().chain(calm).map(after).collect();
        assert_eq!(seen, [2, 4, 8, 16, 32, 32, 32, 16, 8, 4, 2, 1, 1]);
        assert!(pace.after(&turn(0, 17, 17)), "more than 1 of 64 that are here");
        assert!(!pace.after(&turn(0, 500, 16)), "old pages may come back");
    }

    #[test]
    fn passes_cost_a_small_part_of_the_guest_and_less_when_they_find_nothing() {
        let mut pace = Pace::new(BASE, Duration::from_micros(10), 2);
        assert_eq!(pace.pass(100), BASE, "cheap ones as often as asked for");
        assert_eq!(pace.pass(4000), Duration::from_millis(200), "20 ms are 1 in 10");
        assert!(!pace.after(&turn(31, 31, 0)));
        assert_eq!(pace.pass(4000), Duration::from_secs(1), "20 ms are 1 in 50");
        assert!(!pace.after(&turn(32, 0, 0)));
        assert_eq!(pace.pass(4000), Duration::from_millis(200));
        assert!(pace.pass(u64::MAX) > Duration::from_secs(1 << 18), "no overflow");
    }
}
