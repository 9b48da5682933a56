//! No memory for a shadow MMU, at every point (T18, invariant I22): table frames by the host's
//! word, everything else by the allocator's. The error is a value, nothing has changed, the call
//! succeeds when there is memory again, and nothing leaks. What cannot fail does not allocate: the
//! allocator refuses everything there.

mod common;
mod shadow_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::inside::{Inside, inside};
use common::no_ad;
use mmu_core::spte::{Capabilities, Ept};
use mmu_model::Random;
use shadow_mmu::ReclaimPolicy;
use shadow_support::hostile::Call;
use shadow_support::kernel::{self, Kernel};
use shadow_support::nested::{EPT, Hypervisor};
use shadow_support::{nested, wide};
use wide::{Guest, World};

/// Refuses allocations by number, each thread's own: tests run beside one another.
struct Refusing;

thread_local! {
    /// Allocations in calls that may fail.
    static COUNT: Cell<u64> = const { Cell::new(0) };
    /// Those refused.
    static FROM: Cell<u64> = const { Cell::new(u64::MAX) };
    static UNTIL: Cell<u64> = const { Cell::new(u64::MAX) };
    static REFUSED: Cell<u64> = const { Cell::new(0) };
    /// Alignments of these.
    static ALIGNMENTS: Cell<usize> = const { Cell::new(0) };
    /// Allocations that live.
    static LIVE: Cell<i64> = const { Cell::new(0) };
}

fn refused(layout: Layout) -> bool {
    // A failing test says why.
    if std::thread::panicking() {
        return false;
    }
    match inside() {
        Inside::Test => false,
        Inside::Infallible => true,
        Inside::Fallible => {
            let number = COUNT.get();
            COUNT.set(number + 1);
            let refused = (FROM.get()..UNTIL.get()).contains(&number);
            if refused {
                REFUSED.set(REFUSED.get() + 1);
                ALIGNMENTS.set(ALIGNMENTS.get() | layout.align());
            }
            refused
        }
    }
}

fn count_live(change: i64) {
    // Not while the thread ends.
    let _ = LIVE.try_with(|live| live.set(live.get() + change));
}

// SAFETY: forwards to the system's allocator; to refuse is allowed.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refused(layout) {
            return std::ptr::null_mut();
        }
        count_live(1);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count_live(-1);
        // SAFETY: the caller's promises are passed on: it came from `alloc`, so from the system.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if refused(layout) {
            return std::ptr::null_mut();
        }
        // SAFETY: as for `dealloc`, and the caller's promises about the size are passed on.
        unsafe { System.realloc(place, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

fn relent() {
    FROM.set(u64::MAX);
}

/// What is refused, and from which call on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Nothing,
    /// Frames, until a call has failed.
    Frames(u64),
    /// One allocation.
    One(u64),
    /// All allocations, until a call has failed.
    All(u64),
}

/// Frames that the host gave, allocations made, and those refused.
#[derive(Clone, Copy, Debug)]
struct Used {
    frames: u64,
    allocations: u64,
    refused: u64,
}

/// Run a script of calls; `World` compares everything before and after one that fails.
fn run<G: Guest>(make: &dyn Fn() -> World<G>, script: &[Call], refusal: Refusal) -> Used {
    let live = LIVE.get();
    COUNT.set(0);
    REFUSED.set(0);
    let mut world = make();
    let frames = world.rig.mmu.vm().host().provides();
    match refusal {
        Refusal::Nothing => {}
        Refusal::Frames(from) => world.rig.refuse_after(from),
        Refusal::One(from) | Refusal::All(from) => {
            let until = if refusal == Refusal::One(from) { from + 1 } else { u64::MAX };
            FROM.set(from);
            UNTIL.set(until);
            world.rig.refuse_memory(relent);
        }
    }
    world.load();
    script.iter().for_each(|call| world.call(*call));
    let frames = world.rig.mmu.vm().host().provides() - frames;
    relent();
    world.finish();
    assert_eq!(LIVE.get(), live, "{refusal:?}: allocations left");
    Used { frames, allocations: COUNT.get(), refused: REFUSED.get() }
}

/// Calls on tables that lead somewhere. No call asks for frames to be refused.
fn script(seed: u64, calls: usize) -> Vec<Call> {
    let mut random = Random::new(seed);
    let mut script = Vec::new();
    while script.len() < calls {
        let (what, value) = (random.next_u64() as u8, random.next_u64());
        if what % 64 != 62 {
            script.push(Call { what, place: random.next_u64() as u16, value });
        }
    }
    script
}

fn furnished<G: Guest>(mut world: World<G>, seed: u64) -> World<G> {
    world.furnish_well(&mut Random::new(seed));
    world
}

/// Every point of a script.
fn everywhere<G: Guest>(seed: u64, make: impl Fn() -> World<G>) {
    let make = || furnished(make(), seed);
    let script = script(seed, 300);
    let all = run(&make, &script, Refusal::Nothing);
    println!("seed {seed}: {} frames, {} allocations", all.frames, all.allocations);
    assert!(all.frames > 10 && all.allocations > 20 && all.refused == 0, "{all:?}");
    for point in 0..all.frames {
        let _ = run(&make, &script, Refusal::Frames(point));
    }
    for point in 0..all.allocations {
        for refusal in [Refusal::One(point), Refusal::All(point)] {
            let used = run(&make, &script, refusal);
            assert!(used.refused > 0, "{refusal:?} refused nothing");
        }
    }
    // Heads of lists, places of frames, arrays and counts of pages; descriptors, 64 bytes each.
    for alignment in [8, 64] {
        assert_ne!(ALIGNMENTS.get() & alignment, 0, "of {alignment}: none was refused");
    }
}

fn kernel(seed: u64, levels: u8, mode: kernel::Mode, quota: u32) {
    everywhere(seed, || {
        let (caps, guest) = (kernel::caps(levels), Kernel::new(mode));
        World::new(seed, caps, guest, quota, ReclaimPolicy::Accessed)
    });
}

// INVARIANT[I22].
#[test]
fn running_out_at_any_point_in_long_mode_changes_nothing() {
    kernel(1, 4, kernel::Mode::Long4, 1000);
    kernel(2, 5, kernel::Mode::Long5, 10);
}

#[test]
fn running_out_at_any_point_in_32_bit_modes_changes_nothing() {
    kernel(3, 3, kernel::Mode::Pae, 1000);
    kernel(4, 4, kernel::Mode::Bits32 { pse: true }, 10);
}

#[test]
fn running_out_at_any_point_for_a_nested_guest_changes_nothing() {
    everywhere(5, || {
        let guest = Hypervisor::<Ept>::new(nested::Mode { kind: EPT, levels: 4 });
        World::new(5, no_ad(Capabilities::ept()), guest, 1000, ReclaimPolicy::Fifo)
    });
}
