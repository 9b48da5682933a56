//! Looking at whole trees (KVM rows 3.62, 8.24): the dump against a lookup of every gfn, through
//! its text and back; the account of tables and pages against the recount of `check`.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, StopOnDrop, gpa, linear, range, request};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::fault::PageFault;
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, Spte, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::AgeMode;
use mmu_model::{AccessKind, PhysMem, Random};
use tdp_mmu::{Run, TableUsage, TdpVcpu};

/// What a line says of one gfn: page size, then the words that must be equal all over a run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    size: String,
    pfn: Option<u64>,
    rest: Vec<String>,
}

/// A line read back, knowing nothing of the types that wrote it.
#[derive(Debug)]
struct Line {
    space: u16,
    root: u64,
    gfns: std::ops::Range<u64>,
    said: Said,
    young: u64,
    dirty: u64,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.strip_prefix("0x").expect("hex"), 16).expect("digits")
}

fn parse(line: &str) -> Line {
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!((words[0], words[2], words[4]), ("as", "root", "gfn"), "{line}");
    let (start, end) = words[5].split_once('-').expect("two gfns");
    let text = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let (pfn, rest, young, dirty) = match words[7] {
        "pfn" => {
            assert_eq!((words[11], words[13], words.len()), ("young", "dirty", 15), "{line}");
            let count = |at: usize| words[at].parse().expect("a number");
            (Some(hex(words[8])), text(&words[9..11]), count(12), count(14))
        }
        "mmio" => (None, text(&words[7..]), 0, 0),
        other => panic!("{other} in {line}"),
    };
    Line {
        space: words[1].parse().expect("a number"),
        root: hex(words[3]),
        gfns: hex(start)..hex(end),
        said: Said { size: words[6].to_owned(), pfn, rest },
        young,
        dirty,
    }
}

/// What a line must say of `gfn`, from the entry that a lookup finds.
fn expected<F: SpteFormat>(
    config: &SpteConfig<F>,
    (level, spte): (Level, Spte),
    gfn: u64,
) -> Option<Said> {
    let letter = |yes: bool, letter: char| if yes { letter } else { '-' };
    let words = |access: Access| {
        let has = |what| access.contains(what);
        let (r, w) = (letter(has(Access::READ), 'r'), letter(has(Access::WRITE), 'w'));
        let (x, u) = (letter(has(Access::EXEC), 'x'), letter(has(Access::USER), 'u'));
        format!("{r}{w}{x}{u}")
    };
    let size = ["4K", "2M", "1G", "512G", "256T"][level.slot()].to_owned();
    if let (Some(generation), Some(access)) =
        (config.mmio_generation(spte), config.mmio_access(spte))
    {
        let rest = vec!["mmio".to_owned(), format!("{generation:#x}"), words(access)];
        return Some(Said { size, pfn: None, rest });
    }
    if !spte.is_leaf(level) {
        return None;
    }
    let tracked = config.is_access_tracked(spte);
    let flags = [
        letter(config.is_host_writable(spte), 'h'),
        letter(config.is_mmu_writable(spte), 'm'),
        letter(tracked, 't'),
    ];
    let access = config.access(config.restore(spte));
    let rest = vec![words(access), flags.iter().collect()];
    let pfn = config.pfn(spte).get() + (gfn & (level.pages() - 1));
    Some(Said { size, pfn: Some(pfn), rest })
}

fn lines<F: Modelled>(guest: &mut Guest<F>, space: Option<u16>, range: GfnRange) -> Vec<Line> {
    let text: Vec<String> =
        guest.mmu.dump(&mut guest.actor, space, range).map(|run| run.to_string()).collect();
    text.iter().map(|line| parse(line)).collect()
}

/// Pages that the random trees are about; with a 1 GiB page behind them.
const SMALL: u64 = 5 * M2;

