//! Entries around a fault, made before anybody asks for them (KVM row 4.55).
//!
//! Adds to the writer: choosing the neighbours of a fault, with nothing open, and to `Work`:
//! mapping them once the fault's own entry stands, in the same section. A neighbour is mapped as
//! not accessed, small, from a page that the host has at hand, and only where nothing is mapped;
//! the first that cannot be is the last. Without A bits in our entries there are none: they would
//! count as used.

use arrayvec::ArrayVec;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Level, PAGE_SIZE, to_u64};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{LeafSpec, SpteFormat};
use mmu_core::traits::{Host, HostPage, PageKind};

use crate::guest::{EntryFormat, GuestMem};
use crate::page::Shadowed;
use crate::resolve::Target;
use crate::rmap::{MAX_ALIASES, RmapKey};
use crate::role::PageRole;
use crate::spte_ref::SpteRef;
use crate::writer::{ShadowWriter, Work};

/// Entries of the largest window.
pub(crate) const MAX_WINDOW: usize = 8;

/// An entry beside that of a fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neighbour {
    /// Which of the page's.
    index: usize,
    gfn: Gfn,
    access: Access,
    /// The guest's entry and what it said; in a row there is none.
    entry: Option<(Gpa, u64)>,
}

/// The neighbours of a fault, in order.
pub(crate) type Neighbours = ArrayVec<Neighbour, MAX_WINDOW>;

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// With each fault that maps 4 KiB, map what an aligned window of `entries` entries around it
    /// permits and the host has at hand
    /// ([`resolve_now`](mmu_core::traits::PfnResolver::resolve_now)). A power of two, 8 at most;
    /// what is not is rounded down. 1, as it is at first, means none.
    pub fn set_prefetch(&mut self, entries: usize) {
        let entries = entries.clamp(1, MAX_WINDOW);
        self.window = 1 << entries.ilog2();
    }

    /// The neighbours of a fault, with the memory that mapping them takes.
    pub(crate) fn neighbours<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        target: &Target<'_>,
        role: PageRole,
    ) -> Neighbours {
        let mut found = Neighbours::new();
        if self.window == 1 || target.prefetch || !self.mmu.config().ad_enabled() {
            return found;
        }
        let own = crate::fetch::shadow_index(target.gva, Level::L1);
        let first = own & !(self.window - 1);
        for index in (first..first + self.window).filter(|index| *index != own) {
            let neighbour = match target.path.level {
                Level::L1 => neighbour(guest, mem, target, (own, index)),
                // The whole row permits what the guest's leaf does.
                _ => Some(in_row(target, index)),
            };
            let Some(neighbour) = neighbour else { break };
            let key = RmapKey { space: role.space(), level: Level::L1, gfn: neighbour.gfn };
            if neighbour.gfn >= self.mmu.config().max_gfn_exclusive()
                || self.rmap.reserve(key).is_err()
            {
                break;
            }
            found.push(neighbour);
        }
        if self.reserve_links(u32::try_from(found.len()).unwrap_or(0)).is_err() {
            found.clear();
        }
        found
    }
}

/// What the guest's table says for entry `index`, whose fault is at entry `own`; `None` if that
/// maps nothing, or was not used yet.
fn neighbour<M: GuestMem + ?Sized>(
    guest: EntryFormat<'_>,
    mem: &M,
    target: &Target<'_>,
    (own, index): (usize, usize),
) -> Option<Neighbour> {
    let entry = target.path.entries.iter().find(|entry| entry.level == Level::L1)?;
    let bytes = entry.width.bytes();
    // A window is aligned in the guest's table as in ours, and leaves neither.
    let first = entry.gpa.get().checked_sub(to_u64(own % MAX_WINDOW) * bytes)?;
    let at = Gpa::new(first + to_u64(index % MAX_WINDOW) * bytes);
    debug_assert!(at.get() / PAGE_SIZE == entry.gpa.get() / PAGE_SIZE, "another table");
    let value = mem.read(at, entry.width).ok()?;
    let leaf = guest.leaf(value).filter(|leaf| leaf.accessed)?;
    let access = entry.above & leaf.clean_access();
    Some(Neighbour { index, gfn: leaf.gfn, access, entry: Some((at, value)) })
}

