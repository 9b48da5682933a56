//! Aging by behaviour, with a fake MMU: `model` compares random traces with a page-by-page model,
//! `behaviour` states the rules one by one, `threads` reads while a pass writes.

mod behaviour;
mod fake;
mod model;
mod threads;
