//! What a guest, its host and its VMM may do to a guest's world, chosen by somebody else: one call
//! after the other, each described by a few numbers.
//!
//! Beside what the random steps of `wide` do: any value in any entry, any root, walks that are
//! asked about late, slots that come and go, pages whose writes somebody wants to see, aging of
//! every kind, quotas and shrinking, reports of writes that were none, frames that run out.

use std::collections::BTreeSet;

use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::fault::{FaultError, FaultOutcome};
use mmu_core::slot::SlotFlags;
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, AgeRequest, CountOnly, Effort};
use mmu_model::{AccessKind, Random};
use shadow_mmu::{
    OnWriteProtected, ReclaimPolicy, ShadowError, ShadowWriter, WriteRetry, WriterLock,
};

use super::rig::some_kind;
use super::wide::{BLOCKS, Guest, PAGES, TABLES, World, tables_of};
use super::{A, D, P, PS, U, W};
use crate::common::TestHost;
use crate::common::inside::infallible;

/// A call. What its numbers mean depends on the first.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub what: u8,
    pub place: u16,
    pub value: u64,
}

/// A value that says something as an entry: often sound, and into memory.
fn plausible(value: u64, choice: u16) -> u64 {
    let gfn = if choice & 1 == 0 { value % TABLES } else { value % (PAGES + 64) };
    let all = P | W | U | A | D;
    match choice >> 1 & 7 {
        0 => value,
        1 => gfn << 12 | all | PS,
        2 => (gfn & !511) << 12 | all | PS,
        3 => gfn << 12 | all & !(1 << (value >> 16 & 7)),
        4 => gfn << 12 | all ^ 1 << (value >> 16 & 63),
        // EPT: all permissions, accessed and dirty, write back.
        5 => gfn << 12 | 0x337,
        6 => gfn << 12 | 0x307 | PS,
        _ => gfn << 12 | all,
    }
}

impl<G: Guest> World<G> {
    /// Do what a call says, and judge.
    pub fn call(&mut self, call: Call) {
        // What it leaves open is decided by its own numbers: calls do not depend on one another.
        self.rig.random = Random::new(call.value ^ u64::from(call.place) << 48);
        let number = usize::from(call.place) % self.addresses.len();
        match call.what % 64 {
            0..8 => self.edit(),
            8..16 => self.scribble(call),
            16..34 => self.access_somehow(number),
            34..38 if G::INVALIDATES => self.invalidate(number),
            34..40 => self.flush(),
            40..42 => self.load(),
            42 => self.load_any(call.value),
            43 => self.switch(),
            44 => self.take_back(),
            45 => self.take_and_give_back(),
            46..48 => self.age(),
            48 => self.change_slot(call.value),
            49 => self.change_log(),
            50 => self.harvest(),
            51 => self.protect(call.value),
            52 => self.track(u64::from(call.place)),
            53..55 => self.make_room(call.place),
            55 => self.rig.drop_everything(),
            56 => self.zap_obsolete(),
            57 => self.unprotect(u64::from(call.place)),
            58..60 => self.report_no_write(call),
            60 => self.keep_a_walk(number),
            61 => self.ask_late(),
            62 => self.rig.refuse_after(u64::from(call.place) % 12),
            _ => self.leave(),
        }
        self.check();
    }

    /// Put a word into memory before the guest runs.
    pub fn furnish(&mut self, place: u16, value: u64) {
        let at = self.place(place);
        self.memory.set(at, self.guest.bytes(), plausible(value, place >> 12));
    }

    /// Tables that lead somewhere, as those of an honest guest.
    pub fn furnish_well(&mut self, random: &mut Random) {
        for level in (1..=self.guest.top()).rev() {
            for table in tables_of(level) {
                for index in self.guest.indices(level) {
                    let at = table * 4096 + index * self.guest.bytes();
                    let entry = self.guest.some_entry(random, level);
                    self.memory.set(at, self.guest.bytes(), entry);
                }
            }
        }
    }

    /// Any entry of any table: often one that is looked at.
    fn place(&self, place: u16) -> u64 {
        let (table, index) = (u64::from(place) % TABLES, u64::from(place) / TABLES);
        let address = self.addresses[index as usize % self.addresses.len()];
        let top = u64::from(self.guest.top().max(1));
        let index = match index % 4 {
            0 => index * 37,
            _ if self.guest.top() == 0 => index,
            _ => self.guest.index(address, (1 + index / 4 % top) as u32),
        };
        let bytes = self.guest.bytes();
        table * 4096 + index % (4096 / bytes) * bytes
    }

    /// The guest writes any value into any entry.
    fn scribble(&mut self, Call { place, value, .. }: Call) {
        let at = self.place(place);
        let value = plausible(value, (value >> 40) as u16);
        self.rig.note(format!("scribble {:x}[{:#x}] = {value:#x}", at >> 12, at & 4095));
        self.write(at, self.guest.bytes(), value);
    }

    fn access_somehow(&mut self, number: usize) {
        let kind = some_kind(&mut self.rig.random);
        let user = self.guest.some_user(&mut self.rig.random);
        self.access(number, kind, user);
    }

