//! A guest's own paging, as the manuals describe it: what one access reads, what it changes, and
//! how it ends.
//!
//! Sources: Intel SDM volume 3A, chapter "Paging" (tables of entry formats, "Access rights",
//! "Page-fault exceptions"); AMD APM volume 2, "Page translation and protection". [`GuestMachine`]
//! is one setting of CPUID and control registers; [`GuestMachine::predict`] follows the manual's
//! text step by step and changes nothing: the changes are listed in a [`Trace`]. Two dimensions are
//! `guest_nested`'s.

use crate::access::AccessKind;
use crate::format::Vendor;

/// Longest list in a [`Trace`]: 35 reads of a walk in two dimensions of five levels.
const TRACE_MAX: usize = 40;

/// Paging modes of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMode {
    /// CR0.PG = 0.
    Off,
    /// 32-bit paging: page directory and page table of 4-byte entries.
    TwoLevel,
    /// PAE paging: page directory and page table below four pointers in registers.
    Pae,
    /// 4-level paging.
    FourLevel,
    /// 5-level paging.
    FiveLevel,
}

/// CPUID and control registers that decide how a linear address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMachine {
    /// The mode.
    pub mode: GuestMode,
    /// Whose processor.
    pub vendor: Vendor,
    /// MAXPHYADDR.
    pub max_phys_bits: u8,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE.
    pub pke: bool,
    /// CR4.PSE.
    pub pse: bool,
    /// CPUID PSE-36.
    pub pse36: bool,
    /// CPUID Page1GB.
    pub gbpages: bool,
}

/// On whose behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Software at CPL 3.
    User,
    /// Software below CPL 3, with this EFLAGS.AC.
    Kernel {
        /// EFLAGS.AC.
        ac: bool,
    },
    /// The processor itself, to a system structure.
    System,
}

/// One access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAccess {
    /// Load, store or fetch.
    pub kind: AccessKind,
    /// By whom.
    pub who: Who,
    /// The PKRU register.
    pub pkru: u32,
}

/// Where a guest's tables begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestRoots {
    /// CR3.
    pub cr3: u64,
    /// The four pointers of PAE paging, as loaded.
    pub pdptes: [u64; 4],
}

/// Guest memory in words of 4 or 8 bytes.
pub trait GuestWords {
    /// The word of `bytes` bytes at `pa`; `None` where there is no memory.
    fn word(&self, pa: u64, bytes: u8) -> Option<u64>;
}

/// What a walk read and what it changes, in order.
#[derive(Clone, Copy, Debug)]
pub struct Trace {
    reads: [u64; TRACE_MAX],
    writes: [(u64, u64); TRACE_MAX],
    read: usize,
    written: usize,
}

impl Default for Trace {
    fn default() -> Self {
        Self { reads: [0; TRACE_MAX], writes: [(0, 0); TRACE_MAX], read: 0, written: 0 }
    }
}

impl Trace {
    /// Addresses of the words read.
    #[must_use]
    pub fn reads(&self) -> &[u64] {
        &self.reads[..self.read]
    }

    /// Address and new value of the words changed.
    #[must_use]
    pub fn writes(&self) -> &[(u64, u64)] {
        &self.writes[..self.written]
    }

    /// Start over.
    pub const fn clear(&mut self) {
        self.read = 0;
        self.written = 0;
    }

    pub(crate) fn note_read(&mut self, pa: u64) {
        self.reads[self.read] = pa;
        self.read += 1;
    }

    pub(crate) fn note_write(&mut self, pa: u64, value: u64) {
        self.writes[self.written] = (pa, value);
        self.written += 1;
    }
}

/// How an access ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It reaches memory.
    Reaches {
        /// Physical address of the byte.
        pa: u64,
        /// Level of the entry that maps it; 0 without paging.
        level: u8,
        /// What the entries together permit.
        rights: Rights,
    },
    /// #PF with this error code.
    PageFault {
        /// The code.
        code: u64,
    },
    /// The address cannot be used at all: #GP, or it cannot be formed.
    BadAddress,
}

/// What entries permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// U/S = 1 in every entry: a user-mode address.
    pub user: bool,
    /// R/W = 1 in every entry.
    pub writable: bool,
    /// XD = 1 in no entry.
    pub executable: bool,
}

impl Rights {
    pub(crate) const EVERYTHING: Self = Self { user: true, writable: true, executable: true };
}

/// What the manual calls the use of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Says {
    NotPresent,
    Reserved,
    Table(u64),
    Page(u64),
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const XD: u64 = 1 << 63;

