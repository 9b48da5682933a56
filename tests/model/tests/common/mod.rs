//! Hand-made tables in a small memory, shared by the tests of the model.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

use mmu_model::{Access, AccessKind, PhysMem, Stage, VecMem};

/// Read, write, fetch.
pub(crate) const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];

/// A CPL 3 access.
pub(crate) fn user(kind: AccessKind) -> Access {
    Access::user(kind)
}

/// An access at another stage.
pub(crate) fn at_stage(kind: AccessKind, stage: Stage) -> Access {
    Access { kind, user: true, stage }
}

/// Memory in which the table of level L is page L, and the root is the table of the top level.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) mem: VecMem,
    top: u8,
}

impl Tables {
    /// Zeroed tables below a root of level `top`.
    pub(crate) fn new(top: u8) -> Self {
        Self { mem: VecMem::new(16), top }
    }

    /// What a root register holds.
    pub(crate) fn root(&self) -> u64 {
        u64::from(self.top) << 12
    }

    /// Where the entry for `address` is in the table of `level`.
    pub(crate) fn place(level: u8, address: u64) -> u64 {
        let index = (address >> (12 + 9 * (u32::from(level) - 1))) & 511;
        (u64::from(level) << 12) + 8 * index
    }

    /// Store the entry for `address` in the table of `level`.
    pub(crate) fn set(&self, level: u8, address: u64, entry: u64) {
        assert!(self.mem.write(Self::place(level, address), entry));
    }

    /// Load it.
    pub(crate) fn get(&self, level: u8, address: u64) -> u64 {
        self.mem.read(Self::place(level, address)).unwrap()
    }

    /// Link all tables above `leaf_level` for `address`, with these flags in every entry.
    pub(crate) fn link(&self, leaf_level: u8, address: u64, flags: u64) {
        for level in leaf_level + 1..=self.top {
            self.set(level, address, (u64::from(level - 1) << 12) | flags);
        }
    }
}

/// The bits named in the manuals' notation: `"51:46 7 2:1"`.
pub(crate) fn bits(text: &str) -> u64 {
    let mut mask = 0;
    for part in text.split_whitespace() {
        let (high, low) = part.split_once(':').unwrap_or((part, part));
        for bit in low.parse().unwrap()..=high.parse::<u32>().unwrap() {
            mask |= 1_u64 << bit;
        }
    }
    mask
}
