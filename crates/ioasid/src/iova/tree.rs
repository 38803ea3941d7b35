//! An ordered map from addresses to spans that finds the first or the last entry whose span is long enough.
//!
//! It is a B+ tree: entries are in the leaves, and each slot of an inner node has the lowest key and the largest span
//! under one child. The largest spans make the search go straight to an entry that fits: a child is entered only if
//! something in it is long enough, and it disappoints only if that lies on the wrong side of an end of the range that
//! was asked for, which happens along one path at most. So every operation visits at most twice as many nodes as the
//! tree has levels.
//!
//! A binary tree would do the same in fewer lines and three times the memory, with a cache miss for each level.

/// How many slots a node has. Two cache lines of keys would be enough for a search; four make the tree a level lower.
const CAPACITY: usize = 32;
/// A node other than the root has no fewer slots in use. Well below half, so that a node which was just split does not
/// have to be joined again soon.
const LEAST: usize = 8;

/// Addresses and the spans that begin there, in order of the addresses.
#[derive(Debug, Default)]
pub(super) struct Tree {
    root: Option<Box<Node>>,
}

/// A leaf, which has no children, or an inner node, which has as many as slots in use.
#[derive(Debug)]
struct Node {
    used: usize,
    /// In a leaf the keys themselves; else the lowest key of each child.
    keys: [u64; CAPACITY],
    /// In a leaf the span of each key; else the largest span of each child.
    spans: [u64; CAPACITY],
    #[allow(clippy::vec_box, reason = "a node is half a KiB, and slots move")]
    children: Vec<Box<Node>>,
}

impl Tree {
    /// Enters a key, or changes its span.
    pub(super) fn insert(&mut self, key: u64, span: u64) {
        let Some(root) = &mut self.root else {
            let mut root = Node::empty(false);
            root.put(0, key, span, None);
            self.root = Some(root);
            return;
        };
        let Some(right) = root.insert(key, span) else { return };
        let mut above = Node::empty(true);
        for (at, child) in self.root.take().into_iter().chain([right]).enumerate() {
            above.put(at, child.keys[0], child.largest(), Some(child));
        }
        self.root = Some(above);
    }

    /// Takes a key out; whether it was there.
    pub(super) fn remove(&mut self, key: u64) -> bool {
        let Some(root) = &mut self.root else { return false };
        let found = root.remove(key);
        if root.used == 0 {
            self.root = None;
        } else if root.used == 1 {
            if let Some(only) = root.children.pop() {
                self.root = Some(only);
            }
        }
        found
    }

    /// The lowest key in `from..=to` with a span of `least` or more, and its span.
    pub(super) fn first(&self, from: u64, to: u64, least: u64) -> Option<(u64, u64)> {
        self.root.as_ref()?.first(from, to, least)
    }

    /// The highest key in `from..=to` with a span of `least` or more, and its span.
    pub(super) fn last(&self, from: u64, to: u64, least: u64) -> Option<(u64, u64)> {
        self.root.as_ref()?.last(from, to, least)
    }

    /// The largest span.
    pub(super) fn largest(&self) -> Option<u64> {
        self.root.as_ref().map(|root| root.largest())
    }

    /// All keys and their spans, ascending.
    pub(super) fn for_each(&self, mut visit: impl FnMut(u64, u64)) {
        if let Some(root) = &self.root {
            root.for_each(&mut visit);
        }
    }
}

impl Node {
    fn empty(inner: bool) -> Box<Node> {
        let children = if inner { Vec::with_capacity(CAPACITY) } else { Vec::new() };
        Box::new(Node { used: 0, keys: [0; CAPACITY], spans: [0; CAPACITY], children })
    }

    fn is_leaf(&self) -> bool {
        self.children.is_empty()
    }

    fn keys(&self) -> &[u64] {
        &self.keys[..self.used]
    }

    fn largest(&self) -> u64 {
        self.spans[..self.used].iter().copied().max().unwrap_or(0)
    }

    /// The child that has the key, if there is such a key.
    fn child_of(&self, key: u64) -> usize {
        self.keys().partition_point(|lowest| *lowest <= key).saturating_sub(1)
    }

