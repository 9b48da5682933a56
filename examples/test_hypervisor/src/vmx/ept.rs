//! Extended tables as the processor is told of them, and how it is made to forget.
//!
//! Owns [`Eptp`] and the INVEPT and INVVPID forms that each [`LocalFlush`] is. No locks.

use crate::virt::{LocalFlush, Root};

use super::abilities::{Abilities, EptVpid};
use super::instr::{self, Failed};

/// A pointer to extended tables: memory type 2:0, levels less one 5:3, A/D 6, address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eptp(u64);

const WRITE_BACK: u64 = 6;
const ACCESSED_DIRTY: u64 = 1 << 6;

impl Eptp {
    /// For this tree.
    pub const fn new(root: Root) -> Self {
        let levels = (root.levels.number() as u64 - 1) << 3;
        let accessed_dirty = if root.accessed_dirty { ACCESSED_DIRTY } else { 0 };
        Self(root.frame.get() << 12 | accessed_dirty | levels | WRITE_BACK)
    }

    /// As the VMCS holds it.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Kinds of INVEPT.
const EPT_CONTEXT: u64 = 1;
const EPT_ALL: u64 = 2;
/// Kinds of INVVPID.
const VPID_ADDRESS: u64 = 0;
const VPID_CONTEXT: u64 = 1;
const VPID_ALL: u64 = 2;

/// Whose translations are to be forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The vCPU's tables; `None` with shadow paging, or before it has any.
    pub eptp: Option<Eptp>,
    /// The vCPU's tag; 0 when it has none.
    pub vpid: u16,
}

/// Forget `what` on this CPU, now.
///
/// # Panics
/// The processor refuses: nothing would be sound after that.
pub fn flush(abilities: &Abilities, context: Context, what: LocalFlush) {
    let result = match what {
        LocalFlush::Linear(address) => linear(abilities, context, address),
        LocalFlush::Context => match context.eptp {
            Some(eptp) => extended(abilities, eptp),
            None => tagged(abilities, context),
        },
        LocalFlush::All => all(abilities),
    };
    if let Err(error) = result {
        panic!("{what:?} of {context:?}: {error:?}");
    }
}

/// What was cached from `eptp`'s tables, also combined with the guest's own.
fn extended(abilities: &Abilities, eptp: Eptp) -> Result<(), Failed> {
    // For `cargo xtask emulate nested --busted`: a KVM below that shadows our tables goes on using
    // what it should have forgotten.
    if mmu_core::busted!("forget_invept") {
        Ok(())
    } else if abilities.ept_vpid.contains(EptVpid::INVEPT_SINGLE) {
        instr::invept(EPT_CONTEXT, [eptp.get(), 0])
    } else {
        instr::invept(EPT_ALL, [0, 0])
    }
}

/// What was cached under the vCPU's tag. Without tags an entry forgets all of it.
fn tagged(abilities: &Abilities, context: Context) -> Result<(), Failed> {
    if context.vpid == 0 {
        Ok(())
    } else if abilities.ept_vpid.contains(EptVpid::INVVPID_SINGLE) {
        instr::invvpid(VPID_CONTEXT, [u64::from(context.vpid), 0])
    } else {
        instr::invvpid(VPID_ALL, [0, 0])
    }
}

fn linear(abilities: &Abilities, context: Context, address: u64) -> Result<(), Failed> {
    let precise = context.vpid != 0 && abilities.ept_vpid.contains(EptVpid::INVVPID_ADDRESS);
    if precise {
        instr::invvpid(VPID_ADDRESS, [u64::from(context.vpid), address])
    } else {
        tagged(abilities, context)
    }
}

fn all(abilities: &Abilities) -> Result<(), Failed> {
    if !mmu_core::busted!("forget_invept") {
        instr::invept(EPT_ALL, [0, 0])?;
    }
    if abilities.ept_vpid.contains(EptVpid::INVVPID_ALL) {
        instr::invvpid(VPID_ALL, [0, 0])?;
    }
    Ok(())
}
