//! Aging over reverse maps: what was touched is young, by whatever address it was touched, what was
//! not is old; and bits that are taken while guests run cost them nothing.

use mmu_core::addr::{GfnRange, Level};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly};
use mmu_core::vm::Actor;
use shadow_mmu::ShadowMmu;

use crate::crowd;
use crate::guest::program::Program;
use crate::guest::system::{P, U, W};
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::shadow::l1::L1;
use crate::shadow::town::{Town, pages};
use crate::virt::Virt;
use crate::vm::{Task, data_at};

/// A linear address at which the first pages are mapped once more.
const ALIAS: u64 = 3 << 30;
/// Pages that are.
const ALIASES: u64 = 32;
/// Pages of a vCPU's share.
const SHARE: u64 = 256;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    exact(lab);
    aliases(lab);
    nested(lab);
    crowded(lab);
}

fn age<F: SpteFormat>(
    mmu: &ShadowMmu<F, BareHost>,
    actor: &mut Actor<BareHost>,
    range: GfnRange,
    mode: AgeMode,
) -> AgeReport {
    let mut all = AgeReport::empty(range.start);
    while all.next < range.end {
        let rest = GfnRange::new(all.next, range.end);
        let request = AgeRequest::new(rest, mode).with_budget(600);
        all = all.merge(mmu.age(actor, request, &mut CountOnly));
    }
    all
}

/// Touch, age, touch some, age: with vCPU `vcpu` of any kind.
fn exactly<V: Virt, F: SpteFormat>(
    lab: &mut Lab<V>,
    vcpu: &mut impl Runner,
    mmu: &ShadowMmu<F, BareHost>,
    range: GfnRange,
    names: [&str; 4],
) {
    let mut actor = mmu.vm().actor().unwrap_or_else(|error| panic!("{error}"));
    let count = range.len();
    lab.went(names[0], vcpu.perform(&Task::pages(Program::Write, data_at(0), count)));
    let report = age(mmu, &mut actor, range, AgeMode::ClearFlush);
    lab.equal(names[0], (report.mapped, report.young), (count, count));
    let report = age(mmu, &mut actor, range, AgeMode::Test);
    lab.equal(names[1], (report.mapped, report.young), (count, 0));
    for (name, program, stride) in [(names[2], Program::Read, 3), (names[3], Program::Write, 5)] {
        let touch = Task { stride: stride << 12, ..Task::pages(program, data_at(1), 100) };
        lab.went(name, vcpu.perform(&touch));
        let report = age(mmu, &mut actor, range, AgeMode::ClearFlush);
        lab.equal(name, (report.young, report.lost), (100, 0));
    }
}

fn exact<V: Virt>(lab: &mut Lab<V>) {
    let town = Town::new(lab, 4, Level::L1, 1);
    let mut vcpu = town.vcpu(0);
    let range = pages(&town.vm.ram.data, 0, 1024);
    let names = [
        "touched-shadows-are-young",
        "cleared-shadows-are-old",
        "reads-make-shadows-young",
        "writes-make-shadows-young",
    ];
    exactly(lab, &mut vcpu, &town.vm.mmu, range, names);
    drop(vcpu);
    lab.equal("shadow-aging-left", town.vm.end(), (0, 0));
}

/// A page that two addresses lead to is young if either was used.
fn aliases<V: Virt>(lab: &mut Lab<V>) {
    let town = Town::new(lab, 2, Level::L1, 1);
    let (tree, ram) = (town.space(0).tree, &town.vm.ram);
    for page in 0..ALIASES {
        let entry = (ram.data.start() + page * PAGE) | P | W | U;
        tree.set(ram, ALIAS + page * PAGE, Level::L1, entry);
    }
    let (mut vcpu, mut actor) = (town.vcpu(0), town.vm.actor());
    let range = pages(&ram.data, 0, ALIASES);
    for first in [data_at(0), ALIAS] {
        let touch = Task::pages(Program::Read, first, ALIASES);
        lab.went("shadow-aliases-warm-up", vcpu.perform(&touch));
    }
    let mut seen = [0; 4];
    for (young, (first, pages)) in
        seen.iter_mut().zip([(ALIAS, 5), (data_at(0), 7), (ALIAS, ALIASES), (data_at(0), 0)])
    {
        let _ = age(&town.vm.mmu, &mut actor, range, AgeMode::ClearFlush);
        if pages > 0 {
            let touch = Task::pages(Program::Read, first, pages);
            lab.went("shadow-aliases-warm-up", vcpu.perform(&touch));
        }
        *young = age(&town.vm.mmu, &mut actor, range, AgeMode::Test).young;
    }
    lab.equal("young-by-either-address", seen, [5, 7, ALIASES, 0]);
    let gone = town.vm.unmap(&mut actor, range, || {});
    lab.equal("both-entries-go", gone.leaves, 2 * ALIASES);
    drop((vcpu, actor));
    lab.equal("shadow-aliases-left", town.vm.end(), (0, 0));
}

fn nested<V: Virt>(lab: &mut Lab<V>) {
    let l1 = L1::new(lab, 4 << 20, Level::L1);
    let mut vcpu = l1.vcpu(0);
    let range = pages(&l1.vm.ram.data, 0, 1024);
    let names = [
        "l2s-touched-pages-are-young",
        "l2s-cleared-pages-are-old",
        "l2s-reads-make-young",
        "l2s-writes-make-young",
    ];
    exactly(lab, &mut vcpu, &l1.vm.mmu, range, names);
    drop(vcpu);
    lab.equal("nested-aging-left", l1.vm.end(), (0, 0));
}

fn crowded<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let town = Town::new(lab, 2 * vcpus, Level::L1, 1);
    let range = pages(&town.vm.ram.data, 0, SHARE * vcpus);
    let (mut young, mut mapped) = (0, 0);
    let crowd = crowd::run(lab, &town, SHARE, 24, &mut |actor, step| {
        let mode = if step % 2 == 0 { AgeMode::ClearFlush } else { AgeMode::Clear };
        let report = age(&town.vm.mmu, actor, range, mode);
        (young, mapped) = (young + report.young, mapped + report.mapped);
    });
    lab.crowd("memory-while-shadows-age", &crowd);
    let detail = format_args!("{young} young of {mapped} seen");
    lab.check("shadows-aged-under-guests", young > 0 && mapped >= young, detail);
    lab.equal("shadow-aging-crowd-left", town.vm.end(), (0, 0));
}
