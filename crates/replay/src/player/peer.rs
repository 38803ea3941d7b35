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
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use std::fmt;
use std::iter;
use std::ops::Range;
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

/// What is known of one device.
#[derive(Debug)]
struct PeerScene<B> {
    entered: RwLock<Entered<B>>,
    memory: Arc<GuestMemory>,
}

/// Its books, and whether they are the device's.
#[derive(Debug)]
struct Entered<B> {
    books: B,
    attached: bool,
}

impl<B: Books> Entered<B> {
    /// Where a DMA of these bytes begins to lead: the place in memory, and how many of the bytes go there.
    fn piece(&self, iova: u64, bytes: usize, write: bool) -> Result<(u64, usize), DmaFault> {
        let fault = |reason| DmaFault { iova, write, reason };
        if !self.attached {
            return Err(fault(DmaFaultReason::Blocked));
        }
        let piece = self.books.translate(iova, bytes as u64, write).filter(|piece| piece.length > 0);
        // No more than was asked for.
        piece.map(|piece| (piece.output, piece.length as usize)).ok_or_else(|| {
            let other = self.books.translate(iova, 1, !write).is_some();
            fault(if other { DmaFaultReason::NoPermission } else { DmaFaultReason::NotMapped })
        })
    }
}

impl<B: Books> PeerScene<B> {
    fn new(memory: &Arc<GuestMemory>) -> PeerScene<B> {
        let entered = RwLock::new(Entered { books: B::default(), attached: true });
        PeerScene { entered, memory: memory.clone() }
    }

    fn reading(&self) -> RwLockReadGuard<'_, Entered<B>> {
        self.entered.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> RwLockWriteGuard<'_, Entered<B>> {
        self.entered.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes through the memory behind a range of addresses, piece by piece: where a piece lies, and which bytes of the
    /// transfer they are. All pieces are found before the first is copied.
    fn transfer(
        &self,
        iova: u64,
        bytes: usize,
        write: bool,
        mut copy: impl FnMut(u64, Range<usize>) -> Result<(), ioasid::MemoryGone>,
    ) -> Result<(), DmaFault> {
        if bytes == 0 {
            return Ok(());
        }
        let entered = self.reading();
        let first = entered.piece(iova, bytes, write)?;
        // Most often that is all.
        let mut others = Vec::new();
        let mut found = first.1;
        while found < bytes {
            let beyond = || DmaFault { iova: u64::MAX, write, reason: DmaFaultReason::OutOfRange };
            let at = iova.checked_add(found as u64).ok_or_else(beyond)?;
            let piece = entered.piece(at, bytes - found, write)?;
            found += piece.1;
            others.push(piece);
        }
        let mut done = 0;
        for (place, length) in iter::once(first).chain(others) {
            let gone = |_| DmaFault { iova: iova + done as u64, write, reason: DmaFaultReason::MemoryGone };
            copy(place, done..done + length).map_err(gone)?;
            done += length;
        }
        Ok(())
    }
}

impl<B: Books> DmaPort for PeerScene<B> {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        let backing = &self.memory.backing;
        self.transfer(iova, buffer.len(), false, |place, bytes| backing.read(place, &mut buffer[bytes]))
    }

    fn write(&self, iova: u64, source: &[u8]) -> Result<(), DmaFault> {
        let backing = &self.memory.backing;
        self.transfer(iova, source.len(), true, |place, bytes| backing.write(place, &source[bytes]))
    }
}

impl<B: Books> Scene for PeerScene<B> {
    fn space(&self) -> Option<&Arc<Space>> {
        None
    }

    fn attach(&self) -> Result<(), String> {
        self.writing().attached = true;
        Ok(())
    }

    fn detach(&self) {
        self.writing().attached = false;
    }

    fn map(&self, mapping: &Mapping) -> Result<(), String> {
        let permissions = mapping.direction.permissions();
        let entry = ioasid_peers::Mapping {
            length: mapping.page_bytes(),
            output: mapping.memory,
            read: permissions.contains(Permissions::READ),
            write: permissions.contains(Permissions::WRITE),
        };
        self.writing().books.map(mapping.pages.first(), entry).map_err(|error| error.to_string())
    }

    fn unmap(&self, pages: IovaRange, _: Mode) -> Result<Option<u64>, String> {
        Ok(self.writing().books.unmap(pages.first(), pages.last()))
    }

    fn reaches(&self, iova: u64) -> bool {
        let entered = self.reading();
        [false, true].into_iter().any(|write| entered.piece(iova, 1, write).is_ok())
    }

    fn tables(&self) -> Option<Tables> {
        None
    }

    fn counts(&self) -> Option<Counts> {
        None
    }

    fn clear(&self) -> Result<Option<u64>, String> {
        Ok(self.writing().books.unmap(0, u64::MAX))
    }
}
