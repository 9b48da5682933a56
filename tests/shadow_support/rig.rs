//! The machine that any world runs on: the MMU under test, a processor and the host.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use mmu_core::addr::{Gfn, GfnRange, Gpa, Hpa, Hva};
use mmu_core::fault::FaultError;
use mmu_core::slot::{LogOptions, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, Effort, HostPage, ResolveError};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{Access, AccessKind, Caches, Random, SoftCpu, Translation, Walker};
use shadow_mmu::guest::Operation;
use shadow_mmu::{
    ReclaimPolicy, ShadowCount, ShadowError, ShadowMmu, ShadowStats, ShadowVcpu, ShadowWriter,
    WriterLock,
};

use crate::common::inside::infallible;
use crate::common::{Core, DATA, Modelled, Peek, TestHost};

/// The embedder's mutex.
pub struct Lock<F: SpteFormat>(pub Mutex<ShadowWriter<F, TestHost>>);

impl<F: SpteFormat> WriterLock<F, TestHost> for Lock<F> {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<F, TestHost>) -> R) -> R {
        work(&mut self.0.lock().unwrap())
    }
}

pub struct Rig<F: SpteFormat> {
    pub seed: u64,
    pub random: Random,
    /// Of the host's tables.
    pub levels: u8,
    /// Pages of guest memory, one slot.
    pub pages: u64,
    pub mmu: Arc<ShadowMmu<F, TestHost>>,
    pub lock: Lock<F>,
    pub vcpu: ShadowVcpu<F, TestHost>,
    pub notifier: Actor<TestHost>,
    pub slots: SlotWriter,
    pub core: Arc<Mutex<Core>>,
    pub walker: Walker,
    /// Address of the shadow of the guest's root.
    pub register: u64,
    /// Guest pages written since the log was harvested; `None` where writes are not logged.
    pub written: Option<BTreeSet<u64>>,
    /// The slot's flags; `None` while there is no slot.
    pub slot: Option<SlotFlags>,
    /// Pages whose writes somebody wants to see.
    pub tracked: BTreeSet<u64>,
    /// No frames, or no memory, is to be had from some call on.
    refuses: bool,
    /// Ends it.
    relent: fn(),
    looks: u64,
    steps: Vec<String>,
}

/// What most worlds take as it is.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Frames for shadow tables.
    pub frames: u64,
    /// How writes are logged, once they are.
    pub log: LogOptions,
}

impl Default for Machine {
    fn default() -> Self {
        Self { frames: 4096, log: LogOptions::default() }
    }
}

impl<F: Modelled> Rig<F> {
    /// `resolve` is what the host has behind a guest page.
    pub fn new(
        machine: Machine,
        seed: u64,
        caps: Capabilities,
        quota: u32,
        policy: ReclaimPolicy,
        pages: u64,
        resolve: impl Fn(u64) -> Option<HostPage> + Send + Sync + 'static,
    ) -> Self {
        let config = SpteConfig::<F>::new(caps).unwrap();
        let limits = SlotLimits::new(2, config.max_gfn_exclusive());
        let host = TestHost::new(machine.frames);
        host.record(false);
        host.set_resolver(Arc::new(move |_, gfn, _| {
            resolve(gfn.get()).ok_or(ResolveError::NoMemory)
        }));
        let (vm, mut slots) =
            VmCore::with_log(host, 4, limits, std::thread::yield_now, machine.log).unwrap();
        let mut notifier = vm.actor().unwrap();
        let request = slot(pages, SlotFlags::empty());
        let _ = vm.set_slot(&mut slots, &mut notifier, &request, |_, _| {}).unwrap();
        let (mmu, mut writer) = ShadowMmu::create(Arc::clone(&vm), config, quota);
        writer.set_policy(policy);
        let vcpu = ShadowVcpu::new(&mmu).unwrap();
        let format = F::model(&caps);
        let core = vm.host().add_core(SoftCpu::new(&format, 0, Caches::unlimited()));
        // The model's caches go by linear address, flushes by frame: everything goes.
        let flushed = Arc::clone(&core);
        vm.host().before_flush(Some(Arc::new(move |_| flushed.lock().unwrap().cpu.flush_all())));
        Self {
            seed,
            random: Random::new(seed),
            levels: caps.levels,
            pages,
            mmu,
            lock: Lock(Mutex::new(writer)),
            vcpu,
            notifier,
            slots,
            core,
            walker: Walker::new(&format),
            register: 0,
            written: None,
            slot: Some(SlotFlags::empty()),
            tracked: BTreeSet::new(),
            refuses: false,
            relent: || {},
            looks: 0,
            steps: Vec::new(),
        }
    }

