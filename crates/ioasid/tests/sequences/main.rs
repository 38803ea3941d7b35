//! Sequences of whole calls against a model, with everything in play at once: spaces of every policy, derived tables of
//! every format, accounts, objects of every kind, snapshots.
//!
//! - [`steps`]: what can be done, and how sequences are drawn.
//! - [`plain`]: the model. [`world`]: the real thing beside it, and what each step does to both. [`checks`]: what is compared.
//! - [`failures`]: every failure point of a sequence in turn.
//! - [`history`]: a device that came and went has left no trace.
//! - [`threads`]: sequences side by side.
//! - [`runner`]: how long all of that goes on; `cargo xtask sequences` runs it for as long as wanted.

#[path = "../double/mod.rs"]
mod double;

mod checks;
mod failures;
mod history;
mod plain;
mod runner;
mod steps;
mod threads;
mod world;

use proptest::collection::vec;
use world::World;

#[test]
fn every_sequence_of_calls_does_what_the_model_does() {
    let steps = vec((steps::step(), steps::trouble()), 1..60);
    runner::run("calls", 60, (steps::beginning(), steps), |(beginning, steps)| {
        let mut world = World::new();
        for step in &beginning {
            world.take(step, steps::Trouble::None);
        }
        for (step, trouble) in &steps {
            world.take(step, *trouble);
            world.compare();
        }
        world.end();
    });
}
