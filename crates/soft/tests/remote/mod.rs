//! Memory that the tests' devices reach by calls.

use ioasid::{LateBound, MemoryGone};
use std::sync::Mutex;

/// Memory behind calls, in a vector.
#[derive(Debug)]
pub(crate) struct Remote(pub(crate) Mutex<Vec<u8>>);

impl LateBound for Remote {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let bytes = self.0.lock().unwrap();
        let part = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(MemoryGone { offset })?);
        Ok(())
    }

    fn write(&self, offset: u64, source: &[u8]) -> Result<(), MemoryGone> {
        let mut bytes = self.0.lock().unwrap();
        let part = bytes.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..source.len()));
        part.ok_or(MemoryGone { offset })?.copy_from_slice(source);
        Ok(())
    }
}
