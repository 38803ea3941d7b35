//! Mappings: made, taken away, changed and copied.

use super::errors::{Kind, expect};
use super::{LARGE, World};
use crate::plain::{Lead, numbers};
use crate::steps::{
    COUNTED, END, GIANT, LOW, MOST, Manner, PAGE, Pages, SMALL_LEAVES, WHOLE, What, permissions,
};
use ioasid::{AliasError, Iova, Memory, UnmapError};
use rangemap::RangeSet;
use std::ops::Range;
use std::sync::Arc;

impl World {
    /// The memory that is to be mapped, the part of it, cut to what would take too long, and where it leads.
    fn wanted(&self, space: usize, what: What) -> Option<(Arc<Memory>, Pages, usize, u64)> {
        let memory = self.memories[what.slot].clone()?;
        let held = self.registrations[what.slot].as_ref()?;
        let (first, mut count) = (what.part.first, what.part.count);
        // As much as there is, mostly.
        if count % 7 != 3 {
            count = count.min(held.length.saturating_sub(first).max(1));
        }
        if count > LARGE && (space == SMALL_LEAVES || (held.first + first) % 512 != 0) {
            count = 600;
        }
        Some((memory, Pages { first, count }, held.object, held.first + first))
    }

    /// Why memory cannot be mapped: what is asked first, and what is asked in the operation.
    fn unavailable(&self, what: What, part: Pages) -> (Option<&'static str>, Option<&'static str>) {
        let Some(held) = &self.registrations[what.slot] else { return (None, None) };
        let revoked = self.objects[held.object].revoked;
        let gone = if revoked { "Revoked" } else { "BeyondMemory" };
        let beyond = part.first + part.count > held.length;
        let gone = Some(gone).filter(|_| revoked || !held.has(part));
        (gone.filter(|_| beyond), gone)
    }

    /// How many mappings more a space may have.
    fn may_have(&self, space: usize) -> u64 {
        let count = self.plain[space].begins.len() as u64;
        if space == COUNTED { MOST.saturating_sub(count) } else { u64::MAX }
    }

    /// Maps at an address, or anywhere.
    pub(super) fn map(&mut self, space: usize, at: Option<u64>, what: What) {
        let Some((memory, mut part, object, first)) = self.wanted(space, what) else { return };
        let at = match at {
            Some(at) if part.count > LARGE => {
                part.count = part.count.min(GIANT.end);
                Some(at & !((1 << 18) - 1))
            }
            Some(at) => {
                part.count = part.count.min(END - at);
                Some(at)
            }
            // What waits for a flush is free at a moment that nobody knows.
            None => {
                self.flush(space);
                None
            }
        };
        let allowed = permissions(what.permissions);
        let (early, late) = self.unavailable(what, part);
        let (offset, length) = (part.first * PAGE, part.count * PAGE);
        let real = self.spaces[space].clone();
        let result = self.call(|_| match at {
            Some(at) => real.map(Iova::new(at * PAGE), &memory, offset, length, allowed).map(|()| at),
            None => real.map_anywhere(&memory, offset, length, allowed).map(|iova| iova.get() / PAGE),
        });
        let kind = result.as_ref().err().and_then(Kind::of_map);
        if part.count == 0 {
            expect(result, Some("NoRange"));
            return;
        }
        if early.is_some() {
            expect(result, early);
            return;
        }
        let place = match at {
            Some(at) => Some(at),
            None => self.plain[space].hole(part.count),
        };
        if self.is_explained(false, kind) {
            return;
        }
        let Some(place) = place else {
            // A place that is not known to be taken is tried, and then the memory is looked at first.
            let tried =
                late.filter(|gone| result.as_ref().is_err_and(|error| format!("{error:?}") == **gone));
            expect(result, tried.or(Some("NoHole")));
            return;
        };
        let plain = &self.plain[space];
        let pages = place..place + part.count;
        let range = Pages { first: place, count: part.count }.range().unwrap();
        let taken = plain.first_mapped(pages.clone());
        let refusal = if plain.reserved_in(range) {
            Some("Reserved".to_owned())
        } else if let Some(gone) = late {
            Some(gone.to_owned())
        } else if self.may_have(space) == 0 {
            Some("TooManyMappings".to_owned())
        } else {
            taken.map(|page| format!("AlreadyMapped {{ at: {} }}", page * PAGE))
        };
        if refusal.is_none() && self.is_too_much(space, &pages, object, kind) {
            self.refused = true;
            return;
        }
        if let Some(there) = expect(result, refusal.as_deref()) {
            assert_eq!(there, place, "mapped at another place");
            let lead = Lead { object, shift: first.wrapping_sub(place), permissions: allowed };
            self.plain[space].map(pages, lead);
        }
    }

