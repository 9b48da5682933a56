//! The guest half of a VMCS and [`GuestState`], one made from the other.
//!
//! Owns [`Shadowed`], which remembers what the VMCS holds so that an entry writes only what
//! changed: inside a hypervisor each VMWRITE may be an exit. Neighbours: `vmcs`. No locks.

use x86::vmx::vmcs::{control, guest};

use super::abilities::Abilities;
use super::instr;
use crate::virt::state::gpr;
use crate::virt::{GuestState, Segment, Translation};

/// Access rights, bit 16: the segment is not usable.
const UNUSABLE: u64 = 1 << 16;
/// CR0.PE and PG, which guests in extended tables may have 0.
const CR0_FREE: u64 = 1 | 1 << 31;
/// What a processor that walks shadow tables has on: CR0.WP (PG it has anyway), CR4.PAE, EFER.NXE.
const SHADOW_CR0: u64 = 1 << 16;
const SHADOW_CR4: u64 = 1 << 5;
const SHADOW_EFER: u64 = 1 << 11;

/// The first field of each segment register's selector, limit, access rights and base; the fields
/// of the others follow in the processor's order, two apart.
const SEGMENT: [u32; 4] =
    [guest::ES_SELECTOR, guest::ES_LIMIT, guest::ES_ACCESS_RIGHTS, guest::ES_BASE];
const SEGMENTS: usize = 8;

/// The fields after the segments, in the order of [`Shadowed::pack`].
const OTHERS: [u32; 15] = [
    guest::GDTR_BASE,
    guest::GDTR_LIMIT,
    guest::IDTR_BASE,
    guest::IDTR_LIMIT,
    guest::RSP,
    guest::RIP,
    guest::RFLAGS,
    guest::CR0,
    guest::CR3,
    guest::CR4,
    guest::IA32_EFER_FULL,
    guest::PDPTE0_FULL,
    guest::PDPTE1_FULL,
    guest::PDPTE2_FULL,
    guest::PDPTE3_FULL,
];
const FIELDS: usize = 4 * SEGMENTS + OTHERS.len();

/// Number of field `index`.
fn field(index: usize) -> u32 {
    match index.checked_sub(4 * SEGMENTS) {
        Some(other) => OTHERS[other],
        None => SEGMENT[index % 4] + 2 * (index / 4) as u32,
    }
}

fn segments(state: &GuestState) -> [&Segment; SEGMENTS] {
    let GuestState { es, cs, ss, ds, fs, gs, ldtr, tr, .. } = state;
    [es, cs, ss, ds, fs, gs, ldtr, tr]
}

fn segments_mut(state: &mut GuestState) -> [&mut Segment; SEGMENTS] {
    let GuestState { es, cs, ss, ds, fs, gs, ldtr, tr, .. } = state;
    [es, cs, ss, ds, fs, gs, ldtr, tr]
}

/// What stands in the guest half, and how control registers differ from what the guest sees.
#[derive(Debug)]
pub struct Shadowed {
    /// `None` where nothing was written yet.
    held: [Option<u64>; FIELDS],
    /// Bits of CR0 and CR4 that are the host's, and must be 1.
    cr0_ones: u64,
    cr4_ones: u64,
    /// Bits of CR0 and CR4 whose change by the guest exits.
    cr0_mask: u64,
    cr4_mask: u64,
    /// Bits of EFER that are the host's.
    efer_ones: u64,
    /// CR3 while the guest runs, where it is not the guest's.
    shadow_root: Option<u64>,
    /// What the guest reads in the bits that are the host's.
    read_shadows: Option<(u64, u64)>,
}

impl Shadowed {
    /// For a VMCS that is new and current.
    pub fn new(translation: Translation) -> Self {
        let (cr0_ones, cr4_ones) = Abilities::fixed_ones();
        let (ones, masks, efer_ones, shadow_root) = match translation {
            Translation::Nested => {
                let cr0_ones = cr0_ones & !CR0_FREE;
                ((cr0_ones, cr4_ones), (cr0_ones, cr4_ones), 0, None)
            }
            Translation::Shadow => {
                let ones = (cr0_ones | SHADOW_CR0, cr4_ones | SHADOW_CR4);
                (ones, (u64::MAX, u64::MAX), SHADOW_EFER, Some(0))
            }
        };
        let ((cr0_ones, cr4_ones), (cr0_mask, cr4_mask)) = (ones, masks);
        write_harmless(control::CR0_GUEST_HOST_MASK, cr0_mask);
        write_harmless(control::CR4_GUEST_HOST_MASK, cr4_mask);
        Self {
            held: [None; FIELDS],
            cr0_ones,
            cr4_ones,
            cr0_mask,
            cr4_mask,
            efer_ones,
            shadow_root,
            read_shadows: None,
        }
    }

