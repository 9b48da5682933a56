//! A vCPU's handle on shadow tables: its roots.
//!
//! Owns [`ShadowVcpu`]: the root that the vCPU runs on, up to three it ran on before (KVM row
//! 4.36), and what its guest's flushes mean (rows 4.36 to 4.38). A root in the cache is counted and
//! stays; what a guest flushes is synchronised before the vCPU runs on.

use alloc::sync::Arc;
use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, Gpa, Gva, Hpa, Level};
use mmu_core::epoch::EpochError;
use mmu_core::fault::FaultError;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::error::ShadowError;
use crate::fetch::{Attempt, shadow_index};
use crate::guest::{EntryFormat, GuestMem, GuestRoot, GuestWalker, NestedWalker};
use crate::mmu::ShadowMmu;
use crate::page::ShadowPage;
use crate::role::{PageRole, RoleFlags};
use crate::root::{Held, RootKey};
use crate::spte_ref::{PageId, SpteRef};
use crate::sync::Synced;
use crate::writer::{ShadowWriter, Work, WriterLock};

/// Roots that a vCPU keeps beside the one it runs on (KVM row 4.36).
pub const FORMER_ROOTS: usize = 3;
/// Rounds of a synchronisation before others have a turn with the writer; each but the last made a
/// page follow its table, or protected one.
const ROUNDS: u32 = 16;
/// Turns of a synchronisation.
const MAX_TURNS: u32 = 1 << 16;

/// A vCPU. See the file's head.
pub struct ShadowVcpu<F: SpteFormat, H: Host> {
    pub(crate) mmu: Arc<ShadowMmu<F, H>>,
    pub(crate) actor: Actor<H>,
    /// Role of the current root.
    pub(crate) role: PageRole,
    pub(crate) root: Option<Held>,
    former: ArrayVec<Held, FORMER_ROOTS>,
    /// [`ShadowMmu::reloads`] when the root was found.
    good_at: u64,
}

impl<F: SpteFormat, H: Host> ShadowVcpu<F, H> {
    /// A vCPU without a root.
    ///
    /// # Errors
    /// [`EpochError`]: the VM has as many threads as it was made for.
    pub fn new(mmu: &Arc<ShadowMmu<F, H>>) -> Result<Self, EpochError> {
        let actor = mmu.vm().actor()?;
        let role = PageRole::new(mmu.config().levels(), RoleFlags::empty());
        Ok(Self {
            mmu: Arc::clone(mmu),
            actor,
            role,
            root: None,
            former: ArrayVec::new(),
            good_at: 0,
        })
    }

    /// The thread's handle.
    pub fn actor(&mut self) -> &mut Actor<H> {
        &mut self.actor
    }

