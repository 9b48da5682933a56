//! `examples/mini_vmm migrate`, both ends in this process and between them a proxy that cuts the
//! connection where it likes: until the hand-over the source runs on and is whole, whatever
//! happens, and never do both ends run.

#![allow(dead_code, reason = "modules of the example, of which the test uses a part")]

#[path = "../examples/mini_vmm/cli.rs"]
mod cli;
#[path = "../examples/mini_vmm/host.rs"]
mod host;
#[path = "../examples/mini_vmm/log.rs"]
mod log;
#[path = "../examples/mini_vmm/machine.rs"]
mod machine;
#[path = "../examples/mini_vmm/migrate/mod.rs"]
mod migrate;
#[path = "../examples/mini_vmm/pages.rs"]
mod pages;
#[path = "../examples/mini_vmm/report.rs"]
mod report;
#[path = "../examples/mini_vmm/soft/mod.rs"]
mod soft;
#[path = "../examples/mini_vmm/vmm.rs"]
mod vmm;
#[path = "../examples/mini_vmm/workload.rs"]
mod workload;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cli::LogMode;
use log::Log;
use machine::Churn;
use migrate::source::{self, Plan};
use migrate::target;
use migrate::wire::{Batch, Frame, Hello, Wire, WireError};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use vmm::{Error, Shape, Vmm};
use workload::Workload;

/// For ends that are not silent: long, since the machine may be busy.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What the ends bear in silence, where that is what is tested.
const SILENCE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(20);
const PAGES: u64 = 160;

fn workload() -> Workload {
    let churn = Churn { multiplier: 0x1234_5677, offset: 3, written: 100, delay: 20 };
    Workload { churn, overlap: true }
}

fn boot(vcpus: u32, pages: u64) -> Result<Arc<Vmm<Ept>>, Error> {
    let shape = Shape::new(vcpus, pages);
    let walks = mmu_model::Format::Ept(mmu_model::Ept::new());
    let machine = soft::SoftMachine::new(&shape.layout(), vcpus, walks)?;
    let config = SpteConfig::<Ept>::new(Capabilities::ept())?;
    Vmm::new(Arc::new(machine), config, shape)
}

fn hello() -> Hello {
    let Churn { multiplier, offset, written, delay } = workload().churn;
    let (vcpus, pages, overlap, rounds) = (2, PAGES, 1, 3);
    Hello { vcpus, pages, multiplier, offset, written, delay, overlap, rounds }
}

fn plan(timeout: Duration) -> Plan {
    Plan { hello: hello(), bound: 0, timeout }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    Before,
    Within,
    After,
}

/// Where the proxy stops forwarding.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Kind of the frame, as on the wire, and which one of them, from 0.
    kind: u32,
    nth: u32,
    at: Where,
    /// The connection stays open, silent.
    stall: bool,
}

