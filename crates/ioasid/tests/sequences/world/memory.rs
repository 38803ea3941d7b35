//! Memory: registered, grown, released, revoked, handed over, and what goes from the spaces with it.

use super::World;
use super::errors::{Kind, expect};
use crate::plain::{Registration, numbers};
use crate::steps::{BEGINNINGS, END, GIB, LATE, OBJECT_PAGES, PAGE, Pages, SPACES, Trouble};
use ioasid::{IovaRange, Memory, RegisterError, ReleaseError, Residency};
use rangemap::RangeSet;
use std::ops::Range;
use std::sync::Arc;

impl World {
    pub(super) fn register(
        &mut self,
        slot: usize,
        kind: usize,
        pages: Pages,
        account: usize,
        populated: bool,
    ) {
        self.drop_memory(slot);
        let object = self.current[kind];
        let first = BEGINNINGS[kind] + pages.first;
        // Not all of a GiB is brought in for a test.
        let count = if populated { pages.count.min(64) } else { pages.count };
        let residency = if populated { Residency::Populated } else { Residency::OnDemand };
        let result = Memory::register_resident(
            &self.objects[object].backing,
            first * PAGE,
            count * PAGE,
            &self.accounts[account],
            residency,
        );
        if count == 0 {
            expect(result, Some("Empty"));
            return;
        }
        if kind != LATE && pages.first + count > OBJECT_PAGES[kind] {
            expect(result, Some("OutOfBounds"));
            return;
        }
        let held: RangeSet<u64> = std::iter::once(first..first + count).collect();
        let mut after = self.registrations.clone();
        after[slot] = Some(Registration { object, first, length: count, held, account });
        match (self.levels.change(&self.registrations, &after, account), result) {
            (Some(expected), Err(RegisterError::OverLimit(error))) => assert_eq!(error, expected),
            (None, Err(RegisterError::Residency(_))) if populated && kind == LATE => {}
            (None, Ok(memory)) if !(populated && kind == LATE) => {
                self.memories[slot] = Some(memory);
                self.registrations = after;
            }
            (expected, result) => panic!("{result:?}, but expected was {expected:?}"),
        }
    }

    /// These pages of an object are registered no more; those that nobody holds are unmapped.
    fn let_go(&mut self, object: usize, gone: &RangeSet<u64>) {
        for space in 0..SPACES {
            let plain = &self.plain[space];
            let leading = plain.pieces(0..END).into_iter().filter(|(_, lead)| lead.object == object);
            let going: Vec<Range<u64>> = leading
                .flat_map(|(piece, lead)| {
                    let outputs = lead.page(piece.start)..lead.page(piece.end);
                    let gone = gone.overlapping(&outputs).map(move |run| {
                        let first = run.start.max(outputs.start) - outputs.start;
                        let last = run.end.min(outputs.end) - outputs.start;
                        piece.start + first..piece.start + last
                    });
                    gone.collect::<Vec<_>>()
                })
                .collect();
            going.into_iter().for_each(|run| self.plain[space].unmap(run));
            if self.is_rigid(space) || self.trouble != Trouble::None {
                self.adopt_what_went(space);
            }
        }
    }

    /// Where a table cannot be cut, more has to go than what leads to memory that goes; never less.
    fn adopt_what_went(&mut self, space: usize) {
        let leaves = self.spaces[space].leaves(IovaRange::ALL);
        let there: RangeSet<u64> = leaves.iter().map(|leaf| numbers(leaf.range())).collect();
        for (piece, _) in self.plain[space].pieces(0..END) {
            for gap in there.gaps(&piece) {
                self.plain[space].unmap(gap);
            }
        }
    }

    /// What of these pages of an object no registration holds.
    fn held_by_nobody(&self, object: usize, mut pages: RangeSet<u64>) -> RangeSet<u64> {
        for other in self.registrations.iter().flatten().filter(|other| other.object == object) {
            other.held.iter().for_each(|run| pages.remove(run.clone()));
        }
        pages
    }

    pub(crate) fn drop_memory(&mut self, slot: usize) {
        let memory = self.memories[slot].take();
        assert!(memory.as_ref().is_none_or(|memory| Arc::strong_count(memory) == 1));
        self.call(|_| drop(memory));
        let Some(gone) = self.registrations[slot].take() else { return };
        let free = self.held_by_nobody(gone.object, gone.held);
        self.let_go(gone.object, &free);
    }

