//! Registered memory that gets another owner.
//!
//! A VMM hands a guest over to another process, a process of IOMMU_IOAS_CHANGE_PROCESS takes over the address spaces of
//! one that ends: the memory stays registered and mapped, and somebody else is charged for it. That is not a credit
//! and a charge one after the other. In between, the memory would be charged to nobody, or to both, and a user whose
//! two processes pass a guest between them would need a limit for two guests. So only those accounts that the old owner or
//! the new one is below, and not both, take part in it, and nobody sees a moment in between.
//!
//! The books of all objects concerned are locked together. First the registrations change sides in the books, which says
//! what there is to be charged at each level, then the limits are asked; if one of them refuses, the registrations change
//! back, which restores the books.

use super::{Account, OverLimit};
use crate::memory::Memory;
use crate::sync::PoisonError;
use std::ptr;
use std::sync::Arc;

impl Memory {
    /// Who is charged for it.
    pub fn account(&self) -> Account {
        self.payer().lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes `to` pay for this memory in place of the account that does now. All or nothing: if a limit is in the way,
    /// nothing changes.
    ///
    /// Like registering, it is not to be called inside a DMA section or from a call of a
    /// [`DerivedTable`](crate::DerivedTable). Accounts that both are below are charged neither more nor less, not even for a moment.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Memory};
    /// let user = Account::new("user 1000", Some(256));
    /// let (one, other) = (user.child("process 1", None), user.child("process 2", None));
    /// let guest = Memory::register(&Backing::anonymous(&Bus::new(), 1 << 20)?, 0, 1 << 20, &one)?;
    /// guest.transfer(&other)?;
    /// assert_eq!((one.charged_pages(), other.charged_pages(), user.peak_pages()), (0, 256, 256));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn transfer(&self, to: &Account) -> Result<(), OverLimit> {
        Memory::transfer_all(&[self], to)
    }

    /// The same for several memories at once, of any objects and from any accounts: all of them or none.
    pub fn transfer_all(memories: &[&Memory], to: &Account) -> Result<(), OverLimit> {
        // Each once, and in the order in which books are locked.
        let mut memories = memories.to_vec();
        memories.sort_unstable_by_key(|memory| (Arc::as_ptr(memory.backing()), ptr::from_ref(*memory)));
        memories.dedup_by(|one, other| ptr::eq(*one, *other));
        let mut objects: Vec<_> = memories
            .chunk_by(|one, other| Arc::ptr_eq(one.backing(), other.backing()))
            .map(|memories| {
                let backing = memories[0].backing();
                // Until the end nothing grows and nothing is given back.
                (backing.registrations(), memories)
            })
            .collect();

        let mut credits = Vec::new();
        let mut charges: Vec<(&Account, u64)> = to.path().map(|level| (level, 0)).collect();
        let mut owners = Vec::with_capacity(memories.len());
        for (registrations, memories) in &mut objects {
            for memory in *memories {
                let from = memory.account();
                for part in memory.held(&memory.pages()).iter() {
                    registrations.charges().transfer(
                        part.clone(),
                        &from,
                        to,
                        |level, pages| credits.push((level.clone(), pages)),
                        |level, pages| charges[to.level.depth - level.level.depth].1 += pages,
                    );
                }
                owners.push(from);
            }
        }

        let mut trees: Vec<&Account> = owners.iter().chain([to]).collect();
        trees.sort_unstable_by_key(|account| Arc::as_ptr(&account.level.tree));
        trees.dedup_by(|one, other| Arc::ptr_eq(&one.level.tree, &other.level.tree));
        let trees: Vec<_> = trees.into_iter().map(Account::lock_tree).collect();
        let result = charges.iter().try_for_each(|(level, pages)| level.check(*pages));
        if result.is_ok() {
            credits.iter().for_each(|(level, pages)| level.subtract(*pages));
            charges.iter().for_each(|(level, pages)| level.add(*pages));
        }
        drop(trees);

        let mut owners = owners.iter();
        for (registrations, memories) in &mut objects {
            for (memory, from) in memories.iter().zip(&mut owners) {
                if result.is_ok() {
                    *memory.payer().lock().unwrap_or_else(PoisonError::into_inner) = to.clone();
                    registrations.charges().forget(from);
                } else {
                    for part in memory.held(&memory.pages()).iter() {
                        registrations.charges().transfer(part.clone(), to, from, |_, _| (), |_, _| ());
                    }
                    registrations.charges().forget(to);
                }
            }
        }
        result
    }
}
