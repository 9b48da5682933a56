//! A virtual machine behind /dev/kvm whose page tables are whatever the test writes, before it
//! runs: one vCPU in long mode, one memory slot from address 0. A machine is used for one set of
//! tables and thrown away: nothing is ever changed under a vCPU that has run.

use std::ptr::{self, NonNull};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

pub const PAGE: u64 = 4096;
/// Where the descriptor tables are.
const GDT: u64 = 0;
const IDT: u64 = 0x100;
const TSS: u64 = 0x800;
/// A task state segment, then an I/O permission bitmap for 256 ports, then its end mark.
const TSS_BYTES: u64 = 104;
const TSS_LIMIT: u32 = 104 + 32;
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x18 | 3;
const USER_CODE: u16 = 0x20 | 3;
const TASK: u16 = 0x28;

/// Memory of the guest: ours until the machine runs, and again when it has stopped.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> std::io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing
        // that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("a mapping is not at 0");
        Ok(Self { base, len })
    }

    fn place(&self, at: u64, bytes: usize) -> *mut u8 {
        let at = at as usize;
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.len), "{at:#x}");
        self.base.as_ptr().wrapping_add(at)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, made by `new`, and the VM that used it is gone: see
        // the order of the fields of `Vm`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// What the vCPU's CPUID says about paging.
#[derive(Clone, Copy, Debug)]
pub struct Offered {
    pub amd: bool,
    pub max_phys_bits: u8,
    pub nx: bool,
    pub gbpages: bool,
    pub la57: bool,
    pub pku: bool,
}

impl Offered {
    fn of(cpuid: &CpuId) -> Self {
        let leaf = |function| {
            let entries = cpuid.as_slice().iter();
            entries.copied().find(|entry| entry.function == function && entry.index == 0)
        };
        let ebx = |function| leaf(function).map_or(0, |entry| entry.ebx);
        let ecx = |function| leaf(function).map_or(0, |entry| entry.ecx);
        let edx = |function| leaf(function).map_or(0, |entry| entry.edx);
        let width = leaf(0x8000_0008).map_or(36, |entry| entry.eax & 0xff);
        // "htuA" of AuthenticAMD, "ogyH" of HygonGenuine.
        let vendor = ebx(0);
        Self {
            amd: vendor == u32::from_le_bytes(*b"Auth") || vendor == u32::from_le_bytes(*b"Hygo"),
            max_phys_bits: u8::try_from(width).expect("a byte"),
            nx: edx(0x8000_0001) & 1 << 20 != 0,
            gbpages: edx(0x8000_0001) & 1 << 26 != 0,
            la57: ecx(7) & 1 << 16 != 0,
            pku: ecx(7) & 1 << 3 != 0,
        }
    }
}

/// Control registers.
#[derive(Clone, Copy, Debug)]
pub struct Controls {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

pub const CR0_PE: u64 = 1;
pub const CR0_WP: u64 = 1 << 16;
pub const CR0_PG: u64 = 1 << 31;
pub const CR4_PSE: u64 = 1 << 4;
pub const CR4_PAE: u64 = 1 << 5;
pub const CR4_LA57: u64 = 1 << 12;
pub const CR4_SMEP: u64 = 1 << 20;
pub const CR4_SMAP: u64 = 1 << 21;
pub const EFER_LME: u64 = 1 << 8;
pub const EFER_LMA: u64 = 1 << 10;
pub const EFER_NXE: u64 = 1 << 11;

/// One virtual machine. Fields are dropped in order: the memory last.
pub struct Vm {
    vcpu: VcpuFd,
    _vm: VmFd,
    pub offered: Offered,
    memory: Mapping,
}

/// Opens /dev/kvm; if it cannot be had, says why.
pub fn open() -> Result<Kvm, String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm does not open: {error}"))?;
    for (cap, what) in [(Cap::UserMemory, "memory slots"), (Cap::ExtCpuid, "CPUID")] {
        if !kvm.check_extension(cap) {
            return Err(format!("/dev/kvm does not offer {what}"));
        }
    }
    Ok(kvm)
}

