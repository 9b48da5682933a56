//! A guest and its specification in lockstep: the same calls to both, the same answers expected.
//!
//! [`Op`] is one call, made from 64 random bits, so that a seed or a fuzzer's bytes name a whole
//! run. [`World::run`] makes it and compares the answer; [`World::compare`] looks at the tables
//! through the independent walker.

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Hva, Level, to_u64};
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{SlotError, SlotFlags, SlotRequest};
use mmu_core::spte::Capabilities;
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeMode, CountOnly, HostPage, ResolveError};
use mmu_model::{AccessKind, FaultKind, Random};
use tdp_mmu::{SlotUpdate, TdpVcpu, ZapReport};

use super::map_spec::{Fault, Host, Map, Outcome, Rules, Slot, Zapped};
use super::{BASE, DATA, G1, Guest, M2, Modelled, Shape, TestHost, code, gpa, range};
use std::sync::Arc;

/// One call.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Fault {
        space: u8,
        gfn: u64,
        kind: AccessKind,
        level: u8,
        lie: bool,
    },
    Touch {
        space: u8,
        gfn: u64,
        write: bool,
    },
    Prefault {
        gfn: u64,
        pages: u64,
        write: bool,
    },
    Unmap {
        start: u64,
        end: u64,
    },
    Age {
        start: u64,
        end: u64,
        mode: AgeMode,
    },
    /// Drop everything: tables given back at once, in steps, or later.
    ZapAll {
        steps: u8,
    },
    Create {
        id: u16,
        place: u64,
        pages: u64,
        read_only: bool,
    },
    Delete {
        id: u16,
    },
    Move {
        id: u16,
        place: u64,
    },
    Flags {
        id: u16,
        log: bool,
    },
}

/// Tables that logging one slot may take; the pool is not endless, and neither is a test.
const MOST_SPLITS: u64 = 40;

/// Places where slots may be: two blocks of 2 GiB, the second at an odd distance, and the very
/// bottom.
const PLACES: [u64; 4] = [BASE, BASE + 6 * G1, 0, BASE + 9 * G1 + 3 * M2 + 5];
/// Slots of each space.
const SLOTS: u16 = 4;

/// A gfn that is likely to meet others: few blocks, few pages in each.
fn gfn(word: u64) -> u64 {
    let place = PLACES[(word & 3) as usize];
    let far = [0, G1][(word >> 2 & 1) as usize] * u64::from(word >> 3 & 3 == 0);
    let block = word >> 5 & 3;
    let page = match word >> 7 & 3 {
        0 => word >> 9 & 511,
        1 => 511 - (word >> 9 & 3),
        _ => word >> 9 & 15,
    };
    place + far + block * M2 + page
}

impl Op {
    /// The call that 64 bits stand for.
    pub fn decode(word: u64) -> Self {
        let place = gfn(word >> 20);
        let bit = |n: u32| word >> n & 1 != 0;
        let length = match word >> 40 & 7 {
            0 => 0,
            1..4 => 1 + (word >> 43 & 31),
            4..6 => word >> 43 & 1023,
            6 => M2 << (word >> 43 & 3),
            _ => G1 + (word >> 43 & 1023),
        };
        let level = match word >> 44 & 7 {
            0..5 => 1,
            5 | 6 => 2,
            _ => 3,
        };
        let space = u8::from(word >> 50 & 7 == 0);
        let id = (word >> 53 & 3) as u16;
        match word & 255 {
            0..100 => {
                let kind = match word >> 8 & 3 {
                    0 | 1 => AccessKind::Read,
                    2 => AccessKind::Write,
                    _ => AccessKind::Fetch,
                };
                Self::Fault { space, gfn: place, kind, level, lie: word >> 56 & 7 == 0 }
            }
            100..175 => Self::Touch { space, gfn: place, write: bit(8) },
            175..181 => Self::Prefault { gfn: place, pages: word >> 43 & 15, write: bit(8) },
            181..212 => Self::Unmap { start: place, end: place + length },
            212..246 => {
                let mode = match word >> 8 & 3 {
                    0 => AgeMode::Test,
                    1 => AgeMode::ClearFlush,
                    _ => AgeMode::Clear,
                };
                Self::Age { start: place, end: place + length, mode }
            }
            246 => Self::ZapAll { steps: (word >> 8 & 7) as u8 },
            247..251 => Self::Create {
                id,
                place: word >> 20,
                pages: 1 + (word >> 30 & 4095) + G1 * (word >> 43 & 1),
                read_only: word >> 45 & 3 == 0,
            },
            251 => Self::Delete { id },
            252 | 253 => Self::Move { id, place: word >> 20 },
            _ => Self::Flags { id, log: bit(8) },
        }
    }
}

