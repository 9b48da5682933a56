//! Tables as a guest makes them: trees of eight-byte entries in its own memory.
//!
//! Owns [`Tree`], for a guest's own tables and for those that a guest hypervisor makes for its
//! guest. It writes to memory like a guest's kernel: whoever has shadows of the tables is told by
//! its caller. No locks: one CPU makes a tree.

use core::sync::atomic::Ordering;

use mmu_core::addr::{Gfn, Gpa, Level};

use crate::shadow::ram::Ram;

/// Bits of an entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A tree of tables. See the file's head.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    /// Guest physical address of the top table.
    pub root: u64,
    top: Level,
    /// What an entry that leads to a table has besides its address.
    link: u64,
}

impl Tree {
    /// An empty tree whose top table is at `top`; `link` is what entries that lead to tables have
    /// set.
    pub fn new(ram: &Ram, top: Level, link: u64) -> Self {
        Self { root: ram.table(), top, link }
    }

    /// Guest physical address of the entry at `level` on the way to `address`; the tables above are
    /// made if they are not there.
    pub fn place(&self, ram: &Ram, address: u64, level: Level) -> u64 {
        let page = Gfn::containing(Gpa::new(address));
        let (mut table, mut at) = (self.root, self.top);
        loop {
            let place = table + page.index(at) as u64 * 8;
            if at == level {
                return place;
            }
            let word = ram.at(place);
            if word.load(Ordering::Relaxed) == 0 {
                word.store(ram.table() | self.link, Ordering::Relaxed);
            }
            table = word.load(Ordering::Relaxed) & ADDRESS;
            at = at.below();
        }
    }

    /// Put `entry` at `level` on the way to `address`.
    pub fn set(&self, ram: &Ram, address: u64, level: Level, entry: u64) {
        ram.at(self.place(ram, address, level)).store(entry, Ordering::Release);
    }
}