fn random_tree<F: Modelled>(caps: Capabilities, random: &mut Random) -> Guest<F> {
    let mut guest = Guest::<F>::with_memory(caps, 2 * G1, Level::L3);
    if caps.huge_1g {
        guest.map([BASE + G1], AccessKind::Write, Level::L3);
    }
    for _ in 0..160 {
        let near = random.below(SMALL / M2) * M2;
        let gfn = BASE + (near + random.below(40)).min(SMALL - 1);
        let level = if random.chance(1, 12) { Level::L2 } else { Level::L1 };
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][random.below(3) as usize];
        match random.below(8) {
            0 => drop(guest.unmap(range(gfn, gfn + random.below(30)))),
            1 => drop(guest.age(range(gfn, gfn + random.below(60)), AgeMode::ClearFlush)),
            2 => drop(guest.touch(gfn, kind)),
            // Neighbours, so that there is something to merge.
            3 => guest.map((gfn..gfn + 12).filter(|g| *g < BASE + SMALL), kind, Level::L1),
            _ => drop(guest.fault(gfn, kind, level)),
        }
    }
    guest
}

fn round_trip<F: Modelled>(caps: Capabilities) {
    for seed in 0..3 {
        let mut random = Random::new(seed);
        let mut guest = random_tree::<F>(caps, &mut random);
        let root = guest.vcpu.load_root().unwrap().get();
        let wanted = range(BASE + random.below(M2), BASE + SMALL - random.below(M2));
        let found = lines(&mut guest, Some(0), wanted);
        let mut of = BTreeMap::new();
        let mut last = 0;
        for line in &found {
            assert_eq!((line.space, line.root), (0, root), "seed {seed}");
            assert!(line.gfns.start >= last && line.gfns.end > line.gfns.start, "ascending");
            last = line.gfns.end;
            for gfn in line.gfns.clone() {
                let mut said = line.said.clone();
                said.pfn = said.pfn.map(|pfn| pfn + (gfn - line.gfns.start));
                assert!(of.insert(gfn, said).is_none(), "seed {seed}: {gfn:#x} twice");
            }
        }
        let (mut young, mut dirty, mut leaves) = (0, 0, 0);
        let mut previous = None;
        let mut runs = 0;
        for gfn in wanted.start.get()..wanted.end.get() {
            let entry = guest.entry(gfn);
            let said = expected(guest.config(), entry, gfn);
            assert_eq!(of.remove(&gfn), said, "seed {seed}: {gfn:#x}");
            let first = gfn % entry.0.pages() == 0 || gfn == wanted.start.get();
            if first && entry.1.is_leaf(entry.0) {
                leaves += 1;
                young += u64::from(guest.config().is_accessed(entry.1));
                dirty += u64::from(guest.config().is_dirty(entry.1));
            }
            // Neighbours that say the same are one run.
            let after =
                previous.take().map(|said: Said| Said { pfn: said.pfn.map(|pfn| pfn + 1), ..said });
            runs += usize::from(said.is_some() && said != after);
            previous = said;
        }
        assert!(of.is_empty() && leaves > 0, "seed {seed}");
        let sum = |f: fn(&Line) -> u64| found.iter().map(f).sum::<u64>();
        assert_eq!((sum(|l| l.young), sum(|l| l.dirty)), (young, dirty), "seed {seed}");
        assert_eq!(found.len(), runs, "seed {seed}: as few lines as can be");
        // All of it: the leaves are those of a recount.
        let count = guest.check();
        let all = lines(&mut guest, None, GfnRange::ALL);
        let pages: u64 = all.iter().map(|line| line.gfns.end - line.gfns.start).sum();
        assert_eq!(pages, count.pages(), "seed {seed}");
        let marked = |f: fn(&Line) -> u64| all.iter().map(f).sum::<u64>();
        assert_eq!(marked(|l| l.young), count.young, "seed {seed}");
        assert_eq!(marked(|l| l.dirty), count.dirty, "seed {seed}");
        guest.finish();
    }
}

#[test]
fn a_dump_read_back_says_of_every_gfn_what_a_lookup_finds() {
    for_each_format!(round_trip);
}

