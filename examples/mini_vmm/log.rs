//! Asking for dirty pages, in each of the ways there are.
//!
//! Whatever the way, a page that [`Log::harvest`] names was re-armed and flushed before it
//! returned: its contents may be read from then on, and a write that comes later is in the next
//! harvest.

use std::time::{Duration, Instant};

use mmu_core::slot::SlotFlags;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::TlbFlush;
use mmu_core::vm::Actor;
use tdp_mmu::DirtyTracking;

use super::cli::LogMode;
use super::host::VmmHost;
use super::pages::PageSet;
use super::vmm::{Error, Vmm};

/// Pages that are cleared at a time: a migration would clear before it sends that much.
const CLEAR_CHUNK: u64 = 1024;

/// The dirty log of a VM.
#[derive(Debug)]
pub struct Log {
    mode: LogMode,
    /// A bitmap for each slot.
    words: Vec<Vec<u64>>,
    /// Time each harvest took to find dirty pages, and to clear parts of the bitmap.
    pub get_ns: Vec<u64>,
    /// See `get_ns`; only where clearing is a call of its own.
    pub clear_ns: Vec<u64>,
}

impl Log {
    /// The log of `vmm`, whose shape was made for `mode`.
    pub fn new<F: SpteFormat>(vmm: &Vmm<F>, mode: LogMode) -> Self {
        let words = |slot| {
            let pages = vmm.slot_pages(slot);
            vec![0; (pages.end - pages.start).div_ceil(64) as usize]
        };
        let words = (0..vmm.shape.slots).map(words).collect();
        Self { mode, words, get_ns: Vec::new(), clear_ns: Vec::new() }
    }

    /// Log writes to all data from when this returns.
    pub fn enable<F: SpteFormat>(
        &mut self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
    ) -> Result<(), Error> {
        self.flag(vmm, actor, SlotFlags::LOG_DIRTY)
    }

    /// Log nothing any longer.
    pub fn disable<F: SpteFormat>(
        &mut self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
    ) -> Result<(), Error> {
        self.flag(vmm, actor, SlotFlags::empty())
    }

    fn flag<F: SpteFormat>(
        &self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let mut slots = (0..vmm.shape.slots).filter(|slot| !vmm.slot_pages(*slot).is_empty());
        slots.try_for_each(|slot| vmm.flag_slot(actor, slot, flags))
    }

    /// The pages written since the last call, or since logging was enabled.
    pub fn harvest<F: SpteFormat>(
        &mut self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
    ) -> Result<PageSet, Error> {
        let mut dirty = PageSet::new(vmm.shape.pages);
        self.harvest_each(vmm, actor)?.iter().for_each(|one| dirty.union(one));
        Ok(dirty)
    }

    /// The same, by each log that there is: each tells of every write by itself.
    pub fn harvest_each<F: SpteFormat>(
        &mut self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
    ) -> Result<Vec<PageSet>, Error> {
        let mut sets = Vec::new();
        let begun = Instant::now();
        let mut clear = Duration::ZERO;
        if matches!(self.mode, LogMode::Ring | LogMode::Both) {
            if vmm.shape.tracking == DirtyTracking::HardwareLog {
                vmm.mmu.vm().host().sync_hardware_log();
            }
            vmm.drain_rings(actor)?;
            let mut dirty = PageSet::new(vmm.shape.pages);
            vmm.take_harvested()?.into_iter().for_each(|page| dirty.insert(page));
            sets.push(dirty);
        }
        if self.mode != LogMode::Ring {
            let mut dirty = PageSet::new(vmm.shape.pages);
            for slot in 0..self.words.len() {
                clear += self.harvest_slot(vmm, actor, slot as u16, &mut dirty)?;
            }
            sets.push(dirty);
        }
        self.get_ns.push((begun.elapsed() - clear).as_nanos() as u64);
        if self.mode == LogMode::Clear {
            self.clear_ns.push(clear.as_nanos() as u64);
        }
        Ok(sets)
    }

    /// The bitmap of one slot; the time that clearing it took.
    fn harvest_slot<F: SpteFormat>(
        &mut self,
        vmm: &Vmm<F>,
        actor: &mut Actor<VmmHost>,
        slot: u16,
        dirty: &mut PageSet,
    ) -> Result<Duration, Error> {
        let pages = vmm.slot_pages(u64::from(slot));
        if pages.is_empty() {
            return Ok(Duration::ZERO);
        }
        let words = &mut self.words[usize::from(slot)];
        let found = match self.mode {
            LogMode::Clear => vmm.mmu.peek_log(actor, 0, slot, words)?,
            _ => vmm.mmu.harvest_log(actor, 0, slot, words)?,
        };
        let bits: u32 = words.iter().map(|word| word.count_ones()).sum();
        if found.pages != u64::from(bits) {
            return Err(format!("slot {slot}: {bits} bits, but {} pages", found.pages).into());
        }
        let begun = Instant::now();
        if self.mode == LogMode::Clear {
            let count = pages.end - pages.start;
            let firsts = (0..count).step_by(CLEAR_CHUNK as usize);
            for (first, bits) in firsts.zip(words.chunks(CLEAR_CHUNK as usize / 64)) {
                let chunk = CLEAR_CHUNK.min(count - first);
                let _ = vmm.mmu.clear_log(actor, (0, slot), first, chunk, bits)?;
            }
        }
        let clear = begun.elapsed();
        dirty.insert_bits(pages, words);
        Ok(clear)
    }
}
