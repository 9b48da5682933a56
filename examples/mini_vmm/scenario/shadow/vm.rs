//! The VM without two-dimensional paging: the guest's kernel runs at CPL 3, its privileged
//! instructions and writes to its tables trap, and the CPU walks shadow tables only.
//!
//! Owns [`ShadowVm`]. Its loop turns exits into what they mean:
//!
//! | exit | meaning |
//! |---|---|
//! | page fault, and the guest's tables do not permit the access | the guest's own: its handler |
//! | page fault, and they do | a shadow entry is missing: `ShadowVcpu::fault` |
//! | the same on a table with a shadow | decode the write, do it, tell the writer |
//! | general protection fault | decode the instruction, carry it out |
//! | anything else | an error that names the bytes |

use std::sync::{Arc, Mutex, PoisonError};

use iced_x86::Instruction;
use mmu_core::addr::{Gfn, Gpa, Gva, Hva, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Legacy, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::vm::{Actor, VmCore};
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Operation, Privilege, Request, WalkError,
    WriteProtect,
};
use shadow_mmu::{
    PageRole, ReclaimPolicy, ShadowMmu, ShadowStats, ShadowVcpu, ShadowWriter, WriterLock,
};

use super::decode::{Decoded, LONGEST, Unknown, decode, unknown};
use super::disturb::{Disturbance, Disturbed};
use super::execute::{Halt, execute};
use super::image::Start;
use super::memory::{Emulated, GuestMemory, NotReached};
use super::system::{CR0_WP, Effect, System, Trouble};
use crate::host::{DATA_GFN, Gates, VmmHost};
use crate::machine::{CodeExit, CodeVcpu, Flush, Layout, Machine, PAGE};
use crate::vmm::Error;

/// The writer of the shadow tables, in its mutex.
pub(super) struct Lock(Mutex<ShadowWriter<Legacy, VmmHost>>);

impl WriterLock<Legacy, VmmHost> for Lock {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<Legacy, VmmHost>) -> R) -> R {
        // A panic with the writer held ends the scenario; nobody else is there to see it.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Exits with a page fault.
    pub faults: u64,
    /// Of these, given to the guest.
    pub injected: u64,
    /// Writes to tables that were carried out for the guest.
    pub emulated: u64,
    /// Privileged instructions carried out.
    pub privileged: u64,
    /// Of these, loads of CR3.
    pub roots: u64,
    /// Of these, INVLPG.
    pub invalidated: u64,
}

/// How many shadow pages there may be, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Shadow pages.
    pub quota: u32,
    /// Who goes.
    pub policy: ReclaimPolicy,
    /// Throw flushes away, to show what they are for.
    pub forget_flushes: bool,
    /// The host does what it likes meanwhile, by this seed.
    pub disturb: Option<u64>,
}

/// A moment of the run.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// What the guest told just now.
    pub mark: Option<u64>,
    /// Shadow pages that there are.
    pub tables: u32,
    /// Leaves of 2 MiB that there are.
    pub large: u64,
    /// What was done to them so far.
    pub stats: ShadowStats,
}

/// A machine and where its memory is.
pub struct Machinery {
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// Its vCPU.
    pub cpu: Box<dyn CodeVcpu>,
    /// Its layout.
    pub layout: Layout,
}

/// A VM on shadow tables. See the file's head.
pub struct ShadowVm {
    machine: Arc<dyn Machine>,
    cpu: Box<dyn CodeVcpu>,
    lock: Lock,
    vcpu: ShadowVcpu<Legacy, VmmHost>,
    memory: GuestMemory,
    system: System,
    walker: GuestWalker,
    role: PageRole,
    /// Linear pages that the machine itself needs mapped.
    pinned: Vec<u64>,
    disturbance: Option<Disturbance>,
    /// What happened.
    pub counts: Counts,
    _slots: SlotWriter,
}

/// Turns of a fault or a mapping that others undo; each makes progress.
const TURNS: u32 = 64;

