//! One sequence of operations, on our table and on the kernel's.
//!
//! The kernel's side is told what to do as soon as ours has done it; what it answers is read later and compared with
//! what ours said. The two differ in one thing by design: the kernel unmaps leaves as they were mapped and cuts none,
//! so where a part of a mapping goes, the kernel's side unmaps all of it and maps the rest again. What translates
//! afterwards is the same, though not in the same leaves; as long as nothing was cut, the leaves are the same too.
//!
//! Our side may cut a leaf that is in use, or say that the format does not allow it
//! ([`UnmapError::NeedsBreak`]). Whether it says so is compared with the format's facts, and then the caller's part is
//! done: the leaf is unmapped and mapped again in two pieces.

use std::{collections::BTreeMap, ops::ControlFlow, sync::atomic::AtomicU64};

use ioasid_pagetable::{
    Attributes, CachedWalk, Format, Gather, HeapTables, IovaRange, Leaf, LiveChanges, MapError, Oa, Radix,
    UnmapError, WalkFault,
};

use super::{
    answers::{Expected, complaint},
    entries::{self, Extent, Extents, Runs},
    operations::{Facts, NO_EXECUTE, Operation, READ, Random, WRITE},
    peer::{Peer, Questions},
};

/// What the kernel does with a format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialect {
    /// The kernel gives them to all leaves.
    pub(crate) always: Attributes,
    /// Leaves say whether code may be fetched.
    pub(crate) executes: bool,
    /// Dirty pages can be harvested.
    pub(crate) dirty: bool,
}

impl Dialect {
    /// The attributes of leaves with these protection bits of the kernel's.
    fn attributes(self, protection: u8) -> Attributes {
        let mut attributes = self.always;
        attributes.set(Attributes::READ, protection & READ != 0);
        attributes.set(Attributes::WRITE, protection & WRITE != 0);
        attributes.set(Attributes::EXECUTE, self.executes && protection & NO_EXECUTE == 0);
        attributes
    }
}

/// Where the two sides differ.
#[derive(Debug, Clone)]
pub(crate) struct Difference {
    /// After how many operations.
    pub(crate) after: usize,
    pub(crate) what: String,
}

impl From<anyhow::Error> for Difference {
    fn from(error: anyhow::Error) -> Difference {
        // The kernel's side has ended, or says what nobody understands.
        Difference { after: usize::MAX, what: format!("{error:#}") }
    }
}

/// What was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Counts {
    pub(crate) sequences: u64,
    /// Sequences after which the tables had to be alike entry by entry, because no leaf was cut.
    pub(crate) alike: u64,
    pub(crate) operations: u64,
    /// Of those, what both sides refused.
    pub(crate) refused: u64,
    /// Of those, what only we refused, because the kernel overlooks something.
    pub(crate) overlooked: u64,
    /// How often a leaf had to be absent before it could be cut.
    pub(crate) breaks: u64,
    /// Addresses looked up on both sides.
    pub(crate) walks: u64,
    /// Stretches of dirty pages that were harvested.
    pub(crate) harvested: u64,
    /// Leaf entries that were the same.
    pub(crate) entries: u64,
    /// Table pages at the ends of all sequences. Ours are never more, cut or not.
    pub(crate) our_tables: u64,
    pub(crate) kernel_tables: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Counts) {
        for (sum, more) in [
            (&mut self.sequences, other.sequences),
            (&mut self.alike, other.alike),
            (&mut self.operations, other.operations),
            (&mut self.refused, other.refused),
            (&mut self.overlooked, other.overlooked),
            (&mut self.breaks, other.breaks),
            (&mut self.walks, other.walks),
            (&mut self.harvested, other.harvested),
            (&mut self.entries, other.entries),
            (&mut self.our_tables, other.our_tables),
            (&mut self.kernel_tables, other.kernel_tables),
        ] {
            *sum += more;
        }
    }
}

/// A mapping as the kernel's side has it.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    last: u64,
    output: u64,
    protection: u8,
}

