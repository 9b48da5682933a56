//! A map from (level, number) to a small value: unlimited, or bounded with seeded random eviction.
//!
//! Open addressing with linear probing at a load of at most one half. Eight neighbouring numbers
//! share a home, so that a guest walking memory walks the table too. Deterministic: the same
//! calls with the same seed leave the same contents.

use crate::random::Random;

/// How much a cache can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// Everything: an entry leaves only when it is flushed.
    Unlimited,
    /// That many entries (at least one); a random one makes place for a new one.
    Entries(u32),
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot<V> {
    /// `number << 3 | level`; levels start at 1, so 0 is an empty slot.
    key: u64,
    value: V,
}

#[derive(Clone, Debug)]
pub(crate) struct Cache<V> {
    slots: Vec<Slot<V>>,
    len: usize,
    len_max: Option<usize>,
    by_level: [usize; 8],
    random: Random,
}

const SLOTS_MIN: usize = 16;

/// Numbers are page numbers or prefixes of them (at most 52 bits), levels 1 to 5.
#[inline]
const fn key(level: u8, number: u64) -> u64 {
    (number << 3) | (level as u64 & 7)
}

impl<V: Copy + Default> Cache<V> {
    pub(crate) fn new(capacity: Capacity, seed: u64) -> Self {
        let len_max = match capacity {
            Capacity::Unlimited => None,
            Capacity::Entries(entries) => Some(usize::try_from(entries).unwrap_or(1).max(1)),
        };
        let slots = match len_max {
            None => SLOTS_MIN,
            Some(max) => max.saturating_mul(2).next_power_of_two().max(SLOTS_MIN),
        };
        Self {
            slots: vec![Slot::default(); slots],
            len: 0,
            len_max,
            by_level: [0; 8],
            random: Random::new(seed),
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Entries at `level`.
    #[inline]
    pub(crate) fn len_at(&self, level: u8) -> usize {
        self.by_level[usize::from(level & 7)]
    }

    #[inline]
    fn home(&self, key: u64) -> usize {
        let number = key >> 3;
        let group = (number >> 3) | (key << 58);
        let mixed = group.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        ((mixed << 3) | (number & 7)) as usize & (self.slots.len() - 1)
    }

    #[inline]
    fn after(&self, index: usize) -> usize {
        (index + 1) & (self.slots.len() - 1)
    }

    /// Index of `key`, or of the empty slot where the search ended.
    #[inline]
    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut index = self.home(key);
        // At most half of the slots are taken: the search ends at an empty one.
        for _ in 0..self.slots.len() {
            let found = self.slots[index].key;
            if found == key {
                return Ok(index);
            }
            if found == 0 {
                return Err(index);
            }
            index = self.after(index);
        }
        Err(index)
    }

    #[inline]
    pub(crate) fn get(&self, level: u8, number: u64) -> Option<&V> {
        let index = self.find(key(level, number)).ok()?;
        Some(&self.slots[index].value)
    }

    pub(crate) fn insert(&mut self, level: u8, number: u64, value: V) {
        let key = key(level, number);
        if let Ok(index) = self.find(key) {
            self.slots[index].value = value;
            return;
        }
        self.make_place();
        let (Ok(index) | Err(index)) = self.find(key);
        self.slots[index] = Slot { key, value };
        self.len += 1;
        self.by_level[usize::from(level & 7)] += 1;
    }

    /// Evict or grow, so that one more entry leaves half of the slots empty.
    fn make_place(&mut self) {
        if self.len_max.is_some_and(|max| self.len >= max) {
            let start = self.random.below(self.slots.len() as u64) as usize;
            let taken = |index: &usize| self.slots[*index].key != 0;
            let victim = (start..self.slots.len()).chain(0..start).find(taken);
            if let Some(victim) = victim {
                self.remove_at(victim);
            }
        }
        if (self.len + 1) * 2 > self.slots.len() {
            let larger = vec![Slot::default(); self.slots.len() * 2];
            for slot in std::mem::replace(&mut self.slots, larger) {
                if slot.key != 0 {
                    let (Ok(index) | Err(index)) = self.find(slot.key);
                    self.slots[index] = slot;
                }
            }
        }
    }

    /// Remove the entry in a slot and close the gap, so that no search ends too early.
    fn remove_at(&mut self, index: usize) {
        let level = self.slots[index].key & 7;
        self.by_level[level as usize] -= 1;
        self.len -= 1;
        let mask = self.slots.len() - 1;
        let mut gap = index;
        let mut next = self.after(index);
        for _ in 0..self.slots.len() {
            let slot = self.slots[next];
            if slot.key == 0 {
                break;
            }
            // It may move into the gap unless its home lies behind the gap.
            let way_from_home = next.wrapping_sub(self.home(slot.key)) & mask;
            let way_from_gap = next.wrapping_sub(gap) & mask;
            if way_from_home >= way_from_gap {
                self.slots[gap] = slot;
                gap = next;
            }
            next = self.after(next);
        }
        self.slots[gap] = Slot::default();
    }

    pub(crate) fn remove(&mut self, level: u8, number: u64) {
        if let Ok(index) = self.find(key(level, number)) {
            self.remove_at(index);
        }
    }

    /// Remove every entry for which `gone(level, number, value)`.
    pub(crate) fn remove_if(&mut self, gone: impl Fn(u8, u64, &V) -> bool) {
        let taken = self.slots.iter().filter(|slot| slot.key != 0);
        let doomed: Vec<u64> = taken
            .filter(|slot| gone((slot.key & 7) as u8, slot.key >> 3, &slot.value))
            .map(|slot| slot.key)
            .collect();
        for key in doomed {
            if let Ok(index) = self.find(key) {
                self.remove_at(index);
            }
        }
    }

    /// Remove the entries of `level` with `first <= number <= last`, the cheaper way.
    pub(crate) fn remove_range(&mut self, level: u8, first: u64, last: u64) {
        if first > last || self.len_at(level) == 0 {
            return;
        }
        if last - first < self.slots.len() as u64 {
            for number in first..=last {
                self.remove(level, number);
            }
        } else {
            self.remove_if(|at, number, _| at == level && (first..=last).contains(&number));
        }
    }

    pub(crate) fn clear(&mut self) {
        if self.len != 0 {
            self.slots.fill(Slot::default());
            self.len = 0;
            self.by_level = [0; 8];
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{Cache, Capacity};
    use crate::random::Random;

    #[test]
    fn behaves_like_a_map() {
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let mut cache = Cache::<u64>::new(Capacity::Unlimited, seed);
            let mut model = BTreeMap::new();
            let span = 1 << (2 + seed % 12);
            for step in 0..4000_u64 {
                let level = 1 + random.below(3) as u8;
                let number = random.below(span) << (9 * random.below(3));
                match random.below(16) {
                    0..8 => {
                        cache.insert(level, number, step);
                        model.insert((level, number), step);
                    }
                    8..13 => {
                        cache.remove(level, number);
                        model.remove(&(level, number));
                    }
                    13 => {
                        let last = number + random.below(span * 2);
                        cache.remove_range(level, number, last);
                        model.retain(|&(at, n), _| at != level || n < number || n > last);
                    }
                    14 if random.chance(1, 40) => {
                        cache.clear();
                        model.clear();
                    }
                    _ => {
                        let found = cache.get(level, number);
                        assert_eq!(found, model.get(&(level, number)), "seed {seed}");
                    }
                }
                assert_eq!(cache.len(), model.len(), "seed {seed} step {step}");
            }
            for (&(level, number), value) in &model {
                assert_eq!(cache.get(level, number), Some(value), "seed {seed}");
            }
            for level in 1..=3 {
                let count = model.keys().filter(|&&(at, _)| at == level).count();
                assert_eq!(cache.len_at(level), count, "seed {seed}");
            }
        }
    }

    #[test]
    fn bounded_cache_evicts_reproducibly() {
        let fill = |seed| {
            let mut cache = Cache::<u64>::new(Capacity::Entries(10), seed);
            for number in 0..1000 {
                cache.insert(1, number, number);
                assert!(cache.len() <= 10);
                assert_eq!(cache.get(1, number), Some(&number), "the newest stays");
            }
            (0..1000).filter(|&n| cache.get(1, n).is_some()).collect::<Vec<u64>>()
        };
        assert_eq!(fill(7).len(), 10);
        assert_eq!(fill(7), fill(7));
        assert_ne!(fill(7), fill(8));
    }

    #[test]
    fn capacity_of_nothing_is_one() {
        let mut cache = Cache::<u64>::new(Capacity::Entries(0), 0);
        cache.insert(1, 5, 5);
        cache.insert(1, 6, 6);
        assert_eq!((cache.len(), cache.get(1, 6)), (1, Some(&6)));
    }
}
