//! What a program could do better, found in its calls.
//!
//! Each hint is a pattern that costs something on a machine with an IOMMU, counted where it occurs. What is remembered for that is
//! bounded: beyond [`REMEMBERED`] mappings new ones are not looked at.

use std::collections::{BTreeMap, HashMap, VecDeque};

use ioasid_server::Errno;
use ioasid_server::decode::{CapturedCall, FileName};
use ioasid_uapi::iommufd::{Destroy, IoasMap, IoasMapFile, IoasUnmap};
use serde::Serialize;

use crate::quantity::Bytes;

/// How many live mappings are remembered.
const REMEMBERED: usize = 1 << 16;
/// How many unmaps are remembered, to see whether the same is mapped again.
const RECENT: usize = 1 << 10;
/// How many pieces of memory are remembered, to see who maps them.
const PIECES: usize = 1 << 16;
/// Fewer calls than this are not worth a hint.
const WORTH: u64 = 8;
/// A large page.
const LARGE: u64 = 2 << 20;

/// An address space of an open file.
type Space = (FileName, u32);

/// What was mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Mapped {
    /// Whose memory: the process, and the descriptor of a file if it was one.
    owner: (Option<u32>, Option<i32>),
    /// The virtual address, or the offset in the file.
    start: u64,
    length: u64,
    /// What the device may do.
    access: u32,
}

/// Maps that follow each other in addresses and in memory.
#[derive(Debug, Clone, Copy)]
struct Run {
    next_iova: u64,
    last: Mapped,
    maps: u64,
    bytes: u64,
}

/// What has been seen.
#[derive(Debug, Default)]
pub(super) struct Hints {
    live: BTreeMap<(Space, u64), Mapped>,
    runs: HashMap<Space, Run>,
    /// The longest run, and the maps of all runs.
    longest: Option<Run>,
    in_runs: u64,
    recent: VecDeque<(Space, u64, Mapped)>,
    mapped_again: u64,
    /// Who maps a piece of memory, first of all.
    pieces: HashMap<(Option<u32>, u64, u64), FileName>,
    several_files: u64,
    several_bytes: u64,
    unaligned: u64,
    unaligned_bytes: u64,
    cutting: u64,
}

/// One hint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Hint {
    /// A name that does not change.
    pub(super) kind: &'static str,
    /// How many calls it is about.
    pub(super) calls: u64,
    /// What there is to say.
    pub(super) text: String,
}

fn calls(count: u64) -> String {
    if count == 1 { "1 call".to_owned() } else { format!("{count} calls") }
}

impl Hints {
    /// Looks at a call of a process.
    pub(super) fn see(&mut self, process: Option<u32>, call: &CapturedCall) {
        const ACCESS: u32 = 6;
        if let Some(output) = call.output::<IoasMap>().filter(|_| call.result().is_ok()) {
            let owner = (process, None);
            let access = output.flags & ACCESS;
            let mapped = Mapped { owner, start: output.user_va, length: output.length, access };
            self.map((call.file(), output.ioas_id), output.iova, mapped);
        } else if let Some(output) = call.output::<IoasMapFile>().filter(|_| call.result().is_ok()) {
            let owner = (process, Some(output.fd));
            let access = output.flags & ACCESS;
            let mapped = Mapped { owner, start: output.start, length: output.length, access };
            self.map((call.file(), output.ioas_id), output.iova, mapped);
        } else if let Some(input) = call.input::<IoasUnmap>() {
            let space = (call.file(), input.ioas_id);
            match call.result() {
                Ok(_) => self.unmap(space, input.iova, input.length),
                Err(errno) => self.refused(space, input.iova, input.length, errno),
            }
        } else if let Some(input) = call.input::<Destroy>().filter(|_| call.result().is_ok()) {
            self.runs.remove(&(call.file(), input.id));
            self.unmap((call.file(), input.id), 0, u64::MAX);
        }
    }