/// Guest and specification.
pub struct World<F: mmu_core::spte::SpteFormat> {
    pub guest: Guest<F>,
    pub spec: Map,
    /// The vCPU of the second address space.
    smm: TdpVcpu<F, TestHost>,
    /// Zap-alls whose tables may still be there.
    pending: bool,
    pub ops: u64,
}

/// What the host has for a gfn: mostly large blocks, some pages it does not let anybody write.
fn host_page(pfn: u64) -> Host {
    let level = match pfn >> 9 & 7 {
        0 | 1 => 1,
        2..5 => 2,
        _ => 3,
    };
    Host { level, writable: pfn >> 3 & 31 != 7 || level > 1 }
}

fn level(number: u8) -> Level {
    Level::new(number).expect("1 to 5")
}

impl<F: Modelled> World<F> {
    pub fn new(caps: Capabilities) -> Self {
        Self::with(Shape { spaces: 2, frames: 640, ..Shape::new(caps) })
    }

    pub fn with(shape: Shape) -> Self {
        let guest = Guest::<F>::with(shape);
        guest.host().record(false);
        guest.host().set_resolver(Arc::new(|slot, gfn, _| {
            let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
            let pfn = hva.get() >> 12;
            let Host { level: number, writable } = host_page(pfn);
            let pfn = mmu_core::addr::Pfn::new(pfn);
            Ok(HostPage { pfn, writable, level: level(number) })
        }));
        let rules = Rules {
            max_gfn: guest.config().max_gfn_exclusive().get(),
            max_level: guest.config().max_leaf_level().number(),
            ad: guest.config().ad_enabled(),
            hardware_ad: guest.walker.rules().dirty() != 0,
            mmio: F::NAME == <mmu_core::spte::Ept as mmu_core::spte::SpteFormat>::NAME
                || shape.caps.max_phys_bits < 52,
        };
        let smm = TdpVcpu::new(&guest.mmu, 1).expect("room");
        Self { guest, spec: Map::new(rules), smm, pending: false, ops: 0 }
    }

    /// The vCPU of a space, with a root.
    fn vcpu(&mut self, space: u8) -> Result<&mut TdpVcpu<F, TestHost>, tdp_mmu::RootError> {
        let vcpu = if space == 0 { &mut self.guest.vcpu } else { &mut self.smm };
        vcpu.load_root()?;
        Ok(vcpu)
    }

    /// A root for each space.
    pub fn load_roots(&mut self) -> Result<(), tdp_mmu::RootError> {
        self.vcpu(0)?;
        self.vcpu(1).map(|_| ())
    }

    /// Make a call to both. An error is one of memory only, and then nothing has changed.
    ///
    /// # Panics
    /// When the answers differ.
    pub fn run(&mut self, op: Op) -> Result<(), String> {
        self.ops += 1;
        match op {
            Op::Fault { space, gfn, kind, level: number, lie } => {
                self.fault(space, gfn, kind, number, lie)?;
                self.compare_gfn(space, gfn);
            }
            Op::Touch { space, gfn, write } => self.touch(space, gfn, write)?,
            Op::Prefault { gfn, pages, write } => self.prefault(gfn, pages, write)?,
            Op::Unmap { start, end } => self.unmap(start, end),
            Op::Age { start, end, mode } => self.age(start, end, mode),
            Op::ZapAll { steps } => self.zap_all(steps),
            Op::Create { id, place, pages, read_only } => self.create(id, place, pages, read_only),
            Op::Delete { id } => self.delete(id),
            Op::Move { id, place } => self.move_slot(id, place),
            Op::Flags { id, log } => self.flags(id, log),
        }
        Ok(())
    }

