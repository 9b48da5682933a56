//! Another hypervisor, played by suites: its memory and the nested tables that it makes for its
//! guest.
//!
//! Owns [`L1`] and [`Bits`], what entries of machine `V`'s format are made of. The guest, L2, is
//! the one of `guest/layout.rs`: its linear addresses are its physical ones, and L1 puts the low
//! block and the data where that file says. No locks.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::addr::Level;
use mmu_core::spte::Capabilities;
use mmu_core::vm::Actor;

use super::nested::NestedCpu;
use super::ram::Ram;
use super::vm::{QUOTA, ShadowVm};
use crate::guest::layout::{self, DATA, LOW_BYTES};
use crate::guest::tree::Tree;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::virt::{Features, GuestState, Mode, Virt};

/// Bits of entries in L1's tables.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// An entry that leads to a table and permits everything.
    pub link: u64,
    /// An entry that maps a page and permits everything.
    pub page: u64,
    /// Besides, one that maps a large page.
    pub large: u64,
}

impl Bits {
    /// Those of machine `V`: NPT's present, writable, user; EPT's read, write, execute, write-back.
    pub fn of<V: Virt>() -> Self {
        let page = if V::WORD == "npt" { 7 } else { 7 | 6 << 3 };
        Self { link: 7, page, large: 1 << 7 }
    }
}

/// See the file's head.
pub struct L1<V: Virt> {
    /// The VM that L1 is in.
    pub vm: Arc<ShadowVm<V::Format>>,
    /// The tables that it has made.
    pub tree: Tree,
    /// What they are made of.
    pub bits: Bits,
    /// What L1 has of the processor.
    pub features: Features,
}

impl<V: Virt> L1<V> {
    /// L1 with `bytes` of data for L2, mapped in pages of `level`.
    pub fn new(lab: &Lab<V>, bytes: u64, level: Level) -> Self {
        Self::with(lab.caps(), lab.features, bytes, level)
    }

    /// The same, with accessed and dirty bits of L1's tables off. Then the processor must not set
    /// them in the shadow either: it would walk L2's own tables as if it wrote them, and L1 may
    /// have those read-only.
    pub fn without_accessed_dirty(lab: &Lab<V>, bytes: u64, level: Level) -> Self {
        let caps = Capabilities { accessed_dirty: false, ..lab.caps() };
        let features = Features { accessed_dirty: false, ..lab.features };
        Self::with(caps, features, bytes, level)
    }

    fn with(caps: Capabilities, features: Features, bytes: u64, level: Level) -> Self {
        let (ram, bits) = (Arc::new(Ram::new(bytes)), Bits::of::<V>());
        layout::prepare(&ram.low);
        let tree = Tree::new(&ram, Level::L4, bits.link);
        map_low(&ram, &tree, bits);
        map_data(&ram, &tree, bits, level);
        let vm = ShadowVm::over(caps, ram, QUOTA);
        Self { vm, tree, bits, features }
    }

    /// Another tree for the same guest, with no data in it.
    pub fn another(&self) -> Tree {
        let tree = Tree::new(&self.vm.ram, Level::L4, self.bits.link);
        map_low(&self.vm.ram, &tree, self.bits);
        tree
    }

    /// L2 on vCPU `id`, on the calling CPU.
    pub fn vcpu(&self, id: usize) -> NestedCpu<V> {
        let mut vcpu = NestedCpu::new(&self.vm, id, &self.features, self.tree.root);
        vcpu.start(self.registers(id));
        vcpu
    }

    /// What L2 begins with on vCPU `id`.
    pub fn registers(&self, id: usize) -> GuestState {
        GuestState::new(Mode::Long, layout::CODE_64, layout::stack(id), layout::LEVEL_4)
    }

    /// L1 writes an entry of its tables.
    pub fn edit(&self, actor: &mut Actor<BareHost>, place: u64, entry: u64) {
        self.vm.write(actor, place, entry);
    }

    /// A table, not linked yet, that maps block `block` of the data as a large page would.
    pub fn small_pages(&self, block: u64) -> u64 {
        let table = self.vm.ram.table();
        for index in 0..512 {
            let word = self.vm.ram.at(table + index * 8);
            word.store(self.page(512 * block + index), Ordering::Relaxed);
        }
        table
    }

    /// The entry that maps page `page` of the data and permits everything.
    pub fn page(&self, page: u64) -> u64 {
        (self.vm.ram.data.start() + page * PAGE) | self.bits.page
    }

    /// What stands at `place`.
    pub fn entry(&self, place: u64) -> u64 {
        self.vm.ram.at(place).load(Ordering::Acquire)
    }
}

/// The low block at L2's address 0.
fn map_low(ram: &Ram, tree: &Tree, bits: Bits) {
    for offset in (0..LOW_BYTES).step_by(PAGE as usize) {
        tree.set(ram, offset, Level::L1, (ram.low.start() + offset) | bits.page);
    }
}

/// The data at L2's address [`DATA`].
fn map_data(ram: &Ram, tree: &Tree, bits: Bits, level: Level) {
    let large = if level == Level::L1 { 0 } else { bits.large };
    for offset in (0..ram.data.bytes()).step_by((level.pages() * PAGE) as usize) {
        let entry = (ram.data.start() + offset) | bits.page | large;
        tree.set(ram, DATA + offset, level, entry);
    }
}
