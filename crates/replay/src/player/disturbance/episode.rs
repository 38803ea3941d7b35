//! One visit to a space: devices come, memory is mapped, cut, changed, taken back, and everything goes again.
//!
//! One thread acts, another has the devices read. For each page, and for each device, there is a word that says what holds:
//! whether it leads somewhere, and where, or that this is just being changed. The reader looks before and after. If the words
//! stayed the same and say *there*, the DMA must have gone through and moved the right bytes; if they say *gone*, it must have
//! been refused. If anything changed meanwhile, either may be, but never other bytes than those of a page of the episode's
//! memory, since each page begins with words of its own.

use super::{Disturbed, cannot_cut};
use crate::random::Random;
use crate::trace::PAGE;
use ioasid::{Account, Backing, Device, Iova, IovaRange, MapError, Memory, Permissions, Rid, Space, Table};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

/// How much of each page has contents.
const SAMPLE: usize = 256;
/// The most pages that are mapped.
const MOST_PAGES: u64 = 1024;
/// The most changes before everything goes.
const MOST_STEPS: u64 = 24;

/// What is known of a page or a device at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// It leads nowhere.
    Gone,
    /// It leads to a page of the memory; for a device: it is attached.
    There(u64),
    /// This is being changed.
    Changing,
}

/// What is known, for two threads: one says it, another looks.
#[derive(Debug, Default)]
struct Word(AtomicU64);

impl Word {
    /// Only the thread that acts calls this. No two words in a row are the same.
    fn set(&self, known: Known) {
        let state = match known {
            Known::Gone => 0,
            Known::There(page) => 2 + page,
            Known::Changing => 1,
        };
        let turn = (self.0.load(SeqCst) >> 32).wrapping_add(1);
        self.0.store(turn << 32 | state, SeqCst);
    }

    /// What is known, and the word that says so.
    fn look(&self) -> (Known, u64) {
        let word = self.0.load(SeqCst);
        let known = match word & 0xffff_ffff {
            0 => Known::Gone,
            1 => Known::Changing,
            page => Known::There(page - 2),
        };
        (known, word)
    }
}

/// A further device, and whether it is attached.
#[derive(Debug)]
struct Guest {
    kind: TableKind,
    device: Device,
    port: Arc<Port>,
    attached: Word,
}

impl Guest {
    fn new(kind: TableKind, rid: Rid) -> Option<Guest> {
        let iommu = SoftIommu::new();
        let port = iommu.add_device(rid, kind).ok()?;
        let device = Device::new(iommu, rid).ok()?;
        Some(Guest { kind, device, port, attached: Word::default() })
    }

    fn attach(&self, space: &Arc<Space>) -> Result<(), String> {
        self.attached.set(Known::Changing);
        let attached = Table::for_device(space, &self.device).and_then(|table| self.device.attach(&table));
        attached.map_err(|error| format!("a device on {} cannot be attached: {error}", self.kind))?;
        self.attached.set(Known::There(0));
        Ok(())
    }

    fn detach(&self) {
        self.attached.set(Known::Changing);
        self.device.detach();
        self.attached.set(Known::Gone);
    }
}

/// A visit to a space.
pub(super) struct Episode<'a> {
    space: &'a Arc<Space>,
    first: u64,
    salt: u64,
    pages: Vec<Word>,
    guests: Vec<Guest>,
}