    /// Fills one more slot, of which there must be room.
    fn put(&mut self, at: usize, key: u64, span: u64, child: Option<Box<Node>>) {
        self.keys.copy_within(at..self.used, at + 1);
        self.spans.copy_within(at..self.used, at + 1);
        (self.keys[at], self.spans[at]) = (key, span);
        self.used += 1;
        if let Some(child) = child {
            self.children.insert(at, child);
        }
    }

    /// Empties a slot, and gives the child that was in it.
    fn take(&mut self, at: usize) -> Option<Box<Node>> {
        self.keys.copy_within(at + 1..self.used, at);
        self.spans.copy_within(at + 1..self.used, at);
        self.used -= 1;
        (!self.is_leaf()).then(|| self.children.remove(at))
    }

    /// Writes down what has become of a child.
    fn refresh(&mut self, at: usize) {
        let child = &self.children[at];
        (self.keys[at], self.spans[at]) = (child.keys[0], child.largest());
    }

    /// Moves the slots from `at` on to the end of another node of the same level.
    fn move_tail(&mut self, at: usize, to: &mut Node) {
        let count = self.used - at;
        to.keys[to.used..to.used + count].copy_from_slice(&self.keys[at..self.used]);
        to.spans[to.used..to.used + count].copy_from_slice(&self.spans[at..self.used]);
        to.used += count;
        self.used = at;
        if !self.is_leaf() {
            to.children.extend(self.children.drain(at..));
        }
    }

    /// Fills one more slot. A node that is full is split first, and its upper half comes back.
    fn put_or_split(
        &mut self,
        at: usize,
        key: u64,
        span: u64,
        child: Option<Box<Node>>,
    ) -> Option<Box<Node>> {
        if self.used < CAPACITY {
            self.put(at, key, span, child);
            return None;
        }
        let mut right = Node::empty(!self.is_leaf());
        self.move_tail(CAPACITY / 2, &mut right);
        match at.checked_sub(self.used) {
            Some(at) if at > 0 => right.put(at, key, span, child),
            _ => self.put(at, key, span, child),
        }
        Some(right)
    }

    fn insert(&mut self, key: u64, span: u64) -> Option<Box<Node>> {
        steps::count();
        if self.is_leaf() {
            return match self.keys().binary_search(&key) {
                Ok(at) => {
                    self.spans[at] = span;
                    None
                }
                Err(at) => self.put_or_split(at, key, span, None),
            };
        }
        let at = self.child_of(key);
        let split = self.children[at].insert(key, span);
        self.refresh(at);
        let right = split?;
        self.put_or_split(at + 1, right.keys[0], right.largest(), Some(right))
    }

    fn remove(&mut self, key: u64) -> bool {
        steps::count();
        if self.is_leaf() {
            let found = self.keys().binary_search(&key);
            if let Ok(at) = found {
                self.take(at);
            }
            return found.is_ok();
        }
        let at = self.child_of(key);
        let found = self.children[at].remove(key);
        if found {
            if self.children[at].used < LEAST {
                self.even_out(at);
            } else {
                self.refresh(at);
            }
        }
        found
    }

    /// Joins a child that has too little with a neighbour, or shares evenly with it.
    fn even_out(&mut self, at: usize) {
        let left = if at + 1 < self.used { at } else { at - 1 };
        let Some(mut right) = self.take(left + 1) else { return };
        let neighbour = &mut self.children[left];
        let sum = neighbour.used + right.used;
        if sum <= CAPACITY - LEAST {
            right.move_tail(0, neighbour);
        } else {
            let mut upper = Node::empty(!right.is_leaf());
            match (sum / 2).checked_sub(neighbour.used) {
                Some(missing) => {
                    right.move_tail(missing, &mut upper);
                    right.move_tail(0, neighbour);
                }
                None => {
                    neighbour.move_tail(sum / 2, &mut upper);
                    right.move_tail(0, &mut upper);
                }
            }
            self.put(left + 1, upper.keys[0], upper.largest(), Some(upper));
        }
        self.refresh(left);
    }

    fn first(&self, from: u64, to: u64, least: u64) -> Option<(u64, u64)> {
        steps::count();
        if self.is_leaf() {
            let begin = self.keys().partition_point(|key| *key < from);
            let at = (begin..self.used).find(|at| self.spans[*at] >= least)?;
            return (self.keys[at] <= to).then(|| (self.keys[at], self.spans[at]));
        }
        let begin = self.child_of(from);
        (begin..self.used)
            .take_while(|at| *at == begin || self.keys[*at] <= to)
            .filter(|at| self.spans[*at] >= least)
            .find_map(|at| self.children[at].first(from, to, least))
    }