impl Vm {
    /// A machine with `pages` pages of zeroes.
    pub fn new(kvm: &Kvm, pages: u64) -> Self {
        let memory = Mapping::new((pages * PAGE) as usize).expect("memory");
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: pages * PAGE,
            userspace_addr: memory.base.as_ptr() as u64,
        };
        // SAFETY: the region is the mapping made above, which outlives the VM (order of fields);
        // this process touches it only while the vCPU is outside the guest.
        unsafe { vm.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        // Some hosts do not list SMEP and SMAP and have them all the same; whether the control
        // register takes them decides.
        for entry in cpuid.as_mut_slice() {
            if entry.function == 7 && entry.index == 0 {
                entry.ebx |= 1 << 7 | 1 << 20;
            }
        }
        let vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
        vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");
        Self { vcpu, _vm: vm, offered: Offered::of(&cpuid), memory }
    }

    pub fn set(&self, at: u64, value: u64) {
        let place = self.memory.place(at, 8);
        // SAFETY: in bounds (checked by `place`); the vCPU is outside the guest, so nobody else
        // touches the memory.
        unsafe { place.cast::<u64>().write_unaligned(value) };
    }

    pub fn get(&self, at: u64) -> u64 {
        let place = self.memory.place(at, 8);
        // SAFETY: as in `set`.
        unsafe { place.cast::<u64>().read_unaligned() }
    }

    pub fn set_bytes(&self, at: u64, bytes: &[u8]) {
        let place = self.memory.place(at, bytes.len());
        // SAFETY: in bounds (checked by `place`), nobody else touches the memory, and `bytes` is
        // not part of it.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn sregs(&self, controls: &Controls) -> kvm_sregs {
        let mut sregs = self.vcpu.get_sregs().expect("KVM_GET_SREGS");
        (sregs.cr0, sregs.cr3) = (controls.cr0, controls.cr3);
        (sregs.cr4, sregs.efer) = (controls.cr4, controls.efer);
        sregs
    }

    /// Control registers alone, for translations.
    ///
    /// # Errors
    /// KVM does not accept them.
    pub fn set_controls(&self, controls: &Controls) -> Result<(), String> {
        let mut sregs = self.sregs(controls);
        let long = controls.efer & EFER_LMA != 0;
        sregs.cs = segment(KERNEL_CODE, 0xb, 0, long);
        self.vcpu.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))
    }

    /// KVM's own walk: where `gva` leads, whatever the permissions.
    pub fn translate(&self, gva: u64) -> Option<u64> {
        let found = self.vcpu.translate_gva(gva).expect("KVM_TRANSLATE");
        (found.valid != 0).then_some(found.physical_address)
    }

    /// Descriptor tables in page 0: a page fault goes to `handler`, everything else to a triple
    /// fault. Exceptions come in on the stack that ends at `stack`.
    pub fn install(&self, handler: u64, stack: u64) {
        let segments = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (at, descriptor) in (GDT..).step_by(8).zip(segments) {
            self.set(at, descriptor);
        }
        let gate = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40;
        let gate = gate | (handler >> 16 & 0xffff) << 48;
        self.set(IDT + 14 * 16, gate);
        self.set(IDT + 14 * 16 + 8, handler >> 32);
        self.set(TSS + 4, stack);
        self.set_bytes(TSS + 102, &(TSS_BYTES as u16).to_le_bytes());
        self.set_bytes(TSS + u64::from(TSS_LIMIT), &[0xff]);
    }

    /// Run from `regs` at this privilege level until the program's `out`.
    ///
    /// # Errors
    /// Any other exit.
    pub fn run(&mut self, controls: &Controls, regs: &kvm_regs, ring: u8) -> Result<(), String> {
        let mut sregs = self.sregs(controls);
        let user = ring == 3;
        sregs.cs = segment(if user { USER_CODE } else { KERNEL_CODE }, 0xb, ring, true);
        let data = segment(if user { USER_DATA } else { KERNEL_DATA }, 0x3, ring, false);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: TSS_LIMIT,
            selector: TASK,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
        sregs.gdt = kvm_dtable { base: GDT, limit: 5 * 8 - 1, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable { base: IDT, limit: 32 * 16 - 1, ..kvm_dtable::default() };
        self.vcpu.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))?;
        self.vcpu.set_regs(regs).map_err(|error| format!("KVM_SET_REGS: {error}"))?;
        loop {
            let exit = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(_, _)) => return Ok(()),
                Ok(exit) => format!("{exit:?}"),
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(error) => format!("KVM_RUN: {error}"),
            };
            let regs = self.vcpu.get_regs();
            let cr2 = self.vcpu.get_sregs().map(|sregs| sregs.cr2);
            return Err(format!("{exit}; {regs:x?}; cr2 {cr2:x?}"));
        }
    }
}

fn segment(selector: u16, kind: u8, ring: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: ring,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}
