//! Kinds of nested faults, and what hardware says of each: access, cause, walk, address.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::attributes::Attributes;
use mmu_core::dead::DeadReason;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome};
use mmu_core::slot::SlotFlags;

use crate::guest::layout::entry_of;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::trouble::Trouble;
use crate::vcpu::BareVcpu;
use crate::virt::{Cause, Exit, LocalFlush, NestedFault, RawFault, Stage, Vcpu, Virt};
use crate::vm::{Task, Vm, data_at, data_gfn};

/// A slot that the guest may not write.
const READ_ONLY_SLOT: u16 = 5;
const READ_ONLY: u64 = 0x6000_0000;
/// RET, which programs call.
pub const RET: u64 = 0xc3;

/// What an access is expected to come to.
struct Wanted {
    access: Access,
    cause: Cause,
    stage: Stage,
    gpa: u64,
}

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(4, Level::L1));
    vm.data.words().iter().for_each(|word| word.store(RET, core::sync::atomic::Ordering::Relaxed));
    let mut vcpu = vm.vcpu(0);
    // Code, stack and tables are mapped from here on.
    let warm = vcpu.perform(&Task::pages(Program::Call, data_at(0), 1));
    if lab.went("faults-warm-up", warm).is_none() {
        return;
    }
    not_present(lab, &mut vcpu);
    protection(lab, &vm, &mut vcpu);
    guest_tables(lab, &vm, &mut vcpu);
    reserved(lab, &vm, &mut vcpu);
    drop(vcpu);
    lab.equal("faults-frames-in-use", vm.end(), 0);
}

/// Make an access that must fault; the fault.
fn provoke<V: Virt>(
    lab: &mut Lab<V>,
    name: &str,
    vcpu: &mut BareVcpu<V>,
    (program, address): (Program, u64),
    wanted: &Wanted,
) -> Option<NestedFault> {
    let exit = vcpu.attempt(&Task::pages(program, address, 1));
    let exit = lab.went(name, exit)?;
    let Exit::Nested(fault) = exit else {
        lab.check(name, false, format_args!("{exit}, not a nested fault"));
        return None;
    };
    let access = fault.access() == wanted.access || fault.cause() == Cause::Misconfigured;
    let cause = fault.cause() == wanted.cause;
    let stage = fault.stage() == wanted.stage;
    let place = fault.gpa.get() == wanted.gpa;
    let linear = fault.linear.is_none_or(|linear| linear == address);
    let held = access && cause && stage && place && linear;
    if held {
        lab.check(name, true, format_args!("{fault}"));
    } else {
        let Wanted { access, cause, stage, gpa } = wanted;
        lab.check(
            name,
            false,
            format_args!(
                "{fault}, linear {:x?}; not {access:?} of {gpa:#x} {cause:?} {stage:?}, linear \
                 {address:#x}",
                fault.linear
            ),
        );
    }
    deviations(lab, &fault);
    Some(fault)
}

/// Where what hardware says differs from its manual.
pub fn deviations<V: Virt>(lab: &mut Lab<V>, fault: &NestedFault) {
    use mmu_core::access::{EptViolation, NpfInfo};
    match fault.raw {
        RawFault::Npf(info)
            if info.contains(NpfInfo::RESERVED) && !info.contains(NpfInfo::PRESENT) =>
        {
            let text = format_args!(
                "EXITINFO1 {:#x} has RSV and not P; APM 2, 8.4.2: P is clear if the fault was \
                 caused by a not-present page",
                info.bits()
            );
            lab.note("npf-reserved-without-present", text);
        }
        RawFault::Violation(q)
            if q.contains(EptViolation::LINEAR_VALID)
                && !q.contains(EptViolation::FINAL)
                && q.contains(EptViolation::WRITE)
                && !q.contains(EptViolation::READ) =>
        {
            let text = format_args!(
                "qualification {:#x} of a guest table walk has bit 1 and not bit 0; SDM 3C, table \
                 28-7, note 1: with A and D on, both are set",
                q.bits()
            );
            lab.note("ept-table-walk-without-read", text);
        }
        _ => {}
    }
}

const ACCESSES: [(&str, Program, Access); 3] = [
    ("read", Program::Read, Access::READ),
    ("write", Program::Write, Access::WRITE),
    ("fetch", Program::Call, Access::EXEC),
];

fn not_present<V: Virt>(lab: &mut Lab<V>, vcpu: &mut BareVcpu<V>) {
    let names = ["not-present-read", "not-present-write", "not-present-fetch"];
    for (page, (name, (_, program, access))) in (8..).zip(names.into_iter().zip(ACCESSES)) {
        // Not at the start of the page: the address must be exact.
        let gpa = data_at(page) + 0x128;
        let (cause, stage) = (Cause::NotPresent, Stage::Final);
        let wanted = Wanted { access, cause, stage, gpa };
        let Some(fault) = provoke(lab, name, vcpu, (program, gpa), &wanted) else { continue };
        let outcome = vcpu.tdp().fault(&fault.page_fault());
        lab.equal(name, outcome, Ok(FaultOutcome::Fixed));
        lab.went(name, vcpu.perform(&Task::pages(program, gpa, 1)));
    }
}