impl ShadowVm {
    /// A VM whose guest begins so.
    pub fn new(machinery: Machinery, start: &Start, rules: Rules) -> Result<Self, Error> {
        let Machinery { machine, mut cpu, layout } = machinery;
        let level = if machine.has_huge_pages() { Level::L2 } else { Level::L1 };
        let (gates, forget) = (Gates::new(1), rules.forget_flushes);
        let host = VmmHost::new(Arc::clone(&machine), &layout, gates, level, forget)?.shadowed();
        let config = SpteConfig::<Legacy>::new(Capabilities::legacy())?;
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (vm, mut slots) = VmCore::new(host, 4, limits, std::thread::yield_now)?;
        let mut actor = vm.actor()?;
        let data = (DATA_GFN, layout.data.start, layout.data.end - layout.data.start);
        for (id, (gfn, page, pages)) in machine.pinned().into_iter().chain([data]).enumerate() {
            add_slot(&vm, &mut slots, &mut actor, id as u16, [gfn, page, pages])?;
        }
        drop(actor);
        let (mmu, mut writer) = ShadowMmu::create(vm, config, rules.quota);
        writer.set_policy(rules.policy);
        let pages = layout.data.end - layout.data.start;
        let disturbance = rules.disturb.map(|seed| Disturbance::begin(&mmu, seed, pages));
        let system = System::new(start.cr3);
        let (walker, role) = mode(&system)?;
        *cpu.registers() = start.registers;
        let pinned = machine.pinned().into_iter().flat_map(|(linear, _, n)| linear..linear + n);
        Ok(Self {
            pinned: pinned.collect(),
            disturbance: disturbance.transpose()?,
            memory: GuestMemory::new(machine.memory(), &layout.data),
            machine,
            cpu,
            lock: Lock(Mutex::new(writer)),
            vcpu: ShadowVcpu::new(&mmu)?,
            system,
            walker,
            role,
            counts: Counts::default(),
            _slots: slots,
        })
    }

    /// Run until the guest halts; `seen` is told of each exit.
    pub fn run(&mut self, mut seen: impl FnMut(&Moment)) -> Result<(), Error> {
        self.load_root()?;
        loop {
            self.prepare()?;
            let effect = match self.cpu.run()? {
                CodeExit::Fault { gva, error } => {
                    self.fault(gva, error)?;
                    Effect::Nothing
                }
                CodeExit::Protection => self.privileged()?,
                CodeExit::Invalid => return Err(self.invalid()?.into()),
            };
            self.apply(effect)?;
            if let Some(disturbance) = &mut self.disturbance {
                disturbance.act(&self.lock);
            }
            let mark = if let Effect::Mark(mark) = effect { Some(mark) } else { None };
            let large = self.vcpu.actor().vm().stats().get(Counter::Pages2M);
            let (tables, stats) = self.lock.with(|writer| (writer.live_pages(), *writer.stats()));
            seen(&Moment { mark, tables, large, stats });
            if effect == Effect::Halted {
                return Ok(());
            }
        }
    }

    /// Instructions executed, where somebody counts.
    pub fn instructions(&self) -> Option<u64> {
        self.cpu.instructions()
    }

    /// What was done to shadow tables.
    pub fn stats(&self) -> ShadowStats {
        self.lock.with(|writer| *writer.stats())
    }

    /// The tables of the guest's CR3.
    fn root(&self) -> GuestRoot {
        GuestRoot::Cr3(self.system.cr3)
    }

    fn load_root(&mut self) -> Result<(), Error> {
        let root = self.vcpu.load_guest_root(
            &self.lock,
            &self.walker,
            &self.memory,
            &GuestRoot::Cr3(self.system.cr3),
            self.role,
        )?;
        Ok(self.cpu.set_root(root.get() / PAGE)?)
    }

    /// Before the guest is entered: a root that is good, and what the machine needs is mapped.
    fn prepare(&mut self) -> Result<(), Error> {
        for _ in 0..TURNS {
            if !self.vcpu.root_is_current() {
                self.load_root()?;
            }
            if self.map_pinned()? {
                return Ok(());
            }
        }
        Err("the machine's own pages do not stay mapped".into())
    }

    /// Map what the machine needs; was all of it there?
    fn map_pinned(&mut self) -> Result<bool, Error> {
        let mut all = true;
        for at in 0..self.pinned.len() {
            let gva = self.pinned[at] * PAGE;
            all &= self.shadow(gva, Operation::Write)? == Shadow::There;
        }
        Ok(all)
    }

    /// Have the shadow tables permit what the guest's do.
    fn shadow(&mut self, gva: u64, operation: Operation) -> Result<Shadow, Error> {
        let request = self.request(operation);
        let walk = self.walker.walk(&self.memory, &self.root(), Gva::new(gva), request);
        let walk = match walk {
            Ok(walk) => walk,
            Err(WalkError::Fault(fault)) => {
                return Ok(Shadow::Denied { error: fault.code.bits() as u32 });
            }
            Err(error) => return Err(error.into()),
        };
        let outcome = self.vcpu.fault(&self.lock, &self.walker, &self.memory, &walk, request)?;
        match outcome {
            FaultOutcome::Spurious => Ok(Shadow::There),
            FaultOutcome::Fixed | FaultOutcome::Retry => Ok(Shadow::Changed),
            FaultOutcome::WriteProtected => Ok(Shadow::Table),
            other => Err(format!("the access at {gva:#x} leads to {other:?}").into()),
        }
    }

