//! A VM: a machine, the MMU under test, and the loop that turns exits into faults.
//!
//! Owns [`Vmm`] and [`VmmVcpu`]. Every scenario builds one, runs commands on its vCPUs, and ends
//! with [`Vmm::teardown`], which checks that nothing is left.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level};
use mmu_core::dirty::DirtyRing;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{LogOptions, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::ResolveError;
use mmu_core::vm::{Actor, VmCore};
use tdp_mmu::{DirtyTracking, TdpMmu, TdpOptions, TdpVcpu};

use super::host::{DATA_GFN, Gates, Pause, Paused, VmmHost};
use super::machine::{self, Command, Exit, Layout, Machine, PAGE};
use super::report::Report;

/// Anything that ends a scenario early, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Slot ids: 0 upward for data, from here for what the machine pins.
const PINNED_SLOT: u16 = 1000;

/// How a VM is laid out and configured.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Pages of guest data.
    pub pages: u64,
    /// Memory slots the data is divided into.
    pub slots: u64,
    /// Largest page the host offers.
    pub level: Level,
    /// Throw flushes away, to show what they are for.
    pub forget_flushes: bool,
    /// How writes to logged slots are noticed.
    pub tracking: DirtyTracking,
    /// How a slot's dirty log begins.
    pub log: LogOptions,
}

impl Shape {
    /// 4 KiB pages in one slot.
    pub fn new(vcpus: u32, pages: u64) -> Self {
        Self {
            vcpus,
            pages,
            slots: 1,
            level: Level::L1,
            forget_flushes: false,
            tracking: DirtyTracking::WriteProtect,
            log: LogOptions::default(),
        }
    }

    /// Where things stand in physical memory.
    pub fn layout(&self) -> Layout {
        let stub = 0..256;
        // One level-1 table per 512 pages, twice (a zap-all builds the new tree while the old one
        // waits), and what caches and upper levels hold.
        let tables = self.pages.div_ceil(512) * 3 + 64 * (u64::from(self.vcpus) + 8);
        // 2 MiB aligned, congruent with the guest's addresses.
        let data = (stub.end + tables).next_multiple_of(512);
        Layout { stub: stub.clone(), tables: stub.end..data, data: data..data + self.pages }
    }
}

/// Counts that vCPU loops keep beside the MMU's own.
#[derive(Debug, Default)]
pub struct Exits {
    /// Page-fault exits, pinned pages excluded.
    pub faults: AtomicU64,
    /// Of those, spurious: another vCPU had mapped the page.
    pub spurious: AtomicU64,
    /// Of those, to be tried again: a race was lost.
    pub retried: AtomicU64,
    /// Of those, on a gfn without slot: waited and tried again.
    pub no_slot: AtomicU64,
    /// Of those, with the dirty ring full: the vCPU harvested and reset it.
    pub ring_full: AtomicU64,
    /// Roots loaded.
    pub reloads: AtomicU64,
}

/// A VM.
pub struct Vmm<F: SpteFormat> {
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// The MMU under test.
    pub mmu: Arc<TdpMmu<F, VmmHost>>,
    /// The right to change memory slots.
    pub slots: Mutex<SlotWriter>,
    /// Layout of physical memory.
    pub layout: Layout,
    /// Shape it was made with.
    pub shape: Shape,
    /// Counts.
    pub exits: Exits,
    gates: Arc<Gates>,
    pause: Pause,
    /// Data pages that were harvested from dirty rings, and reset. Held while somebody does that.
    harvested: Mutex<Vec<u64>>,
}

