//! Another hypervisor's nested tables, shadowed: its guest reaches what the tables say, and its
//! hypervisor hears of a fault what its processor would have said.
//!
//! The processor is asked: the same guest runs on the hypervisor's tables themselves, for guest
//! physical addresses are physical addresses here. With every set of permissions the outcome, the
//! address, all bits of the exit information and the accessed and dirty bits must be the same.

use core::sync::atomic::Ordering;

use mmu_core::access::{EptViolation, NpfInfo};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Level, Pfn};
use mmu_core::stats::Counter;

use crate::guest::layout;
use crate::guest::program::{DONE, Program};
use crate::guest::system::NX;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::{Progress, Runner};
use crate::shadow::l1::L1;
use crate::shadow::nested::NestedCpu;
use crate::suite::faults::{RET, deviations};
use crate::suite::shadow_tables::token;
use crate::trouble::Trouble;
use crate::virt::state::gpr::RAX;
use crate::virt::{
    Exit, GuestState, LocalFlush, NestedFault, RawFault, Root, Vcpu, VcpuSetup, Virt,
};
use crate::vm::{Task, data_at};

/// The page that is accessed.
const ACCESSED: u64 = 3;
/// Reserved in every entry of processors with fewer address bits.
const RESERVED: u64 = 1 << 51;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    permissions(lab);
    let l1 = L1::new(lab, 2 << 20, Level::L1);
    for page in 0..512 {
        l1.vm.ram.data.word(page * PAGE).store(token(page), Ordering::Relaxed);
    }
    let mut vcpu = l1.vcpu(0);
    let parts: [(&str, Part<V>); 4] = [
        ("an-edit-of-l1", edits),
        ("another-tree-of-l1", trees),
        ("a-table-that-l2-writes-to", unseen),
        ("a-page-of-l1-that-goes", host),
    ];
    for (name, part) in parts {
        let went = part(lab, &l1, &mut vcpu);
        let _ = lab.went(name, went);
    }
    let books = l1.vm.check(&mut l1.vm.actor());
    let _ = lab.went("nested-tables-agree", books);
    drop(vcpu);
    lab.equal("shadow-nested-left", l1.vm.end(), (0, 0));
    huge(lab);
}

type Part<V> = fn(&mut Lab<V>, &L1<V>, &mut NestedCpu<V>) -> Result<(), Trouble>;

/// What came of an access, and the two entries afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Address and exit information; `None` if it went through.
    fault: Option<(Gpa, RawFault)>,
    /// The page's entry and the one above, if it went through.
    entries: Option<(u64, u64)>,
}

/// Every access that there is.
const ACCESSES: [Program; 3] = [Program::Read, Program::Write, Program::Call];

/// Permissions of a page, then of the entry above it.
fn all_entries<V: Virt>(lab: &Lab<V>) -> impl Iterator<Item = (u64, u64)> + use<V> {
    let npt = V::WORD == "npt";
    let execute_only = lab.features.exec_only;
    let leaves = (0..8).map(move |bits: u64| match npt {
        true => 1 | (bits & 3) << 1 | if bits & 4 != 0 { NX } else { 0 },
        // Read, write, execute; write-back.
        false => bits | 6 << 3,
    });
    let reserved = if lab.features.phys_bits < 52 { RESERVED } else { 0 };
    // Not present with other bits set, reserved bits, for EPT a memory type that is none.
    let odd = if npt { [6, 7 | reserved, 6] } else { [6 << 3, 7 | 6 << 3 | reserved, 7 | 2 << 3] };
    let uppers = if npt { [7, 5, 3, 7 | NX, 6] } else { [7, 1, 5, 3, 0] };
    let legal = move |leaf: &u64| npt || execute_only || leaf & 7 != 4;
    leaves
        .chain(odd)
        .filter(legal)
        .flat_map(move |leaf| uppers.into_iter().map(move |upper| (leaf, upper)))
}

/// Bits of an entry that are not its address.
const PERMISSIONS: u64 = NX | RESERVED | 0xfff;

