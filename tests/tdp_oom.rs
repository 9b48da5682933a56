//! No memory, at every point (T18, invariant I22): the error names values, nothing has changed, and
//! the call succeeds when there is memory again.

mod common;

use common::map_spec::Map;
use common::world::{Op, World};
use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, linear, range, request};
use mmu_core::access::Access;
use mmu_core::addr::Level;
use mmu_core::fault::FaultError;
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept};
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, Random};
use tdp_mmu::{DirtyTracking, RootError, TdpOptions};

/// What must be as before: everything a guest or an owner of the VM can see.
fn state<F: Modelled>(world: &mut World<F>) -> (Vec<u64>, u64) {
    world.compare();
    let gauges = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G, Counter::Tables];
    let values = gauges.map(|counter| world.guest.stat(counter)).to_vec();
    // Frames that the failed call took stay in the caches of its thread, ready for the next try.
    let cached = world.cached();
    (values, world.guest.mmu.vm().pool().frames_in_use() - cached)
}

/// Run a script with the calls `from..until` of `provide` refused; a call that fails is made again
/// when there is memory. Gives the number of calls refused.
fn inject<F: Modelled>(caps: Capabilities, script: &[Op], from: u64, until: u64) -> (u64, u64) {
    let shape = Shape { spaces: 2, frames: 256, ..Shape::new(caps) };
    let mut world = World::<F>::with(shape);
    let mut random = Random::new(4);
    world.populate(&mut random);
    let base = world.guest.host().provides();
    world.guest.host().refuse(base.saturating_add(from), base.saturating_add(until));
    let mut failures = 0;
    for op in script {
        let spec: Map = world.spec.clone();
        // Looking at everything is slow: only around the point of failure.
        let (now, point) = (world.guest.host().provides(), base.saturating_add(from));
        let due = now <= point || (until == u64::MAX && failures == 0);
        let near = due && now.saturating_add(16) >= point;
        let before = near.then(|| {
            // A call that needs a root makes it first, which may succeed where the rest fails.
            let _ = world.load_roots();
            state(&mut world)
        });
        if let Err(text) = world.run(*op) {
            failures += 1;
            assert!(text.contains("table frames needed"), "it says what is missing: {text}");
            if let Some(before) = before {
                // A prefault keeps what it has done, and the model has done the same.
                if !matches!(op, Op::Prefault { .. }) {
                    assert_eq!(state(&mut world), before, "{op:?} failed and changed something");
                    assert_eq!(spec.spaces, world.spec.spaces);
                }
            }
            world.guest.host().refuse(u64::MAX, u64::MAX);
            world.run(*op).expect("there is memory again");
        }
    }
    world.guest.host().refuse(u64::MAX, u64::MAX);
    world.settle();
    world.compare();
    let provides = world.guest.host().provides() - base;
    world.finish();
    (failures, provides)
}

fn scripts<F: Modelled>(caps: Capabilities, points: &mut u64, failed: &mut u64) {
    for seed in 0..2 {
        let mut random = Random::new(seed);
        let mut script: Vec<Op> = (0..400).map(|_| Op::decode(random.next_u64())).collect();
        // Far apart, so that every fault needs tables of its own.
        script.extend((0..40).map(|n| Op::Fault {
            space: (n & 1) as u8,
            gfn: BASE + n * 3 * M2,
            kind: AccessKind::Write,
            level: 1,
            lie: false,
        }));
        let (none, provides) = inject::<F>(caps, &script, u64::MAX, u64::MAX);
        assert_eq!(none, 0);
        for k in 0..provides {
            // From the k-th on, and only the k-th.
            for until in [u64::MAX, k + 1] {
                let (failures, _) = inject::<F>(caps, &script, k, until);
                *points += 1;
                *failed += failures;
            }
        }
    }
}

// INVARIANT[I22].
#[test]
fn running_out_of_frames_at_any_point_changes_nothing() {
    let (mut points, mut failed) = (0, 0);
    for_each_format!(scripts, &mut points, &mut failed);
    println!("{points} points at which memory was refused, {failed} calls failed");
    assert!(points >= 1000 && failed >= 500, "{points} {failed}");
}

/// A pool that is really empty, not scripted: the values of the error add up.
// INVARIANT[I14].
#[test]
fn an_empty_pool_is_named_and_a_new_frame_mends_it() {
    for frames in 1..40 {
        let shape = Shape { frames, ..Shape::new(Capabilities::ept()) };
        let mut guest = Guest::<Ept>::without_root(shape);
        guest.slot(0, BASE, 4 * G1, DATA, SlotFlags::empty());
        guest.vcpu.load_root().expect("one frame is enough for a root");
        let mut mapped = 0;
        let error = loop {
            match guest.try_fault(BASE + mapped * M2, AccessKind::Write, Level::L1) {
                Ok(_) => mapped += 1,
                Err(error) => break error,
            }
        };
        let FaultError::OutOfFrames(inner) = error else { panic!("{error}") };
        assert!(inner.wanted > inner.found && inner.found < 5, "{error}");
        assert!(error.to_string().contains(&inner.wanted.to_string()), "{error}");
        let count = guest.check();
        assert_eq!(count.leaves, [mapped, 0, 0]);
        let prefault = guest.vcpu.prefault(range(BASE + mapped * M2, BASE + G1), Access::WRITE);
        assert_eq!(prefault, Err(error));
        assert_eq!(guest.check(), count);
        // Everything goes and comes back: the frames are usable again.
        let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
        guest.vcpu.unload_root();
        let _ = guest.vcpu.load_root().expect("frames came back");
        for n in 0..mapped {
            guest.map([BASE + n * M2], AccessKind::Write, Level::L1);
        }
        guest.finish();
    }
}

