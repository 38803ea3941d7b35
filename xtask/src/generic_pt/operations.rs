//! Random sequences of operations on a page table.
//!
//! Addresses are not spread evenly over the address space, where nothing would ever meet: each sequence has a few places,
//! chosen among those where something changes (the ends of the address space, both sides of the gap of a sign-extended
//! table, multiples of leaf sizes), and all that it does is near one of them. Lengths and output addresses are chosen so
//! that leaves of every size come up, and neighbours of every two.

use std::fmt;

use ioasid_pagetable::{Format, IovaRange};

/// What the kernel calls a mapping's protection: IOMMU_READ and so on.
pub(crate) const READ: u8 = 1 << 0;
pub(crate) const WRITE: u8 = 1 << 1;
const CACHE: u8 = 1 << 2;
pub(crate) const NO_EXECUTE: u8 = 1 << 3;
const MMIO: u8 = 1 << 4;

/// Mappings of more entries than this are made shorter; a few sequences have larger ones.
const USUAL_ENTRIES: u64 = 1 << 11;
const MANY_ENTRIES: u64 = 1 << 18;

/// One step of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Map {
        range: IovaRange,
        output: u64,
        protection: u8,
    },
    Unmap {
        range: IovaRange,
    },
    /// A device writes.
    Write {
        iova: u64,
    },
    /// What devices have written to is asked for, and clean again.
    Harvest {
        range: IovaRange,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operation::Map { range, output, protection } => {
                write!(f, "map {range} to {output:#x}")?;
                let names = [
                    (READ, "read"),
                    (WRITE, "write"),
                    (CACHE, "cache"),
                    (NO_EXECUTE, "noexec"),
                    (MMIO, "mmio"),
                ];
                let named = names.iter().filter(|(bit, _)| protection & bit != 0);
                named.enumerate().try_for_each(|(number, (_, name))| {
                    write!(f, "{}{name}", if number == 0 { ", " } else { " " })
                })
            }
            Operation::Unmap { range } => write!(f, "unmap {range}"),
            Operation::Write { iova } => write!(f, "write through {iova:#x}"),
            Operation::Harvest { range } => write!(f, "harvest dirty pages in {range}"),
        }
    }
}

/// A reproducible source of numbers (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // The bounds are small, and nobody minds if the numbers are not quite equally likely.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of a list that is not empty.
    pub(crate) fn choose<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// What a sequence has to know of a format.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Logarithm of the smallest page.
    pub(crate) granule: u32,
    /// Logarithm of the number of addresses.
    pub(crate) width: u32,
    pub(crate) sign_extended: bool,
    pub(crate) output_bits: u32,
    /// Logarithms of the leaf sizes, ascending.
    pub(crate) sizes: Vec<u32>,
    /// Logarithms of what an entry of each level covers, ascending.
    pub(crate) shifts: Vec<u32>,
    /// The kernel harvests dirty pages of this format.
    pub(crate) dirty: bool,
}

impl Facts {
    pub(crate) fn of<F: Format>(format: &F, dirty: bool) -> Facts {
        let levels = 1..=*format.top_levels().end();
        let all = levels.clone().fold(0, |all, level| all | format.leaf_sizes(level));
        Facts {
            granule: format.shift(1),
            width: format.width(*levels.end()),
            sign_extended: format.sign_extended(),
            output_bits: format.output_bits(),
            sizes: (0..64).filter(|log2| all >> log2 & 1 != 0).collect(),
            shifts: levels.map(|level| format.shift(level)).collect(),
            dirty,
        }
    }

    /// Whether a table can translate all addresses of the range.
    pub(crate) fn accepts(&self, range: &IovaRange) -> bool {
        if self.width >= 64 {
            return true;
        }
        if !self.sign_extended {
            return range.last() >> self.width == 0;
        }
        let half = |iova: u64| (iova as i64) >> (self.width - 1);
        matches!((half(range.first()), half(range.last())), (0, 0) | (-1, -1))
    }

    /// Whether the kernel takes the range although a table cannot translate it: of the addresses of a sign-extended table
    /// it checks the bits above the highest one that is translated, but not that one. Ranges that run from the lower
    /// half into the gap, and those right below the upper half, then name addresses of the other half.
    pub(crate) fn kernel_overlooks(&self, range: &IovaRange) -> bool {
        if !self.sign_extended || self.accepts(range) {
            return false;
        }
        let prefix = if range.first() >> (self.width - 1) == 0 { 0 } else { u64::MAX >> self.width };
        range.first() >> self.width == prefix && range.last() >> self.width == prefix
    }

