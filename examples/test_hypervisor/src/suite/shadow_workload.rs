//! Everything at once on shadow tables: guests that check their memory, or let pages change places
//! by entries of their own tables, while the host zaps, ages, shrinks and drops; with few shadow
//! pages, with one address space and with several.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::Level;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;

use crate::crowd;
use crate::guest::layout::DATA;
use crate::guest::program::Program;
use crate::guest::system::linear_of;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::cpu;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::shadow::l1::L1;
use crate::shadow::town::{Town, pages};
use crate::shadow::vm::ShadowVm;
use crate::virt::Virt;
use crate::vm::{Task, data_at, word};

/// Steps of the host.
const STEPS: u64 = 50;
/// Pages of a vCPU's share; where pages are large, all of one.
const SHARE: u64 = 256;
const LARGE_SHARE: u64 = 512;
/// What the host can do.
const KINDS: usize = 5;
/// Shadow pages that a vCPU uses at a time, with its data in huge pages.
const USED_PAGES: u32 = 5;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    storm(lab, "memory-on-shadows", Level::L1, SHARE);
    storm(lab, "memory-on-huge-shadows", Level::L2, LARGE_SHARE);
    quota(lab);
    remap(lab);
    shared(lab);
    nested(lab);
}

/// The host's side: what it did.
struct Storm {
    seed: u64,
    done: [u64; KINDS],
}

impl Storm {
    const fn new(seed: u64) -> Self {
        Self { seed: seed | 1, done: [0; KINDS] }
    }

    fn step<F: SpteFormat>(&mut self, vm: &ShadowVm<F>, actor: &mut Actor<BareHost>) {
        // xorshift64.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let random = self.seed;
        let count = vm.ram.data.bytes() / PAGE;
        let first = random / 8 % count;
        let range = pages(&vm.ram.data, first, (1 + random / 8192 % 600).min(count - first));
        let kind = (random % KINDS as u64) as usize;
        self.done[kind] += 1;
        match kind {
            0 => drop(vm.unmap(actor, range, || {})),
            1 | 2 => {
                let mode = if kind == 1 { AgeMode::Clear } else { AgeMode::ClearFlush };
                let _ = vm.mmu.age(actor, AgeRequest::new(range, mode), &mut CountOnly);
            }
            3 => drop(vm.shrink(actor, 3)),
            _ => vm.drop_everything(actor),
        }
    }
}

/// Do books and counters agree after all that?
fn agree<V: Virt, F: SpteFormat>(lab: &mut Lab<V>, name: &str, vm: &ShadowVm<F>) {
    use mmu_core::stats::Counter;
    let mut actor = vm.actor();
    let Some(count) = lab.went(name, vm.check(&mut actor)) else { return };
    let stats = vm.mmu.vm().stats();
    let gauges = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G].map(|one| stats.get(one));
    lab.check(name, gauges == count.leaves, format_args!("{count:?}, leaves {gauges:?}"));
}

fn storm<V: Virt>(lab: &mut Lab<V>, name: &str, level: Level, share: u64) {
    let vcpus = lab.cpus.max(2);
    let town = Town::new(lab, share * vcpus as u64 / 256, level, vcpus);
    let mut storm = Storm::new(lab.random());
    let crowd = crowd::run(lab, &town, share, STEPS, &mut |actor, _| storm.step(&town.vm, actor));
    lab.crowd(name, &crowd);
    let all = storm.done.iter().all(|count| *count > 0);
    lab.check("the-host-did-everything", all, format_args!("{:?}", storm.done));
    agree(lab, "shadows-after-the-storm", &town.vm);
    lab.equal("shadow-storm-left", town.vm.end(), (0, 0));
}

/// Fewer shadow pages than the guests use: each fault may cost another its tables.
fn quota<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2);
    let town = Town::new(lab, 2 * vcpus as u64, Level::L2, vcpus);
    let quota = USED_PAGES * vcpus as u32 - 1;
    town.vm.set_quota(quota);
    let crowd = crowd::run(lab, &town, LARGE_SHARE, STEPS / 2, &mut |_, _| {});
    lab.crowd("memory-with-few-shadow-pages", &crowd);
    let (recycled, live) = (town.vm.stats().pages_recycled, town.vm.live_pages());
    lab.check(
        "shadow-pages-were-recycled",
        recycled > 0 && live <= quota,
        format_args!("{recycled}, {live} of {quota} are left"),
    );
    agree(lab, "shadows-with-a-quota", &town.vm);
    lab.equal("shadow-quota-left", town.vm.end(), (0, 0));
}