    pub fn note(&mut self, step: String) {
        if self.steps.len() >= 80 {
            self.steps.drain(..40);
        }
        self.steps.push(step);
    }

    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        let from = self.steps.len().saturating_sub(40);
        let (seed, levels) = (self.seed, self.levels);
        panic!(
            "seed {seed}, {levels} levels: {what}\nsteps:\n  {}",
            self.steps[from..].join("\n  ")
        );
    }

    pub fn set_register(&mut self, root: Hpa) {
        self.register = root.get();
        self.core.lock().unwrap().cpu.set_root(self.register);
    }

    /// What the shadow tables say about an address, to somebody who only looks.
    pub fn shadow(&self, address: u64, access: Access) -> Option<Translation> {
        self.walker.translate(&Peek(self.mmu.vm().host()), self.register, address, access).ok()
    }

    /// The guest accesses an address by the processor; the frame that it reached.
    pub fn reach(&self, address: u64, access: Access) -> Option<u64> {
        let reached = self.core.lock().unwrap().cpu.access(self.mmu.vm().host(), address, access);
        reached.ok().map(|pa| pa >> 12)
    }

    /// The guest just accessed a page: it is young, and reported if it was written.
    pub fn was_accessed(&mut self, gfn: u64, kind: AccessKind) {
        if kind == AccessKind::Write {
            self.was_written(gfn);
        }
        let mode = AgeMode::Test;
        let actor = &mut self.notifier;
        let answer = infallible(|| self.mmu.age_gfn(actor, Gfn::new(gfn), mode, Effort::Full));
        if answer != AgeAnswer::Young {
            self.fail(&format!("page {gfn} was accessed and is {answer:?}"));
        }
    }

    pub fn was_written(&mut self, gfn: u64) {
        if let Some(written) = self.written.as_mut().filter(|_| gfn < self.pages) {
            written.insert(gfn);
        }
    }

    /// An entry of a guest table was written; by the emulator, unless nobody saw it.
    pub fn table_written(&mut self, table: u64, at: u64, bytes: u64, unseen: bool) {
        self.was_written(table);
        if !unseen {
            let page = GfnRange::from_len(Gfn::new(table), 1);
            let marked = self.notifier.mark_dirty(0, page);
            assert!(marked.is_ok() || self.slot.is_none(), "{marked:?}");
            let (lock, vcpu) = (&self.lock, &mut self.vcpu);
            let wrote = || lock.with(|w| w.guest_wrote(vcpu.actor(), Gpa::new(at), bytes));
            infallible(wrote);
        }
    }

    /// Log writes from now on.
    pub fn log(&mut self) {
        self.note("log".to_owned());
        let vm = Arc::clone(self.mmu.vm());
        let flags = self.slot.expect("a slot") | SlotFlags::LOG_DIRTY;
        self.slot = Some(flags);
        let request = slot(self.pages, flags);
        let _ = vm.set_slot(&mut self.slots, &mut self.notifier, &request, |_, _| {}).unwrap();
        let memslot = *vm.slots().read(&self.notifier.pinned().section).by_id(0, 0).unwrap();
        infallible(|| self.mmu.log_enabled(&mut self.notifier, &self.lock, &memslot));
        self.written = Some(BTreeSet::new());
        for gauge in [Counter::Pages2M, Counter::Pages1G] {
            assert_eq!(vm.stats().get(gauge), 0, "huge leaves are left");
        }
    }

    /// Log writes no more.
    pub fn unlog(&mut self) {
        self.note("log no more".to_owned());
        let flags = self.slot.expect("a slot").difference(SlotFlags::LOG_DIRTY);
        self.slot = Some(flags);
        self.set_slot(&slot(self.pages, flags));
        self.written = None;
    }

    /// Change the slot, which loses what it had if it goes.
    fn set_slot(&mut self, request: &SlotRequest) {
        let vm = Arc::clone(self.mmu.vm());
        let (mmu, lock) = (&self.mmu, &self.lock);
        let changed = vm.set_slot(&mut self.slots, &mut self.notifier, request, |actor, old| {
            let invalidation = vm.notify().begin(actor.participant(), old.range());
            let _ = infallible(|| mmu.forget_range(actor, lock, &invalidation, old.range()));
        });
        assert!(changed.is_ok(), "{changed:?}");
    }

    /// The slot goes.
    pub fn delete_slot(&mut self) {
        self.note("the slot goes".to_owned());
        self.set_slot(&SlotRequest { bytes: 0, ..slot(self.pages, SlotFlags::empty()) });
        (self.slot, self.written) = (None, None);
        self.tracked.clear();
    }

    /// A slot comes.
    pub fn create_slot(&mut self, flags: SlotFlags) {
        self.note(format!("a slot comes: {flags:?}"));
        self.set_slot(&slot(self.pages, flags));
        self.slot = Some(flags);
        self.written = flags.contains(SlotFlags::LOG_DIRTY).then(BTreeSet::new);
    }

    /// May the guest write to the page without an exit?
    pub fn may_write(&self, gfn: u64) -> bool {
        let read_only = self.slot.is_some_and(|flags| flags.contains(SlotFlags::READ_ONLY));
        !read_only && !self.tracked.contains(&gfn)
    }

    /// Somebody wants to see all writes to a page from now on, or does not any more.
    pub fn track(&mut self, gfn: u64) {
        let vm = Arc::clone(self.mmu.vm());
        vm.enable_write_tracking(&mut self.slots, &mut self.notifier).expect("memory");
        let track = {
            let work = self.notifier.pinned();
            let slots = work.vm.slots().read(&work.section);
            slots.meta(0, 0).and_then(|meta| meta.track().cloned()).expect("it is enabled")
        };
        if self.tracked.remove(&gfn) {
            self.note(format!("track {gfn} no more"));
            assert_eq!(track.untrack(Gfn::new(gfn)), Ok(true));
            return;
        }
        self.note(format!("track {gfn}"));
        self.tracked.insert(gfn);
        assert_eq!(track.track(Gfn::new(gfn)), Ok(true));
        // No section is open. Those that are closed left entries, which lose W.
        let (actor, gfn) = (&mut self.notifier, Gfn::new(gfn));
        infallible(|| self.mmu.protect_marked(actor, &self.lock, 0, gfn, 1));
    }

    /// There are no frames any more after so many that the host gives.
    pub fn refuse_after(&mut self, frames: u64) {
        self.note(format!("{frames} frames, then none"));
        let host = self.mmu.vm().host();
        host.refuse(host.provides() + frames, u64::MAX);
        self.refuses = true;
    }

    /// The test refuses memory; `relent` ends that.
    pub fn refuse_memory(&mut self, relent: fn()) {
        (self.refuses, self.relent) = (true, relent);
    }

    /// May a call fail for want of a frame, or of memory?
    pub fn refuses(&self) -> bool {
        self.refuses
    }

    /// Did a call fail for want of that? From now on there is some, so it must not again.
    pub fn ran_out(&mut self, error: &ShadowError) -> bool {
        let ran_out = matches!(
            error,
            ShadowError::Fault(FaultError::OutOfFrames(_)) | ShadowError::NoMemory { bytes: 1.. }
        );
        if !ran_out || !self.refuses {
            return false;
        }
        self.note(format!("  {error}"));
        self.mmu.vm().host().refuse(u64::MAX, u64::MAX);
        (self.relent)();
        self.refuses = false;
        true
    }

    /// INVARIANT[I9]: every page written since the last harvest is reported. `false` if writes are
    /// not logged.
    pub fn harvest(&mut self) -> bool {
        let Some(written) = &mut self.written else { return false };
        let written = std::mem::take(written);
        let mut words = vec![0_u64; self.pages.div_ceil(64) as usize];
        let mmu = Arc::clone(&self.mmu);
        let (actor, lock) = (&mut self.notifier, &self.lock);
        let dirty = infallible(|| mmu.harvest_log(actor, lock, 0, 0, &mut words)).unwrap();
        self.note(format!("harvest {dirty}"));
        assert_eq!(dirty, words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
        let lost = |gfn: &&u64| words[(**gfn / 64) as usize] >> (**gfn % 64) & 1 == 0;
        if let Some(gfn) = written.iter().find(lost) {
            self.fail(&format!("page {gfn} was written and is not reported"));
        }
        true
    }

    /// The host takes pages back and gives others, which `change` does.
    pub fn take_back(&mut self, range: GfnRange, change: impl FnOnce(&mut Self)) {
        self.note(format!("host takes {range:?}"));
        let vm = Arc::clone(self.mmu.vm());
        let invalidation = vm.notify().begin(self.notifier.participant(), range);
        change(self);
        let (actor, lock) = (&mut self.notifier, &self.lock);
        let _ = infallible(|| self.mmu.unmap_in(actor, lock, &invalidation, range));
        drop(invalidation);
    }

    /// Every page becomes obsolete at once; taken apart a bit at a time.
    pub fn drop_everything(&mut self) {
        self.note("drop everything".to_owned());
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let drop_all = |writer: &mut ShadowWriter<F, TestHost>| {
            writer.invalidate_all(actor);
            let _ = writer.zap_obsolete(actor);
        };
        infallible(|| lock.with(drop_all));
    }

    /// INVARIANT[I15], INVARIANT[I16], INVARIANT[I17], INVARIANT[I18]: the writer's own books, each
    /// sixteenth time.
    pub fn check_books(&mut self) {
        self.looks += 1;
        if self.looks % 16 == 0 {
            let _ = self.check_books_now();
        }
    }

    pub fn check_books_now(&mut self) -> ShadowCount {
        let (lock, actor) = (&self.lock, &mut self.notifier);
        match lock.with(|writer| writer.check(actor)) {
            Ok(count) => count,
            Err(flaw) => self.fail(&format!("{flaw}")),
        }
    }

    pub fn stats(&self) -> ShadowStats {
        *self.lock.0.lock().unwrap().stats()
    }

    pub fn finish(mut self) {
        let _ = self.check_books_now();
        infallible(|| self.vcpu.drop_roots(&self.lock));
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let give_up = |writer: &mut ShadowWriter<F, TestHost>| {
            while writer.zap_obsolete(actor) {}
            let _ = writer.shrink(actor, u32::MAX);
            writer.live_pages()
        };
        let live = infallible(|| lock.with(give_up));
        assert_eq!(live, 0, "seed {}: pages left", self.seed);
        let vm = Arc::clone(self.mmu.vm());
        for gauge in [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G, Counter::Tables] {
            assert_eq!(vm.stats().get(gauge), 0, "seed {}: {}", self.seed, gauge.name());
        }
        let paid = vm.stats().get(Counter::FlushPaid);
        assert_eq!(vm.stats().get(Counter::FlushOwed), paid, "seed {}: flushes", self.seed);
        assert_eq!(vm.notify().in_progress(), 0, "seed {}: invalidations", self.seed);
        drop((self.vcpu, self.notifier));
        assert_eq!(vm.pool().frames_in_use(), 0, "seed {}: frames in use", self.seed);
    }
}

/// All of guest memory.
pub fn slot(pages: u64, flags: SlotFlags) -> SlotRequest {
    let hva = Hva::new(DATA << 12);
    SlotRequest { as_id: 0, id: 0, base: Gpa::new(0), bytes: pages << 12, hva, flags }
}

/// Any of the kinds, fetches least.
pub fn some_kind(random: &mut Random) -> AccessKind {
    match random.below(5) {
        0..2 => AccessKind::Read,
        2..4 => AccessKind::Write,
        _ => AccessKind::Fetch,
    }
}

/// What the guest's walker calls it.
pub fn operation(kind: AccessKind) -> Operation {
    match kind {
        AccessKind::Read => Operation::Read,
        AccessKind::Write => Operation::Write,
        AccessKind::Fetch => Operation::Fetch,
    }
}