/// The part `high:low` of `value`, in place.
const fn field(value: u64, high: u32, low: u32) -> u64 {
    if low > high {
        return 0;
    }
    let above = value << (63 - high) >> (63 - high);
    above >> low << low
}

impl GuestMachine {
    /// The level of the entries that a walk reads first; 0 without paging.
    #[must_use]
    pub const fn first_level(&self) -> u8 {
        match self.mode {
            GuestMode::Off => 0,
            GuestMode::TwoLevel | GuestMode::Pae => 2,
            GuestMode::FourLevel => 4,
            GuestMode::FiveLevel => 5,
        }
    }

    /// Bytes of an entry.
    #[must_use]
    pub const fn entry_bytes(&self) -> u8 {
        if matches!(self.mode, GuestMode::TwoLevel) { 4 } else { 8 }
    }

    /// Where an entry for `address` stands in the table of `level` at `table`.
    pub(crate) const fn place(&self, level: u8, table: u64, address: u64) -> u64 {
        match (self.mode, level) {
            (GuestMode::TwoLevel, 2) => table | field(address, 31, 22) >> 20,
            (GuestMode::TwoLevel, _) => table | field(address, 21, 12) >> 10,
            (_, 5) => table | field(address, 56, 48) >> 45,
            (_, 4) => table | field(address, 47, 39) >> 36,
            (_, 3) => table | field(address, 38, 30) >> 27,
            (_, 2) => table | field(address, 29, 21) >> 18,
            (_, _) => table | field(address, 20, 12) >> 9,
        }
    }

    /// The first table: CR3's address bits, or the pointer's of PAE. `None`: that pointer is not
    /// present.
    pub(crate) const fn first_table(&self, roots: GuestRoots, address: u64) -> Option<u64> {
        match self.mode {
            GuestMode::TwoLevel => Some(field(roots.cr3, 31, 12)),
            GuestMode::Pae => {
                let pdpte = roots.pdptes[(field(address, 31, 30) >> 30) as usize];
                if pdpte & P == 0 { None } else { Some(field(pdpte, 51, 12)) }
            }
            _ => Some(field(roots.cr3, 51, 12)),
        }
    }

    /// May `value` be loaded as a PAE pointer?
    #[must_use]
    pub const fn pointer_loads(&self, value: u64) -> bool {
        let reserved = field(value, 2, 1) | field(value, 8, 5);
        let beyond = field(value, 63, self.max_phys_bits as u32);
        value & P == 0 || (reserved == 0 && beyond == 0)
    }

    /// Is `address` one that software can use in this mode?
    #[must_use]
    pub const fn usable(&self, address: u64) -> bool {
        let sign = match self.mode {
            GuestMode::Off => return true,
            GuestMode::TwoLevel | GuestMode::Pae => return address <= 0xffff_ffff,
            GuestMode::FourLevel => 47,
            GuestMode::FiveLevel => 56,
        };
        let top = (address as i64) >> sign;
        top == 0 || top == -1
    }

    /// What an entry of `level` says about `address`.
    pub(crate) const fn says(&self, level: u8, entry: u64, address: u64) -> Says {
        if entry & P == 0 {
            Says::NotPresent
        } else if matches!(self.mode, GuestMode::TwoLevel) {
            self.says_in_two_levels(level, entry, address)
        } else {
            self.says_in_eight_bytes(level, entry, address)
        }
    }

    const fn says_in_two_levels(&self, level: u8, entry: u64, address: u64) -> Says {
        if level == 1 {
            return Says::Page(field(entry, 31, 12) | field(address, 11, 0));
        }
        if !self.pse || entry & PS == 0 {
            return Says::Table(field(entry, 31, 12));
        }
        let low = field(entry, 31, 22) | field(address, 21, 0);
        if !self.pse36 {
            return if field(entry, 21, 13) != 0 { Says::Reserved } else { Says::Page(low) };
        }
        // M is the smaller of 40 and MAXPHYADDR. Bits M-20:13 are bits M-1:32 of the address, bits
        // 21:M-19 are reserved.
        let m = if self.max_phys_bits < 40 { self.max_phys_bits as u32 } else { 40 };
        if field(entry, 21, m - 19) != 0 {
            return Says::Reserved;
        }
        Says::Page(low | field(entry, m - 20, 13) >> 13 << 32)
    }

