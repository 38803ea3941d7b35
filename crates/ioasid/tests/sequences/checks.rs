//! What is compared: everything that can be seen.
//!
//! Every leaf of the native table with the map of the model, and the memory behind it; every derived table with the native
//! one; what queries and iterations say; reserved and allowed ranges; who is attached where; what every account is
//! charged, was charged at most, and has refused; how many registrations hold each page.

use crate::double::DoubleTable;
use crate::plain::{Level, Levels, PlainSpace, holds, numbers};
use crate::steps::{
    BEGINNINGS, COUNTED, DEVICES, END, LATE, LOW, OBJECT_PAGES, PAGE, Pages, SMALL_LEAVES, SPACES, WHOLE,
};
use crate::world::{TAGGED, World, tag};
use ioasid::pagetable::HeapTables;
use ioasid::{
    CachedWalk, Extent, Iova, IovaRange, Leaf, Oa, PageSize, Permissions, Space, Translated, Usage, epoch,
};
use std::ops::Range;
use std::sync::Arc;

/// So many table pages may wait to be freed.
const RETIRED: u64 = 128;

fn permissions_of(leaf: &Leaf) -> Permissions {
    let all = [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE];
    let is = |permissions: &Permissions| permissions.attributes() == leaf.attributes;
    all.into_iter().find(is).expect("permissions that nobody has asked for")
}

impl World {
    /// Compares everything.
    pub(crate) fn compare(&self) {
        self.compare_accounts();
        self.compare_devices();
        (0..SPACES).for_each(|space| self.compare_space(space));
    }

    fn compare_accounts(&self) {
        let charged = Levels::charged(&self.registrations);
        for ((account, level), charged_pages) in self.accounts.iter().zip(&self.levels.0).zip(charged) {
            let Level { limit: limit_pages, peak: peak_pages, failures } = *level;
            let usage = Usage { limit_pages, charged_pages, peak_pages, failures };
            assert_eq!(account.usage(), usage, "{}", account.name());
        }
        for (memory, held) in self.memories.iter().zip(&self.registrations) {
            let real = memory.as_ref().map(|memory| (memory.account(), memory.length()));
            let plain = held.as_ref().map(|held| (self.accounts[held.account].clone(), held.length * PAGE));
            assert_eq!(real, plain);
        }
        for (number, object) in self.objects.iter().enumerate() {
            let first = BEGINNINGS[object.kind];
            for page in (first..first + 40).chain([first + 512, first + 1199]) {
                let count = holds(&self.registrations, number, page);
                assert_eq!(
                    object.backing.holds(page * PAGE, PAGE),
                    count..=count,
                    "page {page} of {object:?}"
                );
            }
        }
    }

    fn compare_devices(&self) {
        let tables = self.tables();
        for (rid, attached) in DEVICES.into_iter().zip(&self.attached) {
            let there = self.double.table_of(rid);
            let there = there.as_ref().map(|table| Arc::as_ptr(table.space()));
            let expected = attached.map(|attached| Arc::as_ptr(&self.spaces[attached.space]));
            assert_eq!(there, expected, "{rid}");
        }
        let derived = tables.iter().filter(|(table, _)| table.class != ioasid::TableClass::NATIVE).count();
        assert_eq!(self.double.tables().len(), derived, "derived tables that exist");
        for space in 0..SPACES {
            let count = tables.iter().filter(|(table, _)| table.space == space).count();
            assert_eq!(self.spaces[space].statistics().tables, count, "tables of space {space}");
        }
    }

    fn compare_space(&self, space: usize) {
        let (plain, real) = (&self.plain[space], &self.spaces[space]);
        let statistics = real.statistics();
        // First, because much of what follows would wait for whoever is at work for ever.
        let at_rest = statistics.busy_bytes == 0 || self.deferred[space];
        assert!(at_rest, "{:#x} bytes of space {space} are owned by nobody", statistics.busy_bytes);
        self.compare_leaves(space, real);
        assert_eq!(statistics.mapped_bytes, plain.count(0..END) * PAGE);
        assert_eq!(real.allowed_ranges(), plain.allowed);
        let mut reserved: Vec<IovaRange> = plain.reserved.iter().map(|(range, _)| *range).collect();
        let mut really = real.reserved_ranges();
        reserved.sort_unstable();
        really.sort_unstable();
        assert_eq!(really, reserved);
        if space == COUNTED || space == WHOLE {
            assert_eq!(real.mapping_count(), plain.begins.len() as u64, "mappings of space {space}");
        }
        for (table, device) in self.tables() {
            if table.space != space {
                continue;
            }
            let table = self.devices[device].table().unwrap();
            let Some(derived) = table.derived() else { continue };
            let derived = derived.as_any().downcast_ref::<DoubleTable>().unwrap();
            assert_eq!(derived.mappings(), derived.expected(real), "{} in space {space}", DEVICES[device]);
            assert!(derived.is_invalidated(), "{} in space {space}", DEVICES[device]);
            // The flusher may have come first.
            assert!(self.deferred[space] || !derived.is_stale(), "{} in space {space}", DEVICES[device]);
        }
        self.compare_extents(space, IovaRange::ALL);
        self.compare_extents(space, IovaRange::new(7 * PAGE, 600 * PAGE - 1).unwrap());
        self.compare_bytes(space);
    }