    pub(super) fn grow(&mut self, slot: usize, pages: u64) {
        let Some(memory) = self.memories[slot].clone() else { return };
        let Some(mut held) = self.registrations[slot].clone() else { return };
        let object = &self.objects[held.object];
        let (kind, revoked) = (object.kind, object.revoked);
        let result = memory.grow(pages * PAGE);
        let behind = held.first + held.length;
        if pages == 0 {
            expect(result, Some("Empty"));
            return;
        }
        if kind != LATE && behind + pages > BEGINNINGS[kind] + OBJECT_PAGES[kind] {
            expect(result, Some("OutOfBounds"));
            return;
        }
        if revoked {
            expect(result, Some("Revoked"));
            return;
        }
        held.length += pages;
        held.held.insert(behind..behind + pages);
        let account = held.account;
        let mut after = self.registrations.clone();
        after[slot] = Some(held);
        match (self.levels.change(&self.registrations, &after, account), result) {
            (Some(expected), Err(RegisterError::OverLimit(error))) => assert_eq!(error, expected),
            (None, Ok(())) => self.registrations = after,
            (expected, result) => panic!("{result:?}, but expected was {expected:?}"),
        }
    }

    pub(super) fn release(&mut self, slot: usize, part: Pages) {
        let Some(memory) = self.memories[slot].clone() else { return };
        let Some(mut held) = self.registrations[slot].clone() else { return };
        let result = self.call(|_| memory.release(part.first * PAGE, part.count * PAGE));
        if !held.has(part) {
            expect(result, Some("NotRegistered"));
            return;
        }
        let pages = held.object_pages(part);
        let rigid = (0..SPACES).any(|space| self.is_rigid(space));
        if let Err(error) = &result {
            let ReleaseError::Unmap(unmap) = error else { panic!("{error:?}") };
            assert!(self.is_explained(rigid, Kind::of_unmap(unmap)), "{error:?}");
            // Other mappings of it may be unmapped already, and nothing else.
            self.adopt_what_went_of(held.object, &pages);
            self.hit = false;
            return;
        }
        expect(result, None);
        held.held.remove(pages.clone());
        if part.first + part.count == held.length {
            held.length = held.held.iter().next_back().map_or(0, |run| run.end - held.first);
        }
        let object = held.object;
        self.registrations[slot] = Some(held);
        let free = self.held_by_nobody(object, std::iter::once(pages).collect());
        self.let_go(object, &free);
    }

    /// Takes over what of these pages was unmapped.
    fn adopt_what_went_of(&mut self, object: usize, pages: &Range<u64>) {
        for space in 0..SPACES {
            let before = self.plain[space].clone();
            self.adopt_what_went(space);
            for (piece, lead) in before.pieces(0..END) {
                for gap in self.plain[space].mapped.gaps(&piece) {
                    let outputs = lead.page(gap.start)..lead.page(gap.end);
                    let only =
                        lead.object == object && pages.start <= outputs.start && outputs.end <= pages.end;
                    assert!(only, "pages {gap:?} of space {space} are gone");
                }
            }
        }
    }

    pub(super) fn revoke(&mut self, kind: usize) {
        // What is revoked goes with the world; address space is not without end either.
        if kind == GIB && self.objects.iter().filter(|object| object.kind == kind).count() > 1 {
            return;
        }
        let object = self.current[kind];
        let backing = self.objects[object].backing.clone();
        self.call(|_| backing.revoke());
        self.objects[object].revoked = true;
        let everything: RangeSet<u64> = std::iter::once(0..END).collect();
        self.let_go(object, &everything);
        self.make_object(kind);
    }

    pub(super) fn transfer(&mut self, slots: &[usize], to: usize) {
        let memories: Vec<Arc<Memory>> =
            slots.iter().filter_map(|slot| self.memories[*slot].clone()).collect();
        let memories: Vec<&Memory> = memories.iter().map(|memory| &**memory).collect();
        let result = Memory::transfer_all(&memories, &self.accounts[to]);
        let mut after = self.registrations.clone();
        for slot in slots {
            if let Some(held) = &mut after[*slot] {
                held.account = to;
            }
        }
        let expected = self.levels.change(&self.registrations, &after, to);
        assert_eq!(result.err(), expected);
        if expected.is_none() {
            self.registrations = after;
        }
    }
}
