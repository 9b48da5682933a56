//! Scenes for single rows of the KVM table, each of which needs a moment that is hard to meet: a
//! table being taken apart while somebody uses it (3.7), a walk that gives way with a debt of
//! another root (B29), entries that look like what they are not (B58, B60).

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, gpa, linear, no_ad, range, request};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::dead::DeadReason;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::spte::MemType;
use mmu_core::spte::memtype::Cache;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, Spte, SpteKind};
use mmu_core::stats::Counter;
use mmu_core::traits::{Backing, HostPage, PageKind};
use mmu_model::{AccessKind, Caches, PhysMem, SoftCpu};
use tdp_mmu::TdpVcpu;

use AccessKind::{Read, Write};

/// The frame of the level-1 table for `gfn`.
fn table_of(guest: &mut Guest<Ept>, gfn: u64) -> Pfn {
    let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(gfn));
    walk[walk.len() - 2].1.pfn()
}

fn write(gfn: u64) -> PageFault {
    PageFault::new(gpa(gfn), PfErrorCode::WRITE)
}

/// Writable entries with D clear, as the fast path leaves them: the pages `0..count` of a block of
/// 2 MiB in a slot that was logged.
fn clean_and_writable(count: u64) -> Guest<Ept> {
    let mut guest = Guest::<Ept>::new(Capabilities::ept());
    let log = |flags| SlotRequest { ..request(0, BASE, 4 * M2, DATA, flags) };
    let _ = guest.set_slot(&log(SlotFlags::LOG_DIRTY)).unwrap();
    guest.map(BASE..BASE + count, Read, Level::L1);
    let _ = guest.set_slot(&log(SlotFlags::empty())).unwrap();
    guest.map(BASE..BASE + count, Write, Level::L1);
    let dirty = guest.check().dirty;
    assert_eq!(dirty, 0, "W was given back, D is the processor's to set");
    guest
}

/// Row 3.7. A huge page takes the place of a table; a processor still has the way to the table in
/// its caches and writes through it, before and after the entry is frozen.
#[test]
fn a_dirty_bit_set_in_a_table_that_is_taken_apart_upsets_no_count() {
    for (moment, page) in [(0, 0), (0, 9), (7, 3), (7, 7), (7, 9), (300, 299), (300, 19)] {
        let mut guest = clean_and_writable(20);
        let table = table_of(&mut guest, BASE);
        let root = guest.root_register();
        let cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
        let core = guest.host().add_core(cpu);
        let read = mmu_model::Access::user(Read);
        let address = |page: u64| (BASE + page) << 12;
        core.lock().unwrap().cpu.access(guest.host(), address(1), read).expect("mapped");

        let (lookups, done) = (AtomicU64::new(0), Arc::new(Mutex::new(None)));
        let (mmu, seen, writer) =
            (Arc::downgrade(&guest.mmu), Arc::clone(&done), Arc::clone(&core));
        guest.host().on_table(Some(Arc::new(move |frame| {
            if frame == table && lookups.fetch_add(1, Ordering::Relaxed) == moment {
                let mmu = mmu.upgrade().expect("a fault is using it");
                let write = mmu_model::Access::user(Write);
                let mut core = writer.lock().unwrap();
                let result = core.cpu.access(mmu.vm().host(), (BASE + page) << 12, write);
                *seen.lock().unwrap() = Some(result.is_ok());
            }
        })));
        guest.host().set_resolver(linear(Level::L2));
        assert_eq!(guest.vcpu.fault(&write(BASE + 100)), Ok(FaultOutcome::Fixed));
        guest.host().on_table(None);
        // An entry that was mapped and is not frozen yet can be written through.
        let wrote = done.lock().unwrap().expect("the moment came");
        assert_eq!(wrote, page < 20 && page >= moment, "moment {moment}, page {page}");

        assert_eq!(guest.check().leaves, [0, 1, 0], "moment {moment}, page {page}");
        assert_eq!(guest.stat(Counter::LeavesZapped), 20);
        let after = core.lock().unwrap().cpu.access(guest.host(), address(page), read);
        assert_eq!(after, Ok((DATA + page) << 12), "flushed: the huge page is found");
        let report = guest.unmap(range(BASE, BASE + M2));
        assert_eq!((report.leaves, report.dirty), ([0, 1, 0], M2));
        guest.finish();
    }
}

