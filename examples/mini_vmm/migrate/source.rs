//! The end that has the VM: sends its memory while its vCPUs write, then stops it and hands over.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use mmu_core::spte::SpteFormat;
use mmu_core::vm::Actor;

use super::wire::{Batch, Frame, Hash, Hello, Wire, WireError};
use crate::host::{Paused, VmmHost};
use crate::log::Log;
use crate::machine::PAGE;
use crate::pages::PageSet;
use crate::vmm::{Error, Vmm};

/// When to stop copying beside the running VM.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What the target is told; `rounds` is the number of rounds after which the VM is stopped
    /// whatever is dirty.
    pub hello: Hello,
    /// So few dirty pages are left for when the VM stands still.
    pub bound: u64,
    /// A frame takes no longer.
    pub timeout: Duration,
}

/// One round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Seconds it took, the harvest included.
    pub seconds: f64,
    /// Pages found dirty at its end.
    pub dirtied: u64,
}

/// A VM that was handed over, and stands still.
#[derive(Debug)]
pub struct Sent<'a> {
    /// Keeps it still.
    pub paused: Paused<'a>,
    /// The rounds beside the running VM; stop-and-copy is the last.
    pub rounds: Vec<Round>,
    /// From stopping the VM to the word that the target runs it, without the time in `ready`.
    pub downtime: Duration,
    /// All of it.
    pub total: Duration,
    /// Bytes sent.
    pub bytes: u64,
    /// Hash of the memory, the same at both ends.
    pub hash: [u64; 2],
    /// Why there was no word that the target runs it, if there was none.
    pub unconfirmed: Option<WireError>,
}

/// Hand over `vmm`, whose vCPUs may run. `ready` is called when both ends hold the same memory and
/// neither runs.
///
/// # Errors
/// Anything that went wrong before the VM was the target's: it is not logged any longer, and its
/// vCPUs go on.
pub fn send<'a, F: SpteFormat>(
    vmm: &'a Vmm<F>,
    actor: &mut Actor<VmmHost>,
    log: &mut Log,
    stream: TcpStream,
    plan: &Plan,
    ready: impl FnOnce(),
) -> Result<Sent<'a>, Error> {
    let mut wire = Wire::new(stream, plan.timeout)?;
    let begun = Instant::now();
    wire.send(&Frame::Hello(plan.hello))?;
    match wire.receive()? {
        Frame::Accept => {}
        Frame::Refuse(why) => return Err(WireError::Refused(why).into()),
        other => return Err(unexpected(&other, "Accept")),
    }
    log.enable(vmm, actor)?;
    let result = copy(vmm, actor, log, &mut wire, plan, begun, ready);
    // Handed over or not: nobody reads the log from here on.
    let disabled = log.disable(vmm, actor);
    let sent = result?;
    disabled?;
    Ok(sent)
}

fn unexpected(got: &Frame, wanted: &'static str) -> Error {
    WireError::Unexpected { got: got.name(), wanted }.into()
}

/// Everything while the log is on. An error drops `Paused`, if the VM stood still.
fn copy<'a, F: SpteFormat>(
    vmm: &'a Vmm<F>,
    actor: &mut Actor<VmmHost>,
    log: &mut Log,
    wire: &mut Wire,
    plan: &Plan,
    begun: Instant,
    ready: impl FnOnce(),
) -> Result<Sent<'a>, Error> {
    let mut rounds = Vec::new();
    // Everything once. What is written meanwhile, or was before the log was on, is in the next.
    let mut dirty = PageSet::all(vmm.shape.pages);
    // At most `plan.hello.rounds` times.
    loop {
        let start = Instant::now();
        let pages = send_pages(vmm, wire, &dirty)?;
        dirty = log.harvest(vmm, actor)?;
        let dirtied = dirty.len();
        rounds.push(Round { pages, seconds: start.elapsed().as_secs_f64(), dirtied });
        if dirtied <= plan.bound || rounds.len() as u64 >= plan.hello.rounds {
            break;
        }
    }

    let stopped = Instant::now();
    let paused = vmm.pause();
    dirty.union(&log.harvest(vmm, actor)?);
    let pages = send_pages(vmm, wire, &dirty)?;
    rounds.push(Round { pages, seconds: stopped.elapsed().as_secs_f64(), dirtied: 0 });
    // Both ends compute theirs at the same time.
    wire.send(&Frame::Final)?;
    let hash = hash_of(vmm);
    match wire.receive()? {
        Frame::Ready(target) if target == hash => {}
        Frame::Ready(target) => return Err(WireError::Differ { source: hash, target }.into()),
        other => return Err(unexpected(&other, "Ready")),
    }
    let compared = Instant::now();
    ready();
    let compared = compared.elapsed();
    // A target that is known to be gone does not get the VM.
    wire.still_open()?;
    // Not sent, not handed over. Sent, it may arrive: from here on the VM is the target's.
    wire.send(&Frame::Go(hash))?;
    let unconfirmed = match wire.receive() {
        Ok(Frame::Running) => None,
        Ok(other) => Some(WireError::Unexpected { got: other.name(), wanted: "Running" }),
        Err(error) => Some(error),
    };
    Ok(Sent {
        paused,
        rounds,
        downtime: stopped.elapsed().saturating_sub(compared),
        total: begun.elapsed(),
        bytes: wire.sent,
        hash,
        unconfirmed,
    })
}

/// One round of pages.
fn send_pages<F: SpteFormat>(
    vmm: &Vmm<F>,
    wire: &mut Wire,
    pages: &PageSet,
) -> Result<u64, WireError> {
    let mut count = 0;
    let mut frame = Frame::Pages(Batch::default());
    for page in pages.iter() {
        if let Frame::Pages(batch) = &mut frame {
            batch.push(page, vmm.page(page));
            count += 1;
            if !batch.is_full() {
                continue;
            }
        }
        wire.send(&frame)?;
        if let Frame::Pages(batch) = &mut frame {
            batch.clear();
        }
    }
    if matches!(&frame, Frame::Pages(batch) if !batch.is_empty()) {
        wire.send(&frame)?;
    }
    wire.send(&Frame::RoundEnd(count))?;
    Ok(count)
}

/// The hash of all data; the VM stands still.
pub fn hash_of<F: SpteFormat>(vmm: &Vmm<F>) -> [u64; 2] {
    let mut hash = Hash::new();
    (0..vmm.shape.pages).flat_map(|page| vmm.page(page)).for_each(|word| hash.add(word));
    hash.get()
}

/// Mebibytes per second.
pub fn rate(pages: u64, seconds: f64) -> f64 {
    (pages * PAGE) as f64 / f64::from(1 << 20) / seconds.max(1e-9)
}
