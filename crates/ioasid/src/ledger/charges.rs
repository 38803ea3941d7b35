//! Which pages of one object each account pays for.
//!
//! Every level of the tree of accounts has a step function ([`Coverage`]) for each object: how many registrations at
//! and below that level hold each page. A page is charged to a level while its count there is not 0. So two processes
//! of one user that register the same page are charged once each, and their user once; and in whatever order they
//! let go, a level is credited when its own count comes to 0. Above all accounts stands *everyone*, whose function says
//! how many registrations there are of each page at all.
//!
//! # Sums
//!
//! Often all that is registered below a level is registered below one of its children: one process of a user maps a
//! file, one user has anything to do with an object. The two functions are the same then, and are kept once. A [`Sum`]
//! is the function of a line of levels, the lowest of which was charged itself or has several children that are; it
//! becomes two when somebody comes in between. So registering costs as many changes as there are different functions
//! on the way up, and most often that is one.
//!
//! Nothing here refers to an account but by its number: an account lives as long as somebody holds it, its memory, or
//! an account below it.

use super::Account;
use super::coverage::Coverage;
use std::collections::BTreeMap;
use std::ops::Range;

/// The number of the level above all accounts. No account has it.
const EVERYONE: u64 = 0;

/// The books of one object.
#[derive(Debug, Default)]
pub(crate) struct Charges {
    /// Which sum is that of a level, by the level's number. No entry: nothing is registered there or below.
    levels: BTreeMap<u64, usize>,
    sums: Vec<Sum>,
    /// Places in `sums` that are not in use.
    vacant: Vec<usize>,
}

/// How many registrations a line of levels has of each page.
#[derive(Debug, Default)]
struct Sum {
    coverage: Coverage,
    /// The number of the lowest level of the line.
    lowest: u64,
    /// How many levels the line has.
    levels: usize,
    /// The sum of the level above the line; `None` above everyone.
    above: Option<usize>,
    /// How many pages became or ceased to be charged in the last change.
    changed: u64,
}

/// Goes from an account upwards; see [`Charges::changed`].
#[derive(Clone)]
pub(crate) struct Changed<'a> {
    charges: &'a Charges,
    level: Option<&'a Account>,
    sum: Option<&'a Sum>,
    /// How many levels the sum has from `level` on.
    left: usize,
}

impl<'a> Iterator for Changed<'a> {
    type Item = (&'a Account, u64);

    #[inline]
    fn next(&mut self) -> Option<(&'a Account, u64)> {
        if self.left == 0 {
            self.sum = self.charges.sums.get(self.sum?.above?);
            self.left = self.sum?.levels;
        }
        self.left -= 1;
        let level = self.level?;
        self.level = level.parent();
        Some((level, self.sum?.changed))
    }
}

impl Charges {
    /// Adds a registration for `account` and all levels above it. [`changed`](Self::changed) says what is to be
    /// charged for that.
    pub(crate) fn hold(&mut self, pages: Range<u64>, account: &Account) {
        let lowest = self.sum_of(account);
        self.change(lowest, None, |coverage| coverage.hold(pages.clone()));
    }

    /// Takes a registration back. [`changed`](Self::changed) says what is to be credited; then the account is to be
    /// [forgotten](Self::forget).
    pub(crate) fn release(&mut self, pages: Range<u64>, account: &Account) {
        if let Some(&lowest) = self.levels.get(&account.id()) {
            self.change(lowest, None, |coverage| coverage.release(pages.clone()));
        }
    }

    /// How many pages the last change made a difference of to the account and to each level above.
    pub(crate) fn changed<'a>(&'a self, account: &'a Account) -> Changed<'a> {
        let sum = self.levels.get(&account.id()).and_then(|place| self.sums.get(*place));
        Changed { charges: self, level: Some(account), sum, left: sum.map_or(0, |sum| sum.levels) }
    }

    /// Moves a registration from one account to another. What `from` and the levels above it are to be credited and
    /// `to` and those above it are to be charged is told to `credit` and `charge`; levels above both are
    /// neither. Both accounts are to be [forgotten](Self::forget) when the move is final.
    pub(crate) fn transfer(
        &mut self,
        pages: Range<u64>,
        from: &Account,
        to: &Account,
        mut credit: impl FnMut(&Account, u64),
        mut charge: impl FnMut(&Account, u64),
    ) {
        if from == to {
            return;
        }
        let target = self.sum_of(to);
        let Some(&source) = self.levels.get(&from.id()) else { return };
        // Where the two ways up meet there are two ways down, so a sum begins there.
        let meeting = from.common_ancestor(to).map_or(EVERYONE, Account::id);
        let common = self.levels.get(&meeting).copied();
        self.change(target, common, |coverage| coverage.hold(pages.clone()));
        self.change(source, common, |coverage| coverage.release(pages.clone()));
        let below = |(level, _): &(&Account, u64)| level.id() != meeting;
        self.changed(to).take_while(below).for_each(|(level, pages)| charge(level, pages));
        self.changed(from).take_while(below).for_each(|(level, pages)| credit(level, pages));
    }

