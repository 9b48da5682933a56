//! Large pages of a guest on shadow tables: large in the shadow where memory allows it, small where
//! one of the guest's tables lies in them, and whatever the guest makes of them next.

use core::sync::atomic::Ordering;

use mmu_core::addr::Level;
use mmu_core::stats::Counter;

use crate::guest::layout::DATA;
use crate::guest::program::Program;
use crate::guest::system::{A, D, P, PS, Space, U, W};
use crate::lab::Lab;
use crate::machine::memory::{BLOCK, PAGE};
use crate::runner::Runner;
use crate::shadow::vm::ShadowVm;
use crate::suite::shadow_tables::{ALL, Kernel, token};
use crate::trouble::Trouble;
use crate::virt::Virt;
use crate::vm::{Task, data_at, word};

/// Pages of a large one.
const LARGE: u64 = BLOCK / PAGE;
/// Where the low block is mapped once more, by a large page.
const LOW_AGAIN: u64 = 3 << 30;
/// Where a table that lies in a large page is used.
const INNER: u64 = 3 << 30 | 8 << 21;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let vm = ShadowVm::new(lab.shadow_caps(), 3 * BLOCK);
    let space = Space::with_data(&vm.ram, Level::L2);
    let mut kernel = Kernel::new(lab, &vm, &space);
    let parts: [(&str, Part<V>); 4] = [
        ("large-pages", large),
        ("a-page-becomes-small", split),
        ("a-table-in-a-large-page", inner),
        ("tables-seen-through-a-large-page", low),
    ];
    for (name, part) in parts {
        let went = part(lab, &mut kernel, &space);
        let _ = lab.went(name, went);
    }
    let books = vm.check(&mut vm.actor());
    if let Some(count) = lab.went("huge-shadows-agree", books) {
        let gauge = vm.mmu.vm().stats().get(Counter::Pages2M);
        lab.equal("huge-shadows-agree", count.leaves[1], gauge);
    }
    drop(kernel);
    lab.equal("shadow-huge-left", vm.end(), (0, 0));
}

type Part<V> = fn(&mut Lab<V>, &mut Kernel<V>, &Space) -> Result<(), Trouble>;

impl<V: Virt> Kernel<V> {
    /// Large leaves in the shadow.
    fn large(&self) -> u64 {
        self.vm.mmu.vm().stats().get(Counter::Pages2M)
    }
}

fn large<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let (mut wrong, pages) = (0, 3 * LARGE);
    let place = space.tree.place(&kernel.vm.ram, data_at(0), Level::L2);
    let bits = |kernel: &Kernel<V>| kernel.vm.ram.at(place).load(Ordering::Acquire) & (A | D);
    for page in (0..pages).step_by(67) {
        wrong += u64::from(kernel.peek(data_at(page))? != token(page));
    }
    lab.equal("large-pages-are-read", (wrong, bits(kernel)), (0, A));
    kernel.vcpu.perform(&Task::pages(Program::Fill, data_at(0), pages))?;
    let done = kernel.vcpu.perform(&Task::pages(Program::Verify, data_at(0), pages))?;
    lab.equal("large-pages-are-written", (done.wrong, bits(kernel)), (0, A | D));
    lab.equal("and-are-large-in-the-shadow", kernel.large(), 3);
    let last = data_at(pages - 1);
    lab.equal("where-the-host-looks", word(&kernel.vm.ram.data, last - DATA), last);
    Ok(())
}

/// The guest splits its first large page; two of the small ones change places.
fn split<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = alloc::sync::Arc::clone(&kernel.vm.ram);
    let (place, table) = (space.tree.place(&ram, data_at(0), Level::L2), ram.table());
    for page in 0..LARGE {
        let target = if page < 2 { 1 - page } else { page };
        ram.at(table + page * 8).store(kernel.page(target, ALL), Ordering::Relaxed);
    }
    let old = ram.at(place).load(Ordering::Acquire);
    kernel.edit(place, table | ALL)?;
    kernel.load(space.tree.root)?;
    let seen = [kernel.peek(data_at(0))?, kernel.peek(data_at(1))?, kernel.peek(data_at(2))?];
    lab.equal("small-pages-in-its-place", seen, [data_at(1), data_at(0), data_at(2)]);
    lab.equal("one-large-leaf-less", kernel.large(), 2);
    kernel.edit(place, old)?;
    kernel.load(space.tree.root)?;
    lab.equal("and-large-again", kernel.peek(data_at(0))?, data_at(0));
    lab.equal("in-the-shadow-too", kernel.large(), 3);
    Ok(())
}

/// The guest uses a page of its large page as a table: the shadow's leaf over it goes, and the
/// guest's edits through the large page are followed.
fn inner<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = alloc::sync::Arc::clone(&kernel.vm.ram);
    let table = LARGE + 5;
    kernel.poke(data_at(table), kernel.page(2 * LARGE + 9, ALL))?;
    kernel.poke(data_at(2 * LARGE + 9), token(9))?;
    kernel.poke(data_at(2 * LARGE + 10), token(10))?;
    let before = kernel.large();
    let place = space.tree.place(&ram, INNER, Level::L2);
    kernel.edit(place, kernel.page(table, ALL))?;
    lab.equal("a-page-by-the-inner-table", kernel.peek(INNER)?, token(9));
    lab.equal("no-large-leaf-over-a-table", kernel.large(), before - 1);
    let unsyncs = kernel.vm.stats().unsyncs;
    kernel.poke(data_at(table), kernel.page(2 * LARGE + 10, ALL))?;
    lab.equal("an-edit-by-the-large-page", kernel.vm.stats().unsyncs - unsyncs, 1);
    kernel.invalidate(INNER)?;
    lab.equal("is-followed", kernel.peek(INNER)?, token(10));
    // The table goes: its page is only data again.
    kernel.edit(place, 0)?;
    kernel.load(space.tree.root)?;
    lab.equal(
        "the-page-is-data-again",
        kernel.peek(data_at(table))?,
        kernel.page(2 * LARGE + 10, ALL | A),
    );
    Ok(())
}

/// The low block, where code and tables are, by one large page of the guest's.
fn low<V: Virt>(lab: &mut Lab<V>, kernel: &mut Kernel<V>, space: &Space) -> Result<(), Trouble> {
    let ram = alloc::sync::Arc::clone(&kernel.vm.ram);
    space.tree.set(&ram, LOW_AGAIN, Level::L2, ram.low.start() | P | W | U | PS);
    let (before, small) = (kernel.large(), 64 << 21);
    // A table of small pages, to be edited by the large one.
    let place = space.tree.place(&ram, LOW_AGAIN + small, Level::L1);
    ram.at(place).store(kernel.page(3, ALL), Ordering::Relaxed);
    lab.equal("a-page-by-a-table", kernel.peek(LOW_AGAIN + small)?, data_at(3));
    let through = LOW_AGAIN + (place - ram.low.start());
    let entry = kernel.peek(through)?;
    lab.equal("its-entry-by-the-large-page", entry, kernel.page(3, ALL | A));
    kernel.poke(through, kernel.page(4, ALL))?;
    kernel.invalidate(LOW_AGAIN + small)?;
    lab.equal("edited-by-the-large-page", kernel.peek(LOW_AGAIN + small)?, data_at(4));
    lab.equal("which-is-small-in-the-shadow", kernel.large(), before);
    Ok(())
}
