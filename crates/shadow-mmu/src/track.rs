//! The guest writes to tables of its own that have a shadow.
//!
//! Adds to [`ShadowWriter`]: what an emulated write to such a table undoes (KVM row 4.52), and
//! giving up shadows of tables that are written all the time, or not like tables (row 4.53).

use mmu_core::addr::{Gfn, Gpa, Level, PAGE_SIZE, to_index, to_u64};
use mmu_core::spte::SpteFormat;
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::page::ShadowPage;
use crate::role::RoleFlags;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::{ShadowWriter, Work};

/// Writes to a table, none of its entries used in between, after which its shadow is given up.
const FLOOD: u8 = 3;

/// A write to one page of guest memory.
#[derive(Clone, Copy, Debug)]
struct Write {
    gfn: Gfn,
    /// Byte of the page.
    offset: u64,
    bytes: u64,
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// The guest, through the emulator, or the host wrote `bytes` bytes from `at` on. Call after
    /// the write is in memory and before the vCPU goes on; when this returns, no entry of ours
    /// stands for what was overwritten. Costs next to nothing for a page that is no table.
    #[doc(alias = "kvm_mmu_track_write")]
    pub fn guest_wrote(&mut self, actor: &mut Actor<H>, at: Gpa, bytes: u64) {
        // A fault that made a shadow had the writer, as we have it now: it saw the write, or we see
        // its page.
        if self.pages.indirect() == 0 || bytes == 0 {
            return;
        }
        let last = self.mmu.config().max_gfn_exclusive().address().get();
        let end = at.get().saturating_add(bytes).min(last);
        let mut from = at.get();
        while from < end {
            // In a section of its own, each 512 pages.
            let page = from & !(PAGE_SIZE - 1);
            let until = end.min(page.saturating_add(to_u64(ENTRIES) * PAGE_SIZE));
            self.work(actor, |work| work.wrote_range(from, until));
            from = until;
        }
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    fn wrote_range(&mut self, mut from: u64, end: u64) {
        while from < end {
            let offset = from % PAGE_SIZE;
            let here = (end - from).min(PAGE_SIZE - offset);
            let write = Write { gfn: Gfn::containing(Gpa::new(from)), offset, bytes: here };
            self.wrote(write);
            from = from.saturating_add(here);
        }
    }

    fn wrote(&mut self, write: Write) {
        let mut after = None;
        while let Some(id) = self.next_shadow(write.gfn, after) {
            after = Some(id);
            self.writer.stats.table_writes += 1;
            let Some(page) = self.writer.pages.get_mut(id) else { return self.broken() };
            let odd = is_odd(page, write);
            let flooded = page.level() > Level::L1 && {
                page.writes = page.writes.saturating_add(1);
                page.writes >= FLOOD
            };
            if odd || flooded {
                self.writer.stats.floods += 1;
                self.zap_page(id);
                // Others may have gone with it: from the start, one page shorter.
                after = None;
                continue;
            }
            let Some(page) = self.writer.pages.get(id) else { return self.broken() };
            for index in entries_of(page, write) {
                let _ = self.drop_entry(SpteRef::new(id, index));
            }
        }
    }

    /// A shadow of the table, the one after `after`.
    fn next_shadow(&self, gfn: Gfn, after: Option<PageId>) -> Option<PageId> {
        let shadows =
            |page: &ShadowPage| page.shadows_a_table() && !page.role.has(RoleFlags::INVALID);
        let mut of_gfn = self.writer.pages.of_gfn(gfn).filter(|(_, page)| shadows(page));
        match after {
            None => of_gfn.next().map(|(id, _)| id),
            Some(after) => of_gfn.skip_while(|(id, _)| *id != after).nth(1).map(|(id, _)| id),
        }
    }
}

const fn entry_bytes(page: &ShadowPage) -> u64 {
    if page.role.has(RoleFlags::FOUR_BYTES) { 4 } else { 8 }
}

/// Not a write to one entry: the page may be no table any more. A single byte at the start of an
/// entry may be, for some guests clear an entry's low bits so.
fn is_odd(page: &ShadowPage, write: Write) -> bool {
    let entry = entry_bytes(page);
    if write.offset % entry == 0 && write.bytes == 1 {
        return false;
    }
    let (first, last) = (write.offset / entry, (write.offset + write.bytes - 1) / entry);
    first != last || write.bytes < 4
}

/// Entries of the page that stand for what was written.
fn entries_of(page: &ShadowPage, write: Write) -> core::ops::Range<usize> {
    if !page.role.has(RoleFlags::FOUR_BYTES) {
        let index = to_index(write.offset / 8);
        return index..index + 1;
    }
    // An entry at level 2 maps 4 MiB, two of ours; the page has a half or a quarter of them.
    let scale = if page.level() == Level::L2 { 2 } else { 1 };
    let index = to_index(write.offset / 4) * scale;
    let quadrant = to_u64(index / ENTRIES);
    if quadrant != u64::from(page.role.quadrant()) {
        return 0..0;
    }
    let index = index % ENTRIES;
    index..index + scale
}
