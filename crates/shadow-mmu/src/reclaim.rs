//! Making room: which shadow pages go when there are too many.
//!
//! Owns [`ReclaimPolicy`] and adds to [`ShadowWriter`] the quota (KVM row 4.48), its enforcement
//! before each fault, and [`shrink`](ShadowWriter::shrink) for a host that wants memory back (row
//! 4.50). A page goes in constant time but for its own entries and its parents; a call looks at a
//! bounded number of pages.
//!
//! The accessed-bit policy gives a second chance (row 4.49): the CPU sets A in the link to a table
//! that it walks through, so a page none of whose links has A set, and that no fault used since
//! reclaim last came by, is cold. A round looks at a quarter of the pages at most, and at a
//! thousand; pages at level 1, which are the most and the cheapest to make again, go first, roots
//! never.

use mmu_core::addr::Level;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::page::ShadowPage;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::{ShadowWriter, Work};

/// Pages that a fault which meets the quota makes room for, so that the next ones need not: at most
/// so many, and at most an eighth of the quota.
const REFILL: u32 = 25;

/// Looks that a page outlives unused, if it was in use at as many before.
const MAX_CREDIT: u8 = 3;
/// Pages that go in one section, and pages that are looked at, so that others have a turn.
const SLICE: u32 = 16;
const LOOKS: u32 = 1024;
/// Rounds of a quarter of the pages each without a cold one, after which age alone decides.
const DRY_ROUNDS: u32 = 4;

/// Which pages go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReclaimPolicy {
    /// Those made first.
    Fifo,
    /// Those not used since reclaim last looked, by accessed bits.
    #[default]
    Accessed,
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Let there be at most `quota` shadow pages. More stay until a fault makes room.
    pub fn set_quota(&mut self, quota: u32) {
        self.quota = quota;
    }

    /// Choose who goes first.
    pub fn set_policy(&mut self, policy: ReclaimPolicy) {
        self.policy = policy;
    }

    /// Give up to `pages` shadow pages back, because the host needs memory; how many went. Pages
    /// that were used lately stay, under the accessed policy, if others are there.
    #[doc(alias = "mmu_shrink_scan")]
    pub fn shrink(&mut self, actor: &mut Actor<H>, pages: u32) -> u32 {
        self.reclaim(actor, pages)
    }

    /// Before a fault that may make `wanted` pages.
    pub(crate) fn make_room(&mut self, actor: &mut Actor<H>, wanted: u32) {
        let free = self.quota.saturating_sub(self.pages.live());
        if free < wanted {
            let goal = REFILL.min(self.quota / 8).max(wanted);
            let gone = self.reclaim(actor, goal - free.min(goal));
            self.stats.pages_recycled += u64::from(gone);
        }
    }

    fn reclaim(&mut self, actor: &mut Actor<H>, wanted: u32) -> u32 {
        let (mut gone, mut dry) = (0, 0);
        while gone < wanted {
            let slice = if mmu_core::busted!("reclaim_in_one_section") { u32::MAX } else { SLICE };
            let want = (wanted - gone).min(slice);
            let by_use = self.policy == ReclaimPolicy::Accessed && dry < DRY_ROUNDS;
            let round = self.work(actor, |work| {
                if by_use { work.zap_coldest(want) } else { work.zap_oldest(want) }
            });
            gone += round;
            if round == 0 {
                if !by_use {
                    break;
                }
                dry += 1;
            }
        }
        gone
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Take apart the pages made first.
    fn zap_oldest(&mut self, wanted: u32) -> u32 {
        let before = self.writer.pages.live();
        let mut at = self.writer.pages.oldest();
        while let Some(id) = at {
            if before - self.writer.pages.live() >= wanted {
                break;
            }
            at = self.writer.pages.newer_than(id);
            if self.writer.pages.get(id).is_some_and(|page| page.roots == 0) {
                self.zap_page(id);
                // A nested guest's children may have gone with it: start over.
                at = at.filter(|next| self.writer.pages.get(*next).is_some());
            }
        }
        before.saturating_sub(self.writer.pages.live())
    }

    /// Take apart pages that nobody used, level 1 first.
    fn zap_coldest(&mut self, wanted: u32) -> u32 {
        let before = self.writer.pages.live();
        // A quarter, but at least what is wanted: with a small quota progress comes first.
        let most = if mmu_core::busted!("reclaim_looks_at_all") { u32::MAX } else { LOOKS };
        let mut looks = (before / 4).min(most).max(wanted);
        // Pages that are passed over cost little, and are many.
        let mut steps = most.saturating_mul(4).max(wanted);
        for lowest in [true, false] {
            let mut at = self.writer.pages.oldest();
            let last = self.writer.pages.newest();
            while let Some(id) = at {
                if before - self.writer.pages.live() >= wanted || looks == 0 || steps == 0 {
                    break;
                }
                steps -= 1;
                at = if Some(id) == last { None } else { self.writer.pages.newer_than(id) };
                if !self.may_go(id, lowest) {
                    continue;
                }
                looks -= 1;
                if self.may_stay(id) {
                    self.writer.pages.renew(id);
                    self.writer.stats.second_chances += 1;
                    continue;
                }
                self.zap_page(id);
                at = at.filter(|next| self.writer.pages.get(*next).is_some());
            }
        }
        before.saturating_sub(self.writer.pages.live())
    }

    fn may_go(&self, id: PageId, lowest: bool) -> bool {
        let fits = |page: &ShadowPage| page.roots == 0 && (!lowest || page.level() == Level::L1);
        self.writer.pages.get(id).is_some_and(fits)
    }

    /// Does the page get another chance? One that is in use at look after look stays for some in
    /// which it is not; the first use of a new page, which is why it was made, earns it nothing but
    /// another look.
    fn may_stay(&mut self, id: PageId) -> bool {
        let used = self.was_used(id);
        let Some(page) = self.writer.pages.get_mut(id) else { return false };
        let (credit, stays) = match page.credit {
            None => (0, used),
            Some(credit) if used => ((credit + 1).min(MAX_CREDIT), true),
            Some(credit) => (credit.saturating_sub(1), credit > 0),
        };
        page.credit = Some(credit);
        stays
    }

    /// Was the page used since the last look? Forgets it.
    fn was_used(&mut self, id: PageId) -> bool {
        let Some(page) = self.writer.pages.get_mut(id) else { return false };
        let mut used = core::mem::take(&mut page.used);
        let parents = page.parents;
        for place in parents.iter(self.writer.rmap.desc_pool()) {
            used |= self.age_link(place);
        }
        used
    }

    /// Was the link's A set? It is clear now. No flush: a CPU that has the link cached does not set
    /// it again, so a page in use may look cold, and is made again by a fault.
    fn age_link(&self, place: SpteRef) -> bool {
        let (Some(cell), Some(page)) = (self.cell(place), self.writer.pages.get(place.page()))
        else {
            return false;
        };
        let (old, config) = (cell.load(), self.config());
        if !config.ad_enabled() || !old.is_table(page.level()) || !config.is_accessed(old) {
            return false;
        }
        let new: Spte = old.without(F::ACCESSED);
        // Lost to the CPU, which sets A: it is in use.
        let _ = cell.try_change(old, new);
        true
    }
}