/// Runs the operations on both sides and compares them.
pub(crate) fn compare<F: Format>(
    format: &F,
    dialect: Dialect,
    name: &str,
    operations: &[Operation],
    random: Random,
    peer: &mut Peer,
) -> Result<Counts, Difference> {
    let opened = peer.ask(&format!("open {name}"))?;
    if opened != "ok" {
        return Err(Difference { after: 0, what: format!("the kernel's side cannot open it: {opened}") });
    }
    let mut comparison = Comparison {
        facts: Facts::of(format, dialect.dirty),
        dialect,
        radix: Radix::new(format.clone(), HeapTables),
        cache: CachedWalk::new(),
        mapped: BTreeMap::new(),
        unlike: false,
        questions: Questions::new(),
        random,
        peer,
        done: 0,
        counts: Counts { sequences: 1, ..Counts::default() },
    };
    for operation in operations {
        comparison.operation(operation)?;
        comparison.done += 1;
    }
    comparison.finish()
}

struct Comparison<'a, F: Format> {
    facts: Facts,
    dialect: Dialect,
    radix: Radix<F>,
    /// Serves through the whole sequence.
    cache: CachedWalk<AtomicU64>,
    /// By first address; those of the kernel's side, whose edges are where ours can be expected to change too.
    mapped: BTreeMap<u64, Mapping>,
    /// A part of a mapping was unmapped, or a table grew on one side, so the leaves need not be alike any more.
    unlike: bool,
    questions: Questions<(usize, Expected)>,
    random: Random,
    peer: &'a mut Peer,
    /// Operations so far.
    done: usize,
    counts: Counts,
}

