//! The engine under the `shuttle` model checker: whole spaces, with the tables of devices, memory and accounts, under
//! schedules drawn at random.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --release -p ioasid --test shuttle
//! ```
//!
//! It is the engine's own code that runs, with shuttle's atomics and locks in the place of the standard library's
//! (`src/sync.rs`, which says what is modelled otherwise than it is). Threads may change places at each of these, at each
//! write to a table's entry and some of the looks, and where the tests say so. Derived tables are those of the test double, which itself looks whether
//! the engine keeps its side of the contract. Only *sequentially consistent* executions occur: whether loads and stores are
//! ordered enough is loom's question (`tests/loom`).
//!
//! What is checked is what the owner of memory relies on ([`fixture::World`]): a page of memory is *lent* from before it is
//! mapped until the engine has said that no device reaches it, and whoever reads a page that is not lent fails. Half of
//! the schedules choose the next thread evenly at random, half change priorities at a few random places (PCT), which
//! reaches states that need one thread to sleep for long.
//!
//! `SHUTTLE_ITERATIONS=100` runs a hundred times as many schedules as otherwise. A failure prints its schedule, and
//! `shuttle::replay` takes it.

#![cfg(shuttle)]

mod attach;
mod bounds;
#[path = "../double/mod.rs"]
mod double;
mod fixture;
mod groups;
mod held;
mod iova;
mod ledger;
mod nested;
mod release;
mod routing;
mod unmap;