    /// The first addresses beyond those that translate, and those that are the first to translate.
    pub(crate) fn edges(&self) -> Vec<u64> {
        match (self.width, self.sign_extended) {
            (64.., _) => vec![0],
            (width, true) => vec![0, 1 << (width - 1), (1u64 << (width - 1)).wrapping_neg()],
            (width, false) => vec![0, 1 << width],
        }
    }

    /// The largest leaf that can stand anywhere in a mapping whose addresses differ like this.
    fn largest_leaf(&self, apart: u64) -> u32 {
        let aligned = apart.trailing_zeros();
        self.sizes.iter().copied().rfind(|&size| size <= aligned).unwrap_or(self.granule)
    }

    /// What one of the entries of such a leaf covers.
    fn largest_entry(&self, apart: u64) -> u32 {
        let leaf = self.largest_leaf(apart);
        self.shifts.iter().copied().rfind(|&shift| shift <= leaf).unwrap_or(self.granule)
    }
}

/// What kind of sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing but mappings where nothing is.
    FromScratch,
    /// Mappings are unmapped as they were mapped, and others take their place.
    Whole,
    /// Everything: parts are unmapped, mappings run into each other, and some make no sense.
    Any,
}

/// Generates a sequence.
pub(crate) fn sequence(facts: &Facts, random: &mut Random) -> Vec<Operation> {
    let kind = random.choose(&[Kind::FromScratch, Kind::Whole, Kind::Any, Kind::Any]);
    let places = (0..1 + random.below(3)).map(|_| place(facts, random)).collect();
    let most_entries = if random.once_in(100) { MANY_ENTRIES } else { USUAL_ENTRIES };
    let mut generator = Generator { facts, random, places, most_entries, mapped: Vec::new() };
    let longest = generator.random.choose(&[4, 12, 24, 60]);
    let count = 1 + generator.random.below(longest);
    (0..count).filter_map(|_| generator.operation(kind)).collect()
}

fn place(facts: &Facts, random: &mut Random) -> u64 {
    let bits = u64::from(facts.width.min(63));
    match random.below(4) {
        0 => random.choose(&facts.edges()),
        1 => 1 << random.below(bits),
        2 => 1 << random.choose(&facts.sizes),
        _ => {
            let low = random.below(bits);
            let address = random.next() >> (64 - bits) >> low << low;
            // Half of these are in the upper half of a sign-extended table.
            if facts.sign_extended {
                ((address << (64 - bits)) as i64 >> (64 - bits)) as u64
            } else {
                address
            }
        }
    }
}

struct Generator<'a> {
    facts: &'a Facts,
    random: &'a mut Random,
    places: Vec<u64>,
    most_entries: u64,
    /// Where the mappings of the sequence so far are, if they succeeded.
    mapped: Vec<IovaRange>,
}