    pub(super) fn unmap(&mut self, space: usize, pages: Pages, manner: Manner) {
        let Some(range) = pages.range() else { return };
        let real = self.spaces[space].clone();
        let result = self.call(|_| match manner {
            Manner::Strict => real.unmap(range),
            Manner::Deferred => real.unmap_deferred(range),
        });
        self.deferred[space] |= manner == Manner::Deferred;
        self.unmapped(space, pages, result);
    }

    /// What has to come of an unmap.
    fn unmapped(&mut self, space: usize, pages: Pages, result: Result<ioasid::Unmapped, UnmapError>) {
        let plain = &self.plain[space];
        let cut = plain.cut_by(&pages.numbers()).filter(|_| space == WHOLE);
        let runs: Vec<Range<u64>> = plain.runs(pages.numbers()).into_iter().collect();
        let kind = result.as_ref().err().and_then(Kind::of_unmap);
        let rigid = self.is_rigid(space);
        if self.is_explained(rigid, kind) {
            return;
        }
        if let Some(cut) = cut {
            let Err(UnmapError::CutsMapping { mapping }) = result else {
                panic!("{result:?}, and pages {cut:?} would be cut")
            };
            return assert_eq!(numbers(mapping), cut);
        }
        let unmapped = expect(result, None).unwrap();
        assert_eq!(unmapped.runs().map(numbers).collect::<Vec<_>>(), runs);
        runs.into_iter().for_each(|run| self.plain[space].unmap(run));
    }

    pub(super) fn batch(&mut self, space: usize, ranges: &[Pages]) {
        let real = self.spaces[space].clone();
        let mut batch = real.batch();
        for pages in ranges {
            let Some(range) = pages.range() else { continue };
            let result = self.call(|_| batch.unmap(range));
            self.unmapped(space, *pages, result);
        }
        batch.finish();
        self.deferred[space] = false;
    }

    pub(super) fn flush(&mut self, space: usize) {
        self.spaces[space].flush();
        self.deferred[space] = false;
    }

    pub(super) fn protect(&mut self, space: usize, pages: Pages, bits: u8) {
        let Some(range) = pages.range() else { return };
        let real = self.spaces[space].clone();
        let result = self.call(|_| real.protect(range, permissions(bits)));
        let rigid = self.is_rigid(space);
        if self.is_explained(rigid, result.as_ref().err().and_then(Kind::of_protect)) {
            return;
        }
        let plain = &mut self.plain[space];
        assert_eq!(expect(result, None), Some(plain.count(pages.numbers()) * PAGE));
        for (piece, lead) in plain.pieces(pages.numbers()) {
            plain.mapped.insert(piece, Lead { permissions: permissions(bits), ..lead });
        }
    }

