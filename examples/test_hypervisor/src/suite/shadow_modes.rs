//! Guests of other modes on shadow tables: 32-bit code without paging, with tables of four-byte
//! entries and large pages, and with PAE. The processor itself runs with PAE's three levels.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::addr::{Gpa, Level};
use mmu_core::spte::{Capabilities, Legacy};
use shadow_mmu::WriterLock;
use shadow_mmu::guest::{EntryWidth, Exchange, GuestMem};

use crate::guest::layout::{self, CODE_32, DATA, LOW_BYTES};
use crate::guest::program::Program;
use crate::guest::system::{A, D, P, PS, U, W};
use crate::guest::tree::Tree;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::shadow::vcpu::ShadowCpu;
use crate::shadow::vm::ShadowVm;
use crate::trouble::Trouble;
use crate::virt::{GuestState, Mode, Virt};
use crate::vm::{Done, Task};

/// Bytes of data: holds a block of 4 MiB wherever it begins.
const BYTES: u64 = 8 << 20;
/// 32-bit words that a program works on.
const WORDS: u64 = 3000;
/// Where a page of 4 MiB is mapped.
const LARGE: u64 = 2 << 30;
const LARGE_BYTES: u64 = 4 << 20;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let caps = Capabilities { max_phys_bits: lab.features.phys_bits, ..Capabilities::pae() };
    let vm = ShadowVm::new(caps, BYTES);
    let parts: [(&str, Part<V>); 3] =
        [("without-paging", unpaged), ("paged-32", paged), ("pae", pae)];
    for (name, part) in parts {
        let mut vcpu = ShadowCpu::new(&vm, 0, &lab.features);
        let went = part(lab, &vm, &mut vcpu);
        let _ = lab.went(name, went);
    }
    let books = vm.check(&mut vm.actor());
    let _ = lab.went("shadow-modes-agree", books);
    lab.equal("shadow-modes-left", vm.end(), (0, 0));
}

type Part<V> = fn(&mut Lab<V>, &Arc<ShadowVm<Legacy>>, &mut ShadowCpu<V>) -> Result<(), Trouble>;

/// Fill and verify from `address` on, with code at `code` and what else `mode` needs.
fn work<V: Virt>(
    vcpu: &mut ShadowCpu<V>,
    mode: Mode,
    (code, tables): (u64, u64),
    (address, value): (u64, u64),
) -> Result<Done, Trouble> {
    vcpu.start(GuestState::new(mode, code, layout::stack(0), tables));
    let task = Task { stride: value, ..Task::words(Program::Small32, address, WORDS) };
    vcpu.begin(&task);
    vcpu.registers().rip = code;
    let exit = vcpu.run()?;
    vcpu.done(exit)
}

/// Words at `offset` of the data that are not what the program at `address` has left there.
fn wrong(vm: &ShadowVm<Legacy>, offset: u64, (address, value): (u64, u64)) -> usize {
    let found = |index: u64| {
        let at = Gpa::new(vm.ram.data.start() + offset + index * 4);
        vm.ram.read(at, EntryWidth::Four).unwrap_or(0)
    };
    (0..WORDS).filter(|index| found(*index) != (address + index * 4) ^ value).count()
}

fn unpaged<V: Virt>(
    lab: &mut Lab<V>,
    vm: &Arc<ShadowVm<Legacy>>,
    vcpu: &mut ShadowCpu<V>,
) -> Result<(), Trouble> {
    let (code, to) = (vm.ram.low.start() + CODE_32, (vm.ram.data.start(), 0x1111));
    let done = work(vcpu, Mode::Protected, (code, 0), to)?;
    lab.equal("32-bit-code-without-paging", (done.wrong, wrong(vm, 0, to)), (0, 0));
    Ok(())
}

/// Replace an entry of four bytes, as a guest does.
fn put(vm: &ShadowVm<Legacy>, place: u64, entry: u64) {
    let (at, width) = (Gpa::new(place), EntryWidth::Four);
    let old = vm.ram.read(at, width).unwrap_or(0);
    let done = vm.ram.compare_exchange(at, width, old, entry);
    assert_eq!(done, Ok(Exchange::Done), "nobody else writes here");
    let mut actor = vm.actor();
    vm.writer.with(|writer| writer.guest_wrote(&mut actor, at, 4));
}

