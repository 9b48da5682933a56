//! A guest that edits its own tables on shadows: what it flushes it sees at once, what it does not
//! flush it may see old or new, and most of it costs no exit.
//!
//! All writes to tables are the guest's own, by a linear address of the table. Pages are told apart
//! by the word in them.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::addr::Level;
use mmu_core::spte::Legacy;

use crate::guest::program::{DONE, FAULT, Program};
use crate::guest::system::{A, D, P, Space, U, W, linear_of};
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::shadow::vcpu::ShadowCpu;
use crate::shadow::vm::ShadowVm;
use crate::trouble::Trouble;
use crate::virt::state::gpr::{R12, R13, RAX};
use crate::virt::{Exit, Virt};
use crate::vm::{Task, data_at};

/// The word in data page `page`.
pub const fn token(page: u64) -> u64 {
    0x7000_0000 + page
}

/// Permits everything.
pub const ALL: u64 = P | W | U;
/// CR4.PGE.
const PGE: u64 = 1 << 7;

/// A guest whose every page can be told from the others.
pub struct Kernel<V: Virt> {
    pub vm: Arc<ShadowVm<Legacy>>,
    pub vcpu: ShadowCpu<V>,
}

impl<V: Virt> Kernel<V> {
    /// On `space`.
    pub fn new(lab: &Lab<V>, vm: &Arc<ShadowVm<Legacy>>, space: &Space) -> Self {
        for page in 0..vm.ram.data.bytes() / PAGE {
            vm.ram.data.word(page * PAGE).store(token(page), Ordering::Relaxed);
        }
        let vcpu = ShadowCpu::in_space(vm, 0, &lab.features, space.tree.root);
        Self { vm: Arc::clone(vm), vcpu }
    }

    /// The guest reads the word at `linear`.
    pub fn peek(&mut self, linear: u64) -> Result<u64, Trouble> {
        self.vcpu.perform(&Task::pages(Program::Read, linear, 1))?;
        Ok(self.vcpu.registers().gpr[RAX])
    }

    /// The guest writes `value` to `linear`.
    pub fn poke(&mut self, linear: u64, value: u64) -> Result<(), Trouble> {
        self.vcpu.perform(&Task::pages(Program::Write, linear, 1).value(value)).map(drop)
    }

    /// The guest writes an entry of a table of its own.
    pub fn edit(&mut self, place: u64, entry: u64) -> Result<(), Trouble> {
        let linear = linear_of(&self.vm.ram, place);
        self.poke(linear, entry)
    }

    /// The guest executes INVLPG.
    pub fn invalidate(&mut self, linear: u64) -> Result<(), Trouble> {
        self.vcpu.perform(&Task::pages(Program::Invalidate, linear, 1)).map(drop)
    }

    /// The guest loads CR3.
    pub fn load(&mut self, root: u64) -> Result<(), Trouble> {
        self.vcpu.perform(&Task::pages(Program::SetCr3, root, 1)).map(drop)
    }

    /// The entry for a small page of data.
    pub fn page(&self, page: u64, bits: u64) -> u64 {
        (self.vm.ram.data.start() + page * PAGE) | bits
    }
}

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let vm = ShadowVm::new(lab.shadow_caps(), 2 << 20);
    let space = Space::with_data(&vm.ram, Level::L1);
    let mut kernel = Kernel::new(lab, &vm, &space);
    let parts: [(&str, Part<V>); 9] = [
        ("an-edit-and-invlpg", invlpg),
        ("an-edit-and-cr3", cr3),
        ("an-edit-and-cr4", cr4),
        ("an-upper-entry", upper),
        ("a-table-under-two-links", two_links),
        ("an-absent-page", absent),
        ("a-read-only-page", read_only),
        ("accessed-and-dirty", accessed_dirty),
        ("an-unknown-instruction", unknown),
    ];
    for (name, part) in parts {
        let went = part(lab, &mut kernel, &space);
        let _ = lab.went(name, went);
    }
    let went = spaces(lab, &mut kernel, &space);
    let _ = lab.went("two-spaces", went);
    let books = vm.check(&mut vm.actor());
    if let Some(count) = lab.went("shadow-tables-agree", books) {
        lab.check("shadow-tables-agree", count.pages > 0, format_args!("{count:?}"));
    }
    drop(kernel);
    lab.equal("shadow-tables-left", vm.end(), (0, 0));
}