    fn map(&mut self, space: Space, iova: u64, mapped: Mapped) {
        let length = mapped.length;
        let known = self.recent.iter().position(|recent| *recent == (space, iova, mapped));
        if let Some(at) = known {
            self.recent.remove(at);
            self.mapped_again += 1;
        }

        let follows = |run: &Run| {
            run.next_iova == iova
                && run.last.owner == mapped.owner
                && run.last.access == mapped.access
                && run.last.start.checked_add(run.last.length) == Some(mapped.start)
        };
        let run = match self.runs.get(&space).filter(|run| follows(run)) {
            Some(run) => {
                self.in_runs += if run.maps == 1 { 2 } else { 1 };
                Run { maps: run.maps + 1, bytes: run.bytes.saturating_add(length), ..*run }
            }
            None => Run { next_iova: 0, last: mapped, maps: 1, bytes: length },
        };
        let run = Run { next_iova: iova.wrapping_add(length), last: mapped, ..run };
        if self.longest.is_none_or(|longest| longest.maps < run.maps) {
            self.longest = Some(run);
        }
        if self.runs.len() < REMEMBERED || self.runs.contains_key(&space) {
            self.runs.insert(space, run);
        }

        if length >= LARGE && (iova ^ mapped.start) % LARGE != 0 {
            self.unaligned += 1;
            self.unaligned_bytes = self.unaligned_bytes.saturating_add(length);
        }

        if mapped.owner.1.is_none() {
            let piece = (mapped.owner.0, mapped.start, length);
            match self.pieces.get(&piece) {
                Some(first) if *first != space.0 => {
                    self.several_files += 1;
                    self.several_bytes = self.several_bytes.saturating_add(length);
                }
                Some(_) => {}
                None if self.pieces.len() < PIECES => drop(self.pieces.insert(piece, space.0)),
                None => {}
            }
        }

        if self.live.len() < REMEMBERED {
            self.live.insert((space, iova), mapped);
        }
    }

    fn unmap(&mut self, space: Space, iova: u64, length: u64) {
        let last = iova.saturating_add(length.saturating_sub(1));
        let gone: Vec<_> =
            self.live.range((space, iova)..=(space, last)).map(|(key, mapped)| (*key, *mapped)).collect();
        for (key, mapped) in gone {
            self.live.remove(&key);
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back((space, key.1, mapped));
        }
    }

    fn refused(&mut self, space: Space, iova: u64, length: u64, errno: Errno) {
        if errno != Errno::NOENT || length == 0 {
            return;
        }
        let last = iova.saturating_add(length - 1);
        let cut = |at: u64| {
            let below = self.live.range((space, 0)..=(space, at)).next_back();
            below.is_some_and(|((_, first), mapped)| {
                let end = first.saturating_add(mapped.length - 1);
                end >= at && (*first < iova || end > last)
            })
        };
        self.cutting += u64::from(cut(iova) || cut(last));
    }

