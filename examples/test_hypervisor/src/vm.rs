//! A VM as the suites use it: tables of the crates, memory, slots, vCPUs.
//!
//! Owns [`Shape`] and [`Vm`]. Lock: the slot writer's, taken by CPU 0.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::slot::{LogOptions, SlotChange, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Spte, SpteConfig};
use mmu_core::vm::{Actor, VmCore};
use tdp_mmu::{DirtyTracking, TdpMmu, TdpOptions};

use crate::guest::layout::{self, DATA, DATA_SLOT, LOW_BYTES, LOW_SLOT, WIDE, WIDE_SLOT};
use crate::guest::program::Program;
use crate::host::{BareHost, MAX_VCPUS};
use crate::lab::Lab;
use crate::machine::lock::Lock;
use crate::machine::memory::{Memory, PAGE};
use crate::runner::{Progress, Runner};
use crate::trouble::Trouble;
use crate::vcpu::{BareVcpu, Mmu};
use crate::virt::{Exit, GuestState, HardwareLog, Mode, VcpuSetup, Virt};

/// Table frames of a VM.
const FRAMES: u64 = 1024;
/// Threads that use a VM besides its vCPUs.
const OTHERS: usize = 4;

/// How a VM is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Capabilities of its tables.
    pub caps: Capabilities,
    /// Largest page that faults map.
    pub level: Level,
    /// How writes to logged slots are noticed.
    pub tracking: DirtyTracking,
    /// How its logs are kept.
    pub log: LogOptions,
    /// Bytes of data.
    pub data: u64,
}

/// What a program works on.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// What it does.
    pub program: Program,
    /// First address.
    pub address: u64,
    /// How many.
    pub count: u64,
    /// Distance between two.
    pub stride: u64,
    /// The value.
    pub value: u64,
    /// Rounds, for programs that have them.
    pub rounds: u64,
}

impl Task {
    /// `program` at the first word of each of `count` pages from `address` on.
    pub const fn pages(program: Program, address: u64, count: u64) -> Self {
        Self { program, address, count, stride: PAGE, value: 0, rounds: 1 }
    }

    /// `program` at each of `count` words from `address` on.
    pub const fn words(program: Program, address: u64, count: u64) -> Self {
        Self { stride: 8, ..Self::pages(program, address, count) }
    }

    /// The same with a value.
    pub const fn value(self, value: u64) -> Self {
        Self { value, ..self }
    }
}

/// What a program came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Words that were not as they should be.
    pub wrong: u64,
    /// The last of them: address, and what stood there.
    pub last: (u64, u64),
}

/// A VM.
pub struct Vm<V: Virt> {
    /// Its tables.
    pub mmu: Arc<Mmu<V>>,
    /// The right to change its slots.
    pub slots: Lock<SlotWriter>,
    /// Its low block.
    pub low: Memory,
    /// Its data.
    pub data: Memory,
    shape: Shape,
}

impl<V: Virt> Vm<V> {
    /// A VM with code, tables and data in place, nothing mapped.
    pub fn new(lab: &Lab<V>, shape: Shape) -> Self {
        Self::with_frames(lab, shape, FRAMES)
    }

    /// The same with memory for at least `frames` tables.
    pub fn with_frames(_: &Lab<V>, shape: Shape, frames: u64) -> Self {
        let config = SpteConfig::new(shape.caps).unwrap_or_else(|error| panic!("{error}"));
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let participants = MAX_VCPUS + OTHERS;
        let core = VmCore::with_log(
            BareHost::new(frames),
            participants,
            limits,
            core::hint::spin_loop,
            shape.log,
        );
        let (core, slots) = core.unwrap_or_else(|error| panic!("{error}"));
        let mut options = TdpOptions::default();
        options.max_level = shape.level;
        options.dirty = shape.tracking;
        let mmu = TdpMmu::new(core, config, options);
        let (low, data) = (Memory::new(LOW_BYTES), Memory::new(shape.data));
        layout::prepare(&low);
        let vm = Self { mmu, slots: Lock::new(slots), low, data, shape };
        let mut actor = vm.actor();
        let (start, bytes) = (vm.low.start(), LOW_BYTES);
        let _ = vm.set_slot(&mut actor, LOW_SLOT, 0, start, bytes, SlotFlags::empty());
        vm.set_data(&mut actor, SlotFlags::empty());
        vm
    }

    /// Create or change a slot; what that meant.
    pub fn set_slot(
        &self,
        actor: &mut Actor<BareHost>,
        id: u16,
        gpa: u64,
        physical: u64,
        bytes: u64,
        flags: SlotFlags,
    ) -> SlotChange {
        let (base, hva) = (Gpa::new(gpa), Hva::new(physical));
        let request = SlotRequest { as_id: 0, id, base, bytes, hva, flags };
        let change = self.mmu.set_slot(&mut self.slots.lock(), actor, &request);
        change.unwrap_or_else(|error| panic!("slot {id}: {error}")).change
    }

