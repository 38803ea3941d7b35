//! The sequence of the probe, from top to bottom in [`run`].
//!
//! An address space is made and filled before any device is there; then the first device is brought up, tried by itself
//! and attached; then come the transfers, alone and together with a second device; one area goes while its neighbours
//! stay; and everything is taken down in order. Each step says what it needs, so that the rest is still tried when
//! something has failed.
//!
//! What the steps do is beside them: [`space`] maps and attaches, [`device`] brings devices up, [`transfers`] has them
//! copy, [`accounts`] looks at what is mapped and charged.

mod accounts;
mod device;
mod space;
mod transfers;

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::plan::Plan;
use super::report::{Failure, Held, Report, Verdict};
use crate::client::{Edu, Iommufd};
use crate::quantity::Bytes;
use space::{Attachment, Space};
use transfers::Transfers;

/// Tries everything.
pub(super) fn run(report: &mut Report, plan: &Plan, devices: &[PathBuf]) {
    let Some(path) = devices.first() else { return };
    let name = device_name(path);

    let iommu = report.step("open /dev/iommu", space::open);
    let space = report.after(iommu.as_ref(), "allocate an I/O address space", Space::allocate);
    report.after(space.clone(), "IOVA ranges without a device", |space| space.ranges(plan));
    let memory = report.step(format!("reserve {} of private memory", plan.size()), || space::reserve(plan));
    let mapped = report.after(space.clone().and(memory.as_ref()), "map it", |(space, memory)| {
        plan.areas().try_for_each(|area| space.map(memory, area))?;
        Ok(((), format!("{} areas from IOVA {:#x} on", plan.areas().count(), plan.source.iova)))
    });

    let file = report.step(format!("open {name}"), || device::open(path));
    report.after(file.as_ref(), format!("{name} answers nothing before BIND"), |file| {
        refused_with(&file.info(), Errno::INVAL, "GET_INFO")
    });
    let edu = device::bring_up(report, &name, iommu.as_ref(), file);
    report.after(edu.as_ref(), format!("{name} is alive"), device::alive);
    report.after(edu.as_ref(), format!("{name} computes 10!"), device::factorial);

    let attached = report.after(
        space.clone().and(edu.as_ref()).if_also(&mapped),
        format!("attach {name}"),
        |(space, edu)| space.attach_all(edu, plan),
    );
    let attached = match attached {
        Held::Yes(Attachment::OverLimit) => report.after(
            space.clone().and(memory.as_ref()).and(edu.as_ref()),
            format!("attach {name} with less memory"),
            |((space, memory), edu)| space.attach_less(memory, edu, plan),
        ),
        other => other,
    };
    let areas = attached.as_ref().map(|attachment| attachment.areas(plan));
    let used_space = space.clone().if_also(&attached);
    report.after(used_space.clone(), "IOVA ranges with the device", |space| space.ranges(plan));
    report.after(used_space.clone(), "the address space cannot be destroyed meanwhile", |space| {
        refused_with(&space.destroy(), Errno::BUSY, "DESTROY")
    });

    let device = memory.as_ref().and(edu.as_ref()).if_also(&attached);
    let device = device.map(|(memory, edu)| Transfers { memory, edu, plan, name: &name });
    report
        .after(device.clone(), format!("{name} copies {} bytes", Transfers::LENGTH), |device| device.copy());
    report.after(device.clone(), format!("{name} above 4 GiB"), |device| device.above_4_gib());
    report.after(device.clone(), format!("{name} cannot write what is mapped read-only"), |device| {
        device.read_only()
    });

    let second = match devices.get(1) {
        Some(path) => {
            let name = device_name(path);
            let edu = second_device(report, path, &name, iommu.as_ref(), used_space.clone());
            edu.map(|edu| (name, edu))
        }
        None => Held::Absent,
    };
    let second_device = second.as_ref().and(memory.as_ref());
    let second_device = second_device.map(|((name, edu), memory)| Transfers { memory, edu, plan, name });
    report.after(
        device.clone().and(second_device.clone()),
        "both devices see the same bytes",
        |(one, other)| one.relay(&other),
    );

    let look = used_space.clone().and(areas.clone());
    report.after(look.clone(), "what is mapped and charged", |(space, areas)| {
        accounts::mapped_and_charged(path, space.id, &areas)
    });
    report.after(used_space.clone(), "its page tables", |space| accounts::tables(path, space.id));
    report.after(used_space.clone(), "a part of an area cannot be unmapped", |space| {
        space.unmap_inside(plan.doomed)
    });
    let unmapped = report.after(used_space, "unmap one whole area", |space| {
        space.unmap(plan.doomed)?;
        Ok(((), format!("{} at {:#x}", Bytes(plan.doomed.length), plan.doomed.iova)))
    });
    for device in [&device, &second_device] {
        let Held::Yes(Transfers { name, .. }) = device else { continue };
        let device = device.clone().if_also(&unmapped);
        report.after(device.clone(), format!("{name} cannot reach it"), |device| {
            device.cannot_reach(plan.doomed)
        });
        report.after(device, format!("{name} reaches its neighbours"), |device| device.neighbours());
    }
    report.after(look.if_also(&unmapped), "what is mapped and charged now", |(space, mut areas)| {
        areas.retain(|area| *area != plan.doomed);
        accounts::mapped_and_charged(path, space.id, &areas)
    });
    // With its memory in use, only the IOVA can be what keeps devices out.
    let moved = space.clone().and(memory.as_ref()).if_also(&unmapped);
    let moved = report.after(moved, "map its memory elsewhere", |(space, memory)| {
        space.map(memory, plan.moved)?;
        Ok(((), format!("at {:#x}", plan.moved.iova)))
    });
    for device in [&device, &second_device] {
        let Held::Yes(Transfers { name, .. }) = device else { continue };
        report.after(device.clone().if_also(&moved), format!("{name} reaches it there only"), |device| {
            device.reaches_only(plan.moved, plan.doomed)
        });
    }
    report.after(space.clone().if_also(&moved), "its page tables now", |space| {
        accounts::tables(path, space.id)
    });

    let mut quiet = Held::Yes(());
    if let Held::Yes((name, edu)) = &second {
        quiet = report.step(format!("detach {name}"), || device::detach(edu));
    }
    let detached = report.after(edu.as_ref().if_also(&attached), format!("detach {name}"), device::detach);
    report.after(device.if_also(&detached), format!("{name} reaches nothing"), |device| {
        device.cannot_reach(plan.source)
    });
    report.after(space.clone().if_also(&quiet).if_also(&detached), "destroy the address space", |space| {
        space.destroy().map_err(unexpected("success"))?;
        Ok(((), String::new()))
    });
    let number = space.map(|space| space.id);
    let closed = report.after(iommu.and(edu), "close everything", |files| {
        drop((files, second));
        Ok(((), String::new()))
    });
    report.after(number.if_also(&closed), "nothing is left", |number| accounts::nothing_left(path, number));
}