type Part<V> = fn(&mut Lab<V>, &mut Kernel<V>, &Space) -> Result<(), Trouble>;

fn invlpg<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let (linear, ram) = (data_at(0), Arc::clone(&kernel.vm.ram));
    let entry = space.entry(&ram, linear);
    lab.equal("a-page-is-read", kernel.peek(linear)?, token(0));
    let before = (kernel.vm.stats(), kernel.vcpu.counts);
    kernel.edit(entry, kernel.page(8, ALL))?;
    let after = (kernel.vm.stats(), kernel.vcpu.counts);
    let (unsyncs, emulated) =
        (after.0.unsyncs - before.0.unsyncs, after.1.emulated - before.1.emulated);
    lab.equal("a-written-table-goes-out-of-sync", (unsyncs, emulated), (1, 0));
    let seen = kernel.peek(linear)?;
    let either = seen == token(0) || seen == token(8);
    lab.check("old-or-new-before-the-flush", either, format_args!("{seen:#x}"));
    kernel.invalidate(linear)?;
    lab.equal("new-after-invlpg", kernel.peek(linear)?, token(8));
    // Out of sync it stays: the next edit costs no exit.
    let faults = kernel.vcpu.counts;
    kernel.edit(entry, kernel.page(9, ALL))?;
    lab.equal("another-edit-costs-no-exit", kernel.vcpu.counts, faults);
    kernel.invalidate(linear)?;
    lab.equal("and-is-seen-after-invlpg", kernel.peek(linear)?, token(9));
    Ok(())
}

fn cr3<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = Arc::clone(&kernel.vm.ram);
    for page in 20..40 {
        kernel.peek(data_at(page))?;
        kernel.edit(space.entry(&ram, data_at(page)), kernel.page(page + 100, ALL))?;
    }
    kernel.load(space.tree.root)?;
    let mut wrong = 0;
    for page in 20..40 {
        wrong += u64::from(kernel.peek(data_at(page))? != token(page + 100));
    }
    lab.equal("all-new-after-cr3", wrong, 0);
    let count = kernel.vm.check(&mut kernel.vm.actor());
    let unsync = count.map(|count| count.unsync);
    lab.equal("a-load-of-cr3-synchronises", unsync, Ok(0));
    Ok(())
}

/// Toggling CR4.PGE flushes, too.
fn cr4<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = Arc::clone(&kernel.vm.ram);
    let linear = data_at(41);
    kernel.peek(linear)?;
    kernel.edit(space.entry(&ram, linear), kernel.page(42, ALL))?;
    let toggled = kernel.vcpu.registers().cr4 ^ PGE;
    kernel.vcpu.perform(&Task::pages(Program::SetCr4, toggled, 1))?;
    lab.equal("new-after-cr4", kernel.peek(linear)?, token(42));
    kernel.vcpu.perform(&Task::pages(Program::SetCr4, toggled ^ PGE, 1))?;
    // With CR0.WP off the supervisor writes to a read-only page, and not with it on.
    kernel.edit(space.entry(&ram, linear), kernel.page(42, P))?;
    let cr0 = kernel.vcpu.registers().cr0;
    kernel.vcpu.perform(&Task::pages(Program::SetCr0, cr0 & !(1 << 16), 1))?;
    kernel.poke(linear, token(43))?;
    let word = ram.data.word(42 * PAGE).swap(token(42), Ordering::AcqRel);
    lab.equal("without-wp-it-is-written", word, token(43));
    kernel.vcpu.perform(&Task::pages(Program::SetCr0, cr0, 1))?;
    lab.equal("with-wp-it-is-not", fault(kernel, Program::Write, linear)?, Some((linear, 3)));
    Ok(())
}