/// Row 3.7. A fault found the table linked, and comes to its entry when the table is being taken
/// apart: what it installs is taken out and counted, or it meets FROZEN and installs nothing.
#[test]
fn a_late_fault_in_a_table_that_is_taken_apart_upsets_no_count() {
    // Steps of the taking apart after which the fault goes on, and the page that it is for.
    for (moment, page) in [(0, 30), (5, 30), (31, 30), (200, 30), (511, 30), (512, 30)] {
        let mut guest = clean_and_writable(20);
        let table = table_of(&mut guest, BASE);
        let mut late = TdpVcpu::new(&guest.mmu, 0).unwrap();
        let _ = late.load_root().unwrap();
        assert_eq!(late.fault(&write(BASE + 20)), Ok(FaultOutcome::Fixed));

        let (inside, wait_inside) = channel();
        let (go, wait_go) = channel::<()>();
        let (over, wait_over) = channel::<FaultOutcome>();
        let (wait_go, wait_over) = (Mutex::new(wait_go), Mutex::new(wait_over));
        let (entered, lookups) = (AtomicBool::new(false), AtomicU64::new(0));
        let outcome = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&outcome);
        guest.host().on_table(Some(Arc::new(move |frame| {
            if frame != table {
                return;
            }
            if std::thread::current().name() == Some("late") {
                if !entered.swap(true, Ordering::Relaxed) {
                    inside.send(()).unwrap();
                    wait_go.lock().unwrap().recv().unwrap();
                }
            } else if lookups.fetch_add(1, Ordering::Relaxed) == moment {
                go.send(()).unwrap();
                *seen.lock().unwrap() = Some(wait_over.lock().unwrap().recv().unwrap());
            }
        })));
        let thread = std::thread::Builder::new().name("late".into());
        let thread = thread.spawn(move || {
            let result = late.fault(&write(BASE + page)).expect("no error");
            over.send(result).unwrap();
            late
        });
        wait_inside.recv().unwrap();
        guest.host().set_resolver(linear(Level::L2));
        assert_eq!(guest.vcpu.fault(&write(BASE + 100)), Ok(FaultOutcome::Fixed));
        drop(thread.unwrap().join().unwrap());
        guest.host().on_table(None);
        let outcome = outcome.lock().unwrap().expect("the moment came");
        // Entry 30 is frozen after 31 steps; then the fault finds the huge page instead, which it
        // splits, because its host page was a small one when it asked.
        let installed = moment <= page;
        let expected = if installed { FaultOutcome::Fixed } else { FaultOutcome::Spurious };
        assert_eq!(outcome, expected, "moment {moment}");
        let leaves = if installed { [0, 1, 0] } else { [M2, 0, 0] };
        assert_eq!(guest.check().leaves, leaves, "moment {moment}");
        assert_eq!(guest.stat(Counter::LeavesZapped), 21 + u64::from(installed));
        assert_eq!(guest.found(BASE + page).map(|found| found.pfn), Some(DATA + page));
        guest.finish();
    }
}

/// Row 3.7: no write that a processor completed is missing from the report, none is invented.
#[test]
fn a_zap_reports_exactly_the_pages_that_were_written_until_it_took_them() {
    for round in 0..60 {
        let mut guest = clean_and_writable(M2);
        let root = guest.root_register();
        let mut cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
        let (started, mmu) = (AtomicBool::new(false), Arc::clone(&guest.mmu));
        let (report, written) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut written = BTreeSet::new();
                let write = mmu_model::Access::user(Write);
                for turn in 0..M2 {
                    let page = turn * (2 * round + 1) % M2;
                    let result = cpu.access(mmu.vm().host(), (BASE + page) << 12, write);
                    if result.is_ok() {
                        written.insert(page);
                    }
                    started.store(turn > round * 4, Ordering::Release);
                }
                written.len() as u64
            });
            while !started.load(Ordering::Acquire) && !writer.is_finished() {
                std::hint::spin_loop();
            }
            let report = guest.unmap(range(BASE, BASE + M2));
            (report, writer.join().unwrap())
        });
        assert_eq!((report.leaves, report.dirty), ([M2, 0, 0], written), "round {round}");
        drop(mmu);
        guest.finish();
    }
}

