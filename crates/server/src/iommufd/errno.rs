//! The error numbers that clients see for what the engine refuses.

use ioasid::{AttachError, MapError, ReserveError, TableError, UnmapError};
use rustix::io::Errno;

/// For an area that was not mapped in the engine's space.
pub(super) fn map_errno(error: MapError) -> Errno {
    match error {
        MapError::AlreadyMapped { .. } => Errno::EXIST,
        MapError::Reserved { .. } => Errno::ADDRINUSE,
        MapError::NoHole { .. } | MapError::TooManyMappings { .. } => Errno::NOSPC,
        MapError::OutOfTables => Errno::NOMEM,
        MapError::Table(error) => table_errno(&error),
        MapError::NoRange { .. }
        | MapError::BeyondMemory { .. }
        | MapError::Revoked
        | MapError::Misaligned { .. }
        | MapError::NoPermission
        | MapError::OtherBus => Errno::INVAL,
    }
}

/// For an area that was not unmapped.
pub(super) fn unmap_errno(error: UnmapError) -> Errno {
    match error {
        UnmapError::OutOfTables => Errno::NOMEM,
        UnmapError::Table(error) => table_errno(&error),
        UnmapError::Misaligned { .. } | UnmapError::CutsMapping { .. } => Errno::INVAL,
        UnmapError::Borrowed(_) => Errno::BUSY,
    }
}

/// For ranges that were not reserved or allowed.
pub(super) fn reserve_errno(error: ReserveError) -> Errno {
    match error {
        ReserveError::Mapped { .. } | ReserveError::Allowed { .. } | ReserveError::Reserved { .. } => {
            Errno::ADDRINUSE
        }
        ReserveError::Overlapping { .. } => Errno::INVAL,
    }
}

/// For a device that was not attached, or a table not made.
pub(crate) fn attach_errno(error: &AttachError) -> Errno {
    match error {
        AttachError::NoDevice(_) | AttachError::Unbound(_) => Errno::NODEV,
        AttachError::Incompatible
        | AttachError::Incoherent(_)
        | AttachError::NoRoot { .. }
        | AttachError::SharedRequester { .. }
        | AttachError::NotIsolated { .. } => Errno::INVAL,
        AttachError::Mapped { .. } | AttachError::Allowed { .. } => Errno::ADDRINUSE,
        AttachError::NoPasids(_) => Errno::OPNOTSUPP,
        AttachError::PasidTaken { .. } => Errno::BUSY,
        AttachError::NoSuchPasid { .. } => Errno::NOENT,
        AttachError::Table(error) => table_errno(error),
    }
}

fn table_errno(error: &TableError) -> Errno {
    match error {
        TableError::OutOfTables => Errno::NOMEM,
        TableError::CannotCut { .. } | TableError::NeedsBreak { .. } => Errno::BUSY,
        TableError::DoesNotFit { .. } => Errno::INVAL,
        TableError::Refused(_) => Errno::IO,
    }
}