    /// What is worth saying.
    pub(super) fn hints(&self) -> Vec<Hint> {
        let mut hints = Vec::new();
        if let Some(longest) = self.longest.filter(|_| self.in_runs >= WORTH) {
            let text = format!(
                "{} maps follow each other in addresses and in memory; the longest run is {} maps that one map of {} would do",
                self.in_runs,
                longest.maps,
                Bytes(longest.bytes)
            );
            hints.push(Hint { kind: "adjacent-maps", calls: self.in_runs, text });
        }
        if self.mapped_again >= WORTH {
            let text = format!(
                "{} maps put back what had been unmapped from the same addresses shortly before; it could have stayed mapped",
                self.mapped_again
            );
            hints.push(Hint { kind: "mapped-again", calls: self.mapped_again, text });
        }
        if self.several_files > 0 {
            let text = format!(
                "{} of the same memory mapped through several opens of /dev/iommu; Linux pins and charges it for each: share one open, \
                 or use IOAS_COPY",
                Bytes(self.several_bytes)
            );
            hints.push(Hint { kind: "charged-several-times", calls: self.several_files, text });
        }
        if self.unaligned > 0 {
            let text = format!(
                "{} mapped 2 MiB or more ({} in all) with IOVA and memory at different offsets in their 2 MiB, so that tables need \
                 pages of 4 KiB; align both in the same way",
                calls(self.unaligned),
                Bytes(self.unaligned_bytes)
            );
            hints.push(Hint { kind: "no-large-pages", calls: self.unaligned, text });
        }
        if self.cutting > 0 {
            let text = format!(
                "{} got ENOENT because an unmap would have cut what one call had mapped; iommufd unmaps whole maps only, so map in \
                 the pieces that you will unmap",
                calls(self.cutting)
            );
            hints.push(Hint { kind: "cutting-unmaps", calls: self.cutting, text });
        }
        hints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Space = (FileName::Iommufd(1), 1);

    fn memory(start: u64, length: u64) -> Mapped {
        Mapped { owner: (Some(7), None), start, length, access: 6 }
    }

    fn kinds(hints: &Hints) -> Vec<(&'static str, u64)> {
        hints.hints().into_iter().map(|hint| (hint.kind, hint.calls)).collect()
    }

    #[test]
    fn maps_that_one_map_would_do() {
        let mut hints = Hints::default();
        for number in 0..512 {
            hints.map(SPACE, number * LARGE, memory((number + 64) * LARGE, LARGE));
        }
        // Other memory, and another space: no run.
        hints.map(SPACE, 512 * LARGE, memory(0, LARGE));
        hints.map((SPACE.0, 2), 513 * LARGE, memory(LARGE, LARGE));
        assert_eq!(kinds(&hints), [("adjacent-maps", 512)]);
        assert!(hints.hints()[0].text.contains("512 maps that one map of 1 GiB would do"));
    }

    #[test]
    fn the_same_pages_at_the_same_place_again() {
        let mut hints = Hints::default();
        for round in 0..20 {
            hints.map(SPACE, 0x10000, memory(0x5000, 0x1000));
            // Other pages at another place, each time.
            hints.map(SPACE, 0x20000, memory(0x100_0000 + round * 0x1000, 0x1000));
            hints.unmap(SPACE, 0x10000, 0x11000);
        }
        assert_eq!(kinds(&hints), [("mapped-again", 19)]);
    }

    #[test]
    fn memory_of_several_opens() {
        let mut hints = Hints::default();
        hints.map(SPACE, 0x10000, memory(0x5000, 0x1000));
        hints.map((SPACE.0, 2), 0x10000, memory(0x5000, 0x1000));
        assert_eq!(kinds(&hints), []);
        hints.map((FileName::Iommufd(2), 1), 0x10000, memory(0x5000, 0x1000));
        assert_eq!(kinds(&hints), [("charged-several-times", 1)]);
    }

    #[test]
    fn large_maps_that_cannot_have_large_pages() {
        let mut hints = Hints::default();
        hints.map(SPACE, 0, memory(LARGE, LARGE));
        hints.map(SPACE, 2 * LARGE, memory(0x1000, LARGE - 0x1000));
        assert_eq!(kinds(&hints), []);
        hints.map(SPACE, 4 * LARGE, memory(0x1000, LARGE));
        assert_eq!(kinds(&hints), [("no-large-pages", 1)]);
    }

    #[test]
    fn unmaps_that_would_cut() {
        let mut hints = Hints::default();
        hints.map(SPACE, 0x10000, memory(0x5000, 0x4000));
        hints.refused(SPACE, 0x20000, 0x1000, Errno::NOENT);
        hints.refused((SPACE.0, 2), 0x10000, 0x1000, Errno::NOENT);
        hints.refused(SPACE, 0x10000, 0x1000, Errno::BUSY);
        assert_eq!(kinds(&hints), []);
        hints.refused(SPACE, 0x10000, 0x1000, Errno::NOENT);
        hints.refused(SPACE, 0x11000, 0x1000, Errno::NOENT);
        hints.refused(SPACE, 0x13000, 0x5000, Errno::NOENT);
        assert_eq!(kinds(&hints), [("cutting-unmaps", 3)]);
        // Once it is unmapped, there is nothing to cut.
        hints.unmap(SPACE, 0, u64::MAX);
        hints.refused(SPACE, 0x10000, 0x1000, Errno::NOENT);
        assert_eq!(kinds(&hints), [("cutting-unmaps", 3)]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut hints = Hints::default();
        for number in 0..2 * REMEMBERED as u64 {
            hints.map((SPACE.0, number as u32), number << 13, memory(number << 14, 0x1000));
        }
        assert!(hints.live.len() <= REMEMBERED && hints.runs.len() <= REMEMBERED);
        assert!(hints.pieces.len() <= PIECES);
        hints.unmap((SPACE.0, 3), 0, u64::MAX);
        assert_eq!(hints.live.len(), REMEMBERED - 1);
    }
}