impl Generator<'_> {
    fn operation(&mut self, kind: Kind) -> Option<Operation> {
        if kind != Kind::FromScratch && !self.mapped.is_empty() && self.random.below(9) < 4 {
            return self.unmap(kind);
        }
        if kind == Kind::Any && self.random.once_in(16) {
            return self.nonsense();
        }
        if kind != Kind::Any && self.facts.dirty && !self.mapped.is_empty() && self.random.once_in(4) {
            return self.dirty();
        }
        for _ in 0..8 {
            let Some((range, output)) = self.mapping() else { continue };
            let free = !self.mapped.iter().any(|other| other.overlaps(&range));
            if free || kind == Kind::Any {
                if free {
                    self.mapped.push(range);
                }
                return Some(Operation::Map { range, output, protection: self.protection() });
            }
        }
        None
    }

    fn protection(&mut self) -> u8 {
        let access = self.random.choose(&[READ | WRITE, READ | WRITE, READ, WRITE]);
        access | (self.random.next() as u8 & (CACHE | NO_EXECUTE | MMIO))
    }

    /// An address near one of the places, aligned to something.
    fn near(&mut self) -> u64 {
        let step = if self.random.once_in(3) { self.size() } else { self.facts.granule };
        let bits = self.random.below(10);
        let distance = self.random.below(1 << bits) << step;
        let place = self.random.choose(&self.places) >> self.facts.granule << self.facts.granule;
        if self.random.once_in(2) { place.wrapping_add(distance) } else { place.wrapping_sub(distance) }
    }

    /// The logarithm of a leaf size, more likely a small one.
    fn size(&mut self) -> u32 {
        let size = self.random.choose(&self.facts.sizes);
        if size > 30 { self.random.choose(&self.facts.sizes) } else { size }
    }

    fn length(&mut self) -> u64 {
        let granule = self.facts.granule;
        match self.random.below(8) {
            0 | 1 => 1 << granule,
            2 | 3 => (1 + self.random.below(32)) << granule,
            4 => 1 << self.size(),
            5 => (1 + self.random.below(5)) << self.size(),
            6 => {
                let some = (1 + self.random.below(5)) << self.size();
                let more = self.random.below(600) << granule;
                if self.random.once_in(2) || some <= more { some + more } else { some - more }
            }
            _ => (1 + self.random.below(1 << (33 - granule))) << granule,
        }
    }

    fn output(&mut self, first: u64, length: u64) -> Option<u64> {
        let limit = 1u64 << self.facts.output_bits.min(63);
        let highest = limit.checked_sub(length)?;
        let page = (1u64 << self.facts.granule) - 1;
        let output = match self.random.below(8) {
            // The last ones.
            0 => highest,
            1 => first & (limit - 1),
            2 => self.random.below(limit),
            choice => {
                let same = match choice {
                    3 => self.size(),
                    _ => 12 + self.random.below(30) as u32,
                };
                let low = (1u64 << same) - 1;
                self.random.below(limit) & !low | first & low
            }
        };
        let output = output & !page;
        // Nothing is mapped to the very first page: the kernel's way to say that nothing is mapped is the address 0.
        Some(output.min(highest)).filter(|&output| output > page)
    }

    fn mapping(&mut self) -> Option<(IovaRange, u64)> {
        let first = self.near();
        let length = self.length();
        let output = self.output(first, length)?;
        let entry = self.facts.largest_entry(first ^ output);
        let most = Some(self.most_entries << entry).filter(|most| most >> entry == self.most_entries);
        let length = most.map_or(length, |most| length.min(most));
        let range = IovaRange::with_length(first, length)?;
        self.facts.accepts(&range).then_some((range, output))
    }

    /// A mapping that has to be refused, for one reason: for two, each side might name another.
    fn nonsense(&mut self) -> Option<Operation> {
        let protection = self.protection();
        let (range, output) = self.mapping()?;
        let length = range.length()?;
        let off = (1 + self.random.below((1 << self.facts.granule) - 1)) & !7;
        let off = off.max(8);
        let limit = 1u64 << self.facts.output_bits.min(63);
        let (range, output) = match self.random.below(4) {
            0 => {
                let range = IovaRange::with_length(range.first().checked_add(off)?, length)?;
                if !self.facts.accepts(&range) {
                    return None;
                }
                (range, if self.random.once_in(2) { output } else { output.checked_add(off)? })
            }
            1 => {
                // Across an edge, or beyond.
                let edge = self.random.choose(&self.facts.edges());
                let before = self.random.below(3) << self.facts.granule;
                let range = IovaRange::with_length(edge.wrapping_sub(before), length)?;
                if self.facts.accepts(&range) {
                    return None;
                }
                (range, output)
            }
            2 => (range, limit + (self.random.below(limit) >> self.facts.granule << self.facts.granule)),
            // Only the last pages are too far.
            _ => {
                let pages = range.length()? >> self.facts.granule;
                (range, limit.checked_sub((self.random.below(pages)) << self.facts.granule)?)
            }
        };
        Some(Operation::Map { range, output, protection })
    }

    /// A write, or a harvest of whole mappings: the kernel takes a leaf that is harvested in part for one that is
    /// harvested whole.
    fn dirty(&mut self) -> Option<Operation> {
        let one = self.random.choose(&self.mapped);
        if self.random.below(3) < 2 {
            let iova = one.first() + self.random.below(one.last() - one.first());
            return Some(Operation::Write { iova });
        }
        let other = self.random.choose(&self.mapped);
        let both = IovaRange::new(one.first().min(other.first()), one.last().max(other.last()))?;
        // No length says how long all addresses are.
        let harvestable = self.facts.accepts(&both) && both.length().is_some();
        Some(Operation::Harvest { range: if harvestable { both } else { one } })
    }

    fn unmap(&mut self, kind: Kind) -> Option<Operation> {
        let number = self.random.below(self.mapped.len() as u64) as usize;
        let range = self.mapped[number];
        if kind == Kind::Whole || self.random.once_in(5) {
            self.mapped.swap_remove(number);
            return Some(Operation::Unmap { range });
        }
        let granule = self.facts.granule;
        let range = match self.random.below(8) {
            // What is between two mappings goes with them, or a part of each.
            0 => {
                let other = self.random.choose(&self.mapped);
                let between = [range.first(), range.last(), other.first(), other.last()];
                let page = (1 << granule) - 1;
                let ends = (self.random.choose(&between), self.random.choose(&between));
                IovaRange::new(ends.0.min(ends.1) & !page, ends.0.max(ends.1) | page)?
            }
            1 => {
                let first = self.near();
                IovaRange::with_length(first, self.length())?
            }
            2 if self.random.once_in(4) => IovaRange::ALL,
            // A part, often one that begins or ends where the mapping does.
            _ => {
                let pages = (range.last() - range.first()) >> granule;
                let align = if self.random.once_in(3) { self.size() - granule } else { 0 };
                let first = match self.random.below(3) {
                    0 => 0,
                    _ => self.random.below(pages + 1) >> align << align,
                };
                let last = match self.random.below(3) {
                    0 => pages,
                    1 => first,
                    _ => first + self.random.below(pages - first + 1),
                };
                let base = range.first();
                IovaRange::new(base + (first << granule), base + (last << granule) + ((1 << granule) - 1))?
            }
        };
        Some(Operation::Unmap { range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid_pagetable::VtdSecondStage;

    #[test]
    fn a_seed_stands_for_one_sequence() {
        let facts = Facts::of(&VtdSecondStage::new(4).unwrap(), true);
        let of = |seed| sequence(&facts, &mut Random::new(seed));
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    /// What the generator is for.
    #[test]
    fn sequences_have_all_leaf_sizes_and_all_edges() {
        let facts = Facts::of(&VtdSecondStage::new(4).unwrap(), true);
        let mut sizes = 0;
        let mut lasts = Vec::new();
        let mut refused = 0;
        for seed in 0..300 {
            for operation in sequence(&facts, &mut Random::new(seed)) {
                let Operation::Map { range, output, .. } = operation else { continue };
                if facts.accepts(&range) {
                    sizes |= 1 << facts.largest_leaf(range.first() ^ output);
                    lasts.push(range.last());
                } else {
                    refused += 1;
                }
            }
        }
        assert_eq!(sizes, 1 << 12 | 1 << 21 | 1 << 30);
        assert!(lasts.contains(&((1 << 48) - 1)), "the last page");
        assert!(refused > 0);
    }

    #[test]
    fn facts_of_a_sign_extended_table() {
        let facts = Facts {
            granule: 12,
            width: 48,
            sign_extended: true,
            output_bits: 52,
            sizes: vec![12],
            shifts: vec![12],
            dirty: false,
        };
        let accepts = |first, last| facts.accepts(&IovaRange::new(first, last).unwrap());
        assert!(accepts(0, 0x7fff_ffff_ffff) && accepts(0xffff_8000_0000_0000, u64::MAX));
        assert!(!accepts(0, 0x8000_0000_0000) && !accepts(0, u64::MAX) && !accepts(1 << 48, 1 << 49));
        assert_eq!(facts.edges(), [0, 0x8000_0000_0000, 0xffff_8000_0000_0000]);
        let overlooked = |first, last| facts.kernel_overlooks(&IovaRange::new(first, last).unwrap());
        assert!(overlooked(0x7fff_ffff_f000, 0x8000_0000_0fff), "from the lower half into the gap");
        assert!(overlooked(0xffff_0000_0000_0000, 0xffff_0000_0000_0fff), "below the upper half");
        assert!(!overlooked(0x8000_0000_0000, 0x8000_0000_0fff) && !overlooked(0, 0xfff));
        assert!(!overlooked(0x7fff_ffff_f000, u64::MAX));
    }
}
