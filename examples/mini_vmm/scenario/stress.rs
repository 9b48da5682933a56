//! Everything at once: vCPUs count in their pages while others zap, age, delete and re-create slots
//! and drop all roots. At the end every page holds exactly the sum that its vCPU counted.
//!
//! Holds: no increment lost, no content mixed up, every counter zero after teardown.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_model::Random;

use super::{Builder, Error, Report, Shape};
use crate::machine::Op;
use crate::vmm::{Vmm, VmmVcpu};

/// Slots that come and go; slot 0 stays.
const SLOTS: u64 = 4;

/// What the disturbers did.
#[derive(Default)]
struct Work {
    rounds: AtomicU64,
    unmaps: AtomicU64,
    pages_unmapped: AtomicU64,
    passes: AtomicU64,
    zap_alls: AtomicU64,
    slot_changes: AtomicU64,
}

/// Run it.
pub fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let pages = builder.pages(8 << 20, 64 << 20);
    let shape = Shape { slots: SLOTS, ..Shape::new(builder.options.vcpus, pages) };
    let vmm = builder.vmm(shape)?;
    let mut report = builder.report("stress", &vmm);
    println!("seed {}", builder.options.seed);
    let begun = Instant::now();
    let mut vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let tag = builder.options.seed;
    vmm.on_all(&mut vcpus, |vcpu| {
        let share = vcpu.vmm().share(vcpu.id);
        vcpu.run_pages(Op::Write, share, tag, 1)
    })?;

    let work = Work::default();
    let end = Instant::now() + Duration::from_secs(builder.options.seconds);
    let (result, disturbed) = std::thread::scope(|scope| {
        let disturbers = [
            scope.spawn(|| disturb(&vmm, builder.options.seed, end, &work, unmap_some)),
            scope.spawn(|| disturb(&vmm, builder.options.seed ^ 1, end, &work, age_some)),
            scope.spawn(|| disturb(&vmm, builder.options.seed ^ 2, end, &work, change_slot)),
            scope.spawn(|| disturb(&vmm, builder.options.seed ^ 3, end, &work, zap_all)),
        ];
        let result = vmm.on_all(&mut vcpus, |vcpu| count_until(vcpu, end, &work));
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<(), Error>>| {
            thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))
        };
        let disturbed: Result<Vec<()>, Error> = disturbers.into_iter().map(join).collect();
        (result, disturbed)
    });
    let rounds = result?;
    let _ = disturbed?;

    let verified = vmm.on_all(&mut vcpus, |vcpu| {
        let share = vcpu.vmm().share(vcpu.id);
        vcpu.run_pages(Op::Verify, share, tag, 1)
    })?;
    let mismatches: u64 = verified.iter().map(|r| r.mismatches).sum();
    let read: u64 = verified.iter().map(|r| r.pages).sum();
    report.check(
        "contents-verified-by-the-guest",
        mismatches == 0 && read == pages,
        format!("{read} of {pages} pages read, {mismatches} mismatches"),
    );
    let wrong = wrong_counts(&vmm, &rounds);
    report.check("no-increment-lost", wrong == 0, format!("{wrong} pages hold a wrong count"));
    report.seconds = begun.elapsed().as_secs_f64();
    report.count("pages_touched", pages);
    report.count("faults", vmm.exits.faults.load(Ordering::Relaxed));
    report.count("faults_without_slot", vmm.exits.no_slot.load(Ordering::Relaxed));
    report.count("roots_loaded", vmm.exits.reloads.load(Ordering::Relaxed));
    let done = [
        ("guest_rounds", &work.rounds),
        ("unmaps", &work.unmaps),
        ("pages_unmapped", &work.pages_unmapped),
        ("aging_passes", &work.passes),
        ("zap_alls", &work.zap_alls),
        ("slot_changes", &work.slot_changes),
    ];
    for (name, count) in done {
        let count = count.load(Ordering::Relaxed);
        report.count(name, count);
        report.check("everybody-worked", count > 0, format!("{name} {count}"));
    }
    drop(vcpus);
    vmm.teardown(&mut report)?;
    Ok(report)
}

