//! Waiting for what is already running, at hardly any cost to those who run.
//!
//! Two kinds of activity have to be waited for. A DMA that looked a page up may still be copying when the page is
//! unmapped: *strict* unmap returns only when it is done. An operation that reached a table, or that read which
//! tables a space has, may still be using it when it is retired. Both happen far more often than anyone waits
//! for them, so the cost is on the side of the waiter; only while somebody waits often do those pay a little who enter
//! (see `epoch/domain.rs`).
//!
//! They are two domains, because a DMA copy is short and never blocks, while an operation may sleep in the driver
//! of a real IOMMU, and the first must never wait for the second. Nobody inside a
//! section waits for its own domain, and nobody inside a DMA section waits for anything. An operation that has to
//! wait for DMA ends its section first and begins another: what it holds then are entries of a table, and nobody
//! who changes another space has to wait for it.

use crate::sync::{AtomicPtr, AtomicU64, LocalKey, Mutex, PoisonError, global, of_thread};
use ioasid_pagetable::RetiredTable;
use std::sync::atomic::AtomicU64 as Word;

mod announced;
mod domain;
mod protected;
mod published;

pub(crate) use announced::Announced;
pub(crate) use domain::Section;
use domain::{Domain, Local, Participant, Ticket};
pub use protected::{Protected, Replaced};
pub(crate) use published::{Published, Reading};

global! {
    static DMA: Domain =
        Domain::new(AtomicU64::new(domain::FIRST_REQUEST), AtomicPtr::new(std::ptr::null_mut()));
}
global! {
    static OPERATIONS: Domain =
        Domain::new(AtomicU64::new(domain::FIRST_REQUEST), AtomicPtr::new(std::ptr::null_mut()));
}

of_thread! {
    static DMA_LOCAL: Local = Local::new(&DMA);
}
of_thread! {
    static OPERATIONS_LOCAL: Local = Local::new(&OPERATIONS);
}

/// The thread's own word, if it has one.
fn own(local: &'static LocalKey<Local>) -> Option<&'static Participant> {
    local.try_with(Local::participant).ok().flatten()
}

/// Begins a section. A thread that is ending may have lost its local already, when it drops what it kept in others.
#[inline]
fn enter(local: &'static LocalKey<Local>, domain: &'static Domain) -> Section {
    local.try_with(Local::enter).unwrap_or_else(|_| Local::new(domain).enter())
}

/// An open DMA section; it ends when this is dropped, on the thread that began it.
///
/// A type of its own, because what is safe in a DMA section is not safe in one of another domain.
#[derive(Debug)]
#[must_use = "the section ends when this is dropped"]
pub struct DmaSection {
    _section: Section,
}

/// Begins a DMA: until the section ends, memory and tables found in it stay valid, and strict unmaps wait.
///
/// Keep it short, at most 64 KiB of copying, and never block in it: neither unmap nor drop memory or tables.
#[inline]
pub fn dma() -> DmaSection {
    DmaSection { _section: enter(&DMA_LOCAL, &DMA) }
}

/// Chooses the kind of fence. The kernel takes milliseconds for that in a process of several threads and no time in
/// one of a single thread, so it is done when the first bus is made and not at the first unmap.
pub(crate) fn prepare() {
    ioasid_pagetable::fence::can_fence_everywhere();
}

/// Returns when every DMA section that had begun has ended.
pub fn wait_for_dma() {
    DMA.synchronize(own(&DMA_LOCAL));
}

/// Begins an operation on a space.
#[inline]
pub(crate) fn operation() -> Section {
    enter(&OPERATIONS_LOCAL, &OPERATIONS)
}

/// Returns when every operation that had begun has ended. Not to be called inside one.
pub(crate) fn wait_for_operations() {
    OPERATIONS.synchronize(own(&OPERATIONS_LOCAL));
}

/// Table pages of this process.
pub(crate) type Retired = RetiredTable<ioasid_pagetable::HeapTables, Word>;

/// Retired tables that somebody may still be looking at, oldest first.
struct Queue {
    /// Retired since the last ticket was taken.
    fresh: Vec<Retired>,
    /// Waiting for all that ran when their tickets were taken.
    waiting: Vec<(Ticket, Ticket, Vec<Retired>)>,
}

global! {
    static QUEUE: Mutex<Queue> = Mutex::new(Queue { fresh: Vec::new(), waiting: Vec::new() });
}

#[cfg(shuttle)]
impl Drop for Queue {
    fn drop(&mut self) {
        let waiting = self.waiting.drain(..).flat_map(|(_, _, batch)| batch);
        for table in self.fresh.drain(..).chain(waiting) {
            // SAFETY: an execution of a model is over, and all of its threads have ended.
            unsafe { table.free() };
        }
    }
}

/// How many tables are collected before the price of a ticket is paid. In models none, so that what is freed too early is
/// missed at once.
const BATCH: usize = if cfg!(shuttle) { 1 } else { 32 };

/// Takes tables that are linked nowhere any more and frees them when nobody can be using them. Never waits.
pub(crate) fn retire(tables: Vec<Retired>) {
    if tables.is_empty() {
        return;
    }
    let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    queue.fresh.extend(tables);
    if queue.fresh.len() >= BATCH {
        let batch = std::mem::take(&mut queue.fresh);
        queue.waiting.push((DMA.ticket(own(&DMA_LOCAL)), OPERATIONS.ticket(own(&OPERATIONS_LOCAL)), batch));
    }
    let passed =
        queue.waiting.iter().take_while(|(dma, operations, _)| dma.passed() && operations.passed()).count();
    for (_, _, batch) in queue.waiting.drain(..passed) {
        for table in batch {
            // SAFETY: the tables were unlinked before the tickets were taken, and every DMA and every operation
            // that had begun by then has ended. Tables of this process are walked by nobody else.
            unsafe { table.free() };
        }
    }
}

/// Frees the tables that are retired by now, after waiting for the DMA and the operations that may still be looking at them.
///
/// Otherwise they are freed some at a time when others are retired. This is for whoever wants to know what memory is really left.
/// Not to be called inside a section, nor by a table or an IOMMU.
///
/// ```
/// # use ioasid::pagetable::HeapTables;
/// # use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space, epoch};
/// let before = HeapTables::bytes_in_use();
/// let bus = Bus::new();
/// let memory = Memory::register(&Backing::anonymous(&bus, 4096)?, 0, 4096, &Account::new("guest", None))?;
/// let space = Space::new(&bus);
/// space.map(Iova::new(0x1000), &memory, 0, 4096, Permissions::READ)?;
/// space.unmap(IovaRange::ALL)?;
/// drop(space);
/// epoch::free_retired();
/// assert_eq!(HeapTables::bytes_in_use(), before);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn free_retired() {
    let (fresh, waiting) = {
        let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut queue.fresh), std::mem::take(&mut queue.waiting))
    };
    wait_for_dma();
    wait_for_operations();
    for table in waiting.into_iter().flat_map(|(_, _, batch)| batch).chain(fresh) {
        // SAFETY: the tables were unlinked before they came into the queue, and every DMA and every operation that had begun
        // when they were taken out of it has ended.
        unsafe { table.free() };
    }
}