    /// Compares where every leaf leads.
    pub(crate) fn compare_leaves(&self, space: usize, real: &Space) {
        let plain = &self.plain[space];
        let mut pages = 0;
        for leaf in real.leaves(IovaRange::ALL) {
            let of_leaf = numbers(leaf.range());
            pages += of_leaf.end - of_leaf.start;
            let pieces = plain.pieces(of_leaf.clone());
            let covered: u64 = pieces.iter().map(|(piece, _)| piece.end - piece.start).sum();
            assert_eq!(
                covered,
                of_leaf.end - of_leaf.start,
                "{leaf:?} of space {space}, by the model {pieces:?}"
            );
            for (piece, lead) in pieces {
                for page in [piece.start, piece.end - 1] {
                    let there = self.object_at(real, leaf.output(page * PAGE));
                    let found = (there, permissions_of(&leaf));
                    let expected = ((lead.object, lead.page(page)), lead.permissions);
                    assert_eq!(found, expected, "page {page} of space {space}");
                }
            }
        }
        let all = plain.count(0..END);
        assert_eq!(pages, all, "space {space}: {:?}", plain.mapped);
    }

    /// The object at an output address, and its page.
    fn object_at(&self, real: &Space, oa: Oa) -> (usize, u64) {
        let (backing, offset) = real.object_at(oa).expect("a leaf leads to no memory");
        let object = self.objects.iter().position(|object| Arc::ptr_eq(&object.backing, &backing));
        (object.unwrap(), offset / PAGE)
    }

    /// Reads a page of each piece, as a device would.
    fn compare_bytes(&self, space: usize) {
        let real = &self.spaces[space];
        let section = epoch::dma();
        let mut cache = CachedWalk::new();
        for (piece, lead) in self.plain[space].pieces(0..END) {
            let (iova, page) = (piece.start * PAGE, lead.page(piece.start));
            let leaf = real.walk_for_dma(&section, iova, &mut cache).unwrap();
            let first = BEGINNINGS[self.objects[lead.object].kind];
            if self.objects[lead.object].kind != LATE && !(first..first + TAGGED).contains(&page) {
                continue;
            }
            let mut bytes = [0; 8];
            match real.memory_at(&section, leaf.output(iova)).unwrap() {
                Translated::Here(here) => here.read(&mut bytes).unwrap(),
                Translated::Late(late) => late.read(&mut bytes).unwrap(),
            }
            assert_eq!(bytes, tag(lead.object, page), "page {} of space {space}", piece.start);
        }
    }

    /// What an iteration shows: every hole, every mapping, in as few pieces as the space can know of.
    fn compare_extents(&self, space: usize, range: IovaRange) {
        let (plain, real) = (&self.plain[space], &self.spaces[space]);
        let knows = space == COUNTED || space == WHOLE;
        let mut next = Some(range.first());
        let mut extents = real.extents(range);
        let mut pages = 0;
        while let Some(rest) = extents.rest() {
            assert_eq!((Some(rest.first()), rest.last()), (next, range.last()));
            let whole = match extents.next().unwrap() {
                Extent::Hole(hole) => {
                    assert_eq!(plain.first_mapped(numbers(hole)), None);
                    let before = hole.first().checked_sub(1).filter(|_| hole.first() != range.first());
                    assert!(before.is_none_or(|before| plain.mapped.contains_key(&(before / PAGE))));
                    hole
                }
                Extent::Mapped(mapped) => {
                    let of_extent = numbers(mapped.range);
                    pages += of_extent.end - of_extent.start;
                    let pieces = plain.pieces(of_extent.clone());
                    assert!(pieces.iter().all(|(_, lead)| lead.permissions == mapped.permissions));
                    // Memory of two objects may stand side by side on the bus.
                    if knows {
                        let inside = of_extent.start + 1..of_extent.end.max(of_extent.start + 1);
                        assert_eq!(plain.begins.range(inside).next(), None, "{mapped:?}");
                    }
                    self.assert_apart(plain, range, of_extent, knows);
                    mapped.range
                }
            };
            assert_eq!(Some(whole.first()), next);
            next = whole.last().checked_add(1);
        }
        assert!(extents.next().is_none());
        assert_eq!(next, range.last().checked_add(1));
        assert_eq!(pages, plain.count(numbers(range)));
    }

