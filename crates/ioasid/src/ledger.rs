//! Who is charged for what.
//!
//! An [`Account`] stands for whoever pays: a user, a group, a process, or a name of the caller's own. Accounts form
//! trees; what is charged to one is charged to every account above it, and each has a limit of its own. Memory is
//! charged when it is registered, before anything is held or has a place on the bus, and each page of an object
//! once per account however many registrations, spaces, aliases or accounts below hold it. Mapping charges nothing.
//!
//! # Where it is kept
//!
//! An account is four numbers: limit, charged, peak, refused. Which pages an account pays for already is a matter
//! of the object that has the pages, and kept there ([`charges`]), as intervals ([`coverage`]). So two objects never
//! wait for each other's books, an account does not know what it is charged for, and nothing has to be cleaned up when
//! the last one who holds an account lets it go: an account below, or memory, keeps it alive, and nothing else does.
//!
//! # All levels at once
//!
//! The accounts of one tree share a lock, which is held while a charge is checked against every level and then
//! entered at every level. Counters without a lock would have to be raised one after the other; a charge that is
//! refused at the top would be visible further down for a moment, and could refuse another one there that fits.
//! The lock is held for some additions, by registrations and never by mappings. Locks are taken in the order:
//! registrations of objects (by address, if several), trees (by address, if several), the bus.

use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, PoisonError};
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Number;

pub(crate) mod charges;
pub(crate) mod coverage;
mod transfer;

/// No limit.
const UNLIMITED: u64 = u64::MAX;

/// The number of the next account. 0 is the level above all accounts.
static ACCOUNTS: Number = Number::new(1);

/// Somebody who is charged for registered memory, in pages of 4 KiB. Clones are the same account.
///
/// ```
/// use ioasid::{Account, Backing, Bus, Memory};
///
/// let user = Account::new("user 1000", Some(6));
/// let (one, other) = (user.child("process 1", None), user.child("process 2", Some(4)));
/// let backing = Backing::anonymous(&Bus::new(), 1 << 20)?;
///
/// // The same page, registered by two processes: each is charged, their user once.
/// let first = Memory::register(&backing, 0, 4 << 12, &one)?;
/// let second = Memory::register(&backing, 0, 4 << 12, &other)?;
/// assert_eq!((user.charged_pages(), one.charged_pages(), other.charged_pages()), (4, 4, 4));
///
/// // Any level may refuse. Nothing is charged then, anywhere.
/// let refused = Memory::register(&backing, 4 << 12, 3 << 12, &one).unwrap_err();
/// assert!(refused.to_string().contains("user 1000"));
/// assert_eq!((user.charged_pages(), user.failures(), one.failures()), (4, 1, 0));
///
/// // Released with the last, in any order.
/// drop(first);
/// assert_eq!((user.charged_pages(), one.charged_pages()), (4, 0));
/// drop(second);
/// assert_eq!(user.charged_pages(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Account {
    level: Arc<Level>,
}

/// A level of a tree of accounts. The numbers change under the tree's lock only.
struct Level {
    id: u64,
    name: String,
    parent: Option<Account>,
    /// How many accounts are above.
    depth: usize,
    tree: Arc<Mutex<()>>,
    limit: AtomicU64,
    charged: AtomicU64,
    peak: AtomicU64,
    failures: AtomicU64,
}

/// The numbers of an account at one moment, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// How many pages may be charged; `None`: any number.
    pub limit_pages: Option<u64>,
    /// How many are charged.
    pub charged_pages: u64,
    /// The most that were ever charged at once.
    pub peak_pages: u64,
    /// How many charges this account's limit has refused.
    pub failures: u64,
}

/// A charge would have gone over a limit. Nothing was charged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{pages} pages more would take {account} over its limit of {limit} pages ({charged} are charged); \
     release memory that is charged to it, or raise the limit"
)]
pub struct OverLimit {
    /// The name of the account whose limit it is: the one that was to be charged, or one above it.
    pub account: String,
    /// How many pages were to be charged to that account.
    pub pages: u64,
    /// How many are charged.
    pub charged: u64,
    /// How many may be.
    pub limit: u64,
}

impl Account {
    /// A new account that is below no other; `None`: no limit.
    pub fn new(name: impl Into<String>, limit_pages: Option<u64>) -> Account {
        Account::with_parent(name.into(), limit_pages, None)
    }

    /// A new account below this one: what is charged to it is charged to this one and to those above, too.
    ///
    /// `None`: no limit but those above.
    pub fn child(&self, name: impl Into<String>, limit_pages: Option<u64>) -> Account {
        Account::with_parent(name.into(), limit_pages, Some(self.clone()))
    }

    fn with_parent(name: String, limit_pages: Option<u64>, parent: Option<Account>) -> Account {
        let tree = parent.as_ref().map_or_else(Arc::default, |parent| parent.level.tree.clone());
        let depth = parent.as_ref().map_or(0, |parent| parent.level.depth + 1);
        let level = Level {
            id: ACCOUNTS.fetch_add(1, Ordering::Relaxed),
            name,
            parent,
            depth,
            tree,
            limit: AtomicU64::new(limit_pages.unwrap_or(UNLIMITED)),
            charged: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        };
        Account { level: Arc::new(level) }
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.level.name
    }

