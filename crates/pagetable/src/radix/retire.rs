//! How an empty table goes away: kept for a while, declared dead, unlinked, handed over.
//!
//! The protocol is described in the [module above](super). Here are its steps, and a visitor that looks for empty
//! tables where no removal has come by.

use super::{COUNT, DEAD, GENERATIONS, KEPT, KEPT_LIMIT, Next, Node, Radix, Slot, Stop, Visitor};
use crate::address::IovaRange;
use crate::atomic::AtomicEntry;
use crate::format::Format;
use crate::gather::{Gather, RetiredTable};
use crate::memory::TableMemory;
use core::sync::atomic::Ordering;

/// Retires empty tables and changes no translation.
pub(super) struct Sweep<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    pub(super) radix: &'a Radix<F, M, A>,
    pub(super) gather: &'a mut Gather<M, A>,
    /// Give up at the first entry in use.
    pub(super) until_used: bool,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Sweep<'_, F, M, A> {
    type Error = ();

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<()>> {
        if self.until_used && slot.value != 0 { Err(Stop::Error(())) } else { Ok(Next::After(slot.last)) }
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), ()> {
        self.radix.prune(self.gather, slot, child, whole);
        Ok(())
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Retires `child`, to which `slot` leads, if it is empty and need not stay.
    pub(super) fn prune(&self, gather: &mut Gather<M, A>, slot: &Slot<'_, A>, child: Node<A>, whole: bool) {
        let live = self.live(child);
        let word = live.load();
        if word & (COUNT | DEAD) != 0 {
            return;
        }
        if !whole {
            if word & KEPT != 0 {
                return;
            }
            if self.kept.fetch_add(1, Ordering::Relaxed) < KEPT_LIMIT
                && live.compare_exchange(word, KEPT).is_ok()
            {
                return;
            }
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        if self.bury(child, word) {
            self.unlink(gather, slot, child);
        }
    }

    /// Takes the link to a dead table away, unless somebody else did.
    pub(super) fn unlink(&self, gather: &mut Gather<M, A>, slot: &Slot<'_, A>, child: Node<A>) {
        // The link cannot have been changed back: the table's page is not used again while we run.
        if slot.entry.compare_exchange(slot.value, 0).is_ok() {
            self.subtract_live(slot.node, 1);
            self.retire(gather, child, true);
        }
    }

    /// Retires the empty tables on the way to `at`, or keeps them as `prune` does.
    pub(super) fn sweep_path(&self, at: u64, gather: &mut Gather<M, A>) {
        if let Some(range) = IovaRange::new(at, at) {
            self.sweep(range, gather);
        }
    }

    /// Retires the empty tables of a range, or keeps them as `prune` does.
    #[cold]
    pub(super) fn sweep(&self, range: IovaRange, gather: &mut Gather<M, A>) {
        let _ = self.run(&mut Sweep { radix: self, gather, until_used: false }, range);
    }

    /// Whether a table whose live count is `word` now may have to go. `whole`: all of it was emptied at once.
    #[inline(always)]
    pub(super) fn is_idle(&self, word: u64, whole: bool) -> bool {
        word & (COUNT | DEAD) == 0 && (whole || word & KEPT == 0)
    }

    /// Declares an empty table dead, whose live count was read as `word`. It can be unlinked then.
    pub(super) fn bury(&self, node: Node<A>, word: u64) -> bool {
        let buried = word & (COUNT | DEAD) == 0 && self.live(node).compare_exchange(word, DEAD).is_ok();
        if buried && word & KEPT != 0 {
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        buried
    }

    /// Hands over a table that this operation has just unlinked. `empty`: all of its entries are 0.
    pub(super) fn retire(&self, gather: &mut Gather<M, A>, node: Node<A>, empty: bool) {
        // An exchange, not a store: whoever reads the number of a later retirement must have seen this unlinking
        // too, or could remember a way to this table under that number and find it freed.
        self.generation.swap(GENERATIONS.fetch_add(1, Ordering::Relaxed));
        self.tables.fetch_sub(1, Ordering::Relaxed);
        gather.tables_changed = true;
        gather.retired.push(RetiredTable {
            empty,
            table: node.table,
            layout: self.format.table_layout(node.level),
            memory: self.memory.clone(),
        });
    }
}
