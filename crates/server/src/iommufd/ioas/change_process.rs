//! Another process pays for everything: IOAS_CHANGE_PROCESS.
//!
//! A program that replaces itself by another (a VMM that is updated, say) hands its open `/dev/iommu` on, with devices
//! that go on working. Its memory would be charged to the first process as long as it is mapped. So the other one asks
//! for it to be charged to itself. That can be done for files only: other memory is the first process's own.
//!
//! All address spaces of the context are locked together, in the order of their numbers; nobody else holds two. So
//! nothing is mapped meanwhile that would be missed, and either all of the memory changes its payer or none.

use std::sync::{Arc, MutexGuard};

use ioasid::Memory;
use rustix::io::Errno;

use super::super::testing::PinnedPiece;
use super::{Ioas, State};
use crate::memory::{Charge, Pages};
use crate::poison::lock;

/// Makes `to` pay for what is mapped in all of `spaces`, in the order of their numbers. What was mapped by a process
/// that may lock memory without limit stays so, for `to_unlimited`.
///
/// # Errors
/// `EINVAL`: something other than a file is mapped. `ENOMEM`: over the limit. Nothing has changed.
pub(crate) fn change_process(spaces: &[Arc<Ioas>], to: &Charge, to_unlimited: &Charge) -> Result<(), Errno> {
    let states: Vec<MutexGuard<'_, State>> = spaces.iter().map(|ioas| lock(&ioas.state)).collect();
    let areas = || states.iter().flat_map(|state| state.areas.iter()).map(|(_, area)| area);
    if !areas().all(|area| area.source.pages.is_file()) {
        return Err(Errno::INVAL);
    }
    // Whatever is pinned is mapped, since an unmap ends the pins; and with the areas locked nobody pins more.
    let pinned: Vec<PinnedPiece> =
        states.iter().flat_map(|state| &state.accesses).flat_map(|access| access.pinned()).collect();
    let registered = |limited: bool| -> Vec<&Memory> {
        let in_tables = areas().filter_map(|area| Some((&area.source.pages, &*area.memory.as_ref()?.memory)));
        let held = in_tables.chain(pinned.iter().map(|piece| (&piece.source.pages, &*piece.memory)));
        held.filter(|(pages, _)| pages.is_limited() == limited).map(|(_, memory)| memory).collect()
    };
    to.take_over(&registered(true))?;
    to_unlimited.take_over(&registered(false))?;
    let change = |pages: &Pages| pages.set_charge(if pages.is_limited() { to } else { to_unlimited });
    areas().for_each(|area| change(&area.source.pages));
    Ok(())
}
