//! Aging by behaviour, with a fake MMU: `model` compares random traces with a page-by-page model,
//! `behaviour` states the rules one by one, `threads` reads while a pass writes.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test stops at the first surprise, in its helpers too"
)]

mod behaviour;
mod fake;
mod model;
mod threads;
