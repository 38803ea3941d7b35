//! What is thrown in while a trace is replayed.
//!
//! Threads of their own come again and again to one of the trace's spaces with an [episode]: further devices, on
//! tables of other formats, are attached, and memory is mapped beside the trace's; parts of it are cut out, mapped to something
//! else, borrowed, merged; the devices go and come back; and at the end the memory is unmapped, dropped, or revoked. A
//! further thread has the devices read all the while. So whatever the replay does to a space, and to the tables that follow
//! it, is done beside others that do the like, and the bytes of both are checked.
//!
//! The trace's own mappings are disturbed too: now and then, [just before one is unmapped](cut_and_mend), a part is cut out of it and
//! mapped back. Nobody else may do that, because only the trace's worker knows that the mapping is there.
//!
//! A device that was recorded with its DMA is left alone, with its space: it is there to show again what was seen, in the same order.
//!
//! # Room
//!
//! Devices of all kinds are to be attached, so all addresses must be ones that every kind of table has: the trace has those
//! below [`Disturbance::FIRST`], without the window of interrupts, and what it does elsewhere is left out. The
//! disturbances have those above, each thread its own.

use super::scene::{GuestMemory, Scene};
use crate::live::Mapping;
use crate::random::Random;
use crate::statistics::Noted;
use episode::Episode;
use ioasid::{Account, Iova, IovaRange, Space, TableError, UnmapError};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

mod episode;

/// Even if the trace is over before they have begun, threads that disturb do so this often.
const LEAST_EPISODES: u64 = 3;
/// One mapping of the trace in so many is cut before it is unmapped.
const CUT_ONE_IN: u64 = 8;
/// x86 takes writes to these addresses for interrupts, and most kinds of table have no mapping there.
const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// What is thrown in while a trace is replayed: see the crate's `src/player/disturbance.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disturbance {
    /// Decides everything but when it happens.
    pub seed: u64,
    /// How many threads there are that disturb, 1 to 16. Each has another one that does DMA.
    pub threads: usize,
}

impl Disturbance {
    /// Where the addresses of the disturbances begin. A replay that is disturbed leaves out what a trace does there.
    pub const FIRST: u64 = 1 << 37;
    /// How many threads there may be.
    pub(super) const MOST_THREADS: usize = 16;

    /// Whether a trace may use these addresses.
    pub(super) fn leaves(pages: &IovaRange) -> bool {
        let interrupts = pages.first() <= INTERRUPTS.1 && pages.last() >= INTERRUPTS.0;
        pages.last() < Disturbance::FIRST && !interrupts
    }
}

/// What was thrown in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Disturbed {
    /// How often threads came to a space.
    pub episodes: u64,
    /// Further devices that were attached, again after they were detached, or moved.
    pub attachments: u64,
    /// Parts that were cut out of mappings, the trace's and their own.
    pub cuts: u64,
    /// Cuts that were refused, with nothing changed, because a table cannot be cut while devices use it.
    pub cuts_refused: u64,
    /// Objects that were revoked while mapped.
    pub revocations: u64,
    /// DMA of further devices that moved the right bytes.
    pub dma: u64,
    /// DMA of further devices that was refused where nothing was mapped.
    pub dma_refused: u64,
    /// What was not as it should be.
    pub wrong: Noted,
}

impl Disturbed {
    pub(super) fn add(&mut self, other: Disturbed) {
        self.episodes += other.episodes;
        self.attachments += other.attachments;
        self.cuts += other.cuts;
        self.cuts_refused += other.cuts_refused;
        self.revocations += other.revocations;
        self.dma += other.dma;
        self.dma_refused += other.dma_refused;
        self.wrong.add(other.wrong);
    }
}

/// What the replay and those who disturb it share.
#[derive(Debug, Default)]
pub(super) struct Scenery {
    spaces: Mutex<Vec<Arc<Space>>>,
    ended: AtomicBool,
}

impl Scenery {
    fn spaces(&self) -> MutexGuard<'_, Vec<Arc<Space>>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is another space to be disturbed.
    pub(super) fn add(&self, space: &Arc<Space>) {
        self.spaces().push(space.clone());
    }

    /// The replay is over. Episodes that have begun are finished.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// The threads that disturb. They end when this is dropped, or asked.
pub(super) struct Disturbers<'scope> {
    scenery: &'scope Scenery,
    threads: Vec<ScopedJoinHandle<'scope, Disturbed>>,
}

