//! A raw disk that boots a program: the boot sector that stands in a section of the program's
//! own, the command line, and the program as it is to stand in memory.
//!
//! The layout of the disk is the one that the boot sector in
//! examples/test_hypervisor/src/boot/disk.rs loads:
//!
//! | sector | holds |
//! |---|---|
//! | 0 | the boot sector |
//! | 1 | 256 bytes of command line, then words of 32 bits: see [`disk`] |
//! | 2.. | the program |

use std::fmt;

use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};
use object::{LittleEndian, read};

use super::elf::{Image, ImageError};

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

/// Why there is no disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DiskError {
    /// The file does not boot at all.
    Image(ImageError),
    /// There is no section with a boot sector.
    NoBootSector,
    /// The boot sector is not 512 bytes that end in 55 AA.
    BadBootSector { bytes: usize },
    /// What is loaded does not lie between 1 MiB and the largest program.
    Place { start: u64, end: u64 },
    /// The command line and its NUL do not fit.
    CommandLine { bytes: usize },
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error) => error.fmt(f),
            Self::NoBootSector => f.write_str("there is no section .bootsector"),
            Self::BadBootSector { bytes } => {
                write!(f, ".bootsector has {bytes} bytes, expected {SECTOR} that end in 55 AA")
            }
            Self::Place { start, end } => {
                write!(f, "a program at {start:#x} to {end:#x} does not lie where it can be loaded")
            }
            Self::CommandLine { bytes } => {
                write!(f, "the command line has {bytes} bytes, at most {}", COMMAND_LINE - 1)
            }
        }
    }
}

impl std::error::Error for DiskError {}

impl From<read::Error> for DiskError {
    fn from(error: read::Error) -> Self {
        Self::Image(ImageError::NotElf(error))
    }
}

/// The disk that boots the program in the ELF file `file` with `command_line`.
///
/// The words behind the command line: sectors of the program, its load address, start and size of
/// what is to be cleared, the entry.
///
/// # Errors
/// See [`DiskError`]; nothing is written anywhere.
pub(crate) fn disk(file: &[u8], command_line: &str) -> Result<Vec<u8>, DiskError> {
    if command_line.len() >= COMMAND_LINE {
        return Err(DiskError::CommandLine { bytes: command_line.len() });
    }
    let elf = Image::parse(file).map_err(DiskError::Image)?;
    let mut image = boot_sector(file)?.to_vec();
    let program = Program::new(&elf)?;
    image.extend(command_line.bytes());
    image.resize(SECTOR + COMMAND_LINE, 0);
    let sectors = program.bytes.len().div_ceil(SECTOR) as u32;
    let words = [sectors, program.load, program.clear_from, program.clear_bytes, elf.entry];
    image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    image.resize(2 * SECTOR, 0);
    image.extend(program.bytes);
    image.resize(image.len().next_multiple_of(CYLINDER), 0);
    Ok(image)
}

/// The section that holds the boot sector.
fn boot_sector(file: &[u8]) -> Result<&[u8], DiskError> {
    let header = FileHeader64::<LittleEndian>::parse(file)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, file)?;
    let (_, section) =
        sections.section_by_name(endian, BOOT_SECTION).ok_or(DiskError::NoBootSector)?;
    let sector = section.data(endian, file)?;
    let good = sector.len() == SECTOR && sector.ends_with(&[0x55, 0xaa]);
    if good { Ok(sector) } else { Err(DiskError::BadBootSector { bytes: sector.len() }) }
}

/// A program as it is to stand in memory, in the boot sector's numbers of 32 bits.
struct Program {
    load: u32,
    bytes: Vec<u8>,
    clear_from: u32,
    clear_bytes: u32,
}

impl Program {
    /// All that is loaded, laid out as in memory; what follows the last byte of the file is to be
    /// cleared.
    fn new(elf: &Image) -> Result<Self, DiskError> {
        let start = elf.segments.iter().map(|segment| segment.start).min().unwrap_or(0);
        let end = elf.segments.iter().map(|segment| segment.end).max().unwrap_or(0);
        if start < LOAD_FROM || end - start > SPAN_LIMIT || end > u64::from(u32::MAX) {
            return Err(DiskError::Place { start, end });
        }
        let mut bytes = Vec::new();
        for segment in &elf.segments {
            // Spans are below SPAN_LIMIT.
            let from = (segment.start - start) as usize;
            let to = from + segment.bytes.len();
            if bytes.len() < to {
                bytes.resize(to, 0);
            }
            bytes[from..to].copy_from_slice(&segment.bytes);
        }
        let clear_from = start + bytes.len() as u64;
        let clear_bytes = end - clear_from;
        let [load, clear_from, clear_bytes] = [start, clear_from, clear_bytes].map(|n| n as u32);
        Ok(Self { load, bytes, clear_from, clear_bytes })
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
        put(&mut file, programs, &4_u32.to_le_bytes());
        put(&mut file, programs + 8, &long(notes));
        put(&mut file, programs + 32, &long(note.len()));
        let load = programs + 56;
        put(&mut file, load, &1_u32.to_le_bytes());
        put(&mut file, load + 8, &long(code_at));
        put(&mut file, load + 24, &long(0x20_0000));
        put(&mut file, load + 32, &long(code.len()));
        put(&mut file, load + 40, &long(0x3000));
        put(&mut file, sections + 64 + 4, &3_u32.to_le_bytes());
        put(&mut file, sections + 64 + 24, &long(names));
        put(&mut file, sections + 64 + 32, &long(13));
        put(&mut file, names, b"\0.bootsector\0");
        put(&mut file, code_at, code);
        if let Some(boot) = boot {
            put(&mut file, sections + 128, &[1, 0, 0, 0, 1]);
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
        assert!(matches!(refused(b"MZ", ""), DiskError::Image(ImageError::NotElf(_))));
        assert_eq!(refused(&good, &"x".repeat(256)), DiskError::CommandLine { bytes: 256 });
        assert_eq!(refused(&elf(&[1; 64], 0, None), ""), DiskError::NoBootSector);
        let short = elf(&[1; 64], 0, Some(&[0x55, 0xaa]));
        assert_eq!(refused(&short, ""), DiskError::BadBootSector { bytes: 2 });
        let mut low = good.clone();
        low[0x80 + 56 + 24..][..8].copy_from_slice(&0x7000_u64.to_le_bytes());
        assert_eq!(refused(&low, ""), DiskError::Place { start: 0x7000, end: 0xa000 });
        let mut noteless = good.clone();
        noteless[0x80] = 9;
        assert_eq!(refused(&noteless, ""), DiskError::Image(ImageError::NoEntry));
        let mut empty = good.clone();
        empty[0x80 + 56] = 9;
        assert_eq!(refused(&empty, ""), DiskError::Image(ImageError::NothingToLoad));
        let mut more = good.clone();
        more[0x80 + 56 + 40] = 1;
        more[0x80 + 56 + 41] = 0;
        assert!(matches!(refused(&more, ""), DiskError::Image(ImageError::Place { .. })));
        // Cut anywhere it is refused or, where only padding is lost, the same disk.
        let whole = disk(&good, "").unwrap();
        for length in 0..good.len() {
            let cut = disk(&good[..length], "");
            assert!(cut.is_err() || cut == Ok(whole.clone()), "cut at {length}");
        }
    }
}