/// Add 1 to every page of the vCPU's share, again and again; the number of rounds.
fn count_until<F: SpteFormat>(
    vcpu: &mut VmmVcpu<F>,
    end: Instant,
    work: &Work,
) -> Result<u64, Error> {
    let mut rounds = 0;
    while Instant::now() < end {
        let share = vcpu.vmm().share(vcpu.id);
        let _ = vcpu.run_pages(Op::Increment, share, 0, 1)?;
        rounds += 1;
        work.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(rounds)
}

/// Pages whose counter is not the number of rounds, read by the VMM from the memory itself.
fn wrong_counts<F: SpteFormat>(vmm: &Vmm<F>, rounds: &[u64]) -> u64 {
    let memory = vmm.machine.memory();
    let mut wrong = 0;
    for (vcpu, rounds) in rounds.iter().enumerate() {
        for page in vmm.share(vcpu as u32) {
            let at = (vmm.layout.data.start + page) * crate::machine::PAGE + 8;
            wrong += u64::from(memory.load(at) != *rounds);
        }
    }
    wrong
}

type Disturber<F> = fn(
    &Vmm<F>,
    &mut mmu_core::vm::Actor<crate::host::VmmHost>,
    &mut Random,
    &Work,
) -> Result<(), Error>;

fn disturb<F: SpteFormat>(
    vmm: &Vmm<F>,
    seed: u64,
    end: Instant,
    work: &Work,
    what: Disturber<F>,
) -> Result<(), Error> {
    let mut actor = vmm.actor()?;
    let mut random = Random::new(seed);
    while Instant::now() < end {
        what(vmm, &mut actor, &mut random, work)?;
    }
    Ok(())
}

fn some_range<F: SpteFormat>(vmm: &Vmm<F>, random: &mut Random) -> GfnRange {
    let start = random.below(vmm.shape.pages);
    let len = 1 + random.below(256);
    vmm.gfns(start..(start + len).min(vmm.shape.pages))
}

fn unmap_some<F: SpteFormat>(
    vmm: &Vmm<F>,
    actor: &mut mmu_core::vm::Actor<crate::host::VmmHost>,
    random: &mut Random,
    work: &Work,
) -> Result<(), Error> {
    let report = vmm.mmu.unmap(actor, some_range(vmm, random));
    work.unmaps.fetch_add(1, Ordering::Relaxed);
    work.pages_unmapped.fetch_add(report.pages(), Ordering::Relaxed);
    std::thread::sleep(Duration::from_micros(random.below(2000)));
    Ok(())
}

fn age_some<F: SpteFormat>(
    vmm: &Vmm<F>,
    actor: &mut mmu_core::vm::Actor<crate::host::VmmHost>,
    random: &mut Random,
    work: &Work,
) -> Result<(), Error> {
    let mode = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush][random.below(3) as usize];
    let range = if random.chance(1, 2) { vmm.all_gfns() } else { some_range(vmm, random) };
    let _ = vmm.mmu.age(actor, AgeRequest::new(range, mode), &mut CountOnly);
    work.passes.fetch_add(1, Ordering::Relaxed);
    std::thread::sleep(Duration::from_micros(random.below(3000)));
    Ok(())
}

fn change_slot<F: SpteFormat>(
    vmm: &Vmm<F>,
    actor: &mut mmu_core::vm::Actor<crate::host::VmmHost>,
    random: &mut Random,
    work: &Work,
) -> Result<(), Error> {
    let slot = 1 + random.below(SLOTS - 1);
    if vmm.slot_pages(slot).is_empty() {
        return Ok(());
    }
    vmm.delete_slot(actor, slot)?;
    let first = first_gfn(vmm, slot);
    let mapped = vmm.mmu.lookup(actor, 0, first).last().is_some_and(|(_, s)| s.is_mmu_present());
    if mapped {
        return Err(format!("gfn {first} is mapped after its slot was deleted").into());
    }
    std::thread::sleep(Duration::from_micros(random.below(5000)));
    vmm.create_slot(actor, slot)?;
    work.slot_changes.fetch_add(2, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(5 + random.below(20)));
    Ok(())
}

fn first_gfn<F: SpteFormat>(vmm: &Vmm<F>, slot: u64) -> Gfn {
    vmm.gfns(vmm.slot_pages(slot)).start
}

fn zap_all<F: SpteFormat>(
    vmm: &Vmm<F>,
    actor: &mut mmu_core::vm::Actor<crate::host::VmmHost>,
    random: &mut Random,
    work: &Work,
) -> Result<(), Error> {
    let zap = vmm.mmu.invalidate_roots(actor);
    if random.chance(1, 4) {
        // Leave the rest to the next one.
        drop(zap);
    } else {
        let _ = zap.finish(actor);
    }
    work.zap_alls.fetch_add(1, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(20 + random.below(60)));
    Ok(())
}
