//! Accounts against a plain model, and in threads.
//!
//! The model of who pays for what is a list of registrations; what a level is charged is the number of different
//! pages in those that an account at or below the level pays for, counted anew after every step.

use ioasid::{Account, Backing, Bus, Memory, OverLimit, RegisterError, Usage};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = 4096;
const OBJECTS: usize = 3;
const OBJECT_PAGES: u64 = 40;
const SLOTS: usize = 10;

/// A registration as the model has it.
#[derive(Clone, Debug)]
struct Registration {
    object: usize,
    pages: std::ops::Range<u64>,
    payer: usize,
}

#[derive(Clone, Debug)]
struct Level {
    parent: Option<usize>,
    limit: Option<u64>,
    peak: u64,
    failures: u64,
}

struct World {
    backings: Vec<Arc<Backing>>,
    accounts: Vec<Account>,
    memories: Vec<Option<Arc<Memory>>>,

    levels: Vec<Level>,
    registrations: Vec<Option<Registration>>,
}

#[derive(Clone, Debug)]
enum Step {
    Register { slot: usize, object: usize, first: u64, count: u64, payer: usize },
    Drop { slot: usize },
    Transfer { slot: usize, to: usize },
    TransferAll { slots: Vec<usize>, to: usize },
    Limit { level: usize, limit: Option<u64> },
}

fn step(levels: usize) -> impl Strategy<Value = Step> {
    let (slot, level) = (0..SLOTS, 0..levels);
    let limit = prop::option::weighted(0.8, 0..OBJECT_PAGES * 2);
    prop_oneof![
        6 => (slot.clone(), 0..OBJECTS, 0..OBJECT_PAGES, 1..OBJECT_PAGES, level.clone()).prop_map(
            |(slot, object, first, count, payer)| {
                Step::Register { slot, object, first, count: count.min(OBJECT_PAGES - first), payer }
            }
        ),
        2 => slot.clone().prop_map(|slot| Step::Drop { slot }),
        3 => (slot.clone(), level.clone()).prop_map(|(slot, to)| Step::Transfer { slot, to }),
        2 => (prop::collection::vec(slot, 0..SLOTS), level.clone())
            .prop_map(|(slots, to)| Step::TransferAll { slots, to }),
        1 => (level, limit).prop_map(|(level, limit)| Step::Limit { level, limit }),
    ]
}

/// A forest of accounts, and steps.
fn scenario() -> impl Strategy<Value = (Vec<Level>, Vec<Step>)> {
    let level =
        (any::<prop::sample::Index>(), prop::bool::weighted(0.8), prop::option::weighted(0.6, 0..80u64));
    prop::collection::vec(level, 1..10).prop_flat_map(|seeds| {
        let levels: Vec<Level> = seeds
            .iter()
            .enumerate()
            .map(|(number, (parent, is_child, limit))| Level {
                parent: (*is_child && number > 0).then(|| parent.index(number.max(1))),
                limit: *limit,
                peak: 0,
                failures: 0,
            })
            .collect();
        let steps = prop::collection::vec(step(levels.len()), 1..60);
        (Just(levels), steps)
    })
}

impl World {
    fn new(levels: Vec<Level>) -> World {
        let bus = Bus::new();
        let mut accounts: Vec<Account> = Vec::new();
        for (number, level) in levels.iter().enumerate() {
            let name = format!("level {number}");
            accounts.push(match level.parent {
                None => Account::new(name, level.limit),
                Some(parent) => accounts[parent].child(name, level.limit),
            });
        }
        World {
            backings: (0..OBJECTS).map(|_| Backing::anonymous(&bus, OBJECT_PAGES * PAGE).unwrap()).collect(),
            accounts,
            memories: vec![None; SLOTS],
            levels,
            registrations: vec![None; SLOTS],
        }
    }

    fn is_below(&self, mut account: usize, level: usize) -> bool {
        while account != level {
            match self.levels[account].parent {
                Some(parent) => account = parent,
                None => return false,
            }
        }
        true
    }

    /// How many pages every level is charged, if these are the registrations.
    fn charged(&self, registrations: &[Option<Registration>]) -> Vec<u64> {
        let pages_of = |level: usize| {
            let mut pages = [[false; OBJECT_PAGES as usize]; OBJECTS];
            for held in registrations.iter().flatten().filter(|held| self.is_below(held.payer, level)) {
                pages[held.object][held.pages.start as usize..held.pages.end as usize].fill(true);
            }
            pages.iter().flatten().filter(|charged| **charged).count() as u64
        };
        (0..self.levels.len()).map(pages_of).collect()
    }