    /// Ring 3 is all there is: what the guest accesses, it accesses as user code.
    fn request(&self, operation: Operation) -> Request {
        let write_protect = protect(&self.system);
        Request { write_protect, ..Request::new(operation, Privilege::User) }
    }

    /// A page fault of the CPU's.
    fn fault(&mut self, gva: u64, error: u32) -> Result<(), Error> {
        self.counts.faults += 1;
        let operation = match error {
            _ if error & 1 << 4 != 0 => Operation::Fetch,
            _ if error & 1 << 1 != 0 => Operation::Write,
            _ => Operation::Read,
        };
        match self.shadow(gva, operation)? {
            Shadow::There | Shadow::Changed => Ok(()),
            Shadow::Table => self.emulate(),
            Shadow::Denied { error } => {
                self.counts.injected += 1;
                self.inject(gva, error)
            }
        }
    }

    /// Give the guest a page fault.
    fn inject(&mut self, gva: u64, error: u32) -> Result<(), Error> {
        let root = self.root();
        let mut bus = Emulated::new(&self.memory, &self.walker, root);
        let registers = self.cpu.registers();
        let delivered = self.system.page_fault(&mut bus, registers, gva, error);
        let written = bus.into_written();
        delivered.map_err(|trouble| match trouble {
            Trouble::NoHandler => Error::from("the guest has no page fault handler"),
            Trouble::Stop(stop) => format!("no stack for the fault at {gva:#x}: {stop}").into(),
        })?;
        self.tell(&written);
        Ok(())
    }

    /// The instruction at rip, by the guest's tables.
    fn instruction(&mut self) -> Result<(Result<Instruction, Unknown>, Vec<u8>), Error> {
        let rip = self.cpu.registers().rip;
        let bus = Emulated::new(&self.memory, &self.walker, self.root());
        let bytes = bus.code(rip, LONGEST)?;
        let decoded = match decode(rip, &bytes) {
            Decoded::Instruction(instruction) => Ok(instruction),
            Decoded::Unknown(unknown) => Err(unknown),
            Decoded::Short => Err(Unknown { rip, bytes: bytes.clone(), what: "no end".to_owned() }),
        };
        Ok((decoded, bytes))
    }

    /// Carry out the write at rip for the guest: it goes to a table that has a shadow.
    fn emulate(&mut self) -> Result<(), Error> {
        self.counts.emulated += 1;
        let (decoded, bytes) = self.instruction()?;
        let instruction = decoded?;
        let mut bus = Emulated::new(&self.memory, &self.walker, GuestRoot::Cr3(self.system.cr3));
        let done = execute(&mut bus, self.cpu.registers(), &instruction);
        let written = bus.into_written();
        self.tell(&written);
        match done {
            Ok(()) => Ok(()),
            Err(Halt::Unknown) => Err(unknown(&instruction, &bytes).into()),
            // Another operand of it, which the guest's tables do not permit.
            Err(Halt::Stop(NotReached::Fault { gva, error })) => {
                self.counts.injected += 1;
                self.inject(gva, error)
            }
            Err(Halt::Stop(stop)) => Err(format!("{stop}").into()),
        }
    }

    /// Carry out the privileged instruction at rip.
    fn privileged(&mut self) -> Result<Effect, Error> {
        let (decoded, bytes) = self.instruction()?;
        let instruction = decoded?;
        if !System::is_privileged(&instruction) {
            return Err(unknown(&instruction, &bytes).into());
        }
        self.counts.privileged += 1;
        let mut bus = Emulated::new(&self.memory, &self.walker, GuestRoot::Cr3(self.system.cr3));
        match self.system.execute(&mut bus, self.cpu.registers(), &instruction) {
            Ok(effect) => Ok(effect),
            Err(Halt::Unknown) => Err(unknown(&instruction, &bytes).into()),
            Err(Halt::Stop(NotReached::Fault { gva, error })) => {
                self.counts.injected += 1;
                self.inject(gva, error)?;
                Ok(Effect::Nothing)
            }
            Err(Halt::Stop(stop)) => Err(format!("{stop}").into()),
        }
    }

    /// The CPU does not know the instruction at rip, and we do not either.
    fn invalid(&mut self) -> Result<Unknown, Error> {
        let (decoded, bytes) = self.instruction()?;
        Ok(match decoded {
            Ok(instruction) => unknown(&instruction, &bytes),
            Err(error) => error,
        })
    }

