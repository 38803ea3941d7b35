//! A device that came and went has left no trace.
//!
//! The same history twice: in one world a device comes, stays for a while and goes again, as often as it likes; in the
//! other it never was. In the end the native tables and the tables of all other devices have the very same leaves. What the
//! visitor's table has refused, which is said to whoever asked, has not happened, and so is not asked for in the other world.

use crate::double::DoubleTable;
use crate::runner;
use crate::steps::{self, DEVICES, END, GIANT, LAST, RIGID, SPACES, Step, Trouble};
use crate::world::World;
use ioasid::{IovaRange, Leaf, Rid};
use proptest::collection::vec;
use proptest::prelude::*;

/// Devices that reserve nothing, so that the visitor is in nobody's way.
const VISITORS: [usize; 6] = [4, 5, 6, 7, 8, 9];

#[derive(Clone, Debug)]
enum Event {
    Step(Step),
    Comes(usize),
    Goes,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => steps::step().prop_filter_map("nothing of the end, which the visitor cannot reach", |step| {
            reaches_low(&step).then_some(Event::Step(step))
        }),
        2 => prop_oneof![3 => Just(0), 1 => 1..SPACES].prop_map(Event::Comes),
        1 => Just(Event::Goes),
    ]
}

/// Whether a step can be done with the visitor there as without: nothing is mapped where its table cannot reach.
fn reaches_low(step: &Step) -> bool {
    match step {
        Step::Map { at, .. } | Step::Remap { at, .. } => *at < END - LAST,
        Step::Alias { at, pages, .. } => *at < END - LAST && pages.count <= GIANT.end,
        // What the visitor's table cannot reach must not be wanted by anybody else, and of a batch a part may be refused.
        Step::Allow { .. } | Step::Batch { .. } => false,
        _ => true,
    }
}

/// All leaves of all tables, by the space or the device they are for.
fn leaves(world: &World, but: usize) -> Vec<(Option<Rid>, Vec<Leaf>)> {
    let native = world.spaces.iter().map(|space| (None, space.leaves(IovaRange::ALL)));
    let derived = (0..DEVICES.len()).filter(|device| *device != but).filter_map(|device| {
        let table = world.devices[device].table()?;
        let derived = table.derived()?.as_any().downcast_ref::<DoubleTable>().unwrap();
        Some((Some(DEVICES[device]), derived.leaves()))
    });
    native.chain(derived).collect()
}

#[test]
fn a_device_that_came_and_went_has_left_no_trace() {
    let visitor = prop::sample::select(VISITORS.to_vec());
    let events = vec(event(), 1..40);
    runner::run("history", 60, (visitor, steps::beginning(), events), |(visitor, beginning, events)| {
        let (mut with, mut without) = (World::new(), World::new());
        let is_visitors = |step: &Step| matches!(step, Step::Attach { device, .. } | Step::Detach { device } if *device == visitor);
        let beginning = beginning.into_iter().map(Event::Step);
        for event in beginning.chain(events) {
            match event {
                Event::Comes(space) => {
                    with.take(&Step::Attach { device: visitor, space, own: false }, Trouble::None);
                }
                Event::Goes => {
                    with.take(&Step::Detach { device: visitor }, Trouble::None);
                }
                Event::Step(step) if is_visitors(&step) => {}
                Event::Step(step) => {
                    let takes_memory_away = matches!(
                        step,
                        Step::Register { .. }
                            | Step::Drop { .. }
                            | Step::Release { .. }
                            | Step::Revoke { .. }
                    );
                    // To unmap no more than what goes with memory is more than some tables can.
                    let goes = takes_memory_away && RIGID.contains(&DEVICES[visitor]);
                    if goes {
                        with.take(&Step::Detach { device: visitor }, Trouble::None);
                    }
                    with.take(&step, Trouble::None);
                    // A visitor that is still there refuses nobody to let memory go. What other devices refuse of it is
                    // refused in both worlds, after some of its mappings may be gone.
                    if takes_memory_away || !with.was_refused() {
                        without.take(&step, Trouble::None);
                    }
                }
            }
        }
        with.take(&Step::Detach { device: visitor }, Trouble::None);
        with.compare();
        without.compare();
        for space in 0..SPACES {
            assert_eq!(with.spaces[space].usable_ranges(), without.spaces[space].usable_ranges());
        }
        let (with_leaves, without_leaves) = (leaves(&with, visitor), leaves(&without, visitor));
        for (with, without) in with_leaves.into_iter().zip(without_leaves) {
            assert_eq!(with, without);
        }
        with.end();
        without.end();
    });
}