/// Forward frames until the cut; then close both connections, or neither.
fn forward(mut from: TcpStream, mut to: TcpStream, cut: Option<Cut>, closed: &AtomicBool) {
    let mut seen = 0;
    loop {
        let mut frame = vec![0; 16];
        if from.read_exact(&mut frame).is_err() {
            break;
        }
        let word = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().unwrap());
        let (kind, length) = (word(0), word(4) as usize);
        frame.resize(16 + length, 0);
        if from.read_exact(&mut frame[16..]).is_err() {
            break;
        }
        let same = cut.filter(|cut| cut.kind == kind);
        let here = same.filter(|cut| seen == cut.nth);
        seen += u32::from(same.is_some());
        let part = match here.map(|cut| cut.at) {
            Some(Where::Before) => 0,
            Some(Where::Within) => frame.len() / 2,
            Some(Where::After) | None => frame.len(),
        };
        if to.write_all(&frame[..part]).is_err() {
            break;
        }
        if let Some(cut) = here {
            if cut.stall {
                thread::sleep(4 * SILENCE);
            }
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
    closed.store(true, Ordering::SeqCst);
}

/// What became of a migration over a connection with this cut.
struct Ends {
    /// Handed over; and was it confirmed?
    sent: Result<Result<(), String>, Error>,
    /// Taken and run.
    ran: Result<(), Error>,
}

/// A source VM whose vCPUs run all the time.
struct Source {
    vmm: Arc<Vmm<Ept>>,
    log: Log,
}

impl Source {
    fn migrate(&mut self, cut: Option<Cut>, wait_for_close: bool) -> Ends {
        let near = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpListener::bind("127.0.0.1:0").unwrap();
        let (near_at, far_at) = (near.local_addr().unwrap(), far.local_addr().unwrap());
        let closed = AtomicBool::new(false);
        let timeout = if cut.is_some_and(|cut| cut.stall) { SILENCE } else { TIMEOUT };
        let vmm = Arc::clone(&self.vmm);
        let log = &mut self.log;
        thread::scope(|scope| {
            let closed = &closed;
            let target = scope.spawn(move || take(&far, timeout));
            scope.spawn(move || {
                let from = near.accept().unwrap().0;
                let to = TcpStream::connect(far_at).unwrap();
                let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
                scope.spawn(move || forward(back.0, back.1, cut, closed));
                forward(from, to, cut, closed);
            });
            let stream = TcpStream::connect(near_at).unwrap();
            let mut actor = vmm.actor().unwrap();
            let sent = source::send(&vmm, &mut actor, log, stream, &plan(timeout), || {
                let begun = Instant::now();
                while wait_for_close && !closed.load(Ordering::SeqCst) {
                    assert!(begun.elapsed() < PATIENCE, "the proxy did not cut");
                    thread::yield_now();
                }
            });
            let sent = sent.map(|sent| {
                let before = workload().steps(&vmm);
                let ran = target_may_have_run(&sent.unconfirmed);
                thread::sleep(Duration::from_millis(5));
                assert_eq!(workload().steps(&vmm), before, "it stands still");
                assert_eq!(workload().verify(&vmm).unwrap().pages, 0, "and is whole");
                ran
            });
            Ends { sent, ran: target.join().unwrap() }
        })
    }
}

fn target_may_have_run(unconfirmed: &Option<WireError>) -> Result<(), String> {
    unconfirmed.as_ref().map_or(Ok(()), |error| Err(error.to_string()))
}

/// The target: takes a VM, runs it for a moment, looks at it.
fn take(listener: &TcpListener, timeout: Duration) -> Result<(), Error> {
    let stream = listener.accept()?.0;
    let make = |hello: &Hello| boot(hello.vcpus as u32, hello.pages);
    let mut received = target::receive(stream, timeout, make, |_| {})?;
    assert_eq!(received.workload, workload());
    let before = workload().steps(&received.vmm);
    let _ = received.run(Duration::from_millis(5))?;
    assert_eq!(workload().verify(&received.vmm)?.pages, 0, "the target is whole");
    let after = workload().steps(&received.vmm);
    assert!(before.iter().zip(&after).all(|(before, after)| before < after), "it goes on");
    Ok(())
}

/// Run `test` on a source whose vCPUs write all the time.
fn with_source(test: impl FnOnce(&mut Source)) {
    let vmm = boot(2, PAGES).unwrap();
    let mut vcpus: Vec<_> = (0..2).map(|id| vmm.vcpu(id).unwrap()).collect();
    let _ = vmm.on_all(&mut vcpus, |vcpu| workload().populate(vcpu)).unwrap();
    let log = Log::new(&vmm, LogMode::Bitmap);
    thread::scope(|scope| {
        let vmm = &vmm;
        let run = move || vmm.on_all(&mut vcpus, |vcpu| workload().run_until_stopped(vcpu));
        let running = scope.spawn(run);
        struct Stop<'a>(&'a Vmm<Ept>);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        let stop = Stop(vmm);
        test(&mut Source { vmm: Arc::clone(vmm), log });
        drop(stop);
        running.join().unwrap().unwrap();
    });
    assert_eq!(workload().verify(&vmm).unwrap().pages, 0);
    let mut report = report::Report::new("migrate", "soft", 2, 0);
    vmm.teardown(&mut report).unwrap();
    assert!(report.ok(), "{:?}", report.checks);
}

