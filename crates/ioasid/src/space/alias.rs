//! The same memory at a second address, or in a second space.
//!
//! Whoever asks for an alias names addresses and not memory; the native table says what is behind them. What keeps the
//! lifetime rules is an order of steps.
//!
//! 1. The objects behind the range are looked up, and their registrations are locked: from here on no memory of theirs is
//!    registered or released. Nothing is owned while this waits, and nothing is waited for while they are locked:
//!    whoever meets another operation unlocks them and begins again.
//! 2. The leaves of the source are [held](super::held), and nothing but these objects may be behind them; else all begins
//!    again.
//! 3. Each object notes that it may be mapped at the target. Whichever of its registrations goes last will look there.
//! 4. The target is mapped like any other range.
//!
//! To give everything back each time is what keeps it from waiting in a circle with a release, and what may keep it
//! from ever getting a range that never rests. So it gives up after a time, and says so.
//!
//! So a release of the memory comes before all of this, and there is nothing to copy, or after it, and finds the alias.

use super::held::{Held, Portion};
use super::map::{MapError, Part, Parts, Try};
use super::protect::Stretch;
use super::{Permissions, Space};
use crate::backing::Backing;
use crate::epoch;
use ioasid_pagetable::{Attributes, Iova, IovaRange, Oa, PageSize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an alias goes on trying while others are at work in its source or its target, again and again.
pub const ALIAS_PATIENCE: Duration = Duration::from_secs(2);

/// Why there is no alias.
#[derive(Debug, thiserror::Error)]
pub enum AliasError {
    /// Nothing is mapped in the source.
    #[error("nothing is mapped in {source_range}")]
    NotMapped {
        /// The range asked for.
        source_range: IovaRange,
    },
    /// What is mapped at this address allows none of the permissions asked for.
    #[error("what is mapped at {at:#x} allows nothing of what the alias shall")]
    NoPermission {
        /// An address in the source.
        at: u64,
    },
    /// Others were at work in the source or the target each time it was tried, for [`ALIAS_PATIENCE`].
    #[error("other operations have kept the source or the target busy for {} s", ALIAS_PATIENCE.as_secs())]
    Busy,
    /// The target could not be mapped.
    #[error(transparent)]
    Target(#[from] MapError),
}

/// Objects by address, which is the order in which they are locked.
type Objects = BTreeMap<*const Backing, Arc<Backing>>;

/// What is held in the source, as it will be mapped at the target.
struct Duplicate<'a> {
    held: &'a Held<'a>,
    source: IovaRange,
    target: IovaRange,
    permissions: Permissions,
}

impl Duplicate<'_> {
    /// Where the target has the same place as this address in the source.
    fn moved(&self, iova: u64) -> u64 {
        self.target.first() + (iova - self.source.first())
    }
}

impl Parts for Duplicate<'_> {
    const WHOLE: bool = false;

    fn range(&self) -> IovaRange {
        self.target
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        self.held.stretches(self.source).filter_map(|Stretch { range, oa, attributes }| {
            let range = IovaRange::new(self.moved(range.first()), self.moved(range.last()))?;
            let kept = attributes & self.permissions.attributes();
            let attributes = attributes.difference(Permissions::READ_WRITE.attributes()) | kept;
            Some(Part { range, oa, attributes })
        })
    }

    fn check(&self) -> Result<(), MapError> {
        // The registrations of the objects are locked, so whoever takes the memory away looks for it later.
        Ok(())
    }
}

