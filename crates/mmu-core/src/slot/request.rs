//! What a caller asks of a slot ([`SlotRequest`]) and every way to be refused ([`SlotError`]).
//!
//! Plain values. The checks are in `rules`; what carries the change out also reports through
//! [`SlotError`], so a caller meets one error type for the whole operation.

use core::fmt;

use crate::addr::{Gfn, GfnRange, Gpa, Hva};
use crate::slot::{Memslot, SlotFlags};

/// A change that a caller wants. Nothing in it is trusted.
#[doc(alias = "kvm_userspace_memory_region")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRequest {
    /// Address space.
    pub as_id: u16,
    /// Slot number within the address space.
    pub id: u16,
    /// First guest byte; page aligned.
    pub base: Gpa,
    /// Length in bytes; page aligned. 0 deletes the slot.
    pub bytes: u64,
    /// Host address of the first byte; page aligned.
    pub hva: Hva,
    /// Flags; only those in [`SlotFlags::CALLER`].
    pub flags: SlotFlags,
}

/// Why a slot was not changed. Nothing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotError {
    /// A flag that is not defined.
    UnknownFlags {
        /// The undefined bits.
        bits: u32,
    },
    /// A flag that only the publisher may set.
    InternalFlag {
        /// The internal flags that were given.
        flags: SlotFlags,
    },
    /// The length is not a multiple of 4 KiB.
    SizeUnaligned {
        /// Length given.
        bytes: u64,
    },
    /// The guest address is not a multiple of 4 KiB.
    GpaUnaligned {
        /// Address given.
        base: Gpa,
    },
    /// The host address is not a multiple of 4 KiB.
    HvaUnaligned {
        /// Address given.
        hva: Hva,
    },
    /// The host address is not canonical: it has a tag, or lies in the hole between the halves.
    HvaNotCanonical {
        /// Address given.
        hva: Hva,
        /// Width of a canonical address, sign bit included.
        bits: u32,
    },
    /// The host range wraps, or leaves the canonical half that it starts in.
    HvaWraps {
        /// First byte.
        hva: Hva,
        /// Length.
        bytes: u64,
    },
    /// No such address space.
    AsIdOutOfRange {
        /// Address space given.
        as_id: u16,
        /// Number of address spaces; valid ids are below.
        limit: u16,
    },
    /// The slot number is too large.
    IdOutOfRange {
        /// Slot number given.
        id: u16,
        /// Slots per address space; valid numbers are below.
        limit: u16,
    },
    /// The guest range wraps.
    GpaWraps {
        /// First byte.
        base: Gpa,
        /// Length.
        bytes: u64,
    },
    /// The slot would be longer than a slot may be.
    TooManyPages {
        /// Length asked for, in pages.
        pages: u64,
        /// Longest slot, in pages.
        limit: u64,
    },
    /// All slots together would have more pages than the VM may have.
    TotalPages {
        /// Pages in all slots now.
        current: u64,
        /// Pages that the new slot would add.
        added: u64,
        /// Most pages that the VM may have.
        limit: u64,
    },
    /// Another slot of the address space has some of the pages.
    Overlap {
        /// Address space.
        as_id: u16,
        /// The slot that was to be created or moved.
        id: u16,
        /// The slot that has the pages.
        other: u16,
        /// Pages of the other slot.
        taken: GfnRange,
    },
    /// The range ends above what guest physical addresses can name.
    AboveMaxGfn {
        /// Last page asked for.
        last: Gfn,
        /// Limit; valid pages are below.
        limit: Gfn,
    },
    /// There is no such slot to delete or to change.
    NoSuchSlot {
        /// Address space.
        as_id: u16,
        /// Slot number.
        id: u16,
    },
    /// An existing slot cannot change its length.
    SizeChanged {
        /// Length now, in pages.
        old_pages: u64,
        /// Length asked for, in pages.
        new_pages: u64,
    },
    /// An existing slot cannot change its host address.
    HvaChanged {
        /// Address now.
        old: Hva,
        /// Address asked for.
        new: Hva,
    },
    /// An existing slot cannot become read-only or stop being so.
    ReadOnlyToggled {
        /// Flags now.
        old: SlotFlags,
        /// Flags asked for.
        new: SlotFlags,
    },
    /// Memory for the new set could not be had.
    NoMemory {
        /// Slots that one address space was to have room for.
        slots: u64,
    },
    /// Memory for the dirty log could not be had.
    NoMemoryForLog {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The slot has no such pages to log, or none were named.
    LogRange {
        /// First page asked for.
        start: u64,
        /// First page not asked for.
        end: u64,
        /// Pages of the slot.
        pages: u64,
    },
    /// Another change of the same slot is under way.
    Busy {
        /// Address space.
        as_id: u16,
        /// Slot number.
        id: u16,
    },
    /// A slot handed to a set directly breaks what a [`Memslot`] promises: it has no pages, wraps,
    /// or its host address is unaligned.
    Malformed {
        /// The slot.
        slot: Memslot,
    },
    /// A slot handed to a set directly has a number that is taken.
    IdTaken {
        /// Address space.
        as_id: u16,
        /// Slot number.
        id: u16,
    },
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownFlags { bits } => write!(f, "unknown slot flags {bits:#x}"),
            Self::InternalFlag { flags } => {
                write!(f, "slot flags {:#x} are internal", flags.bits())
            }
            Self::SizeUnaligned { bytes } => write!(f, "size {bytes:#x} is not page aligned"),
            Self::GpaUnaligned { base } => write!(f, "guest address {base} is not page aligned"),
            Self::HvaUnaligned { hva } => write!(f, "host address {hva} is not page aligned"),
            Self::HvaNotCanonical { hva, bits } => {
                write!(f, "host address {hva} is not canonical in {bits} bits")
            }
            Self::HvaWraps { hva, bytes } => {
                write!(f, "{bytes:#x} bytes from host address {hva} leave the address space")
            }
            Self::AsIdOutOfRange { as_id, limit } => {
                write!(f, "address space {as_id} is not below {limit}")
            }
            Self::IdOutOfRange { id, limit } => write!(f, "slot {id} is not below {limit}"),
            Self::GpaWraps { base, bytes } => {
                write!(f, "{bytes:#x} bytes from guest address {base} wrap")
            }
            Self::TooManyPages { pages, limit } => {
                write!(f, "{pages} pages are more than the {limit} of a slot")
            }
            Self::TotalPages { current, added, limit } => {
                write!(f, "{current} + {added} pages are more than the {limit} of a VM")
            }
            Self::Overlap { as_id, id, other, taken } => {
                write!(f, "slot {as_id}:{id} overlaps slot {as_id}:{other} at {taken}")
            }
            Self::AboveMaxGfn { last, limit } => write!(f, "gfn {last} is not below {limit}"),
            Self::NoSuchSlot { as_id, id } => write!(f, "there is no slot {as_id}:{id}"),
            Self::SizeChanged { old_pages, new_pages } => {
                write!(f, "the slot has {old_pages} pages and cannot have {new_pages}")
            }
            Self::HvaChanged { old, new } => {
                write!(f, "the slot is at host address {old} and cannot be at {new}")
            }
            Self::ReadOnlyToggled { old, new } => write!(
                f,
                "the slot has flags {:#x} and cannot have {:#x}: read-only is fixed",
                old.bits(),
                new.bits()
            ),
            Self::NoMemory { slots } => write!(f, "no memory for a set of {slots} slots"),
            Self::NoMemoryForLog { bytes } => {
                write!(f, "no memory for a dirty log of {bytes} bytes")
            }
            Self::LogRange { start, end, pages } => {
                write!(f, "pages {start}..{end} of a slot of {pages} pages cannot be logged")
            }
            Self::Busy { as_id, id } => write!(f, "slot {as_id}:{id} is being changed"),
            Self::Malformed { ref slot } => write!(
                f,
                "slot {}:{} of {} pages at gfn {}, host address {} cannot exist",
                slot.as_id, slot.id, slot.npages, slot.base_gfn, slot.hva
            ),
            Self::IdTaken { as_id, id } => write!(f, "slot {as_id}:{id} exists already"),
        }
    }
}

impl core::error::Error for SlotError {}
