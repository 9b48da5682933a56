//! A program that boots by PVH: an ELF file with a note that tells its 32-bit entry.

use std::fmt;

use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, read};

type Header = FileHeader64<LittleEndian>;

/// Note "Xen" 18 holds the physical address of the 32-bit entry.
const NOTE_OWNER: &[u8] = b"Xen";
const NOTE_ENTRY: elf::NoteType = elf::NoteType(18);

/// Bytes that stand at a physical address; what follows them up to `end` is zero.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub start: u64,
    /// What stands there.
    pub bytes: Vec<u8>,
    /// One past the last byte, zeroes included.
    pub end: u64,
}

/// A program as it is to stand in memory.
#[derive(Debug)]
pub struct Image {
    /// All that is loaded.
    pub segments: Vec<Segment>,
    /// Where a CPU starts, in protected mode without paging.
    pub entry: u32,
}

/// Why a file does not boot.
#[derive(Debug, PartialEq, Eq)]
pub enum ImageError {
    /// It is no ELF64 file, or its tables lie outside it.
    NotElf(read::Error),
    /// A segment lies outside the file.
    Truncated { start: u64 },
    /// There is no PVH note.
    NoEntry,
    /// Nothing is to be loaded.
    NothingToLoad,
    /// A segment ends beyond the largest address, or before what the file holds of it.
    Place { start: u64, bytes: u64 },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf(why) => write!(f, "not a program for this boot: {why}"),
            Self::Truncated { start } => {
                write!(f, "the segment for {start:#x} lies outside the file")
            }
            Self::NoEntry => f.write_str("there is no PVH note that tells the 32-bit entry"),
            Self::NothingToLoad => f.write_str("there is nothing to load"),
            Self::Place { start, bytes } => {
                write!(f, "a segment at {start:#x} cannot have {bytes:#x} bytes")
            }
        }
    }
}

impl std::error::Error for ImageError {}

impl From<read::Error> for ImageError {
    fn from(error: read::Error) -> Self {
        Self::NotElf(error)
    }
}

impl Image {
    /// The program in `file`.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn parse(file: &[u8]) -> Result<Self, ImageError> {
        let header = Header::parse(file)?;
        let endian = header.endian()?;
        let mut segments = Vec::new();
        let mut entry = None;
        for program in header.program_headers(endian, file)? {
            if program.p_type(endian) == elf::PT_LOAD && program.p_memsz(endian) > 0 {
                let (start, bytes) = (program.p_paddr(endian), program.p_memsz(endian));
                let end = start.checked_add(bytes).ok_or(ImageError::Place { start, bytes })?;
                let data = program.data(endian, file);
                let data = data.map_err(|()| ImageError::Truncated { start })?;
                if data.len() as u64 > bytes {
                    return Err(ImageError::Place { start, bytes });
                }
                segments.push(Segment { start, bytes: data.to_vec(), end });
            }
            let Some(mut notes) = program.notes(endian, file)? else { continue };
            while let Some(note) = notes.next()? {
                let ours = note.name() == NOTE_OWNER && note.n_type(endian) == NOTE_ENTRY;
                let word = note.desc().get(..4).and_then(|word| word.try_into().ok());
                if let Some(word) = word.filter(|_| ours) {
                    entry = Some(u32::from_le_bytes(word));
                }
            }
        }
        if segments.is_empty() {
            return Err(ImageError::NothingToLoad);
        }
        Ok(Self { segments, entry: entry.ok_or(ImageError::NoEntry)? })
    }
}
