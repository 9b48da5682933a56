//! Pages that the processor uses by physical address: VMXON regions, VMCSs, logs.
//!
//! The direct map is the identity (`boot/entry.rs`), so a page's address is its physical address.
//! No locks: a page belongs to the vCPU or CPU that made it.

use alloc::alloc::{alloc_zeroed, dealloc, handle_alloc_error};
use core::alloc::Layout;
use core::ptr::NonNull;

/// Bytes of a page, and of every region that this program gives away.
const PAGE: usize = 4096;
const WORDS: usize = PAGE / size_of::<u64>();
const LAYOUT: Layout = match Layout::from_size_align(PAGE, PAGE) {
    Ok(layout) => layout,
    Err(_) => panic!("a page is a layout"),
};

/// A page of zeros, at first. The processor may change it at any time: it is only accessed by
/// volatile reads and writes of words.
#[derive(Debug)]
pub struct Region(NonNull<u64>);

impl Region {
    /// A page of zeros.
    pub fn zeroed() -> Self {
        // SAFETY: the layout is a page, not of size 0.
        let page = unsafe { alloc_zeroed(LAYOUT) };
        match NonNull::new(page.cast()) {
            Some(page) => Self(page),
            None => handle_alloc_error(LAYOUT),
        }
    }

    /// A page that begins with the revision number that VMXON and VMPTRLD look for.
    pub fn with_revision(revision: u32) -> Self {
        let region = Self::zeroed();
        // SAFETY: the page is ours, aligned, and the processor does not use it yet.
        unsafe { region.0.write_volatile(u64::from(revision)) };
        region
    }

    /// Its physical address.
    pub fn physical(&self) -> u64 {
        self.0.addr().get() as u64
    }

    /// Word `index` of 512.
    ///
    /// # Panics
    /// There is no such word.
    pub fn word(&self, index: usize) -> u64 {
        assert!(index < WORDS, "word {index} of a page");
        // SAFETY: inside the page (asserted), which is allocated as long as `self`.
        let word = unsafe { self.0.add(index) };
        // SAFETY: aligned, initialised when it was allocated; volatile, because the processor
        // writes logs behind the compiler's back.
        unsafe { word.read_volatile() }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` of the same layout; whoever gave it to a processor has taken
        // it back (`Vmcs` clears itself, VMXON regions are never dropped).
        unsafe { dealloc(self.0.as_ptr().cast(), LAYOUT) };
    }
}