impl Space {
    /// Maps what is mapped in `source` a second time: in `target`, which may be this space too, from `iova` on. Holes
    /// stay holes. The alias allows what the source allows and `permissions` contains. How many bytes were mapped.
    ///
    /// It is a mapping of its own: unmapping or protecting the one does nothing to the other. When the memory is released
    /// both go.
    ///
    /// While others go on changing the source or the target without a rest it has to begin again, and gives up after
    /// [`ALIAS_PATIENCE`] ([`AliasError::Busy`]).
    ///
    /// Takes the lock of each object that the memory belongs to, so that aliases of one object wait for each other and for
    /// its registrations. Whoever has the [`Memory`](crate::Memory) at hand maps it again instead.
    pub fn alias(
        self: &Arc<Self>,
        source: IovaRange,
        target: &Arc<Space>,
        iova: Iova,
        permissions: Permissions,
    ) -> Result<u64, AliasError> {
        let granule = self.granule().max(target.granule());
        let length = source.length().unwrap_or(0);
        let range = IovaRange::with_length(iova.get(), length).ok_or(MapError::NoRange { iova, length })?;
        if !source.is_aligned(granule) || !range.is_aligned(granule) {
            return Err(MapError::Misaligned { granule }.into());
        }
        if !Arc::ptr_eq(self.bus(), target.bus()) {
            return Err(MapError::OtherBus.into());
        }
        let (mut tries, mut began) = (0, None);
        loop {
            let objects = self.objects_behind(source);
            let mut registrations: Vec<_> = objects.values().map(|object| object.registrations()).collect();
            let portion = Portion { range: source, largest: None };
            // Nothing is cut, so nothing can fail.
            if let Ok(Some(mut held)) = self.try_hold(source, || std::iter::once(portion)) {
                let duplicate = Duplicate { held: &held, source, target: range, permissions };
                if self.are_all_behind(&duplicate, &objects) {
                    let bytes = duplicate.check(granule)?;
                    for notes in &mut registrations {
                        notes.note(target, range);
                    }
                    // The map has a section of its own, and may have to wait outside of it.
                    held.leave();
                    match target.try_map(&Duplicate { held: &held, source, target: range, permissions }) {
                        Ok(()) => return Ok(bytes),
                        Err(Try::Failed(error)) => return Err(error.into()),
                        Err(Try::Contended) => {}
                    }
                }
            }
            drop(registrations);
            if began.get_or_insert_with(Instant::now).elapsed() > ALIAS_PATIENCE {
                return Err(AliasError::Busy);
            }
            self.step_aside(&mut tries);
            if !Arc::ptr_eq(self, target) {
                // What is in the way may be something that only waits for a flush there.
                target.flush_any();
            }
        }
    }

    /// The objects that leaves in the range lead to now.
    fn objects_behind(&self, range: IovaRange) -> Objects {
        let mut objects = Objects::new();
        let _operation = epoch::operation();
        self.native.leaves(range, |leaf| {
            self.objects_at(leaf.oa, leaf.size.bytes(), |object| {
                objects.insert(Arc::as_ptr(&object), object);
            });
            ControlFlow::Continue(())
        });
        objects
    }

    /// Shows the objects at these output addresses; whether there is one everywhere.
    fn objects_at(&self, oa: Oa, bytes: u64, mut show: impl FnMut(Arc<Backing>)) -> bool {
        let last = oa.get().saturating_add(bytes - 1);
        let mut at = Some(oa.get());
        while let Some(oa) = at.filter(|oa| *oa <= last) {
            let Some((object, _, end)) = self.bus.object(oa) else { return false };
            show(object);
            at = end.checked_add(1);
        }
        true
    }

    fn are_all_behind(&self, duplicate: &Duplicate<'_>, objects: &Objects) -> bool {
        duplicate.parts().all(|part| {
            let mut known = true;
            let bytes = part.range.last() - part.range.first() + 1;
            self.objects_at(part.oa, bytes, |object| known &= objects.contains_key(&Arc::as_ptr(&object)))
                && known
        })
    }

    /// The object that memory at an output address belongs to, and how far into the object that is, in bytes. `None`: no
    /// memory is registered there.
    pub fn object_at(&self, oa: Oa) -> Option<(Arc<Backing>, u64)> {
        self.bus.object(oa.get()).map(|(object, offset, _)| (object, offset))
    }
}

impl Duplicate<'_> {
    /// Whether it can be mapped; how many bytes it has.
    fn check(&self, granule: PageSize) -> Result<u64, AliasError> {
        let mut bytes = 0u64;
        for part in self.parts() {
            if part.attributes & Permissions::READ_WRITE.attributes() == Attributes::empty() {
                let at = self.source.first() + (part.range.first() - self.target.first());
                return Err(AliasError::NoPermission { at });
            }
            if !part.range.is_aligned(granule) || !part.oa.is_aligned(granule) {
                return Err(MapError::Misaligned { granule }.into());
            }
            bytes += part.range.last() - part.range.first() + 1;
        }
        if bytes == 0 { Err(AliasError::NotMapped { source_range: self.source }) } else { Ok(bytes) }
    }
}