#[test]
fn a_dump_prints_one_line_per_run() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), G1, Level::L2);
    guest.map(BASE..BASE + 5, AccessKind::Write, Level::L1);
    guest.map([BASE + 9], AccessKind::Read, Level::L1);
    guest.map([BASE + 2 * M2, BASE + 3 * M2], AccessKind::Read, Level::L2);
    guest.touch(BASE + 3, AccessKind::Write).unwrap();
    let root = guest.vcpu.load_root().unwrap();
    let runs: Vec<Run> = guest.mmu.dump(&mut guest.actor, None, GfnRange::ALL).collect();
    let text: Vec<String> = runs.iter().map(Run::to_string).collect();
    let line = |rest: &str| format!("as 0 root {root} gfn {rest}");
    assert_eq!(
        text,
        [
            line("0x100000-0x100005 4K pfn 0x800000 rwxu hm- young 5 dirty 5"),
            line("0x100009-0x10000a 4K pfn 0x800009 rwxu hm- young 1 dirty 1"),
            line("0x100400-0x100800 2M pfn 0x800400 rwxu hm- young 2 dirty 2"),
        ]
    );
    // A part of a huge page is shown as that part.
    let part = range(BASE + 2 * M2 + 7, BASE + 2 * M2 + 9);
    let runs: Vec<Run> = guest.mmu.dump(&mut guest.actor, Some(0), part).collect();
    assert_eq!((runs.len(), runs[0].range, runs[0].level), (1, part, Level::L2));
    assert!(runs[0].to_string().contains(" pfn 0x800407 "), "{}", runs[0]);
    assert_eq!(guest.mmu.dump(&mut guest.actor, Some(1), GfnRange::ALL).count(), 0);
    guest.finish();
}

#[test]
fn mmio_entries_are_shown_with_their_generation() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), M2, Level::L1);
    guest.map([BASE], AccessKind::Read, Level::L1);
    let table = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(BASE))[2].1.pfn();
    let mmio = |gfn: u64| guest.config().mmio(Gfn::new(gfn), Access::WRITE, 6).unwrap();
    let plant = |guest: &Guest<Npt>, gfn: u64, old: Spte, new: Spte| {
        let place = (table.get() << 12) + (gfn & (M2 - 1)) * 8;
        guest.host().cas(place, old.raw(), new.raw()).expect("a table").expect("what it held");
    };
    let entries = [BASE + 20, BASE + 21].map(|gfn| (gfn, mmio(gfn)));
    for (gfn, spte) in entries {
        plant(&guest, gfn, Spte::EMPTY, spte);
    }
    let found = lines(&mut guest, None, GfnRange::ALL);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[1].gfns, BASE + 20..BASE + 22);
    let entry = guest.entry(BASE + 20);
    assert_eq!(Some(&found[1].said), expected(guest.config(), entry, BASE + 20).as_ref());
    assert_eq!(guest.mmu.usage(&mut guest.actor).mmio, 2);
    for (gfn, spte) in entries {
        plant(&guest, gfn, spte, Spte::EMPTY);
    }
    guest.finish();
}

#[test]
fn impossible_ranges_dump_nothing() {
    let mut guest = Guest::<Legacy>::with_memory(Capabilities::legacy(), M2, Level::L1);
    guest.map([BASE], AccessKind::Read, Level::L1);
    for wanted in [range(9, 5), range(u64::MAX, 0), range(u64::MAX, u64::MAX), range(7, 7)] {
        assert_eq!(guest.mmu.dump(&mut guest.actor, None, wanted).count(), 0, "{wanted:?}");
    }
    guest.finish();
}

fn sum(of: &[u64]) -> u64 {
    of.iter().sum()
}

fn usage_equals_recount<F: Modelled>(caps: Capabilities) {
    for seed in 10..13 {
        let mut random = Random::new(seed);
        let mut guest = random_tree::<F>(caps, &mut random);
        let count = guest.check();
        let usage = guest.mmu.usage(&mut guest.actor);
        assert_eq!(sum(&usage.tables), count.tables, "seed {seed}");
        assert_eq!((usage.leaves, usage.mmio), (count.leaves, count.mmio), "seed {seed}");
        assert_eq!(usage.mapped_pages(), count.pages(), "seed {seed}");
        assert_eq!(usage.all_table_bytes(), count.tables << 12, "seed {seed}");
        let links = count.tables - 1;
        assert_eq!(sum(&usage.used), sum(&count.leaves) + count.mmio + links, "seed {seed}");
        assert_eq!(usage.slot_pages, 2 * G1);
        assert_eq!(usage.populated_per_mille(), count.pages() * 1000 / (2 * G1));
        let mapped = [Level::L1, Level::L2, Level::L3].map(|level| usage.mapped_bytes(level));
        let bytes = [1, M2, G1].map(|pages| pages << 12);
        for ((mapped, leaves), bytes) in mapped.iter().zip(count.leaves).zip(bytes) {
            assert_eq!(*mapped, leaves * bytes, "seed {seed}");
        }
        // One slot has everything.
        let mut of = Vec::new();
        guest.mmu.usage_by_slot(&mut guest.actor, |slot, usage| of.push((slot.id, *usage)));
        assert_eq!(of, [(0, usage)], "seed {seed}");
        guest.finish();
    }
}

