//! Every failure point of a sequence in turn, as the kernel's `fail_nth` has it.
//!
//! Each step is tried with its first call of an IOMMU failing, then with its second, and so on, until it comes through
//! without one: early, and late, after the call has done its work and undone it. Or with memory for no table page, then
//! for one, then for two; where it has run out it stays out, so that the way back has none either. Or with a limit one page
//! below what is needed, at each account on the way up. After each failure the error has to be of its kind, and everything
//! as if the call had not been made; then the sequence goes on.

use crate::double::{Call, DERIVED, X86};
use crate::plain::Levels;
use crate::runner;
use crate::steps::{self, DEVICES, Pages, Step, Trouble, What};
use crate::world::World;
use proptest::collection::vec;
use proptest::prelude::*;

/// What is to fail, one point after the other.
#[derive(Clone, Copy, Debug)]
enum Points {
    Calls { late: bool },
    Tables,
    Limits,
}

/// No step has so many failure points.
const MOST_POINTS: u64 = 20_000;

fn points() -> impl Strategy<Value = Points> {
    prop_oneof![
        2 => any::<bool>().prop_map(|late| Points::Calls { late }),
        2 => Just(Points::Tables),
        1 => Just(Points::Limits),
    ]
}

impl World {
    /// Does a step at last, after it has failed at each of its points.
    fn take_at_last(&mut self, step: &Step, points: Points) {
        for number in 0..MOST_POINTS {
            let trouble = match points {
                Points::Calls { late } => Trouble::Call { number: number + 1, late },
                Points::Tables => Trouble::Tables(number),
                Points::Limits => return self.refuse_at_every_level(step),
            };
            if !self.take(step, trouble) {
                return;
            }
            self.compare();
        }
        panic!("{step:?} fails for ever");
    }

    /// Does a step that charges somebody, after each account above has refused it.
    fn refuse_at_every_level(&mut self, step: &Step) {
        let limits: Vec<Option<u64>> = self.levels.0.iter().map(|level| level.limit).collect();
        if matches!(step, Step::Register { .. } | Step::Grow { .. } | Step::Transfer { .. }) {
            for (account, before) in limits.into_iter().enumerate() {
                let limit = Some(Levels::charged(&self.registrations)[account]);
                self.take(&Step::Limit { account, limit }, Trouble::None);
                self.take(step, Trouble::None);
                self.compare();
                self.take(&Step::Limit { account, limit: before }, Trouble::None);
            }
        }
        self.take(step, Trouble::None);
    }
}

#[test]
fn whatever_fails_has_not_happened() {
    let steps = vec((steps::step(), points()), 1..25);
    runner::run("failures", 30, (steps::beginning(), steps), |(beginning, steps)| {
        let mut world = World::new();
        for step in &beginning {
            world.take(step, Trouble::None);
        }
        for (step, points) in &steps {
            world.take_at_last(step, *points);
            world.compare();
        }
        world.end();
    });
}

/// A table of x86-64 has one leaf for pages that may be written and pages that may be read and written. When the next table
/// refuses, it has to say both again, and there is no memory for a cut.
#[test]
fn going_back_needs_no_memory() {
    runner::run("failures", 1, Just(()), |()| {
        let mut world = World::new();
        let pages = |first, count| Pages { first, count };
        let map = |first, permissions| {
            let what = What { slot: 0, part: pages(first, 256), permissions };
            Step::Map { space: 0, at: first, what }
        };
        let register =
            Step::Register { slot: 0, object: 1, pages: pages(0, 512), account: 4, populated: false };
        let attach = |rid| {
            let device = DEVICES.iter().position(|known| *known == rid).unwrap();
            Step::Attach { device, space: 0, own: false }
        };
        let merge = Step::Merge { space: 0, pages: pages(0, 512) };
        for step in [register, attach(X86), attach(DERIVED), map(0, 3), map(256, 2), merge] {
            assert!(!world.take(&step, Trouble::None));
        }
        for free in 0..3 {
            world.double.switches.fail(Call::Protect, 2);
            let trouble = Trouble::Tables(free);
            assert!(world.take(&Step::Protect { space: 0, pages: pages(0, 512), permissions: 1 }, trouble));
            world.double.switches.fail(Call::Protect, 0);
            world.compare();
        }
        world.end();
    });
}
