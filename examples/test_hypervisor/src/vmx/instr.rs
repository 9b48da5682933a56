//! The instructions of VMX, one function each, with what they report in the flags as a result.
//!
//! The flags are taken by the same `asm!` as the instruction: in between the compiler may add to a
//! register. Neighbours: `enter` holds VMLAUNCH and VMRESUME. All of this faults outside VMX
//! operation, which is a bug of ours and ends in a panic; nothing else can go wrong in Rust's
//! eyes except what each function names. No locks.

use core::arch::asm;

use x86::vmx::vmcs::ro;

use super::region::Region;

/// VMfailInvalid: there is no current VMCS. Not a number that the machine uses.
pub const NO_VMCS: u64 = u64::MAX;

/// What an instruction reported: an instruction error number, or [`NO_VMCS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub u64);

/// Success, or the instruction error.
type Result<T> = core::result::Result<T, Failed>;

/// From CF and ZF, which an instruction left as 0 or 1.
fn outcome(carry: u8, zero: u8) -> Result<()> {
    match (carry, zero) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failed(instruction_error())),
        _ => Err(Failed(NO_VMCS)),
    }
}

/// What the last failed instruction says of itself.
pub fn instruction_error() -> u64 {
    read(ro::VM_INSTRUCTION_ERROR).unwrap_or(NO_VMCS)
}

/// An instruction with the address of a region in memory as its operand.
macro_rules! on_region {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        pub fn $name(region: &Region) -> Result<()> {
            let physical = region.physical();
            let (carry, zero): (u8, u8);
            // SAFETY: the operand is the address of `physical`, which is read. What the processor
            // then does with the region's memory is its business alone: `Region` hands nobody a
            // reference to a page that is a VMCS or a VMXON region, and lives longer.
            unsafe {
                asm!(
                    concat!($instruction, " qword ptr [{operand}]"),
                    "setc {carry}",
                    "setz {zero}",
                    operand = in(reg) &raw const physical,
                    carry = out(reg_byte) carry,
                    zero = out(reg_byte) zero,
                    options(nostack)
                );
            }
            outcome(carry, zero)
        }
    };
}

on_region! {
    /// Enter VMX operation on this CPU; the region is the processor's from now on.
    vmxon, "vmxon"
}
on_region! {
    /// Make a VMCS not current and not launched; what the processor kept of it is in memory after.
    vmclear, "vmclear"
}
on_region! {
    /// Make a VMCS the current one.
    vmptrld, "vmptrld"
}

/// A field of the current VMCS.
pub fn read(field: u32) -> Result<u64> {
    let value: u64;
    let (carry, zero): (u8, u8);
    // SAFETY: reads a field into a register; which fields exist is checked by the processor.
    unsafe {
        asm!(
            "vmread {value}, {field}",
            "setc {carry}",
            "setz {zero}",
            field = in(reg) u64::from(field),
            value = out(reg) value,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
            options(nostack)
        );
    }
    match (carry, zero) {
        (0, 0) => Ok(value),
        // Not `outcome`: it asks here for the error's number.
        _ => Err(Failed(NO_VMCS)),
    }
}

/// Change a field of the current VMCS.
///
/// # Safety
/// The next VM entry or exit acts on the field: what it makes the processor do, such as where it
/// goes on after an exit or which memory it writes a log to, must be sound.
pub unsafe fn write(field: u32, value: u64) -> Result<()> {
    let (carry, zero): (u8, u8);
    // SAFETY: writes a field that the processor acts on only at an entry or exit, which the caller
    // answers for.
    unsafe {
        asm!(
            "vmwrite {field}, {value}",
            "setc {carry}",
            "setz {zero}",
            field = in(reg) u64::from(field),
            value = in(reg) value,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
            options(nostack)
        );
    }
    outcome(carry, zero)
}

/// An instruction that takes a kind and a descriptor of 16 bytes.
macro_rules! invalidate {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        pub fn $name(kind: u64, descriptor: [u64; 2]) -> Result<()> {
            let (carry, zero): (u8, u8);
            // SAFETY: reads the descriptor and makes the processor forget translations, which it
            // may do at any time.
            unsafe {
                asm!(
                    concat!($instruction, " {kind}, xmmword ptr [{descriptor}]"),
                    "setc {carry}",
                    "setz {zero}",
                    kind = in(reg) kind,
                    descriptor = in(reg) &raw const descriptor,
                    carry = out(reg_byte) carry,
                    zero = out(reg_byte) zero,
                    options(nostack)
                );
            }
            outcome(carry, zero)
        }
    };
}

invalidate! {
    /// Forget what was cached from extended tables: of one EPTP, or of all.
    invept, "invept"
}
invalidate! {
    /// Forget what was cached of linear addresses: of a VPID's address, a VPID, or all.
    invvpid, "invvpid"
}

/// Bits 11:10 of a field's number say what it is of; 2: the guest's state.
const AREA: u32 = 3 << 10;
const GUEST_AREA: u32 = 2 << 10;

/// Change a field of the guest's state in the current VMCS. Sound whatever it says: the guest is
/// confined by the controls and its tables.
///
/// # Panics
/// The field is not one of the guest's state, or there is none of this number.
pub fn write_guest(field: u32, value: u64) {
    assert!(field & AREA == GUEST_AREA, "{field:#x} is not guest state");
    // SAFETY: guest state (asserted): makes the processor do something in the guest only.
    if let Err(error) = unsafe { write(field, value) } {
        panic!("VMWRITE of {field:#x}: {error:?}");
    }
}

/// A field of the current VMCS that every processor with VMX has.
///
/// # Panics
/// There is no current VMCS.
pub fn field(field: u32) -> u64 {
    match read(field) {
        Ok(value) => value,
        Err(error) => panic!("VMREAD of {field:#x}: {error:?}"),
    }
}
