//! A raw disk that boots a program: the boot sector that stands in a section of the program's
//! own, the command line, and the program as it is to stand in memory.
//!
//! Reads ELF64 files, little endian. The layout of the disk is the one that the boot sector in
//! examples/test_hypervisor/src/boot/disk.rs loads:
//!
//! | sector | holds |
//! |---|---|
//! | 0 | the boot sector |
//! | 1 | 256 bytes of command line, then words of 32 bits: see [`disk`] |
//! | 2.. | the program |

use std::fmt;
use std::ops::Range;

const SECTOR: usize = 512;
/// The section that holds the boot sector.
const BOOT_SECTION: &[u8] = b".bootsector";
/// Bytes of the command line, its NUL included.
const COMMAND_LINE: usize = 256;
/// Firmware counts in cylinders of 16 heads and 63 sectors, and expects whole ones.
const CYLINDER: usize = 16 * 63 * SECTOR;
/// The program is loaded above the first MiB, where the boot sector's buffers are, and what it
/// spans is copied sector by sector: this much is surely a mistake.
const LOAD_FROM: u64 = 1 << 20;
const SPAN_LIMIT: u64 = 256 << 20;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note "Xen" 18: the physical address of the 32-bit entry (PVH).
const NOTE_OWNER: &[u8] = b"Xen\0";
const NOTE_ENTRY: u32 = 18;

/// Why there is no disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ImageError {
    /// Not an ELF64 file, little endian.
    NotElf,
    /// What is named lies outside the file.
    Truncated(&'static str),
    /// There is no section with a boot sector.
    NoBootSector,
    /// The boot sector is not 512 bytes that end in 55 AA.
    BadBootSector { bytes: usize },
    /// There is no note that tells the 32-bit entry.
    NoEntry,
    /// Nothing is to be loaded.
    NothingToLoad,
    /// A segment does not lie between 1 MiB and the largest program.
    Place { start: u64, end: u64 },
    /// The command line and its NUL do not fit.
    CommandLine { bytes: usize },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf => f.write_str("not an ELF64 file, little endian"),
            Self::Truncated(what) => write!(f, "the {what} lies outside the file"),
            Self::NoBootSector => f.write_str("there is no section .bootsector"),
            Self::BadBootSector { bytes } => {
                write!(f, ".bootsector has {bytes} bytes, expected {SECTOR} that end in 55 AA")
            }
            Self::NoEntry => f.write_str("there is no PVH note that tells the 32-bit entry"),
            Self::NothingToLoad => f.write_str("there is nothing to load"),
            Self::Place { start, end } => {
                write!(f, "a segment at {start:#x} to {end:#x} does not lie where it can be loaded")
            }
            Self::CommandLine { bytes } => {
                write!(f, "the command line has {bytes} bytes, at most {}", COMMAND_LINE - 1)
            }
        }
    }
}

impl std::error::Error for ImageError {}

/// The disk that boots the program `elf` with `command_line`.
///
/// The words behind the command line: sectors of the program, its load address, start and size of
/// what is to be cleared, the entry.
///
/// # Errors
/// See [`ImageError`]; nothing is written anywhere.
pub(crate) fn disk(elf: &[u8], command_line: &str) -> Result<Vec<u8>, ImageError> {
    if command_line.len() >= COMMAND_LINE {
        return Err(ImageError::CommandLine { bytes: command_line.len() });
    }
    let elf = Elf::new(elf)?;
    let mut image = elf.boot_sector()?.to_vec();
    let program = elf.program()?;
    let sectors = program.bytes.len().div_ceil(SECTOR);
    image.extend(command_line.bytes());
    image.resize(SECTOR + COMMAND_LINE, 0);
    let words =
        [number(sectors)?, program.load, program.clear_from, program.clear_bytes, elf.entry()?];
    image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    image.resize(2 * SECTOR, 0);
    image.extend(program.bytes);
    image.resize(image.len().next_multiple_of(CYLINDER), 0);
    Ok(image)
}

/// A size or address that the boot sector's 32-bit words can hold.
fn number<T: TryInto<u32>>(value: T) -> Result<u32, ImageError> {
    value.try_into().map_err(|_| ImageError::Truncated("program"))
}

/// A program as it is to stand in memory.
struct Program {
    load: u32,
    bytes: Vec<u8>,
    clear_from: u32,
    clear_bytes: u32,
}

/// One program header.
struct Segment {
    kind: u32,
    /// In the file.
    file: Range<usize>,
    /// Physical addresses.
    memory: Range<u64>,
}

struct Elf<'a>(&'a [u8]);