    fn fault(
        &mut self,
        space: u8,
        gfn: u64,
        kind: AccessKind,
        number: u8,
        lie: bool,
    ) -> Result<(), String> {
        let present = self.spec.translate(space, gfn).is_some() != lie;
        let mut code = code(kind, present);
        code.set(PfErrorCode::RESERVED, self.spec.mmio.contains(&(space, gfn)));
        let fault = PageFault::new(gpa(gfn), code).at_most(level(number));
        let vcpu = self.vcpu(space).map_err(|error| error.to_string())?;
        let result = vcpu.fault(&fault);
        self.judge(space, gfn, kind == AccessKind::Write, present, number, false, result)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a fault")]
    fn judge(
        &mut self,
        space: u8,
        gfn: u64,
        write: bool,
        present: bool,
        max_level: u8,
        prefetch: bool,
        result: Result<FaultOutcome, FaultError>,
    ) -> Result<(), String> {
        if let Err(FaultError::OutOfFrames(error)) = result {
            return Err(error.to_string());
        }
        let before = self.spec.leaf(space, gfn);
        let fault = Fault { space, gfn, write, present, max_level, prefetch };
        let page = |slot: &Slot, gfn: u64| host_page(slot.pfn + (gfn - slot.base));
        let expected = self.spec.fault(fault, page);
        let got = match result {
            Ok(FaultOutcome::Fixed) => Outcome::Fixed,
            Ok(FaultOutcome::Spurious) => Outcome::Spurious,
            Ok(FaultOutcome::Emulate(EmulateReason::NoSlot { gfn: at, space: of })) => {
                assert_eq!((at.get(), of), (gfn, u16::from(space)));
                Outcome::NoSlot
            }
            Ok(FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn: at, slot })) => {
                let id = self.spec.slot_of(space, gfn).map(|(id, _)| id);
                assert_eq!((at.get(), Some(slot)), (gfn, id));
                Outcome::ReadOnly
            }
            Err(FaultError::BeyondPhysical { gpa: at, max_gfn }) => {
                assert_eq!((at, max_gfn.get()), (gpa(gfn), self.spec.rules.max_gfn));
                Outcome::Beyond
            }
            other => panic!("{fault:?}: {other:?}, expected {expected:?}"),
        };
        assert_eq!(got, expected, "{fault:?} {before:?}");
        Ok(())
    }

    fn touch(&mut self, space: u8, gfn: u64, write: bool) -> Result<(), String> {
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let vcpu = self.vcpu(space).map_err(|error| error.to_string())?;
        let root = vcpu.load_root().expect("loaded").address().get();
        let access = mmu_model::Access::user(kind);
        let guest = &self.guest;
        let found = guest.walker.translate(guest.host(), root, gfn << 12, access);
        let expected = self.spec.translate(space, gfn).map(|(pfn, ..)| pfn);
        let passes = self.spec.touch(space, gfn, write);
        let reserved = found.err().is_some_and(|fault| fault.kind == FaultKind::Reserved);
        let found = found.ok();
        assert_eq!(found.map(|t| t.pa >> 12), expected.filter(|_| passes), "{gfn:#x}");
        assert_eq!(reserved, self.spec.mmio.contains(&(space, gfn)), "{gfn:#x}");
        Ok(())
    }

    fn prefault(&mut self, first: u64, pages: u64, write: bool) -> Result<(), String> {
        let access = if write { Access::WRITE } else { Access::READ };
        for gfn in first..first + pages {
            let one = GfnRange::from_len(Gfn::new(gfn), 1);
            let vcpu = self.vcpu(0).map_err(|error| error.to_string())?;
            let result = vcpu.prefault(one, access);
            let done = match result {
                Ok(done) => done.next == one.end,
                Err(FaultError::OutOfFrames(error)) => return Err(error.to_string()),
                Err(error) => panic!("prefault of {gfn:#x}: {error}"),
            };
            let fault =
                Fault { space: 0, gfn, write, present: false, max_level: 3, prefetch: true };
            let page = |slot: &Slot, gfn: u64| host_page(slot.pfn + (gfn - slot.base));
            let expected = self.spec.fault(fault, page);
            let fits = matches!(expected, Outcome::Fixed | Outcome::Spurious);
            assert_eq!(done, fits, "prefault of {gfn:#x}");
            self.compare_gfn(0, gfn);
        }
        Ok(())
    }

    fn zapped(&self, report: ZapReport) -> Zapped {
        Zapped { leaves: report.leaves, young: report.young, dirty: report.dirty }
    }

    fn unmap(&mut self, start: u64, end: u64) {
        let report = self.guest.unmap(range(start, end));
        // Roots of a pending zap-all are visited too, and may still hold something.
        let expected = self.spec.unmap(start, end);
        if !self.pending {
            assert_eq!(self.zapped(report), expected, "unmap of [{start:#x}, {end:#x})");
        }
        for gfn in [start, start + (end - start) / 2, end.saturating_sub(1), end] {
            self.compare_gfn(0, gfn);
            self.compare_gfn(1, gfn);
        }
    }

    fn age(&mut self, start: u64, end: u64, mode: AgeMode) {
        let report = self.guest.age_into(range(start, end), mode, u64::MAX, &mut CountOnly);
        let expected = self.spec.age(start, end, mode != AgeMode::Test);
        assert_eq!((report.mapped, report.young), expected, "{mode:?} of [{start:#x}, {end:#x})");
        assert_eq!((report.next.get(), report.lost), (end, 0));
        self.compare_gfn(0, start);
    }

    /// Calls for the dirty log that map and protect nothing, with any numbers.
    pub fn ask_log(&mut self, word: u64) {
        let (space, id) = ((word & 3) as u16, (word >> 2 & 7) as u16);
        let number = |shift: u32| (word >> shift & 0xff) << (word >> (shift + 8) & 63);
        let (first, pages) = (number(5), number(19));
        let words = vec![0; usize::try_from(pages.div_ceil(64)).map_or(0, |n| n.min(1 << 12))];
        let guest = &mut self.guest;
        let (mmu, actor) = (&guest.mmu, &mut guest.actor);
        let mut few = [0; 2];
        let _ = mmu.peek_log(actor, space, id, &mut few);
        let cleared = mmu.clear_log(actor, (space, id), first, pages, &words);
        assert!(cleared.is_err() || first % 64 == 0);
        assert!(mmu.reset_rings(actor).is_err(), "there are none");
        let some = GfnRange::from_len(Gfn::new(first), pages.min(1 << 20));
        let marked = actor.mark_dirty(space, some).expect("no ring");
        assert!(marked <= some.len());
    }

    fn zap_all(&mut self, steps: u8) {
        let expected = self.spec.zap_all();
        let guest = &mut self.guest;
        let mut zap = guest.mmu.invalidate_roots(&mut guest.actor);
        let mut done = false;
        for _ in 0..steps.min(6) {
            done = zap.step(&mut guest.actor, 3) == tdp_mmu::root::ZapProgress::Done;
        }
        if steps == 7 {
            let report = zap.finish(&mut guest.actor);
            let report = Zapped { leaves: report.leaves, young: report.young, dirty: report.dirty };
            assert!(self.pending || report == expected, "{report:?} {expected:?}");
            self.pending = false;
        } else {
            drop(zap);
            self.pending |= !done;
        }
    }

    /// Give back what zap-alls left.
    pub fn settle(&mut self) {
        if self.pending {
            self.spec.zap_all();
            let guest = &mut self.guest;
            let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
            self.pending = false;
        }
    }

    /// The slot of the model that a request for `(space, id)` would make, if it is legal.
    fn fits(&self, space: u8, id: u16, slot: &Slot) -> bool {
        let end = slot.base + slot.pages;
        let apart = |other: &Slot| end <= other.base || other.base + other.pages <= slot.base;
        let others = self.spec.slots.iter().filter(|((at, of), _)| *at == space && *of != id);
        end <= self.spec.rules.max_gfn && others.into_iter().all(|(_, other)| apart(other))
    }

    fn request(
        &mut self,
        space: u8,
        id: u16,
        slot: Option<&Slot>,
    ) -> Result<SlotUpdate, SlotError> {
        let mut flags = SlotFlags::empty();
        flags.set(SlotFlags::READ_ONLY, slot.is_some_and(|slot| slot.read_only));
        flags.set(SlotFlags::LOG_DIRTY, slot.is_some_and(|slot| slot.log));
        let request = SlotRequest {
            as_id: u16::from(space),
            id,
            base: gpa(slot.map_or(0, |slot| slot.base)),
            bytes: slot.map_or(0, |slot| slot.pages) << 12,
            hva: Hva::new(slot.map_or(0, |slot| slot.pfn) << 12),
            flags,
        };
        self.guest.set_slot(&request)
    }

    /// Each slot is in both spaces for even ids, in the first only for odd ones.
    fn spaces(id: u16) -> impl Iterator<Item = u8> {
        0..2 - (id & 1) as u8
    }

    fn place(word: u64, id: u16) -> u64 {
        // One in four at an odd page, so that nothing but 4 KiB pages fits.
        let odd = if word >> 2 & 3 == 0 { 1 + (word >> 4 & 7) } else { 0 };
        PLACES[((word ^ u64::from(id)) & 3) as usize] + odd
    }

    fn create(&mut self, id: u16, place: u64, pages: u64, read_only: bool) {
        let id = id % SLOTS;
        let base = Self::place(place, id);
        // Congruent with gfns that are multiples of 1 GiB, except for odd places.
        let pfn = DATA + u64::from(id) * 16 * G1 + (base & (M2 - 1)) * (place >> 7 & 1);
        for space in Self::spaces(id) {
            let slot = Slot { base, pages, pfn, read_only, log: false };
            let old = self.spec.slots.get(&(space, id)).copied();
            let legal = match old {
                Some(_) => continue,
                None => self.fits(space, id, &slot),
            };
            let made = self.request(space, id, Some(&slot)).is_ok();
            assert_eq!(made, legal, "create {id}: {slot:?}");
            if legal {
                self.spec.slots.insert((space, id), slot);
            }
        }
    }

    fn delete(&mut self, id: u16) {
        for space in Self::spaces(id) {
            let old = self.spec.slots.remove(&(space, id));
            assert_eq!(self.request(space, id, None).is_ok(), old.is_some(), "delete {id}");
            if let Some(slot) = old {
                self.spec.unmap(slot.base, slot.base + slot.pages);
            }
        }
    }

    fn move_slot(&mut self, id: u16, place: u64) {
        for space in Self::spaces(id) {
            let Some(old) = self.spec.slots.get(&(space, id)).copied() else { continue };
            let new = Slot { base: Self::place(place, id), ..old };
            let legal = new.base == old.base || self.fits(space, id, &new);
            let moved = self.request(space, id, Some(&new)).is_ok();
            assert_eq!(moved, legal, "move {id}: {new:?}");
            if legal && new.base != old.base {
                self.spec.unmap(old.base, old.base + old.pages);
                self.spec.slots.insert((space, id), new);
            }
        }
    }

    fn flags(&mut self, id: u16, log: bool) {
        for space in Self::spaces(id) {
            let Some(slot) = self.spec.slots.get(&(space, id)).copied() else { continue };
            let new = Slot { log, ..slot };
            if log && self.spec.splits_for_log(space, &slot) > MOST_SPLITS {
                continue;
            }
            let update = self.request(space, id, Some(&new)).expect("a change of flags");
            self.spec.slots.insert((space, id), new);
            if log && !slot.log {
                // Only want of frames may leave a page huge; then the tables say which.
                let short = update.split.out_of_frames.is_some();
                let guest = &mut self.guest;
                self.spec.log(space, &new, |first, level| {
                    let walk = guest.mmu.lookup(&mut guest.actor, space, Gfn::new(first));
                    !short || walk.last().is_some_and(|(at, _)| at.number() < level)
                });
            }
            if !log && slot.log {
                let page = |slot: &Slot, gfn: u64| host_page(slot.pfn + (gfn - slot.base));
                self.spec.collapse(space, slot.base, slot.base + slot.pages, page);
            }
        }
    }

    /// One gfn through the walker. Nothing to compare for a space without a root.
    #[track_caller]
    pub fn compare_gfn(&mut self, space: u8, gfn: u64) {
        let vcpu = if space == 0 { &mut self.guest.vcpu } else { &mut self.smm };
        if !vcpu.root_is_current() {
            return;
        }
        let root = vcpu.load_root().expect("loaded").address().get();
        let found = self.guest.found_in(root, gfn).map(|f| (f.pfn, f.level, f.writable));
        assert_eq!(found, self.spec.translate(space, gfn), "space {space}, gfn {gfn:#x}");
        let walk = self.guest.mmu.lookup(&mut self.guest.actor, space, Gfn::new(gfn));
        let Some(&(at, spte)) = walk.last() else { return };
        let config = self.guest.config();
        let facts = |leaf: super::map_spec::Leaf| {
            (leaf.level, leaf.accessed, leaf.tracked, leaf.may_write, leaf.host_writable)
        };
        let got = spte.is_leaf(at).then(|| {
            let tracked = config.is_access_tracked(spte);
            let may_write = config.is_mmu_writable(spte);
            let host = config.is_host_writable(spte);
            (at.number(), config.is_accessed(spte), tracked, may_write, host)
        });
        let expected = self.spec.leaf(space, gfn).map(|(_, leaf)| facts(leaf));
        assert_eq!(got, expected, "space {space}, gfn {gfn:#x}");
    }

    /// Every leaf of the model is there, none besides, statistics and frames are right.
    #[track_caller]
    pub fn compare(&mut self) {
        // A reference keeps the root of a tree that is no more.
        for vcpu in [&mut self.guest.vcpu, &mut self.smm] {
            if !vcpu.root_is_current() {
                vcpu.unload_root();
            }
        }
        for space in 0..2 {
            let firsts: Vec<u64> = self.spec.spaces[usize::from(space)].keys().copied().collect();
            for first in firsts {
                self.compare_gfn(space, first);
            }
        }
        let count = self.guest.mmu.check(&mut self.guest.actor).expect("well-formed trees");
        if !self.pending {
            assert_eq!(count.leaves, self.spec.count(), "leaves");
            let pages = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G];
            assert_eq!(pages.map(|counter| self.guest.stat(counter)), count.leaves);
            assert_eq!(self.guest.stat(Counter::Tables), count.tables, "tables");
            assert_eq!(self.guest.stat(Counter::MmioSptes), count.mmio, "MMIO entries");
            assert_eq!(to_u64(self.spec.mmio.len()), count.mmio, "MMIO entries");
            let cached = self.cached();
            assert_eq!(self.guest.mmu.vm().pool().frames_in_use(), count.tables + cached);
        }
        assert_eq!(self.guest.stat(Counter::FlushOwed), self.guest.stat(Counter::FlushPaid));
    }

    /// Frames in the caches of all threads.
    pub fn cached(&mut self) -> u64 {
        self.guest.cached() + self.smm.actor().shared().cache.len() as u64
    }

    /// Tear down; nothing may be left.
    #[track_caller]
    pub fn finish(self) {
        drop(self.smm);
        self.guest.finish();
    }

    /// Slots to start with, so that the first faults find something.
    pub fn populate(&mut self, random: &mut Random) {
        for id in 0..SLOTS {
            let place = u64::from(id) ^ (random.next_u64() & !3);
            let pages = 1 + random.below(3 * G1);
            self.create(id, place, pages, false);
        }
    }
}