#[test]
fn a_root_without_a_frame_is_an_error_and_the_old_root_stays() {
    let shape = Shape { frames: 64, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::without_root(shape);
    guest.host().refuse(0, u64::MAX);
    let Err(RootError::OutOfFrames(error)) = guest.vcpu.load_root() else {
        panic!("no frame, and a root");
    };
    assert_eq!((error.wanted, error.found, error.waiting), (1, 0, 0));
    guest.host().refuse(u64::MAX, u64::MAX);
    let root = guest.vcpu.load_root().unwrap();
    guest.host().refuse(0, u64::MAX);
    assert_eq!(guest.vcpu.load_root(), Ok(root));
    guest.host().refuse(u64::MAX, u64::MAX);
    guest.check();
    guest.finish();
}

/// A split needs one table; without it the huge page stays as it is.
#[test]
fn a_split_without_a_frame_leaves_the_huge_page() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * G1, Level::L3);
    guest.map([BASE], AccessKind::Write, Level::L3);
    guest.host().refuse(0, u64::MAX);
    let fault = mmu_core::fault::PageFault::prefetch(common::gpa(BASE + 5), Access::READ);
    // The frames cached by the first fault are enough for a few splits.
    let mut splits = 0;
    for n in 0..64 {
        let at = common::gpa(BASE + n * M2);
        let fault = mmu_core::fault::PageFault { gpa: at, ..fault }.at_most(Level::L1);
        let before = guest.check();
        match guest.vcpu.fault(&fault) {
            Ok(_) => splits += 1,
            Err(FaultError::OutOfFrames(_)) => {
                assert_eq!(guest.check(), before);
                let found = guest.found(BASE + n * M2).unwrap();
                assert_eq!((found.pfn, found.level), (DATA + n * M2, 2));
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!((1..64).contains(&splits), "{splits}");
    // Aging, unmapping and dropping everything need no memory.
    let _ = guest.age(range(BASE, BASE + G1), mmu_core::traits::AgeMode::ClearFlush);
    assert_eq!(guest.unmap(range(BASE, BASE + G1)).pages(), G1);
    guest.host().set_resolver(linear(Level::L1));
    guest.finish();
}

/// Logging needs frames to split huge pages, and does without: every write is handed out all the
/// same, and what was asked for is flushed.
#[test]
fn logging_with_frames_refused_at_any_point_hands_out_every_write() {
    // More than the threads have frames in their caches.
    let (blocks, pages) = (80, 80 * M2);
    let (mut refused, mut short) = (0, 0);
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        for (k, once) in (0..12).flat_map(|k| [(k, false), (k, true)]) {
            let mut options = TdpOptions::default();
            options.dirty = tracking;
            let shape = Shape { options, frames: 256, ..Shape::new(Capabilities::ept()) };
            let mut guest = Guest::<Ept>::with(shape);
            guest.slot(0, BASE, pages, DATA, SlotFlags::empty());
            guest.host().set_resolver(linear(Level::L2));
            let firsts = (0..blocks).map(|block| BASE + block * M2);
            guest.map(firsts, AccessKind::Write, Level::L2);
            let from = guest.host().provides() + k;
            guest.host().refuse(from, if once { from + 1 } else { u64::MAX });
            let logged = request(0, BASE, pages, DATA, SlotFlags::LOG_DIRTY);
            let split = guest.set_slot(&logged).expect("a legal slot").split;
            let huge = guest.stat(Counter::Pages2M);
            assert_eq!(split.splits + huge, blocks, "{split:?}");
            assert_eq!(split.out_of_frames.is_some(), huge > 0, "what is left is told: {split:?}");
            short += u64::from(huge > 0);
            guest.check();
            let written = (0..blocks).flat_map(|block| [block * M2, block * M2 + 63 + block]);
            for page in written.clone() {
                for _ in 0..6 {
                    if guest.touch(BASE + page, AccessKind::Write).is_ok() {
                        break;
                    }
                    let before = guest.check();
                    match guest.try_fault(BASE + page, AccessKind::Write, Level::L2) {
                        Ok(_) => {}
                        Err(FaultError::OutOfFrames(_)) => {
                            assert_eq!(guest.check(), before, "a refused fault changes nothing");
                            refused += 1;
                            guest.host().refuse(u64::MAX, u64::MAX);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            let mut words = vec![0; (pages / 64) as usize];
            let done = guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut words).unwrap();
            for page in written {
                let bit = words[(page / 64) as usize] >> (page % 64) & 1;
                assert_eq!(bit, 1, "{tracking:?}, refused from {k}: page {page}");
                let (_, spte) = guest.entry(BASE + page);
                let config = guest.config();
                assert!(!config.is_dirty(spte) || !config.is_writable(spte));
            }
            if tracking == DirtyTracking::WriteProtect {
                assert_eq!(done.pages, 2 * blocks, "and nothing else");
            }
            guest.check();
            guest.finish();
        }
    }
    assert!(refused > 0 && short > 0, "{refused} faults, {short} splits");
}