    /// Makes these the registrations, if the levels from `payer` upwards allow it. Otherwise nothing changes, and this
    /// is what is said of it.
    fn change(&mut self, registrations: Vec<Option<Registration>>, payer: usize) -> Option<OverLimit> {
        let (before, after) = (self.charged(&self.registrations), self.charged(&registrations));
        let mut next = Some(payer);
        while let Some(level) = next {
            let (old, new) = (before[level], after[level]);
            if let Some(limit) = self.levels[level].limit.filter(|limit| new > old && new > *limit) {
                self.levels[level].failures += 1;
                let account = self.accounts[level].name().to_owned();
                return Some(OverLimit { account, pages: new - old, charged: old, limit });
            }
            next = self.levels[level].parent;
        }
        for (level, charged) in self.levels.iter_mut().zip(after) {
            level.peak = level.peak.max(charged);
        }
        self.registrations = registrations;
        None
    }

    fn take(&mut self, step: &Step) {
        match step.clone() {
            Step::Register { slot, object, first, count, payer } => {
                self.take(&Step::Drop { slot });
                let mut registrations = self.registrations.clone();
                registrations[slot] = Some(Registration { object, pages: first..first + count, payer });
                let result = Memory::register(
                    &self.backings[object],
                    first * PAGE,
                    count * PAGE,
                    &self.accounts[payer],
                );
                match (result, self.change(registrations, payer)) {
                    (Ok(memory), None) => self.memories[slot] = Some(memory),
                    (Err(RegisterError::OverLimit(error)), Some(expected)) => assert_eq!(error, expected),
                    (result, expected) => panic!("{result:?} instead of {expected:?}"),
                }
            }
            Step::Drop { slot } => {
                self.memories[slot] = None;
                self.registrations[slot] = None;
            }
            Step::Transfer { slot, to } => {
                let Some(memory) = self.memories[slot].clone() else { return };
                let result = memory.transfer(&self.accounts[to]);
                self.expect_transfer(&[slot], to, result);
            }
            Step::TransferAll { slots, to } => {
                let memories: Vec<Arc<Memory>> =
                    slots.iter().filter_map(|slot| self.memories[*slot].clone()).collect();
                let memories: Vec<&Memory> = memories.iter().map(|memory| &**memory).collect();
                let result = Memory::transfer_all(&memories, &self.accounts[to]);
                self.expect_transfer(&slots, to, result);
            }
            Step::Limit { level, limit } => {
                self.levels[level].limit = limit;
                self.accounts[level].set_limit(limit);
            }
        }
    }

    fn expect_transfer(&mut self, slots: &[usize], to: usize, result: Result<(), OverLimit>) {
        let mut registrations = self.registrations.clone();
        for slot in slots {
            if let Some(held) = &mut registrations[*slot] {
                held.payer = to;
            }
        }
        assert_eq!(result.err(), self.change(registrations, to));
    }