    const fn says_in_eight_bytes(&self, level: u8, entry: u64, address: u64) -> Says {
        let top = if matches!(self.mode, GuestMode::Pae) { 62 } else { 51 };
        if field(entry, top, self.max_phys_bits as u32) != 0 || (entry & XD != 0 && !self.nxe) {
            return Says::Reserved;
        }
        let amd = matches!(self.vendor, Vendor::Amd);
        let table = Says::Table(field(entry, 51, 12));
        match level {
            5 | 4 if entry & PS != 0 || (amd && entry & 1 << 8 != 0) => Says::Reserved,
            5 | 4 => table,
            3 if entry & PS == 0 => table,
            3 if !self.gbpages || field(entry, 29, 13) != 0 => Says::Reserved,
            3 => Says::Page(field(entry, 51, 30) | field(address, 29, 0)),
            2 if entry & PS == 0 => table,
            2 if field(entry, 20, 13) != 0 => Says::Reserved,
            2 => Says::Page(field(entry, 51, 21) | field(address, 20, 0)),
            _ => Says::Page(field(entry, 51, 12) | field(address, 11, 0)),
        }
    }

    /// Rights after one more entry.
    pub(crate) const fn with(&self, rights: Rights, entry: u64) -> Rights {
        Rights {
            user: rights.user && entry & US != 0,
            writable: rights.writable && entry & RW != 0,
            executable: rights.executable && entry & XD == 0,
        }
    }

    /// Section "Access rights", with the protection key apart: does a key forbid the access?
    const fn key_forbids(&self, rights: Rights, leaf: u64, access: GuestAccess) -> bool {
        let long = matches!(self.mode, GuestMode::FourLevel | GuestMode::FiveLevel);
        if !long || !self.pke || !rights.user {
            return false;
        }
        let key = field(leaf, 62, 59) >> 59;
        let access_disable = access.pkru >> (2 * key) & 1 != 0;
        let write_disable = access.pkru >> (2 * key + 1) & 1 != 0;
        match access.kind {
            AccessKind::Fetch => false,
            AccessKind::Read => access_disable,
            AccessKind::Write => {
                let obeys = self.wp || matches!(access.who, Who::User);
                access_disable || (write_disable && obeys)
            }
        }
    }

    /// Section "Access rights" without protection keys.
    const fn allowed(&self, rights: Rights, access: GuestAccess) -> bool {
        // "Explicit" accesses with AC set are the only ones that SMAP does not concern.
        let smap_forbids = self.smap && !matches!(access.who, Who::Kernel { ac: true });
        match (access.who, access.kind, rights.user) {
            // User-mode accesses to supervisor-mode addresses: never.
            (Who::User, _, false) => false,
            (Who::User, AccessKind::Read, true) => true,
            (Who::User, AccessKind::Write, true) => rights.writable,
            (Who::User, AccessKind::Fetch, true) => rights.executable,
            // Supervisor-mode accesses to supervisor-mode addresses.
            (_, AccessKind::Read, false) => true,
            (_, AccessKind::Write, false) => rights.writable || !self.wp,
            (_, AccessKind::Fetch, false) => rights.executable,
            // Supervisor-mode accesses to user-mode addresses.
            (_, AccessKind::Read, true) => !smap_forbids,
            (_, AccessKind::Write, true) => !smap_forbids && (rights.writable || !self.wp),
            (_, AccessKind::Fetch, true) => !self.smep && rights.executable,
        }
    }

    /// The error code bits that describe the access.
    pub(crate) const fn describes(&self, access: GuestAccess) -> u64 {
        let nx_counts = self.nxe && !matches!(self.mode, GuestMode::TwoLevel);
        let write = if matches!(access.kind, AccessKind::Write) { 1 << 1 } else { 0 };
        let user = if matches!(access.who, Who::User) { 1 << 2 } else { 0 };
        let fetch = matches!(access.kind, AccessKind::Fetch) && (nx_counts || self.smep);
        write | user | if fetch { 1 << 4 } else { 0 }
    }

    /// The error code of an access that reaches a page and may not use it; `None` if it may.
    pub(crate) const fn judge(
        &self,
        rights: Rights,
        leaf: u64,
        access: GuestAccess,
    ) -> Option<u64> {
        let key = self.key_forbids(rights, leaf, access);
        if !key && self.allowed(rights, access) {
            return None;
        }
        Some(P | self.describes(access) | if key { 1 << 5 } else { 0 })
    }