impl<'scope> Disturbers<'scope> {
    pub(super) fn start(
        scope: &'scope Scope<'scope, '_>,
        disturbance: Option<Disturbance>,
        scenery: &'scope Scenery,
        account: &'scope Account,
    ) -> std::io::Result<Disturbers<'scope>> {
        let mut disturbers = Disturbers { scenery, threads: Vec::new() };
        let Some(Disturbance { seed, threads }) = disturbance else { return Ok(disturbers) };
        for number in 0..threads as u64 {
            let builder = thread::Builder::new().name(format!("disturber {number}"));
            let thread = builder.spawn_scoped(scope, move || disturb(scenery, account, seed, number))?;
            disturbers.threads.push(thread);
        }
        Ok(disturbers)
    }

    /// Has them finish, and says what they did.
    pub(super) fn end(&mut self) -> Disturbed {
        self.scenery.end();
        let mut all = Disturbed::default();
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(disturbed) => all.add(disturbed),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    }
}

impl Drop for Disturbers<'_> {
    fn drop(&mut self) {
        self.scenery.end();
    }
}

fn disturb(scenery: &Scenery, account: &Account, seed: u64, thread: u64) -> Disturbed {
    let mut random = Random::fork(seed, thread);
    let mut disturbed = Disturbed::default();
    while disturbed.episodes < LEAST_EPISODES || !scenery.has_ended() {
        let space = random.choose(&scenery.spaces()).cloned();
        let Some(space) = space else {
            if scenery.has_ended() {
                break;
            }
            thread::sleep(Duration::from_micros(100));
            continue;
        };
        let number = disturbed.episodes;
        disturbed.episodes += 1;
        // Within what all kinds of table translate.
        let room = Disturbance::FIRST + (thread << 30);
        let salt = seed ^ (thread << 48) ^ number;
        let ended = Episode::run(&space, account, room, salt, &mut random, &mut disturbed);
        if let Err(what) = ended {
            disturbed.wrong.note(0, || format!("disturber {thread}, episode {number}: {what}"));
        }
        if disturbed.wrong.count > 0 {
            break;
        }
    }
    disturbed
}

/// Whether an unmap was refused because of a table that cannot be cut while devices use it.
fn cannot_cut(error: &UnmapError) -> bool {
    matches!(error, UnmapError::Table(TableError::CannotCut { .. } | TableError::NeedsBreak { .. }))
}

/// Cuts a part out of a mapping that stands and that nobody else is going to unmap, looks that it is gone, and maps it back.
pub(super) fn cut_and_mend(
    scene: &dyn Scene,
    memory: &GuestMemory,
    mapping: &Mapping,
    seed: u64,
    disturbed: &mut Disturbed,
) {
    let mut random = Random::fork(seed, mapping.line);
    let Some(space) = scene.space().filter(|_| random.one_in(CUT_ONE_IN)) else { return };
    let pages = mapping.page_bytes() / crate::trace::PAGE;
    let first = random.below(pages);
    let count = 1 + random.below(pages - first);
    let (offset, bytes) = (first * crate::trace::PAGE, count * crate::trace::PAGE);
    let Some(part) = IovaRange::with_length(mapping.pages.first() + offset, bytes) else { return };
    let result = (|| {
        let deferred = random.one_in(2);
        let unmapped = if deferred { space.unmap_deferred(part) } else { space.unmap(part) };
        let unmapped = match unmapped {
            Ok(unmapped) => unmapped.bytes(),
            Err(error) if cannot_cut(&error) => {
                disturbed.cuts_refused += 1;
                return if scene.reaches(part.first()) {
                    Ok(())
                } else {
                    Err("it is gone all the same".to_owned())
                };
            }
            Err(error) => return Err(error.to_string()),
        };
        disturbed.cuts += 1;
        if unmapped != bytes {
            return Err(format!("{unmapped} bytes went, not {bytes}"));
        }
        if let Some(iova) = [part.first(), part.last()].into_iter().find(|iova| scene.reaches(*iova)) {
            return Err(format!("the device still reaches {iova:#x}"));
        }
        let beside = [part.first().checked_sub(1), part.last().checked_add(1)];
        let lost =
            beside.into_iter().flatten().find(|iova| mapping.pages.contains(*iova) && !scene.reaches(*iova));
        if let Some(iova) = lost {
            return Err(format!("the device does not reach {iova:#x} any more, which is beside it"));
        }
        let permissions = mapping.direction.permissions();
        let (iova, place) = (Iova::new(part.first()), mapping.memory + offset);
        space.map(iova, &memory.registered, place, bytes, permissions).map_err(|error| error.to_string())
    })();
    if let Err(what) = result {
        disturbed.wrong.note(mapping.line, || format!("cut of {part} from {}: {what}", mapping.pages));
    }
}
