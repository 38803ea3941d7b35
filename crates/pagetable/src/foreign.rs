//! Walking a table that somebody else writes.
//!
//! A [`Radix`](crate::Radix) trusts its tables: it has written them. The *first stage* of a nested translation is written by
//! a guest, in memory of the guest's, while devices use it. So a walk of it is another thing: every entry is read from that
//! memory once, nothing in it is believed, and what hardware would do on the way is done: permissions count only as far as
//! all entries on the way give them, and entries that are used are marked, by an exchange that fails if the guest has changed
//! the entry meanwhile.
//!
//! However the entries stand, a walk reads one of each level, and begins anew a few times at most.

use crate::address::{IovaRange, Oa, PageSize};
use crate::format::{Attributes, Entry, Format};
use crate::radix::Leaf;

/// How often a walk begins anew because an entry has changed between being read and being marked.
const TRIES: u32 = 8;

/// A format in which guests write tables of their own: what an IOMMU that walks them has to know besides.
///
/// Tables of these formats are 4 KiB.
pub trait FirstStageFormat: Format {
    /// What an entry that leads to a table lets through. A leaf's permissions count as far as all entries on the way let
    /// them through.
    fn lets_through(&self, entry: u64) -> Attributes;

    /// The bit that hardware sets in an entry that it uses: in that of a leaf, or in one that leads to a table. 0: none.
    fn accessed_bit(&self, leaf: bool) -> u64;
}

/// The memory in which a foreign table lies.
pub trait ForeignMemory {
    /// Why it could not be reached.
    type Error;

    /// Reads the entry at an address, a multiple of 8, at once.
    fn read(&mut self, address: u64) -> Result<u64, Self::Error>;

    /// Writes `new` over `entry`, at once; `false`: something else stands there by now, and is left alone.
    fn mark(&mut self, address: u64, entry: u64, new: u64) -> Result<bool, Self::Error>;
}

/// Why a foreign table translates an address to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignFault<E> {
    /// No table of the format translates it.
    OutOfRange,
    /// An entry on the way is absent, or has bits set that the format reserves.
    NotMapped,
    /// An entry on the way does not permit the access.
    NoPermission,
    /// Entries on the way change all the while.
    Unsettled,
    /// The memory of the table could not be reached.
    Memory(E),
}

/// An entry on the way.
#[derive(Clone, Copy)]
struct Step {
    address: u64,
    entry: u64,
    /// The same, marked as used.
    marked: u64,
}

/// Translates an address by the table whose root is at `root`, a multiple of 4 KiB, and marks what it used.
///
/// The leaf's attributes are what the whole way permits, and its marks as they stand now: one that is not
/// [dirty](Attributes::DIRTY) has to be walked again before it is written through, if the format's
/// [hardware marks](Format::hardware_marks).
///
/// # Errors
/// The address does not translate for this access, in which case nothing is marked; or the memory cannot be reached, in which
/// case entries on the way may be.
pub fn walk_foreign<F: FirstStageFormat, M: ForeignMemory>(
    format: &F,
    root: u64,
    iova: u64,
    access: Attributes,
    memory: &mut M,
) -> Result<Leaf, ForeignFault<M::Error>> {
    if !IovaRange::new(iova, iova).is_some_and(|page| format.accepts(&page)) {
        return Err(ForeignFault::OutOfRange);
    }
    for _ in 0..TRIES {
        if let Some(leaf) = walk_once(format, root, iova, access, memory)? {
            return Ok(leaf);
        }
    }
    Err(ForeignFault::Unsettled)
}

/// `None`: an entry has changed before it was marked.
fn walk_once<F: FirstStageFormat, M: ForeignMemory>(
    format: &F,
    root: u64,
    iova: u64,
    access: Attributes,
    memory: &mut M,
) -> Result<Option<Leaf>, ForeignFault<M::Error>> {
    // No format has more levels.
    let mut way = [Step { address: 0, entry: 0, marked: 0 }; 8];
    let mut permitted = Attributes::PERMISSIONS;
    let mut table = root;
    let mut level = *format.top_levels().end();
    for passed in 0..way.len() {
        let offset = 8 * format.index(level, iova) as u64;
        let address = table.checked_add(offset).ok_or(ForeignFault::NotMapped)?;
        let entry = memory.read(address).map_err(ForeignFault::Memory)?;
        match format.decode(level, entry) {
            Entry::Absent | Entry::Malformed => return Err(ForeignFault::NotMapped),
            Entry::Table(next) => {
                permitted &= format.lets_through(entry);
                way[passed] = Step { address, entry, marked: entry | marks(format, false, access) };
                level = level.checked_sub(1).filter(|level| *level > 0).ok_or(ForeignFault::NotMapped)?;
                table = next;
            }
            Entry::Leaf { oa, size, attributes } => {
                let allowed = attributes & permitted;
                // Hardware that does not mark leaves that to the guest, and faults until it is done.
                let used =
                    if access.contains(Attributes::WRITE) { Attributes::USED } else { Attributes::ACCESSED };
                let unmarked = !format.hardware_marks() && !attributes.contains(used);
                if !allowed.contains(access) || unmarked {
                    return Err(ForeignFault::NoPermission);
                }
                way[passed] = Step { address, entry, marked: entry | marks(format, true, access) };
                return mark(&way[..=passed], memory).map(|marked| {
                    let used = if format.hardware_marks() { used } else { Attributes::empty() };
                    let attributes = attributes.difference(Attributes::PERMISSIONS) | allowed | used;
                    marked.then(|| leaf(iova, oa, size, attributes))
                });
            }
        }
    }
    Err(ForeignFault::NotMapped)
}

