//! The text form (KVM rows 5.35 to 5.37): what is printed, character by character, and what
//! commands do and answer.

use lru_age::{
    AgeTable, Arrival, Command, CommandError, Commander, EvictOptions, Kind, PassOptions, Plain,
    Refaults, Scan, Seq, Swappiness, Switches, Take, Tier, VmNode, VmView, parse, run, run_aging,
    run_eviction, write_lru_gen, write_lru_gen_full,
};
use mmu_core::addr::{Gfn, Level, to_u64};
use mmu_core::traits::{AgeMode, UpperBits};

use crate::fake::{BLOCK, FakeMmu, pass, pass_with, range, table_over};

/// A VM of 100 anonymous and 28 file pages in two generations.
fn printed() -> (FakeMmu, AgeTable, Refaults) {
    let mmu = FakeMmu::new(2);
    let mut table = AgeTable::new(0);
    table.add_range_of(range(0..BLOCK), Kind::Anon).unwrap();
    table.add_range_of(range(BLOCK..2 * BLOCK), Kind::File).unwrap();
    table.enable_filters().unwrap();
    mmu.map(0..100);
    let finish = |now_ms| {
        let mut pass = lru_age::AgePass::start(&table, AgeMode::Clear).unwrap();
        while pass.step(&mmu, &mut (), 4096).next.is_some() {}
        let _ = pass.finish(now_ms);
    };
    finish(1000);
    mmu.map(BLOCK..BLOCK + 28);
    (0..64).for_each(|gfn| mmu.touch(gfn));
    finish(2500);
    let refaults = Refaults::new(64).unwrap();
    for gfn in (0..3).map(Gfn::new) {
        refaults.evicted(gfn, Seq::new(3), Kind::File, Tier::Used);
    }
    assert!(refaults.refault(Gfn::new(1), Seq::new(4)).is_some());
    refaults.protected(Kind::Anon, Tier::Untouched, 7);
    (mmu, table, refaults)
}

#[test]
fn page_ages_print_as_the_kernel_prints_them() {
    let (_, table, refaults) = printed();
    let vm = VmView { id: 7, path: "/vm/7", node: 0, table: &table, refaults: Some(&refaults) };
    let mut text = String::new();
    write_lru_gen(&mut text, &vm, 4000).unwrap();
    let expected = "\
memcg     7 /vm/7
 node     0
          3       4000        100           0 
          4       3000          0          28 
          5       1500          0           0 
";
    assert_eq!(text, expected);
    text.clear();
    write_lru_gen_full(&mut text, &vm, 4000).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2 + 3 * 6);
    let tiers = [
        "0 0r 0e 7p 0r 0e 0p",
        "1 0r 0e 0p 1r 3e 0p",
        "2 0r 0e 0p 0r 0e 0p",
        "3 0r 0e 0p 0r 0e 0p",
    ];
    assert_eq!(lines[3].len(), 22 + 6 * 12, "columns as wide as the kernel's");
    let spaced = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    for (line, tier) in lines[3..].iter().zip(tiers) {
        assert_eq!(spaced(line), tier);
    }
    // Totals with the youngest: evicted and protected together.
    assert_eq!(spaced(lines[15]), "0 0R 7T 0x 0R 0T 0x");
    assert_eq!(spaced(lines[16]), "1 0R 0T 0x 1R 3T 0x");
    // The passes of 3 and 4: 100 seen in one table (an empty one is not told of), then 128, of
    // which 64 used in one dense table.
    assert_eq!(spaced(lines[7]), "100T 0Y 1F 0A");
    assert_eq!(spaced(lines[13]), "128T 64Y 0F 1A");
    assert_eq!(spaced(lines[19]), "0x 0x 0x 0x");
}

/// A reader written after the kernel's documentation, not after the writer: `memcg id path`, `node
/// id`, then lines of generation, age and the two counts.
#[test]
fn a_parser_of_the_kernels_form_reads_it_back() {
    let (_, table, _) = printed();
    let vm = VmView { id: 40_000, path: "/a b", node: 1, table: &table, refaults: None };
    let mut text = String::new();
    write_lru_gen(&mut text, &vm, 4000).unwrap();
    let mut lines = text.lines();
    let memcg = lines.next().unwrap().strip_prefix("memcg").unwrap().trim_start();
    assert_eq!(memcg.split_once(' ').unwrap(), ("40000", "/a b"));
    let node = lines.next().unwrap().trim_start().strip_prefix("node").unwrap();
    assert_eq!(node.trim().parse::<u32>(), Ok(1));
    let rows: Vec<Vec<u64>> = lines
        .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
        .collect();
    for (row, seq) in rows.iter().zip(table.window().seqs()) {
        assert_eq!(row[0], seq.get());
        assert_eq!(row[2] + row[3], table.pages_in(seq));
    }
    assert_eq!(to_u64(rows.len()), table.window().nr_gens());
}

