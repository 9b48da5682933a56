//! What suites share: the machine, options, and the count of checks.
//!
//! Owns [`Lab`], [`Tally`] and the words of the output, which `cargo xtask emulate` reads.

use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use mmu_core::addr::Level;
use mmu_core::slot::LogOptions;
use mmu_core::spte::Capabilities;
use tdp_mmu::DirtyTracking;

use crate::println;
use crate::virt::{Features, Virt};
use crate::vm::Shape;

/// How checks came out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Those that held.
    pub passed: u32,
    /// Those that did not.
    pub failed: u32,
    /// Those that this machine cannot make.
    pub skipped: u32,
}

/// What a suite works with.
pub struct Lab<V: Virt> {
    /// What the machine's extension offers.
    pub features: Features,
    /// CPUs to be used.
    pub cpus: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// The count.
    pub tally: Tally,
    noted: Vec<&'static str>,
    machine: PhantomData<V>,
}

impl<V: Virt> Lab<V> {
    /// Nothing checked yet.
    pub fn new(features: Features, cpus: usize, seed: u64) -> Self {
        let (tally, noted, machine) = (Tally::default(), Vec::new(), PhantomData);
        Self { features, cpus, seed, tally, noted, machine }
    }

    /// A check: print and count it. Returns whether it held.
    pub fn check(&mut self, name: &str, held: bool, detail: fmt::Arguments<'_>) -> bool {
        let word = if held { "ok  " } else { "FAIL" };
        println!("  [{word}] {name}: {detail}");
        *(if held { &mut self.tally.passed } else { &mut self.tally.failed }) += 1;
        held
    }

    /// A check that two values are the same.
    pub fn equal<T: PartialEq + fmt::Debug>(&mut self, name: &str, found: T, wanted: T) -> bool {
        let held = found == wanted;
        if held {
            self.check(name, true, format_args!("{found:?}"))
        } else {
            self.check(name, false, format_args!("{found:?}, not {wanted:?}"))
        }
    }

    /// A check that something went as it should; what came of it.
    pub fn went<T, E: fmt::Display>(&mut self, name: &str, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.check(name, false, format_args!("{error}"));
                None
            }
        }
    }

    /// A check that this machine cannot make. Legal if skips.txt says so.
    pub fn skip(&mut self, name: &str, reason: &str) {
        println!("  [skip] {name}: {reason}");
        self.tally.skipped += 1;
    }

    /// Something about the machine that is not as its manual says, under a name of its own: said
    /// the first time only.
    pub fn note(&mut self, name: &'static str, text: fmt::Arguments<'_>) {
        if !self.noted.contains(&name) {
            println!("  [note] {name}: {text}");
            self.noted.push(name);
        }
    }

    /// Capabilities of this machine's tables.
    pub fn caps(&self) -> Capabilities {
        V::capabilities(&self.features)
    }

    /// Capabilities of shadow tables: this processor's own, for its own mode.
    pub fn shadow_caps(&self) -> Capabilities {
        let huge_1g = core::arch::x86_64::__cpuid(0x8000_0001).edx & 1 << 26 != 0;
        Capabilities { max_phys_bits: self.features.phys_bits, huge_1g, ..Capabilities::legacy() }
    }

    /// A VM with `mib` MiB of data and pages of up to `level`.
    pub fn shape(&self, mib: u64, level: Level) -> Shape {
        Shape {
            caps: self.caps(),
            level,
            tracking: DirtyTracking::WriteProtect,
            log: LogOptions::default(),
            data: mib << 20,
        }
    }

    /// The next random number.
    pub fn random(&mut self) -> u64 {
        // xorshift64*.
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
