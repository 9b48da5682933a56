//! What a machine's virtualization extension is to the rest of the program: [`Virt`] and [`Vcpu`],
//! implemented by `svm` (nested tables) and `vmx` (extended tables).
//!
//! The host (`host.rs`) and the suites are written against these two traits, so that each suite
//! runs on both. Nothing here knows an instruction, a control block or an MSR. A [`Vcpu`] belongs
//! to the CPU that made it: it is made, run and dropped there. No locks.

pub mod exit;
pub mod state;

use core::fmt;

use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::spte::{Capabilities, SpteFormat};

pub use exit::{Cause, Exit, NestedFault, RawFault, Stage};
pub use state::{GuestState, Mode, Segment, Table};

/// What this machine's extension can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Tables of five levels can be loaded.
    pub levels_5: bool,
    /// Leaves of 1 GiB exist.
    pub huge_1g: bool,
    /// Hardware sets accessed and dirty bits.
    pub accessed_dirty: bool,
    /// Trees can be used with hardware A and D off.
    pub accessed_dirty_off: bool,
    /// Entries may allow fetches and not reads.
    pub exec_only: bool,
    /// A log of pages that hardware made dirty (PML).
    pub log: bool,
    /// Translations can be dropped one linear address at a time (INVLPGA, INVVPID type 0).
    pub flush_linear: bool,
    /// Translations of one context can be dropped without those of others (FlushByAsid, INVEPT
    /// type 1). Otherwise [`LocalFlush::Context`] does it by a new ASID, or drops everything.
    pub flush_context: bool,
    /// Physical address bits that entries may use.
    pub phys_bits: u8,
    /// Tags for translations: ASIDs or VPIDs.
    pub tags: u32,
}

/// A tree of tables, as a CPU is told to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Its top table.
    pub frame: Pfn,
    /// Level of that table: 4 or 5.
    pub levels: Level,
    /// Does hardware set A and D? Only where [`Features::accessed_dirty_off`] is this a choice.
    pub accessed_dirty: bool,
}

/// What a vCPU forgets before its next instruction, on the CPU that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LocalFlush {
    /// The guest's translations of one linear address: INVLPGA, INVVPID of an address. Says
    /// nothing about what was cached under the guest's physical addresses.
    Linear(u64),
    /// Everything that was cached from this vCPU's tables: a new ASID or FLUSH_ASID, INVEPT of one
    /// context.
    Context,
    /// Everything of every guest on this CPU: FLUSH_ALL, INVEPT of all contexts.
    All,
}

/// How the guest's physical addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// By a tree of the extension's format; [`Vcpu::set_root`] names it.
    Nested,
    /// Not at all: the guest's CR3 is the host's business (shadow paging), and page faults and
    /// writes to control registers exit. Whatever the guest believes, the processor pages with PAE
    /// or long mode's tables, with CR0.WP and no-execute on.
    Shadow,
}

/// A page fault as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPageFault {
    /// What CR2 is to hold.
    pub address: u64,
    /// The error code that the processor pushes.
    pub code: u32,
}

/// Which pages a vCPU's dirty log is kept of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardwareLog {
    /// None.
    Off,
    /// Those whose D bit hardware sets; only where [`Features::log`].
    On,
}

/// What a vCPU is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuSetup {
    /// How addresses are translated.
    pub translation: Translation,
    /// Is there a hardware log?
    pub log: HardwareLog,
    /// Do the guest's own page faults exit ([`Exit::PageFault`])? Always with shadow paging.
    pub page_faults_exit: bool,
}

impl VcpuSetup {
    /// Nested tables, no log, page faults are the guest's.
    pub const NESTED: Self =
        Self { translation: Translation::Nested, log: HardwareLog::Off, page_faults_exit: false };
}

/// The extension refused; names the step and what the machine said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtError {
    /// What was tried.
    pub step: &'static str,
    /// The value that the machine had to say about it (an MSR, an instruction error).
    pub value: u64,
}

impl fmt::Display for VirtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {:#x}", self.step, self.value)
    }
}

/// A virtualization extension.
pub trait Virt: Sized + Send + Sync + 'static {
    /// Format of its tables.
    type Format: SpteFormat;
    /// Its vCPUs.
    type Vcpu: Vcpu;
    /// For messages: `npt on svm`, `ept on vmx`.
    const NAME: &'static str;
    /// The word of the command line that asks for it: `npt`, `ept`.
    const WORD: &'static str;

    /// What this CPU offers; `None` when it has no such extension, or the firmware locked it.
    fn detect() -> Option<Features>;

    /// Turn the extension on, on the calling CPU. Once for each CPU, before any vCPU.
    ///
    /// # Errors
    /// [`VirtError`] names the step.
    fn enable() -> Result<(), VirtError>;

    /// A vCPU of the calling CPU, in the state that a reset leaves, with no root.
    ///
    /// # Errors
    /// [`VirtError`] names the step.
    fn vcpu(setup: VcpuSetup) -> Result<Self::Vcpu, VirtError>;

    /// Capabilities for a tree of this format on this machine: the format's own, cut down to
    /// `features`.
    fn capabilities(features: &Features) -> Capabilities;
}

/// A virtual CPU.
pub trait Vcpu {
    /// The guest's registers, as the last exit left them; what is written here is what the next
    /// [`run`](Self::run) begins with.
    fn state(&mut self) -> &mut GuestState;

    /// Use this tree from the next [`run`](Self::run) on; everything cached from another one, or
    /// from this one before, is dropped first. With [`Translation::Shadow`] `root` is what the
    /// processor's own CR3 is to be while the guest runs, in the guest's paging mode.
    fn set_root(&mut self, root: Root);

    /// Drop this before the next instruction of the guest.
    fn flush(&mut self, what: LocalFlush);

    /// Run the guest until something ends it.
    ///
    /// Host interrupts are off when this is called and when it returns; one that is pending ends
    /// the run at once with [`Exit::Interrupt`], and has been taken by the host's handler when
    /// this returns. [`Exit::Out`], [`Exit::Halt`], [`Exit::Call`] and [`Exit::Cpuid`] leave RIP
    /// behind their instruction, every other exit on it. Nothing is injected that
    /// [`inject`](Self::inject) did not ask for.
    fn run(&mut self) -> Exit;

    /// Deliver a page fault to the guest before its next instruction. A delivery that an exit cuts
    /// short is done again by the next [`run`](Self::run).
    fn inject(&mut self, fault: GuestPageFault);

    /// Hand over the pages that the hardware log holds, oldest first, and empty it.
    fn take_log(&mut self, page: &mut dyn FnMut(Gfn));

    /// What the tables in use are tagged with, for messages.
    fn tag(&self) -> u64;
}