    fn compare(&self) {
        let charged = self.charged(&self.registrations);
        for ((account, level), charged) in self.accounts.iter().zip(&self.levels).zip(charged) {
            let usage = Usage {
                limit_pages: level.limit,
                charged_pages: charged,
                peak_pages: level.peak,
                failures: level.failures,
            };
            assert_eq!(account.usage(), usage, "{}", account.name());
        }
        for (memory, held) in self.memories.iter().zip(&self.registrations) {
            let payer = memory.as_ref().map(|memory| memory.account());
            assert_eq!(payer.as_ref(), held.as_ref().map(|held| &self.accounts[held.payer]));
        }
        for (object, backing) in self.backings.iter().enumerate() {
            for page in 0..OBJECT_PAGES {
                let all = self.registrations.iter().flatten();
                let holds =
                    all.filter(|held| held.object == object && held.pages.contains(&page)).count() as u64;
                assert_eq!(backing.holds(page * PAGE, PAGE), holds..=holds);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn every_level_is_charged_what_the_model_says((levels, steps) in scenario()) {
        let mut world = World::new(levels);
        for step in &steps {
            world.take(step);
            world.compare();
        }
        for slot in 0..SLOTS {
            world.take(&Step::Drop { slot });
            world.compare();
        }
        prop_assert!(world.accounts.iter().all(|account| account.charged_pages() == 0));
    }
}

fn pages(
    backing: &Arc<Backing>,
    first: u64,
    count: u64,
    account: &Account,
) -> Result<Arc<Memory>, RegisterError> {
    Memory::register(backing, first * PAGE, count * PAGE, account)
}

#[test]
fn two_processes_that_share_pages_are_one_charge_to_their_user() {
    let bus = Bus::new();
    let user = Account::new("user", Some(10));
    let (one, other) = (user.child("one", None), user.child("other", Some(6)));
    let backing = Backing::anonymous(&bus, 64 * PAGE).unwrap();
    let first = pages(&backing, 0, 6, &one).unwrap();
    let second = pages(&backing, 2, 6, &other).unwrap();
    let charged = || [&user, &one, &other].map(Account::charged_pages);
    assert_eq!(charged(), [8, 6, 6]);
    // The process's own limit refuses, and then its user's. Nobody is charged for a refusal, and each counts its own.
    let error = pages(&backing, 8, 1, &other).unwrap_err().to_string();
    assert!(error.contains("other") && error.contains("raise the limit"), "{error}");
    let error = pages(&backing, 8, 3, &one).unwrap_err().to_string();
    assert!(error.contains("user") && error.contains("3 pages more"), "{error}");
    assert_eq!([&user, &one, &other].map(Account::failures), [1, 0, 1]);
    assert_eq!(charged(), [8, 6, 6]);
    // What the user pays for already costs the process alone.
    let third = pages(&backing, 0, 8, &one).unwrap();
    assert_eq!(charged(), [8, 8, 6]);
    drop((first, third));
    assert_eq!(charged(), [6, 0, 6]);
    drop(second);
    assert_eq!(charged(), [0, 0, 0]);
    assert_eq!([&user, &one, &other].map(Account::peak_pages), [8, 8, 6]);
}

#[test]
fn a_guest_that_is_handed_over_is_never_charged_twice() {
    let bus = Bus::new();
    // Room for one guest, and not for a page more.
    let user = Account::new("user", Some(96));
    let (old, new) = (user.child("old", None), user.child("new", Some(96)));
    let objects: Vec<_> = (0..3).map(|_| Backing::anonymous(&bus, 32 * PAGE).unwrap()).collect();
    let guest: Vec<_> = objects.iter().map(|object| pages(object, 0, 32, &old).unwrap()).collect();
    // The new process has a part of it already.
    let part = pages(&objects[1], 8, 8, &new).unwrap();
    let charged = || [&user, &old, &new].map(Account::charged_pages);
    assert_eq!(charged(), [96, 96, 8]);

    let all: Vec<&Memory> = guest.iter().map(|memory| &**memory).collect();
    new.set_limit(Some(95));
    let error = Memory::transfer_all(&all, &new).unwrap_err();
    assert_eq!((error.account.as_str(), error.pages, error.charged, error.limit), ("new", 88, 8, 95));
    assert_eq!((charged(), new.failures(), new.peak_pages()), ([96, 96, 8], 1, 8));
    assert!(guest.iter().all(|memory| memory.account() == old));

    new.set_limit(Some(96));
    // In any order, and one of them named twice.
    Memory::transfer_all(&[all[2], all[0], all[1], all[2]], &new).unwrap();
    assert_eq!((charged(), user.peak_pages(), user.failures()), ([96, 0, 96], 96, 0));
    drop(part);
    assert_eq!(charged(), [96, 0, 96]);
    // Up to the user itself, and to another user altogether.
    Memory::transfer_all(&all, &user).unwrap();
    assert_eq!(charged(), [96, 0, 0]);
    let stranger = Account::new("stranger", None);
    all[0].transfer(&stranger).unwrap();
    assert_eq!((charged(), stranger.charged_pages()), ([64, 0, 0], 32));
    Memory::transfer_all(&[], &old).unwrap();
    drop(guest);
    assert_eq!((charged(), stranger.charged_pages()), ([0, 0, 0], 0));
}

#[test]
fn siblings_that_lose_everything_at_once_leave_the_books_in_order() {
    let bus = Bus::new();
    let group = Account::new("group", None);
    let (one, other, stranger) =
        (group.child("one", None), group.child("other", None), Account::new("s", None));
    let backing = Backing::anonymous(&bus, 64 * PAGE).unwrap();
    let (first, second) = (pages(&backing, 0, 4, &one).unwrap(), pages(&backing, 2, 4, &other).unwrap());
    Memory::transfer_all(&[&first, &second], &stranger).unwrap();
    assert_eq!((group.charged_pages(), stranger.charged_pages()), (0, 6));
    // All of them anew.
    let accounts = [&one, &other, &group, &stranger];
    let again = accounts.map(|account| pages(&backing, 8, 8, account).unwrap());
    assert_eq!(accounts.map(Account::charged_pages), [8, 8, 8, 14]);
    assert_eq!(backing.holds(8 * PAGE, 8 * PAGE), 4..=4);
    drop(again);
    assert_eq!(accounts.map(Account::charged_pages), [0, 0, 0, 6]);
}

#[test]
fn an_account_that_nobody_names_lives_as_long_as_it_is_charged() {
    let bus = Bus::new();
    let user = Account::new("user", None);
    let backing = Backing::anonymous(&bus, 8 * PAGE).unwrap();
    let process = user.child("group", None).child("process", Some(4));
    let memory = pages(&backing, 0, 4, &process).unwrap();
    drop(process);
    let process = memory.account();
    assert_eq!((process.name(), process.charged_pages(), user.charged_pages()), ("process", 4, 4));
    assert_eq!(process.parent().and_then(Account::parent), Some(&user));
    drop(process);
    // Registrations of accounts that came and went leave nothing behind.
    for number in 0..100 {
        let process = user.child(format!("process {number}"), None);
        let memory = pages(&backing, 0, 8, &process).unwrap();
        drop(process);
        assert_eq!(user.charged_pages(), 8);
        drop(memory);
        assert_eq!(user.charged_pages(), 4);
    }
    drop(memory);
    assert_eq!((user.charged_pages(), user.peak_pages()), (0, 8));
}

#[test]
fn a_tree_may_have_more_levels_than_a_stack_has_frames() {
    let bus = Bus::new();
    let backing = Backing::anonymous(&bus, 8 * PAGE).unwrap();
    let root = Account::new("root", Some(5));
    let mut deepest = root.child("child", None);
    for _ in 0..200_000 {
        deepest = deepest.child("child", None);
    }
    let memory = pages(&backing, 0, 5, &deepest).unwrap();
    assert!(pages(&backing, 4, 2, &deepest).is_err());
    let sibling = root.child("sibling", None);
    memory.transfer(&sibling).unwrap();
    assert_eq!((deepest.charged_pages(), sibling.charged_pages(), root.charged_pages()), (0, 5, 5));
    memory.transfer(&deepest).unwrap();
    drop((deepest, sibling));
    drop(memory);
    assert_eq!((root.charged_pages(), root.peak_pages()), (0, 5));
}

#[test]
fn siblings_get_exactly_what_their_parent_has() {
    const LIMIT: u64 = 1000;
    let bus = Bus::new();
    let user = Account::new("user", Some(LIMIT));
    let granted: Vec<Vec<Arc<Memory>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let process = user.child(format!("process {number}"), None);
                let backing = Backing::anonymous(&bus, LIMIT * PAGE).unwrap();
                scope.spawn(move || {
                    (0..LIMIT).map_while(|page| pages(&backing, page, 1, &process).ok()).collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(granted.iter().map(|memories| memories.len() as u64).sum::<u64>(), LIMIT);
    assert_eq!((user.charged_pages(), user.peak_pages()), (LIMIT, LIMIT));
}

#[test]
fn a_charge_that_is_refused_above_is_in_nobodys_way_below() {
    let bus = Bus::new();
    let user = Account::new("user", Some(10));
    let group = user.child("group", Some(12));
    let (greedy, modest) = (group.child("greedy", None), group.child("modest", None));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // More than the user may have, though not more than the group.
            let backing = Backing::anonymous(&bus, 16 * PAGE).unwrap();
            while !stop.load(Ordering::Relaxed) {
                assert!(pages(&backing, 0, 11, &greedy).is_err());
            }
        });
        let backing = Backing::anonymous(&bus, 16 * PAGE).unwrap();
        for _ in 0..5000 {
            let memory = pages(&backing, 0, 5, &modest);
            assert!(memory.is_ok(), "{memory:?}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!((modest.failures(), group.peak_pages()), (0, 5));
    assert_eq!(user.charged_pages(), 0);
}