#[test]
fn the_account_equals_the_recount() {
    for_each_format!(usage_equals_recount);
}

#[test]
fn each_slot_is_charged_for_its_pages_and_for_every_table_it_uses() {
    let shape = Shape { spaces: 2, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    // Two slots in one level-1 table, one elsewhere, and one in the other address space.
    guest.slot(3, BASE, 100, DATA, SlotFlags::empty());
    guest.slot(1, BASE + 100, M2 - 100, DATA + 100, SlotFlags::empty());
    guest.slot(2, BASE + 4 * M2, 2 * M2, DATA + 4 * M2, SlotFlags::empty());
    let smm = request(7, BASE, 50, DATA, SlotFlags::empty());
    let _ = guest.set_slot(&SlotRequest { as_id: 1, ..smm }).unwrap();
    guest.map(BASE + 90..BASE + 110, AccessKind::Write, Level::L1);
    guest.host().set_resolver(linear(Level::L2));
    guest.map([BASE + 4 * M2], AccessKind::Write, Level::L2);
    let mut vcpu = TdpVcpu::new(&guest.mmu, 1).unwrap();
    vcpu.load_root().unwrap();
    let _ = vcpu.fault(&PageFault::new(gpa(BASE + 1), PfErrorCode::WRITE)).unwrap();

    let mut of: Vec<((u16, u16), TableUsage)> = Vec::new();
    guest.mmu.usage_by_slot(&mut guest.actor, |slot, usage| {
        of.push(((slot.as_id, slot.id), *usage));
    });
    let facts: Vec<_> = of
        .iter()
        .map(|(name, usage)| (*name, usage.tables, usage.pages, usage.populated_per_mille()))
        .collect();
    assert_eq!(
        facts,
        [
            ((0, 3), [1, 1, 1, 1, 0], [10, 0, 0], 100),
            ((0, 1), [1, 1, 1, 1, 0], [10, 0, 0], 24),
            ((0, 2), [0, 1, 1, 1, 0], [0, M2, 0], 500),
            ((1, 7), [1, 1, 1, 1, 0], [1, 0, 0], 20),
        ]
    );
    let total = guest.mmu.usage(&mut guest.actor);
    assert_eq!(total.tables, [2, 2, 2, 2, 0]);
    assert_eq!(total.pages, [21, M2, 0]);
    assert_eq!(total.slot_pages, M2 + 2 * M2 + 50);
    assert_eq!(total.filled_per_mille(Level::L1), 21 * 1000 / 1024);
    assert_eq!(total.filled_per_mille(Level::L5), 0);
    drop(vcpu);
    guest.finish();
}

#[test]
fn looking_visits_no_more_than_a_slice_at_a_time() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 8 * M2, Level::L1);
    // Every second page: no runs longer than one.
    guest.map((BASE..BASE + 3 * M2).step_by(2), AccessKind::Read, Level::L1);
    // Nothing but emptiness behind: a slice must end without a run to show.
    guest.map([BASE + 7 * M2], AccessKind::Read, Level::L1);
    assert_eq!(guest.mmu.dump(&mut guest.actor, None, GfnRange::ALL).count(), 3 * 256 + 1);
    assert_eq!(guest.mmu.usage(&mut guest.actor).leaves[0], 3 * 256 + 1);
    assert_eq!(guest.stat(Counter::MaxSlice), 512);
    guest.finish();
}

