//! Limits in levels, as control groups have them.
//!
//! Each ID in use is charged to the limit of its set and to every limit above. A charge that one of them refuses is made
//! nowhere, and counted at the level that refused. Moving a set under another limit is never refused, so a level can have
//! more than its maximum; then it refuses until enough has gone.
//!
//! The numbers are guarded by the system's lock, which whoever charges holds anyway. So all levels change at once, and
//! nobody sees a charge that is going to be taken back.

use super::state::State;
use super::{OverLimit, PasidSystem};
use slab::Slab;
use std::fmt;
use std::sync::Arc;

/// A maximum for the PASIDs of all sets below it. Clones are the same limit; it goes with the last clone, set and limit
/// that is below it.
pub struct Limit {
    pub(super) system: Arc<PasidSystem>,
    pub(super) level: u32,
}

/// The numbers of a limit at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitUsage {
    /// Its name.
    pub name: String,
    /// How many IDs there may be; `None`: any number.
    pub max: Option<u32>,
    /// How many there are, in all sets below.
    pub current: u32,
    /// The most that there ever were.
    pub peak: u32,
    /// How many allocations this level has refused.
    pub events: u64,
}

/// A level.
#[derive(Debug)]
pub(super) struct Level {
    pub(super) usage: LimitUsage,
    parent: Option<u32>,
    /// Handles, sets, and levels below.
    users: usize,
}

/// The levels of a system.
#[derive(Debug, Default)]
pub(super) struct Levels(Slab<Level>);

impl Levels {
    pub(super) fn add(&mut self, name: String, max: Option<u32>, parent: Option<u32>) -> u32 {
        if let Some(parent) = parent {
            self.hold(parent);
        }
        let usage = LimitUsage { name, max, current: 0, peak: 0, events: 0 };
        self.0.insert(Level { usage, parent, users: 1 }) as u32
    }

    pub(super) fn hold(&mut self, level: u32) {
        self.0[level as usize].users += 1;
    }

    /// One user less; the level goes with the last, and then perhaps those above.
    pub(super) fn release(&mut self, level: u32) {
        let mut next = Some(level);
        while let Some(level) = next {
            let users = &mut self.0[level as usize].users;
            *users -= 1;
            next = if *users == 0 { self.0.remove(level as usize).parent } else { None };
        }
    }

    pub(super) fn usage(&self, level: u32) -> &LimitUsage {
        &self.0[level as usize].usage
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn usage_mut(&mut self, level: u32) -> &mut LimitUsage {
        &mut self.0[level as usize].usage
    }

    /// The level and all above.
    fn path(&self, level: u32) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(Some(level), |level| self.0[*level as usize].parent)
    }

    /// Charges one ID to the level and all above, or nowhere.
    pub(super) fn charge(&mut self, level: u32) -> Result<(), OverLimit> {
        let full = |usage: &LimitUsage| usage.max.is_some_and(|max| usage.current >= max);
        let refusing = self.path(level).find(|level| full(self.usage(*level)));
        if let Some(refusing) = refusing {
            let usage = self.usage_mut(refusing);
            usage.events = usage.events.saturating_add(1);
            let LimitUsage { name, max, current, .. } = &*usage;
            return Err(OverLimit { limit: name.clone(), max: max.unwrap_or(u32::MAX), current: *current });
        }
        self.force(level, 1);
        Ok(())
    }

    /// Charges without asking.
    pub(super) fn force(&mut self, level: u32, count: u32) {
        let mut next = Some(level);
        while let Some(level) = next {
            let Level { usage, parent, .. } = &mut self.0[level as usize];
            // All IDs of the system together fit.
            usage.current += count;
            usage.peak = usage.peak.max(usage.current);
            next = *parent;
        }
    }

    pub(super) fn credit(&mut self, level: u32, count: u32) {
        let mut next = Some(level);
        while let Some(level) = next {
            let Level { usage, parent, .. } = &mut self.0[level as usize];
            usage.current -= count;
            next = *parent;
        }
    }
}

impl Limit {
    /// A limit below this one. `None`: no maximum but those above.
    pub fn child(&self, name: impl Into<String>, max: Option<u32>) -> Limit {
        let level = self.state(|state| state.limits.add(name.into(), max, Some(self.level)));
        Limit { system: self.system.clone(), level }
    }

    /// Changes the maximum. What there is already stays, even if it is more.
    pub fn set_max(&self, max: Option<u32>) {
        self.state(|state| state.limits.usage_mut(self.level).max = max);
    }

    /// Its numbers, all of one moment.
    pub fn usage(&self) -> LimitUsage {
        self.state(|state| state.limits.usage(self.level).clone())
    }

    fn state<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.system.lock())
    }
}

impl Clone for Limit {
    fn clone(&self) -> Limit {
        self.state(|state| state.limits.hold(self.level));
        Limit { system: self.system.clone(), level: self.level }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        self.state(|state| state.limits.release(self.level));
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Limit").field(&self.usage()).finish()
    }
}
