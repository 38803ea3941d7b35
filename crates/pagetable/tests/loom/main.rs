//! The walker under the `loom` model checker: every interleaving of two or three threads, with every value that
//! the memory model lets a load return, up to a number of preemptions.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p ioasid-pagetable --test loom
//! ```
//!
//! It is the crate's own code that runs, over a format with two index bits, so that a table has four entries.
//! Three preemptions are tried unless `LOOM_MAX_PREEMPTIONS` says otherwise. Counters that order nothing
//! (`GENERATIONS`, and how many empty tables are kept) are not loom's: their operations are no
//! points at which threads change places, and no assertion here depends on them.
//!
//! Of a store loom asks only who was the last to access the word before. A thread that loads a word and then exchanges
//! it is last there itself, and hides others that only look. So those who only look are spawned last, and with that run
//! after the others in the first execution: their loads are then followed back to every store.
//!
//! Freed tables are not returned to the heap but filled with leaves of nonsense, as if another table used them:
//! whoever follows a stale way is found out.

#![cfg(loom)]

mod changes;
mod claims_and_walks;
mod fixture;
mod retirement;
mod table;
