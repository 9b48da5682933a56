//! Faults on shadow tables, against the processor's own word: what a guest gets to see - nothing,
//! or a page fault with its address and error code - is what it sees on tables that hardware nests,
//! and so are the accessed and dirty bits that stay behind.
//!
//! Every set of permissions of a page and of the entry above it, by reads, writes and fetches of
//! supervisor and user, each by itself and all in some order, with CR0.WP, EFER.NXE, SMEP and SMAP
//! on and off.

use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use mmu_core::addr::Level;
use mmu_core::spte::Legacy;

use crate::guest::program::{DONE, FAULT, Program};
use crate::guest::system::{self, A, D, NX, P, Ring, Space, U, W};
use crate::lab::Lab;
use crate::runner::Runner;
use crate::shadow::twin::Twin;
use crate::shadow::vcpu::ShadowCpu;
use crate::shadow::vm::ShadowVm;
use crate::suite::faults::RET;
use crate::trouble::Trouble;
use crate::vcpu::BareVcpu;
use crate::virt::state::gpr::{R12, R13};
use crate::virt::{Exit, GuestState, LocalFlush, Vcpu, Virt};
use crate::vm::{Task, data_at};

/// The page that is accessed, and a word in it.
const PAGE: u64 = 3;
const OFFSET: u64 = 0x128;
/// Reserved in every entry, unless the processor has all 52 address bits.
const RESERVED: u64 = 1 << 51;
/// CR0.WP, EFER.NXE, CR4.SMEP, CR4.SMAP.
const WP: u64 = 1 << 16;
const NXE: u64 = 1 << 11;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;

/// A setting of the control registers.
struct Setting {
    name: &'static str,
    /// Bits of CR0 and EFER that are cleared.
    cr0_off: u64,
    efer_off: u64,
    /// Bits of CR4 that are set.
    cr4_on: u64,
}

const SETTINGS: [Setting; 6] = [
    Setting { name: "faults-with-wp", cr0_off: 0, efer_off: 0, cr4_on: 0 },
    Setting { name: "faults-without-wp", cr0_off: WP, efer_off: 0, cr4_on: 0 },
    Setting { name: "faults-without-nx", cr0_off: 0, efer_off: NXE, cr4_on: 0 },
    Setting { name: "faults-with-smep", cr0_off: 0, efer_off: 0, cr4_on: SMEP },
    Setting { name: "faults-with-smep-without-wp", cr0_off: WP, efer_off: 0, cr4_on: SMEP },
    Setting { name: "faults-with-smap-without-wp", cr0_off: WP, efer_off: 0, cr4_on: SMAP },
];

/// What a guest saw, and the entry of the page afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Address and error code; `None` if the access went through.
    fault: Option<(u64, u64)>,
    leaf: u64,
    /// The entry above, where a single access went through: nothing says what a fault leaves there.
    upper: Option<u64>,
}

