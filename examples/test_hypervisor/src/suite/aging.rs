//! Aging: what was touched is young, what was not is old, with a flush to the page; and by accessed
//! bits of links, what nobody walked into is not looked at.

use mmu_core::addr::{GfnRange, Level};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly, UpperBits,
};
use mmu_core::vm::Actor;

use crate::crowd;
use crate::guest::program::Program;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Task, Vm, data_at, data_gfn};

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    exact(lab);
    huge(lab);
    upper(lab);
    crowded(lab);
}

fn age<V: Virt>(
    vm: &Vm<V>,
    actor: &mut Actor<BareHost>,
    range: GfnRange,
    mode: AgeMode,
) -> AgeReport {
    let mut all = AgeReport::empty(range.start);
    while all.next < range.end {
        let rest = GfnRange::new(all.next, range.end);
        let request = AgeRequest::new(rest, mode).with_budget(600);
        all = all.merge(vm.mmu.age(actor, request, &mut CountOnly));
    }
    all
}

fn exact<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(8, Level::L1));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let range = vm.data_range();
    lab.went("aging-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 2048)));
    let report = age(&vm, &mut actor, range, AgeMode::ClearFlush);
    lab.equal("touched-pages-are-young", (report.mapped, report.young), (2048, 2048));
    let report = age(&vm, &mut actor, range, AgeMode::Test);
    lab.equal("cleared-pages-are-old", (report.mapped, report.young), (2048, 0));
    for (name, program, stride) in
        [("reads-make-young", Program::Read, 3), ("writes-make-young", Program::Write, 5)]
    {
        let touch = Task { stride: stride << 12, ..Task::pages(program, data_at(1), 300) };
        lab.went(name, vcpu.perform(&touch));
        let report = age(&vm, &mut actor, range, AgeMode::ClearFlush);
        lab.equal(name, (report.young, report.lost), (300, 0));
    }
    // Without a flush a CPU may go on with what it cached: pages may be missed, never invented.
    lab.went("aging-warm-up", vcpu.perform(&Task::pages(Program::Read, data_at(0), 100)));
    let first = age(&vm, &mut actor, range, AgeMode::Clear);
    lab.equal("aging-without-a-flush", first.young, 100);
    lab.went("aging-warm-up", vcpu.perform(&Task::pages(Program::Read, data_at(0), 50)));
    let second = age(&vm, &mut actor, range, AgeMode::Test).young;
    let detail = format_args!("{second} of 50 seen");
    lab.check("without-a-flush-none-is-invented", second <= 50, detail);
    // The precise mode also flushes what was aged without.
    let _ = age(&vm, &mut actor, range, AgeMode::ClearFlush);
    lab.went("aging-warm-up", vcpu.perform(&Task::pages(Program::Read, data_at(0), 100)));
    let third = age(&vm, &mut actor, range, AgeMode::Test).young;
    lab.equal("a-flush-makes-up-for-it", third, 100);
    drop((vcpu, actor));
    lab.equal("aging-frames-in-use", vm.end(), 0);
}

fn huge<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(8, Level::L2));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let range = vm.data_range();
    lab.went("aging-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 2048)));
    let report = age(&vm, &mut actor, range, AgeMode::ClearFlush);
    lab.equal("huge-pages-are-young", report.young, 2048);
    lab.went("one-huge-page", vcpu.perform(&Task::pages(Program::Read, data_at(600), 1)));
    let report = age(&vm, &mut actor, range, AgeMode::Test);
    lab.equal("one-huge-page", (report.mapped, report.young), (2048, 512));
}

/// Accessed bits of links: what nobody walked into is left out, once a flush makes that safe.
fn upper<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(8, Level::L1));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let range = vm.data_range();
    let abilities = vm.mmu.abilities();
    lab.check(
        "links-have-accessed-bits",
        abilities.contains(AgeAbilities::UPPER_BITS),
        format_args!("{abilities:?}"),
    );
    let pass = |actor: &mut Actor<BareHost>, mode| {
        let request = AgeRequest::new(range, mode).with_upper(UpperBits::Use);
        vm.mmu.age(actor, request, &mut CountOnly)
    };
    let all = Task::pages(Program::Write, data_at(0), 2048);
    lab.went("aging-warm-up", vcpu.perform(&all));
    let report = pass(&mut actor, AgeMode::ClearFlush);
    lab.equal("touched-tables-are-entered", (report.young, report.idle), (2048, 0));
    lab.went("one-page", vcpu.perform(&Task::pages(Program::Read, data_at(600), 1)));
    let report = pass(&mut actor, AgeMode::ClearFlush);
    let seen = (report.young, report.mapped, report.idle);
    lab.equal("untouched-tables-are-left-out", seen, (1, 512, 1536));
    // Nothing that was cleared without a flush is believed: a CPU may go past a link it cached.
    lab.went("aging-warm-up", vcpu.perform(&all));
    let first = pass(&mut actor, AgeMode::Clear);
    lab.equal("links-cleared-without-a-flush", (first.young, first.idle), (2048, 0));
    let second = pass(&mut actor, AgeMode::Clear);
    lab.equal("are-not-believed", (second.young, second.idle), (0, 0));
    vm.mmu.flush_aged(&mut actor, range);
    let third = pass(&mut actor, AgeMode::Test);
    lab.equal("until-they-are-flushed", (third.mapped, third.idle), (0, 2048));
    lab.went("one-page", vcpu.perform(&Task::pages(Program::Write, data_at(5), 1)));
    let report = pass(&mut actor, AgeMode::ClearFlush);
    lab.equal("an-access-after-that-is-seen", (report.young, report.idle), (1, 1536));
    drop((vcpu, actor));
    lab.equal("upper-frames-in-use", vm.end(), 0);
}

fn crowded<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(2 * vcpus, Level::L1));
    let mut young = [0; 2];
    let mut random = lab.random();
    let crowd = crowd::run(lab, &vm, 512, 40, &mut |actor, step| {
        random = random.rotate_left(9) ^ step;
        let first = random % (512 * vcpus);
        let range = GfnRange::from_len(data_gfn(first), 1 + random / 4096 % 512);
        let flushes = step % 2;
        let mode = if flushes == 1 { AgeMode::ClearFlush } else { AgeMode::Clear };
        young[flushes as usize] += age(&vm, actor, range, mode).young;
    });
    lab.crowd("memory-while-aged", &crowd);
    lab.check(
        "pages-in-use-are-young",
        young.iter().all(|count| *count > 0),
        format_args!("{} seen without a flush, {} with", young[0], young[1]),
    );
    let mut actor = vm.actor();
    let left = age(&vm, &mut actor, vm.data_range(), AgeMode::Test);
    lab.equal("aging-unmaps-nothing", left.mapped, 512 * vcpus);
    drop(actor);
    lab.equal("aging-crowd-frames-in-use", vm.end(), 0);
}