/// What hardware sets in an entry on the way of an access.
fn marks<F: FirstStageFormat>(format: &F, leaf: bool, access: Attributes) -> u64 {
    if !format.hardware_marks() {
        return 0;
    }
    let dirty = if leaf && access.contains(Attributes::WRITE) { format.dirty_bit() } else { 0 };
    format.accessed_bit(leaf) | dirty
}

/// Marks the entries of a way, from the root down; `false`: one of them has changed since it was read.
fn mark<M: ForeignMemory>(way: &[Step], memory: &mut M) -> Result<bool, ForeignFault<M::Error>> {
    for step in way.iter().filter(|step| step.marked != step.entry) {
        if !memory.mark(step.address, step.entry, step.marked).map_err(ForeignFault::Memory)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn leaf(iova: u64, oa: u64, size: PageSize, attributes: Attributes) -> Leaf {
    Leaf { iova: iova & !(size.bytes() - 1), oa: Oa::new(oa), size, attributes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{RiscV, X86_64};
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;

    const ROOT: u64 = 0x1000;
    const P: u64 = 1;
    const W: u64 = 2;
    const U: u64 = 4;
    const A: u64 = 0x20;
    const D: u64 = 0x40;
    const PS: u64 = 0x80;

    /// Words by address; all others are 0.
    #[derive(Default)]
    struct Words {
        words: BTreeMap<u64, u64>,
        read: Vec<u64>,
        /// What the guest writes just before an entry is marked, once each.
        meanwhile: Vec<(u64, u64)>,
    }

    impl ForeignMemory for Words {
        type Error = u64;

        fn read(&mut self, address: u64) -> Result<u64, u64> {
            self.read.push(address);
            if address >= 1 << 40 { Err(address) } else { Ok(self.words.get(&address).copied().unwrap_or(0)) }
        }

        fn mark(&mut self, address: u64, entry: u64, new: u64) -> Result<bool, u64> {
            if let Some((address, value)) = self.meanwhile.pop() {
                self.words.insert(address, value);
            }
            let word = self.words.get_mut(&address).ok_or(address)?;
            let same = *word == entry;
            if same {
                *word = new;
            }
            Ok(same)
        }
    }

    fn words(words: &[(u64, u64)]) -> Words {
        Words { words: words.iter().copied().collect(), ..Words::default() }
    }

    /// One page at 0x20_1000 (index 1 at levels 2 and 1), by tables at 0x2000, 0x3000, 0x4000.
    fn one_page(table: u64, page: u64) -> Words {
        words(&[
            (ROOT, 0x2000 | table),
            (0x2000, 0x3000 | table),
            (0x3008, 0x4000 | table),
            (0x4008, 0x9000 | page),
        ])
    }

    fn walk(iova: u64, access: Attributes, memory: &mut Words) -> Result<Leaf, ForeignFault<u64>> {
        walk_foreign(&X86_64::new(4).unwrap(), ROOT, iova, access, memory)
    }

    #[test]
    fn a_write_marks_all_entries_on_the_way_and_the_page_as_dirty() {
        let mut memory = one_page(P | W | U, P | W | U);
        let leaf = walk(0x20_1234, Attributes::READ, &mut memory).unwrap();
        assert_eq!((leaf.iova, leaf.oa.get(), leaf.size), (0x20_1000, 0x9000, PageSize::SIZE_4K));
        assert!(leaf.attributes.contains(Attributes::READ | Attributes::WRITE | Attributes::ACCESSED));
        assert!(!leaf.attributes.contains(Attributes::DIRTY));
        assert_eq!(memory.read, [ROOT, 0x2000, 0x3008, 0x4008]);
        assert_eq!(memory.words[&ROOT], 0x2000 | P | W | U | A);
        assert_eq!(memory.words[&0x4008], 0x9000 | P | W | U | A);

        let leaf = walk(0x20_1234, Attributes::WRITE, &mut memory).unwrap();
        assert!(leaf.attributes.contains(Attributes::USED));
        assert_eq!(memory.words[&0x3008], 0x4000 | P | W | U | A);
        assert_eq!(memory.words[&0x4008], 0x9000 | P | W | U | A | D);
    }

    #[test]
    fn what_is_refused_is_not_marked() {
        // The way does not let writes through, or users.
        for table in [P | U, P | W] {
            let mut memory = one_page(table, P | W | U);
            let before = memory.words.clone();
            let refused = walk(0x20_1000, Attributes::WRITE, &mut memory);
            assert_eq!(refused, Err(ForeignFault::NoPermission));
            assert_eq!(memory.words, before);
        }
        let leaf = walk(0x20_1000, Attributes::READ, &mut one_page(P | U, P | W | U)).unwrap();
        assert!(!leaf.attributes.contains(Attributes::WRITE));
    }

    #[test]
    fn large_pages_end_the_walk() {
        let mut memory = words(&[(ROOT, 0x2000 | P | W | U), (0x2000, 0x4000_0000 | P | W | U | PS)]);
        let leaf = walk(0x1234_5678, Attributes::READ, &mut memory).unwrap();
        assert_eq!((leaf.iova, leaf.oa.get(), leaf.size), (0, 0x4000_0000, PageSize::SIZE_1G));
        assert_eq!(leaf.output(0x1234_5678).get(), 0x5234_5678);
    }

    #[test]
    fn an_entry_that_changes_is_read_again() {
        let mut memory = one_page(P | W | U | A, P | W | U);
        // The guest takes writing away after the walk has read the entry.
        memory.meanwhile = Vec::from([(0x4008, 0x9000 | P | U)]);
        assert_eq!(walk(0x20_1000, Attributes::WRITE, &mut memory), Err(ForeignFault::NoPermission));
        assert_eq!(memory.words[&0x4008], 0x9000 | P | U);
        // One that never stops changing.
        let mut memory = one_page(P | W | U | A, P | W | U);
        memory.meanwhile = (0..20).map(|page| (0x4008, page << 12 | P | W | U)).collect();
        assert_eq!(walk(0x20_1000, Attributes::WRITE, &mut memory), Err(ForeignFault::Unsettled));
    }

    #[test]
    fn nonsense_ends() {
        // A table that leads to itself is four levels all the same, and then a page.
        let mut memory = words(&[(ROOT, ROOT | P | W | U)]);
        let leaf = walk(0, Attributes::READ, &mut memory).unwrap();
        assert_eq!((leaf.oa.get(), leaf.size), (ROOT, PageSize::SIZE_4K));
        // Reserved bits, tables in nowhere, addresses that no table translates.
        let mut memory = words(&[(ROOT, 0x2000 | P | W | U), (0x2000, 0x4000_2000 | P | W | U | PS)]);
        assert_eq!(walk(0, Attributes::READ, &mut memory), Err(ForeignFault::NotMapped));
        let mut memory = words(&[(ROOT, 1 << 45 | P | W | U)]);
        assert_eq!(walk(0, Attributes::READ, &mut memory), Err(ForeignFault::Memory(1 << 45)));
        assert_eq!(walk(1 << 47, Attributes::READ, &mut memory), Err(ForeignFault::OutOfRange));
        let x86 = X86_64::new(5).unwrap();
        let last = walk_foreign(&x86, !0xfff, u64::MAX, Attributes::READ, &mut Words::default());
        assert_eq!(last, Err(ForeignFault::Memory(u64::MAX - 7)));
    }

    #[test]
    fn hardware_that_does_not_mark_leaves_it_to_the_guest() {
        const V: u64 = 1;
        const RW: u64 = 6;
        const USER: u64 = 0x10;
        let tables = [(ROOT, 0x2000 >> 2 | V), (0x2000, 0x3000 >> 2 | V)];
        let page = 0x9000 >> 2 | V | RW | USER;
        for (marked, read, write) in [(0, false, false), (0x40, true, false), (0xc0, true, true)] {
            let mut memory = words(&tables);
            memory.words.insert(0x3000, page | marked);
            let unmarked = RiscV::new(3).unwrap();
            let mut can = |access| walk_foreign(&unmarked, ROOT, 0, access, &mut memory).is_ok();
            assert_eq!((can(Attributes::READ), can(Attributes::WRITE)), (read, write));
            assert_eq!(memory.words[&0x3000], page | marked);

            let marking = RiscV::new(3).unwrap().with_accessed_dirty(true);
            walk_foreign(&marking, ROOT, 0, Attributes::WRITE, &mut memory).unwrap();
            assert_eq!(memory.words[&0x3000], page | 0xc0);
            assert_eq!(memory.words[&ROOT], tables[0].1, "only leaves are marked");
        }
    }
}
