//! Everything at once: guests that check their memory while the host zaps, ages, splits, collapses,
//! logs, protects and drops it, in an order that the seed decides.

use alloc::vec;
use core::sync::atomic::Ordering;

use mmu_core::addr::{GfnRange, Level};
use mmu_core::slot::SlotFlags;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;

use crate::crowd;
use crate::guest::layout::DATA_SLOT;
use crate::guest::program::Program;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::cpu;
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Task, Vm, data_at, data_gfn, word};

/// Steps of the host.
const STEPS: u64 = 150;
/// What the host can do.
const KINDS: usize = 8;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    everything(lab);
    shared(lab);
}

/// The host's side: what it did, and whether the slot is logged now.
struct Storm {
    seed: u64,
    done: [u64; KINDS],
    logged: bool,
}

impl Storm {
    fn step<V: Virt>(&mut self, vm: &Vm<V>, actor: &mut Actor<BareHost>) {
        // xorshift64.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let random = self.seed;
        let pages = vm.data_range().len();
        let first = random / 8 % pages;
        let range = GfnRange::from_len(data_gfn(first), 1 + random / 8192 % 600);
        let range = range.intersection(vm.data_range());
        let kind = (random % KINDS as u64) as usize;
        self.done[kind] += 1;
        match kind {
            0 => drop(vm.mmu.unmap(actor, range)),
            1 | 2 => {
                let mode = if kind == 1 { AgeMode::Clear } else { AgeMode::ClearFlush };
                let request = AgeRequest::new(range, mode);
                let _ = vm.mmu.age(actor, request, &mut CountOnly);
            }
            3 => drop(vm.mmu.split(actor, 0, range)),
            4 => drop(vm.mmu.collapse(actor, 0, vm.data_range())),
            5 => {
                self.logged = !self.logged;
                let log = SlotFlags::LOG_DIRTY;
                vm.set_data(actor, if self.logged { log } else { SlotFlags::empty() });
            }
            6 => {
                if self.logged {
                    let mut words = vec![0; pages.div_ceil(64) as usize];
                    let taken = vm.mmu.harvest_log(actor, 0, DATA_SLOT, &mut words);
                    let _ = taken.unwrap_or_else(|error| panic!("{error}"));
                }
            }
            _ => drop(vm.mmu.invalidate_roots(actor).finish(actor)),
        }
    }
}

fn everything<V: Virt>(lab: &mut Lab<V>) {
    let mib = 4 * lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(mib, Level::L2));
    let mut storm = Storm { seed: lab.random() | 1, done: [0; KINDS], logged: false };
    let crowd = crowd::run(lab, &vm, 1024, STEPS, &mut |actor, _| storm.step(&vm, actor));
    lab.crowd("memory-in-the-storm", &crowd);
    let all = storm.done.iter().all(|count| *count > 0);
    lab.check("the-storm-had-everything", all, format_args!("{:?}", storm.done));
    let mut actor = vm.actor();
    if let Some(tree) = lab.went("tables-after-the-storm", vm.mmu.check(&mut actor)) {
        let stats = vm.mmu.vm().stats();
        use mmu_core::stats::Counter;
        let gauges = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G];
        lab.equal("tables-after-the-storm", gauges.map(|gauge| stats.get(gauge)), tree.leaves);
        let owed = stats.get(Counter::FlushOwed);
        lab.equal("every-flush-was-paid", stats.get(Counter::FlushPaid), owed);
    }
    drop(actor);
    lab.equal("storm-frames-in-use", vm.end(), 0);
}

/// vCPUs on all CPUs add to the same words while the pages under them come and go.
fn shared<V: Virt>(lab: &mut Lab<V>) {
    const WORDS: u64 = 64;
    const TIMES: u64 = 60;
    let vm = &Vm::new(lab, lab.shape(2, Level::L1));
    let cpus = lab.cpus;
    let failed = core::sync::atomic::AtomicU64::new(0);
    cpu::on_all(cpus, &|number| {
        let (mut vcpu, mut actor) = (vm.vcpu(number), vm.actor());
        let add = Task::pages(Program::Add, data_at(0), WORDS);
        for _ in 0..TIMES {
            let done = vcpu.perform(&add);
            failed.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
            // Whoever is done takes pages from under the others.
            let _ = vm.mmu.unmap(&mut actor, GfnRange::from_len(data_gfn(0), WORDS));
        }
    });
    let wanted = TIMES * cpus as u64;
    let wrong = (0..WORDS).filter(|page| word(&vm.data, page << 12) != wanted).count();
    let failed = failed.into_inner();
    lab.check(
        "shared-words-lose-no-addition",
        wrong == 0 && failed == 0,
        format_args!("{WORDS} words, {wanted} additions to each, {wrong} wrong, {failed} failed"),
    );
}