/// Each guest lets its pages change places by its own table, flushing as a kernel does.
fn remap<V: Virt>(lab: &mut Lab<V>) {
    const PAGES: u64 = 32;
    const TIMES: u64 = 4;
    // Even: at the end all are where they began.
    const ROUNDS: u64 = 4;
    let cpus = lab.cpus;
    let town = Town::<V>::new(lab, 2, Level::L1, cpus);
    let seed = lab.random();
    let (wrong, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    cpu::on_all(cpus, &|number| {
        let (mut vcpu, mut actor) = (town.vcpu(number), town.vm.actor());
        let first = data_at(number as u64 * PAGES);
        let mut storm = Storm::new(seed ^ number as u64);
        let fill = vcpu.perform(&Task::pages(Program::Fill, first, PAGES));
        failed.fetch_add(u64::from(fill.is_err()), Ordering::Relaxed);
        let entries = linear_of(&town.vm.ram, town.space(number).entry(&town.vm.ram, first));
        let task = Task { rounds: ROUNDS, ..Task::pages(Program::Remap, first, PAGES) };
        for _ in 0..TIMES {
            match vcpu.perform(&task.value(entries)) {
                Ok(done) => wrong.fetch_add(done.wrong, Ordering::Relaxed),
                Err(_) => failed.fetch_add(1, Ordering::Relaxed),
            };
            storm.step(&town.vm, &mut actor);
        }
        let verify = vcpu.perform(&Task::pages(Program::Verify, first, PAGES));
        wrong.fetch_add(verify.map_or(PAGES, |done| done.wrong), Ordering::Relaxed);
    });
    // Behind each word stands how often its page was used.
    let lost = |page: &u64| word(&town.vm.ram.data, page * PAGE + 8) != TIMES * ROUNDS;
    let lost = (0..PAGES * cpus as u64).filter(lost).count();
    let (wrong, failed) = (wrong.into_inner(), failed.into_inner());
    lab.check(
        "pages-that-change-places",
        wrong == 0 && failed == 0 && lost == 0,
        format_args!(
            "{cpus} guests, {wrong} words wrong, {lost} pages lost a write, {failed} ended"
        ),
    );
    let stats = town.vm.stats();
    let followed = stats.unsyncs > 0 && stats.syncs > 0;
    lab.check("their-tables-were-followed", followed, format_args!("{stats:?}"));
    agree(lab, "shadows-after-remapping", &town.vm);
    lab.equal("shadow-remap-left", town.vm.end(), (0, 0));
}

/// vCPUs on all CPUs, in one address space, add to the same words while the pages under them come
/// and go.
fn shared<V: Virt>(lab: &mut Lab<V>) {
    const WORDS: u64 = 64;
    const TIMES: u64 = 16;
    let cpus = lab.cpus;
    let town = Town::<V>::new(lab, 2, Level::L1, 1);
    let failed = AtomicU64::new(0);
    cpu::on_all(cpus, &|number| {
        let (mut vcpu, mut actor) = (town.vcpu(number), town.vm.actor());
        let add = Task::pages(Program::Add, data_at(0), WORDS);
        for _ in 0..TIMES {
            let done = vcpu.perform(&add);
            failed.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
            // Whoever is done takes pages from under the others.
            let _ = town.vm.unmap(&mut actor, pages(&town.vm.ram.data, 0, WORDS), || {});
        }
    });
    let wanted = TIMES * cpus as u64;
    let wrong = (0..WORDS).filter(|page| word(&town.vm.ram.data, page << 12) != wanted).count();
    let failed = failed.into_inner();
    lab.check(
        "words-shared-on-shadows",
        wrong == 0 && failed == 0,
        format_args!("{WORDS} words, {wanted} additions to each, {wrong} wrong, {failed} failed"),
    );
    lab.equal("shadow-shared-left", town.vm.end(), (0, 0));
}

/// The guests of another hypervisor, whose large pages become small ones and large again.
fn nested<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let l1 = L1::new(lab, vcpus * (2 << 20), Level::L2);
    let mut storm = Storm::new(lab.random());
    let blocks = vcpus;
    let tables = (0..blocks).map(|block| l1.small_pages(block)).collect::<alloc::vec::Vec<_>>();
    let mut edits = 0;
    let crowd = crowd::run(lab, &l1, LARGE_SHARE, STEPS, &mut |actor, step| {
        let block = step / 2 % blocks;
        let place = l1.tree.place(&l1.vm.ram, DATA + (block << 21), Level::L2);
        let large = l1.page(512 * block) | l1.bits.large;
        match step % 4 {
            0 => l1.edit(actor, place, tables[block as usize] | l1.bits.link),
            2 => l1.edit(actor, place, large),
            _ => return storm.step(&l1.vm, actor),
        }
        edits += 1;
    });
    lab.crowd("l2s-memory-in-the-storm", &crowd);
    let detail = format_args!("{edits} edits of L1's, {:?} of the host's", storm.done);
    lab.check("l1-and-host-did-their-part", edits > 0, detail);
    agree(lab, "nested-shadows-after-the-storm", &l1.vm);
    lab.equal("nested-storm-left", l1.vm.end(), (0, 0));
}
