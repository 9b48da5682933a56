//! What can still be said of a vCPU that ended in a triple fault: what KVM was about to deliver,
//! where the vCPU was when it last came out, and where our tables lead for each page that the
//! delivery of an exception needs.
//!
//! The registers after a shutdown may say nothing: on SVM the exit leaves the guest's state
//! undefined, so KVM resets the vCPU. The tables are ours and still stand. They are read here
//! while other vCPUs and the MMU may change them: an entry is one atomic load, a walk is none.

use std::fmt::{self, Write};
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_vcpu_events;

use super::super::machine::PAGE;
use super::memory::GuestMemory;
use super::stub;

const PRESENT: u64 = 1;
const HUGE: u64 = 1 << 7;
/// Bits 12 to 51: where an entry leads.
const ADDRESS: u64 = ((1 << 52) - 1) & !(PAGE - 1);

/// Where the vCPU was when it last came out of KVM_RUN, or was to begin.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastSeen {
    pub(super) rip: u64,
    pub(super) rsp: u64,
    pub(super) cr2: u64,
}

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "last seen at rip {:#x} rsp {:#x} cr2 {:#x}", self.rip, self.rsp, self.cr2)
    }
}

/// The events that KVM holds for the vCPU, in words.
pub(super) fn events(events: &kvm_vcpu_events) -> String {
    let mut text = String::new();
    let exception = &events.exception;
    if exception.injected != 0 || exception.pending != 0 {
        let state = if exception.injected != 0 { "half delivered" } else { "pending" };
        let (vector, error) = (exception.nr, exception.error_code);
        // Formatting into a String does not fail.
        let _ = write!(text, "exception {vector} {state}, error code {error:#x}");
    }
    let others = [
        (events.interrupt.injected, "an interrupt"),
        (events.nmi.injected | events.nmi.pending, "an NMI"),
        (events.triple_fault.pending, "a triple fault"),
    ];
    for (_, name) in others.iter().filter(|(there, _)| *there != 0) {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{name}");
    }
    if text.is_empty() { "no event pending".to_owned() } else { text }
}

/// The walks that the delivery of an exception to vCPU `vcpu`, and the program's next step, take
/// through the tables at page `root`.
pub(super) fn walks(memory: &GuestMemory, root: u64, vcpu: u32, last: &LastSeen) -> String {
    let places = [
        ("GDT and IDT", stub::IDT_REGISTER.0),
        ("handlers", stub::entry()),
        ("TSS and stack", stub::task(vcpu)),
        ("rip", last.rip),
        ("cr2", last.cr2),
    ];
    let mut text = format!("root at page {root:#x}");
    for (name, gva) in places {
        let _ = write!(text, "; {name} {gva:#x}:{}", Walk { memory, root, gva });
    }
    text
}

/// The entries on the way to `gva`, from the top.
struct Walk<'a> {
    memory: &'a GuestMemory,
    root: u64,
    gva: u64,
}

impl fmt::Display for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = self.root * PAGE;
        for level in (1..=4u32).rev() {
            if table >= self.memory.bytes() {
                return write!(f, " (a table beyond the memory)");
            }
            let index = (self.gva >> (12 + 9 * (level - 1))) & 0x1ff;
            // ORDERING[kvm-stub]: Relaxed. For people: it says what stood there at some time.
            let entry = self.memory.word(table + index * 8).load(Ordering::Relaxed);
            write!(f, " {entry:#x}")?;
            if entry & PRESENT == 0 {
                return write!(f, " (not present, level {level})");
            }
            if level > 1 && entry & HUGE != 0 {
                return Ok(());
            }
            table = entry & ADDRESS;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 8;

    /// Tables at pages 8 to 11 that map the linear page 1 to the physical page 1, and the linear
    /// 2 MiB at 2 MiB to the physical ones.
    fn memory() -> GuestMemory {
        let memory = GuestMemory::new(16).expect("memory");
        let put = |page: u64, index: u64, entry: u64| {
            memory.store_bytes(page * PAGE + index * 8, &entry.to_le_bytes());
        };
        put(8, 0, 0x9007);
        put(9, 0, 0xa007);
        put(10, 0, 0xb007);
        put(11, 1, 0x8000_0000_0000_1067);
        put(10, 1, 0x20_00e7);
        put(9, 1, 0x10_0007);
        memory
    }

    fn walk(gva: u64) -> String {
        Walk { memory: &memory(), root: ROOT, gva }.to_string()
    }

    #[test]
    fn a_walk_shows_each_entry_and_where_it_ends() {
        assert_eq!(walk(0x1234), " 0x9007 0xa007 0xb007 0x8000000000001067");
        assert_eq!(walk(0x2000), " 0x9007 0xa007 0xb007 0x0 (not present, level 1)");
        assert_eq!(walk(0x20_1000), " 0x9007 0xa007 0x2000e7");
        assert_eq!(walk(1 << 39), " 0x0 (not present, level 4)");
        assert_eq!(walk(1 << 30), " 0x9007 0x100007 (a table beyond the memory)");
    }

    #[test]
    fn the_walks_are_those_of_the_delivery_and_of_the_program() {
        let last = LastSeen { rip: 0x1040, rsp: 0, cr2: 0x5000 };
        let text = walks(&memory(), ROOT, 1, &last);
        for part in ["root at page 0x8;", "IDT 0x100: ", "handlers 0x1", "stack 0x3400:"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.contains("; rip 0x1040: 0x9007") && text.contains("; cr2 0x5000: "), "{text}");
    }

    #[test]
    fn events_are_named() {
        let mut seen = kvm_vcpu_events::default();
        assert_eq!(events(&seen), "no event pending");
        seen.exception.injected = 1;
        (seen.exception.nr, seen.exception.error_code) = (14, 6);
        assert_eq!(events(&seen), "exception 14 half delivered, error code 0x6");
        seen.triple_fault.pending = 1;
        assert_eq!(events(&seen), "exception 14 half delivered, error code 0x6, a triple fault");
        seen.exception.injected = 0;
        assert_eq!(events(&seen), "a triple fault");
    }
}
