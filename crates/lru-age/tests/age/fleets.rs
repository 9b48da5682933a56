//! Turns among VMs (KVM row 5.34): nobody starves, shares are kept, rounds are even.

use std::collections::HashMap;

use lru_age::{AgeError, AgePass, AgeTable, Fleet, Outcome};
use mmu_core::addr::to_u64;
use mmu_core::traits::AgeMode;

use crate::fake::{BLOCK, FakeMmu, Rng, table_over};

#[test]
fn every_vm_has_its_turn_before_any_has_its_second() {
    for seed in 0..20 {
        let mut fleet = Fleet::new(50, seed).unwrap();
        (0..50).for_each(|key| {
            fleet.add(key, 1000).unwrap();
        });
        assert_eq!(fleet.add(50, 1000), Err(AgeError::FleetFull { room: 50 }));
        let mut turns = [0_u64; 50];
        for _ in 0..500 {
            let turn = fleet.turn().unwrap();
            assert_eq!(turn.entries, 1000);
            turns[usize::try_from(turn.key).unwrap()] += 1;
            let most = turns.iter().max().unwrap();
            let least = turns.iter().min().unwrap();
            assert!(most - least <= 1, "seed {seed}: {turns:?}");
            fleet.done(turn, 1000, Outcome::Finished);
        }
        assert!(fleet.rounds() >= 9, "{}", fleet.rounds());
    }
}

/// Random work, budgets overspent and underspent: over time, entries are shared by weight.
#[test]
fn entries_are_shared_by_weight_whatever_turns_cost() {
    for seed in 0..10 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let mut fleet = Fleet::new(8, seed).unwrap();
        let weights = [1000, 1000, 1000, 2000, 2000, 3000, 3000, 500];
        for (key, &weight) in (0..).zip(&weights) {
            fleet.add(key, weight).unwrap();
        }
        let mut spent: HashMap<u64, u64> = HashMap::new();
        for _ in 0..8000 {
            let turn = fleet.turn().unwrap();
            // A table is always done whole, so turns cost a little more than allowed, or much less.
            let cost = turn.entries * 3 / 4 + rng.below(1 + turn.entries / 2);
            *spent.entry(turn.key).or_default() += cost;
            fleet.done(turn, cost, Outcome::More);
        }
        let per_weight: Vec<u64> =
            (0..).zip(&weights).map(|(key, weight)| spent[&key] * 1000 / weight).collect();
        let (min, max) = (per_weight.iter().min().unwrap(), per_weight.iter().max().unwrap());
        assert!(max - min <= max / 100, "seed {seed}: {per_weight:?}");
    }
}

#[test]
fn outcomes_decide_who_is_next() {
    let mut fleet = Fleet::new(4, 1).unwrap();
    let vms: Vec<_> = (0..4).map(|key| fleet.add(key, 10).unwrap()).collect();
    let urgent = fleet.turn().unwrap();
    fleet.done(urgent, 25, Outcome::Urgent);
    let again = fleet.turn().unwrap();
    assert_eq!((again.key, again.entries), (urgent.key, 1), "at once, but it is in debt");
    fleet.done(again, 0, Outcome::Finished);
    // The others have theirs before it comes again; who is not done stays in this round.
    let mut seen = Vec::new();
    for _ in 0..6 {
        let turn = fleet.turn().unwrap();
        seen.push(turn.key);
        let done = seen.iter().filter(|&&key| key == turn.key).count() == 2;
        fleet.done(turn, 10, if done { Outcome::Finished } else { Outcome::More });
    }
    assert!(!seen.contains(&urgent.key), "{seen:?}");
    assert_eq!(
        fleet.turn().map(|turn| turn.key == urgent.key || seen.contains(&turn.key)),
        Some(true)
    );
    assert_eq!(fleet.len(), 4);
    vms.iter().for_each(|&vm| fleet.remove(vm));
    assert!(fleet.is_empty() && fleet.turn().is_none());
}

