//! Errors by what they have in common, whichever call they are of.

use crate::double::is_wanted;
use ioasid::{AliasError, AttachError, MapError, ProtectError, RemapError, TableError, UnmapError};
use std::fmt::Debug;

/// Of what kind an error of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    OutOfTables,
    /// The double was told to fail.
    Refused,
    /// The format cannot do it while devices use the table.
    Rigid,
    DoesNotFit,
    /// The table cannot lead to the memory.
    OutOfReach,
}

impl Kind {
    pub(super) fn of(error: &TableError) -> Kind {
        match error {
            TableError::OutOfTables => Kind::OutOfTables,
            TableError::Refused(_) if is_wanted(error) => Kind::Refused,
            TableError::Refused(_) => Kind::OutOfReach,
            TableError::NeedsBreak { .. } | TableError::CannotCut { .. } => Kind::Rigid,
            TableError::DoesNotFit { .. } => Kind::DoesNotFit,
        }
    }

    pub(super) fn of_map(error: &MapError) -> Option<Kind> {
        match error {
            MapError::OutOfTables => Some(Kind::OutOfTables),
            MapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    pub(super) fn of_unmap(error: &UnmapError) -> Option<Kind> {
        match error {
            UnmapError::OutOfTables => Some(Kind::OutOfTables),
            UnmapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    pub(super) fn of_protect(error: &ProtectError) -> Option<Kind> {
        match error {
            ProtectError::OutOfTables => Some(Kind::OutOfTables),
            ProtectError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    pub(super) fn of_remap(error: &RemapError) -> Option<Kind> {
        match error {
            RemapError::OutOfTables => Some(Kind::OutOfTables),
            RemapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    pub(super) fn of_alias(error: &AliasError) -> Option<Kind> {
        if let AliasError::Target(error) = error { Kind::of_map(error) } else { None }
    }

    pub(super) fn of_attach(error: &AttachError) -> Option<Kind> {
        if let AttachError::Table(error) = error { Some(Kind::of(error)) } else { None }
    }
}

/// That the result is this error, or none.
#[track_caller]
pub(super) fn expect<T: Debug, E: Debug>(result: Result<T, E>, expected: Option<&str>) -> Option<T> {
    match (result, expected) {
        (Ok(value), None) => Some(value),
        (Err(error), Some(expected)) if format!("{error:?}").starts_with(expected) => None,
        (result, expected) => panic!("{result:?}, but expected was {expected:?}"),
    }
}