impl<F: Format> Comparison<'_, F> {
    fn differ<T>(&self, what: String) -> Result<T, Difference> {
        Err(Difference { after: self.done + 1, what })
    }

    fn operation(&mut self, operation: &Operation) -> Result<(), Difference> {
        self.counts.operations += 1;
        let range = match *operation {
            Operation::Map { range, output, protection } => {
                self.map(range, output, protection)?;
                range
            }
            Operation::Unmap { range } => {
                self.unmap(range)?;
                range
            }
            Operation::Write { iova } => return self.write(iova),
            Operation::Harvest { range } => return self.harvest(range),
        };
        self.walk_around(range)?;
        if self.questions.is_full() { self.ask() } else { Ok(()) }
    }

    fn map(&mut self, range: IovaRange, output: u64, protection: u8) -> Result<(), Difference> {
        // Nobody vouches for anything here, so retired tables leak when this is dropped: a few kilobytes a sequence.
        let mut gather = Gather::new();
        let attributes = self.dialect.attributes(protection);
        let expected = match self.radix.map(range, Oa::new(output), attributes, &mut gather) {
            Ok(()) => {
                self.mapped.insert(range.first(), Mapping { last: range.last(), output, protection });
                self.unlike |= self.kernel_grows(range, output);
                Expected::Mapped(range)
            }
            Err(error) => {
                self.counts.refused += 1;
                if self.kernel_overlooks(range, output, error) {
                    self.counts.overlooked += 1;
                    return Ok(());
                }
                Expected::Refused(range, error)
            }
        };
        self.kernel_map(range, output, protection, expected);
        Ok(())
    }

    /// Whether the kernel's table grows a level for the sake of a larger leaf. Ours grows only when an address asks for
    /// it, and has several smaller leaves. It takes a mapping of exactly what the table could translate before.
    fn kernel_grows(&self, range: IovaRange, output: u64) -> bool {
        let format = self.radix.format();
        let Some((_, top)) = self.radix.top() else { return false };
        let width = format.width(top);
        range.first() == 0
            && range.last().count_ones() == width
            && range.last().trailing_ones() == width
            && self.facts.sizes.contains(&width)
            && output.trailing_zeros() >= width
            && top < *format.top_levels().end()
    }

    /// Whether the kernel would map what we refuse: across the edge of a sign-extended table, or to output addresses of
    /// which only the later ones do not fit the entries. It checks the first one, and the others wrap around. Its callers
    /// are expected not to ask for either.
    fn kernel_overlooks(&self, range: IovaRange, output: u64, error: MapError) -> bool {
        match error {
            MapError::OutOfRange { .. } => self.facts.kernel_overlooks(&range),
            MapError::OutputOutOfRange { .. } => output >> self.facts.output_bits == 0,
            _ => false,
        }
    }

    fn kernel_map(&mut self, range: IovaRange, output: u64, protection: u8, expected: Expected) {
        let (first, length) = (range.first(), range.last().wrapping_sub(range.first()).wrapping_add(1));
        let question = format_args!("map {first:x} {output:x} {length:x} {protection:x}");
        self.questions.push(question, (self.done, expected));
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), Difference> {
        self.unmap_ours(range)?;
        // The kernel's side: whole mappings, neighbours at once; then what stays of the first and the last.
        let mut touched = self.touched(range);
        let mut stays = Vec::new();
        while let Some(&(first, mapping)) = touched.first() {
            let mut last = mapping.last;
            let neighbours = 1 + touched[1..]
                .iter()
                .take_while(|(next, mapping)| {
                    let follows = last.checked_add(1) == Some(*next);
                    if follows {
                        last = mapping.last;
                    }
                    follows
                })
                .count();
            for (first, mapping) in touched.drain(..neighbours) {
                self.mapped.remove(&first);
                if first < range.first() {
                    stays.push((first, Mapping { last: range.first() - 1, ..mapping }));
                }
                if mapping.last > range.last() {
                    let behind = range.last() + 1;
                    stays.push((behind, Mapping { output: mapping.output + (behind - first), ..mapping }));
                }
            }
            let Some(whole) = IovaRange::new(first, last) else { continue };
            let length = last.wrapping_sub(first).wrapping_add(1);
            self.questions
                .push(format_args!("unmap {first:x} {length:x}"), (self.done, Expected::Unmapped(whole)));
        }
        for (first, mapping) in stays {
            self.unlike = true;
            if let Some(range) = IovaRange::new(first, mapping.last) {
                self.mapped.insert(first, mapping);
                self.kernel_map(range, mapping.output, mapping.protection, Expected::Mapped(range));
            }
        }
        Ok(())
    }

    /// The mappings that have an address in the range, ascending.
    fn touched(&self, range: IovaRange) -> Vec<(u64, Mapping)> {
        let before = self.mapped.range(..range.first()).next_back();
        let before = before.filter(|(_, mapping)| mapping.last >= range.first());
        let inside = self.mapped.range(range.first()..=range.last());
        before.into_iter().chain(inside).map(|(&first, &mapping)| (first, mapping)).collect()
    }

    fn unmap_ours(&mut self, range: IovaRange) -> Result<(), Difference> {
        loop {
            let in_the_way = self.leaves_to_break(range);
            let mut gather = Gather::new();
            match self.radix.unmap(range, &mut gather) {
                Ok(()) if in_the_way.is_empty() => {
                    let report: Vec<_> = gather.runs.iter().collect();
                    let expected = self.mapped_runs(range);
                    if report != expected {
                        return self.differ(format!("unmapping reports {report:?}, not {expected:?}"));
                    }
                    return Ok(());
                }
                Ok(()) => {
                    return self.differ(format!("we unmapped without a break; in the way: {in_the_way:?}"));
                }
                Err(UnmapError::NeedsBreak { at, size }) => {
                    let named = in_the_way.iter().find(|leaf| leaf.iova == at && leaf.size == size);
                    let Some(&leaf) = named else {
                        return self.differ(format!(
                            "we want the leaf of {size} at {at:#x} broken; in the way: {in_the_way:?}"
                        ));
                    };
                    if !gather.runs.is_empty() {
                        return self.differ(format!("a refused unmap reports {:?}", gather.runs));
                    }
                    self.break_leaf(leaf, range)?;
                }
                Err(error) => return self.differ(format!("we do not unmap: {error}")),
            }
        }
    }

    // -------------------------------------------------------------------------------------------- dirty pages

    /// Once a mapping was cut, the kernel's side has mapped pieces of it again, and those are clean.
    fn write(&mut self, iova: u64) -> Result<(), Difference> {
        let point = IovaRange::new(iova, iova).unwrap_or(IovaRange::ALL);
        if self.unlike || !self.dialect.dirty || self.facts.kernel_overlooks(&point) {
            return Ok(());
        }
        let marked = self.radix.mark(iova, Attributes::DIRTY);
        self.questions
            .push(format_args!("dirty {iova:x}"), (self.done, Expected::Marked(iova, marked.err())));
        Ok(())
    }

    fn harvest(&mut self, range: IovaRange) -> Result<(), Difference> {
        // A sequence of which something was left out may ask for a part of a leaf.
        let cuts = |leaf: Leaf| !range.covers(&leaf.range());
        let cut = [range.first(), range.last()].iter().any(|&end| self.radix.walk(end).is_ok_and(cuts));
        if self.unlike || !self.dialect.dirty || cut || !self.facts.accepts(&range) {
            return Ok(());
        }
        let mut ours = ioasid_pagetable::Runs::default();
        self.radix.read_and_clear_dirty(range, |dirty| ours.push(dirty));
        self.ask()?;
        let (first, length) = (range.first(), range.last().wrapping_sub(range.first()).wrapping_add(1));
        let mut kernels = ioasid_pagetable::Runs::default();
        for dirty in self.peer.harvest(first, length)? {
            kernels.push(dirty);
        }
        self.counts.harvested += ours.iter().count() as u64;
        if ours != kernels {
            let shown = |runs: &ioasid_pagetable::Runs| runs.iter().collect::<Vec<_>>();
            let (ours, kernels) = (shown(&ours), shown(&kernels));
            return self.differ(format!("to us {ours:?} is dirty, to the kernel {kernels:?}"));
        }
        Ok(())
    }

    // ----------------------------------------------------------------------------------------------- unmapping

    /// What is mapped in the range, neighbours joined.
    fn mapped_runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = ioasid_pagetable::Runs::default();
        for (first, mapping) in self.touched(range) {
            let mapped = IovaRange::new(first, mapping.last);
            if let Some(run) = mapped.and_then(|mapped| mapped.intersection(&range)) {
                runs.push(run);
            }
        }
        runs.iter().collect()
    }

    /// The leaves that reach over an end of the range and cannot be cut while they are in use, by the format's facts.
    fn leaves_to_break(&self, range: IovaRange) -> Vec<Leaf> {
        let ends = [Some(range.first()), range.last().checked_add(1)];
        let ends = ends.into_iter().flatten();
        ends.filter_map(|end| {
            let leaf = self.radix.walk(end).ok()?;
            (leaf.iova < end && !self.can_cut(leaf, end)).then_some(leaf)
        })
        .collect()
    }

    /// Whether a leaf can be cut until another begins at `end`.
    fn can_cut(&self, leaf: Leaf, end: u64) -> bool {
        let format = self.radix.format();
        let size = leaf.size.log2();
        let Some(level) = (1..=*format.top_levels().end()).find(|&level| format.shift(level) == size) else {
            return false;
        };
        format.live_changes().contains(LiveChanges::SIZE)
            && (1..level)
                .rev()
                .find(|&lower| end & ((1 << format.shift(lower)) - 1) == 0 || lower == 1)
                .is_some_and(|lowest| {
                    (lowest..level).all(|level| format.leaf_sizes(level) >> format.shift(level) & 1 != 0)
                })
    }

    /// What a caller does about a leaf that cannot be cut: it goes, and comes back in two pieces.
    fn break_leaf(&mut self, leaf: Leaf, range: IovaRange) -> Result<(), Difference> {
        self.counts.breaks += 1;
        let whole = leaf.range();
        let boundary = if whole.first() < range.first() { range.first() } else { range.last() + 1 };
        let mut gather = Gather::new();
        if let Err(error) = self.radix.unmap(whole, &mut gather) {
            return self.differ(format!(
                "the leaf of {} at {:#x} cannot be unmapped whole: {error}",
                leaf.size, leaf.iova
            ));
        }
        if gather.runs.iter().ne([whole]) || gather.leaves != 1 {
            return self.differ(format!("unmapping the leaf {whole} reports {gather:?}"));
        }
        let pieces = [IovaRange::new(whole.first(), boundary - 1), IovaRange::new(boundary, whole.last())];
        for piece in pieces.into_iter().flatten() {
            let output = leaf.output(piece.first());
            if let Err(error) = self.radix.map(piece, output, leaf.attributes, &mut gather) {
                return self.differ(format!("a piece of a broken leaf cannot be mapped: {error}"));
            }
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------------- translations

    /// Looks at the ends of a range from both sides, inside it, and at the ends of something else.
    fn walk_around(&mut self, range: IovaRange) -> Result<(), Difference> {
        self.walk_at_ends(range)?;
        let inside = range.first() + self.random.below((range.last() - range.first()).max(1));
        self.walk(inside)?;
        let number = self.random.below(self.mapped.len().max(1) as u64) as usize;
        if let Some((&first, mapping)) = self.mapped.iter().nth(number) {
            let offset = self.random.below((mapping.last - first).max(1));
            self.walk(first + offset)?;
        }
        Ok(())
    }

    fn walk_at_ends(&mut self, range: IovaRange) -> Result<(), Difference> {
        let (first, last) = (range.first(), range.last());
        for iova in [first, first.wrapping_sub(1), last, last.wrapping_add(1)] {
            self.walk(iova)?;
        }
        Ok(())
    }

    fn walk(&mut self, iova: u64) -> Result<(), Difference> {
        self.counts.walks += 1;
        let found = self.radix.walk(iova);
        let cached = self.radix.walk_cached(iova, &mut self.cache);
        if found != cached {
            return self.differ(format!("{iova:#x}: the walk finds {found:?}, the cached walk {cached:?}"));
        }
        let out_of_range = matches!(found, Err(WalkFault::OutOfRange(at)) if at == iova);
        let point = IovaRange::new(iova, iova).unwrap_or(IovaRange::ALL);
        if out_of_range == self.facts.accepts(&point) {
            return self.differ(format!("{iova:#x}: the walk finds {found:?}"));
        }
        if self.facts.kernel_overlooks(&point) {
            return Ok(());
        }
        let output = found.ok().map(|leaf| leaf.output(iova).get());
        self.questions.push(format_args!("walk {iova:x}"), (self.done, Expected::Walked(iova, output)));
        Ok(())
    }

    /// Sends what there is to ask, and compares the answers.
    fn ask(&mut self) -> Result<(), Difference> {
        self.questions.ask(self.peer, |(done, expected), answer| {
            complaint(&expected, answer).map_or(Ok(()), |what| Err(Difference { after: done + 1, what }))
        })
    }

    // --------------------------------------------------------------------------------------------- the whole

    fn finish(mut self) -> Result<Counts, Difference> {
        self.done = self.done.saturating_sub(1);
        let mapped: Vec<_> =
            self.mapped.iter().filter_map(|(&first, mapping)| IovaRange::new(first, mapping.last)).collect();
        for range in mapped {
            self.walk_at_ends(range)?;
        }
        for edge in self.facts.edges() {
            self.walk(edge)?;
            self.walk(edge.wrapping_sub(1))?;
        }
        self.ask()?;
        self.compare_entries()?;
        let tables = self.peer.ask("tables")?;
        let Some(tables) = tables.strip_prefix("ok ").and_then(|count| count.parse::<u64>().ok()) else {
            return self.differ(format!("the kernel's side counts its tables as '{tables}'"));
        };
        let ours = self.radix.table_count();
        if ours > tables {
            return self.differ(format!("we have {ours} table pages, the kernel {tables}"));
        }
        self.counts.our_tables = ours;
        self.counts.kernel_tables = tables;
        let closed = self.peer.ask("close")?;
        if closed != "ok" {
            return self.differ(format!("the kernel's table cannot be closed: {closed}"));
        }
        Ok(self.counts)
    }

    /// Every address at once: what all entries translate, and whether the entries are the same.
    fn compare_entries(&mut self) -> Result<(), Difference> {
        let format = self.radix.format();
        let mut ours = Runs::new(format);
        self.radix.raw_leaves(IovaRange::ALL, |level, iova, entry| {
            ours.push(level, iova, entry);
            ControlFlow::Continue(())
        });
        let ours = ours.finish();
        let kernels = entries::kernel_runs(format, &self.peer.entries()?);
        let kernels = kernels.or_else(|what| self.differ(what))?;
        let extents = |side, runs| {
            entries::extents(format, runs).or_else(|what| self.differ(format!("{side} table: {what}")))
        };
        let our_extents = extents("our", &ours)?;
        let kernel_extents = extents("the kernel's", &kernels)?;
        let seen = self.seen_by_leaves();
        for (one, first, other, second) in [
            ("we translate", &our_extents, "the kernel translates", &kernel_extents),
            ("our entries translate", &our_extents, "our leaves translate", &seen),
        ] {
            let differs = first.iter().zip(second).position(|(first, second)| first != second);
            if differs.is_some() || first.len() != second.len() {
                let at = differs.unwrap_or(first.len().min(second.len()));
                let (first, second) = (first.get(at), second.get(at));
                return self.differ(format!("{one} {first:x?}, {other} {second:x?}"));
            }
        }
        if !self.unlike {
            if let Some(what) = entries::difference(&ours, &kernels) {
                return self.differ(what);
            }
            self.counts.alike = 1;
            self.counts.entries += ours.iter().map(|run| run.count).sum::<u64>();
        }
        Ok(())
    }

    fn seen_by_leaves(&self) -> Vec<Extent> {
        let mut extents = Extents::default();
        self.radix.leaves(IovaRange::ALL, |leaf| {
            let (first, last) = (leaf.range().first(), leaf.range().last());
            extents.push(Extent { first, last, output: leaf.oa.get(), attributes: leaf.attributes });
            ControlFlow::Continue(())
        });
        extents.finish()
    }
}
