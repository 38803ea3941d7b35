//! What the machine's kernel can be told of an object; see [`place`](crate::HostPlace).

use super::file::MappedFile;
use super::{Backing, Bytes, Source};
use crate::place::HostBytes;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// The file that an object's bytes are in, kept open.
#[derive(Clone, Debug)]
pub struct BackingFile(Arc<MappedFile>);

impl AsFd for BackingFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backing {
    /// Where its byte at `start` is.
    pub(crate) fn host_bytes(&self, start: u64) -> HostBytes {
        match &self.bytes {
            Bytes::Whole { source, .. } => match &**source {
                // Within the memory, so the sum is an address.
                Source::Host(memory) => HostBytes::Address(memory.address().wrapping_add(start)),
                Source::Late(_) => HostBytes::Calls,
            },
            Bytes::File { file, .. } => HostBytes::File(BackingFile(file.clone()), start),
        }
    }
}