/// Row B29: the second root has nothing to take, and so many tables that the walk gives way. What
/// the first root owes is flushed before the unmap returns, once.
#[test]
fn a_walk_that_gives_way_keeps_the_debt_of_the_root_before() {
    let shape = Shape { spaces: 2, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    let mut second = TdpVcpu::new(&guest.mmu, 1).unwrap();
    let _ = second.load_root().unwrap();
    for as_id in [0, 1] {
        let slot = SlotRequest { as_id, ..request(0, BASE, 8 * M2, DATA, SlotFlags::empty()) };
        let _ = guest.set_slot(&slot).unwrap();
    }
    // Tables without leaves in the second root.
    for block in 0..8 {
        assert_eq!(second.fault(&write(BASE + block * M2)), Ok(FaultOutcome::Fixed));
    }
    assert_eq!(guest.unmap(range(BASE, BASE + 8 * M2)).leaves, [8, 0, 0]);
    guest.map([BASE + 3], Write, Level::L1);

    guest.host().take_batches();
    let yields = guest.stat(Counter::Yields);
    let report = guest.unmap(range(BASE, BASE + 8 * M2));
    assert_eq!(report.leaves, [1, 0, 0]);
    assert!(guest.stat(Counter::Yields) >= yields + 7, "the second root's walk gave way");
    let batches = guest.host().take_batches();
    assert_eq!(batches.len(), 1, "not forgotten, not done twice: {batches:?}");
    assert_eq!(batches[0].ranges, [range(BASE + 3, BASE + 4)]);
    drop(second);
    guest.check();
    guest.finish();
}

/// Row B44: configurations belong to their MMU. One is made and another goes while frames of a
/// third wait to be freed; each goes on by its own rules.
#[test]
fn mmus_of_different_configurations_do_not_disturb_each_other() {
    let mut tracking = Guest::<Ept>::with_memory(no_ad(Capabilities::ept()), 2 * M2, Level::L2);
    tracking.map([BASE], Write, Level::L1);
    // A section keeps the table that gives way to a huge page from being freed.
    let vm = Arc::clone(tracking.mmu.vm());
    let mut reader = vm.actor().unwrap();
    let open = reader.pinned();
    tracking.map([BASE + 9], Write, Level::L2);
    assert_eq!(tracking.check().leaves, [0, 1, 0]);

    let mut hardware = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L2);
    hardware.map([BASE, BASE + M2], Write, Level::L2);
    let caps = Capabilities {
        max_phys_bits: 43,
        memory_encryption: Some((1 << 47, 1 << 47)),
        ..Capabilities::npt()
    };
    let encrypted = mmu_core::spte::SpteConfig::<Npt>::new(caps).expect("possible");
    let link = encrypted.table(Pfn::new(9), Level::L2);
    assert_ne!(link.raw() & 1 << 47, 0);

    let (_, old) = tracking.entry(BASE);
    let config = tracking.config();
    assert!(!config.ad_enabled() && config.is_access_tracked(config.age(old)));
    let (_, new) = hardware.entry(BASE);
    let config = hardware.config();
    assert!(config.ad_enabled() && !config.is_access_tracked(config.age(new)));
    assert_eq!((old.raw() | new.raw()) & 1 << 47, 0, "nobody else's encryption bit");
    hardware.finish();

    drop(open);
    drop((reader, vm));
    let _ = tracking.age(range(BASE, BASE + M2), mmu_core::traits::AgeMode::Clear);
    let (level, aged) = tracking.entry(BASE);
    assert!(level == Level::L2 && tracking.config().is_access_tracked(aged));
    tracking.map([BASE], Write, Level::L2);
    tracking.check();
    tracking.finish();
}

