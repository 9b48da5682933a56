//! Epochs on real threads; the interleavings are explored in `tests/loom_epoch.rs`.

use super::grace::Grace;
use super::publish::Published;
use super::*;
use crate::spin::SpinLock;
use crate::sync::relax;

#[expect(clippy::expect_used, reason = "a test helper")]
fn domain(capacity: usize) -> Arc<EpochDomain> {
    EpochDomain::new(capacity, relax).expect("capacity in range")
}

#[test]
fn capacities_out_of_range_are_named() {
    for asked in [0, MAX_PARTICIPANTS + 1] {
        let error = EpochDomain::new(asked, relax).expect_err("out of range");
        assert_eq!(error, EpochError::Capacity { asked, max: MAX_PARTICIPANTS });
    }
}

#[test]
fn a_full_domain_says_so_and_a_dropped_participant_makes_room() {
    let domain = domain(2);
    let first = domain.register().expect("room");
    let _second = domain.register().expect("room");
    assert_eq!(domain.register().expect_err("full"), EpochError::Full { capacity: 2 });
    drop(first);
    assert_eq!(domain.register().expect("room again").index(), 0);
}

#[test]
fn a_grace_period_lasts_as_long_as_the_sections_open_at_its_start() {
    let domain = domain(3);
    let mut reader = domain.register().expect("room");
    let mut late = domain.register().expect("room");
    let grace = Grace::new();
    let lock = SpinLock::new(relax);
    let lock = lock.lock();
    assert!(!grace.elapsed(&domain, &lock), "none running");
    let section = reader.pin();
    grace.start(&domain, &lock);
    let _later = late.pin();
    assert!(!grace.elapsed(&domain, &lock), "a section of the start is open");
    drop(section);
    assert!(grace.elapsed(&domain, &lock), "sections opened later do not count");
    assert_eq!(grace.completed(), 1);
    let _again = reader.pin();
    assert!(!grace.is_running(&lock));
}

#[test]
fn a_published_value_changes_under_readers_without_tearing() {
    let domain = domain(3);
    let (published, mut writer) = Published::new(Arc::clone(&domain), [0u64; 64], [0u64; 64]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut reader = domain.register().expect("room");
            let published = Arc::clone(&published);
            scope.spawn(move || {
                let mut last = 0;
                while last < 2000 {
                    let guard = reader.pin();
                    let value = published.read(&guard);
                    let first = value[0];
                    assert!(value.iter().all(|&x| x == first), "torn: {value:?}");
                    assert!(first >= last, "went back from {last} to {first}");
                    last = first;
                }
            });
        }
        let mut own = domain.register().expect("room");
        for round in 1..=2000 {
            *writer.spare() = [round; 64];
            writer.publish(&mut own);
            assert_eq!(writer.live()[0], round);
        }
    });
}

#[test]
fn a_publication_cut_short_by_a_panic_never_lends_a_buffer_that_is_read() {
    let domain = domain(2);
    let (published, mut writer) = Published::new(Arc::clone(&domain), 1u64, 2u64);
    let mut reader = domain.register().expect("room");
    let mut own = domain.register().expect("room");
    let section = reader.pin();
    assert_eq!(*published.read(&section), 1);
    let cut = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| {
        writer.publish_at(&mut own, |swap| {
            swap();
            panic!("the embedder's callback");
        });
    }));
    assert!(cut.is_err());
    let lent = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| *writer.spare()));
    assert!(lent.is_err(), "the reader still borrows the former buffer");
    drop(section);
    writer.publish(&mut own);
    assert_eq!((*writer.live(), *writer.spare()), (1, 2));
}

#[test]
#[should_panic(expected = "pinned in another domain")]
fn a_guard_of_another_domain_is_refused() {
    let (published, _writer) = Published::new(domain(1), 1, 2);
    let mut stranger = domain(1).register().expect("room");
    let guard = stranger.pin();
    published.read(&guard);
}

#[test]
fn a_leaked_guard_neither_unprotects_the_next_section_nor_blocks_for_ever() {
    let domain = domain(2);
    let mut reader = domain.register().expect("room");
    let lock = SpinLock::new(relax);
    let lock = lock.lock();
    let grace = Grace::new();
    core::mem::forget(reader.pin());
    let section = reader.pin();
    grace.start(&domain, &lock);
    assert!(!grace.elapsed(&domain, &lock), "the section after the leak protects");
    drop(section);
    assert!(grace.elapsed(&domain, &lock));
    core::mem::forget(reader.pin());
    drop(reader);
    domain.register().expect("room").synchronize();
    assert_eq!(domain.open_sections(), 0);
}