fn assert_runs_on(vmm: &Vmm<Ept>, what: &str) {
    let before = workload().steps(vmm);
    let begun = Instant::now();
    while !workload().steps(vmm).iter().zip(&before).all(|(now, before)| now > before) {
        assert!(begun.elapsed() < PATIENCE, "{what}: the source stands still");
        thread::yield_now();
    }
    let _still = vmm.pause();
    let wrong = workload().verify(vmm).unwrap();
    assert_eq!(wrong.pages, 0, "{what}: {}", wrong.detail());
}

#[test]
fn a_cut_before_the_hand_over_leaves_the_source_running_and_whole() {
    with_source(|source| {
        // Hello, Accept, Pages (3 in the first round; how many in others is for the vCPUs to say),
        // RoundEnd, Final, Ready: all that comes before Go.
        let frames = [(1, 0), (2, 0), (4, 0), (4, 2), (5, 0), (5, 1), (6, 0), (7, 0)];
        for (kind, nth) in frames {
            for at in [Where::Before, Where::Within, Where::After] {
                if (kind, at) == (7, Where::After) {
                    continue;
                }
                let cut = Cut { kind, nth, at, stall: false };
                let ends = source.migrate(Some(cut), false);
                assert!(ends.sent.is_err(), "{cut:?}: handed over");
                assert!(ends.ran.is_err(), "{cut:?}: the target ran it");
                assert_runs_on(&source.vmm, &format!("{cut:?}"));
            }
        }
    });
}

#[test]
fn a_target_known_to_be_gone_before_go_does_not_get_the_vm() {
    with_source(|source| {
        let cut = Cut { kind: 7, nth: 0, at: Where::After, stall: false };
        let ends = source.migrate(Some(cut), true);
        let error = ends.sent.expect_err("the connection was closed before Go was due");
        assert!(error.downcast_ref::<WireError>().is_some(), "{error}");
        assert!(ends.ran.is_err());
        assert_runs_on(&source.vmm, "gone before Go");
    });
}

#[test]
fn silence_is_a_cut() {
    with_source(|source| {
        for (kind, at) in [(2, Where::Before), (4, Where::Within), (7, Where::Before)] {
            let cut = Cut { kind, nth: 0, at, stall: true };
            let ends = source.migrate(Some(cut), false);
            assert!(ends.sent.is_err() && ends.ran.is_err(), "{cut:?}");
            assert_runs_on(&source.vmm, &format!("{cut:?}"));
        }
    });
}

#[test]
fn after_go_at_most_one_end_runs() {
    for (kind, at, target_runs) in [
        (8, Where::Before, false),
        (8, Where::Within, false),
        (8, Where::After, true),
        (9, Where::Before, true),
        (9, Where::Within, true),
    ] {
        with_source(|source| {
            let cut = Cut { kind, nth: 0, at, stall: false };
            let ends = source.migrate(Some(cut), false);
            // The source found itself standing still and whole; see `migrate`.
            assert!(matches!(ends.sent, Ok(Err(_))), "{cut:?}: the source knows what it does not");
            assert_eq!(ends.ran.is_ok(), target_runs, "{cut:?}");
        });
    }
}

#[test]
fn a_connection_that_holds_moves_the_vm_even_after_some_that_did_not() {
    with_source(|source| {
        let cut = Cut { kind: 5, nth: 1, at: Where::After, stall: false };
        assert!(source.migrate(Some(cut), false).sent.is_err());
        let ends = source.migrate(None, false);
        ends.sent.unwrap().unwrap();
        ends.ran.unwrap();
    });
}

