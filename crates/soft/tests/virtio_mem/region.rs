//! The memory that is plugged and unplugged, and what a device must find in it.
//!
//! # Pages and phases
//!
//! Devices look at 16 pages of each block: the first eight and the last eight, so that those at both sides of a border between
//! blocks are one piece. Each of them has a *phase*, a number that only grows:
//!
//! | phase modulo 4 | | a DMA there |
//! |---|---|---|
//! | 0 | unplugged | faults |
//! | 1 | being plugged | either |
//! | 2 | plugged | arrives |
//! | 3 | being unplugged | either |
//!
//! The plugging thread moves it on before it maps and when the map has returned, before it unmaps and when the unmap has
//! returned. A device reads the phase before and after its DMA. Were both the same, the page was in that phase all the
//! time, and if it was plugged or unplugged there is one right answer. Otherwise there are two; but even then the bytes
//! that were read must be of a plug that overlaps the DMA.
//!
//! # Bytes
//!
//! What is plugged begins with a *stamp*, made of the page's number and of how often it was plugged. Behind it each device has a
//! place of its own, for what it writes itself. What was unplugged is given back to the host, as a hole in the memfd, and so is
//! zero; when it is plugged in again, it is still, or somebody has written to memory that was taken away from him.

use crate::random::mix;
use ioasid::{Account, Backing, Iova, IovaRange, Memory, Permissions, Space};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const PAGE: u64 = 4 << 10;
pub(crate) const BLOCK: u64 = 2 << 20;
pub(crate) const REGION: u64 = 1 << 30;
pub(crate) const BLOCKS: u64 = REGION / BLOCK;
pub(crate) const PAGES_PER_BLOCK: u64 = BLOCK / PAGE;
/// Where the guest has it.
pub(crate) const BASE: u64 = 4 << 30;
/// How many pages devices look at, at each end of a block.
const WATCHED_AT_EACH_END: u64 = 8;
const WATCHED_PER_BLOCK: u64 = 2 * WATCHED_AT_EACH_END;
/// How many pages devices look at.
pub(crate) const WATCHED: u64 = BLOCKS * WATCHED_PER_BLOCK;
/// Bytes of a stamp, and of a device's own place in a page.
pub(crate) const STAMP: usize = 64;

/// 64 bytes that are different for different numbers.
pub(crate) fn stamp(seeds: [u64; 3]) -> [u8; STAMP] {
    let seed = seeds.into_iter().fold(0, |sum: u64, seed| mix(sum.wrapping_add(seed).wrapping_add(1)));
    let mut bytes = [0; STAMP];
    for (index, word) in (1u64..).zip(bytes.chunks_exact_mut(8)) {
        word.copy_from_slice(&mix(seed.wrapping_add(index)).to_le_bytes());
    }
    bytes
}

/// The page of the region that a watched one is; they ascend with their numbers.
pub(crate) fn page_of(watched: u64) -> u64 {
    let (block, index) = (watched / WATCHED_PER_BLOCK, watched % WATCHED_PER_BLOCK);
    let at_the_end = if index < WATCHED_AT_EACH_END { 0 } else { PAGES_PER_BLOCK - WATCHED_PER_BLOCK };
    block * PAGES_PER_BLOCK + at_the_end + index
}

/// The watched pages among these.
fn watched_in(pages: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let pages = pages.clone();
    let block = pages.start / PAGES_PER_BLOCK;
    let last = pages.end.div_ceil(PAGES_PER_BLOCK);
    (block * WATCHED_PER_BLOCK..last * WATCHED_PER_BLOCK)
        .filter(move |watched| pages.contains(&page_of(*watched)))
}

/// A page's phase at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Phase(u64);

impl Phase {
    pub(crate) fn is_plugged(self) -> bool {
        self.0 % 4 == 2
    }

    /// Nothing is happening to it.
    pub(crate) fn is_settled(self) -> bool {
        self.0 % 2 == 0
    }

    /// How often the page was plugged, this time included.
    pub(crate) fn plugs(self) -> u64 {
        self.0.div_ceil(4)
    }
}

/// What became of a page's part of a DMA, when it should have been otherwise.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// It faulted, and was plugged all the time.
    SpuriousFault,
    /// It arrived, and was unplugged all the time.
    ReachedUnplugged,
    /// The bytes are of no plug that overlaps the DMA.
    WrongBytes,
}

/// Judges a read of a page that was in these phases before and after: the stamp that it has found, or `None` for a fault.
pub(crate) fn judge(watched: u64, before: Phase, after: Phase, found: Option<&[u8]>) -> Result<(), Mistake> {
    let throughout = (before == after).then_some(before);
    let Some(found) = found else {
        return if throughout.is_some_and(Phase::is_plugged) { Err(Mistake::SpuriousFault) } else { Ok(()) };
    };
    // The plug that the page was in, or the next; and the last that had begun.
    let mut plugs = before.0 / 4 + 1..=after.plugs();
    if plugs.is_empty() {
        return Err(Mistake::ReachedUnplugged);
    }
    let right = plugs.any(|plug| found == stamp([page_of(watched), plug, 0]));
    if right { Ok(()) } else { Err(Mistake::WrongBytes) }
}

/// A gibibyte of guest memory, mapped for devices at [`BASE`].
pub(crate) struct Region {
    space: Arc<Space>,
    account: Account,
    memory: Arc<Memory>,
    file: OwnedFd,
    phases: Vec<AtomicU64>,
    /// The block that something happens in, and the one that comes next.
    at_work: [AtomicU64; 2],
}