#[test]
fn looking_waits_for_nobody_and_keeps_nobody_waiting() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L1);
    guest.map(BASE..BASE + 700, AccessKind::Write, Level::L1);
    let mut holder = guest.mmu.vm().actor().unwrap();
    let vm = std::sync::Arc::clone(guest.mmu.vm());
    let held = vm.lock().exclusive(holder.participant());
    assert_eq!(guest.mmu.dump(&mut guest.actor, None, GfnRange::ALL).count(), 1);
    assert_eq!(guest.mmu.usage(&mut guest.actor).leaves[0], 700);
    drop(held);
    // A half-read dump has no section open: taking pages away waits for open ones.
    let mut looker = guest.mmu.vm().actor().unwrap();
    let mut dump = guest.mmu.dump(&mut looker, None, GfnRange::ALL);
    assert!(dump.next().is_some());
    let (send, done) = mpsc::channel();
    let (mmu, mut actor) = (std::sync::Arc::clone(&guest.mmu), guest.mmu.vm().actor().unwrap());
    let thread = std::thread::spawn(move || {
        let _ = mmu.unmap(&mut actor, range(BASE, BASE + 700));
        actor.participant().synchronize();
        drop(actor);
        send.send(()).unwrap();
    });
    let patience = std::time::Duration::from_secs(60);
    done.recv_timeout(patience).expect("the dump holds nobody up");
    thread.join().unwrap();
    assert!(dump.next().is_none(), "nothing is left to show");
    drop((looker, holder, vm));
    guest.finish();
}

/// What vCPUs and unmaps do meanwhile may or may not be seen, but nothing is seen that never was.
#[test]
fn a_dump_under_fire_shows_only_what_was_mapped() {
    const PAGES: u64 = 4 * M2;
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), PAGES, Level::L2);
    guest.host().record(false);
    // Never touched by the others: never missing.
    guest.map(BASE + PAGES - M2..BASE + PAGES, AccessKind::Write, Level::L1);
    let stop = AtomicBool::new(false);
    let shown = std::thread::scope(|scope| {
        for seed in 0..2 {
            let mmu = std::sync::Arc::clone(&guest.mmu);
            let stop = &stop;
            scope.spawn(move || {
                let mut random = Random::new(seed);
                let mut vcpu = TdpVcpu::new(&mmu, 0).unwrap();
                vcpu.load_root().unwrap();
                let mut actor = mmu.vm().actor().unwrap();
                let _stop = StopOnDrop(stop);
                for _ in 0..4000 {
                    let gfn = BASE + random.below(PAGES - M2);
                    let level = if random.chance(1, 8) { Level::L2 } else { Level::L1 };
                    let fault = PageFault::new(gpa(gfn), PfErrorCode::WRITE).at_most(level);
                    let _ = vcpu.fault(&fault).expect("no error");
                    if random.chance(1, 16) {
                        let end = (gfn + random.below(600)).min(BASE + PAGES - M2);
                        let _ = mmu.unmap(&mut actor, range(gfn, end));
                    }
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        let mut shown = 0u64;
        while !stop.load(Ordering::Acquire) || shown == 0 {
            let mut last = Gfn::new(0);
            let mut steady = 0;
            for run in guest.mmu.dump(&mut guest.actor, Some(0), GfnRange::ALL) {
                assert!(run.range.start >= last && !run.range.is_empty(), "{run}");
                last = run.range.end;
                let tdp_mmu::RunKind::Leaf { pfn, .. } = run.kind else { panic!("{run}") };
                let start = run.range.start.get();
                assert_eq!(pfn, Pfn::new(start - BASE + DATA), "{run}");
                let own = range(BASE + PAGES - M2, BASE + PAGES);
                steady += run.range.intersection(own).len();
            }
            assert_eq!(steady, M2, "pages that nobody touched");
            let usage = guest.mmu.usage(&mut guest.actor);
            assert!(usage.pages[0] >= M2 && usage.mapped_pages() <= PAGES, "{usage:?}");
            shown += 1;
        }
        shown
    });
    assert!(shown > 0);
    assert!(guest.stat(Counter::MaxSlice) <= 512);
    guest.finish();
}