/// What a target says to a source that sends these frames.
fn answer_to(frames: Vec<Frame>) -> Error {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let source = scope.spawn(move || {
            let mut wire = Wire::new(TcpStream::connect(address).unwrap(), TIMEOUT).unwrap();
            for frame in frames {
                if wire.send(&frame).is_err() {
                    break;
                }
            }
            // Until the target has had enough.
            while wire.receive().is_ok() {}
        });
        let error = take(&listener, TIMEOUT).expect_err("a hostile source");
        source.join().unwrap();
        error
    })
}

#[test]
fn a_hostile_source_is_an_error_and_nothing_runs() {
    let value = |frames: Vec<Frame>| match answer_to(frames).downcast::<WireError>().map(|e| *e) {
        Ok(WireError::Value { what, value, .. }) => (what, value),
        other => panic!("{other:?}"),
    };
    let with = |change: &dyn Fn(&mut Hello)| {
        let mut bad = hello();
        change(&mut bad);
        vec![Frame::Hello(bad)]
    };
    assert_eq!(value(with(&|hello| hello.vcpus = u64::MAX)), ("vCPUs", u64::MAX));
    assert_eq!(value(with(&|hello| hello.pages = 1 << 40)), ("pages", 1 << 40));
    assert_eq!(value(with(&|hello| hello.rounds = 1 << 40)), ("rounds", 1 << 40));
    assert_eq!(value(with(&|hello| hello.overlap = 2)), ("overlap", 2));
    assert_eq!(value(with(&|hello| hello.delay = u64::MAX)), ("delay", u64::MAX));
    for change in [
        &(|hello: &mut Hello| hello.vcpus = 0) as &dyn Fn(&mut Hello),
        &|hello| hello.pages = 3,
        &|hello| hello.multiplier = 2,
    ] {
        let _ = answer_to(with(change));
    }
    let page = |number: u64| {
        let mut batch = Batch::default();
        batch.push(number, 0..512);
        Frame::Pages(batch)
    };
    let first = Frame::Hello(hello());
    assert_eq!(value(vec![first.clone(), page(PAGES)]), ("page", PAGES));
    assert_eq!(value(vec![first.clone(), page(u64::MAX)]), ("page", u64::MAX));
    let twice = std::iter::once(first.clone()).chain((0..=PAGES).map(|_| page(0))).collect();
    assert_eq!(value(twice), ("pages in a round", PAGES + 1));
    assert_eq!(value(vec![first.clone(), page(0), Frame::RoundEnd(2)]).0, "pages in the round");
    let rounds = std::iter::once(first.clone()).chain((0..5).map(|_| Frame::RoundEnd(0))).collect();
    assert_eq!(value(rounds), ("round", 5));
    for frames in [
        vec![Frame::Go([1, 2])],
        vec![first.clone(), first.clone()],
        vec![first.clone(), Frame::Go([1, 2])],
        // Not the hash of what it sent.
        vec![first.clone(), page(0), Frame::RoundEnd(1), Frame::Final, Frame::Go([1, 2])],
    ] {
        let error = answer_to(frames);
        assert!(error.downcast_ref::<WireError>().is_some(), "{error}");
    }
}

#[test]
fn a_hostile_target_is_an_error_and_the_source_runs_on() {
    with_source(|source| {
        for answers in [
            vec![Frame::Refuse("no room".to_owned())],
            vec![Frame::Go([1, 2])],
            vec![Frame::Accept, Frame::Ready([1, 2])],
            vec![Frame::Accept, Frame::Running, Frame::Running],
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let what = format!("{answers:?}");
            let (vmm, log) = (Arc::clone(&source.vmm), &mut source.log);
            thread::scope(|scope| {
                scope.spawn(move || {
                    let mut wire = Wire::new(listener.accept().unwrap().0, TIMEOUT).unwrap();
                    answers.iter().for_each(|frame| wire.send(frame).unwrap());
                    while wire.receive().is_ok() {}
                });
                let stream = TcpStream::connect(address).unwrap();
                let mut actor = vmm.actor().unwrap();
                let sent = source::send(&vmm, &mut actor, log, stream, &plan(TIMEOUT), || ());
                assert!(sent.is_err(), "{what}");
            });
            assert_runs_on(&source.vmm, &what);
        }
    });
}