impl Region {
    /// Registers the memory and maps all of it, in one call.
    pub(crate) fn map(space: &Arc<Space>) -> Region {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, REGION).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let account = Account::new("guest", Some(REGION / PAGE));
        let backing = Backing::file(space.bus(), &file).unwrap();
        let memory = Memory::register(&backing, 0, REGION, &account).unwrap();
        let phases = (0..WATCHED).map(|_| AtomicU64::new(0)).collect();
        let at_work = [AtomicU64::new(0), AtomicU64::new(0)];
        let region = Region { space: space.clone(), account, memory, file, phases, at_work };
        region.plug(0..REGION / PAGE);
        region
    }

    pub(crate) fn charged_pages(&self) -> u64 {
        self.account.charged_pages()
    }

    pub(crate) fn peak_pages(&self) -> u64 {
        self.account.peak_pages()
    }

    /// Gives the memory back, and says how many pages are charged then.
    pub(crate) fn release(self) -> u64 {
        drop(self.memory);
        self.account.charged_pages()
    }

    pub(crate) fn phase(&self, watched: u64) -> Phase {
        Phase(self.phases[watched as usize].load(Ordering::SeqCst))
    }

    fn move_on(&self, watched: u64, from: u64) {
        let phase = self.phases[watched as usize].fetch_add(1, Ordering::SeqCst);
        assert_eq!(phase % 4, from);
    }

    /// The block that was announced, which something happens in now; and announces another, so that devices are there
    /// already when its turn comes.
    pub(crate) fn next_block(&self, announced: u64) -> u64 {
        let now = self.at_work[1].swap(announced, Ordering::Relaxed);
        self.at_work[0].store(now, Ordering::Relaxed);
        now
    }

    /// The block that something happens in, or will soon.
    pub(crate) fn block_at_work(&self, soon: bool) -> u64 {
        self.at_work[usize::from(soon)].load(Ordering::Relaxed)
    }

    /// A watched page of the same block.
    pub(crate) fn near_watched(&self, page: u64) -> u64 {
        page_of(page / PAGES_PER_BLOCK * WATCHED_PER_BLOCK + page % WATCHED_PER_BLOCK)
    }

    /// Plugs pages that were not.
    pub(crate) fn plug(&self, pages: Range<u64>) {
        let mut content = [0; PAGE as usize];
        for watched in watched_in(&pages) {
            let offset = page_of(watched) * PAGE;
            self.memory.backing().read(offset, &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == 0), "a device has written to unplugged memory");
            self.move_on(watched, 0);
            let stamp = stamp([page_of(watched), self.phase(watched).plugs(), 0]);
            self.memory.backing().write(offset, &stamp).unwrap();
        }
        let (offset, length) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let iova = Iova::new(BASE + offset);
        self.space.map(iova, &self.memory, offset, length, Permissions::READ_WRITE).unwrap();
        watched_in(&pages).for_each(|watched| self.move_on(watched, 1));
    }

    /// Unplugs those of the pages that are plugged, with one call, and gives them back to the host.
    pub(crate) fn unplug(&self, pages: Range<u64>, plugged: impl Fn(u64) -> bool) {
        let watched = || watched_in(&pages).filter(|watched| plugged(page_of(*watched)));
        watched().for_each(|watched| self.move_on(watched, 2));
        let (offset, length) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let unmapped = self.space.unmap(IovaRange::with_length(BASE + offset, length).unwrap()).unwrap();
        // From here on it is somebody else's.
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
            .unwrap();
        watched().for_each(|watched| self.move_on(watched, 3));
        assert_eq!(unmapped.bytes(), pages.clone().filter(|page| plugged(*page)).count() as u64 * PAGE);
    }
}

/// The scenario means something only if a device can tell. It is shown one of each kind of mistake, and what is none.
#[test]
fn a_mistake_would_be_noticed() {
    let stamped = |plug| stamp([page_of(9), plug, 0]);
    let judge = |before, after, found: Option<[u8; STAMP]>| {
        judge(9, Phase(before), Phase(after), found.as_ref().map(|found| &found[..]))
    };
    // Plugged all the time.
    assert_eq!(judge(2, 2, Some(stamped(1))), Ok(()));
    assert_eq!(judge(2, 2, None), Err(Mistake::SpuriousFault));
    assert_eq!(judge(6, 6, Some(stamped(1))), Err(Mistake::WrongBytes));
    assert_eq!(judge(2, 2, Some([0; STAMP])), Err(Mistake::WrongBytes));
    assert_eq!(judge(2, 2, Some(stamp([page_of(10), 1, 0]))), Err(Mistake::WrongBytes));
    // Unplugged all the time.
    assert_eq!(judge(4, 4, None), Ok(()));
    assert_eq!(judge(4, 4, Some(stamped(1))), Err(Mistake::ReachedUnplugged));
    // Something happens meanwhile, and either is right; but not the bytes of a plug before or after.
    for (before, after) in [(2, 3), (3, 3), (1, 2), (3, 4), (2, 6)] {
        assert_eq!(judge(before, after, None), Ok(()));
        assert_eq!(judge(before, after, Some(stamped(1))), Ok(()));
    }
    assert_eq!(judge(4, 5, Some(stamped(1))), Err(Mistake::WrongBytes));
    assert_eq!(judge(4, 5, Some(stamped(2))), Ok(()));
    assert_eq!(judge(3, 4, Some(stamped(2))), Err(Mistake::WrongBytes));
}