impl<F: SpteFormat> Vmm<F> {
    /// Build a VM on `machine`, whose memory is laid out as `shape` says.
    pub fn new(
        machine: Arc<dyn Machine>,
        config: SpteConfig<F>,
        shape: Shape,
    ) -> Result<Arc<Self>, Error> {
        let layout = shape.layout();
        let gates = Gates::new(shape.vcpus);
        let host = VmmHost::new(
            Arc::clone(&machine),
            &layout,
            Arc::clone(&gates),
            shape.level,
            shape.forget_flushes,
        )?;
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let participants = shape.vcpus as usize + 8;
        let give_up = std::thread::yield_now;
        let (core, slots) = VmCore::with_log(host, participants, limits, give_up, shape.log)?;
        let mut options = TdpOptions::default();
        options.dirty = shape.tracking;
        // What the host has, and never more: where KVM shadows, 2M entries must not appear.
        options.max_level = shape.level;
        let mmu = TdpMmu::new(core, config, options);
        let vmm = Arc::new(Self {
            machine,
            mmu,
            slots: Mutex::new(slots),
            layout,
            shape,
            exits: Exits::default(),
            gates,
            pause: Pause::default(),
            harvested: Mutex::new(Vec::new()),
        });
        let mut actor = vmm.actor()?;
        for (index, (linear, physical, pages)) in vmm.machine.pinned().into_iter().enumerate() {
            let id = PINNED_SLOT + index as u16;
            vmm.set_slot(&mut actor, id, linear, physical, pages, SlotFlags::empty())?;
        }
        for slot in 0..vmm.shape.slots {
            vmm.create_slot(&mut actor, slot)?;
        }
        Ok(vmm)
    }

    /// A handle for a thread that is no vCPU.
    pub fn actor(&self) -> Result<Actor<VmmHost>, Error> {
        Ok(self.mmu.vm().actor()?)
    }

    fn set_slot(
        &self,
        actor: &mut Actor<VmmHost>,
        id: u16,
        gfn: u64,
        page: u64,
        pages: u64,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let request = SlotRequest {
            as_id: 0,
            id,
            base: Gpa::new(gfn * PAGE),
            bytes: pages * PAGE,
            hva: Hva::new(self.mmu.vm().host().hva(page)),
            flags,
        };
        let mut slots = self.slots.lock().map_err(|_| "a thread panicked holding the slots")?;
        let _ = self.mmu.set_slot(&mut slots, actor, &request)?;
        Ok(())
    }

    /// Data pages of slot `slot`, as offsets into the data.
    pub fn slot_pages(&self, slot: u64) -> Range<u64> {
        let per = self.shape.pages.div_ceil(self.shape.slots);
        (slot * per).min(self.shape.pages)..((slot + 1) * per).min(self.shape.pages)
    }

    /// Create data slot `slot`.
    pub fn create_slot(&self, actor: &mut Actor<VmmHost>, slot: u64) -> Result<(), Error> {
        self.flag_slot(actor, slot, SlotFlags::empty())
    }

    /// Give data slot `slot` these flags; it is created if there is none.
    pub fn flag_slot(
        &self,
        actor: &mut Actor<VmmHost>,
        slot: u64,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let pages = self.slot_pages(slot);
        let physical = self.layout.data.start + pages.start;
        let count = pages.end - pages.start;
        self.set_slot(actor, slot as u16, DATA_GFN + pages.start, physical, count, flags)
    }

    /// Delete data slot `slot`; when this returns no vCPU reaches its pages.
    pub fn delete_slot(&self, actor: &mut Actor<VmmHost>, slot: u64) -> Result<(), Error> {
        let (id, start) = (slot as u16, self.layout.data.start);
        self.set_slot(actor, id, DATA_GFN, start, 0, SlotFlags::empty())
    }

    /// The guest frames of data pages.
    pub fn gfns(&self, pages: Range<u64>) -> GfnRange {
        GfnRange::new(Gfn::new(DATA_GFN + pages.start), Gfn::new(DATA_GFN + pages.end))
    }

    /// All guest data.
    pub fn all_gfns(&self) -> GfnRange {
        self.gfns(0..self.shape.pages)
    }

    /// Harvest the dirty rings and reset them.
    pub fn drain_rings(&self, actor: &mut Actor<VmmHost>) -> Result<(), Error> {
        // Held all the while: whoever takes the pages reads their contents, which is too early
        // before they were reset.
        let mut harvested = self.harvested.lock().map_err(|_| "a thread panicked draining")?;
        let core = Arc::clone(self.mmu.vm());
        for page in core.rings().iter().flat_map(DirtyRing::consumer) {
            let slot = self.slot_pages(u64::from(page.key.id));
            harvested.push(slot.start + page.offset);
        }
        let _ = self.mmu.reset_rings(actor)?;
        Ok(())
    }