fn permissions<V: Virt>(lab: &mut Lab<V>) {
    let [pages, tables] = ["faults-of-l2s-pages", "faults-of-l2s-tables"];
    permissions_of(lab, L1::new(lab, 2 << 20, Level::L1), [pages, tables]);
    let names = ["pages-of-l2s-without-a-and-d", "tables-of-l2s-without-a-and-d"];
    if lab.features.accessed_dirty_off {
        let l1 = L1::without_accessed_dirty(lab, 2 << 20, Level::L1);
        permissions_of(lab, l1, names);
    } else {
        names.iter().for_each(|name| lab.skip(name, "A and D cannot be turned off"));
    }
}

fn permissions_of<V: Virt>(lab: &mut Lab<V>, l1: L1<V>, [pages, tables]: [&str; 2]) {
    l1.vm.ram.data.words().iter().for_each(|word| word.store(RET, Ordering::Relaxed));
    let data = data_at(ACCESSED);
    compare(lab, &l1, pages, data, data);
    // The page of L2's own table that maps the data.
    let table = layout::entry_of(data);
    compare(lab, &l1, tables, data, table);
    lab.equal("nested-permissions-left", l1.vm.end(), (0, 0));
}

/// L2 accesses `linear`, and L1 changes what it has for L2's physical address `changed`.
fn compare<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, name: &str, linear: u64, changed: u64) {
    let (tree, ram) = (l1.tree, &l1.vm.ram);
    let upper = tree.place(ram, changed, Level::L2);
    let leaf = tree.place(ram, changed, Level::L1);
    let pages = (l1.entry(leaf), l1.entry(upper));
    let mut machine = V::vcpu(VcpuSetup::NESTED).unwrap_or_else(|error| panic!("{error}"));
    let mut vcpu = l1.vcpu(0);
    let mut actor = l1.vm.actor();
    let (mut cases, mut faults, mut differ, mut first) = (0, 0, 0, None);
    for bits in all_entries(lab) {
        // The entry above a table of L2's leads to its code, too.
        if changed != linear && bits.1 != l1.bits.link {
            continue;
        }
        // Each by itself, then all in some order: what let one through must let the next one
        // through only if the tables do.
        let mut all = ACCESSES;
        (1..3).for_each(|last| all.swap(last, (lab.random() % (last as u64 + 1)) as usize));
        for accesses in ACCESSES.chunks(1).chain([all.as_slice()]) {
            let mut prepare = || {
                l1.edit(&mut actor, leaf, pages.0 & !PERMISSIONS | bits.0);
                l1.edit(&mut actor, upper, pages.1 & !PERMISSIONS | bits.1);
            };
            let task = |program| Task::pages(program, linear + 0x128, 1).value(RET);
            prepare();
            machine.flush(LocalFlush::Context);
            let mut wanted = accesses.iter().map(|program| {
                let exit = by_the_processor::<V>(&mut machine, l1, &task(*program));
                seen(lab, l1, exit, (leaf, upper))
            });
            let wanted = [wanted.next(), wanted.next(), wanted.next()];
            prepare();
            for (program, wanted) in accesses.iter().zip(wanted) {
                vcpu.start(l1.registers(0));
                vcpu.begin(&task(*program));
                let exit = vcpu.run();
                let Some(exit) = lab.went(name, exit) else { return };
                let found = seen(lab, l1, exit, (leaf, upper));
                cases += 1;
                faults += u64::from(found.fault.is_some());
                if wanted != Some(found) {
                    differ += 1;
                    first.get_or_insert((bits, all, wanted, found));
                }
            }
        }
    }
    l1.edit(&mut actor, leaf, pages.0);
    l1.edit(&mut actor, upper, pages.1);
    let right = differ == 0 && faults > 0 && faults < cases && vcpu.reflected == faults;
    let detail = format_args!(
        "{cases} accesses, {faults} faults reflected, {differ} unlike the processor's own: \
         {first:x?}"
    );
    lab.check(name, right, detail);
}

/// The same on L1's tables as they are.
fn by_the_processor<V: Virt>(machine: &mut V::Vcpu, l1: &L1<V>, task: &Task) -> Exit {
    let frame = Pfn::new(l1.tree.root / PAGE);
    let accessed_dirty = l1.features.accessed_dirty;
    machine.set_root(Root { frame, levels: Level::L4, accessed_dirty });
    let mut hardware = Bare(machine);
    *hardware.0.state() = l1.registers(0);
    hardware.begin(task);
    loop {
        match hardware.0.run() {
            Exit::Interrupt => {}
            exit => return exit,
        }
    }
}