/// The fault that the guest's handler is told of.
fn fault<V: Virt>(
    kernel: &mut Kernel<V>,
    program: Program,
    linear: u64,
) -> Result<Option<(u64, u64)>, Trouble> {
    kernel.vcpu.begin(&Task::pages(program, linear, 1));
    match kernel.vcpu.run()? {
        Exit::Out { port: DONE, .. } => Ok(None),
        Exit::Out { port: FAULT, .. } => {
            let state = kernel.vcpu.registers();
            Ok(Some((state.gpr[R12], state.gpr[R13])))
        }
        exit => Err(Trouble::Exit(exit, kernel.vcpu.registers().rip)),
    }
}

/// Entries above the lowest are never out of sync: the write is emulated and needs no flush.
fn upper<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let (ram, linear) = (Arc::clone(&kernel.vm.ram), data_at(50));
    let place = space.tree.place(&ram, linear, Level::L2);
    let (old, table) = (ram.at(place).load(Ordering::Acquire), ram.table());
    lab.equal("before-the-switch-of-tables", kernel.peek(linear)?, token(50));
    // Another table in which that page is page 60.
    kernel.edit(table + linear / PAGE % 512 * 8, kernel.page(60, ALL))?;
    let emulated = kernel.vcpu.counts.emulated;
    kernel.edit(place, table | ALL)?;
    lab.equal("the-write-is-emulated", kernel.vcpu.counts.emulated - emulated, 1);
    kernel.load(space.tree.root)?;
    lab.equal("the-other-table-is-used", kernel.peek(linear)?, token(60));
    // The guest wrote to it before it was a table: not unseen any more.
    kernel.edit(table + linear / PAGE % 512 * 8, kernel.page(61, ALL))?;
    kernel.invalidate(linear)?;
    lab.equal("and-its-edits-are-followed", kernel.peek(linear)?, token(61));
    lab.equal("with-what-is-not-in-it", fault(kernel, Program::Read, data_at(51))?.is_some(), true);
    kernel.edit(place, old)?;
    kernel.load(space.tree.root)?;
    lab.equal("and-the-old-one-again", kernel.peek(linear)?, token(50));
    Ok(())
}

/// One table under two links, one of which permits no writes.
fn two_links<V: Virt>(
    lab: &mut Lab<V>,
    kernel: &mut Kernel<V>,
    space: &Space,
) -> Result<(), Trouble> {
    let (ram, linear) = (Arc::clone(&kernel.vm.ram), data_at(110));
    let place = space.tree.place(&ram, linear, Level::L2);
    let (second, far) = (place + 3 * 8, linear + (3 << 21));
    let link = ram.at(place).load(Ordering::Acquire);
    kernel.edit(second, link & !W)?;
    kernel.poke(linear, token(110))?;
    lab.equal("read-by-the-second-link", kernel.peek(far)?, token(110));
    lab.equal("not-written-by-it", fault(kernel, Program::Write, far)?, Some((far, 3)));
    kernel.edit(space.entry(&ram, linear), kernel.page(111, ALL | A | D))?;
    kernel.load(space.tree.root)?;
    lab.equal("both-follow-the-table", [kernel.peek(far)?, kernel.peek(linear)?], [token(111); 2]);
    lab.equal("still-not-written-by-it", fault(kernel, Program::Write, far)?, Some((far, 3)));
    kernel.edit(second, 0)?;
    kernel.load(space.tree.root)
}

/// What is not present is cached by nobody: a page that appears needs no flush.
fn absent<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let (ram, linear) = (Arc::clone(&kernel.vm.ram), data_at(70));
    let place = space.entry(&ram, linear);
    kernel.peek(linear)?;
    kernel.edit(place, 0)?;
    kernel.invalidate(linear)?;
    lab.equal("a-page-that-went", fault(kernel, Program::Read, linear)?, Some((linear, 0)));
    kernel.edit(place, kernel.page(71, ALL))?;
    lab.equal("a-page-that-came", kernel.peek(linear)?, token(71));
    Ok(())
}