/// The entry for `gfn` in the level-1 table in frame `table`, changed behind the MMU's back.
fn plant(guest: &Guest<Ept>, table: Pfn, gfn: u64, new: Spte) {
    let place = table.address().get() + (gfn % M2) * 8;
    let old = guest.host().read(place).unwrap();
    assert_eq!(guest.host().cas(place, old, new.raw()), Some(Ok(())));
}

/// Row B58: MMIO entries whose generation has bit 7, which in a leaf means "large".
#[test]
fn entries_that_are_not_present_are_no_pages_whatever_their_bits() {
    for all in [false, true] {
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L1);
        guest.map([BASE], Write, Level::L1);
        let table = table_of(&mut guest, BASE);
        for page in 1..40 {
            let spte = guest.config().mmio(Gfn::new(BASE + page), Access::ALL, 0x1f);
            let spte = spte.expect("in use");
            assert!(spte.has(1 << 7) && guest.config().kind(spte, Level::L1) == SpteKind::Mmio);
            plant(&guest, table, BASE + page, spte);
            guest.actor.stats().inc(Counter::MmioSptes);
        }
        let count = guest.check();
        assert_eq!((count.leaves, count.mmio), ([1, 0, 0], 39));
        // A page in the place of one, then everything goes, in either way.
        guest.map([BASE + 7], Write, Level::L1);
        assert_eq!(guest.check().leaves, [2, 0, 0]);
        let report = if all {
            guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor)
        } else {
            guest.unmap(range(BASE, BASE + M2))
        };
        assert_eq!((report.leaves, report.young, report.dirty), ([2, 0, 0], 2, 2));
        guest.vcpu.unload_root();
        guest.check();
        guest.finish();
    }
}

/// Row B60: where a walk reads nothing, the answer says so; there is no value left over from
/// before.
#[test]
fn a_walk_under_an_absent_entry_gives_what_it_read_and_no_more() {
    let mut guest = Guest::<Legacy>::new(Capabilities::pae());
    // PAE reaches 4 GiB of guest memory: four entries, all absent.
    for gfn in [0, G1, 3 * G1 + 5] {
        let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(gfn));
        assert_eq!(walk.as_slice(), [(Level::L3, Spte::EMPTY)], "gfn {gfn:#x}");
    }
    let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(4 * G1));
    assert!(walk.is_empty(), "beyond the tables: {walk:?}");
    assert!(guest.mmu.lookup(&mut guest.actor, 1, Gfn::new(0)).is_empty(), "no such root");
    guest.slot(1, G1, 8, DATA + G1, SlotFlags::empty());
    guest.map([G1 + 3], Write, Level::L1);
    let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(G1 + 4));
    let levels: Vec<Level> = walk.iter().map(|(level, _)| *level).collect();
    assert_eq!(levels, [Level::L3, Level::L2, Level::L1]);
    assert_eq!(walk.last(), Some(&(Level::L1, Spte::EMPTY)));
    let mut walker = guest.mmu.walker(&mut guest.actor, 0).unwrap();
    assert_eq!(walker.entry(Gfn::new(2 * G1)), (Level::L3, Spte::EMPTY));
    assert_eq!(walker.entry(Gfn::new(u64::MAX)).1, Spte::EMPTY);
    drop(walker);
    guest.finish();
}

