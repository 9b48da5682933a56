//! Access sets and the fault codes that hardware reports them in.
//!
//! [`Access`] is what an entry permits or a fault needs, in one vocabulary for every format. The
//! three code types decode what the CPU hands to a hypervisor: [`PfErrorCode`] (#PF, also the
//! vocabulary of [`crate::fault::PageFault`]), [`EptViolation`] (VMX exit qualification, SDM 3C
//! 28.2.1) and [`NpfInfo`] (SVM EXITINFO1, APM 2 15.25.6). Pure values; no ordering.

use bitflags::bitflags;

bitflags! {
    /// What an entry permits, or what an access needs. The first three values equal the hardware
    /// bits of an EPT entry (KVM row 1.16).
    #[doc(alias = "ACC_ALL")]
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Use by the guest's user mode; with mode-based execute, fetches by user mode.
        const USER = 4;
        /// Instruction fetches.
        const EXEC = 8;
    }
}

impl Access {
    /// Everything.
    pub const ALL: Self = Self::all();
    /// Everything but writes.
    pub const READ_ONLY: Self = Self::ALL.difference(Self::WRITE);
}

bitflags! {
    /// #PF error code (SDM 3A 4.7; APM 2 8.4.2). Bits that are not named are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PfErrorCode: u64 {
        /// The translation was present (a permission or reserved-bit fault).
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was made in user mode.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
        /// A protection key forbade the access.
        const PKEY = 1 << 5;
        /// A shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// SVM: the fault was on the final physical address (EXITINFO1 bit 32).
        const GUEST_FINAL = 1 << 32;
        /// SVM: the fault was on a guest page-table page (EXITINFO1 bit 33).
        const GUEST_TABLE = 1 << 33;
        const _ = !0;
    }
}

impl PfErrorCode {
    /// What the access needed.
    #[inline]
    #[must_use]
    pub const fn access(self) -> Access {
        let kind = if self.contains(Self::FETCH) {
            Access::EXEC
        } else if self.contains(Self::WRITE) {
            Access::WRITE
        } else {
            Access::READ
        };
        if self.contains(Self::USER) { kind.union(Access::USER) } else { kind }
    }
}

bitflags! {
    /// Exit qualification of an EPT violation (SDM 3C 28.2.1, table 28-7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct EptViolation: u64 {
        /// The access was a data read.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// AND of bit 0 (readable) of the entries used.
        const READABLE = 1 << 3;
        /// AND of bit 1 (writable) of the entries used.
        const WRITABLE = 1 << 4;
        /// AND of bit 2 (executable, supervisor) of the entries used.
        const EXECUTABLE = 1 << 5;
        /// AND of bit 10 (executable, user), with mode-based execute.
        const USER_EXECUTABLE = 1 << 6;
        /// The guest linear-address field is valid.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the translation of a linear address, not to a guest table.
        const FINAL = 1 << 8;
        /// Advanced information, with [`Self::FINAL`]: the linear address is a user-mode one.
        const USER_LINEAR = 1 << 9;
        /// Advanced information, with [`Self::FINAL`]: the guest's tables permit writes.
        const WRITABLE_LINEAR = 1 << 10;
        /// Advanced information, with [`Self::FINAL`]: the guest's tables forbid execution.
        const NO_EXECUTE_LINEAR = 1 << 11;
        const _ = !0;
    }
}

impl EptViolation {
    /// The same fault as a #PF error code (KVM's common vocabulary): present when any of the
    /// permission bits says so.
    #[inline]
    #[must_use]
    pub const fn to_error_code(self) -> PfErrorCode {
        let mut code = PfErrorCode::empty();
        if self.contains(Self::WRITE) {
            code = code.union(PfErrorCode::WRITE);
        }
        if self.contains(Self::FETCH) {
            code = code.union(PfErrorCode::FETCH);
        }
        let permissions = Self::READABLE
            .union(Self::WRITABLE)
            .union(Self::EXECUTABLE)
            .union(Self::USER_EXECUTABLE);
        if self.intersects(permissions) {
            code = code.union(PfErrorCode::PRESENT);
        }
        if self.contains(Self::LINEAR_VALID) {
            code = code.union(if self.contains(Self::FINAL) {
                PfErrorCode::GUEST_FINAL
            } else {
                PfErrorCode::GUEST_TABLE
            });
        }
        code
    }
}

