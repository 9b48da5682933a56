//! Pages that the caller has at hand: mapped as given, checked as any, refused once they may be
//! somebody else's (KVM row 3.58).

mod common;

use common::{BASE, Guest, gpa, range};
use mmu_core::access::Access;
use mmu_core::addr::{Level, Pfn};
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::spte::{Capabilities, Ept};
use mmu_core::traits::HostPage;
use mmu_model::AccessKind;

fn page(pfn: u64) -> HostPage {
    HostPage { pfn: Pfn::new(pfn), writable: true, level: Level::L1 }
}

#[test]
fn a_page_at_hand_is_mapped_as_given_and_checked_as_any() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    let vm = guest.mmu.vm().clone();
    let fault = PageFault::prefetch(gpa(BASE + 3), Access::READ);
    let before = vm.notify().snapshot();
    let outcome = guest.vcpu.install_page(&fault, page(0x777), before);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    let found = guest.found(BASE + 3).expect("mapped");
    assert_eq!((found.pfn, found.level), (0x777, 1));
    let again = guest.vcpu.install_page(&fault, page(0x777), vm.notify().snapshot());
    assert_eq!(again, Ok(FaultOutcome::Spurious));

    let beyond = guest.config().max_pfn_exclusive().get();
    let other = PageFault::prefetch(gpa(BASE + 4), Access::READ);
    let bad = guest.vcpu.install_page(&other, page(beyond), vm.notify().snapshot());
    assert!(matches!(bad, Err(FaultError::BadHostPage { .. })), "{bad:?}");
    assert_eq!(guest.found(BASE + 4), None);
}

#[test]
fn a_page_that_may_be_somebody_elses_by_now_is_not_mapped() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    let vm = guest.mmu.vm().clone();
    let before = vm.notify().snapshot();
    let _ = guest.unmap(range(BASE + 5, BASE + 6));
    let fault = PageFault::prefetch(gpa(BASE + 5), Access::READ);
    assert_eq!(guest.vcpu.install_page(&fault, page(0x778), before), Ok(FaultOutcome::Retry));
    assert_eq!(guest.found(BASE + 5), None);
    assert_eq!(guest.fault(BASE + 5, AccessKind::Read, Level::L1), FaultOutcome::Fixed);
}
