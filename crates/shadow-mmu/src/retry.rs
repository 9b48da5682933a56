//! A write to a protected page: emulate it, or give the table's shadow up and let the guest do it?
//!
//! Owns [`WriteRetry`], a vCPU's memory of the last such write, and adds
//! [`unprotect`](ShadowWriter::unprotect) to the writer (KVM row 4.54). A guest that writes to what
//! once was a table must not be emulated for ever; an instruction that cannot be emulated must not
//! be tried again for ever.

use mmu_core::addr::Gfn;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::page::ShadowPage;
use crate::role::RoleFlags;
use crate::spte_ref::PageId;
use crate::writer::ShadowWriter;

/// What to do about a write to a protected page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnWriteProtected {
    /// Emulate the instruction, then report the write ([`ShadowWriter::guest_wrote`]).
    Emulate,
    /// The page has no shadow any more: let the guest execute the instruction again.
    Retry,
}

/// An instruction and the page that it wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attempt {
    rip: u64,
    gfn: Gfn,
}

/// A vCPU's memory of the last write that was tried again.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteRetry {
    last: Option<Attempt>,
}

impl WriteRetry {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: None }
    }

    /// The emulator cannot do the instruction at `rip`, which writes to `gfn`. If giving the page's
    /// shadows up helps, and was not tried for this very write, do that.
    pub fn cannot_emulate<F: SpteFormat, H: Host>(
        &mut self,
        writer: &mut ShadowWriter<F, H>,
        actor: &mut Actor<H>,
        rip: u64,
        gfn: Gfn,
    ) -> OnWriteProtected {
        let this = Attempt { rip, gfn };
        if self.last == Some(this) {
            // It was let through once and came back: the page is a table again.
            self.last = None;
            return OnWriteProtected::Emulate;
        }
        self.last = Some(this);
        if writer.unprotect(actor, gfn) {
            OnWriteProtected::Retry
        } else {
            OnWriteProtected::Emulate
        }
    }

    /// Something else happened on the vCPU: the next write is a new one.
    pub fn forget(&mut self) {
        self.last = None;
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Give up all shadows of the table in `gfn`, so that the guest may write to it without an
    /// exit. Was there any?
    #[doc(alias = "kvm_mmu_unprotect_gfn_and_retry")]
    pub fn unprotect(&mut self, actor: &mut Actor<H>, gfn: Gfn) -> bool {
        let mut any = false;
        while let Some(id) = self.shadow_of(gfn) {
            any = true;
            self.work(actor, |work| work.zap_page(id));
        }
        any
    }

    fn shadow_of(&self, gfn: Gfn) -> Option<PageId> {
        let shadows =
            |page: &ShadowPage| page.shadows_a_table() && !page.role.has(RoleFlags::INVALID);
        self.pages.of_gfn(gfn).find(|(_, page)| shadows(page)).map(|(id, _)| id)
    }
}