    /// The guest loads CR3 with the address of the table in `gfn`: as
    /// [`load_guest_root`](Self::load_guest_root), in every mode but PAE's.
    ///
    /// # Errors
    /// [`ShadowError`]; the vCPU is on its former root.
    #[doc(alias = "kvm_mmu_new_pgd")]
    pub fn load_root<M, L>(
        &mut self,
        lock: &L,
        guest: &GuestWalker,
        mem: &M,
        gfn: Gfn,
        role: PageRole,
    ) -> Result<Hpa, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        self.load_guest_root(lock, guest, mem, &GuestRoot::Cr3(gfn.address().get()), role)
    }

    /// The guest loads CR3, or whatever makes a processor load it: run on a shadow of the tables at
    /// `root`, in `role`, whose level is that of the guest's top tables (any without paging). Also
    /// what the guest does to flush everything that is not global, so the root follows the guest's
    /// tables when this returns. That the tables are no memory is no error: nothing is mapped then,
    /// and walks say why.
    ///
    /// The address is for the CPU, which loads it with a flush of its own. A CPU that keeps the top
    /// entries of PAE tables in registers has to load them anew after each fault and each flush;
    /// entering the guest does.
    ///
    /// # Errors
    /// [`ShadowError`]; the vCPU is on its former root.
    pub fn load_guest_root<M, L>(
        &mut self,
        lock: &L,
        guest: &GuestWalker,
        mem: &M,
        root: &GuestRoot,
        role: PageRole,
    ) -> Result<Hpa, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        self.load(lock, guest.format(), mem, root, role)
    }

    /// The guest hypervisor enters its guest on the nested tables at `root`: its EPT pointer or
    /// nested CR3. As [`load_guest_root`](Self::load_guest_root); the handle is one for the nested
    /// guest's tables, whose roots are kept apart from those of the hypervisor's (KVM rows 4.39,
    /// 4.59). `space` is the address space.
    ///
    /// # Errors
    /// [`ShadowError`]; the vCPU is on its former root.
    #[doc(alias = "kvm_init_shadow_ept_mmu")]
    pub fn load_nested_root<M, L>(
        &mut self,
        lock: &L,
        nested: &NestedWalker,
        mem: &M,
        root: u64,
        space: u16,
    ) -> Result<Hpa, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        let format = nested.format();
        let level = format.mode().root_level().unwrap_or(Level::L4);
        let role = PageRole::new(level, RoleFlags::empty()).in_space(space);
        self.load(lock, format, mem, &GuestRoot::Cr3(root), role)
    }

    fn load<M, L>(
        &mut self,
        lock: &L,
        guest: EntryFormat<'_>,
        mem: &M,
        root: &GuestRoot,
        role: PageRole,
    ) -> Result<Hpa, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        let key = RootKey::of(guest, root, role, self.mmu.config().levels())?;
        self.actor.top_up(1)?;
        let (root, mut synced, address) = lock.with(|writer| {
            writer.reserve_pages(1, role.space(), core::iter::once(key.gfn))?;
            writer.make_room(&mut self.actor, 1);
            let page = self.find_root(writer, key)?;
            if self.page() != Some(page) {
                writer.hold_root(page);
                self.switch_to(writer, Held { page, key });
            }
            self.role = key.role;
            self.good_at = self.mmu.reloads();
            let address = writer.pages.get(page).ok_or(FaultError::NoRoot)?.frame.address();
            Ok::<_, ShadowError>((page, self.sync_root(writer, guest, mem, page), address))
        })?;
        // Held, it stays where it is.
        for _ in 0..MAX_TURNS {
            if synced {
                break;
            }
            synced = lock.with(|writer| self.sync_root(writer, guest, mem, root));
        }
        Ok(address)
    }

    /// The current root.
    pub(crate) fn page(&self) -> Option<PageId> {
        self.root.map(|held| held.page)
    }

    fn find_root(
        &mut self,
        writer: &mut ShadowWriter<F, H>,
        key: RootKey,
    ) -> Result<PageId, ShadowError> {
        let RootKey { gfn, role, .. } = key;
        let found = if key.is_private() {
            let mine = self.root.iter().chain(&self.former).filter(|held| held.key == key);
            mine.map(|held| held.page).find(|page| writer.is_current(*page))
        } else {
            writer.pages.find(gfn, role, writer.generation)
        };
        if let Some(root) = found {
            return Ok(root);
        }
        writer.unwatched = None;
        let made = writer
            .work_with_frames(&mut self.actor, |work, cache| work.make_page(cache, gfn, role));
        if let Some(error) = writer.unwatched.take() {
            return Err(error.into());
        }
        match made {
            Ok(root) => Ok(root),
            Err(Attempt::Again | Attempt::Room | Attempt::Done(_) | Attempt::Filled(_)) => {
                Err(ShadowError::NoMemory { bytes: 0 })
            }
        }
    }

    /// Make `root`, which is held, the current one; the former goes to the cache, whose oldest
    /// goes.
    fn switch_to(&mut self, writer: &mut ShadowWriter<F, H>, root: Held) {
        let former = self.root.replace(root);
        let Some(former) = former else { return };
        if let Some(at) = self.former.iter().position(|cached| cached.page == root.page) {
            // Held twice for a moment: by the cache and as the current one.
            self.former.remove(at);
            writer.release_root(&mut self.actor, root.page);
        }
        if self.former.is_full() {
            let oldest = self.former.remove(0);
            writer.release_root(&mut self.actor, oldest.page);
        }
        self.former.push(former);
    }

    /// Some rounds; is all in sync?
    fn sync_root<M: GuestMem + ?Sized>(
        &mut self,
        writer: &mut ShadowWriter<F, H>,
        guest: EntryFormat<'_>,
        mem: &M,
        root: PageId,
    ) -> bool {
        let mut round = || writer.work(&mut self.actor, |work| work.sync_tree(guest, mem, root));
        let rounds = if mmu_core::busted!("sync_keeps_the_writer") { u32::MAX } else { ROUNDS };
        (0..rounds).any(|_| round() == Synced::All)
    }

    /// The guest flushed everything, or everything of one address space: the current root follows
    /// its tables, former ones that do not are forgotten (KVM rows 4.36, 4.38). The caller flushes
    /// the CPU.
    #[doc(alias = "kvm_mmu_sync_roots")]
    pub fn guest_flushed<M, L>(&mut self, lock: &L, guest: &GuestWalker, mem: &M)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        self.flushed(lock, guest.format(), mem);
    }

    /// The guest hypervisor executed INVEPT, or flushed the nested guest's addresses: as
    /// [`guest_flushed`](Self::guest_flushed), for its nested tables (KVM row 4.39).
    #[doc(alias = "handle_invept")]
    pub fn nested_flushed<M, L>(&mut self, lock: &L, nested: &NestedWalker, mem: &M)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        self.flushed(lock, nested.format(), mem);
    }

    fn flushed<M, L>(&mut self, lock: &L, guest: EntryFormat<'_>, mem: &M)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        for _ in 0..MAX_TURNS {
            let done = lock.with(|writer| {
                let root = self.page();
                if root.is_some_and(|root| !self.sync_root(writer, guest, mem, root)) {
                    return false;
                }
                self.forget_stale(writer);
                true
            });
            if done {
                return;
            }
        }
    }

    /// Leave the former roots that do not follow their tables.
    fn forget_stale(&mut self, writer: &mut ShadowWriter<F, H>) {
        let stale = |held: &Held| writer.pages.get(held.page).is_none_or(ShadowPage::needs_sync);
        let gone: ArrayVec<Held, FORMER_ROOTS> =
            self.former.iter().copied().filter(stale).collect();
        self.former.retain(|held| !gone.contains(held));
        for root in gone {
            writer.release_root(&mut self.actor, root.page);
        }
    }

    /// The guest flushed one linear address (KVM row 4.37): in the current root and the former
    /// ones, because a global page is none root's alone. The caller flushes the CPU. Nothing
    /// happens for an address that is not canonical.
    #[doc(alias = "kvm_mmu_invlpg")]
    pub fn guest_invalidated<M, L>(&mut self, lock: &L, guest: &GuestWalker, mem: &M, gva: Gva)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        if !guest.is_canonical(gva) {
            return;
        }
        self.invalidated(lock, guest.format(), mem, gva);
    }

    /// A nested fault at `gpa` goes to the guest hypervisor, which need not flush that address any
    /// more: as [`guest_invalidated`](Self::guest_invalidated) for its nested tables (KVM row
    /// 4.39). The caller flushes the CPU.
    pub fn nested_invalidated<M, L>(&mut self, lock: &L, nested: &NestedWalker, mem: &M, gpa: Gpa)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        self.invalidated(lock, nested.format(), mem, Gva::new(gpa.get()));
    }

    fn invalidated<M, L>(&mut self, lock: &L, guest: EntryFormat<'_>, mem: &M, gva: Gva)
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        lock.with(|writer| {
            for root in self.root.iter().chain(&self.former).map(|held| held.page) {
                writer.work(&mut self.actor, |work| work.invalidate(guest, mem, root, gva));
            }
        });
    }

    /// Is a root loaded, and still good? Ask before **every** entry into the guest, in this order:
    /// announce the entry where your [`TlbFlush::wait`](mmu_core::traits::TlbFlush::wait) looks for
    /// it, execute a full barrier, then ask; if the answer is no, take the announcement back and
    /// load the root again. What makes a root bad waits for announced vCPUs
    /// ([`FlushScope::Reload`](mmu_core::flush::FlushScope::Reload)), and may hold the writer
    /// meanwhile, so this takes no lock: one load. When a root of another vCPU became bad the
    /// answer is no as well; loading finds the root again.
    #[must_use]
    pub fn root_is_current(&self) -> bool {
        self.root.is_some() && self.mmu.reloads() == self.good_at
    }

    /// Leave all roots: before the vCPU goes.
    pub fn drop_roots<L: WriterLock<F, H>>(&mut self, lock: &L) {
        lock.with(|writer| {
            for root in self.root.take().into_iter().chain(self.former.take()) {
                writer.release_root(&mut self.actor, root.page);
            }
        });
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for ShadowVcpu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowVcpu")
            .field("root", &self.root)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    fn hold_root(&mut self, root: PageId) {
        if let Some(page) = self.pages.get_mut(root) {
            page.roots += 1;
            page.used = true;
        }
    }

    /// Is the page one that a vCPU may start from?
    pub(crate) fn is_current(&self, root: PageId) -> bool {
        self.pages.get(root).is_some_and(|page| {
            page.generation == self.generation && !page.role.has(RoleFlags::INVALID)
        })
    }

    /// A vCPU does not need the root any more. An invalid one goes with its last, and so does one
    /// that nobody else can find.
    fn release_root(&mut self, actor: &mut Actor<H>, root: PageId) {
        let Some(page) = self.pages.get_mut(root) else { return };
        page.roots = page.roots.saturating_sub(1);
        let (roots, role) = (page.roots, page.role);
        if roots == 0 && role.has(RoleFlags::INVALID) {
            self.work(actor, |work| work.free(root));
        } else if roots == 0 && role.has(RoleFlags::PASSTHROUGH) {
            self.work(actor, |work| work.zap_page(root));
        }
    }

    /// Take the memory for `count` pages, shadows of tables in these frames.
    pub(crate) fn reserve_pages(
        &mut self,
        count: u32,
        space: u16,
        tables: impl Iterator<Item = Gfn>,
    ) -> Result<(), ShadowError> {
        self.pages.reserve(usize::try_from(count).unwrap_or(usize::MAX))?;
        for id in self.pages.upcoming(count) {
            self.mmu.reserve_frame(id)?;
        }
        for gfn in tables {
            self.blocks.reserve(space, gfn)?;
        }
        Ok(())
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Make the entry for `gva` follow the guest's, if its page is out of sync.
    fn invalidate<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        root: PageId,
        gva: Gva,
    ) {
        let mut at = root;
        for _ in Level::ALL {
            let Some(page) = self.writer.pages.get(at).filter(|page| page.needs_sync()) else {
                return;
            };
            let place = SpteRef::new(at, shadow_index(gva, page.level()));
            if page.unsync {
                if !self.sync_entry(guest, mem, place) {
                    let _ = self.drop_entry(place);
                }
                // The CPU may have what the entry was before an earlier change.
                if let Some(key) = self.key_of(place) {
                    self.owe(key.gfn, 1);
                }
                return;
            }
            let Some(child) = self.child_at(place) else { return };
            at = child;
        }
    }
}