    /// Forgets those levels from the account upwards that have nothing registered any more.
    pub(crate) fn forget(&mut self, account: &Account) {
        let mut path = account.path().map(Account::id).chain([EVERYONE]).peekable();
        // Not from sum to sum: if several accounts have just lost what they had, those above them may be forgotten
        // already.
        while let Some((level, &place)) =
            path.peek().and_then(|level| Some((*level, self.levels.get(level)?)))
        {
            let sum = &mut self.sums[place];
            if !sum.coverage.is_empty() || sum.lowest != level {
                return;
            }
            while let Some(level) = path.next_if(|level| self.levels.get(level) == Some(&place)) {
                self.levels.remove(&level);
            }
            *sum = Sum::default();
            self.vacant.push(place);
        }
    }

    /// Those of the pages that one registration alone holds, and the others.
    pub(crate) fn held_once(&self, pages: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        match self.everyone() {
            Some(coverage) => coverage.divide(pages, 1),
            None => (Vec::new(), vec![pages]),
        }
    }

    /// The fewest and the most registrations that a page of these has.
    pub(crate) fn least_and_most(&self, pages: Range<u64>) -> (u64, u64) {
        self.everyone().map_or((0, 0), |coverage| coverage.least_and_most(pages))
    }

    /// Whether nothing is registered.
    pub(crate) fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    fn everyone(&self) -> Option<&Coverage> {
        self.levels.get(&EVERYONE).and_then(|place| self.sums.get(*place)).map(|sum| &sum.coverage)
    }

    /// Changes the sums from one upwards, up to another one if it is given.
    fn change(&mut self, lowest: usize, end: Option<usize>, change: impl Fn(&mut Coverage) -> u64) {
        let mut next = Some(lowest);
        while next != end {
            let Some(sum) = next.and_then(|place| self.sums.get_mut(place)) else { return };
            sum.changed = change(&mut sum.coverage);
            next = sum.above;
        }
    }

    /// The sum of which the account is the lowest level, made if there is none.
    fn sum_of(&mut self, account: &Account) -> usize {
        let id = account.id();
        if let Some(&place) = self.levels.get(&id) {
            if self.sums[place].lowest == id {
                return place;
            }
        }
        let mut path = account.path().map(Account::id).chain([EVERYONE]);
        let mut new = Vec::new();
        let mut above = None;
        while let Some(level) = path.next() {
            match self.levels.get(&level) {
                None => new.push(level),
                Some(&place) if self.sums[place].lowest == level => {
                    above = Some(place);
                    break;
                }
                Some(&place) => {
                    // All that is registered below this level was registered below one child until now.
                    let moving = |level: &u64| self.levels.get(level) == Some(&place);
                    let moving = std::iter::once(level).chain(path.take_while(moving)).collect();
                    above = Some(self.divide(place, moving));
                    break;
                }
            }
        }
        if new.is_empty() {
            return above.unwrap_or_default();
        }
        // The levels that have nothing registered yet are a line below the others.
        let place = self.add(Sum { lowest: id, levels: new.len(), above, ..Sum::default() });
        self.levels.extend(new.into_iter().map(|level| (level, place)));
        place
    }

    /// Gives the upper levels of a line, which are named lowest first, a sum of their own.
    fn divide(&mut self, place: usize, moving: Vec<u64>) -> usize {
        let sum = &mut self.sums[place];
        sum.levels -= moving.len();
        let upper = Sum {
            coverage: sum.coverage.clone(),
            lowest: moving.first().copied().unwrap_or(EVERYONE),
            levels: moving.len(),
            above: sum.above,
            changed: 0,
        };
        let upper = self.add(upper);
        self.sums[place].above = Some(upper);
        self.levels.extend(moving.into_iter().map(|level| (level, upper)));
        upper
    }