fn age(vm: u32, node: u32, seq: u64, swappiness: Option<u8>, scan: Scan) -> Command {
    let swappiness = swappiness.map(|value| Swappiness::new(value).unwrap());
    Command::Age { target: VmNode { vm, node }, seq: Seq::new(seq), swappiness, scan }
}

fn evict(vm: u32, node: u32, seq: u64, swappiness: Option<u8>, pages: u64) -> Command {
    let swappiness = swappiness.map(|value| Swappiness::new(value).unwrap());
    Command::Evict { target: VmNode { vm, node }, seq: Seq::new(seq), swappiness, pages }
}

#[test]
fn commands_are_read_as_the_kernel_reads_them() {
    let good = [
        ("+ 1 0 7", age(1, 0, 7, None, Scan::Full)),
        ("+1 0 7", age(1, 0, 7, None, Scan::Full)),
        ("  +  1\t0  7 1", age(1, 0, 7, Some(1), Scan::Full)),
        ("+ 1 0 7 200 0", age(1, 0, 7, Some(200), Scan::Filtered)),
        ("+ 1 0 7 max 1", age(1, 0, 7, Some(201), Scan::Full)),
        ("- 3 1 9", evict(3, 1, 9, None, u64::MAX)),
        ("- 3 1 9 60", evict(3, 1, 9, Some(60), u64::MAX)),
        ("- 3 1 9 60 4096", evict(3, 1, 9, Some(60), 4096)),
    ];
    for (text, command) in good {
        assert_eq!(parse(text).collect::<Vec<_>>(), [Ok(command)], "{text:?}");
    }
    let bad = [
        "x 1 0 7",
        "+",
        "+ 1 0",
        "+ 1 0 seven",
        "+ -1 0 7",
        "+ 1 0 7 60 1 1",
        "- 3 1 9 6o",
        "- 3 1 9 60 -1",
        "+ 99999999999 0 7",
        "é 1 0 7",
    ];
    for text in bad {
        let read: Vec<_> = parse(text).collect();
        assert_eq!(read, [Err(CommandError::Malformed { number: 0 })], "{text:?}");
        assert_eq!(read[0].unwrap_err().errno(), 22);
    }
    let over = CommandError::Swappiness { given: 202 };
    assert_eq!(parse("- 3 1 9 202").next(), Some(Err(over)));
    assert_eq!(over.errno(), 22);
    // Commas, semicolons and newlines; empty commands are nothing.
    let many: Vec<_> = parse("+ 1 0 7;; - 1 0 4\n\n, - 1 0 x\n").collect();
    assert_eq!(many.len(), 3);
    assert_eq!(many[2], Err(CommandError::Malformed { number: 2 }));
    assert_eq!(parse(" \n").count(), 0);
}

/// One VM, number 1, node 0.
struct OneVm {
    mmu: FakeMmu,
    table: AgeTable,
    stop: bool,
    evicted: u64,
}

impl Commander for OneVm {
    fn command(&mut self, command: &Command) -> Result<(), CommandError> {
        let known = VmNode { vm: 1, node: 0 };
        match *command {
            Command::Age { target, .. } | Command::Evict { target, .. } if target != known => {
                Err(CommandError::UnknownVm { target })
            }
            Command::Age { seq, scan, .. } => {
                let options = PassOptions::new(AgeMode::Clear);
                run_aging(&self.table, seq, scan, options, 0, &self.mmu, &mut ()).map(|_| ())
            }
            Command::Evict { seq, pages, .. } => {
                let options = EvictOptions::new(pages);
                let mut policy = Plain::default();
                let (mmu, stop) = (&self.mmu, self.stop);
                let take = |victim: &lru_age::Candidate| {
                    mmu.unmap(victim.range.start.get()..victim.range.end.get());
                    if stop { Take::Stop } else { Take::Evicted }
                };
                let report =
                    run_eviction(&self.table, seq, &mut policy, &options, mmu, &mut (), take)?;
                self.evicted += report.evicted;
                Ok(())
            }
        }
    }
}

fn one_vm() -> OneVm {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..300);
    OneVm { mmu, table, stop: false, evicted: 0 }
}

