//! A running VM moves to another process, or to another VM of this one.
//!
//! Holds: when neither end runs, the target's memory is the source's, byte for byte (two processes:
//! by hash); every page holds what its vCPU wrote, before and after; the target gets further than
//! the source came. When the connection is cut the source runs on and is whole, and the command
//! fails.

use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use mmu_core::spte::SpteFormat;

use super::{Builder, Error, Report, Shape};
use crate::log::Log;
use crate::migrate::source::{self, Plan, Sent, rate};
use crate::migrate::target::{self, MAX_ROUNDS};
use crate::migrate::wire::Hello;
use crate::report::Series;
use crate::vmm::Vmm;
use crate::workload::Workload;

/// Dirty pages that are left for when the VM stands still: one of so many.
const BOUND: u64 = 64;
/// Turns of the vCPUs' empty loop after each access: slower than memory is sent, or no round would
/// have less to send than the one before.
const DELAY: u64 = 100_000;
/// How long vCPUs write before the VM moves, and after.
const AWHILE: Duration = Duration::from_millis(100);
/// How long to try to reach a target that does not listen yet.
const PATIENCE: Duration = Duration::from_secs(10);

/// Run it.
pub fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let options = builder.options;
    match (&options.listen, &options.to) {
        (Some(_), Some(_)) => Err("--listen takes a VM, --to sends one: not both".into()),
        (Some(address), None) => {
            let listener = TcpListener::bind(address).map_err(|e| format!("{address}: {e}"))?;
            println!("listening on {}", listener.local_addr()?);
            let (stream, peer) = listener.accept()?;
            println!("a VM comes from {peer}");
            target_end(builder, stream, |_| {})
        }
        (None, Some(address)) => source_end(builder, connect(address)?, |_, report| {
            let detail = "by hash: the target is another process";
            report.check("memory-equal-at-both-ends", true, detail);
        }),
        (None, None) => both_ends(builder),
    }
}

/// The target may be started after the source.
fn connect(address: &str) -> Result<TcpStream, Error> {
    let begun = Instant::now();
    loop {
        let mut found = address.to_socket_addrs().map_err(|e| format!("{address}: {e}"))?;
        let to = found.next().ok_or_else(|| format!("{address}: no such place"))?;
        match TcpStream::connect_timeout(&to, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) if begun.elapsed() > PATIENCE => {
                return Err(format!("{address}: {error}").into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Both ends, over loopback: so memory can be compared byte for byte.
fn both_ends<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (arrived, target) = mpsc::channel::<Arc<Vmm<F>>>();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            let (stream, _) = listener.accept()?;
            target_end(builder, stream, |vmm| {
                let _ = arrived.send(Arc::clone(vmm));
            })
        });
        let report = source_end(builder, TcpStream::connect(address)?, |vmm, report| {
            // Sent before `Ready` was, and neither runs now.
            let Ok(target) = target.try_recv() else {
                report.check("memory-equal-at-both-ends", false, "there is no target");
                return;
            };
            let differs = |page: &u64| !vmm.page(*page).eq(target.page(*page));
            let differing = (0..vmm.shape.pages).filter(differs).count();
            let detail = format!("{differing} of {} pages differ", vmm.shape.pages);
            report.check("memory-equal-at-both-ends", differing == 0, detail);
        });
        let other = other.join().map_err(|_| "the target's thread panicked")?;
        let (mut report, other) = (report?, other?);
        report.checks.extend(other.checks);
        let target = |(name, value)| (format!("target_{name}"), value);
        report.counters.extend(other.counters.into_iter().map(target));
        Ok(report)
    })
}

/// The end that has the VM. `ready` is called when neither end runs.
fn source_end<F: SpteFormat>(
    builder: &Builder<'_, F>,
    stream: TcpStream,
    ready: impl FnOnce(&Vmm<F>, &mut Report),
) -> Result<Report, Error> {
    let options = builder.options;
    let workload = builder.workload(DELAY);
    let pages = builder.pages(16 << 20, 64 << 20);
    let vmm = builder.vmm(builder.logged_shape(pages)?)?;
    let mut report = builder.report("migrate", &vmm);
    let begun = Instant::now();
    let plan = Plan {
        hello: hello(&vmm, &workload, options.iterations.min(MAX_ROUNDS)),
        bound: pages / BOUND,
        timeout: Duration::from_secs(options.timeout),
    };
    let mut vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let _ = vmm.on_all(&mut vcpus, |vcpu| workload.populate(vcpu))?;

    let mut actor = vmm.actor()?;
    let mut log = Log::new(&vmm, options.mode);
    std::thread::scope(|scope| {
        let (vmm, vcpus) = (&vmm, &mut vcpus);
        let running =
            scope.spawn(move || vmm.on_all(vcpus, |vcpu| workload.run_until_stopped(vcpu)));
        std::thread::sleep(AWHILE);
        let sent = source::send(vmm, &mut actor, &mut log, stream, &plan, || {
            ready(vmm, &mut report);
        });
        let sent = match sent {
            Ok(sent) => {
                vmm.stop();
                let wrong = workload.verify(vmm);
                (Some(sent), wrong)
            }
            Err(error) => {
                report.check("handed-over", false, error.to_string());
                let wrong = runs_on(vmm, &workload, &mut report);
                vmm.stop();
                (None, wrong)
            }
        };
        let (sent, wrong) = sent;
        if let Some(sent) = sent {
            note(&sent, &mut report);
            drop(sent.paused);
        }
        let wrong = wrong?;
        report.check("source-is-whole", wrong.pages == 0, wrong.detail());
        let _ = running.join().map_err(|_| "the vCPUs' thread panicked")??;
        Ok::<_, Error>(())
    })?;
    report.seconds = begun.elapsed().as_secs_f64();
    drop((vcpus, actor));
    vmm.teardown(&mut report)?;
    Ok(report)
}