    fn last(&self, from: u64, to: u64, least: u64) -> Option<(u64, u64)> {
        steps::count();
        let end = self.keys().partition_point(|key| *key <= to);
        if self.is_leaf() {
            let at = (0..end).rev().find(|at| self.spans[*at] >= least)?;
            return (self.keys[at] >= from).then(|| (self.keys[at], self.spans[at]));
        }
        for at in (0..end).rev() {
            if self.spans[at] >= least {
                let found = self.children[at].last(from, to, least);
                if found.is_some() {
                    return found;
                }
            }
            if self.keys[at] <= from {
                break;
            }
        }
        None
    }

    fn for_each(&self, visit: &mut impl FnMut(u64, u64)) {
        if self.is_leaf() {
            (0..self.used).for_each(|at| visit(self.keys[at], self.spans[at]));
        } else {
            self.children.iter().for_each(|child| child.for_each(visit));
        }
    }
}

/// Counts the nodes that operations visit, for the tests that check the bound.
pub(super) mod steps {
    #[cfg(test)]
    thread_local! {
        static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    #[inline]
    pub(super) fn count() {
        #[cfg(test)]
        STEPS.set(STEPS.get() + 1);
    }

    /// How many nodes `operation` visits on this thread.
    #[cfg(test)]
    pub(in crate::iova) fn of<T>(operation: impl FnOnce() -> T) -> (T, u64) {
        let before = STEPS.get();
        let result = operation();
        (result, STEPS.get() - before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Checks what every node promises; returns the number of levels.
    fn check(node: &Node, root: bool) -> usize {
        assert!(node.keys().windows(2).all(|pair| pair[0] < pair[1]));
        assert!(node.used <= CAPACITY && (root || node.used >= LEAST), "{} slots", node.used);
        if node.is_leaf() {
            return 1;
        }
        assert!(node.children.len() == node.used && node.used >= 2);
        let levels: Vec<usize> = node.children.iter().map(|child| check(child, false)).collect();
        for (at, child) in node.children.iter().enumerate() {
            assert_eq!((node.keys[at], node.spans[at]), (child.keys[0], child.largest()));
            assert!(at + 1 == node.used || child.keys[child.used - 1] < node.keys[at + 1]);
        }
        assert!(levels.iter().all(|level| *level == levels[0]));
        levels[0] + 1
    }

    fn compare(tree: &Tree, model: &BTreeMap<u64, u64>) {
        if let Some(root) = &tree.root {
            check(root, true);
        }
        let mut all = Vec::new();
        tree.for_each(|key, span| all.push((key, span)));
        assert!(all.into_iter().eq(model.iter().map(|(key, span)| (*key, *span))));
        assert_eq!(tree.largest(), model.values().copied().max());
    }

    proptest! {
        /// Phases of adding and of removing, so that trees of several levels grow and shrink.
        #[test]
        fn is_an_ordered_map(
            phases in proptest::collection::vec((any::<bool>(), 1..600_usize, any::<u64>()), 1..8),
            questions in proptest::collection::vec((0..4096_u64, 0..4096_u64, 0..64_u64), 40),
        ) {
            let (mut tree, mut model) = (Tree::default(), BTreeMap::new());
            for (adding, count, seed) in phases {
                let mut random = seed;
                for _ in 0..count {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (key, span) = (random >> 40 & 0xfff, random >> 58);
                    if adding {
                        tree.insert(key, span);
                        model.insert(key, span);
                    } else {
                        // Mostly a key that is there.
                        let key = model.range(key..).next().map_or(key, |(key, _)| *key);
                        prop_assert_eq!(tree.remove(key), model.remove(&key).is_some());
                    }
                }
                compare(&tree, &model);
                for &(a, b, least) in &questions {
                    let (from, to) = (a.min(b), a.max(b));
                    let mut fits = model.range(from..=to).filter(|(_, span)| **span >= least);
                    let first = fits.next().map(|(key, span)| (*key, *span));
                    let last = fits.next_back().map(|(key, span)| (*key, *span)).or(first);
                    prop_assert_eq!(tree.first(from, to, least), first);
                    prop_assert_eq!(tree.last(from, to, least), last);
                }
            }
        }
    }
}