/// The same guest twice.
struct Pair<V: Virt> {
    vm: Arc<ShadowVm<Legacy>>,
    shadow: ShadowCpu<V>,
    nested: BareVcpu<V>,
    space: Space,
    /// Where the two entries are.
    leaf: u64,
    upper: u64,
    /// Codes of faults that there were.
    codes: BTreeSet<u64>,
}

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let vm = ShadowVm::new(lab.shadow_caps(), 2 << 20);
    vm.ram.data.words().iter().for_each(|word| word.store(RET, Ordering::Relaxed));
    let space = Space::with_data(&vm.ram, Level::L1);
    let twin = Twin::new(lab, &vm.ram);
    let (tree, ram, data) = (space.tree, &vm.ram, data_at(PAGE));
    let leaf = tree.place(ram, data, Level::L1);
    let upper = tree.place(ram, data, Level::L2);
    let shadow = ShadowCpu::new(&vm, 0, &lab.features);
    let vm = Arc::clone(&vm);
    let mut pair =
        Pair { vm, shadow, nested: twin.vcpu(), space, leaf, upper, codes: BTreeSet::new() };
    let offered = core::arch::x86_64::__cpuid_count(7, 0).ebx;
    for setting in &SETTINGS {
        let missing = [(SMEP, 1 << 7, "no SMEP"), (SMAP, 1 << 20, "no SMAP")]
            .into_iter()
            .find(|(bit, cpuid, _)| setting.cr4_on & bit != 0 && offered & cpuid == 0);
        match missing {
            Some((_, _, reason)) => lab.skip(setting.name, reason),
            None => pair.compare(lab, setting),
        }
    }
    kinds(lab, &pair.codes);
    handled(lab, &mut pair);
    alone(lab, &mut pair, &SETTINGS[1], "a-write-without-wp-is-the-supervisors-alone");
    if offered & 1 << 7 != 0 {
        alone(lab, &mut pair, &SETTINGS[4], "and-not-executed-with-smep");
    }
    let vm = Arc::clone(&pair.vm);
    drop((pair, twin));
    lab.equal("shadow-faults-left", vm.end(), (0, 0));
}

/// Permissions of the page, then of the entry above.
fn entries(reserved: Option<u64>) -> impl Iterator<Item = (u64, u64)> {
    let leaves = (0..8).map(|bits| {
        let has = |bit: u64, value| if bits & bit != 0 { value } else { 0 };
        P | has(1, W) | has(2, U) | has(4, NX)
    });
    let leaves = leaves.chain([0, W | U]).chain(reserved.map(|bit| P | W | U | bit));
    leaves.flat_map(|leaf| {
        [P | W | U, P | U, P | W, P | W | U | NX, W | U].into_iter().map(move |upper| (leaf, upper))
    })
}

/// Bits of an error code.
const CODE_PRESENT: u64 = 1;
const CODE_RESERVED: u64 = 8;

const PERMISSIONS: u64 = P | W | U | NX | RESERVED | A | D;

/// An access: what it does, and as whom.
type Access = (Program, Ring);

/// Every access that there is.
const ACCESSES: [Access; 6] = [
    (Program::Read, Ring::Supervisor),
    (Program::Read, Ring::User),
    (Program::Write, Ring::Supervisor),
    (Program::Write, Ring::User),
    (Program::Call, Ring::Supervisor),
    (Program::Call, Ring::User),
];

/// What goes before an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Everything was flushed.
    Flush,
    /// Other accesses to the same page: what let them through must let this one through only if
    /// the tables do.
    Accesses,
}

/// Whose tables the processor walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    Guests,
    Shadows,
}

impl<V: Virt> Pair<V> {
    /// Each access by itself, and all of them in some order.
    fn compare(&mut self, lab: &mut Lab<V>, setting: &Setting) {
        let (mut cases, mut faults, mut differ) = (0, 0, 0);
        let reserved = (lab.features.phys_bits < 52).then_some(RESERVED);
        let mut first = None;
        for entries in entries(reserved) {
            let mut all = ACCESSES;
            (1..all.len())
                .for_each(|last| all.swap(last, (lab.random() % (last as u64 + 1)) as usize));
            for accesses in ACCESSES.chunks(1).chain([all.as_slice()]) {
                let [nested, shadow] = [Tables::Guests, Tables::Shadows].map(|tables| {
                    let seen = self.accesses(setting, entries, accesses, tables);
                    lab.went(setting.name, seen)
                });
                let (Some(nested), Some(shadow)) = (nested, shadow) else { return };
                for (nested, shadow) in nested.into_iter().zip(shadow) {
                    let nested = by_the_manual(lab, nested);
                    cases += 1;
                    faults += u64::from(shadow.fault.is_some());
                    self.codes.extend(shadow.fault.map(|(_, code)| code));
                    if nested != shadow {
                        differ += 1;
                        first.get_or_insert((entries, all, nested, shadow));
                    }
                }
            }
        }
        let detail = format_args!(
            "{cases} accesses, {faults} faults, {differ} unlike the processor's own: {first:x?}"
        );
        lab.check(setting.name, differ == 0 && faults > 0 && faults < cases, detail);
    }