fn in_row(target: &Target<'_>, index: usize) -> Neighbour {
    let first = target.path.gfn.align_down(Level::L2);
    let gfn = first.saturating_add(to_u64(index));
    Neighbour { index, gfn, access: target.access, entry: None }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Map the neighbours of the entry `place`, which a fault has just filled.
    pub(crate) fn prefetch<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        place: SpteRef,
        neighbours: &[Neighbour],
    ) {
        for one in neighbours {
            let spte = SpteRef::new(place.page(), one.index);
            let Some(cell) = self.cell(spte) else { return self.broken() };
            if !cell.peek().is_empty() {
                continue;
            }
            // The guest's table was read before the section. It is followed as if it were read now.
            let same = |(at, value)| mem.read(at, guest.width()) == Ok(value);
            if !one.entry.is_none_or(same) || !self.map_neighbour(spte, one) {
                return;
            }
            self.writer.stats.prefetched += 1;
        }
    }

    fn map_neighbour(&mut self, spte: SpteRef, one: &Neighbour) -> bool {
        let (Some(cell), Some(page)) = (self.cell(spte), self.writer.pages.get(spte.page())) else {
            self.broken();
            return false;
        };
        let (space, direct, gfn) = (page.role.space(), page.is_direct(), one.gfn);
        let Some(host) = self.page_at_hand(space, one) else { return false };
        let key = RmapKey { space, level: Level::L1, gfn };
        if self.writer.rmap.len(key) >= MAX_ALIASES {
            return false;
        }
        let mut access = one.access;
        if !host.writable {
            access = access.difference(Access::WRITE);
        }
        let writes = access.contains(Access::WRITE);
        // Nothing goes out of sync for a write that nobody made.
        let may_write = writes && !self.is_tracked(gfn) && self.let_go_unsync(gfn, true);
        let leaf = self.config().leaf(&LeafSpec {
            access,
            host_writable: host.writable,
            map_writable: may_write,
            mmu_writable: may_write,
            accessed: mmu_core::busted!("prefetch_counts_as_used"),
            ..LeafSpec::new(host.pfn, Level::L1)
        });
        if !self.config().is_hw_present(leaf) {
            // It would permit nothing.
            return false;
        }
        if !direct && let Some(page) = self.writer.pages.get_mut(spte.page()) {
            page.set_shadowed(spte.index(), Shadowed::new(gfn, one.access));
        }
        if self.writer.rmap.add(key, spte).is_err() {
            return false;
        }
        self.put(cell, leaf, Level::L1);
        true
    }

    /// The host page of a neighbour, if the host has it at hand and takes nothing away around it.
    /// Writes that are logged are left to faults.
    fn page_at_hand(&self, space: u16, one: &Neighbour) -> Option<HostPage> {
        let gfn = one.gfn;
        // Before the host is asked: what begins to take the page away later waits for this section.
        let snapshot = self.vm.notify().snapshot();
        let slot = *self.vm.slots().read(self.section.epoch()).find(space, gfn)?;
        let logged = slot.logs_dirty() && one.access.contains(Access::WRITE);
        if logged || slot.flags.contains(SlotFlags::INVALID) {
            return None;
        }
        let page = self.vm.host().resolve_now(&slot, gfn)?;
        if self.vm.host().kind(&slot, gfn, &page) != PageKind::RAM {
            return None;
        }
        let writable = page.writable && !slot.is_read_only();
        let taken = self.vm.notify().must_retry(self.section, snapshot, GfnRange::from_len(gfn, 1));
        let known = page.pfn < self.config().max_pfn_exclusive();
        let taken = taken && !mmu_core::busted!("prefetch_of_what_goes");
        (known && !taken).then_some(HostPage { writable, ..page })
    }
}