fn paged<V: Virt>(
    lab: &mut Lab<V>,
    vm: &Arc<ShadowVm<Legacy>>,
    vcpu: &mut ShadowCpu<V>,
) -> Result<(), Trouble> {
    let ram = &vm.ram;
    let (directory, low, data) = (ram.table(), ram.table(), ram.table());
    let link = P | W | U | A;
    put(vm, directory, low | link);
    put(vm, directory + (DATA >> 22) * 4, data | link);
    for page in 0..LOW_BYTES / PAGE {
        put(vm, low + page * 4, (ram.low.start() + page * PAGE) | link | D);
    }
    for page in 0..8 {
        put(vm, data + page * 4, (ram.data.start() + page * PAGE) | P | W);
    }
    let run = (CODE_32, directory);
    let to = (DATA, 0x2222);
    let done = work(vcpu, Mode::Paged32, run, to)?;
    lab.equal("32-bit-paging", (done.wrong, wrong(vm, 0, to)), (0, 0));
    let used = ram.read(Gpa::new(data), EntryWidth::Four).unwrap_or(0) & (A | D);
    lab.equal("32-bit-accessed-and-dirty", used, A | D);
    // The same addresses lead elsewhere.
    for page in 0..8 {
        put(vm, data + page * 4, (ram.data.start() + (page + 100) * PAGE) | P | W);
    }
    let to = (DATA, 0x3333);
    let done = work(vcpu, Mode::Paged32, run, to)?;
    lab.equal("32-bit-tables-edited", (done.wrong, wrong(vm, 100 * PAGE, to)), (0, 0));
    // A page of 4 MiB is two of the shadow's; the words lie across the middle.
    let block = ram.data.start().next_multiple_of(LARGE_BYTES);
    put(vm, directory + (LARGE >> 22) * 4, block | P | W | PS);
    let middle = LARGE_BYTES / 2 - PAGE;
    let to = (LARGE + middle, 0x4444);
    let done = work(vcpu, Mode::Paged32, run, to)?;
    let offset = block + middle - ram.data.start();
    lab.equal("a-page-of-4-mib", (done.wrong, wrong(vm, offset, to)), (0, 0));
    Ok(())
}

fn pae<V: Virt>(
    lab: &mut Lab<V>,
    vm: &Arc<ShadowVm<Legacy>>,
    vcpu: &mut ShadowCpu<V>,
) -> Result<(), Trouble> {
    let ram = &vm.ram;
    let pointers = ram.table();
    let link = P | W | U | A;
    let [low, data] = [0, DATA].map(|first| {
        let tree = Tree::new(ram, Level::L2, link);
        ram.at(pointers + (first >> 30) * 8).store(tree.root | P, Ordering::Relaxed);
        tree
    });
    for offset in (0..LOW_BYTES).step_by(PAGE as usize) {
        low.set(ram, offset, Level::L1, (ram.low.start() + offset) | link | D);
    }
    for page in 0..8 {
        data.set(ram, DATA + page * PAGE, Level::L1, (ram.data.start() + page * PAGE) | P | W);
    }
    let run = (CODE_32, pointers);
    let to = (DATA, 0x5555);
    let done = work(vcpu, Mode::Pae, run, to)?;
    lab.equal("pae-paging", (done.wrong, wrong(vm, 0, to)), (0, 0));
    let mut actor = vm.actor();
    for page in 0..8 {
        let place = data.place(ram, DATA + page * PAGE, Level::L1);
        vm.write(&mut actor, place, (ram.data.start() + (page + 200) * PAGE) | P | W);
    }
    let to = (DATA, 0x6666);
    let done = work(vcpu, Mode::Pae, run, to)?;
    lab.equal("pae-tables-edited", (done.wrong, wrong(vm, 200 * PAGE, to)), (0, 0));
    // A large page, in the second directory's next entry.
    let large = DATA + (2 << 20);
    data.set(ram, large, Level::L2, (ram.data.start() + (2 << 20)) | P | W | PS);
    let to = (large, 0x7777);
    let done = work(vcpu, Mode::Pae, run, to)?;
    lab.equal("a-large-page-of-pae", (done.wrong, wrong(vm, 2 << 20, to)), (0, 0));
    Ok(())
}
