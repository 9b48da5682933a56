//! The one funnel: every store to an entry of a shadow table goes through here.
//!
//! Adds to [`Work`] the only calls of the mutators of [`SpteCell`]. Who else may change an entry at
//! the same moment: an ager clears A or tracks accesses by compare-exchange, the CPU sets A and D.
//! Nobody but the writer makes an entry present or takes one out. So an exchange that takes out, or
//! a compare-exchange that is tried again, loses nothing (invariants I3 to I8).

use mmu_core::addr::Level;
use mmu_core::dead::DeadReason;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::Host;

use crate::writer::Work;

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    fn prove(&self, old: Spte, new: Spte, level: Level) {
        if cfg!(any(debug_assertions, feature = "prove")) {
            // INVARIANT[I3], INVARIANT[I5], INVARIANT[I6], INVARIANT[I7]: the legality table.
            let kind = self.config().change_kind(old, new, level);
            debug_assert!(kind.is_ok(), "illegal change at {level:?} (I3 to I7): {kind:?}");
            if kind.is_err() {
                self.vm.mark_dead(DeadReason::IllegalChange);
            }
        }
    }

    fn count(&self, old: Spte, new: Spte, level: Level) {
        match (old.is_leaf(level), new.is_leaf(level)) {
            (false, true) => self.shard.inc(Counter::pages(level)),
            (true, false) => self.shard.sub(Counter::pages(level), 1),
            _ => {}
        }
    }

    /// Put `new` in an entry that maps nothing.
    pub(crate) fn put(&self, cell: &SpteCell, new: Spte, level: Level) {
        let old = cell.load();
        debug_assert!(!old.is_mmu_present(), "{old:?} to {new:?}");
        self.prove(old, new, level);
        // Only the writer stores into an entry that is not present.
        if cell.try_change(old, new).is_err() {
            self.broken();
        }
        self.count(old, new, level);
    }

    /// Empty an entry; what stood there, with the bits that the CPU set last.
    pub(crate) fn take(&self, cell: &SpteCell, level: Level) -> Spte {
        let old = cell.exchange(Spte::EMPTY);
        self.prove(old, Spte::EMPTY, level);
        self.count(old, Spte::EMPTY, level);
        old
    }

    /// Replace a leaf by what `new` makes of it; the value before, `None` if it is no leaf or does
    /// not change. Each turn but the last means that the CPU set a bit or an ager took one: a few.
    pub(crate) fn update(
        &self,
        cell: &SpteCell,
        level: Level,
        new: impl Fn(Spte) -> Spte,
    ) -> Option<Spte> {
        let mut old = cell.load();
        while old.is_leaf(level) {
            let next = new(old);
            if next == old {
                return None;
            }
            self.prove(old, next, level);
            match cell.try_change(old, next) {
                Ok(()) => return Some(old),
                Err(current) => old = current,
            }
            self.shard.inc(Counter::CasLost);
        }
        None
    }
}