fn hello<F: SpteFormat>(vmm: &Vmm<F>, workload: &Workload, rounds: u64) -> Hello {
    let churn = workload.churn;
    Hello {
        vcpus: u64::from(vmm.shape.vcpus),
        pages: vmm.shape.pages,
        multiplier: churn.multiplier,
        offset: churn.offset,
        written: churn.written,
        delay: churn.delay,
        overlap: u64::from(workload.overlap),
        rounds,
    }
}

/// After a migration that failed: do all vCPUs go on, and is memory what it must be?
pub fn runs_on<F: SpteFormat>(
    vmm: &Vmm<F>,
    workload: &Workload,
    report: &mut Report,
) -> Result<crate::workload::Wrong, Error> {
    let before = workload.steps(vmm);
    let begun = Instant::now();
    let gone_on = || workload.steps(vmm).iter().zip(&before).all(|(now, before)| now > before);
    while !gone_on() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    let _still = vmm.pause();
    let detail = format!("steps {before:?}, then {:?}", workload.steps(vmm));
    report.check("source-runs-on", gone_on(), detail);
    workload.verify(vmm)
}

/// Put what is known of a migration into the report.
fn note(sent: &Sent<'_>, report: &mut Report) {
    let rounds = &sent.rounds;
    let detail = match &sent.unconfirmed {
        None => "the target said that it runs".to_owned(),
        Some(error) => format!("handed over, but no word that the target runs: {error}"),
    };
    report.check("handed-over", sent.unconfirmed.is_none(), detail);
    report.count("rounds", rounds.len() as u64);
    report.count("hash", sent.hash[0]);
    report.count("pages_sent", rounds.iter().map(|round| round.pages).sum());
    report.count("bytes_sent", sent.bytes);
    for (round, n) in rounds.iter().zip(1..) {
        println!(
            "  round {n}: {} pages sent, {:.1} MiB/s; {} dirtied meanwhile, {:.1} MiB/s",
            round.pages,
            rate(round.pages, round.seconds),
            round.dirtied,
            rate(round.dirtied, round.seconds),
        );
        report.metric(format!("round_{n}_sent_pages"), round.pages as f64);
        report.metric(format!("round_{n}_dirty_mib_per_s"), rate(round.dirtied, round.seconds));
    }
    let live = rounds.len().saturating_sub(1);
    let seconds: f64 = rounds.iter().take(live).map(|round| round.seconds).sum();
    let dirtied = rounds.iter().map(|round| round.dirtied).sum();
    report.metric("dirty_rate_mib_per_s", rate(dirtied, seconds));
    report.metric("downtime_ms", sent.downtime.as_secs_f64() * 1e3);
    report.metric("total_ms", sent.total.as_secs_f64() * 1e3);
    report.metric("sent_mib_per_s", rate(sent.bytes / 4096, sent.total.as_secs_f64()));
    let line = |name: &str, value: &dyn Fn(&source::Round) -> f64| Series {
        name: name.into(),
        points: (1..).zip(rounds).map(|(n, round)| (f64::from(n), value(round))).collect(),
    };
    report.plot = Some((
        format!("migration on {}: pages by round, stop-and-copy last", report.cpu),
        "round".into(),
        "pages".into(),
        vec![
            line("sent", &|round| round.pages as f64),
            line("dirtied meanwhile", &|round| round.dirtied as f64),
        ],
    ));
}

/// The end that takes the VM. `ready` is called when neither end runs.
fn target_end<F: SpteFormat>(
    builder: &Builder<'_, F>,
    stream: TcpStream,
    ready: impl FnOnce(&Arc<Vmm<F>>),
) -> Result<Report, Error> {
    let begun = Instant::now();
    let timeout = Duration::from_secs(builder.options.timeout);
    let make = |hello: &Hello| builder.vmm(Shape::new(hello.vcpus as u32, hello.pages));
    let mut received = target::receive(stream, timeout, make, ready)?;
    let vmm = Arc::clone(&received.vmm);
    let mut report = builder.report("migrate", &vmm);
    let before = received.workload.steps(&vmm);
    let wrong = received.workload.verify(&vmm)?;
    report.check("target-is-whole-on-arrival", wrong.pages == 0, wrong.detail());
    let told = received.run(AWHILE)?;
    let after = received.workload.steps(&vmm);
    let further = before.iter().zip(&after).all(|(before, after)| after > before);
    let detail = format!("steps {before:?}, then {after:?}");
    report.check("target-goes-on-running", further, detail);
    let wrong = received.workload.verify(&vmm)?;
    report.check("target-is-whole-after-running", wrong.pages == 0, wrong.detail());
    if let Err(error) = told {
        println!("  the source could not be told that the VM runs: {error}");
    }
    report.count("rounds", received.rounds);
    report.count("hash", received.hash[0]);
    report.count("pages_received", received.pages);
    report.seconds = begun.elapsed().as_secs_f64();
    drop(received);
    vmm.teardown(&mut report)?;
    Ok(report)
}
