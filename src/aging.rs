//! Accessed bits of every MMU of the VM, as one answer.
//!
//! Implements [`AgeRange`] for [`Vm`] (KVM row 5.7): a page is young if direct tables or shadow
//! tables say so. The budget bounds the direct tables' part and the shadow tables catch up with it,
//! as the roots of several address spaces do; a gfn that both map is told of by each, and what
//! counts is that either saw it used. No lock but the bit lock of one reverse map at a time.

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{
    AgeAbilities, AgeRange, AgeReport, AgeRequest, AgeSink, Effort, Host, UpperBits,
};
use mmu_core::vm::Actor;
use shadow_mmu::rmap::SPACES;
use shadow_mmu::{ShadowMmu, WriterLock};

use crate::vm::{Shadow, Vm};

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> AgeRange for Vm<F, H, L> {
    type Reader = Actor<H>;

    /// What every MMU can do that maps anything: fast answers are certain until shadow tables have
    /// mapped something.
    fn abilities(&self) -> AgeAbilities {
        let shadow = self.shadow().map(|shadow| &shadow.mmu);
        match (self.tdp(), shadow) {
            (Some(direct), None) => direct.abilities(),
            (None, Some(shadow)) => shadow.abilities(),
            (Some(direct), Some(shadow)) if maps_anything(shadow) => {
                direct.abilities().difference(AgeAbilities::FAST)
            }
            (Some(direct), Some(_)) => direct.abilities(),
            (None, None) => AgeAbilities::empty(),
        }
    }

    fn age<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        request: AgeRequest,
        sink: &mut S,
    ) -> AgeReport {
        let Some(direct) = self.tdp() else {
            let Some(Shadow { mmu, .. }) = self.shadow() else {
                return AgeReport::empty(request.range.end);
            };
            return mmu.age(reader, request, sink);
        };
        let mut total = direct.age(reader, request, sink);
        let Some(Shadow { mmu, .. }) = self.shadow() else { return total };
        if mmu_core::busted!("aging_asks_one_mmu") {
            return total;
        }
        let end = total.next;
        let mut at = request.range.start;
        while at < end {
            let budget = match request.effort {
                Effort::Fast => request.budget.saturating_sub(total.entries),
                Effort::Full => u64::MAX,
            };
            let part = request.for_range(GfnRange::new(at, end)).with_budget(budget);
            // The links above a shadow entry are those of other addresses.
            let report = mmu.age(reader, part.with_upper(UpperBits::Ignore), sink);
            // What it could not tell it has told as unknown.
            at = if request.effort == Effort::Fast { end } else { report.next };
            total = total.merge(report);
        }
        total.next = end;
        total
    }

    fn flush_aged(&self, reader: &mut Actor<H>, range: GfnRange) {
        if let Some(direct) = self.tdp() {
            direct.flush_aged(reader, range);
        }
        if let Some(Shadow { mmu, .. }) = self.shadow() {
            mmu.flush_aged(reader, range);
        }
    }
}

/// Does any list have an entry?
fn maps_anything<F: SpteFormat, H: Host>(shadow: &ShadowMmu<F, H>) -> bool {
    let end = shadow.config().max_gfn_exclusive();
    (0..).take(SPACES).any(|space| {
        let mut leaves = Level::ALL.into_iter().filter(|level| level.may_be_leaf());
        leaves.any(|level| shadow.rmaps().next(space, level, Gfn::new(0), end).is_some())
    })
}