/// Row B73: a page inside a huge one is mapped as part of the whole, and its frame stays the one
/// that the host gave. The host may count references by the frames of its answers: nothing of ours
/// names another one, and nothing is given back to it.
#[test]
fn the_frame_of_a_page_in_a_huge_mapping_is_the_one_resolved() {
    let mut guest = Guest::<Npt>::new(Capabilities::npt());
    guest.slot(0, BASE, 4 * M2, DATA, SlotFlags::empty());
    let answers = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&answers);
    guest.host().set_resolver(Arc::new(move |slot, gfn, _| {
        let pfn = Pfn::new(slot.hva_of(gfn).unwrap().get() >> 12);
        log.lock().unwrap().push((gfn, pfn));
        Ok(HostPage { pfn, writable: true, level: Level::L2 })
    }));
    for gfn in [BASE + 37, BASE + M2, BASE + 3 * M2 - 1] {
        assert_eq!(guest.fault(gfn, Write, Level::L2), FaultOutcome::Fixed);
        let (asked, pfn) = answers.lock().unwrap().pop().expect("one answer a fault");
        assert_eq!((asked.get(), answers.lock().unwrap().len()), (gfn, 0));
        let found = guest.found(gfn).expect("mapped");
        assert_eq!((found.pfn, found.level), (pfn.get(), 2));
    }
    guest.check();
    guest.finish();
}

/// Row 1.33: a bit that we do not set, in each entry of the path in turn. The fault names the
/// entry, nothing below it is looked at, the dump says the same in words.
fn corrupt_entries_are_named<F: Modelled>(caps: Capabilities) {
    let levels = usize::from(caps.levels);
    for depth in 0..levels {
        let mut guest = Guest::<F>::with_memory(caps, 64, Level::L1);
        guest.map([BASE + 3, BASE + 4], Write, Level::L1);
        let gfn = Gfn::new(BASE + 3);
        let root = guest.root_register();
        let walk = guest.mmu.lookup(&mut guest.actor, 0, gfn);
        assert_eq!(walk.len(), levels);
        let (level, spte) = walk[depth];
        let table = if depth == 0 { root } else { walk[depth - 1].1.pfn().address().get() };
        let place = table + gfn.index(level) as u64 * 8;
        // An address bit beyond MAXPHYADDR: a frame that no arena has, if anybody followed it.
        // With 52 bits there is none, so bit 7 of the link, which would be a page of 256 TiB.
        let bit = if caps.max_phys_bits < 52 {
            1 << 51
        } else if level > Level::L3 {
            1 << 7
        } else {
            continue;
        };
        let bad = spte.raw() | bit;
        assert_eq!(guest.host().cas(place, spte.raw(), bad), Some(Ok(())));

        let path = guest.mmu.path(&mut guest.actor, 0, gfn);
        assert_eq!(path.walk.len(), depth + 1, "nothing is followed from there");
        let words = path.to_string();
        let last = words.lines().last().unwrap_or_default();
        assert!(last.contains(&format!("{bad:#018x}")), "{words}");
        let fault = PageFault::new(gpa(BASE + 3), PfErrorCode::RESERVED | PfErrorCode::PRESENT);
        let error = guest.vcpu.fault(&fault).unwrap_err();
        assert_eq!(error, FaultError::ReservedBit { gpa: gpa(BASE + 3), level, spte: bad });
        assert!(error.to_string().contains(&format!("{level}")), "{error}");

        assert_eq!(guest.host().cas(place, bad, spte.raw()), Some(Ok(())));
        let whole = guest.mmu.path(&mut guest.actor, 0, gfn);
        assert_eq!((whole.walk.len(), whole.to_string().lines().count()), (levels, levels + 1));
        guest.check();
        guest.finish();
    }
}

#[test]
fn a_corrupt_entry_is_named_at_whatever_level_it_stands() {
    for_each_format!(corrupt_entries_are_named);
}

/// Row 1.33: MMIO entries have reserved bits on purpose.
#[test]
fn an_mmio_entry_is_no_corrupt_entry() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map([BASE], Write, Level::L1);
    let table = table_of(&mut guest, BASE);
    let spte = guest.config().mmio(Gfn::new(BASE + 1), Access::ALL, 2).expect("in use");
    plant(&guest, table, BASE + 1, spte);
    guest.actor.stats().inc(Counter::MmioSptes);
    let fault = PageFault::new(gpa(BASE + 1), PfErrorCode::RESERVED);
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Fixed), "a slot is there by now");
    assert_eq!(guest.mmu.vm().is_dead(), None);
    guest.check();
    guest.finish();
}