    /// Create the data slot, or give it these flags.
    pub fn set_data(&self, actor: &mut Actor<BareHost>, flags: SlotFlags) {
        let (start, bytes) = (self.data.start(), self.shape.data);
        let _ = self.set_slot(actor, DATA_SLOT, DATA, start, bytes, flags);
    }

    /// Create the window on the host's first GiB.
    pub fn open_window(&self, actor: &mut Actor<BareHost>) {
        let _ = self.set_slot(actor, WIDE_SLOT, WIDE, 0, 1 << 30, SlotFlags::empty());
    }

    /// A handle for a CPU that is no vCPU at the moment.
    pub fn actor(&self) -> Actor<BareHost> {
        self.mmu.vm().actor().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The embedder.
    pub fn host(&self) -> &BareHost {
        self.mmu.vm().host()
    }

    /// All data.
    pub fn data_range(&self) -> GfnRange {
        GfnRange::from_len(data_gfn(0), self.shape.data / PAGE)
    }

    /// vCPU number `id` on the calling CPU, to run 64-bit programs.
    pub fn vcpu(&self, id: usize) -> BareVcpu<V> {
        let tracked = self.mmu.dirty_tracking() == DirtyTracking::HardwareLog;
        let log = if tracked { HardwareLog::On } else { HardwareLog::Off };
        self.vcpu_with(id, VcpuSetup { log, ..VcpuSetup::NESTED })
    }

    /// The same, made as `setup` says.
    pub fn vcpu_with(&self, id: usize, setup: VcpuSetup) -> BareVcpu<V> {
        let mut vcpu = BareVcpu::new(&self.mmu, id, setup);
        let stack = layout::stack(id);
        *vcpu.state() = GuestState::new(Mode::Long, layout::CODE_64, stack, layout::LEVEL_4);
        vcpu
    }

    /// The leaf or hole for `gfn`, and its level.
    pub fn leaf(&self, actor: &mut Actor<BareHost>, gfn: Gfn) -> (Level, Spte) {
        let walk = self.mmu.lookup(actor, 0, gfn);
        walk.last().copied().unwrap_or((Level::L1, Spte::EMPTY))
    }

    /// The places of the entries on the way to `gfn`, from the root down: level, table frame,
    /// index. `root` is the frame that a vCPU has loaded.
    pub fn places(
        &self,
        actor: &mut Actor<BareHost>,
        root: Pfn,
        gfn: Gfn,
    ) -> arrayvec::ArrayVec<(Level, Pfn, usize), 5> {
        let mut frame = root;
        let mut places = arrayvec::ArrayVec::new();
        for (level, spte) in self.mmu.lookup(actor, 0, gfn) {
            places.push((level, frame, gfn.index(level)));
            frame = self.mmu.config().pfn(spte);
        }
        places
    }

    /// End: everything is given back. Returns the frames that are still in use, which none are.
    pub fn end(self) -> u64 {
        let mut actor = self.actor();
        let _ = self.mmu.destroy(&mut actor);
        drop(actor);
        let pool = self.mmu.vm().pool();
        // No section is open: two grace periods pass at once.
        for _ in 0..4 {
            pool.poll();
        }
        pool.frames_in_use() + pool.frames_waiting()
    }
}

/// Page `page` of the data.
pub const fn data_gfn(page: u64) -> Gfn {
    Gfn::new(DATA / PAGE + page)
}

/// Guest address of page `page` of the data.
pub const fn data_at(page: u64) -> u64 {
    DATA + page * PAGE
}

impl<V: Virt> Runner for BareVcpu<V> {
    fn registers(&mut self) -> &mut GuestState {
        self.state()
    }

    fn proceed(&mut self) -> Result<Progress, Trouble> {
        Ok(match self.enter()? {
            Exit::Nested(fault) => match self.handle(&fault)? {
                None => Progress::On,
                Some(outcome) => Progress::Refused(outcome, Trouble::Outcome(fault, outcome)),
            },
            Exit::LogFull => Progress::On,
            Exit::Interrupt => Progress::Interrupted,
            exit => Progress::Stopped(exit),
        })
    }

    fn faults(&self) -> [u64; 3] {
        self.faults
    }
}

impl<V: Virt> BareVcpu<V> {
    /// Run `task` until the first exit that is no interrupt, handling nothing.
    pub fn attempt(&mut self, task: &Task) -> Result<Exit, Trouble> {
        self.begin(task);
        loop {
            match self.enter()? {
                Exit::Interrupt => {}
                exit => return Ok(exit),
            }
        }
    }
}

/// The word at `offset` of a VM's memory, as the host sees it.
pub fn word(memory: &Memory, offset: u64) -> u64 {
    memory.word(offset).load(Ordering::Acquire)
}