    /// Make accesses, one after the other, with these entries.
    fn accesses(
        &mut self,
        setting: &Setting,
        (leaf, upper): (u64, u64),
        accesses: &[Access],
        tables: Tables,
    ) -> Result<ArrayVec<Seen, { ACCESSES.len() }>, Trouble> {
        self.write(leaf, upper);
        let mut seen = ArrayVec::new();
        for access in accesses {
            let before = if seen.is_empty() { Before::Flush } else { Before::Accesses };
            let fault = match tables {
                Tables::Guests => self.nested(setting, *access, before)?,
                Tables::Shadows => self.shadow(setting, *access, before)?,
            };
            let word = |place| self.vm.ram.at(place).load(Ordering::Acquire);
            let alone = accesses.len() == 1 && fault.is_none();
            let (leaf, upper) = (word(self.leaf), alone.then(|| word(self.upper)));
            seen.push(Seen { fault, leaf, upper });
        }
        Ok(seen)
    }

    /// Registers for an access, and its task.
    fn begin(&self, setting: &Setting, (program, ring): Access) -> (GuestState, Task) {
        let mut state = system::registers(0, self.space.tree.root, ring);
        state.cr0 &= !setting.cr0_off;
        state.efer &= !setting.efer_off;
        state.cr4 |= setting.cr4_on;
        (state, Task::pages(program, data_at(PAGE) + OFFSET, 1).value(RET))
    }

    /// Put the two entries in.
    fn write(&mut self, leaf: u64, upper: u64) {
        let ram = Arc::clone(&self.vm.ram);
        for (place, bits) in [(self.leaf, leaf), (self.upper, upper)] {
            let address = ram.at(place).load(Ordering::Acquire) & !PERMISSIONS;
            self.vm.write(self.shadow.seat.shadow.actor(), place, address | bits);
        }
    }

    /// Address and code of the fault, if there is one.
    fn nested(
        &mut self,
        setting: &Setting,
        access: Access,
        before: Before,
    ) -> Result<Option<(u64, u64)>, Trouble> {
        let (state, task) = self.begin(setting, access);
        *self.nested.state() = state;
        if before == Before::Flush {
            self.nested.machine().flush(LocalFlush::Context);
        }
        self.nested.begin(&task);
        offset_entry(self.nested.state(), access.1);
        match self.nested.run()? {
            Exit::Out { port: DONE, .. } => Ok(None),
            Exit::PageFault { address, code } => Ok(Some((address, code))),
            exit => Err(Trouble::Exit(exit, self.nested.state().rip)),
        }
    }

    /// The same on shadows.
    fn shadow(
        &mut self,
        setting: &Setting,
        access: Access,
        before: Before,
    ) -> Result<Option<(u64, u64)>, Trouble> {
        let (state, task) = self.begin(setting, access);
        match before {
            Before::Flush => self.shadow.start(state),
            Before::Accesses => self.shadow.resume(state),
        }
        self.shadow.begin(&task);
        offset_entry(self.shadow.registers(), access.1);
        match self.shadow.run()? {
            Exit::Out { port: DONE, .. } => Ok(None),
            Exit::Out { port: FAULT, .. } => {
                let gpr = self.shadow.registers().gpr;
                Ok(Some((gpr[R12], gpr[R13])))
            }
            exit => Err(Trouble::Exit(exit, self.shadow.registers().rip)),
        }
    }
}