/// Row 0.1.8: after something impossible no fault maps anything, nothing panics, and all memory
/// comes back.
#[test]
fn a_dead_vm_maps_nothing_and_gives_everything_back() {
    for by_fault in [false, true] {
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 4 * M2, Level::L1);
        guest.map(BASE..BASE + 40, Write, Level::L1);
        let vm = Arc::clone(guest.mmu.vm());
        assert_eq!(vm.is_dead(), None);
        let reason = if by_fault {
            let table = table_of(&mut guest, BASE);
            let (_, spte) = guest.entry(BASE + 7);
            plant(&guest, table, BASE + 7, spte.with(1 << 51));
            let fault = PageFault::new(gpa(BASE + 7), PfErrorCode::RESERVED);
            assert!(matches!(guest.vcpu.fault(&fault), Err(FaultError::ReservedBit { .. })));
            plant(&guest, table, BASE + 7, spte);
            DeadReason::CorruptEntry
        } else {
            vm.mark_dead(DeadReason::Embedder);
            DeadReason::Embedder
        };
        vm.mark_dead(DeadReason::IllegalChange);
        assert_eq!(vm.is_dead(), Some(reason), "the first reason stays");
        let dead = FaultError::Dead { reason };
        assert!(dead.to_string().contains(&reason.to_string()), "{dead}");
        for gfn in [BASE + 3, BASE + 100, BASE + M2] {
            assert_eq!(guest.vcpu.fault(&write(gfn)), Err(dead));
        }
        let pages = range(BASE + M2, BASE + M2 + 8);
        assert_eq!(guest.vcpu.prefault(pages, Access::READ), Err(dead));
        assert_eq!(guest.check().leaves, [40, 0, 0], "as it was");
        // Everything that takes away goes on.
        let _ = guest.age(range(BASE, BASE + 40), mmu_core::traits::AgeMode::ClearFlush);
        assert_eq!(guest.unmap(range(BASE, BASE + 10)).leaves, [10, 0, 0]);
        guest.slot(0, 0, 0, DATA, SlotFlags::empty());
        assert_eq!(guest.check().leaves, [0; 3]);
        drop(vm);
        guest.finish();
    }
}

/// Rows 1.22, 1.24 and B74: the embedder says what a page is, once for each entry that is made. A
/// device is uncacheable and not encrypted; memory is what the configuration says, whatever its
/// frame number looks like; a type that is named is the type.
#[test]
fn a_fault_maps_a_page_as_the_kind_that_the_host_says() {
    const C_BIT: u64 = 1 << 45;
    let caps = Capabilities { memory_encryption: Some((C_BIT, C_BIT)), ..Capabilities::ept() };
    let combining = MemType { cache: Cache::WriteCombining, ignore_pat: true };
    let kinds = [
        (PageKind::RAM, MemType::WB_IGNORE_PAT, C_BIT),
        (PageKind::DEVICE, MemType::UC, 0),
        (PageKind { memory_type: Some(combining), ..PageKind::RAM }, combining, C_BIT),
        (PageKind { memory_type: Some(combining), ..PageKind::DEVICE }, combining, 0),
        (PageKind { memory_type: Some(MemType::WB), ..PageKind::DEVICE }, MemType::WB, 0),
    ];
    for level in [Level::L1, Level::L2] {
        let mut guest = Guest::<Ept>::with_memory(caps, 16 * M2, level);
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        guest.host().set_kinds(Arc::new(move |gfn, page| {
            count.fetch_add(1, Ordering::Relaxed);
            assert_eq!(page.pfn.get() - DATA, gfn.get() - BASE, "asked about the page resolved");
            kinds[((gfn.get() - BASE) / M2) as usize % kinds.len()].0
        }));
        let turns = (0..16).map(|turn| turn * 7 % 16);
        for (turn, block) in turns.enumerate() {
            let gfn = BASE + block * M2;
            let fault = if turn % 2 == 0 {
                write(gfn)
            } else {
                PageFault::prefetch(gpa(gfn), Access::READ)
            };
            let before = asked.load(Ordering::Relaxed);
            assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Fixed));
            assert_eq!(asked.load(Ordering::Relaxed), before + 1);
            let (_, memory_type, encryption) = kinds[block as usize % kinds.len()];
            let (at, spte) = guest.entry(gfn);
            assert_eq!((at, MemType::from_ept(spte.raw())), (level, Some(memory_type)));
            assert_eq!(spte.raw() & C_BIT, encryption, "block {block}");
            assert_eq!(guest.config().pfn(spte).get(), DATA + block * M2);
        }
        // Parts of a huge page are what the whole is.
        if level == Level::L2 {
            let _ = guest.shrink(BASE + M2 + 5);
            let (at, spte) = guest.entry(BASE + M2 + 9);
            assert_eq!((at, MemType::from_ept(spte.raw())), (Level::L1, Some(MemType::UC)));
            assert_eq!(spte.raw() & C_BIT, 0);
        }
        guest.check();
        guest.finish();
    }
}

