//! Memory that a device model uses in place.

use super::Port;
use ioasid::{BorrowError, BorrowedSlice, Iova, Permissions, SliceHolder, Space, epoch};
use std::sync::Arc;

/// Why a device has borrowed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortBorrowError {
    /// The device is attached to no address space, or was just taken from it.
    #[error("the device is attached to no address space")]
    Blocked,
    /// The device is attached to a table of a guest's, which may change it without asking anybody.
    #[error("nothing can be borrowed through a guest's table")]
    Nested,
    /// The space does not lend it.
    #[error(transparent)]
    Borrow(#[from] BorrowError),
}

impl Port {
    /// Borrows memory of the space that the device is attached to, for a device model that uses it in place. See
    /// [`Space::borrow`].
    ///
    /// When the device is attached to another space, or to none, the holder is asked to let go, and waited for as long as an
    /// unmap would. If it does not, the device goes all the same; what the slice pins stays pinned until it is dropped.
    pub fn borrow(
        &self,
        iova: u64,
        length: u64,
        permissions: Permissions,
        holder: Arc<dyn SliceHolder>,
    ) -> Result<BorrowedSlice, PortBorrowError> {
        let space = self.lending_space()?;
        let slice = space.borrow(Iova::new(iova), length, permissions, holder)?;
        self.attachment.note_slice(slice.handle());
        // Who takes the device away looks at the notes afterwards.
        match self.lending_space() {
            Ok(now) if Arc::ptr_eq(&now, &space) => Ok(slice),
            _ => Err(PortBorrowError::Blocked),
        }
    }

    fn lending_space(&self) -> Result<Arc<Space>, PortBorrowError> {
        let section = epoch::dma();
        let table = self.attachment.table.load(&section).ok_or(PortBorrowError::Blocked)?;
        match table.nesting() {
            None => Ok(table.space().clone()),
            Some(_) => Err(PortBorrowError::Nested),
        }
    }
}