    /// The value of an entry that was used: accessed, and the mapping one dirty after a write.
    pub(crate) const fn used(entry: u64, maps: bool, access: GuestAccess) -> u64 {
        let write = matches!(access.kind, AccessKind::Write);
        entry | A | if maps && write { D } else { 0 }
    }

    /// Follow one access through the tables at `roots`.
    pub fn predict<M: GuestWords + ?Sized>(
        &self,
        mem: &M,
        roots: GuestRoots,
        address: u64,
        access: GuestAccess,
        trace: &mut Trace,
    ) -> Verdict {
        trace.clear();
        if !self.usable(address) {
            return Verdict::BadAddress;
        }
        if matches!(self.mode, GuestMode::Off) {
            return Verdict::Reaches { pa: address, level: 0, rights: Rights::EVERYTHING };
        }
        let describes = self.describes(access);
        let not_there = Verdict::PageFault { code: describes };
        let Some(mut table) = self.first_table(roots, address) else {
            return not_there;
        };
        let mut used = [(0, 0); 5];
        let mut rights = Rights::EVERYTHING;
        for level in (1..=self.first_level()).rev() {
            let at = self.place(level, table, address);
            trace.note_read(at);
            // What hardware reads where nothing is, is not defined; a hypervisor says not present.
            let Some(entry) = mem.word(at, self.entry_bytes()) else {
                return not_there;
            };
            let says = self.says(level, entry, address);
            used[usize::from(level) - 1] = (at, entry);
            rights = self.with(rights, entry);
            match says {
                Says::NotPresent => return not_there,
                Says::Reserved => return Verdict::PageFault { code: P | 1 << 3 | describes },
                Says::Table(next) => table = next,
                Says::Page(pa) => {
                    if let Some(code) = self.judge(rights, entry, access) {
                        return Verdict::PageFault { code };
                    }
                    for use_of in (level..=self.first_level()).rev() {
                        let (at, old) = used[usize::from(use_of) - 1];
                        let new = Self::used(old, use_of == level, access);
                        if new != old {
                            trace.note_write(at, new);
                        }
                    }
                    return Verdict::Reaches { pa, level, rights };
                }
            }
        }
        not_there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of four levels that has everything.
    fn machine(mode: GuestMode) -> GuestMachine {
        GuestMachine {
            mode,
            vendor: Vendor::Intel,
            max_phys_bits: 40,
            nxe: true,
            wp: true,
            smep: false,
            smap: false,
            pke: false,
            pse: true,
            pse36: true,
            gbpages: true,
        }
    }

    #[test]
    fn fields_are_those_of_the_manual() {
        assert_eq!(field(u64::MAX, 51, 12), 0x000f_ffff_ffff_f000);
        assert_eq!(field(u64::MAX, 63, 63), 1 << 63);
        assert_eq!(field(u64::MAX, 11, 12), 0);
        assert_eq!(field(0x1234, 63, 0), 0x1234);
    }

    #[test]
    fn a_four_megabyte_page_has_forty_address_bits_at_most() {
        let forty = machine(GuestMode::TwoLevel);
        // Bits 39:32 stand in 20:13.
        let entry = 0x8000_0000 | 0xab << 13 | PS | P;
        assert_eq!(forty.says(2, entry, 0x12_3456), Says::Page(0xab_8012_3456));
        assert_eq!(forty.says(2, entry | 1 << 21, 0), Says::Reserved);
        let narrow = GuestMachine { max_phys_bits: 36, ..forty };
        assert_eq!(narrow.says(2, entry, 0), Says::Reserved);
        assert_eq!(narrow.says(2, 0x8000_0000 | 0xf << 13 | PS | P, 0), Says::Page(0xf_8000_0000));
        let without = GuestMachine { pse36: false, ..forty };
        assert_eq!(without.says(2, 0x8000_2000 | PS | P, 0), Says::Reserved);
        let off = GuestMachine { pse: false, ..forty };
        assert_eq!(off.says(2, 0x8000_0000 | PS | P, 0), Says::Table(0x8000_0000));
    }

    #[test]
    fn the_vendors_differ_in_bit_8_and_nothing_else_here() {
        let intel = machine(GuestMode::FourLevel);
        let amd = GuestMachine { vendor: Vendor::Amd, ..intel };
        for level in 1..=4 {
            for bit in 0..64 {
                let entry = P | 1 << bit;
                let same = intel.says(level, entry, 0) == amd.says(level, entry, 0);
                assert_eq!(same, !(level == 4 && bit == 8), "level {level} bit {bit}");
            }
        }
    }
}
