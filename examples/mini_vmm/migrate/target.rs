//! The end that gets the VM: builds it from what arrives, and runs it once it is told to.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mmu_core::spte::SpteFormat;

use super::source::hash_of;
use super::wire::{Frame, Hello, Wire, WireError};
use crate::machine::Churn;
use crate::vmm::{Error, Vmm};
use crate::workload::Workload;

/// vCPUs of a VM that is taken, at most.
pub const MAX_VCPUS: u64 = 64;
/// Pages of a VM that is taken, at most: 4 GiB.
pub const MAX_PAGES: u64 = 1 << 20;
/// Rounds that are taken, at most.
pub const MAX_ROUNDS: u64 = 1000;
/// Turns of an empty loop after a step, at most.
const MAX_DELAY: u64 = 1 << 20;

/// A VM that arrived and is this end's.
pub struct Received<F: SpteFormat> {
    /// The VM; nothing ran yet.
    pub vmm: Arc<Vmm<F>>,
    /// What it runs.
    pub workload: Workload,
    /// Rounds that came, stop-and-copy included.
    pub rounds: u64,
    /// Pages that came, over all rounds.
    pub pages: u64,
    /// Hash of the memory, the same at both ends.
    pub hash: [u64; 2],
    /// Where to say that it runs.
    pub wire: Wire,
}

/// Take a VM. `make` builds one of the shape asked for; `ready` is called when all of it
/// is here and neither end runs.
///
/// # Errors
/// Anything before the VM was this end's. Nothing of it is left here.
pub fn receive<F: SpteFormat>(
    stream: TcpStream,
    timeout: Duration,
    make: impl FnOnce(&Hello) -> Result<Arc<Vmm<F>>, Error>,
    ready: impl FnOnce(&Arc<Vmm<F>>),
) -> Result<Received<F>, Error> {
    let mut wire = Wire::new(stream, timeout)?;
    let hello = match wire.receive()? {
        Frame::Hello(hello) => hello,
        other => return Err(unexpected(&other, "Hello")),
    };
    let made = judge(&hello).and_then(|workload| Ok((workload, make(&hello)?)));
    let (workload, vmm) = match made {
        Ok(made) => made,
        Err(error) => {
            // The peer may be gone; the error that matters is the first.
            let _ = wire.send(&Frame::Refuse(error.to_string()));
            return Err(error);
        }
    };
    wire.send(&Frame::Accept)?;
    let (mut rounds, mut pages) = (0, 0);
    let mut round = 0;
    // Ends: each round has at most as many pages as the VM, and their number is bounded.
    loop {
        match wire.receive()? {
            Frame::Pages(batch) => {
                round += batch.len() as u64;
                at_most("pages in a round", round, hello.pages)?;
                for (page, words) in batch.pages() {
                    at_most("page", page, hello.pages - 1)?;
                    vmm.fill_page(page, words);
                }
            }
            Frame::RoundEnd(count) if count == round => {
                pages += round;
                rounds += 1;
                // And one when it stands still.
                at_most("round", rounds, hello.rounds + 1)?;
                round = 0;
            }
            Frame::RoundEnd(count) => {
                let value =
                    WireError::Value { what: "pages in the round", value: count, most: round };
                return Err(value.into());
            }
            Frame::Final => break,
            other => return Err(unexpected(&other, "Pages, RoundEnd or Final")),
        }
    }
    let hash = hash_of(&vmm);
    ready(&vmm);
    wire.send(&Frame::Ready(hash))?;
    match wire.receive()? {
        Frame::Go(source) if source == hash => {
            Ok(Received { vmm, workload, rounds, pages, hash, wire })
        }
        Frame::Go(source) => Err(WireError::Differ { source, target: hash }.into()),
        other => Err(unexpected(&other, "Go")),
    }
}

fn unexpected(got: &Frame, wanted: &'static str) -> Error {
    WireError::Unexpected { got: got.name(), wanted }.into()
}

fn at_most(what: &'static str, value: u64, most: u64) -> Result<(), WireError> {
    if value <= most { Ok(()) } else { Err(WireError::Value { what, value, most }) }
}

/// Is that a VM that can be had here?
fn judge(hello: &Hello) -> Result<Workload, Error> {
    at_most("vCPUs", hello.vcpus, MAX_VCPUS)?;
    at_most("pages", hello.pages, MAX_PAGES)?;
    at_most("rounds", hello.rounds, MAX_ROUNDS)?;
    at_most("delay", hello.delay, MAX_DELAY)?;
    at_most("overlap", hello.overlap, 1)?;
    if hello.vcpus == 0 || hello.pages / 2 < hello.vcpus {
        let (vcpus, pages) = (hello.vcpus, hello.pages);
        return Err(
            format!("{vcpus} vCPUs with {pages} pages: each has a share of 2 or more").into()
        );
    }
    let Hello { multiplier, offset, written, delay, .. } = *hello;
    let churn = Churn { multiplier, offset, written, delay };
    let _ = churn.round(hello.pages)?;
    Ok(Workload { churn, overlap: hello.overlap == 1 })
}

impl<F: SpteFormat> Received<F> {
    /// Run the VM for at least `time`, until each vCPU has got further. Tells the source when they
    /// have begun; the answer is whether it could be told.
    pub fn run(&mut self, time: Duration) -> Result<Result<(), WireError>, Error> {
        let vmm = Arc::clone(&self.vmm);
        let workload = self.workload;
        let before = workload.steps(&vmm);
        let mut vcpus =
            (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        std::thread::scope(|scope| {
            let vmm = &vmm;
            let run = move || vmm.on_all(&mut vcpus, |vcpu| workload.run_until_stopped(vcpu));
            let running = scope.spawn(run);
            let begun = Instant::now();
            let wait = |until: &dyn Fn() -> bool| {
                while !until() && !running.is_finished() {
                    std::thread::sleep(Duration::from_micros(200));
                }
            };
            wait(&|| workload.steps(vmm).iter().zip(&before).all(|(now, before)| now > before));
            let told = self.wire.send(&Frame::Running);
            wait(&|| begun.elapsed() >= time);
            vmm.stop();
            let ran = running.join().map_err(|_| "the vCPUs' thread panicked")?;
            vmm.unstop();
            ran.map(|_| told)
        })
    }
}