#[test]
fn a_pass_is_run_for_any_generation_that_exists() {
    let mut vm = one_vm();
    assert_eq!(run("+ 1 0 3", &mut vm), Ok(1));
    assert_eq!((vm.table.window().max_seq(), vm.table.tracked_pages()), (Seq::new(4), 300));
    // Several in one text, one increment each; an old number is as good as the youngest.
    assert_eq!(run("+ 1 0 4, + 1 0 3\n+ 1 0 6 1 0", &mut vm), Ok(3));
    assert_eq!(vm.table.window().max_seq(), Seq::new(7));
    let future = run("+ 1 0 8", &mut vm).unwrap_err();
    let [seq, max_seq] = [8, 7].map(Seq::new);
    assert_eq!((future, future.errno()), (CommandError::Future { seq, max_seq }, 22));
    // The first failure ends it; what came before is done, what comes after is not.
    let stranger = run("+ 1 0 7\n+ 2 0 7\n+ 1 0 8", &mut vm).unwrap_err();
    let target = VmNode { vm: 2, node: 0 };
    assert_eq!((stranger, stranger.errno()), (CommandError::UnknownVm { target }, 22));
    assert_eq!(vm.table.window().max_seq(), Seq::new(8));
    // Somebody else's pass is under way.
    let OneVm { mmu, table, .. } = vm;
    let pass = lru_age::AgePass::start(&table, AgeMode::Clear).unwrap();
    let options = PassOptions::new(AgeMode::Clear);
    let beside = run_aging(&table, Seq::new(8), Scan::Full, options, 0, &mmu, &mut ());
    let beside = beside.unwrap_err();
    let expected = CommandError::Advanced { max_seq: Seq::new(8) };
    assert_eq!((beside, beside.errno()), (expected, 17));
    drop(pass);
}

#[test]
fn eviction_reaches_up_to_its_generation_or_its_number_of_pages() {
    let mut vm = one_vm();
    let young = run("- 1 0 2", &mut vm).unwrap_err();
    let [seq, max_seq] = [2, 3].map(Seq::new);
    assert_eq!((young, young.errno()), (CommandError::TooYoung { seq, max_seq }, 22));
    assert_eq!(run("+ 1 0 3; + 1 0 4; - 1 0 3 60 100", &mut vm), Ok(3));
    assert_eq!((vm.evicted, vm.table.tracked_pages()), (100, 200));
    vm.stop = true;
    let interrupted = run("- 1 0 3", &mut vm).unwrap_err();
    assert_eq!((interrupted, interrupted.errno()), (CommandError::Interrupted, 4));
    vm.stop = false;
    // One page was unmapped before the stop, and is found so.
    assert_eq!(run("- 1 0 3", &mut vm), Ok(1));
    assert_eq!((vm.evicted, vm.table.tracked_pages()), (299, 0));
    vm.table.check().unwrap();
}

/// Row 5.37.
#[test]
fn switches_are_read_and_printed_as_the_kernel_does() {
    for (text, switches) in [
        ("y", Some(Switches::ALL)),
        ("Yes\n", Some(Switches::ALL)),
        ("n", Some(Switches::NONE)),
        ("0x0003\n", Some(Switches::CORE.union(Switches::WALK))),
        ("5", Some(Switches::CORE.union(Switches::NONLEAF))),
        ("0xff", Some(Switches::ALL)),
        ("0", Some(Switches::NONE)),
        ("", None),
        ("-1", None),
        ("maybe", None),
    ] {
        assert_eq!(Switches::parse(text), switches, "{text:?}");
    }
    assert_eq!(Switches::ALL.to_string(), "0x0007");
    assert!(Switches::ALL.contains(Switches::NONLEAF));
    assert!(!Switches::CORE.contains(Switches::WALK));
}

/// Row 5.37.
#[test]
fn switches_limit_what_a_pass_may_use() {
    let asks = |upper| PassOptions { upper, ..PassOptions::new(AgeMode::ClearFlush) };
    let (ignores, uses) = (asks(UpperBits::Ignore), asks(UpperBits::Use));
    for (bits, runs, may_use) in [
        ("0", false, false),
        ("1", false, false),
        ("2", false, false),
        ("3", true, false),
        ("5", false, false),
        ("6", false, false),
        ("7", true, true),
    ] {
        let switches = Switches::parse(bits).unwrap();
        let left = if may_use { uses } else { ignores };
        assert_eq!(uses.within(switches), runs.then_some(left), "{bits}");
        assert_eq!(ignores.within(switches), runs.then_some(ignores), "{bits}: none is added");
    }
}

#[test]
fn pages_that_were_inserted_are_printed_before_any_pass() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    let mut editor = table.edit().unwrap();
    editor.insert(range(0..12), Level::L1, Arrival::New);
    drop(editor);
    let vm = VmView { id: 1, path: "/", node: 0, table: &table, refaults: None };
    let mut text = String::new();
    write_lru_gen_full(&mut text, &vm, 0).unwrap();
    assert!(text.contains("         12 "), "{text}");
    mmu.map(0..12);
    let _ = pass_with(&table, &mmu, PassOptions::new(AgeMode::Clear));
    assert_eq!(pass(&table, &mmu).counts.mapped, 12);
}