    /// The data pages that were in dirty rings since the last call.
    pub fn take_harvested(&self) -> Result<Vec<u64>, Error> {
        let mut harvested = self.harvested.lock().map_err(|_| "a thread panicked draining")?;
        Ok(std::mem::take(&mut *harvested))
    }

    /// Leaves of 4 KiB, 2 MiB and 1 GiB that map guest data, recounted.
    pub fn sizes(&self, actor: &mut Actor<VmmHost>) -> Result<[u64; 3], Error> {
        let mut sizes = self.mmu.check(actor)?.leaves;
        let pinned: u64 = self.machine.pinned().iter().map(|(_, _, pages)| pages).sum();
        sizes[0] -= pinned;
        Ok(sizes)
    }

    /// The share of the data pages that belongs to one vCPU.
    pub fn share(&self, vcpu: u32) -> Range<u64> {
        let (vcpu, vcpus) = (u64::from(vcpu), u64::from(self.shape.vcpus));
        self.shape.pages * vcpu / vcpus..self.shape.pages * (vcpu + 1) / vcpus
    }

    /// Make the VM stand still until the answer is dropped: no vCPU is in the guest, and none
    /// handles a fault. Not to be called by a thread that runs a vCPU.
    pub fn pause(&self) -> Paused<'_> {
        self.pause.pause(|| self.machine.kick_all())
    }

    /// End programs that may be stopped ([`VmmVcpu::run_until_stopped`]), and those that are begun
    /// until [`Vmm::unstop`].
    pub fn stop(&self) {
        self.pause.stop(true);
        // One that was not in the guest just now is kicked out by this.
        drop(self.pause());
    }

    /// Programs may run again.
    pub fn unstop(&self) {
        self.pause.stop(false);
    }

    /// The word at `offset` of data page `page`, as the VMM sees it.
    pub fn word(&self, page: u64, offset: u64) -> u64 {
        self.machine.memory().load((self.layout.data.start + page) * PAGE + offset)
    }

    /// The words of data page `page`.
    pub fn page(&self, page: u64) -> impl Iterator<Item = u64> + use<F> {
        let memory = self.machine.memory();
        let start = (self.layout.data.start + page) * PAGE;
        (start..start + PAGE).step_by(8).map(move |at| memory.load(at))
    }

    /// Put these words into data page `page`. No vCPU has run yet: nothing is logged.
    pub fn fill_page(&self, page: u64, words: impl Iterator<Item = u64>) {
        let memory = self.machine.memory();
        let start = (self.layout.data.start + page) * PAGE;
        for (at, word) in (start..start + PAGE).step_by(8).zip(words) {
            memory.store(at, word);
        }
    }

    /// Create vCPU `id`.
    pub fn vcpu(self: &Arc<Self>, id: u32) -> Result<VmmVcpu<F>, Error> {
        Ok(VmmVcpu {
            vmm: Arc::clone(self),
            id,
            machine: self.machine.vcpu(id)?,
            tdp: TdpVcpu::new(&self.mmu, 0)?,
            loaded: None,
            busy: false,
            handling_ns: None,
        })
    }

    /// Run one closure per vCPU, each on a thread of its own.
    pub fn on_all<T: Send>(
        self: &Arc<Self>,
        vcpus: &mut [VmmVcpu<F>],
        work: impl Fn(&mut VmmVcpu<F>) -> Result<T, Error> + Sync,
    ) -> Result<Vec<T>, Error> {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                vcpus.iter_mut().map(|vcpu| scope.spawn(move || work(vcpu))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T, Error>>| {
                thread.join().map_err(|_| Error::from("a vCPU thread panicked"))?
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// Give everything back and check that nothing is left. Call when all vCPUs are dropped.
    pub fn teardown(self: Arc<Self>, report: &mut Report) -> Result<(), Error> {
        let mut actor = self.actor()?;
        let stats = self.mmu.vm().stats();
        match self.mmu.check(&mut actor) {
            Ok(tree) => {
                let gauges = [
                    stats.get(Counter::Pages4K),
                    stats.get(Counter::Pages2M),
                    stats.get(Counter::Pages1G),
                ];
                let ok = tree.leaves == gauges && tree.tables == stats.get(Counter::Tables);
                let tables = stats.get(Counter::Tables);
                let detail = format!(
                    "leaves {:?} and {} tables recounted, gauges {gauges:?} and {tables}",
                    tree.leaves, tree.tables
                );
                report.check("statistics-equal-a-recount", ok, detail);
            }
            Err(error) => report.check("statistics-equal-a-recount", false, error.to_string()),
        }
        let zapped = self.mmu.destroy(&mut actor);
        report.count("pages_mapped_at_the_end", zapped.pages());
        let owed = stats.get(Counter::FlushOwed);
        let paid = stats.get(Counter::FlushPaid);
        drop(actor);
        let pool = self.mmu.vm().pool();
        // No section is open any more, so two grace periods pass at once.
        let waiting = (0..4).map(|_| pool.poll()).last().unwrap_or(0);
        let in_use = pool.frames_in_use();
        report.check(
            "frames-in-use-0",
            in_use == 0,
            format!("{in_use} of {} frames", pool.frames_provided()),
        );
        report.check("retired-queue-drained", waiting == 0, format!("{waiting} frames waiting"));
        report.check("flush-debts-0", owed == paid, format!("{owed} owed, {paid} paid"));
        for counter in [
            Counter::PfTaken,
            Counter::PfFixed,
            Counter::PfFast,
            Counter::PfSpurious,
            Counter::PfRetry,
            Counter::CasLost,
            Counter::LeavesZapped,
            Counter::LeavesAged,
            Counter::FlushRequests,
        ] {
            report.count(counter.name(), stats.get(counter));
        }
        report.count("spurious", stats.get(Counter::PfSpurious));
        report.count("grace_periods", pool.grace_periods());
        Ok(())
    }
}

/// A vCPU and the thread-side of its MMU.
pub struct VmmVcpu<F: SpteFormat> {
    vmm: Arc<Vmm<F>>,
    /// Its number.
    pub id: u32,
    machine: Box<dyn machine::Vcpu>,
    tdp: TdpVcpu<F, VmmHost>,
    /// The root the machine was given.
    loaded: Option<u64>,
    /// A program was given and is not done.
    busy: bool,
    /// When set, the time each fault took in the MMU is noted.
    pub handling_ns: Option<Vec<u64>>,
}

impl<F: SpteFormat> VmmVcpu<F> {
    /// The VM.
    pub fn vmm(&self) -> &Arc<Vmm<F>> {
        &self.vmm
    }

    /// Run a guest program to its end.
    pub fn run(&mut self, command: &Command) -> Result<machine::Report, Error> {
        self.machine.start(command)?;
        self.busy = true;
        loop {
            if let Some(report) = self.go_on()? {
                return Ok(report);
            }
        }
    }

    /// Run a guest program to its end or until [`Vmm::stop`]: then the answer is `None`, the
    /// program is where it is, and the vCPU runs nothing else but the rest of it
    /// ([`VmmVcpu::go_on`]).
    pub fn run_until_stopped(
        &mut self,
        command: &Command,
    ) -> Result<Option<machine::Report>, Error> {
        self.machine.start(command)?;
        self.busy = true;
        self.go_on()
    }

    /// Was its program stopped before its end?
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Go on with a program that was stopped.
    pub fn go_on(&mut self) -> Result<Option<machine::Report>, Error> {
        let vmm = Arc::clone(&self.vmm);
        let _running = vmm.pause.running();
        self.enter_until_done()
    }

    fn enter_until_done(&mut self) -> Result<Option<machine::Report>, Error> {
        loop {
            if self.vmm.pause.stand() {
                return Ok(None);
            }
            self.enter()?;
            let exit = self.machine.run();
            let logged = self.log_hardware();
            self.vmm.gates.leave(self.id);
            logged?;
            match exit? {
                Exit::Done(report) => {
                    self.busy = false;
                    return Ok(Some(report));
                }
                Exit::Kicked => {}
                Exit::Fault { gva, error } => self.fault(gva, error)?,
            }
        }
    }

    /// Hand over what the CPU logged. Before the vCPU is seen to have left: who waits for that
    /// takes the log to be in.
    fn log_hardware(&mut self) -> Result<(), Error> {
        let pages = self.machine.take_log();
        let mut rest = pages.as_slice();
        while !rest.is_empty() {
            match self.tdp.log_hardware(rest.iter().map(|page| Gfn::new(*page))) {
                Ok(_) => rest = &[],
                Err(full) => {
                    let done = rest.iter().position(|page| *page == full.next.get());
                    rest = &rest[done.unwrap_or(0)..];
                    self.vmm.exits.ring_full.fetch_add(1, Ordering::Relaxed);
                    self.vmm.drain_rings(self.tdp.actor())?;
                }
            }
        }
        Ok(())
    }

    /// Run a guest program over data pages.
    pub fn run_pages(
        &mut self,
        op: machine::Op,
        pages: Range<u64>,
        tag: u64,
        rounds: u64,
    ) -> Result<machine::Report, Error> {
        let start = (DATA_GFN + pages.start) * PAGE;
        let pages = pages.end - pages.start;
        if pages == 0 {
            return Ok(machine::Report::default());
        }
        self.run(&Command { op, start, pages, stride: 1, tag, rounds })
    }

    /// Announce entry with a root that is current.
    fn enter(&mut self) -> Result<(), Error> {
        loop {
            self.vmm.gates.enter(self.id);
            if self.loaded.is_some() && self.tdp.root_is_current() {
                return Ok(());
            }
            self.vmm.gates.leave(self.id);
            let root = self.tdp.load_root()?;
            for (linear, _, pages) in self.vmm.machine.pinned() {
                self.map_pinned(GfnRange::from_len(Gfn::new(linear), pages))?;
            }
            self.machine.set_root(root.get())?;
            self.loaded = Some(root.get());
            self.vmm.exits.reloads.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Map what the machine needs in every root. Ends early when the root becomes stale.
    fn map_pinned(&mut self, mut range: GfnRange) -> Result<(), Error> {
        while !range.is_empty() && self.tdp.root_is_current() {
            let done = self.tdp.prefault(range, Access::WRITE)?;
            range.start = done.next;
            if let FaultOutcome::Emulate(reason) = done.outcome {
                return Err(format!("pinned page cannot be mapped: {reason}").into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn fault(&mut self, gva: u64, error: u32) -> Result<(), Error> {
        self.vmm.exits.faults.fetch_add(1, Ordering::Relaxed);
        let code = PfErrorCode::from_bits_retain(u64::from(error));
        let fault = PageFault::new(Gpa::new(gva), code);
        let begun = self.handling_ns.is_some().then(Instant::now);
        let outcome = loop {
            match self.tdp.fault(&fault) {
                Err(FaultError::Resolve { gfn, source: ResolveError::NeedsIo }) => {
                    self.vmm.mmu.vm().host().bring_in(gfn)?;
                }
                known => break known?,
            }
        };
        if let (Some(begun), Some(times)) = (begun, &mut self.handling_ns) {
            times.push(begun.elapsed().as_nanos() as u64);
        }
        match outcome {
            FaultOutcome::Fixed => Ok(()),
            FaultOutcome::Spurious => {
                self.vmm.exits.spurious.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            FaultOutcome::Retry => {
                self.vmm.exits.retried.fetch_add(1, Ordering::Relaxed);
                // Somebody is taking the page away; let them.
                std::thread::yield_now();
                Ok(())
            }
            FaultOutcome::Emulate(reason) => {
                // Its slot may be on its way back; a guest access to nothing at all is an error.
                if self.vmm.shape.slots > 1 {
                    self.vmm.exits.no_slot.fetch_add(1, Ordering::Relaxed);
                    std::thread::yield_now();
                    return Ok(());
                }
                Err(format!("guest access at {gva:#x} must be emulated: {reason}").into())
            }
            FaultOutcome::RingFull => {
                self.vmm.exits.ring_full.fetch_add(1, Ordering::Relaxed);
                self.vmm.drain_rings(self.tdp.actor())
            }
            FaultOutcome::WriteProtected => {
                Err(format!("guest write at {gva:#x} hit a write-protected page").into())
            }
        }
    }
}
