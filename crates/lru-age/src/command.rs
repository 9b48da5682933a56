//! The commands of the `lru_gen` text form (KVM row 5.35): what operators and scripts know.
//!
//! [`parse`] reads a text of commands, [`Commander`] is who carries them out, [`run`] does one
//! after the other and stops at the first error, as a write to the kernel's file does.
//! [`run_aging`] and [`run_eviction`] are what a commander calls for one VM. Errors carry the
//! kernel's numbers ([`CommandError::errno`]).

use core::fmt;

use mmu_core::traits::AgeRange;

use crate::AgeError;
use crate::evict::Candidate;
use crate::r#gen::{MIN_NR_GENS, Seq};
use crate::pass::{AgePass, PassOptions, PassReport, Scan};
use crate::policy::{EvictPolicy, Swappiness};
use crate::reclaim::{EvictOptions, EvictReport, Take};
use crate::table::AgeTable;

/// Words of a command at most.
const MAX_WORDS: usize = 6;

/// Which VM a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmNode {
    /// The first number: upstream's memcg.
    pub vm: u32,
    /// The second: upstream's NUMA node.
    pub node: u32,
}

/// One command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `+ vm node seq [can_swap|swappiness [force_scan]]`: run one pass, if `seq` is not in the
    /// future.
    Age {
        /// For whom.
        target: VmNode,
        /// The youngest generation as the user knows it.
        seq: Seq,
        /// Has no effect: the text form has the word, so it is read, and refused above 201.
        /// Upstream chooses by it whose oldest generation makes room; here both kinds share one,
        /// and a pass looks at the pages of both.
        swappiness: Option<Swappiness>,
        /// Full unless the last word is 0 (row 5.29).
        scan: Scan,
    },
    /// `- vm node seq [swappiness [pages]]`: evict generations up to `seq`.
    Evict {
        /// For whom.
        target: VmNode,
        /// The youngest generation to evict.
        seq: Seq,
        /// `None`: the VM's own.
        swappiness: Option<Swappiness>,
        /// Pages at most; `u64::MAX` when not given.
        pages: u64,
    },
}

/// Why a command was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommandError {
    /// Not a command: another first character, a word missing, too much, or not a number.
    Malformed {
        /// Which command of the text, from 0.
        number: u64,
    },
    /// A swappiness above 201.
    Swappiness {
        /// What was given.
        given: u64,
    },
    /// No VM of this number, or it has no such node.
    UnknownVm {
        /// What was given.
        target: VmNode,
    },
    /// `+`: a generation that does not exist yet.
    Future {
        /// What was given.
        seq: Seq,
        /// The youngest there is.
        max_seq: Seq,
    },
    /// `-`: a generation that is too young to go.
    TooYoung {
        /// What was given.
        seq: Seq,
        /// The youngest there is.
        max_seq: Seq,
    },
    /// `+`: somebody else advanced the youngest generation meanwhile, or is about to.
    Advanced {
        /// The youngest generation now.
        max_seq: Seq,
    },
    /// The caller was told to stop.
    Interrupted,
    /// The table refused for another reason.
    Refused(AgeError),
}

