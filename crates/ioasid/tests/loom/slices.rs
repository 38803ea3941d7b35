//! Borrowed slices: borrowers and unmaps.
//!
//! The table is one leaf: a word that an unmap exchanges from present to busy and a borrower reads, as the engine does.

use crate::model;
use ioasid_pagetable::{Attributes, IovaRange};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread;

#[path = "../../src/slice/registry.rs"]
#[allow(
    unreachable_pub,
    dead_code,
    reason = "the file is a module of the engine and not all of it is used here"
)]
mod registry;

use registry::Registry;

const PRESENT: u64 = 1;
const BUSY: u64 = 2;
const ABSENT: u64 = 0;

/// One page: its leaf, who has borrowed it, and the memory behind it.
struct Page {
    leaf: AtomicU64,
    registry: Registry<()>,
    /// Loom fails the test when its owner writes it while a borrower uses it.
    memory: UnsafeCell<u64>,
}

fn range() -> IovaRange {
    IovaRange::new(0x1000, 0x1fff).unwrap()
}

impl Page {
    fn new() -> Arc<Page> {
        let page =
            Page { leaf: AtomicU64::new(PRESENT), registry: Registry::new(), memory: UnsafeCell::new(0) };
        // Makes the shards.
        page.registry.close(range(), Attributes::empty());
        page.registry.open(range(), Attributes::empty());
        Arc::new(page)
    }

    /// Borrows, uses what was borrowed and gives it back.
    fn borrow(&self) -> bool {
        let pin = std::sync::Arc::new(());
        if self.registry.enter(range(), Attributes::READ, &pin).is_err() {
            return false;
        }
        let present = self.leaf.load(Ordering::Acquire) == PRESENT;
        if present {
            // SAFETY: what the model checks: its owner has it only when nobody has borrowed it.
            self.memory.with(|memory| unsafe { *memory });
        }
        self.registry.leave(range(), &pin);
        present
    }

    /// Unmaps, if nobody has borrowed the page; then the memory is the owner's.
    fn unmap(&self) -> bool {
        if self.leaf.compare_exchange(PRESENT, BUSY, Ordering::SeqCst, Ordering::Acquire).is_err() {
            return false;
        }
        // Loom takes sequentially consistent accesses for weaker ones; behind an exchange the engine needs no fence.
        fence(Ordering::SeqCst);
        if self.registry.any(range(), Attributes::READ) {
            self.leaf.store(PRESENT, Ordering::Release);
            return false;
        }
        self.leaf.store(ABSENT, Ordering::Release);
        // SAFETY: what the model checks.
        self.memory.with_mut(|memory| unsafe { *memory += 1 });
        true
    }

    /// Unmaps with the range closed, as an unmap does that has asked.
    fn unmap_closed(&self) -> bool {
        self.registry.close(range(), Attributes::READ);
        let unmapped = self.registry.borrowers(range(), Attributes::READ).is_empty() && {
            self.leaf.swap(ABSENT, Ordering::SeqCst);
            // SAFETY: what the model checks.
            self.memory.with_mut(|memory| unsafe { *memory += 1 });
            true
        };
        self.registry.open(range(), Attributes::READ);
        unmapped
    }
}

#[test]
fn a_borrower_and_an_unmap_see_each_other() {
    model(3, || {
        let page = Page::new();
        let borrower = page.clone();
        let thread = thread::spawn(move || borrower.borrow());
        page.unmap();
        thread.join().unwrap();
    });
}

#[test]
fn two_borrowers_are_two() {
    model(2, || {
        let page = Page::new();
        let borrowers = [(); 2].map(|()| {
            let page = page.clone();
            thread::spawn(move || page.borrow())
        });
        page.unmap();
        borrowers.into_iter().for_each(|thread| {
            let _ = thread.join().unwrap();
        });
        // All have left: nothing is in the way any more.
        assert!(!page.registry.any(range(), Attributes::READ));
    });
}

#[test]
fn nobody_borrows_what_is_closed() {
    model(3, || {
        let page = Page::new();
        let borrower = page.clone();
        let thread = thread::spawn(move || borrower.borrow());
        page.unmap_closed();
        thread.join().unwrap();
    });
}

#[test]
fn the_first_borrower_of_all_is_seen_too() {
    model(3, || {
        // Nothing has made the shards before.
        let used = Arc::new((AtomicBool::new(false), AtomicU64::new(PRESENT), UnsafeCell::new(0u64)));
        let page = used.clone();
        // The flag alone, in the order in which the registry writes it and the unmap reads it.
        let thread = thread::spawn(move || {
            page.0.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if page.1.load(Ordering::Acquire) == PRESENT {
                // SAFETY: what the model checks.
                page.2.with(|memory| unsafe { *memory });
            }
        });
        if used.1.compare_exchange(PRESENT, BUSY, Ordering::SeqCst, Ordering::Acquire).is_ok() {
            fence(Ordering::SeqCst);
            if !used.0.load(Ordering::SeqCst) {
                // SAFETY: what the model checks.
                used.2.with_mut(|memory| unsafe { *memory += 1 });
            }
        }
        thread.join().unwrap();
    });
}