    /// The guest loads any value as its root.
    fn load_any(&mut self, any: u64) {
        if self.guest.load_any(any) {
            self.rig.note(format!("load {:x?}", self.guest));
            self.enter_anew();
            self.forget();
        } else {
            self.load();
        }
    }

    fn some_range(&mut self) -> GfnRange {
        let random = &mut self.rig.random;
        let start = random.below(PAGES + 600);
        let pages = if random.chance(1, 3) { PAGES + 600 } else { random.below(700) };
        GfnRange::from_len(Gfn::new(start * random.below(2)), pages)
    }

    /// The host takes any range back and gives the same pages again.
    fn take_and_give_back(&mut self) {
        let range = self.some_range();
        self.rig.take_back(range, |_| {});
        let gone: BTreeSet<u64> = (range.start.get()..range.end.get().min(PAGES))
            .filter_map(|gfn| self.backing.pfn(gfn))
            .collect();
        let left = |found: &mmu_model::Translation| gone.contains(&(found.pa >> 12));
        if let Some(found) = self.all_shadows().iter().flatten().find(|found| left(found)) {
            self.rig.fail(&format!("{found:x?} is left of {range:?}"));
        }
    }

    /// INVARIANT[I21]: what nobody accessed is not young, and nothing that was is lost unflushed.
    fn age(&mut self) {
        let range = self.some_range();
        let random = &mut self.rig.random;
        let mode = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush][random.below(3) as usize];
        let effort = if random.chance(1, 3) { Effort::Fast } else { Effort::Full };
        let budget = if random.chance(1, 2) { u64::MAX } else { random.below(40) };
        let flush_by_hand = random.chance(1, 2);
        self.rig.note(format!("age {range:?} {mode:?} {effort:?} {budget}"));
        let all = AgeRequest::new(range, mode).with_budget(budget).with_effort(effort);
        let mut young = vec![0_u64; range.len().div_ceil(64) as usize];
        let mmu = std::sync::Arc::clone(&self.rig.mmu);
        let actor = &mut self.rig.notifier;
        let report = infallible(|| mmu.age_bitmap(actor, all, &mut young, &mut []));
        if budget == u64::MAX && report.next != range.end {
            self.rig.fail(&format!("it ended at {:?}", report.next));
        }
        self.judge_young(range, &young);
        if mode == AgeMode::Test {
            return;
        }
        if mode == AgeMode::Clear || effort == Effort::Fast {
            if flush_by_hand {
                self.rig.core.lock().unwrap().cpu.flush_all();
            } else {
                infallible(|| mmu.flush_aged(&mut self.rig.notifier, range));
            }
        } else if budget == u64::MAX {
            if mmu.test_age(&mut self.rig.notifier, range) == AgeAnswer::Young {
                self.rig.fail("a page is young that was just aged");
            }
            self.touched.retain(|gfn| !range.contains(Gfn::new(*gfn)));
        }
    }

    /// Pages that are young were accessed, or lie in one large page with such.
    fn judge_young(&self, range: GfnRange, young: &[u64]) {
        let small = self.rig.mmu.vm().stats().get(Counter::Pages2M) == 0;
        let known = |gfn: u64| {
            let block = gfn / 512 * 512;
            self.touched.contains(&gfn)
                || !small && self.touched.range(block..block + 512).next().is_some()
        };
        let bits = (0..range.len()).filter(|bit| young[(bit / 64) as usize] >> (bit % 64) & 1 != 0);
        if let Some(gfn) = bits.map(|bit| range.start.get() + bit).find(|gfn| !known(*gfn)) {
            self.rig.fail(&format!("page {gfn} is young and was not accessed"));
        }
    }

    /// The slot goes, or another comes.
    fn change_slot(&mut self, value: u64) {
        if self.rig.slot.is_none() {
            let flags = SlotFlags::from_bits_truncate(value as u32).intersection(SlotFlags::CALLER);
            (0..BLOCKS).for_each(|block| self.back(block));
            self.memory.set_there(true);
            self.rig.create_slot(flags);
            self.remember_all();
            return;
        }
        self.memory.set_there(false);
        self.rig.delete_slot();
        if let Some(found) = self.all_shadows().into_iter().flatten().next() {
            self.rig.fail(&format!("{found:x?} is left of a slot that went"));
        }
        self.forget();
    }

    fn change_log(&mut self) {
        match self.rig.slot {
            None => {}
            Some(flags) if flags.contains(SlotFlags::LOG_DIRTY) => self.rig.unlog(),
            Some(_) => self.rig.log(),
        }
    }

    /// Somebody protects pages that may not exist.
    fn protect(&mut self, mask: u64) {
        let base = self.some_range().start;
        let space = self.rig.random.below(3) as u16;
        self.rig.note(format!("protect {mask:#x} from {base} in {space}"));
        let rig = &mut self.rig;
        let (actor, lock) = (&mut rig.notifier, &rig.lock);
        infallible(|| rig.mmu.protect_marked(actor, lock, space, base, mask));
    }

    fn track(&mut self, place: u64) {
        if self.rig.slot.is_some() {
            let gfn = if place & 1 == 0 { place % TABLES } else { place % PAGES };
            self.rig.track(gfn);
        }
    }

    /// Quota, policy, and a host that wants pages back.
    fn make_room(&mut self, place: u16) {
        let (lock, actor) = (&self.rig.lock, &mut self.rig.notifier);
        let many = u32::from(place >> 3);
        let change = |writer: &mut ShadowWriter<G::Format, TestHost>| {
            match place & 7 {
                0 => writer.set_quota(many % 12),
                1 => writer.set_quota(many),
                2 => writer.set_policy(ReclaimPolicy::Fifo),
                3 => writer.set_policy(ReclaimPolicy::Accessed),
                4 => return writer.shrink(actor, u32::MAX),
                _ => return writer.shrink(actor, many % 8),
            }
            0
        };
        let gone = infallible(|| lock.with(change));
        self.rig.note(format!("make room {place:#x}: {gone}"));
    }

    fn zap_obsolete(&mut self) {
        let (lock, actor) = (&self.rig.lock, &mut self.rig.notifier);
        let more = infallible(|| lock.with(|writer| writer.zap_obsolete(actor)));
        self.rig.note(format!("zap obsolete: more {more}"));
    }

    /// The emulator cannot do a write to a page, twice.
    fn unprotect(&mut self, place: u64) {
        let gfn = Gfn::new(if place & 1 == 0 { place / 2 % TABLES } else { place });
        let (lock, actor) = (&self.rig.lock, &mut self.rig.notifier);
        let mut retry = WriteRetry::new();
        let mut ask =
            || infallible(|| lock.with(|writer| retry.cannot_emulate(writer, actor, place, gfn)));
        let (first, second) = (ask(), ask());
        self.rig.note(format!("unprotect {gfn}: {first:?}"));
        assert_eq!(second, OnWriteProtected::Emulate, "the same write, not tried for ever");
    }

    /// A write is reported that changed nothing: of any length, anywhere.
    fn report_no_write(&mut self, Call { place, value, .. }: Call) {
        let at = if value & 1 == 0 { value >> 1 & 0xffff } else { value >> 1 };
        let bytes = u64::from(if place & 3 == 0 { place } else { place >> 2 & 15 });
        self.rig.note(format!("report {bytes} bytes at {at:#x}"));
        let (lock, actor) = (&self.rig.lock, &mut self.rig.notifier);
        infallible(|| lock.with(|writer| writer.guest_wrote(actor, Gpa::new(at), bytes)));
    }

    /// A vCPU walks the guest's tables, and is held up.
    fn keep_a_walk(&mut self, number: usize) {
        let kind = some_kind(&mut self.rig.random);
        let user = self.guest.some_user(&mut self.rig.random);
        let address = self.addresses[number];
        self.rig.note(format!("keep {kind:?} {address:#x}, user: {user}"));
        let walk = self.guest.walk(&self.memory, address, kind, user);
        self.remember_all();
        self.kept = walk.unwrap_or_else(|error| self.rig.fail(&error));
    }

    /// It goes on, whatever has become of the tables.
    fn ask_late(&mut self) {
        let Some(walk) = self.kept.take() else { return };
        let before = self.rig.refuses().then(|| self.picture());
        let outcome = self.guest.fault(&mut self.rig, &self.memory, &walk);
        let gfn = self.guest.path(&walk).gfn.get();
        self.rig.note(format!("ask late: {outcome:?}, gfn {gfn}"));
        match outcome {
            Ok(FaultOutcome::Fixed | FaultOutcome::Spurious) => {
                self.touched.insert(gfn);
            }
            Ok(FaultOutcome::Retry | FaultOutcome::WriteProtected) => {}
            Ok(FaultOutcome::Emulate(_)) if gfn >= PAGES => {}
            // What it was for is not known any more.
            Ok(FaultOutcome::Emulate(why)) if self.explains(why, AccessKind::Write) => {}
            Err(ShadowError::Fault(FaultError::NoRoot)) => {}
            Err(error) if self.guest.is_outside(&error) => {}
            Err(error) if self.rig.ran_out(&error) => {
                assert_eq!(before, Some(self.picture()), "{error}, and something changed");
            }
            other => self.rig.fail(&format!("{other:?}")),
        }
    }

    /// The vCPU leaves its roots; all pages are cold at last.
    fn leave(&mut self) {
        self.rig.note("leave".to_owned());
        infallible(|| self.rig.vcpu.drop_roots(&self.rig.lock));
        let everything = GfnRange::from_len(Gfn::new(0), PAGES);
        let clear = AgeRequest::new(everything, AgeMode::ClearFlush);
        let (mmu, actor) = (&self.rig.mmu, &mut self.rig.notifier);
        let _ = infallible(|| mmu.age(actor, clear, &mut CountOnly));
        self.touched.clear();
        if self.rig.random.chance(1, 2) {
            self.ask_late();
        }
    }
}