impl CommandError {
    /// The error number that the kernel gives for it, positive: EINTR 4, ENOMEM 12, EEXIST 17,
    /// EINVAL 22.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Interrupted => 4,
            Self::Advanced { .. } => 17,
            Self::Refused(AgeError::OutOfMemory { .. } | AgeError::NoMemoryFor { .. }) => 12,
            Self::Malformed { .. }
            | Self::Swappiness { .. }
            | Self::UnknownVm { .. }
            | Self::Future { .. }
            | Self::TooYoung { .. }
            | Self::Refused(_) => 22,
        }
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed { number } => write!(f, "command {number} is none"),
            Self::Swappiness { given } => write!(f, "swappiness {given} is above 201"),
            Self::UnknownVm { target } => {
                write!(f, "there is no VM {} with node {}", target.vm, target.node)
            }
            Self::Future { seq, max_seq } => {
                write!(f, "generation {seq} is younger than the youngest, {max_seq}")
            }
            Self::TooYoung { seq, max_seq } => {
                write!(f, "generation {seq} is active while {max_seq} is the youngest")
            }
            Self::Advanced { max_seq } => {
                write!(f, "somebody else advanced the youngest generation to {max_seq}")
            }
            Self::Interrupted => f.write_str("interrupted"),
            Self::Refused(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for CommandError {}

/// Every command of a text: separated by commas, semicolons or newlines; empty ones are skipped.
pub fn parse(text: &str) -> impl Iterator<Item = Result<Command, CommandError>> {
    let parts = text.split([',', ';', '\n']).map(str::trim_ascii_start);
    let commands = parts.filter(|part| !part.is_empty());
    (0..).zip(commands).map(|(number, part)| command(part, number))
}

/// Carries out commands for the VMs that it knows.
pub trait Commander {
    /// Do it.
    ///
    /// # Errors
    /// [`CommandError::UnknownVm`] for a target that it does not know; else what [`run_aging`] and
    /// [`run_eviction`] say.
    fn command(&mut self, command: &Command) -> Result<(), CommandError>;
}

/// Carry out the commands of `text` in order, up to the first that fails. Returns how many were.
///
/// # Errors
/// That of the command that failed; the ones before it are done.
pub fn run<C: Commander>(text: &str, commander: &mut C) -> Result<u64, CommandError> {
    let mut done = 0;
    for command in parse(text) {
        commander.command(&command?)?;
        done += 1;
    }
    Ok(done)
}

fn command(text: &str, number: u64) -> Result<Command, CommandError> {
    let malformed = CommandError::Malformed { number };
    let (sign, rest) = text.split_at_checked(1).ok_or(malformed)?;
    let mut words = [""; MAX_WORDS];
    for (at, word) in rest.split_ascii_whitespace().enumerate() {
        *words.get_mut(at).ok_or(malformed)? = word;
    }
    let [vm, node, seq, swap, last, more] = words;
    let small = |word: &str| word.parse::<u32>().map_err(|_| malformed);
    let number = |word: &str| word.parse::<u64>().map_err(|_| malformed);
    let target = VmNode { vm: small(vm)?, node: small(node)? };
    let seq = Seq::new(number(seq)?);
    if !more.is_empty() {
        return Err(malformed);
    }
    let swappiness = match swap {
        "" => None,
        "max" => Some(Swappiness::ANON_ONLY),
        word => {
            let given = number(word)?;
            let value = u8::try_from(given).ok().and_then(Swappiness::new);
            Some(value.ok_or(CommandError::Swappiness { given })?)
        }
    };
    let last = if last.is_empty() { None } else { Some(number(last)?) };
    match sign {
        "+" => {
            let scan = if last == Some(0) { Scan::Filtered } else { Scan::Full };
            Ok(Command::Age { target, seq, swappiness, scan })
        }
        "-" => Ok(Command::Evict { target, seq, swappiness, pages: last.unwrap_or(u64::MAX) }),
        _ => Err(malformed),
    }
}

/// `+` for one VM: a whole pass. `options` says how, but for what is looked at, which is `scan`.
/// The command's swappiness is not asked for: aging has no use for it.
///
/// # Errors
/// [`CommandError::Future`]; [`CommandError::Advanced`] when another pass is under way or finished
/// first; [`CommandError::Refused`] for the rest.
pub fn run_aging<M: AgeRange>(
    table: &AgeTable,
    seq: Seq,
    scan: Scan,
    options: PassOptions,
    now_ms: u64,
    mmu: &M,
    reader: &mut M::Reader,
) -> Result<PassReport, CommandError> {
    let max_seq = table.window().max_seq();
    if seq > max_seq {
        return Err(CommandError::Future { seq, max_seq });
    }
    let mut pass = match AgePass::start_with(table, PassOptions { scan, ..options }) {
        Ok(pass) => pass,
        Err(AgeError::Busy) => return Err(CommandError::Advanced { max_seq }),
        Err(error) => return Err(CommandError::Refused(error)),
    };
    let started = pass.seq();
    if started != max_seq {
        return Err(CommandError::Advanced { max_seq: started });
    }
    let mut at = None;
    loop {
        let next = pass.step(mmu, reader, STEP).next;
        // An MMU without progress said all that it will say.
        if next.is_none() || next == at {
            return Ok(pass.finish(now_ms));
        }
        at = next;
    }
}

/// Entries per step of a commanded pass.
const STEP: u64 = 1 << 16;

/// `-` for one VM: evict generations up to `seq`, or `options.pages` pages. `take` as for
/// [`AgeEditor::evict`](crate::AgeEditor::evict); it says [`Take::Stop`] when a signal is pending.
///
/// # Errors
/// [`CommandError::TooYoung`]; [`CommandError::Interrupted`] after a stop;
/// [`CommandError::Refused`] when the editor is taken.
pub fn run_eviction<M: AgeRange, P: EvictPolicy>(
    table: &AgeTable,
    seq: Seq,
    policy: &mut P,
    options: &EvictOptions,
    mmu: &M,
    reader: &mut M::Reader,
    take: impl FnMut(&Candidate) -> Take,
) -> Result<EvictReport, CommandError> {
    let max_seq = table.window().max_seq();
    if seq.get().saturating_add(MIN_NR_GENS) > max_seq.get() {
        return Err(CommandError::TooYoung { seq, max_seq });
    }
    let mut editor = table.edit().map_err(CommandError::Refused)?;
    let options = EvictOptions { until: Some(seq), ..*options };
    let report = editor.evict(mmu, reader, policy, &options, take);
    if report.end == crate::EvictEnd::Stopped {
        return Err(CommandError::Interrupted);
    }
    Ok(report)
}