/// More permissions need no flush, fewer do.
fn read_only<V: Virt>(
    lab: &mut Lab<V>,
    kernel: &mut Kernel<V>,
    space: &Space,
) -> Result<(), Trouble> {
    let (ram, linear) = (Arc::clone(&kernel.vm.ram), data_at(80));
    let place = space.entry(&ram, linear);
    kernel.poke(linear, token(80))?;
    kernel.edit(place, kernel.page(80, P | U | A | D))?;
    kernel.invalidate(linear)?;
    let refused = fault(kernel, Program::Write, linear)?;
    lab.equal("a-page-that-lost-w", refused, Some((linear, 3)));
    lab.equal("is-read", kernel.peek(linear)?, token(80));
    kernel.edit(place, kernel.page(80, ALL | A | D))?;
    kernel.poke(linear, token(81))?;
    let word = ram.data.word(80 * PAGE).load(Ordering::Acquire);
    lab.equal("a-page-that-got-w", word, token(81));
    Ok(())
}

fn accessed_dirty<V: Virt>(
    lab: &mut Lab<V>,
    kernel: &mut Kernel<V>,
    space: &Space,
) -> Result<(), Trouble> {
    let (ram, linear) = (Arc::clone(&kernel.vm.ram), data_at(90));
    let place = space.entry(&ram, linear);
    let bits = || ram.at(place).load(Ordering::Acquire) & (A | D);
    lab.equal("an-unused-page", bits(), 0);
    kernel.peek(linear)?;
    lab.equal("a-on-a-read", bits(), A);
    kernel.poke(linear, token(90))?;
    lab.equal("d-on-a-write", bits(), A | D);
    kernel.edit(place, kernel.page(90, ALL | A))?;
    kernel.invalidate(linear)?;
    kernel.peek(linear)?;
    lab.equal("no-d-on-a-read", bits(), A);
    kernel.poke(linear, token(90))?;
    lab.equal("d-again-on-a-write", bits(), A | D);
    kernel.edit(place, kernel.page(90, ALL))?;
    kernel.invalidate(linear)?;
    kernel.peek(linear)?;
    lab.equal("a-again-on-a-read", bits(), A);
    Ok(())
}

/// What the emulator does not know the processor does, once the table has no shadow.
fn unknown<V: Virt>(
    lab: &mut Lab<V>,
    kernel: &mut Kernel<V>,
    space: &Space,
) -> Result<(), Trouble> {
    let ram = Arc::clone(&kernel.vm.ram);
    // An entry that nothing uses.
    let place = space.tree.place(&ram, data_at(0) + (5 << 21), Level::L2);
    kernel.peek(data_at(100))?;
    let before = kernel.vcpu.counts.given_up;
    let task = Task::pages(Program::Add, linear_of(&ram, place), 1);
    kernel.vcpu.perform(&task)?;
    lab.equal("its-shadow-is-given-up", kernel.vcpu.counts.given_up - before, 1);
    let word = ram.at(place).swap(0, Ordering::AcqRel);
    lab.equal("and-the-processor-does-it", word, 1);
    lab.equal("the-table-is-shadowed-again", kernel.peek(data_at(100))?, token(100));
    Ok(())
}

/// Two address spaces: each sees its own, and roots that were left are found again.
fn spaces<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = Arc::clone(&kernel.vm.ram);
    let other = Space::new(&ram);
    let pages = ram.data.bytes() / PAGE;
    for page in 0..pages {
        let entry = kernel.page(pages - 1 - page, ALL);
        other.tree.set(&ram, data_at(page), Level::L1, entry);
    }
    let (mut wrong, mut made) = (0, 0);
    for round in 0..6 {
        for page in 200..216 {
            kernel.load(other.tree.root)?;
            wrong += u64::from(kernel.peek(data_at(page))? != token(pages - 1 - page));
            kernel.load(space.tree.root)?;
            wrong += u64::from(kernel.peek(data_at(page))? != token(page));
        }
        if round == 0 {
            made = kernel.vm.stats().pages_made;
        }
    }
    lab.equal("each-space-has-its-own-pages", wrong, 0);
    lab.equal("a-root-that-was-left-is-found-again", kernel.vm.stats().pages_made, made);
    Ok(())
}
