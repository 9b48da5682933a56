//! What the models share: running one, and a host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Run every interleaving of `body` and report how many there were.
pub(crate) fn explore(name: &str, body: impl Fn() + Send + Sync + 'static) {
    explore_up_to(name, None, body);
}

#[allow(dead_code, reason = "not every file has a bounded model")]
/// The same with at most `bound` preemptions, for a model that docs/loom_models.txt lists so.
pub(crate) fn explore_up_to(
    name: &str,
    bound: Option<usize>,
    body: impl Fn() + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.max_branches = 100_000;
    let executions = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&executions);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let executions = executions.load(Ordering::Relaxed);
    let bound = bound.map_or_else(|| "none".to_owned(), |bound| bound.to_string());
    println!("MODEL {name} executions={executions} bound={bound}");
}