/// A vCPU that nobody handles faults of.
struct Bare<'a, M>(&'a mut M);

impl<M: Vcpu> Runner for Bare<'_, M> {
    fn registers(&mut self) -> &mut GuestState {
        self.0.state()
    }

    fn proceed(&mut self) -> Result<Progress, Trouble> {
        Ok(Progress::Stopped(self.0.run()))
    }

    fn faults(&self) -> [u64; 3] {
        [0; 3]
    }
}

/// What came of it, as the manuals have it.
fn seen<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, exit: Exit, at: (u64, u64)) -> Seen {
    match exit {
        Exit::Nested(fault) => {
            deviations(lab, &fault);
            Seen { fault: Some((fault.gpa, by_the_manual(fault))), entries: None }
        }
        Exit::Out { port: DONE, .. } => {
            Seen { fault: None, entries: Some((l1.entry(at.0), l1.entry(at.1))) }
        }
        exit => {
            lab.check("an-access-of-l2", false, format_args!("{exit}"));
            Seen { fault: None, entries: None }
        }
    }
}

/// Exit information without what [`deviations`] notes.
fn by_the_manual(fault: NestedFault) -> RawFault {
    match fault.raw {
        RawFault::Npf(info) if info.contains(NpfInfo::RESERVED) => {
            RawFault::Npf(info | NpfInfo::PRESENT)
        }
        RawFault::Violation(q)
            if q.contains(EptViolation::LINEAR_VALID | EptViolation::WRITE)
                && !q.contains(EptViolation::FINAL) =>
        {
            RawFault::Violation(q | EptViolation::READ)
        }
        raw => raw,
    }
}

/// L2 reads the word at `address`.
fn peek<V: Virt>(vcpu: &mut NestedCpu<V>, address: u64) -> Result<u64, Trouble> {
    vcpu.perform(&Task::pages(Program::Read, address, 1))?;
    Ok(vcpu.registers().gpr[RAX])
}

/// L1 gives L2 another page, none, and one again.
fn edits<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, vcpu: &mut NestedCpu<V>) -> Result<(), Trouble> {
    let (ram, address) = (&l1.vm.ram, data_at(0));
    let place = l1.tree.place(ram, address, Level::L1);
    let mut actor = l1.vm.actor();
    lab.equal("l2-reads-its-page", peek(vcpu, address)?, token(0));
    l1.edit(&mut actor, place, l1.page(8));
    vcpu.flush();
    lab.equal("l2-reads-another-page", peek(vcpu, address)?, token(8));
    l1.edit(&mut actor, place, 0);
    vcpu.flush();
    let reflected = vcpu.reflected;
    vcpu.begin(&Task::pages(Program::Read, address, 1));
    let exit = vcpu.run()?;
    let told = matches!(exit, Exit::Nested(fault) if fault.gpa.get() == address);
    let told = told && vcpu.reflected == reflected + 1;
    lab.check("l1-hears-of-an-absent-page", told, format_args!("{exit}"));
    // L1 puts it in: L2 goes on where it was, without a flush.
    l1.edit(&mut actor, place, l1.page(9));
    let exit = vcpu.run()?;
    vcpu.done(exit)?;
    lab.equal("and-l2-goes-on", vcpu.registers().gpr[RAX], token(9));
    Ok(())
}

/// Two trees: each has its own pages, and what was left is found again.
fn trees<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, vcpu: &mut NestedCpu<V>) -> Result<(), Trouble> {
    let other = l1.another();
    for page in 0..64 {
        other.set(&l1.vm.ram, data_at(page), Level::L1, l1.page(500 - page));
    }
    let (mut wrong, mut made) = (0, 0);
    for round in 0..4 {
        for page in 20..36 {
            vcpu.set_root(other.root);
            wrong += u64::from(peek(vcpu, data_at(page))? != token(500 - page));
            vcpu.set_root(l1.tree.root);
            wrong += u64::from(peek(vcpu, data_at(page))? != token(page));
        }
        if round == 0 {
            made = l1.vm.stats().pages_made;
        }
    }
    lab.equal("each-tree-has-its-own-pages", wrong, 0);
    lab.equal("a-tree-that-was-left-is-found-again", l1.vm.stats().pages_made, made);
    Ok(())
}

