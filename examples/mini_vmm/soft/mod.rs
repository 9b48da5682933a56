//! The software machine: vCPUs whose page walker, TLB and paging-structure cache are the model's.
//!
//! [`SoftMachine`] owns the memory and one [`Core`] per vCPU. A vCPU executes a chunk of its
//! program with its core locked; a flush locks one core after the other and forgets exactly what
//! it was told to. So a flush is complete when it returns, and one that was forgotten shows: the
//! caches never evict unless [`SoftMachine::with_caches`] bounds them.
//!
//! Locks: a core's gate, then its processor; with `everything`, the processors in order of id.

mod vcpu;

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mmu_model::{Caches, Format, MappedMem, Mode, SoftCpu};

use super::machine::{Flush, Layout, Machine, MachineError, MemFd, Memory, PAGE, Vcpu};
use vcpu::SoftVcpu;

/// One vCPU's processor.
#[derive(Debug)]
struct Core {
    /// Held while waiting for `cpu`. Without it a vCPU that unlocks and locks again for its next
    /// chunk would nearly always win against a flush that waits.
    gate: Mutex<()>,
    cpu: Mutex<SoftCpu>,
    /// Its vCPU was handed out.
    taken: AtomicBool,
}

impl Core {
    /// The processor, while its vCPU is between two chunks.
    fn lock(&self) -> MutexGuard<'_, SoftCpu> {
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        // A panic while it was locked leaves caches that are at worst stale; the tables decide.
        self.cpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory begins at a multiple of this: then a slot's host and guest addresses agree in the bits
/// that a 2 MiB page needs them to.
const ALIGN: usize = 2 << 20;

/// Shared memory, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    memory: Memory,
    /// What was mapped: from here so many bytes, which are the file's.
    mapped: (*mut u8, usize),
    file: MemFd,
}

// SAFETY: a mapping belongs to the process, not to a thread; its bytes are accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(pages: u64) -> Result<Self, MachineError> {
        let bytes = pages.checked_mul(PAGE).filter(|&bytes| bytes != 0);
        let fitting =
            bytes.and_then(|bytes| Some((bytes, usize::try_from(bytes).ok()?.checked_add(ALIGN)?)));
        let (bytes, len) = fitting.ok_or_else(|| MachineError::Unsupported {
            detail: format!("a memory of {pages} pages"),
        })?;
        let file = MemFd::new(len as u64)?;
        // SAFETY: a new mapping at a place the kernel chooses touches no memory that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(MachineError::System { call: "mmap", source: io::Error::last_os_error() });
        }
        // Fewer page faults of the host. Where it does not help it does not matter.
        // SAFETY: `base..base + len` was mapped above; the advice does not change its contents.
        let _ = unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        let start: *mut u8 = base.cast();
        let aligned = start.wrapping_add(start.align_offset(ALIGN));
        let memory = Memory { base: aligned, len: bytes };
        Ok(Self { memory, mapped: (start, len), file })
    }

    /// Gives the host memory of these pages back; those beyond the memory are ignored.
    fn give_back(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        let end = pages.end.min(self.memory.len / PAGE);
        if pages.start >= end {
            return Ok(());
        }
        // The file begins where the mapping does, a little before the memory.
        let before = self.memory.base as u64 - self.mapped.0 as u64;
        self.file.give_back(before + pages.start * PAGE..before + end * PAGE)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (start, len) = self.mapped;
        // SAFETY: mapped in `new` with this length and not unmapped since. Those who copied the
        // address know that it is valid as long as the machine lives (`Memory::base`), and the
        // vCPUs keep `Shared`, hence this, alive.
        let _ = unsafe { libc::munmap(start.cast(), len) };
    }
}

/// What the machine and its vCPUs share.
#[derive(Debug)]
struct Shared {
    format: Format,
    cores: Box<[Core]>,
    /// How often `kick_all` was called.
    kicks: AtomicU64,
    /// A window on `mapping`; declared before it, so dropped before it.
    mem: MappedMem,
    mapping: Mapping,
}

/// A machine made of software.
#[derive(Debug)]
pub struct SoftMachine {
    shared: Arc<Shared>,
}

impl SoftMachine {
    /// A machine of `vcpus` vCPUs that walk tables of `format`, with caches that never evict.
    ///
    /// # Errors
    ///
    /// [`MachineError::Unsupported`] for a layout without pages, [`MachineError::System`] if the
    /// host has no memory.
    pub fn new(layout: &Layout, vcpus: u32, format: Format) -> Result<Self, MachineError> {
        Self::with_caches(layout, vcpus, format, Caches::unlimited())
    }