/// Map the page at `gpa` by a read, then try `program` there.
fn refused<V: Virt>(
    lab: &mut Lab<V>,
    name: &str,
    vcpu: &mut BareVcpu<V>,
    (program, access, gpa): (Program, Access, u64),
    outcome: FaultOutcome,
) {
    let read = vcpu.perform(&Task::pages(Program::Read, gpa, 1));
    if lab.went(name, read).is_none() {
        return;
    }
    let (cause, stage) = (Cause::Protection, Stage::Final);
    let wanted = Wanted { access, cause, stage, gpa };
    if let Some(fault) = provoke(lab, name, vcpu, (program, gpa), &wanted) {
        let found = vcpu.tdp().fault(&fault.page_fault());
        lab.equal(name, found, Ok(outcome));
    }
}

fn protection<V: Virt>(lab: &mut Lab<V>, vm: &Vm<V>, vcpu: &mut BareVcpu<V>) {
    let mut actor = vm.actor();
    let (physical, flags) = (vm.data.start(), SlotFlags::READ_ONLY);
    let _ = vm.set_slot(&mut actor, READ_ONLY_SLOT, READ_ONLY, physical, 2 << 20, flags);
    let gpa = READ_ONLY + 0x3208;
    let gfn = Gfn::new(gpa / PAGE);
    let reason = EmulateReason::ReadOnly { gfn, slot: READ_ONLY_SLOT };
    let case = (Program::Write, Access::WRITE, gpa);
    refused(lab, "write-to-read-only", vcpu, case, FaultOutcome::Emulate(reason));

    restrict(vm, data_gfn(20), Attributes::NO_EXEC);
    let reason = EmulateReason::Denied { gfn: data_gfn(20) };
    let case = (Program::Call, Access::EXEC, data_at(20) + 8);
    refused(lab, "fetch-from-no-execute", vcpu, case, FaultOutcome::Emulate(reason));

    restrict(vm, data_gfn(21), Attributes::NO_EXEC | Attributes::NO_WRITE);
    for (name, program, access) in [
        ("write-to-restricted", Program::Write, Access::WRITE),
        ("fetch-from-restricted", Program::Call, Access::EXEC),
    ] {
        let reason = EmulateReason::Denied { gfn: data_gfn(21) };
        let case = (program, access, data_at(21) + 8);
        refused(lab, name, vcpu, case, FaultOutcome::Emulate(reason));
    }
}

/// Give one page these attributes.
pub fn restrict<V: Virt>(vm: &Vm<V>, gfn: Gfn, attributes: Attributes) {
    let mut actor = vm.actor();
    let range = GfnRange::from_len(gfn, 1);
    let mut slots = vm.slots.lock();
    let report = vm.mmu.set_attributes(slots.attributes(), &mut actor, range, attributes);
    let _ = report.unwrap_or_else(|error| panic!("attributes of {gfn}: {error}"));
}

/// Faults on the way through the guest's own tables.
fn guest_tables<V: Virt>(lab: &mut Lab<V>, vm: &Vm<V>, vcpu: &mut BareVcpu<V>) {
    let gpa = entry_of(data_at(0));
    let table = Gfn::new(gpa / PAGE);
    let mut actor = vm.actor();
    let gone = vm.mmu.unmap(&mut actor, GfnRange::from_len(table, 1));
    lab.equal("guest-table-was-mapped", gone.pages(), 1);
    // Hardware that maintains A and D walks the guest's tables as if it wrote them.
    let access = Access::WRITE;
    let wanted = Wanted { access, cause: Cause::NotPresent, stage: Stage::GuestTable, gpa };
    let name = "not-present-guest-table";
    let attempt = (Program::Read, data_at(0) + 0x10);
    if let Some(fault) = provoke(lab, name, vcpu, attempt, &wanted) {
        let outcome = vcpu.tdp().fault(&fault.page_fault());
        lab.equal(name, outcome, Ok(FaultOutcome::Fixed));
    }
    drop(actor);
    restrict(vm, table, Attributes::NO_WRITE);
    let name = "protected-guest-table";
    // The first fault maps it, without W.
    let exit = vcpu.attempt(&Task::pages(Program::Read, data_at(0) + 0x10, 1));
    if let Some(Exit::Nested(fault)) = lab.went(name, exit) {
        // The walk counts as a write, which the page does not permit: a read maps it.
        let read =
            mmu_core::fault::PageFault::new(fault.gpa, mmu_core::access::PfErrorCode::empty());
        lab.equal(name, vcpu.tdp().fault(&read), Ok(FaultOutcome::Fixed));
    }
    let wanted = Wanted { access, cause: Cause::Protection, stage: Stage::GuestTable, gpa };
    if let Some(fault) = provoke(lab, name, vcpu, attempt, &wanted) {
        let reason = EmulateReason::Denied { gfn: table };
        let found = vcpu.tdp().fault(&fault.page_fault());
        lab.equal(name, found, Ok(FaultOutcome::Emulate(reason)));
    }
    restrict(vm, table, Attributes::empty());
    let exit = vcpu.attempt(&Task::pages(Program::Read, data_at(0), 1));
    let again = matches!(exit, Ok(Exit::Nested(fault)) if fault.gpa.get() == gpa);
    lab.check("lifting-a-restriction-unmaps", again, format_args!("{exit:?}"));
    lab.went("guest-table-mended", vcpu.perform(&Task::pages(Program::Read, data_at(0), 1)));
}

