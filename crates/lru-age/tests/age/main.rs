//! Aging by behaviour, with a fake MMU: `model` compares random traces with a page-by-page model,
//! `behaviour` states the rules one by one, `threads` reads while a pass writes; the others are
//! named after what they test.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test stops at the first surprise, in its helpers too"
)]

mod behaviour;
mod cold;
mod commands;
mod consumers;
mod evicting;
mod fake;
mod filters;
mod fleets;
mod model;
mod parallel;
mod refaults;
mod slices;
mod threads;
mod working_sets;