#[test]
fn vms_may_leave_and_come_at_any_moment() {
    for seed in 0..10 {
        let mut rng = Rng(seed);
        let mut fleet = Fleet::new(16, seed).unwrap();
        let mut there = HashMap::new();
        let mut running = Vec::new();
        for key in 0..5000 {
            match rng.below(6) {
                0 => match fleet.add(key, 100) {
                    Ok(vm) => assert_eq!(there.insert(key, vm), None),
                    Err(error) => {
                        assert_eq!((error, there.len()), (AgeError::FleetFull { room: 16 }, 16));
                    }
                },
                1 if !there.is_empty() => {
                    let all: Vec<u64> = there.keys().copied().collect();
                    let gone = all[usize::try_from(rng.below(to_u64(all.len()))).unwrap()];
                    fleet.remove(there.remove(&gone).unwrap());
                }
                2 | 3 => {
                    if let Some(turn) = fleet.turn() {
                        assert!(there.contains_key(&turn.key), "seed {seed}: a ghost");
                        assert!(running.iter().all(|other: &lru_age::Turn| other.key != turn.key));
                        running.push(turn);
                    } else {
                        let away = |key| running.iter().any(|turn| turn.key == key);
                        assert!(there.keys().all(|&key| away(key)), "seed {seed}");
                    }
                }
                _ => {
                    if let Some(turn) = running.pop() {
                        let all =
                            [Outcome::More, Outcome::Finished, Outcome::Urgent, Outcome::Leaving];
                        fleet.done(
                            turn,
                            rng.below(300),
                            all[usize::try_from(rng.below(4)).unwrap()],
                        );
                    }
                }
            }
            running.retain(|turn| there.contains_key(&turn.key));
            assert_eq!(fleet.len(), to_u64(there.len()));
        }
    }
}

/// A place is given out again, a name is not.
#[test]
fn names_of_removed_vms_name_nobody() {
    let mut fleet = Fleet::new(1, 1).unwrap();
    let old = fleet.add(7, 10).unwrap();
    let late = fleet.turn().unwrap();
    fleet.remove(old);
    fleet.remove(old);
    // The embedder may use a key again too.
    let new = fleet.add(7, 10).unwrap();
    assert_ne!(old, new);
    fleet.remove(old);
    assert_eq!(fleet.len(), 1, "the stale name removed nobody");
    let turn = fleet.turn().unwrap();
    assert_eq!(turn.vm, new);
    fleet.done(late, 0, Outcome::Finished);
    assert!(fleet.turn().is_none(), "the stale turn gave nothing back");
    fleet.done(turn, 10, Outcome::Finished);
    assert_eq!(fleet.turn().map(|turn| turn.vm), Some(new));
    fleet.remove(new);
    assert!(fleet.is_empty() && fleet.turn().is_none());
}

/// One thread ages many VMs of different sizes in slices: all of them advance together.
#[test]
fn one_thread_ages_many_vms_evenly() {
    let sizes = [1, 2, 3, 8, 20];
    let vms: Vec<(FakeMmu, AgeTable)> = sizes
        .iter()
        .map(|&blocks| {
            let mmu = FakeMmu::new(blocks);
            mmu.map(0..blocks * BLOCK);
            let table = table_over(&mmu);
            (mmu, table)
        })
        .collect();
    let mut fleet = Fleet::new(8, 3).unwrap();
    (0..5).for_each(|key| {
        fleet.add(key, 2 * BLOCK).unwrap();
    });
    let mut paused: Vec<Option<lru_age::PausedPass>> = vec![None; 5];
    for _ in 0..400 {
        let turn = fleet.turn().unwrap();
        let at = usize::try_from(turn.key).unwrap();
        let (mmu, table) = &vms[at];
        let mut pass = match paused[at].take() {
            Some(state) => state.resume(table).unwrap(),
            None => AgePass::start(table, AgeMode::Clear).unwrap(),
        };
        let before = pass.progress().counts.entries;
        let progress = pass.step(mmu, &mut (), turn.entries);
        let spent = progress.counts.entries - before;
        if progress.next.is_none() {
            let _ = pass.finish(0);
            fleet.done(turn, spent, Outcome::Finished);
        } else {
            paused[at] = Some(pass.pause());
            fleet.done(turn, spent, Outcome::More);
        }
        let passes = vms.iter().map(|(_, table)| table.window().max_seq().get());
        let (least, most) = (passes.clone().min().unwrap(), passes.max().unwrap());
        assert!(most - least <= 1, "a small VM ran ahead: {least} to {most}");
    }
    assert!(vms[4].1.window().max_seq().get() > 15);
}
