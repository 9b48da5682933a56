//! The heap: blocks of powers of two, a free list for each size.
//!
//! Lock: one; a leaf. Memory that was once a block of some size stays one.

use core::alloc::{GlobalAlloc, Layout};

use super::lock::Lock;

/// log2 of the smallest block.
const SMALLEST: u32 = 5;
/// One more than log2 of the largest block.
const SIZES: usize = 24;

struct State {
    /// Never given away yet.
    fresh: usize,
    end: usize,
    /// First free block of each size, 0 for none; each holds the address of the next.
    free: [usize; SIZES],
}

struct Heap(Lock<State>);

#[global_allocator]
static HEAP: Heap = Heap(Lock::new(State { fresh: 0, end: 0, free: [0; SIZES] }));

/// Use `bytes` bytes from `start` on.
///
/// # Safety
/// They are mapped, writable memory that nobody else uses, for good; `start` is a multiple of a
/// page. Called once, before the first allocation.
pub unsafe fn begin(start: usize, bytes: usize) {
    let mut state = HEAP.0.lock();
    (state.fresh, state.end) = (start, start + bytes);
}

fn size(layout: Layout) -> u32 {
    layout.size().max(layout.align()).max(1 << SMALLEST).next_power_of_two().ilog2()
}

// SAFETY: a block is a power of two large and aligned to its size (or to a page, if larger), at
// least the layout's size and alignment, inside the memory that `begin` was promised; it is either
// in a free list or given away, and moves between the two under the lock.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = size(layout);
        let mut state = self.0.lock();
        let Some(first) = state.free.get(size as usize).copied() else {
            return core::ptr::null_mut();
        };
        if first != 0 {
            let block = first as *mut usize;
            // SAFETY: a free block of this heap, whose first word `dealloc` wrote.
            state.free[size as usize] = unsafe { block.read() };
            return block.cast();
        }
        let bytes = 1_usize << size;
        let start = state.fresh.next_multiple_of(bytes);
        if start + bytes > state.end {
            return core::ptr::null_mut();
        }
        state.fresh = start + bytes;
        start as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let size = size(layout) as usize;
        let mut state = self.0.lock();
        // SAFETY: the caller gives back a block of this heap, at least 32 bytes large and aligned.
        unsafe { block.cast::<usize>().write(state.free[size]) };
        state.free[size] = block as usize;
    }
}
