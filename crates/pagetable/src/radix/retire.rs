//! How an empty table goes away: kept for a while, declared dead, unlinked, handed over.
//!
//! The protocol is described in the [module above](super). Here are its steps, and a visitor that looks for empty
//! tables where no removal has come by.

use super::{DEAD, DEATHS, DYING, GENERATIONS, KEPT, KEPT_LIMIT, Next, Node, Radix, Slot, Stop, Visitor};
use crate::address::IovaRange;
use crate::atomic::AtomicEntry;
use crate::format::{Entry, Format};
use crate::gather::{Gather, RetiredTable};
use crate::memory::TableMemory;
use core::sync::atomic::Ordering;

/// How those who fill entries of a table make sure that they are seen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Filling {
    /// By exchanges: the claiming mode.
    Exchange,
    /// By stores and light fences: the exclusive mode.
    Store,
    /// Nobody can be filling: the caller has all of the table's span to himself, in exclusive mode.
    Nobody,
}

/// Retires empty tables and changes no translation.
pub(super) struct Sweep<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    pub(super) radix: &'a Radix<F, M, A>,
    pub(super) gather: &'a mut Gather<M, A>,
    pub(super) filling: Filling,
    /// Give up at the first entry in use.
    pub(super) until_used: bool,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Sweep<'_, F, M, A> {
    type Error = ();

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<()>> {
        if self.until_used && slot.value != 0 { Err(Stop::Error(())) } else { Ok(Next::After(slot.last)) }
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), ()> {
        self.radix.prune(self.gather, slot, child, whole, self.filling);
        Ok(())
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

/// Whether nothing is in the entries.
#[inline(always)]
pub(super) fn all_absent<A: AtomicEntry>(entries: &[A]) -> bool {
    let (groups, rest) = entries.split_at(entries.len() & !7);
    // Eight at a time, which is a cache line: one branch for all of them.
    groups.chunks_exact(8).all(|group| group.iter().fold(0, |any, entry| any | entry.load()) == 0)
        && rest.iter().all(|entry| entry.load() == 0)
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// After entries of `node` were filled, and fenced: whether they will stay. `false`: the table is going away, and
    /// they have to be taken back.
    #[inline(always)]
    pub(super) fn stays(&self, node: Node<A>) -> bool {
        self.state(node).load_after_exchange() & (DYING | DEAD) == 0 || self.revive(node)
    }

    #[cold]
    fn revive(&self, node: Node<A>) -> bool {
        loop {
            let word = self.state(node).load();
            if word & DEAD != 0 {
                return false;
            }
            if word & DYING == 0 || self.state(node).compare_exchange(word, word & !DYING).is_ok() {
                return true;
            }
        }
    }

    /// After a tentative link was found in `node`: whether it will stay. `false`: the table is going away.
    #[cold]
    pub(super) fn confirm(&self, node: Node<A>) -> bool {
        // An exchange, though it changes nothing: either the one who marks the table later sees the link, as this
        // operation has, or this sees his mark.
        self.state(node).fetch_add(0) & (DYING | DEAD) == 0 || self.revive(node)
    }

    /// Whether a table from which the entries `index..index + count` have been emptied may have to go. The first look is
    /// at the neighbours, of which mostly one is in use.
    #[inline(always)]
    pub(super) fn is_idle(&self, node: Node<A>, index: usize, count: usize) -> bool {
        let entries = self.all_entries(node);
        let in_use = |index: usize| entries.get(index).is_some_and(|entry| entry.load() != 0);
        if in_use(index + count) || in_use(index.wrapping_sub(1)) {
            return false;
        }
        count == entries.len() || (self.state(node).load() & KEPT == 0 && self.is_empty(node, index))
    }

    #[inline(never)]
    fn is_empty(&self, node: Node<A>, index: usize) -> bool {
        let (before, behind) = self.all_entries(node).split_at(index & !7);
        all_absent(behind) && all_absent(before)
    }

    /// Whether nothing is in a table, or in those that it leads to.
    pub(super) fn is_unused(&self, node: Node<A>) -> bool {
        self.all_entries(node).iter().map(A::load).all(|value| {
            value == 0
                || match self.format.decode(node.level, value) {
                    Entry::Table(address) => node.level > 1 && self.is_unused(self.child(node, address)),
                    _ => false,
                }
        })
    }

    /// Retires `child`, to which `slot` leads, if it is empty and need not stay.
    pub(super) fn prune(
        &self,
        gather: &mut Gather<M, A>,
        slot: &Slot<'_, A>,
        child: Node<A>,
        whole: bool,
        filling: Filling,
    ) {
        // Who has linked it a moment ago is about to fill it.
        if slot.value & F::TENTATIVE != 0 || !all_absent(self.all_entries(child)) {
            return;
        }
        if !whole {
            let state = self.state(child);
            let word = state.load();
            if word & (KEPT | DEAD) != 0 {
                return;
            }
            if self.kept.fetch_add(1, Ordering::Relaxed) < KEPT_LIMIT
                && state.compare_exchange(word, word | KEPT).is_ok()
            {
                return;
            }
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        if self.bury(child, filling) {
            self.unlink(gather, slot, child);
        }
    }

    /// Takes the link to a dead table away, unless somebody else did.
    pub(super) fn unlink(&self, gather: &mut Gather<M, A>, slot: &Slot<'_, A>, child: Node<A>) {
        // The link cannot have been changed back: the table's page is not used again while we run.
        if slot.entry.compare_exchange(slot.value, 0).is_ok() {
            self.clean(core::slice::from_ref(slot.entry));
            self.retire(gather, child);
        }
    }

    /// Retires the empty tables on the way to `at`, or keeps them as `prune` does.
    pub(super) fn sweep_path(&self, at: u64, gather: &mut Gather<M, A>, filling: Filling) {
        if let Some(range) = IovaRange::new(at, at) {
            self.sweep(range, gather, filling);
        }
    }

    /// Retires the empty tables of a range, or keeps them as `prune` does.
    #[cold]
    pub(super) fn sweep(&self, range: IovaRange, gather: &mut Gather<M, A>, filling: Filling) {
        let _ = self.run(&mut Sweep { radix: self, gather, filling, until_used: false }, range);
    }

    /// Declares an empty table dead. It can be unlinked then.
    pub(super) fn bury(&self, node: Node<A>, filling: Filling) -> bool {
        let state = self.state(node);
        let word = state.load();
        if word & DEAD != 0 {
            return false;
        }
        let dying = (word & KEPT) | DYING | (word.wrapping_add(1) & DEATHS);
        if state.compare_exchange(word, dying).is_err() {
            return false;
        }
        if filling == Filling::Store {
            self.memory.heavy_fence();
        }
        if self.all_entries(node).iter().any(|entry| entry.load_after_exchange() != 0) {
            // Whoever marked it anew, or took the mark away, knows better.
            let _ = state.compare_exchange(dying, dying & !DYING);
            return false;
        }
        let buried = state.compare_exchange(dying, DEAD).is_ok();
        if buried && word & KEPT != 0 {
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        buried
    }

    /// Hands over a table that this operation has just unlinked, and that is empty.
    pub(super) fn retire(&self, gather: &mut Gather<M, A>, node: Node<A>) {
        self.hand_over(gather, node, true);
        self.retired(gather);
    }

    /// Hands over a table with all that is in it, which this operation has just unlinked and nobody else can change.
    pub(super) fn retire_with_contents(&self, gather: &mut Gather<M, A>, node: Node<A>) {
        self.hand_over_all(gather, node);
        self.retired(gather);
    }

    fn hand_over_all(&self, gather: &mut Gather<M, A>, node: Node<A>) {
        if node.level > 1 {
            for entry in self.all_entries(node) {
                if let Entry::Table(address) = self.format.decode(node.level, entry.load()) {
                    self.hand_over_all(gather, self.child(node, address));
                }
            }
        }
        if self.state(node).load() & KEPT != 0 {
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        self.hand_over(gather, node, false);
    }

    fn hand_over(&self, gather: &mut Gather<M, A>, node: Node<A>, empty: bool) {
        gather.retired.push(RetiredTable {
            empty,
            table: node.table,
            layout: self.format.table_layout(node.level),
            memory: self.memory.clone(),
        });
    }

    /// After tables were unlinked: from now on no remembered way leads to them.
    fn retired(&self, gather: &mut Gather<M, A>) {
        // An exchange, not a store: whoever reads the number of a later retirement must have seen this unlinking
        // too, or could remember a way to this table under that number and find it freed.
        self.generation.swap(GENERATIONS.fetch_add(1, Ordering::Relaxed));
        gather.tables_changed = true;
    }
}