    /// The account above.
    pub fn parent(&self) -> Option<&Account> {
        self.level.parent.as_ref()
    }

    /// How many pages may be charged; `None`: any number.
    pub fn limit_pages(&self) -> Option<u64> {
        let limit = self.level.limit.load(Ordering::Relaxed);
        (limit != UNLIMITED).then_some(limit)
    }

    /// Changes the limit. What is charged already stays, even if it is more.
    pub fn set_limit(&self, pages: Option<u64>) {
        let _tree = self.lock_tree();
        self.level.limit.store(pages.unwrap_or(UNLIMITED), Ordering::Relaxed);
    }

    /// How many pages are charged now.
    pub fn charged_pages(&self) -> u64 {
        self.level.charged.load(Ordering::Relaxed)
    }

    /// The most that were ever charged at once.
    pub fn peak_pages(&self) -> u64 {
        self.level.peak.load(Ordering::Relaxed)
    }

    /// How many charges the limit of this account has refused.
    pub fn failures(&self) -> u64 {
        self.level.failures.load(Ordering::Relaxed)
    }

    /// All numbers at one moment.
    pub fn usage(&self) -> Usage {
        let _tree = self.lock_tree();
        Usage {
            limit_pages: self.limit_pages(),
            charged_pages: self.charged_pages(),
            peak_pages: self.peak_pages(),
            failures: self.failures(),
        }
    }

    fn id(&self) -> u64 {
        self.level.id
    }

    /// This account and all above, in that order.
    fn path(&self) -> impl Iterator<Item = &Account> + Clone {
        std::iter::successors(Some(self), |account| account.parent())
    }

    /// The lowest account that is this one or above it, and the same of the other one.
    fn common_ancestor<'a>(&'a self, other: &'a Account) -> Option<&'a Account> {
        let depth = self.level.depth.min(other.level.depth);
        let from = |account: &'a Account| account.path().skip(account.level.depth - depth);
        from(self).zip(from(other)).find(|(one, other)| one == other).map(|(common, _)| common)
    }

    /// As long as this is held, nobody changes the numbers of any account of the tree.
    fn lock_tree(&self) -> MutexGuard<'_, ()> {
        self.level.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Charges so many pages to each of the accounts, which are of the tree of this one, lowest first, or charges nothing:
    /// if a limit is in the way, or if `place` fails, which is called when no limit is.
    pub(crate) fn charge<'a, T, E: From<OverLimit>>(
        &self,
        levels: impl Iterator<Item = (&'a Account, u64)> + Clone,
        place: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        // What is paid for below is paid for above. Nothing to charge is never refused, even over a limit that was
        // lowered.
        if levels.clone().next().is_none_or(|(_, pages)| pages == 0) {
            return place();
        }
        let _tree = self.lock_tree();
        levels.clone().try_for_each(|(level, pages)| level.check(pages))?;
        let placed = place()?;
        levels.for_each(|(level, pages)| level.add(pages));
        Ok(placed)
    }

    /// Takes so many pages back from each of the accounts, which are of the tree of this one, lowest first.
    pub(crate) fn credit<'a>(&self, levels: impl Iterator<Item = (&'a Account, u64)> + Clone) {
        if levels.clone().any(|(_, pages)| pages > 0) {
            let _tree = self.lock_tree();
            levels.for_each(|(level, pages)| level.subtract(pages));
        }
    }

    /// Whether so many pages can be charged to this level. The tree is locked.
    fn check(&self, pages: u64) -> Result<(), OverLimit> {
        let (charged, limit) = (self.charged_pages(), self.level.limit.load(Ordering::Relaxed));
        if pages == 0 || charged.checked_add(pages).is_some_and(|sum| sum <= limit) {
            return Ok(());
        }
        self.level.failures.store(self.failures().saturating_add(1), Ordering::Relaxed);
        Err(OverLimit { account: self.level.name.clone(), pages, charged, limit })
    }

    /// Enters pages that were [checked](Self::check) since the tree was locked.
    fn add(&self, pages: u64) {
        let charged = self.charged_pages() + pages;
        self.level.charged.store(charged, Ordering::Relaxed);
        self.level.peak.store(charged.max(self.peak_pages()), Ordering::Relaxed);
    }

    fn subtract(&self, pages: u64) {
        self.level.charged.store(self.charged_pages().saturating_sub(pages), Ordering::Relaxed);
    }
}

impl PartialEq for Account {
    fn eq(&self, other: &Account) -> bool {
        ptr::eq(&*self.level, &*other.level)
    }
}

