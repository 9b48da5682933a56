//! What this machine can do at best, measured in the same run.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use mmu_core::addr::Gfn;
use mmu_core::frame::raw;

use crate::harness::{Bench, Random, time};
use crate::host::{Block, Shape, Vm};

/// `limit_stream_read`, `limit_lock_and`, `limit_lock_cmpxchg`: ns per 8-byte entry, streamed from
/// memory.
pub fn stream(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let bytes = if bench.quick { 64 << 20 } else { 512 << 20 };
    let block = Block::new(bytes);
    let words = block.words();
    if wanted("limit_stream_read") {
        let n = words.len() as u64;
        bench.repeat("limit_stream_read", n, || {
            time(|| {
                // Eight loads joined without a branch: a scan that need not write.
                let any = words.chunks_exact(8).fold(0, |any, line| {
                    any | line.iter().fold(0, |or, word| or | word.load(Ordering::Relaxed))
                });
                black_box(any);
            })
        });
    }
    let words = &words[..words.len() / 16];
    let n = words.len() as u64;
    if wanted("limit_lock_and") {
        bench.repeat("limit_lock_and", n, || {
            time(|| {
                for word in words {
                    word.fetch_and(!256, Ordering::Relaxed);
                }
            })
        });
    }
    if wanted("limit_lock_cmpxchg") {
        bench.repeat("limit_lock_cmpxchg", n, || {
            time(|| {
                for word in words {
                    let old = word.load(Ordering::Relaxed);
                    let new = old ^ 256;
                    let done = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed);
                    assert!(done.is_ok());
                }
            })
        });
    }
}

/// `limit_walk_rand`: four dependent loads per gfn, gfns independent of each other.
pub fn walk(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(pages));
    vm.populate();
    let root = vm.vcpu.load_root().expect("frames");
    let host = vm.mmu.vm().host();
    let top = vm.mmu.config().levels();
    let order = Random::new(4).permutation(pages);
    bench.repeat("limit_walk_rand", pages, || {
        time(|| {
            let mut any = 0;
            for gfn in &order {
                let gfn = Gfn::new(u64::from(*gfn));
                let mut table = raw::table(host, root);
                let mut level = top;
                while let Some(below) = level.down() {
                    table = raw::table(host, table.cell(gfn, level).peek().pfn());
                    level = below;
                }
                any |= table.cell(gfn, level).peek().raw();
            }
            black_box(any);
        })
    });
}

/// `limit_zero_4k`: per 4 KiB of memory that is in the second-level cache.
pub fn zero(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    const PAGES: usize = 64;
    const ROUNDS: usize = 2000;
    let mut memory = vec![0u8; PAGES * 4096];
    bench.repeat("limit_zero_4k", (PAGES * ROUNDS) as u64, || {
        time(|| {
            for _ in 0..ROUNDS {
                for page in memory.chunks_exact_mut(4096) {
                    page.fill(0);
                    black_box(page);
                }
            }
        })
    });
}