    /// The same with caches of the given sizes. Each vCPU evicts by a seed of its own.
    ///
    /// # Errors
    ///
    /// As for [`SoftMachine::new`].
    pub fn with_caches(
        layout: &Layout,
        vcpus: u32,
        format: Format,
        caches: Caches,
    ) -> Result<Self, MachineError> {
        let ends = [layout.stub.end, layout.tables.end, layout.data.end];
        let mapping = Mapping::new(ends.into_iter().max().unwrap_or(0))?;
        let Memory { base, len } = mapping.memory;
        // SAFETY: clause 1: the mapping is `len` bytes at the page-aligned `base` and outlives the
        // window, which `Shared` drops first. Clause 2: `Memory` is only accessed atomically, by
        // its contract, and vCPUs go through the window.
        let mem = unsafe { MappedMem::new(base, len) };
        let core = |id: u32| {
            let seed = caches.seed.wrapping_add(u64::from(id) << 32);
            Core {
                gate: Mutex::new(()),
                cpu: Mutex::new(SoftCpu::new(&format, 0, Caches { seed, ..caches })),
                taken: AtomicBool::new(false),
            }
        };
        let shared = Arc::new(Shared {
            format,
            cores: (0..vcpus).map(core).collect(),
            kicks: AtomicU64::new(0),
            mem,
            mapping,
        });
        Ok(Self { shared })
    }
}

impl SoftMachine {
    /// Have the CPUs log the pages that they dirty, for [`Vcpu::take_log`].
    pub fn log_dirtied(&self) {
        self.shared.cores.iter().for_each(|core| core.lock().log_dirtied());
    }

    /// Use the caches of vCPU `id`, which has no other owner, to access memory: no flush comes in
    /// between.
    pub fn with_cpu<R>(
        &self,
        id: u32,
        work: impl FnOnce(&mut SoftCpu, &MappedMem) -> R,
    ) -> Result<R, MachineError> {
        let index = usize::try_from(id).ok();
        let core = index.and_then(|index| self.shared.cores.get(index));
        let core = core.ok_or_else(|| MachineError::Unsupported {
            detail: format!("vCPU {id}: there are {}", self.shared.cores.len()),
        })?;
        Ok(work(&mut core.lock(), &self.shared.mem))
    }
}

impl Machine for SoftMachine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn description(&self) -> String {
        let tables = match self.shared.format {
            Format::Ept(ept) => {
                let flags = if ept.accessed_dirty { "with" } else { "without" };
                format!("{}-level EPT {flags} accessed and dirty flags", ept.levels)
            }
            Format::Npt(npt) => format!("{}-level NPT", npt.levels),
            Format::Legacy(legacy) => match legacy.mode {
                Mode::Pae => "PAE tables".to_owned(),
                Mode::Long4 => "4-level long-mode tables".to_owned(),
                Mode::Long5 => "5-level long-mode tables".to_owned(),
            },
        };
        let vcpus = self.shared.cores.len();
        format!(
            "{vcpus} software CPUs walk {tables}; a flush forgets the TLB entries of the pages and \
             the paging-structure cache entries of the tables it names"
        )
    }

    fn memory(&self) -> Memory {
        self.shared.mapping.memory
    }

    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, MachineError> {
        let core = usize::try_from(id).ok().and_then(|index| self.shared.cores.get(index));
        // ORDERING[soft-taken]: Relaxed. Only who came first matters; the core was built before
        // the machine was shared.
        let free = core.is_some_and(|core| !core.taken.swap(true, Ordering::Relaxed));
        if !free {
            let vcpus = self.shared.cores.len();
            return Err(MachineError::Unsupported {
                detail: format!("vCPU {id}: there are {vcpus}, each to be created once"),
            });
        }
        Ok(Box::new(SoftVcpu::new(Arc::clone(&self.shared), id)))
    }

    fn flush(&self, flush: &Flush<'_>) -> Result<(), MachineError> {
        if flush.everything {
            // All at the same time: no vCPU is in its guest while this lasts.
            let cores = self.shared.cores.iter();
            let mut locked: Vec<_> = cores.map(Core::lock).collect();
            locked.iter_mut().for_each(|cpu| cpu.flush_all());
            return Ok(());
        }
        if flush.gfns.is_empty() && flush.tables.is_empty() {
            return Ok(());
        }
        let tables: Vec<u64> = flush.tables.iter().map(|page| page << 12).collect();
        for core in &self.shared.cores {
            let mut cpu = core.lock();
            for gfns in flush.gfns {
                cpu.flush_pages(gfns.clone());
                cpu.flush_upper(gfns.clone());
            }
            cpu.flush_tables(&tables);
        }
        Ok(())
    }

    fn kick_all(&self) {
        // ORDERING[soft-kick]: Release. Pairs with the Acquire in `SoftVcpu::run`: what was stored
        // before the kick is seen by the owner of a vCPU that comes out.
        self.shared.kicks.fetch_add(1, Ordering::Release);
    }

    fn allocated(&self) -> Result<u64, MachineError> {
        self.shared.mapping.file.allocated()
    }

    fn give_back(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        self.shared.mapping.give_back(pages)
    }

    fn pinned(&self) -> Vec<(u64, u64, u64)> {
        Vec::new()
    }
}