impl Eq for Account {}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the accounts above: there may be any number.
        let mut account = f.debug_struct("Account");
        account.field("name", &self.name()).field("charged", &self.charged_pages());
        account.field("limit", &self.limit_pages()).finish_non_exhaustive()
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        // One after the other and not one inside the other: there may be more levels than the stack has room for.
        let mut parent = self.parent.take();
        while let Some(Account { level }) = parent {
            parent = Arc::into_inner(level).and_then(|mut level| level.parent.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, Bus, Memory};
    use std::sync::atomic::AtomicBool;

    fn charge(account: &Account, pages: u64) -> Result<(), OverLimit> {
        account.charge(account.path().map(|level| (level, pages)), || Ok(()))
    }

    #[test]
    fn the_limit_is_exact_and_refusals_are_counted() {
        let account = Account::new("user 1000", Some(10));
        charge(&account, 10).unwrap();
        let error = charge(&account, 1).unwrap_err();
        assert_eq!((error.charged, error.limit, account.failures()), (10, 10, 1));
        account.credit([(&account, 4)].into_iter());
        account.set_limit(Some(3));
        charge(&account, 0).unwrap();
        assert!(charge(&account, 1).is_err());
        assert_eq!((account.charged_pages(), account.peak_pages()), (6, 10));
        assert_eq!(charge(&Account::new("x", None), u64::MAX), Ok(()));
    }

    #[test]
    fn what_fails_after_the_limits_were_asked_is_not_charged() {
        let user = Account::new("user", Some(10));
        let process = user.child("process", None);
        let levels = || process.path().map(|level| (level, 5));
        #[derive(Debug)]
        struct Refused;
        impl From<OverLimit> for Refused {
            fn from(_: OverLimit) -> Refused {
                Refused
            }
        }
        let result: Result<(), Refused> = process.charge(levels(), || {
            // Nobody sees it before it is done.
            assert_eq!(process.charged_pages(), 0);
            Err(Refused)
        });
        assert!(result.is_err());
        assert_eq!((user.charged_pages(), user.peak_pages(), user.failures()), (0, 0, 0));
    }

    #[test]
    fn common_ancestors_are_found_at_any_depth() {
        let root = Account::new("root", None);
        let (left, right) = (root.child("left", None), root.child("right", None));
        let deep = left.child("middle", None).child("deep", None);
        assert_eq!(deep.common_ancestor(&right), Some(&root));
        assert_eq!(right.common_ancestor(&deep), Some(&root));
        assert_eq!(deep.common_ancestor(&left), Some(&left));
        assert_eq!(deep.common_ancestor(&deep), Some(&deep));
        assert_eq!(deep.common_ancestor(&Account::new("root", None)), None);
    }

    /// Registers, drops and moves memory between two users with two processes each, in three threads, while another
    /// one looks at all accounts of a user at once.
    #[test]
    fn sums_and_limits_hold_at_every_moment() {
        const PAGE: u64 = 4096;
        let bus = Bus::new();
        let users = [Account::new("one", Some(40)), Account::new("other", Some(50))];
        let processes: Vec<Account> =
            users.iter().flat_map(|user| [user.child("a", Some(30)), user.child("b", None)]).collect();
        let objects: Vec<_> = (0..3).map(|_| Backing::anonymous(&bus, 32 * PAGE).unwrap()).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3u64)
                .map(|number| {
                    let (processes, objects) = (&processes, &objects);
                    scope.spawn(move || {
                        let mut state = number + 1;
                        let mut random = |below: u64| {
                            state = state
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1_442_695_040_888_963_407);
                            (state >> 33) % below
                        };
                        let mut held: Vec<Arc<Memory>> = Vec::new();
                        for _ in 0..2000 {
                            let account = &processes[random(4) as usize];
                            match random(4) {
                                0 | 1 => {
                                    let (first, object) = (random(24), &objects[random(3) as usize]);
                                    let memory = Memory::register(
                                        object,
                                        first * PAGE,
                                        (1 + random(8)) * PAGE,
                                        account,
                                    );
                                    held.extend(memory);
                                }
                                2 if !held.is_empty() => {
                                    held.swap_remove(random(held.len() as u64) as usize);
                                }
                                _ => {
                                    // Backwards or forwards: the order in which they are named is not that of locks.
                                    let mut all: Vec<&Memory> = held.iter().map(|memory| &**memory).collect();
                                    if random(2) == 0 {
                                        all.reverse();
                                    }
                                    let _ = Memory::transfer_all(&all, account);
                                }
                            }
                        }
                    })
                })
                .collect();
            let watcher = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (user, processes) in users.iter().zip(processes.chunks(2)) {
                        let _tree = user.lock_tree();
                        let parts: Vec<u64> = processes.iter().map(Account::charged_pages).collect();
                        let charged = user.charged_pages();
                        assert!(parts.iter().all(|part| *part <= charged), "{parts:?} of {charged}");
                        assert!(parts.iter().sum::<u64>() >= charged, "{parts:?} of {charged}");
                        for account in processes.iter().chain([user]) {
                            assert!(account.charged_pages() <= account.peak_pages());
                            assert!(account.peak_pages() <= account.limit_pages().unwrap_or(u64::MAX));
                        }
                    }
                }
            });
            for worker in workers {
                worker.join().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            watcher.join().unwrap();
        });
        assert!(users.iter().chain(&processes).all(|account| account.charged_pages() == 0));
        assert!(users.iter().any(|user| user.failures() > 0), "the limits were never reached");
        assert!(objects.iter().all(|object| object.holds(0, 32 * PAGE) == (0..=0)));
    }
}
