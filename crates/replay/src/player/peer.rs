//! The peers as the scene of a replay: what programs use today in place of a space.
//!
//! A peer is books of mappings behind a readers-writer lock. DMA holds it for reading while it looks up an address and copies,
//! so whoever has it for writing has waited for all DMA, and an unmap is as strict as one of ours. The memory is the same, and
//! so are the copies.

use super::Mode;
use super::scene::{Counts, GuestMemory, Scene, Tables};
use crate::live::Mapping;
use ioasid::{IovaRange, Permissions, Space};
use ioasid_peers::{BTree, Books, VmMemory};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What a trace can be carried out by in place of our spaces, to be compared with them.
///
/// ```
/// use ioasid_replay::Peer;
///
/// assert_eq!("vm-memory".parse(), Ok(Peer::VmMemory));
/// assert_eq!(Peer::BTree.to_string(), "btree");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// `btree`: a `BTreeMap` of mappings behind a lock.
    BTree,
    /// `vm-memory`: the IOTLB of rust-vmm's vm-memory behind a lock.
    VmMemory,
}

impl Peer {
    /// All of them.
    pub const ALL: [Peer; 2] = [Peer::BTree, Peer::VmMemory];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Peer::BTree => BTree::NAME,
            Peer::VmMemory => VmMemory::NAME,
        }
    }

    pub(super) fn scene(self, memory: &Arc<GuestMemory>) -> Arc<dyn Scene> {
        match self {
            Peer::BTree => Arc::new(PeerScene::<BTree>::new(memory)),
            Peer::VmMemory => Arc::new(PeerScene::<VmMemory>::new(memory)),
        }
    }
}

impl FromStr for Peer {
    type Err = super::UnknownName;

    fn from_str(name: &str) -> Result<Peer, super::UnknownName> {
        let known = Peer::ALL.into_iter().find(|peer| peer.name() == name);
        known.ok_or(super::UnknownName { found: name.to_owned(), expected: "btree or vm-memory" })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The books of one device.
#[derive(Debug)]
struct PeerScene<B> {
    books: RwLock<B>,
    memory: Arc<GuestMemory>,
}

impl<B: Books> PeerScene<B> {
    fn new(memory: &Arc<GuestMemory>) -> PeerScene<B> {
        PeerScene { books: RwLock::default(), memory: memory.clone() }
    }

    fn reading(&self) -> RwLockReadGuard<'_, B> {
        self.books.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> RwLockWriteGuard<'_, B> {
        self.books.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes through the memory behind a range of addresses, piece by piece: where a piece lies, and which bytes of the
    /// transfer they are.
    fn transfer(
        &self,
        iova: u64,
        bytes: usize,
        write: bool,
        mut copy: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), ioasid::MemoryGone>,
    ) -> Result<(), String> {
        let books = self.reading();
        let mut done = 0;
        while done < bytes {
            let at = iova.checked_add(done as u64);
            let piece = at.and_then(|at| books.translate(at, (bytes - done) as u64, write));
            let piece = piece.filter(|piece| piece.length > 0).ok_or_else(|| {
                let what = if write { "written" } else { "read" };
                format!("{:#x} may not be {what}", iova.wrapping_add(done as u64))
            })?;
            // No more than was asked for.
            let next = done + piece.length as usize;
            copy(piece.output, done..next).map_err(|gone| gone.to_string())?;
            done = next;
        }
        Ok(())
    }
}

impl<B: Books> Scene for PeerScene<B> {
    fn space(&self) -> Option<&Arc<Space>> {
        None
    }

    fn map(&self, mapping: &Mapping) -> Result<(), String> {
        let permissions = mapping.direction.permissions();
        let entry = ioasid_peers::Mapping {
            length: mapping.page_bytes(),
            output: mapping.memory,
            read: permissions.contains(Permissions::READ),
            write: permissions.contains(Permissions::WRITE),
        };
        self.writing().map(mapping.pages.first(), entry).map_err(|error| error.to_string())
    }

    fn unmap(&self, pages: IovaRange, _: Mode) -> Result<Option<u64>, String> {
        Ok(self.writing().unmap(pages.first(), pages.last()))
    }

    fn reaches(&self, iova: u64) -> bool {
        let books = self.reading();
        [false, true].into_iter().any(|write| books.translate(iova, 1, write).is_some())
    }

    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), String> {
        let backing = &self.memory.backing;
        self.transfer(iova, buffer.len(), false, |place, bytes| backing.read(place, &mut buffer[bytes]))
    }

    fn write(&self, iova: u64, source: &[u8]) -> Result<(), String> {
        let backing = &self.memory.backing;
        self.transfer(iova, source.len(), true, |place, bytes| backing.write(place, &source[bytes]))
    }

    fn tables(&self) -> Option<Tables> {
        None
    }

    fn counts(&self) -> Option<Counts> {
        None
    }

    fn clear(&self) -> Result<Option<u64>, String> {
        Ok(self.writing().unmap(0, u64::MAX))
    }
}
