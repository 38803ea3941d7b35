//! A cursor over what a range holds: leaves, and the holes between them.
//!
//! It holds no lock and no snapshot. Each step reads the table as it is then; in between it remembers only in which
//! table it stands, so that a run of pages costs one load each.

use super::{Leaf, Node, Radix, leaf_span};
use crate::address::{IovaRange, Oa};
use crate::atomic::AtomicEntry;
use crate::format::{Entry, Format};
use crate::memory::TableMemory;

/// A piece of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// A leaf, with all that it maps, also if it reaches over the end of the range.
    Leaf(Leaf),
    /// Nothing is mapped here; something is, or the range ends, before it and behind it.
    Hole(IovaRange),
}

/// The spans of a range in ascending order. See [`Radix::cursor`].
#[derive(Debug)]
pub struct Cursor<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    /// Where the next span begins; `None` behind the last one.
    at: Option<u64>,
    last: u64,
    /// A table, and the addresses that it covers.
    table: Option<(Node<A>, IovaRange)>,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Cursor<'_, F, M, A> {
    /// What stands at the address: a leaf, or nothing up to and including the address returned.
    fn look(&mut self, at: u64) -> Result<Leaf, u64> {
        let radix = self.radix;
        let mut node = match self.table {
            Some((node, covers)) if covers.contains(at) => node,
            _ => {
                let Some(root) = radix.root() else { return Err(self.last) };
                match radix.covered(root.level, at, self.last) {
                    None => return Err(self.last),
                    Some(piece) if piece.first() > at => return Err(piece.first() - 1),
                    Some(_) => root,
                }
            }
        };
        loop {
            let low = (1u64 << radix.format.shift(node.level)) - 1;
            let value = radix.entry(node, radix.index(node.level, at)).load();
            match radix.format.decode(node.level, value) {
                Entry::Table(address) if node.level > 1 => {
                    node = radix.child(node, address);
                    self.table = IovaRange::new(at & !low, at | low).map(|covers| (node, covers));
                }
                Entry::Leaf { oa, size, attributes } => {
                    return Ok(Leaf { iova: leaf_span(at, size).0, oa: Oa::new(oa), size, attributes });
                }
                _ => return Err(at | low),
            }
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Iterator for Cursor<'_, F, M, A> {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        let first = self.at?;
        let mut at = first;
        loop {
            match self.look(at) {
                Ok(leaf) if at == first => {
                    let last = leaf.range().last();
                    self.at = if last < self.last { Some(last + 1) } else { None };
                    return Some(Span::Leaf(leaf));
                }
                Ok(_) => {
                    self.at = Some(at);
                    return IovaRange::new(first, at - 1).map(Span::Hole);
                }
                Err(last) if last < self.last => at = last + 1,
                Err(_) => {
                    self.at = None;
                    return IovaRange::new(first, self.last).map(Span::Hole);
                }
            }
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// What the range holds, leaf by leaf and hole by hole. What other operations change meanwhile may or may not be
    /// seen.
    ///
    /// A cursor is a walk: tables that are retired while it exists may be freed only when it is gone.
    pub fn cursor(&self, range: IovaRange) -> Cursor<'_, F, M, A> {
        Cursor { radix: self, at: Some(range.first()), last: range.last(), table: None }
    }
}