    fn add(&mut self, sum: Sum) -> usize {
        match self.vacant.pop() {
            Some(place) => {
                self.sums[place] = sum;
                place
            }
            None => {
                self.sums.push(sum);
                self.sums.len() - 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Charges {
        /// How many intervals are kept in all sums.
        fn intervals(&self) -> usize {
            self.sums.iter().map(|sum| sum.coverage.intervals()).sum()
        }

        fn sums(&self) -> usize {
            self.sums.len() - self.vacant.len()
        }
    }

    fn amounts(charges: &Charges, account: &Account) -> Vec<u64> {
        charges.changed(account).map(|(_, pages)| pages).collect()
    }

    /// 2^28 pages of 4 KiB.
    const TEBIBYTE: Range<u64> = 0..1 << 28;

    #[test]
    fn a_tebibyte_is_two_intervals_however_deep_the_account() {
        let mut charges = Charges::default();
        let mut account = Account::new("root", None);
        for _ in 0..9 {
            account = account.child("child", None);
        }
        charges.hold(TEBIBYTE, &account);
        assert_eq!(amounts(&charges, &account), [1 << 28; 10]);
        assert_eq!((charges.intervals(), charges.sums(), charges.levels.len()), (2, 1, 11));
        // The same again, and again: the counts are larger and no more of them.
        for _ in 0..5 {
            charges.hold(TEBIBYTE, &account);
            assert_eq!(amounts(&charges, &account), [0; 10]);
        }
        assert_eq!((charges.intervals(), charges.least_and_most(TEBIBYTE)), (2, (6, 6)));
        for _ in 0..6 {
            charges.release(TEBIBYTE, &account);
        }
        charges.forget(&account);
        assert!(charges.is_empty() && charges.sums() == 0);
    }

    #[test]
    fn levels_share_a_sum_until_somebody_comes_in_between() {
        let mut charges = Charges::default();
        let user = Account::new("user", None);
        let group = user.child("group", None);
        let (one, other) = (group.child("one", None), group.child("other", None));
        charges.hold(0..8, &one);
        assert_eq!(charges.sums(), 1);
        charges.hold(4..12, &other);
        assert_eq!((charges.sums(), amounts(&charges, &other)), (3, vec![8, 4, 4]));
        // Straight to a level in the middle of a line, which has what is below it.
        charges.hold(0..16, &user);
        assert_eq!((charges.sums(), amounts(&charges, &user)), (4, vec![4]));
        let stranger = Account::new("stranger", None);
        charges.hold(0..4, &stranger);
        assert_eq!((charges.sums(), amounts(&charges, &stranger)), (6, vec![4]));
        assert_eq!(charges.least_and_most(0..16), (1, 3));

        charges.release(0..16, &user);
        assert_eq!(amounts(&charges, &user), [4]);
        charges.forget(&user);
        for (account, pages, amount) in [(&one, 0..8, vec![8, 4, 4]), (&other, 4..12, vec![8, 8, 8])] {
            charges.release(pages, account);
            assert_eq!(amounts(&charges, account), amount);
            charges.forget(account);
        }
        assert_eq!(charges.sums(), 2);
        charges.release(0..4, &stranger);
        charges.forget(&stranger);
        assert!(charges.is_empty() && charges.sums() == 0);
        // Accounts come and go, and their places are used again.
        for number in 0..100 {
            let process = user.child(format!("process {number}"), None);
            charges.hold(0..8, &process);
            charges.release(0..8, &process);
            charges.forget(&process);
        }
        assert!(charges.sums.len() <= 6);
    }

    #[test]
    fn a_transfer_leaves_the_levels_above_both_alone() {
        let mut charges = Charges::default();
        let user = Account::new("user", None);
        let (one, other) = (user.child("one", None), user.child("other", None));
        let thread = one.child("thread", None);
        charges.hold(0..8, &one);
        let transfer = |charges: &mut Charges, from: &Account, to: &Account| {
            let (mut credits, mut debits) = (Vec::new(), Vec::new());
            let note = |list: &mut Vec<(String, u64)>, level: &Account, pages| {
                list.push((level.name().into(), pages));
            };
            charges.transfer(
                0..8,
                from,
                to,
                |level, pages| note(&mut credits, level, pages),
                |level, pages| note(&mut debits, level, pages),
            );
            charges.forget(from);
            charges.forget(to);
            (credits, debits)
        };
        let list = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), 8)).collect::<Vec<_>>();
        assert_eq!(transfer(&mut charges, &one, &other), (list(&["one"]), list(&["other"])));
        assert_eq!(transfer(&mut charges, &other, &thread), (list(&["other"]), list(&["thread", "one"])));
        assert_eq!(transfer(&mut charges, &thread, &user), (list(&["thread", "one"]), list(&[])));
        assert_eq!(transfer(&mut charges, &user, &user), (list(&[]), list(&[])));
        let stranger = Account::new("stranger", None);
        assert_eq!(transfer(&mut charges, &user, &stranger), (list(&["user"]), list(&["stranger"])));
        assert_eq!(charges.least_and_most(0..8), (1, 1));
        charges.release(0..8, &stranger);
        charges.forget(&stranger);
        assert!(charges.is_empty() && charges.sums() == 0);
    }
}