    /// Use this CR3 while the guest runs (shadow paging).
    pub fn set_shadow_root(&mut self, root: u64) {
        self.shadow_root = Some(root);
    }

    fn pack(&self, state: &GuestState) -> [u64; FIELDS] {
        let mut values = [0; FIELDS];
        let (parts, others) = values.split_at_mut(4 * SEGMENTS);
        for (part, segment) in parts.chunks_exact_mut(4).zip(segments(state)) {
            let unusable = if segment.is_present() { 0 } else { UNUSABLE };
            part[0] = u64::from(segment.selector);
            part[1] = u64::from(segment.limit);
            part[2] = u64::from(segment.access) | unusable;
            part[3] = segment.base;
        }
        others.copy_from_slice(&[
            state.gdtr.base,
            u64::from(state.gdtr.limit),
            state.idtr.base,
            u64::from(state.idtr.limit),
            state.gpr[gpr::RSP],
            state.rip,
            state.rflags,
            state.cr0 | self.cr0_ones,
            self.shadow_root.unwrap_or(state.cr3),
            state.cr4 | self.cr4_ones,
            state.efer | self.efer_ones,
            state.pdpte[0],
            state.pdpte[1],
            state.pdpte[2],
            state.pdpte[3],
        ]);
        values
    }

    /// Write what differs into the current VMCS.
    pub fn store(&mut self, state: &GuestState) {
        let values = self.pack(state);
        for (index, (held, value)) in self.held.iter_mut().zip(values).enumerate() {
            if *held != Some(value) {
                instr::write_guest(field(index), value);
                *held = Some(value);
            }
        }
        let shadows = (state.cr0, state.cr4);
        if self.read_shadows != Some(shadows) {
            write_harmless(control::CR0_READ_SHADOW, shadows.0);
            write_harmless(control::CR4_READ_SHADOW, shadows.1);
            self.read_shadows = Some(shadows);
        }
    }

    /// Read the guest half of the current VMCS.
    pub fn load(&mut self, state: &mut GuestState) {
        let mut values = [0; FIELDS];
        for (index, (held, value)) in self.held.iter_mut().zip(&mut values).enumerate() {
            *value = instr::field(field(index));
            *held = Some(*value);
        }
        let (parts, others) = values.split_at(4 * SEGMENTS);
        for (part, segment) in parts.chunks_exact(4).zip(segments_mut(state)) {
            // Fields of these widths.
            segment.selector = part[0] as u16;
            segment.limit = part[1] as u32;
            segment.access = if part[2] & UNUSABLE == 0 { part[2] as u16 } else { 0 };
            segment.base = part[3];
        }
        let mut others = others.iter().copied();
        let mut next = || others.next().unwrap_or_default();
        state.gdtr.base = next();
        state.gdtr.limit = next() as u16;
        state.idtr.base = next();
        state.idtr.limit = next() as u16;
        state.gpr[gpr::RSP] = next();
        state.rip = next();
        state.rflags = next();
        state.cr0 = next() & !self.cr0_mask | state.cr0 & self.cr0_mask;
        let cr3 = next();
        if self.shadow_root.is_none() {
            state.cr3 = cr3;
        }
        state.cr4 = next() & !self.cr4_mask | state.cr4 & self.cr4_mask;
        let efer = next();
        // What the guest believes otherwise; it does not write it unseen.
        if self.shadow_root.is_none() {
            state.efer = efer;
        }
        state.pdpte = core::array::from_fn(|_| next());
    }
}

/// Change a field that decides only what the guest reads in control registers, and which of its
/// writes exit.
fn write_harmless(field: u32, value: u64) {
    // SAFETY: masks and read shadows: they make the processor do nothing to the host.
    if let Err(error) = unsafe { instr::write(field, value) } {
        panic!("VMWRITE of {field:#x}: {error:?}");
    }
}