    pub(super) fn remap(&mut self, space: usize, at: u64, what: What) {
        let Some((memory, mut part, object, first)) = self.wanted(space, what) else { return };
        part.count = part.count.min(LOW).min(END - at);
        let plain = &self.plain[space];
        // As much as is mapped from there on, mostly.
        let mapped = plain.runs(at..at + part.count).into_iter().next().filter(|run| run.start == at);
        let mapped = mapped.map_or(0, |run| run.end - at);
        if what.part.first % 5 != 0 {
            part.count = part.count.min(mapped);
        }
        let allowed = permissions(what.permissions);
        let (early, late) = self.unavailable(what, part);
        let real = self.spaces[space].clone();
        let (offset, length) = (part.first * PAGE, part.count * PAGE);
        let result = self.call(|_| real.remap(Iova::new(at * PAGE), &memory, offset, length, allowed));
        let rigid = self.is_rigid(space);
        if part.count == 0 {
            expect(result, Some("Request(NoRange"));
            return;
        }
        let asked = |error: &str| format!("Request({error}");
        if let Some(error) = early {
            expect(result, Some(&asked(error)));
            return;
        }
        if self.is_explained(rigid, result.as_ref().err().and_then(Kind::of_remap)) {
            return;
        }
        let hole = (mapped < part.count).then(|| format!("NotMapped {{ at: {} }}", (at + mapped) * PAGE));
        let refusal = late.map(asked).or(hole);
        if expect(result, refusal.as_deref()).is_some() {
            let lead = Lead { object, shift: first.wrapping_sub(at), permissions: allowed };
            self.plain[space].mapped.insert(at..at + part.count, lead);
        }
    }

    pub(super) fn alias(&mut self, space: usize, mut pages: Pages, target: usize, at: u64, bits: u8) {
        let large = self.plain[space].count(pages.numbers()) > LARGE;
        if large && (target == SMALL_LEAVES || (at ^ pages.first) & ((1 << 18) - 1) != 0) {
            pages.count = pages.count.min(600);
        }
        pages.count = pages.count.min(END - at.max(pages.first)).min(END - 1);
        let Some(source) = pages.range() else { return };
        let (from, to) = (self.spaces[space].clone(), self.spaces[target].clone());
        let result = self.call(|_| from.alias(source, &to, Iova::new(at * PAGE), permissions(bits)));
        if self.is_explained(false, result.as_ref().err().and_then(Kind::of_alias)) {
            return;
        }
        let wanted = permissions(bits);
        let copied = self.plain[space].pieces(pages.numbers());
        let moved = |page: u64| page - pages.first + at;
        let allowed = |lead: &Lead| match lead.permissions {
            all if all.contains(wanted) => Some(wanted),
            all if wanted.contains(all) => Some(all),
            _ => None,
        };
        if let Some((piece, _)) = copied.iter().find(|(_, lead)| allowed(lead).is_none()) {
            let Err(AliasError::NoPermission { at }) = result else { panic!("{result:?}") };
            return assert!(at <= piece.start * PAGE, "{at:#x} allows it");
        }
        let copies: Vec<(Range<u64>, Lead)> = copied
            .into_iter()
            .filter_map(|(piece, lead)| {
                let there = moved(piece.start)..moved(piece.end);
                let shift = lead.page(piece.start).wrapping_sub(there.start);
                Some((there, Lead { shift, permissions: allowed(&lead)?, ..lead }))
            })
            .collect();
        let runs: RangeSet<u64> = copies.iter().map(|(piece, _)| piece.clone()).collect();
        let bytes = runs.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE;
        let plain = &self.plain[target];
        let range = Pages { first: at, count: pages.count }.range().unwrap();
        let taken = runs.iter().find_map(|run| plain.first_mapped(run.clone()));
        let refusal = if copies.is_empty() {
            Some("NotMapped".to_owned())
        } else if plain.reserved_in(range) {
            Some("Target(Reserved".to_owned())
        } else if runs.iter().count() as u64 > self.may_have(target) {
            Some("Target(TooManyMappings".to_owned())
        } else {
            taken.map(|page| format!("Target(AlreadyMapped {{ at: {} }}", page * PAGE))
        };
        let kind = result.as_ref().err().and_then(Kind::of_alias);
        let too_much =
            |(piece, lead): &(Range<u64>, Lead)| self.is_too_much(target, piece, lead.object, kind);
        if refusal.is_none() && copies.iter().any(too_much) {
            self.refused = true;
            return;
        }
        if let Some(mapped) = expect(result, refusal.as_deref()) {
            assert_eq!(mapped, bytes);
            let plain = &mut self.plain[target];
            copies.into_iter().for_each(|(piece, lead)| plain.mapped.insert(piece, lead));
            plain.begins.extend(runs.iter().map(|run| run.start));
        }
    }
}