/// Brings up a device that need not be there, and attaches it to a space that has one already.
fn second_device(
    report: &mut Report,
    path: &Path,
    name: &str,
    iommu: Held<&Iommufd>,
    space: Held<Space<'_>>,
) -> Held<Edu> {
    let file = report.step(format!("open {name}"), || device::open_if_there(path));
    let edu = device::bring_up(report, name, iommu, file);
    report.after(space.and(edu), format!("attach {name} to the same space"), |(space, edu)| {
        let table = edu.file().attach(space.id).map_err(unexpected("a page table"))?;
        Ok((edu, format!("page table number {table}")))
    })
}

/// The last component of a path.
fn device_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// When nothing better is known.
const LOOK_DEEPER: &str = "run again with `ioasid -vv run` to see the calls; on a kernel, see `dmesg`";

/// Turns an error into a failure of a step that expected something else.
fn unexpected<E: ToString>(expected: &str) -> impl FnOnce(E) -> Failure {
    let expected = expected.to_owned();
    move |error| Failure::new(expected, error.to_string(), LOOK_DEEPER)
}

/// A call that has to fail in one way.
fn refused_with<T>(result: &Result<T, Errno>, expected: Errno, call: &str) -> Verdict<()> {
    let wanted = || format!("{call}: {}", errno_name(expected));
    match result {
        Err(errno) if *errno == expected => Ok(((), errno_name(expected).to_owned())),
        Err(other) => Err(Failure::new(wanted(), other.to_string(), LOOK_DEEPER).into()),
        Ok(_) => Err(Failure::new(wanted(), "success", LOOK_DEEPER).into()),
    }
}

/// The names of those errors that are expected.
fn errno_name(errno: Errno) -> &'static str {
    match errno {
        Errno::INVAL => "EINVAL",
        Errno::BUSY => "EBUSY",
        Errno::NOENT => "ENOENT",
        _ => "an error",
    }
}