/// A host that calls a page something else without taking it away first breaks its contract; what
/// was mapped goes, flushed, before the other kind stands there.
#[test]
fn a_page_that_becomes_a_device_is_flushed_in_between() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    let answer = |writable| {
        move |slot: &mmu_core::slot::Memslot, gfn: Gfn, _: Access| {
            let pfn = Pfn::new(slot.hva_of(gfn).unwrap().get() >> 12);
            Ok(HostPage { pfn, writable, level: Level::L1 })
        }
    };
    guest.host().set_resolver(Arc::new(answer(false)));
    guest.map([BASE], Read, Level::L1);
    guest.host().set_resolver(Arc::new(answer(true)));
    guest
        .host()
        .set_kinds(Arc::new(|_, _| PageKind { backing: Backing::Device, memory_type: None }));
    guest.host().take_batches();
    assert_eq!(guest.fault(BASE, Write, Level::L1), FaultOutcome::Fixed);
    let batches = guest.host().take_batches();
    assert!(batches.len() == 1 && batches[0].covers(range(BASE, BASE + 1)), "{batches:?}");
    let (_, spte) = guest.entry(BASE);
    assert_eq!(MemType::from_ept(spte.raw()), Some(MemType::UC));
    guest.check();
    guest.finish();
}

/// Row B64: a guest that goes in and out of system management mode, or turns protections of its own
/// on and off (no role knows of those), finds its roots and everything in them.
#[test]
fn roots_that_are_left_at_a_high_rate_are_never_rebuilt() {
    let mut guest = Guest::<Ept>::with(Shape { spaces: 2, ..Shape::new(Capabilities::ept()) });
    let mut management = TdpVcpu::new(&guest.mmu, 1).unwrap();
    let frames = [guest.vcpu.load_root().unwrap(), management.load_root().unwrap()];
    for as_id in [0, 1] {
        let slot = SlotRequest { as_id, ..request(0, BASE, 64, DATA, SlotFlags::empty()) };
        let _ = guest.set_slot(&slot).unwrap();
    }
    guest.map(BASE..BASE + 64, Write, Level::L1);
    assert_eq!(management.fault(&write(BASE)), Ok(FaultOutcome::Fixed));
    let state = |guest: &mut Guest<Ept>| {
        let count = guest.mmu.check(&mut guest.actor).expect("well-formed trees");
        (count, guest.host().provides(), guest.stat(Counter::PfTaken))
    };
    let before = state(&mut guest);
    for _ in 0..1_000 {
        guest.vcpu.unload_root();
        assert_eq!(management.load_root(), Ok(frames[1]));
        management.unload_root();
        assert_eq!(guest.vcpu.load_root(), Ok(frames[0]));
    }
    assert_eq!(state(&mut guest), before, "nothing made, nothing mapped again");
    assert!(guest.found(BASE + 63).is_some_and(|found| found.writable));
    assert!(guest.host().take_batches().iter().all(|batch| batch.tables.is_empty()));
    drop(management);
    guest.finish();
}