/// L1 lets L2 write to a table of L1's: unseen, until L1 executes INVEPT.
fn unseen<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, vcpu: &mut NestedCpu<V>) -> Result<(), Trouble> {
    let (ram, address, window) = (&l1.vm.ram, data_at(40), data_at(41));
    let place = l1.tree.place(ram, address, Level::L1);
    let mut actor = l1.vm.actor();
    let at_window = l1.tree.place(ram, window, Level::L1);
    l1.edit(&mut actor, at_window, (place / PAGE * PAGE) | l1.bits.page);
    vcpu.flush();
    lab.equal("before-l2-edits", peek(vcpu, address)?, token(40));
    let unsyncs = l1.vm.stats().unsyncs;
    let write = Task::pages(Program::Write, window + place % PAGE, 1).value(l1.page(77));
    vcpu.perform(&write)?;
    lab.equal("the-table-goes-out-of-sync", l1.vm.stats().unsyncs - unsyncs, 1);
    let now = peek(vcpu, address)?;
    let either = now == token(40) || now == token(77);
    lab.check("old-or-new-before-invept", either, format_args!("{now:#x}"));
    vcpu.flush();
    lab.equal("new-after-invept", peek(vcpu, address)?, token(77));
    Ok(())
}

/// The host takes a page of L1's memory: L2 faults on it and has it back, L1 hears of nothing.
fn host<V: Virt>(lab: &mut Lab<V>, l1: &L1<V>, vcpu: &mut NestedCpu<V>) -> Result<(), Trouble> {
    peek(vcpu, data_at(60))?;
    let page = Gfn::new(l1.vm.ram.data.start() / PAGE + 60);
    let mut actor = l1.vm.actor();
    let gone = l1.vm.unmap(&mut actor, GfnRange::from_len(page, 1), || {});
    lab.equal("the-host-takes-a-page", (gone.leaves, gone.accessed), (1, 1));
    let (faults, reflected) = (vcpu.counts[0], vcpu.reflected);
    lab.equal("l2-has-it-back", peek(vcpu, data_at(60))?, token(60));
    let told = (vcpu.counts[0] - faults, vcpu.reflected - reflected);
    lab.equal("and-l1-hears-of-nothing", told, (1, 0));
    Ok(())
}

/// L1's large pages are large in the shadow, and small again when L1 says so.
fn huge<V: Virt>(lab: &mut Lab<V>) {
    let l1 = L1::new(lab, 4 << 20, Level::L2);
    let mut vcpu = l1.vcpu(0);
    let large = || l1.vm.mmu.vm().stats().get(Counter::Pages2M);
    let fill = Task { stride: 64, ..Task::words(Program::Fill, data_at(0), (4 << 20) / 64) };
    let verify = Task { program: Program::Verify, ..fill };
    let went = vcpu.perform(&fill).and_then(|_| vcpu.perform(&verify)).map(|done| done.wrong);
    if let Some(wrong) = lab.went("l2-on-large-pages", went) {
        lab.equal("l2-on-large-pages", (wrong, large()), (0, 2));
    }
    // The first one by small pages, two of which change places.
    let mut actor = l1.vm.actor();
    let (place, table) = (l1.tree.place(&l1.vm.ram, data_at(0), Level::L2), l1.vm.ram.table());
    for page in 0..512 {
        let target = if page < 2 { 1 - page } else { page };
        l1.edit(&mut actor, table + page * 8, l1.page(target));
    }
    l1.edit(&mut actor, place, table | l1.bits.link);
    vcpu.flush();
    let first = Task { count: 2 * PAGE / 64, ..verify };
    let rest = Task { address: data_at(2), count: verify.count - first.count, ..verify };
    let went = vcpu.perform(&rest).map(|done| done.wrong);
    if let Some(wrong) = lab.went("l1-splits-a-page", went) {
        lab.equal("l1-splits-a-page", (wrong, large()), (0, 1));
    }
    let went = vcpu.perform(&first).map(|done| done.wrong);
    if let Some(wrong) = lab.went("two-pages-changed-places", went) {
        lab.equal("two-pages-changed-places", wrong, first.count);
    }
    drop((vcpu, actor));
    lab.equal("nested-huge-left", l1.vm.end(), (0, 0));
}