/// A way to break an entry: name, bits to set, bits to clear.
type Breakage = (&'static str, u64, u64);

/// Bit 51 is above every physical address that these machines have.
const ADDRESS_BIT: u64 = 1 << 51;
/// What NPT refuses in a leaf.
const NPT: [Breakage; 1] = [("reserved-address-bit", ADDRESS_BIT, 0)];
/// What EPT refuses in a leaf: see SDM 3C, 28.3.3.1.
const EPT: [Breakage; 5] = [
    ("reserved-address-bit", ADDRESS_BIT, 0),
    ("writable-not-readable", 0, 0b101),
    ("writable-executable-not-readable", 0, 0b001),
    ("memory-type-2", 2 << 3, 5 << 3),
    ("memory-type-7", 7 << 3, 0),
];

fn reserved<V: Virt>(lab: &mut Lab<V>, vm: &Vm<V>, vcpu: &mut BareVcpu<V>) {
    let mut actor = vm.actor();
    let gpa = data_at(30);
    let mapped = vcpu.perform(&Task::pages(Program::Write, gpa, 1));
    if lab.went("reserved-warm-up", mapped).is_none() {
        return;
    }
    let Some(root) = lab.went("reserved-root", vcpu.tdp().load_root()) else { return };
    let places = vm.places(&mut actor, root, data_gfn(30));
    let ept = V::WORD == "ept";
    let (cause, stage) = match ept {
        true => (Cause::Misconfigured, Stage::Unknown),
        false => (Cause::Reserved, Stage::Final),
    };
    let wanted = Wanted { access: Access::READ, cause, stage, gpa };
    let names = ["reserved-in-4k-leaf", "reserved-in-2m-link", "reserved-in-1g-link"];
    for (name, (_, frame, index)) in names.into_iter().zip(places.iter().rev()) {
        with_broken(vm, vcpu, (*frame, *index), (ADDRESS_BIT, 0), |vcpu| {
            let _ = provoke(lab, name, vcpu, (Program::Read, gpa), &wanted);
        });
    }
    let Some((_, frame, index)) = places.last().copied() else { return };
    let breakages: &[Breakage] = if ept { &EPT } else { &NPT };
    for (name, set, clear) in breakages {
        with_broken(vm, vcpu, (frame, index), (*set, *clear), |vcpu| {
            let _ = provoke(lab, name, vcpu, (Program::Read, gpa), &wanted);
        });
    }
    let mended = vcpu.attempt(&Task::pages(Program::Read, gpa, 1));
    let done = mended.and_then(|exit| vcpu.done(exit));
    lab.check("mended-entries-translate-again", done.is_ok(), format_args!("{done:?}"));
    // At last let the MMU see one: it says so, and the VM is dead.
    with_broken(vm, vcpu, (frame, index), (ADDRESS_BIT, 0), |vcpu| {
        let Err(trouble) = vcpu.perform(&Task::pages(Program::Read, gpa, 1)) else {
            lab.check("a-corrupt-entry-is-reported", false, format_args!("the guest went on"));
            return;
        };
        let told = matches!(trouble, Trouble::Fault(_, FaultError::ReservedBit { level, .. })
            if level == Level::L1);
        lab.check("a-corrupt-entry-is-reported", told, format_args!("{trouble}"));
    });
    let dead = vm.mmu.vm().is_dead();
    lab.equal("a-corrupt-entry-ends-the-vm", dead, Some(DeadReason::CorruptEntry));
}

/// Do something while an entry has other bits, as hardware sees it.
fn with_broken<V: Virt>(
    vm: &Vm<V>,
    vcpu: &mut BareVcpu<V>,
    (frame, index): (mmu_core::addr::Pfn, usize),
    (set, clear): (u64, u64),
    work: impl FnOnce(&mut BareVcpu<V>),
) {
    use core::sync::atomic::Ordering::SeqCst;
    let entry = vm.host().entry(frame, index);
    let good = entry.load(SeqCst);
    entry.store(good & !clear | set, SeqCst);
    vcpu.machine().flush(LocalFlush::All);
    work(vcpu);
    entry.store(good, SeqCst);
    vcpu.machine().flush(LocalFlush::All);
}