/// What the processor said, as its manual has it.
fn by_the_manual<V: Virt>(lab: &mut Lab<V>, mut seen: Seen) -> Seen {
    if let Some((_, code)) = &mut seen.fault
        && *code & (CODE_RESERVED | CODE_PRESENT) == CODE_RESERVED
    {
        let text = format_args!(
            "error code {code:#x} has RSV and not P; APM 2, 8.4.2: P is clear if the fault was \
             caused by a not-present page"
        );
        lab.note("pf-reserved-without-present", text);
        *code |= CODE_PRESENT;
    }
    seen
}

/// User mode sees the program somewhere else.
fn offset_entry(state: &mut GuestState, ring: Ring) {
    state.rip += ring.base();
}

/// Were there faults of every kind?
fn kinds<V: Virt>(lab: &mut Lab<V>, codes: &BTreeSet<u64>) {
    // Not present, protection, reserved; read, write, fetch; supervisor, user.
    let wanted = [0, 2, 0x10, 4, 6, 0x14, 3, 0x11, 5, 7, 0x15];
    // What is present a supervisor may read, but for SMAP.
    let smap = core::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 20 != 0;
    let reserved = [9, 0xb, 0x19, 0xd, 0xf, 0x1d];
    let reserved = reserved.into_iter().filter(|_| lab.features.phys_bits < 52);
    let wanted = wanted.into_iter().chain(reserved).chain(smap.then_some(1));
    let missing = wanted.filter(|code| !codes.contains(code)).count();
    lab.check("every-kind-of-fault", missing == 0, format_args!("error codes {codes:x?}"));
}

/// The guest's handler is told, its kernel mends the page, the instruction goes on.
fn handled<V: Virt>(lab: &mut Lab<V>, pair: &mut Pair<V>) {
    for (name, ring) in
        [("a-mended-page-goes-on", Ring::Supervisor), ("in-user-mode-too", Ring::User)]
    {
        pair.write(0, P | W | U);
        let setting = &SETTINGS[0];
        let (state, task) = pair.begin(setting, (Program::Write, ring));
        pair.shadow.start(state);
        pair.shadow.begin(&task.value(0x5eed));
        offset_entry(pair.shadow.registers(), ring);
        let fault = pair.shadow.run();
        let told = matches!(fault, Ok(Exit::Out { port: FAULT, .. }));
        pair.write(P | W | U, P | W | U);
        let end = pair.shadow.run();
        let ended = matches!(end, Ok(Exit::Out { port: DONE, .. }));
        let word = pair.vm.ram.data.word(PAGE * 4096 + OFFSET).swap(RET, Ordering::AcqRel);
        let held = told && ended && word == 0x5eed;
        lab.check(name, held, format_args!("{fault:?}, then {end:?}, the word is {word:#x}"));
    }
}

/// A supervisor has written to a user's read-only page, with CR0.WP clear. The entry that let it
/// lets no user write, and with SMEP no supervisor fetch.
fn alone<V: Virt>(lab: &mut Lab<V>, pair: &mut Pair<V>, setting: &Setting, name: &str) {
    pair.write(P | U, P | W | U);
    let accesses = if setting.cr4_on & SMEP == 0 {
        [(Program::Write, Ring::Supervisor), (Program::Write, Ring::User)]
    } else {
        [(Program::Write, Ring::Supervisor), (Program::Call, Ring::Supervisor)]
    };
    let exits = accesses.map(|(program, ring)| {
        let (state, task) = pair.begin(setting, (program, ring));
        pair.shadow.resume(state);
        pair.shadow.begin(&task);
        offset_entry(pair.shadow.registers(), ring);
        let exit = pair.shadow.run();
        (exit, pair.shadow.registers().gpr[R13])
    });
    let wanted = if setting.cr4_on & SMEP == 0 { 7 } else { 0x11 };
    let held = matches!(
        exits,
        [(Ok(Exit::Out { port: DONE, .. }), _), (Ok(Exit::Out { port: FAULT, .. }), code)]
            if code == wanted
    );
    lab.check(name, held, format_args!("{exits:x?}"));
}
