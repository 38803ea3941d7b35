//! What is mapped and charged has to be what the plan says.

use std::path::Path;

use super::super::plan::Area;
use super::super::report::{Failure, Stop, Verdict};
use super::super::status::{self, Known};
use super::{LOOK_DEEPER, unexpected};
use crate::quantity::Bytes;

const PAGE: u64 = 4096;
const SEE: &str = "see /dev/ioasid";

/// The space of a bound device has these areas, and all of their memory is charged.
pub(super) fn mapped_and_charged(device: &Path, space: u32, areas: &[Area]) -> Verdict<()> {
    let bytes: u64 = areas.iter().map(|area| area.length).sum();
    let machine = match status::ask().map_err(unexpected("an answer"))? {
        Known::Server(machine) => machine,
        Known::Kernel(pinned) if pinned.0.0 >= bytes => return Ok(((), pinned.to_string())),
        Known::Kernel(pinned) => {
            let expected = format!("{} or more pinned", Bytes(bytes));
            return Err(Failure::new(expected, pinned.to_string(), LOOK_DEEPER).into());
        }
    };
    let wanted = || format!("{} areas, {}, all of it charged", areas.len(), Bytes(bytes));
    let Some(found) = machine.address_space(&device.to_string_lossy(), space) else {
        return Err(Failure::new(wanted(), "the address space is not listed", SEE).into());
    };
    let same = found.area_count == areas.len() as u64 && found.mapped_bytes == bytes;
    // Other programs may be charged too.
    if !same || machine.charged_pages() < bytes / PAGE {
        let (count, mapped) = (found.area_count, Bytes(found.mapped_bytes));
        return Err(
            Failure::new(wanted(), format!("{count} areas, {mapped}; {}", machine.charges()), SEE).into()
        );
    }
    Ok(((), format!("{} areas, {}; {}", areas.len(), Bytes(bytes), machine.charges())))
}

/// The leaves of the space's own table cover what is mapped, no more and no less.
pub(super) fn tables(device: &Path, space: u32) -> Verdict<()> {
    let machine = match status::ask().map_err(unexpected("an answer"))? {
        Known::Server(machine) => machine,
        Known::Kernel(_) => return Err(Stop::Absent("a kernel does not tell".to_owned())),
    };
    let found = machine.address_space(&device.to_string_lossy(), space);
    let found = found.ok_or_else(|| Failure::new("the address space", "it is not listed", SEE))?;
    if found.leaf_bytes() != found.mapped_bytes {
        let expected = format!("leaves for {}", Bytes(found.mapped_bytes));
        return Err(Failure::new(expected, Bytes(found.leaf_bytes()).to_string(), SEE).into());
    }
    Ok(((), found.tables()))
}

/// After everything was closed, the device is not ours any more.
pub(super) fn nothing_left(device: &Path, space: u32) -> Verdict<()> {
    match status::ask().map_err(unexpected("an answer"))? {
        Known::Kernel(pinned) if pinned.0.0 == 0 => Ok(((), pinned.to_string())),
        Known::Kernel(pinned) => Err(Failure::new("nothing pinned", pinned.to_string(), LOOK_DEEPER).into()),
        Known::Server(machine) if machine.address_space(&device.to_string_lossy(), space).is_some() => {
            let advice = "another program may have bound the device at once; otherwise see /dev/ioasid";
            Err(Failure::new("no address space of the device", "there still is one", advice).into())
        }
        Known::Server(machine) => Ok(((), machine.charges())),
    }
}