    /// What an instruction means for translations.
    fn apply(&mut self, effect: Effect) -> Result<(), Error> {
        match effect {
            Effect::Nothing | Effect::Mark(_) | Effect::Halted => Ok(()),
            Effect::Root => {
                self.counts.roots += 1;
                self.load_root()
            }
            Effect::Mode => {
                (self.walker, self.role) = mode(&self.system)?;
                self.load_root()
            }
            Effect::Invalidate(gva) => {
                self.counts.invalidated += 1;
                let (lock, memory) = (&self.lock, &self.memory);
                self.vcpu.guest_invalidated(lock, &self.walker, memory, Gva::new(gva));
                let page = gva / PAGE;
                let gfns = page..page + 1;
                let gfns = std::slice::from_ref(&gfns);
                let flush = Flush { gfns, pfns: &[], tables: &[], everything: false };
                Ok(self.machine.flush(&flush)?)
            }
        }
    }

    /// Tell the writer what was written for the guest.
    fn tell(&mut self, written: &[Gpa]) {
        for at in written {
            self.lock.with(|writer| writer.guest_wrote(self.vcpu.actor(), *at, 8));
        }
    }

    /// Take everything down.
    pub fn finish(mut self) -> Result<Remains, Error> {
        let disturbed = self.disturbance.take().map(Disturbance::end).transpose()?;
        let vm = Arc::clone(self.lock.with(|writer| Arc::clone(writer.mmu())).vm());
        let mut actor = vm.actor()?;
        let flaw = self.lock.with(|writer| writer.check(&mut actor)).err();
        self.vcpu.drop_roots(&self.lock);
        let tables = self.lock.with(|writer| {
            let _ = writer.shrink(&mut actor, u32::MAX);
            while writer.zap_obsolete(&mut actor) {}
            writer.live_pages()
        });
        let Self { lock, vcpu, .. } = self;
        drop((lock, vcpu, actor));
        // No section is open any more, so two grace periods pass at once.
        let _ = (0..4).map(|_| vm.pool().poll()).max();
        let stats = vm.stats();
        let count = |counter| stats.get(counter);
        Ok(Remains {
            flaw: flaw.map(|flaw| flaw.to_string()),
            disturbed: disturbed.unwrap_or_default(),
            tables,
            frames: vm.pool().frames_in_use(),
            leaves: [Counter::Pages4K, Counter::Pages2M].map(count).iter().sum(),
        })
    }
}

/// What is left of a VM; nothing should be.
#[derive(Clone, Debug)]
pub struct Remains {
    /// What did not agree while it was there.
    pub flaw: Option<String>,
    /// What the host did meanwhile.
    pub disturbed: Disturbed,
    /// Shadow pages.
    pub tables: u32,
    /// Table frames.
    pub frames: u64,
    /// Leaves.
    pub leaves: u64,
}

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shadow {
    /// The shadow permitted it before.
    There,
    /// It does now, or something changed: try again.
    Changed,
    /// It writes to a table with a shadow.
    Table,
    /// The guest's tables do not permit it.
    Denied { error: u32 },
}

/// CR0.WP.
fn protect(system: &System) -> WriteProtect {
    if system.cr0 & CR0_WP == 0 { WriteProtect::Off } else { WriteProtect::On }
}

/// How the guest's tables are read with these registers.
fn mode(system: &System) -> Result<(GuestWalker, PageRole), Error> {
    let cpu = GuestCpu { gbpages: false, ..GuestCpu::baseline() };
    let mut controls = GuestControls::empty();
    let bits = [
        (system.cr0, 31, GuestControls::PG),
        (system.cr4, 5, GuestControls::PAE),
        (system.efer, 8, GuestControls::LME),
        (system.efer, 11, GuestControls::NXE),
    ];
    for (register, bit, control) in bits {
        controls.set(control, register >> bit & 1 != 0);
    }
    let role = PageRole::of_guest(&cpu, controls, protect(system))?;
    Ok((GuestWalker::new(&cpu, controls)?, role))
}

/// A slot of `[gfn, page, pages]`.
fn add_slot(
    vm: &Arc<VmCore<VmmHost>>,
    slots: &mut SlotWriter,
    actor: &mut Actor<VmmHost>,
    id: u16,
    [gfn, page, pages]: [u64; 3],
) -> Result<(), Error> {
    let request = SlotRequest {
        as_id: 0,
        id,
        base: Gfn::new(gfn).address(),
        bytes: pages * PAGE,
        hva: Hva::new(vm.host().hva(page)),
        flags: SlotFlags::empty(),
    };
    let _ = vm.set_slot(slots, actor, &request, |_, _| {})?;
    Ok(())
}
