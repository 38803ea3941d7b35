//! Who is charged for what.
//!
//! An [`Account`] stands for whoever pays: a user, a process, a name of the caller's own. Memory is charged when it
//! is registered, before anything is pinned, and each page of an object once per account however many
//! registrations, spaces or aliases hold it; the object's own books ([`Backing`](crate::Backing)) know which pages
//! an account already pays for. The account itself is three counters and a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// No limit.
const UNLIMITED: u64 = u64::MAX;

static ACCOUNTS: AtomicU64 = AtomicU64::new(0);

/// Somebody who is charged for registered memory, in pages of 4 KiB. Clones are the same account.
#[derive(Clone, Debug)]
pub struct Account {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: u64,
    name: String,
    limit: AtomicU64,
    charged: AtomicU64,
    peak: AtomicU64,
    failures: AtomicU64,
}

/// A charge would have gone over the limit. Nothing was charged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages more would take {account} over its limit of {limit} pages ({charged} are charged)")]
pub struct OverLimit {
    /// The name of the account.
    pub account: String,
    /// How many pages were to be charged.
    pub pages: u64,
    /// How many are charged.
    pub charged: u64,
    /// How many may be.
    pub limit: u64,
}

impl Account {
    /// A new account; `None`: no limit.
    pub fn new(name: impl Into<String>, limit_pages: Option<u64>) -> Account {
        Account {
            inner: Arc::new(Inner {
                id: ACCOUNTS.fetch_add(1, Ordering::Relaxed),
                name: name.into(),
                limit: AtomicU64::new(limit_pages.unwrap_or(UNLIMITED)),
                charged: AtomicU64::new(0),
                peak: AtomicU64::new(0),
                failures: AtomicU64::new(0),
            }),
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// How many pages may be charged; `None`: any number.
    pub fn limit_pages(&self) -> Option<u64> {
        let limit = self.inner.limit.load(Ordering::Relaxed);
        (limit != UNLIMITED).then_some(limit)
    }

    /// Changes the limit. What is charged already stays, even if it is more.
    pub fn set_limit(&self, pages: Option<u64>) {
        self.inner.limit.store(pages.unwrap_or(UNLIMITED), Ordering::Relaxed);
    }

    /// How many pages are charged now.
    pub fn charged_pages(&self) -> u64 {
        self.inner.charged.load(Ordering::Relaxed)
    }

    /// The most that were ever charged at once.
    pub fn peak_pages(&self) -> u64 {
        self.inner.peak.load(Ordering::Relaxed)
    }

    /// How many charges the limit has refused.
    pub fn failures(&self) -> u64 {
        self.inner.failures.load(Ordering::Relaxed)
    }

    pub(crate) fn id(&self) -> u64 {
        self.inner.id
    }

    pub(crate) fn charge(&self, pages: u64) -> Result<(), OverLimit> {
        let limit = self.inner.limit.load(Ordering::Relaxed);
        let within = |charged: u64| charged.checked_add(pages).filter(|sum| *sum <= limit);
        match self.inner.charged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
            Ok(before) => {
                self.inner.peak.fetch_max(before + pages, Ordering::Relaxed);
                Ok(())
            }
            // Nothing to charge is never refused, even over a limit that was lowered.
            Err(_) if pages == 0 => Ok(()),
            Err(charged) => {
                self.inner.failures.fetch_add(1, Ordering::Relaxed);
                Err(OverLimit { account: self.inner.name.clone(), pages, charged, limit })
            }
        }
    }

    pub(crate) fn credit(&self, pages: u64) {
        self.inner.charged.fetch_sub(pages, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact_and_refusals_are_counted() {
        let account = Account::new("user 1000", Some(10));
        account.charge(10).unwrap();
        let error = account.charge(1).unwrap_err();
        assert_eq!((error.charged, error.limit, account.failures()), (10, 10, 1));
        account.credit(4);
        account.set_limit(Some(3));
        account.charge(0).unwrap();
        assert!(account.charge(1).is_err());
        assert_eq!((account.charged_pages(), account.peak_pages()), (6, 10));
        assert!(Account::new("x", None).charge(u64::MAX).is_ok());
    }
}
