//! Memory that is there before it is needed.
//!
//! Pages come when they are first touched, and may go to swap when they are not. Who cannot wait for that during DMA has
//! them brought in when they are registered, or locked for as long as they are. The kernel's lock on a page does not
//! count: one unlock undoes any number of locks. So the backing counts for itself, and unlocks a page with the last registration
//! that wanted it locked.

use super::{Backing, Bytes, PAGE_BITS, Registrations, Source};
use crate::host_memory::HostMemory;
use std::io;
use std::ops::Range;

/// What is done about the pages of memory when it is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Residency {
    /// Nothing: they come when they are touched.
    #[default]
    OnDemand,
    /// They are brought in, ready to be written (`MADV_POPULATE_WRITE`, Linux 5.14).
    Populated,
    /// They are brought in and locked in memory (`mlock`) until the last registration goes that asks for it. A lock that the
    /// program has put on the same pages itself goes with it.
    Locked,
}

/// Why pages were not brought in or locked.
#[derive(Debug, thiserror::Error)]
pub enum ResidencyError {
    /// They are not mapped in this process.
    #[error("memory that is reached by calls cannot be brought in or locked from here")]
    NotMapped,
    /// They could not be brought in.
    #[error(
        "the memory could not be brought in: the machine, the control group or the pool of huge pages has no more, or the file is shorter"
    )]
    NotPopulated(#[source] io::Error),
    /// They could not be locked.
    #[error("{length:#x} bytes could not be locked in memory: {}", limit_hint(*.limit))]
    NotLocked {
        /// How many bytes were to be locked.
        length: u64,
        /// How many bytes the process may lock (`RLIMIT_MEMLOCK`); `None`: as many as it likes.
        limit: Option<u64>,
        /// What the kernel said.
        source: io::Error,
    },
}

fn limit_hint(limit: Option<u64>) -> String {
    match limit {
        None => "the machine or the control group has no more".to_owned(),
        Some(limit) => format!(
            "RLIMIT_MEMLOCK allows this process {limit:#x} in all; raise it (`ulimit -l`, `LimitMEMLOCK=` in a \
             systemd unit), or give the process CAP_IPC_LOCK"
        ),
    }
}

impl Backing {
    /// Does what is asked for to the pages; all or, as far as locks go, nothing.
    pub(crate) fn make_resident(
        &self,
        registrations: &mut Registrations,
        pages: Range<u64>,
        residency: Residency,
    ) -> Result<(), ResidencyError> {
        match residency {
            Residency::OnDemand => Ok(()),
            Residency::Populated => self
                .in_host_memory(pages, |memory, offset, length| memory.populate(offset, length))?
                .map_err(ResidencyError::NotPopulated),
            Residency::Locked => {
                let pages = whole_system_pages(pages);
                let locked = &mut registrations.locked;
                let (new, _) = locked.divide(pages.clone(), 0);
                for (index, part) in new.iter().enumerate() {
                    let lock = |memory: &HostMemory, offset, length| memory.lock(offset, length);
                    let Err(source) = self.in_host_memory(part.clone(), lock)? else { continue };
                    // The part that failed may be locked half.
                    new[..=index].iter().for_each(|part| self.unlock(part.clone()));
                    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
                    let length = new.iter().map(|part| part.end - part.start).sum::<u64>() << PAGE_BITS;
                    return Err(ResidencyError::NotLocked { length, limit, source });
                }
                locked.hold(pages);
                Ok(())
            }
        }
    }

    /// Undoes it.
    pub(crate) fn leave_resident(
        &self,
        registrations: &mut Registrations,
        pages: Range<u64>,
        residency: Residency,
    ) {
        if residency == Residency::Locked {
            let locked = &mut registrations.locked;
            let pages = whole_system_pages(pages);
            let (last, _) = locked.divide(pages.clone(), 1);
            locked.release(pages);
            last.into_iter().for_each(|part| self.unlock(part));
        }
    }

    fn unlock(&self, pages: Range<u64>) {
        // It was locked, so it is mapped.
        let _ = self.in_host_memory(pages, |memory, offset, length| {
            memory.unlock(offset, length);
            Ok(())
        });
    }

    /// Does something to those bytes of the pages that exist, wherever they are in this process.
    fn in_host_memory(
        &self,
        pages: Range<u64>,
        mut each: impl FnMut(&HostMemory, u64, u64) -> io::Result<()>,
    ) -> Result<io::Result<()>, ResidencyError> {
        let first = pages.start << PAGE_BITS;
        let whole = (pages.end - pages.start) << PAGE_BITS;
        let length = self.length().map_or(whole, |end| end.saturating_sub(first).min(whole));
        match &self.bytes {
            Bytes::Whole { source, .. } => match &**source {
                Source::Host(memory) => Ok(each(memory, first, length)),
                Source::Late(_) => Err(ResidencyError::NotMapped),
            },
            Bytes::File { file, .. } => Ok(file.in_windows(first, length, |memory, offset, part| {
                each(memory, offset, part.end - part.start)
            })),
        }
    }
}

/// The kernel's pages may be larger than ours.
fn whole_system_pages(pages: Range<u64>) -> Range<u64> {
    let unit = (rustix::param::page_size() as u64 >> PAGE_BITS).max(1);
    pages.start / unit * unit..pages.end.next_multiple_of(unit)
}