    /// That an extent is not the continuation of what is before it.
    fn assert_apart(&self, plain: &PlainSpace, range: IovaRange, extent: Range<u64>, knows: bool) {
        let Some(before) = extent.start.checked_sub(1) else { return };
        // Without a policy nobody but the native table knows where mappings begin.
        if !knows || extent.start == range.first() / PAGE || plain.begins.contains(&extent.start) {
            return;
        }
        let piece = plain.mapped.get_key_value(&before);
        let one = piece.is_some_and(|(piece, lead)| {
            // The same memory, unless it is in two windows.
            piece.contains(&extent.start) && lead.page(extent.start) % (1 << 18) != 0
        });
        assert!(!one, "the extent that begins with page {} is a part of the one before", extent.start);
    }

    /// Every block of 2 MiB in the pages that can be one leaf is one.
    pub(crate) fn check_merged(&self, space: usize, pages: Pages) {
        let plain = &self.plain[space];
        let numbers = pages.numbers();
        let whole = |block: u64| numbers.start <= block && block + 512 <= numbers.end;
        for block in (0..LOW).step_by(512).filter(|block| whole(*block)) {
            let pieces = plain.pieces(block..block + 512);
            let [(piece, lead)] = &pieces[..] else { continue };
            let knows = space == COUNTED || space == WHOLE;
            let apart = knows && plain.begins.range(block + 1..block + 512).next().is_some();
            // The objects begin with windows, those that are large enough at a multiple of 2 MiB.
            let large = OBJECT_PAGES[self.objects[lead.object].kind] >= 512;
            let aligned = large && lead.page(block) % 512 == 0;
            if piece.end - piece.start == 512 && aligned && !apart && space != SMALL_LEAVES {
                let leaf = self.spaces[space].walk(Iova::new(block * PAGE)).unwrap();
                assert!(leaf.size >= PageSize::SIZE_2M, "page {block} of space {space}: {leaf:?}");
            }
        }
    }

    /// No leaf of the device's table is larger in the range.
    pub(crate) fn check_split(&self, device: usize, range: IovaRange, largest: PageSize) {
        let table = self.devices[device].table().unwrap();
        let leaves = match table.derived() {
            None => table.space().leaves(range),
            Some(derived) => derived.as_any().downcast_ref::<DoubleTable>().unwrap().leaves(),
        };
        let large = leaves.iter().find(|leaf| leaf.range().overlaps(&range) && leaf.size > largest);
        assert_eq!(large, None, "{} was split to {largest}", DEVICES[device]);
    }

    /// Lets everything go; nothing may be left.
    pub(crate) fn end(mut self) {
        for space in &self.spaces {
            space.flush();
        }
        self.deferred.fill(false);
        self.compare();
        for slot in 0..self.memories.len() {
            self.drop_memory(slot);
        }
        self.compare();
        let World { spaces, double, accounts, devices, objects, tables_before, .. } = self;
        for space in &spaces {
            assert_eq!(space.leaves(IovaRange::ALL), []);
            let statistics = space.statistics();
            assert_eq!(statistics.mapped_bytes, 0);
        }
        drop(devices);
        assert!(double.tables().is_empty());
        assert!(accounts.iter().all(|account| account.charged_pages() == 0));
        for object in &objects {
            let first = BEGINNINGS[object.kind];
            assert_eq!(object.backing.holds(first * PAGE, OBJECT_PAGES[object.kind] * PAGE), 0..=0);
        }
        drop(spaces);
        // What was retired is freed a batch at a time, whenever more is retired.
        let left = HeapTables::bytes_in_use();
        assert!(
            left <= tables_before.max(RETIRED * PAGE),
            "{left} bytes of tables are left, before it were {tables_before}"
        );
    }
}