impl Episode<'_> {
    /// Visits a space, with addresses from `room` on. Everything is gone when this returns, also on an error.
    pub(super) fn run(
        space: &Arc<Space>,
        account: &Account,
        room: u64,
        salt: u64,
        random: &mut Random,
        disturbed: &mut Disturbed,
    ) -> Result<(), String> {
        // Few pages as often as many.
        let most = MOST_PAGES >> random.below(10);
        let count = 1 + random.below(most);
        // Sometimes so that large leaves fit.
        let first = room + if random.one_in(2) { 0 } else { random.below(4096) * PAGE };
        let mut guests = Vec::new();
        for number in 0..=random.below(3) {
            let kind = random.choose(&TableKind::ALL).copied().unwrap_or_default();
            guests.extend(Guest::new(kind, Rid(number as u16)));
        }
        let pages = (0..count).map(|_| Word::default()).collect();
        let episode = Episode { space, first, salt, pages, guests };
        let backing = Backing::anonymous(space.bus(), count * PAGE).map_err(|error| error.to_string())?;
        for page in 0..count {
            backing.write(page * PAGE, &episode.content(page)).map_err(|gone| gone.to_string())?;
        }
        let memory =
            Memory::register(&backing, 0, count * PAGE, account).map_err(|error| error.to_string())?;
        let stop = AtomicBool::new(false);
        let mut reader = Random::new(random.next());
        thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut found = Disturbed::default();
                while !stop.load(SeqCst) {
                    episode.read_somewhere(&mut reader, &mut found)?;
                }
                Ok::<_, String>(found)
            });
            let acted = episode.act(&backing, memory, random, disturbed);
            stop.store(true, SeqCst);
            let read = match reading.join() {
                Ok(read) => read,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            disturbed.add(read?);
            acted
        })
    }

    /// What a page of the memory begins with, word by word.
    fn mark(&self, page: u64) -> Random {
        Random::fork(self.salt, page)
    }

    /// The first bytes of a page of the memory.
    fn content(&self, page: u64) -> [u8; SAMPLE] {
        let mut words = self.mark(page);
        let mut bytes = [0; SAMPLE];
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&words.next().to_ne_bytes()));
        bytes
    }

    fn range(&self, first: u64, count: u64) -> Result<IovaRange, String> {
        let range = IovaRange::with_length(self.first + first * PAGE, count * PAGE);
        range.ok_or_else(|| "an episode beyond the last address".to_owned())
    }

    fn set(&self, first: u64, count: u64, known: impl Fn(u64) -> Known) {
        for page in first..first + count {
            self.pages[page as usize].set(known(page));
        }
    }

    /// Has a device read a page, and looks whether what came of it may be.
    fn read(&self, guest: &Guest, page: u64, disturbed: &mut Disturbed) -> Result<(), String> {
        let word = &self.pages[page as usize];
        let mut bytes = [0; SAMPLE];
        let before = (guest.attached.look(), word.look());
        let read = guest.port.read(self.first + page * PAGE, &mut bytes);
        let unchanged = (guest.attached.look(), word.look()) == before;
        let ((attached, _), (known, _)) = before;
        let at = || format!("at {:#x} through {}", self.first + page * PAGE, guest.kind);
        match (read, attached, known) {
            (Err(fault), Known::There(_), Known::There(_)) if unchanged => {
                Err(format!("DMA {} is refused, where memory is mapped: {fault}", at()))
            }
            (Err(_), ..) => {
                disturbed.dma_refused += 1;
                Ok(())
            }
            (Ok(()), Known::Gone, _) if unchanged => {
                Err(format!("DMA {} of a device that is detached", at()))
            }
            (Ok(()), _, Known::Gone) if unchanged => Err(format!("DMA {}, where nothing is mapped", at())),
            (Ok(()), _, Known::There(target)) if unchanged && bytes != self.content(target) => {
                Err(format!("DMA {} has moved other bytes than those of page {target}", at()))
            }
            // Whatever it was meanwhile: of this memory.
            (Ok(()), ..) if !unchanged || known == Known::Changing => {
                let pages = 0..self.pages.len() as u64;
                if !pages.into_iter().any(|page| bytes[..8] == self.mark(page).next().to_ne_bytes()) {
                    return Err(format!("DMA {} has moved bytes that are nobody's", at()));
                }
                disturbed.dma += 1;
                Ok(())
            }
            (Ok(()), ..) => {
                disturbed.dma += 1;
                Ok(())
            }
        }
    }

    fn read_somewhere(&self, random: &mut Random, disturbed: &mut Disturbed) -> Result<(), String> {
        let page = random.below(self.pages.len() as u64);
        match random.choose(&self.guests) {
            Some(guest) => self.read(guest, page, disturbed),
            None => Ok(()),
        }
    }

    /// The ends of a range, and what is beside it, through every device.
    fn look_around(&self, first: u64, count: u64, disturbed: &mut Disturbed) -> Result<(), String> {
        let pages = [first.checked_sub(1), Some(first), Some(first + count - 1), Some(first + count)];
        for page in pages.into_iter().flatten().filter(|page| *page < self.pages.len() as u64) {
            for guest in &self.guests {
                self.read(guest, page, disturbed)?;
            }
        }
        Ok(())
    }

    /// Some pages of all.
    fn some(&self, random: &mut Random) -> (u64, u64) {
        let all = self.pages.len() as u64;
        let first = random.below(all);
        let most = 1 << random.below(11);
        (first, 1 + random.below(most.min(all - first)))
    }

    fn act(
        &self,
        backing: &Arc<Backing>,
        memory: Arc<Memory>,
        random: &mut Random,
        disturbed: &mut Disturbed,
    ) -> Result<(), String> {
        let all = self.pages.len() as u64;
        let (early, late) = self.guests.split_at(random.below(self.guests.len() as u64 + 1) as usize);
        let attach = |guests: &[Guest], disturbed: &mut Disturbed| {
            disturbed.attachments += guests.len() as u64;
            guests.iter().try_for_each(|guest| guest.attach(self.space))
        };
        attach(early, disturbed)?;
        self.map(&memory, 0, all, 0)?;
        attach(late, disturbed)?;
        self.look_around(0, all, disturbed)?;
        for _ in 0..random.below(MOST_STEPS) {
            let (first, count) = self.some(random);
            match random.below(8) {
                0..=3 => self.change(&memory, first, count, random, disturbed)?,
                4 => drop(self.space.merge(self.range(0, all)?)),
                5 => self.borrow(first)?,
                6 => self.space.flush(),
                _ => {
                    if let Some(guest) = random.choose(&self.guests) {
                        if random.one_in(2) {
                            guest.detach();
                            self.read(guest, first, disturbed)?;
                        }
                        attach(std::slice::from_ref(guest), disturbed)?;
                    }
                }
            }
            self.look_around(first, count, disturbed)?;
        }
        self.set(0, all, |_| Known::Changing);
        let mut memory = Some(memory);
        match random.below(3) {
            0 => {
                backing.revoke();
                disturbed.revocations += 1;
                let refused = memory
                    .as_ref()
                    .map(|memory| self.space.map(Iova::new(self.first), memory, 0, PAGE, Permissions::READ));
                if !matches!(refused, Some(Err(MapError::Revoked))) {
                    return Err(format!("memory that was revoked can be mapped: {refused:?}"));
                }
            }
            1 => drop(memory.take()),
            _ => {
                self.space.unmap(self.range(0, all)?).map_err(|error| error.to_string())?;
            }
        }
        self.set(0, all, |_| Known::Gone);
        for _ in 0..16 {
            self.read_somewhere(random, disturbed)?;
        }
        self.look_around(0, all, disturbed)?;
        let left = self.space.leaves(self.range(0, all)?);
        if !left.is_empty() {
            return Err(format!("{} leaves are left of what is gone", left.len()));
        }
        self.guests.iter().for_each(Guest::detach);
        Ok(())
    }

    /// Maps pages, the first of them to `target` of the memory.
    fn map(&self, memory: &Arc<Memory>, first: u64, count: u64, target: u64) -> Result<(), String> {
        self.set(first, count, |_| Known::Changing);
        let (iova, offset) = (Iova::new(self.first + first * PAGE), target * PAGE);
        self.space
            .map(iova, memory, offset, count * PAGE, Permissions::READ)
            .map_err(|error| error.to_string())?;
        self.set(first, count, |page| Known::There(target + (page - first)));
        Ok(())
    }

    /// Cuts pages out, looks, and maps them again, to the same memory or to other.
    fn change(
        &self,
        memory: &Arc<Memory>,
        first: u64,
        count: u64,
        random: &mut Random,
        disturbed: &mut Disturbed,
    ) -> Result<(), String> {
        let range = self.range(first, count)?;
        let before: Vec<Known> =
            (first..first + count).map(|page| self.pages[page as usize].look().0).collect();
        self.set(first, count, |_| Known::Changing);
        let unmapped =
            if random.one_in(2) { self.space.unmap_deferred(range) } else { self.space.unmap(range) };
        match unmapped {
            Ok(unmapped) if unmapped.bytes() == count * PAGE => disturbed.cuts += 1,
            Ok(unmapped) => return Err(format!("{} bytes went of {range}", unmapped.bytes())),
            Err(error) if cannot_cut(&error) => {
                disturbed.cuts_refused += 1;
                self.set(first, count, |page| before[(page - first) as usize]);
                return Ok(());
            }
            Err(error) => return Err(error.to_string()),
        }
        self.set(first, count, |_| Known::Gone);
        self.look_around(first, count, disturbed)?;
        let target = match random.one_in(2) {
            true => first,
            false => random.below(self.pages.len() as u64 - count + 1),
        };
        self.map(memory, first, count, target)
    }

    /// Reads a page in place.
    fn borrow(&self, page: u64) -> Result<(), String> {
        let (Known::There(target), _) = self.pages[page as usize].look() else { return Ok(()) };
        let iova = Iova::new(self.first + page * PAGE);
        // Nobody but this thread unmaps it, so nobody asks.
        let nobody = Arc::new(|_: IovaRange| ());
        let slice = self.space.borrow(iova, SAMPLE as u64, Permissions::READ, nobody);
        let slice = slice.map_err(|error| error.to_string())?;
        let mut bytes = [0; SAMPLE];
        slice.read(0, &mut bytes).map_err(|error| error.to_string())?;
        if bytes == self.content(target) {
            Ok(())
        } else {
            Err(format!("a slice at {iova} is of other memory"))
        }
    }
}