impl<'a> Elf<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let elf = Self(bytes);
        // Magic, 64 bits, little endian.
        if bytes.get(..6) == Some(b"\x7fELF\x02\x01") { Ok(elf) } else { Err(ImageError::NotElf) }
    }

    fn bytes(&self, at: usize, size: usize, what: &'static str) -> Result<&'a [u8], ImageError> {
        let end = at.checked_add(size);
        end.and_then(|end| self.0.get(at..end)).ok_or(ImageError::Truncated(what))
    }

    /// The little endian number of `size` bytes at `at`.
    fn field(&self, at: usize, size: usize, what: &'static str) -> Result<u64, ImageError> {
        let bytes = self.bytes(at, size, what)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn index(&self, at: usize, size: usize, what: &'static str) -> Result<usize, ImageError> {
        usize::try_from(self.field(at, size, what)?).map_err(|_| ImageError::Truncated(what))
    }

    /// Where the headers of a table start that is described by the file header's fields.
    fn headers(
        &self,
        [table, size, count]: [usize; 3],
        what: &'static str,
    ) -> Result<impl Iterator<Item = usize> + use<>, ImageError> {
        let start = self.index(table, 8, what)?;
        let size = self.index(size, 2, what)?;
        let count = self.index(count, 2, what)?;
        self.bytes(start, size * count, what)?;
        Ok((0..count).map(move |index| start + index * size))
    }

    fn segments(&self) -> Result<Vec<Segment>, ImageError> {
        const WHAT: &str = "program header";
        let mut segments = Vec::new();
        for header in self.headers([32, 54, 56], WHAT)? {
            let offset = self.index(header + 8, 8, WHAT)?;
            let in_file = self.index(header + 32, 8, WHAT)?;
            self.bytes(offset, in_file, "segment")?;
            let start = self.field(header + 24, 8, WHAT)?;
            let end = start.checked_add(self.field(header + 40, 8, WHAT)?);
            segments.push(Segment {
                kind: number(self.field(header, 4, WHAT)?)?,
                file: offset..offset + in_file,
                memory: start..end.ok_or(ImageError::Place { start, end: u64::MAX })?,
            });
        }
        Ok(segments)
    }

    fn boot_sector(&self) -> Result<&'a [u8], ImageError> {
        const WHAT: &str = "section header";
        let headers: Vec<usize> = self.headers([40, 58, 60], WHAT)?.collect();
        let names = headers.get(self.index(62, 2, WHAT)?).ok_or(ImageError::NoBootSector)?;
        let names = self.index(names + 24, 8, WHAT)?;
        for header in headers {
            let name = names.saturating_add(self.index(header, 4, WHAT)?);
            let name = self.0.get(name..).unwrap_or_default();
            if name.split(|byte| *byte == 0).next() != Some(BOOT_SECTION) {
                continue;
            }
            let bytes = self.index(header + 32, 8, WHAT)?;
            let sector = self.bytes(self.index(header + 24, 8, WHAT)?, bytes, "boot sector")?;
            let good = bytes == SECTOR && sector.ends_with(&[0x55, 0xaa]);
            return if good { Ok(sector) } else { Err(ImageError::BadBootSector { bytes }) };
        }
        Err(ImageError::NoBootSector)
    }

    /// All that is loaded, laid out as in memory; what follows the last byte of the file is to be
    /// cleared.
    fn program(&self) -> Result<Program, ImageError> {
        let mut loaded = self.segments()?;
        loaded.retain(|segment| segment.kind == PT_LOAD && !segment.memory.is_empty());
        let start = loaded.iter().map(|segment| segment.memory.start).min();
        let end = loaded.iter().map(|segment| segment.memory.end).max();
        let (Some(start), Some(end)) = (start, end) else { return Err(ImageError::NothingToLoad) };
        if start < LOAD_FROM || end - start > SPAN_LIMIT {
            return Err(ImageError::Place { start, end });
        }
        let mut bytes = Vec::new();
        for Segment { file, memory, .. } in loaded {
            let outside = ImageError::Place { start: memory.start, end: memory.end };
            let from = usize::try_from(memory.start - start).map_err(|_| outside)?;
            let to = from + file.len();
            if bytes.len() < to {
                bytes.resize(to, 0);
            }
            bytes[from..to].copy_from_slice(&self.0[file]);
        }
        let load = number(start)?;
        let clear_from = number(start + u64::from(number(bytes.len())?))?;
        let clear_bytes = number(end.saturating_sub(u64::from(clear_from)))?;
        Ok(Program { load, bytes, clear_from, clear_bytes })
    }

    /// What the PVH note says.
    fn entry(&self) -> Result<u32, ImageError> {
        const WHAT: &str = "note";
        let notes = self.segments()?.into_iter().filter(|segment| segment.kind == PT_NOTE);
        for Segment { file, .. } in notes {
            let mut at = file.start;
            while at + 12 <= file.end {
                let owner = self.index(at, 4, WHAT)?;
                let size = self.index(at + 4, 4, WHAT)?;
                let kind = self.field(at + 8, 4, WHAT)?;
                let value = (at + 12 + owner).next_multiple_of(4);
                let ours = self.bytes(at + 12, owner, WHAT)? == NOTE_OWNER;
                if ours && kind == u64::from(NOTE_ENTRY) && matches!(size, 4 | 8) {
                    return number(self.field(value, size, WHAT)?);
                }
                at = value.saturating_add(size).saturating_add(3) & !3;
            }
        }
        Err(ImageError::NoEntry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF64 file with one loaded segment of `code` at 2 MiB that spans 3 pages, a PVH note
    /// that says `entry`, and the sections that `boot` asks for.
    fn elf(code: &[u8], entry: u32, boot: Option<&[u8]>) -> Vec<u8> {
        let (notes, programs, sections) = (0x40_usize, 0x80, 0x100);
        let (names, code_at, boot_at) = (0x200_usize, 0x400, 0x400 + code.len());
        let mut file = vec![0_u8; boot_at];
        let put = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            if file.len() < at + bytes.len() {
                file.resize(at + bytes.len(), 0);
            }
            file[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let long = |value: usize| (value as u64).to_le_bytes();
        put(&mut file, 0, b"\x7fELF\x02\x01\x01");
        put(&mut file, 32, &long(programs));
        put(&mut file, 40, &long(sections));
        put(&mut file, 54, &[56, 0, 2, 0, 64, 0, if boot.is_some() { 3 } else { 2 }, 0, 1, 0]);
        // An entry of somebody else comes first.
        let mut note = vec![4, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0];
        note.extend(b"GNU\0\x07\0\0\0");
        note.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
        put(&mut file, notes, &note);
        put(&mut file, programs, &PT_NOTE.to_le_bytes());
        put(&mut file, programs + 8, &long(notes));
        put(&mut file, programs + 32, &long(note.len()));
        let load = programs + 56;
        put(&mut file, load, &PT_LOAD.to_le_bytes());
        put(&mut file, load + 8, &long(code_at));
        put(&mut file, load + 24, &long(0x20_0000));
        put(&mut file, load + 32, &long(code.len()));
        put(&mut file, load + 40, &long(0x3000));
        put(&mut file, sections + 64 + 24, &long(names));
        put(&mut file, names, b"\0.bootsector\0");
        put(&mut file, code_at, code);
        if let Some(boot) = boot {
            put(&mut file, sections + 128, &1_u32.to_le_bytes());
            put(&mut file, sections + 128 + 24, &long(boot_at));
            put(&mut file, sections + 128 + 32, &long(boot.len()));
            put(&mut file, boot_at, boot);
        }
        file
    }

    fn sector() -> Vec<u8> {
        let mut sector = vec![0x90; 510];
        sector.extend([0x55, 0xaa]);
        sector
    }

    fn word(image: &[u8], index: usize) -> u32 {
        let at = SECTOR + COMMAND_LINE + 4 * index;
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn a_disk_holds_what_the_boot_sector_looks_for() {
        let code = vec![0xab; 0x1234];
        let image = disk(&elf(&code, 0x20_0010, Some(&sector())), "cpus=2").unwrap();
        assert_eq!(image.len() % CYLINDER, 0);
        assert_eq!(image[..SECTOR], sector());
        assert!(image[SECTOR..].starts_with(b"cpus=2\0"));
        assert_eq!(word(&image, 0), 10, "sectors, the last one begun");
        assert_eq!(word(&image, 1), 0x20_0000, "load address");
        assert_eq!(word(&image, 2), 0x20_1234, "clear from");
        assert_eq!(word(&image, 3), 0x3000 - 0x1234, "bytes to clear");
        assert_eq!(word(&image, 4), 0x20_0010, "entry");
        assert_eq!(image[2 * SECTOR..2 * SECTOR + code.len()], code);
        assert!(image[2 * SECTOR + code.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_cannot_boot_is_refused_by_name() {
        let good = elf(&[1; 64], 0x20_0000, Some(&sector()));
        let refused = |elf: &[u8], line: &str| disk(elf, line).unwrap_err();
        assert_eq!(refused(b"MZ", ""), ImageError::NotElf);
        assert_eq!(refused(&good, &"x".repeat(256)), ImageError::CommandLine { bytes: 256 });
        assert_eq!(refused(&elf(&[1; 64], 0, None), ""), ImageError::NoBootSector);
        let short = elf(&[1; 64], 0, Some(&[0x55, 0xaa]));
        assert_eq!(refused(&short, ""), ImageError::BadBootSector { bytes: 2 });
        let mut low = good.clone();
        low[0x80 + 56 + 24..][..8].copy_from_slice(&0x7000_u64.to_le_bytes());
        assert_eq!(refused(&low, ""), ImageError::Place { start: 0x7000, end: 0xa000 });
        let mut noteless = good.clone();
        noteless[0x80] = 9;
        assert_eq!(refused(&noteless, ""), ImageError::NoEntry);
        let mut empty = good.clone();
        empty[0x80 + 56] = 9;
        assert_eq!(refused(&empty, ""), ImageError::NothingToLoad);
        // Cut anywhere it is refused or, where only padding is lost, the same disk.
        let whole = disk(&good, "").unwrap();
        for length in 0..good.len() {
            let cut = disk(&good[..length], "");
            assert!(cut.is_err() || cut == Ok(whole.clone()), "cut at {length}");
        }
    }
}
