//! Guests in every mode that a processor has: real, protected, 32-bit paging, PAE, long.

use mmu_core::addr::Level;

use crate::guest::layout::{self, DATA, REAL_BYTES, REAL_DATA, stack};
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::Memory;
use crate::runner::Runner;
use crate::virt::state::gpr::{RBX, RDI, RDX, RSI};
use crate::virt::{Exit, GuestState, Mode, Virt};
use crate::vm::{Task, Vm, data_at, word};

/// Bytes that a 32-bit guest fills.
const BYTES: u64 = 64 << 10;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    real(lab);
    small(lab, "protected-mode", Mode::Protected, 0);
    small(lab, "32-bit-paging", Mode::Paged32, layout::DIRECTORY);
    small(lab, "pae-paging", Mode::Pae, layout::POINTERS);
    long(lab);
}

/// Run a program that fills and verifies; words that it found wrong.
fn run_small<V: Virt>(
    lab: &mut Lab<V>,
    name: &str,
    vm: &Vm<V>,
    mut state: GuestState,
    (address, count, value): (u64, u64, u64),
) -> Option<u64> {
    let mut vcpu = vm.vcpu(0);
    state.gpr[RDI] = address;
    state.gpr[RSI] = count;
    state.gpr[RDX] = value;
    *vcpu.state() = state;
    let done = vcpu.run().and_then(|exit| vcpu.done(exit));
    lab.went(name, done)?;
    let wrong = vcpu.state().gpr[RBX];
    let faults = vcpu.faults[0];
    lab.check(name, wrong == 0, format_args!("{count} words, {wrong} wrong, {faults} faults"));
    Some(wrong)
}

/// Half words or words at `offset` that are not their address XOR `value`.
fn wrong(
    memory: &Memory,
    (offset, bytes): (u64, u64),
    width: u64,
    expect: impl Fn(u64) -> u64,
) -> u64 {
    let found = |at: u64| {
        let shift = at % 8 * 8;
        word(memory, at) >> shift & (u64::MAX >> (64 - 8 * width))
    };
    let places = (offset..offset + bytes).step_by(width as usize);
    places.filter(|at| found(*at) != expect(at - offset)).count() as u64
}

fn real<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let state = GuestState::new(Mode::Real, Program::Small16.entry(), 0xff00, 0);
    let value = lab.random() & 0xffff;
    let Some(_) = run_small(lab, "real-mode", &vm, state, (0, REAL_BYTES / 2, value)) else {
        return;
    };
    let expect = |offset| (offset ^ value) & 0xffff;
    let found = wrong(&vm.low, (REAL_DATA, REAL_BYTES), 2, expect);
    lab.equal("real-mode-memory", found, 0);
    lab.equal("real-mode-frames-in-use", vm.end(), 0);
}

fn small<V: Virt>(lab: &mut Lab<V>, name: &str, mode: Mode, tables: u64) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut state = GuestState::new(mode, Program::Small32.entry(), stack(0), tables);
    if mode == Mode::Pae {
        state.pdpte = core::array::from_fn(|index| word(&vm.low, tables + index as u64 * 8));
    }
    let value = lab.random() & 0xffff_ffff;
    if run_small(lab, name, &vm, state, (DATA, BYTES / 4, value)).is_none() {
        return;
    }
    let expect = |offset| (DATA + offset) ^ value;
    let found = wrong(&vm.data, (0, BYTES), 4, expect);
    lab.equal("the-host-sees-what-it-wrote", found, 0);
    lab.equal("small-mode-frames-in-use", vm.end(), 0);
}

/// Long mode, twice on one CPU by turns: each sees its own memory.
fn long<V: Virt>(lab: &mut Lab<V>) {
    let (one, two) = (Vm::new(lab, lab.shape(2, Level::L1)), Vm::new(lab, lab.shape(2, Level::L1)));
    let (mut first, mut second) = (one.vcpu(0), two.vcpu(0));
    let task = |program, value| Task::pages(program, data_at(0), 512).value(value);
    let (a, b) = (lab.random(), lab.random());
    let mut wrong = 0;
    for round in 0..6 {
        let fill = [(&mut first, a), (&mut second, b)];
        for (vcpu, value) in fill {
            let program = if round == 0 { Program::Fill } else { Program::Verify };
            match lab.went("long-mode-by-turns", vcpu.perform(&task(program, value))) {
                Some(done) => wrong += done.wrong,
                None => return,
            }
        }
    }
    lab.check("long-mode-by-turns", wrong == 0, format_args!("two guests, {wrong} words wrong"));
    // Between two runs, somebody else's exits change nothing.
    first.begin(&task(Program::Stop, 0));
    let stopped = first.run();
    let right = matches!(stopped, Ok(Exit::Out { .. }));
    lab.check("long-mode-goes-on", right, format_args!("{stopped:?}"));
    drop((first, second));
    lab.equal("long-mode-frames-in-use", one.end() + two.end(), 0);
}