bitflags! {
    /// EXITINFO1 of a nested page fault (APM 2 15.25.6): a #PF error code plus two bits that say
    /// which of the two walks failed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct NpfInfo: u64 {
        /// The nested translation was present.
        const PRESENT = 1 << 0;
        /// The access was a write (guest table walks count as writes).
        const WRITE = 1 << 1;
        /// Always set: nested accesses are user accesses.
        const USER = 1 << 2;
        /// A reserved bit was set in a nested entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
        /// The fault was on the guest's final physical address.
        const GUEST_FINAL = 1 << 32;
        /// The fault was on a guest page-table page.
        const GUEST_TABLE = 1 << 33;
        const _ = !0;
    }
}

impl NpfInfo {
    /// The same fault as a #PF error code. The user bit is dropped: hardware always sets it and
    /// it says nothing about the guest's mode.
    #[inline]
    #[must_use]
    pub const fn to_error_code(self) -> PfErrorCode {
        PfErrorCode::from_bits_retain(self.bits()).difference(PfErrorCode::USER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits that the `x86` crate also names must agree with ours.
    #[test]
    fn error_code_bits_agree_with_the_x86_crate() {
        use x86::irq::PageFaultError as Theirs;
        let pairs = [
            (PfErrorCode::PRESENT, Theirs::P),
            (PfErrorCode::WRITE, Theirs::WR),
            (PfErrorCode::USER, Theirs::US),
            (PfErrorCode::RESERVED, Theirs::RSVD),
            (PfErrorCode::FETCH, Theirs::ID),
            (PfErrorCode::PKEY, Theirs::PK),
        ];
        for (ours, theirs) in pairs {
            assert_eq!(ours.bits(), u64::from(theirs.bits()), "{ours:?}");
        }
    }

    #[test]
    fn qualifications_seen_on_hardware_decode_to_what_happened() {
        // (qualification, needed access, present): PLATFORMS of the design, Bochs, exit 0x30.
        let seen = [
            (0x181, Access::READ, false),
            (0x182, Access::WRITE, false),
            (0x184, Access::EXEC, false),
            (0x18a, Access::WRITE, true),
            (0x18c, Access::EXEC, true),
            (0x19c, Access::EXEC, true),
            (0x1aa, Access::WRITE, true),
            (0x1a1, Access::READ, true),
        ];
        for (raw, access, present) in seen {
            let code = EptViolation::from_bits_retain(raw).to_error_code();
            assert_eq!(code.access(), access, "{raw:#x}");
            assert_eq!(code.contains(PfErrorCode::PRESENT), present, "{raw:#x}");
            assert!(code.contains(PfErrorCode::GUEST_FINAL), "{raw:#x}");
        }
    }

    #[test]
    fn nested_fault_info_seen_on_hardware_decodes_to_what_happened() {
        let seen = [
            (0x1_0000_0004, Access::READ, false, true),
            (0x1_0000_0006, Access::WRITE, false, true),
            (0x1_0000_0014, Access::EXEC, false, true),
            (0x1_0000_0007, Access::WRITE, true, true),
            (0x1_0000_0015, Access::EXEC, true, true),
            (0x2_0000_0006, Access::WRITE, false, false),
        ];
        for (raw, access, present, last) in seen {
            let code = NpfInfo::from_bits_retain(raw).to_error_code();
            assert_eq!(code.access(), access, "{raw:#x}");
            assert_eq!(code.contains(PfErrorCode::PRESENT), present, "{raw:#x}");
            assert_eq!(code.contains(PfErrorCode::GUEST_FINAL), last, "{raw:#x}");
        }
    }
}
