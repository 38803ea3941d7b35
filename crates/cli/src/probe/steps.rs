//! The sequence of the probe.
//!
//! An address space is made and filled before any device is there; then the first device is brought up, tried by itself
//! and attached; then come the transfers (see [`transfers`]), alone and together with a second device; one area goes
//! while its neighbours stay; and everything is taken down in order. Each step says what it needs, so that the rest is
//! still tried when something has failed.

mod transfers;

use std::path::{Path, PathBuf};

use ioasid_soft::edu::spec;
use ioasid_uapi::iommufd::IovaRange;
use ioasid_uapi::pci;
use ioasid_uapi::vfio::{DeviceFlags, PCI_BAR0_REGION_INDEX, PCI_CONFIG_REGION_INDEX};
use rustix::io::Errno;

use super::plan::{ALIGNMENT, Area, Plan};
use super::report::{Failure, Held, Report, Stop, Verdict};
use super::status::{self, Known};
use crate::client::{DmaMemory, Edu, Iommufd, VfioDevice};
use crate::quantity::Bytes;
use transfers::Transfers;

/// An address space of an open `/dev/iommu`.
#[derive(Debug, Clone, Copy)]
struct Space<'probe> {
    iommu: &'probe Iommufd,
    id: u32,
}

/// What is mapped behind the first device.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Attached {
    /// All areas of the plan.
    Whole,
    /// So much may not be locked: the device is not attached yet.
    OverLimit,
    /// The near areas and one small far one.
    Reduced,
}

/// Tries everything.
pub(super) fn run(report: &mut Report, plan: &Plan, devices: &[PathBuf]) {
    let Some(first_path) = devices.first() else { return };
    let iommu = report.step("open /dev/iommu", open_iommu);
    let space = report.after(iommu.as_ref(), "allocate an I/O address space", |iommu| {
        let id = iommu.alloc().map_err(refused("a number"))?;
        Ok((Space { iommu, id }, format!("number {id}")))
    });
    report.after(space.as_ref(), "IOVA ranges without a device", |space| ranges(*space, plan));
    let memory = report.step(format!("reserve {} of private memory", plan.size()), || reserve(plan));
    let mapped = report.after(space.as_ref().and(memory.as_ref()), "map it", |(space, memory)| {
        for area in plan.areas() {
            map(*space, memory, area)?;
        }
        Ok(((), format!("{} areas from IOVA {:#x} on", plan.areas().count(), plan.source.iova)))
    });

    let first_name = name(first_path);
    let file = report.step(format!("open {first_name}"), || open_device(first_path));
    report.after(file.as_ref(), format!("{first_name} answers nothing before BIND"), |file| {
        expect_errno(&file.info(), Errno::INVAL, "GET_INFO")
    });
    let first = bring_up(report, &first_name, iommu.as_ref(), file);
    report.after(first.as_ref(), format!("{first_name} is alive"), alive);
    report.after(first.as_ref(), format!("{first_name} computes 10!"), factorial);
    let attached = report.after(
        space.as_ref().and(first.as_ref()).if_also(&mapped),
        format!("attach {first_name}"),
        |(space, edu)| attach(*space, edu, plan),
    );
    let attached = match attached {
        Held::Yes(Attached::OverLimit) => report.after(
            space.as_ref().and(memory.as_ref()).and(first.as_ref()),
            format!("attach {first_name} with less memory"),
            |((space, memory), edu)| attach_reduced(*space, memory, edu, plan),
        ),
        other => other,
    };
    report.after(space.as_ref().if_also(&attached), "IOVA ranges with the device", |space| {
        ranges(*space, plan)
    });
    report.after(
        space.as_ref().if_also(&attached),
        "the address space cannot be destroyed meanwhile",
        |space| expect_errno(&space.iommu.destroy(space.id), Errno::BUSY, "DESTROY"),
    );

    let transfers = memory.as_ref().and(first.as_ref()).if_also(&attached);
    let transfers = transfers.map(|(memory, edu)| Transfers { memory, edu, plan, name: &first_name });
    report.after(
        transfers.as_ref(),
        format!("{first_name} copies {} bytes", Transfers::LENGTH),
        Transfers::copy,
    );
    report.after(transfers.as_ref(), format!("{first_name} above 4 GiB"), Transfers::above_4_gib);
    report.after(
        transfers.as_ref(),
        format!("{first_name} cannot write what is mapped read-only"),
        |transfers| transfers.read_only(),
    );

    let second =
        devices.get(1).map(|path| (name(path), second_device(report, path, &iommu, &space, &attached)));
    let second_transfers = second.as_ref().map(|(name, edu)| {
        memory.as_ref().and(edu.as_ref()).map(|(memory, edu)| Transfers { memory, edu, plan, name })
    });
    if let Some(second) = &second_transfers {
        let both = transfers.as_ref().and(second.as_ref());
        report.after(both, "both devices see the same bytes", |(first, second)| first.relay(second));
    }

    let areas = match &attached {
        Held::Yes(Attached::Reduced) => 5,
        _ => plan.areas().count() as u64,
    };
    let charged =
        |gone: u64| Mapped { device: first_path, areas: areas - gone, bytes: plan, reduced: areas == 5 };
    report.after(space.as_ref().if_also(&attached), "what is mapped and charged", |space| {
        mapped_and_charged(*space, &charged(0))
    });
    report.after(space.as_ref().if_also(&attached), "its page tables", |space| tables(*space, first_path));
    report.after(space.as_ref().if_also(&attached), "a part of an area cannot be unmapped", |space| {
        let inside = space.iommu.unmap(space.id, plan.doomed.iova + 4096, 4096);
        expect_errno(&inside, Errno::NOENT, "UNMAP")
    });
    let unmapped = report.after(space.as_ref().if_also(&attached), "unmap one whole area", |space| {
        unmap(*space, plan.doomed)?;
        Ok(((), format!("{} at {:#x}", Bytes(plan.doomed.length), plan.doomed.iova)))
    });
    for transfers in std::iter::once(&transfers).chain(&second_transfers) {
        if let Held::Yes(Transfers { name, .. }) = transfers {
            report.after(
                transfers.as_ref().if_also(&unmapped),
                format!("{name} cannot reach it"),
                |transfers| transfers.cannot_reach(plan.doomed),
            );
            report.after(
                transfers.as_ref().if_also(&unmapped),
                format!("{name} reaches its neighbours"),
                |transfers| transfers.neighbours(),
            );
        }
    }
    report.after(space.as_ref().if_also(&unmapped), "what is mapped and charged now", |space| {
        mapped_and_charged(*space, &charged(1))
    });

    let mut detached = Held::Yes(());
    if let Some((name, Held::Yes(edu))) = &second {
        detached = report.step(format!("detach {name}"), || detach(edu));
    }
    let first_detached =
        report.after(first.as_ref().if_also(&attached), format!("detach {first_name}"), detach);
    detached = detached.if_also(&first_detached);
    report.after(
        transfers.as_ref().if_also(&first_detached),
        format!("{first_name} reaches nothing"),
        |transfers| transfers.cannot_reach(plan.source),
    );
    report.after(space.as_ref().if_also(&detached), "destroy the address space", |space| {
        space.iommu.destroy(space.id).map_err(refused("success"))?;
        Ok(((), String::new()))
    });
    let space_number = space.map(|space| space.id);
    let closed = report.after(iommu.and(first), "close everything", |files| {
        drop(files);
        drop(second);
        Ok(((), String::new()))
    });
    report.after(space_number.if_also(&closed), "nothing is left", |id| nothing_left(first_path, id));
}

/// The last component of a path.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Turns an error into a failure of a step that expected something else.
fn refused<E: ToString>(expected: &str) -> impl FnOnce(E) -> Failure {
    let expected = expected.to_owned();
    move |error| Failure::new(expected, error.to_string(), REPORT_IT)
}

/// When nothing better is known.
const REPORT_IT: &str = "run again with `ioasid -vv run` to see the calls; on a kernel, see `dmesg`";

/// A call that has to fail in one way.
fn expect_errno<T>(result: &Result<T, Errno>, expected: Errno, call: &str) -> Verdict<()> {
    let wanted = || format!("{call}: {}", errno_name(expected));
    match result {
        Err(errno) if *errno == expected => Ok(((), errno_name(expected).to_owned())),
        Err(other) => Err(Failure::new(wanted(), other.to_string(), REPORT_IT).into()),
        Ok(_) => Err(Failure::new(wanted(), "success", REPORT_IT).into()),
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

/// What to do when a device or `/dev/iommu` cannot be opened.
fn open_advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            "start this under `ioasid run`, or on a kernel with iommufd and VFIO and a device bound to vfio-pci"
        }
        std::io::ErrorKind::PermissionDenied => "on a kernel: become the owner of the file, or root",
        _ => REPORT_IT,
    }
}

fn open_iommu() -> Verdict<Iommufd> {
    let opened = Iommufd::open();
    let iommu =
        opened.map_err(|error| Failure::new("an open file", error.to_string(), open_advice(&error)))?;
    Ok((iommu, String::new()))
}

fn open_device(path: &Path) -> Verdict<VfioDevice> {
    let opened = VfioDevice::open(path);
    let device =
        opened.map_err(|error| Failure::new("an open file", error.to_string(), open_advice(&error)))?;
    Ok((device, String::new()))
}

fn ranges(space: Space<'_>, plan: &Plan) -> Verdict<()> {
    let ranges = space.iommu.ranges(space.id).map_err(refused("ranges"))?;
    for area in plan.areas() {
        let holds = |range: &IovaRange| range.start <= area.iova && area.last() <= range.last;
        if !ranges.allowed.iter().any(holds) {
            let wanted = format!("{:#x} to {:#x} within a range", area.iova, area.last());
            let advice = "another device reserves these IOVAs, or the IOMMU has fewer address bits; try a smaller --size";
            return Err(Failure::new(wanted, shown(&ranges.allowed), advice).into());
        }
    }
    Ok(((), format!("{} (alignment {})", shown(&ranges.allowed), ranges.alignment)))
}

fn shown(ranges: &[IovaRange]) -> String {
    let shown: Vec<_> = ranges.iter().map(|range| format!("{:#x}-{:#x}", range.start, range.last)).collect();
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}

fn reserve(plan: &Plan) -> Verdict<DmaMemory> {
    let reserved = usize::try_from(plan.size().0).map_err(|_| Errno::NOMEM);
    let memory = reserved.and_then(|size| DmaMemory::reserve(size, ALIGNMENT)).map_err(|errno| {
        Failure::new(
            "memory",
            errno.to_string(),
            "try a smaller --size, or raise the limit on address space (ulimit -v)",
        )
    })?;
    Ok((memory, "touched only where it is used".to_owned()))
}

fn map(space: Space<'_>, memory: &DmaMemory, area: Area) -> Result<(), Failure> {
    let Area { offset, iova, length, access } = area;
    space.iommu.map(space.id, memory, offset, length, iova, access).map_err(|errno| {
        Failure::new(
            format!("{} mapped at {iova:#x}", Bytes(length)),
            errno.to_string(),
            "try a smaller --size",
        )
    })
}

fn unmap(space: Space<'_>, area: Area) -> Result<(), Failure> {
    let expected = || format!("{} bytes unmapped", area.length);
    match space.iommu.unmap(space.id, area.iova, area.length) {
        Ok(length) if length == area.length => Ok(()),
        Ok(length) => Err(Failure::new(expected(), format!("{length} bytes"), REPORT_IT)),
        Err(errno) => Err(Failure::new(expected(), errno.to_string(), REPORT_IT)),
    }
}

/// Binds, and makes sure that it is the device that the rest drives.
fn bring_up(report: &mut Report, name: &str, iommu: Held<&Iommufd>, file: Held<VfioDevice>) -> Held<Edu> {
    let bound = report.after(iommu.and(file), format!("bind {name}"), |(iommu, file)| bind(iommu, file));
    let edu = report.after(bound, format!("{name} is an edu device"), identify);
    report.after(edu, format!("{name} may do DMA"), |edu| {
        let command = edu.file().enable_bus_master().map_err(refused("the bus master bit set"))?;
        if command.contains(pci::Command::BUS_MASTER) {
            Ok((edu, format!("command register {:#06x}", command.bits())))
        } else {
            Err(Failure::new("the bus master bit set", format!("{:#06x}", command.bits()), REPORT_IT).into())
        }
    })
}

fn bind(iommu: &Iommufd, file: VfioDevice) -> Verdict<VfioDevice> {
    let id = file.bind(iommu).map_err(|errno| {
        let advice = match errno {
            Errno::INVAL => {
                "another program has bound the device: wait for its end, or name another one (--device)"
            }
            _ => REPORT_IT,
        };
        Failure::new("a device number", errno.to_string(), advice)
    })?;
    Ok((file, format!("object number {id}")))
}

/// Reads the ids in configuration space, the regions, and the device's own word.
fn identify(file: VfioDevice) -> Verdict<Edu> {
    const ADVICE: &str = "name the file of an edu device (--device)";
    let info = file.info().map_err(refused("GET_INFO"))?;
    let config = file.region(PCI_CONFIG_REGION_INDEX).map_err(refused("a configuration space"))?;
    let bar = file.region(PCI_BAR0_REGION_INDEX).map_err(refused("BAR 0"))?;
    let (vendor, device) = file.pci_ids().map_err(refused("PCI ids"))?;
    if info.flags & DeviceFlags::PCI.bits() == 0 || (vendor, device) != (spec::VENDOR_ID, spec::DEVICE_ID) {
        let expected = format!("a PCI device {:04x}:{:04x}", spec::VENDOR_ID, spec::DEVICE_ID);
        let found = format!("flags {:#x}, {vendor:04x}:{device:04x}", info.flags);
        return Err(Failure::new(expected, found, ADVICE).into());
    }
    if bar.size != u64::from(spec::BAR_SIZE) || config.size < pci::CONFIG_SPACE_SIZE as u64 {
        let expected = format!("BAR 0 of {}, configuration space of 256 bytes", Bytes(spec::BAR_SIZE.into()));
        let found = format!("{} and {}", Bytes(bar.size), Bytes(config.size));
        return Err(Failure::new(expected, found, ADVICE).into());
    }
    let edu = Edu::new(file).map_err(refused("registers"))?;
    let identification = edu.identification().map_err(refused("the identification register"))?;
    if identification != spec::IDENTIFICATION_VALUE {
        let expected = format!("identification {:#010x}", spec::IDENTIFICATION_VALUE);
        return Err(Failure::new(expected, format!("{identification:#010x}"), ADVICE).into());
    }
    let found = format!(
        "{vendor:04x}:{device:04x}, identification {identification:#010x}, BAR 0 at {:#x}",
        bar.offset
    );
    Ok((edu, found))
}

fn alive(edu: &Edu) -> Verdict<()> {
    for value in [0, 0x1234_5678, u32::MAX] {
        let answer = edu.invert(value).map_err(refused("an answer"))?;
        if answer != !value {
            let expected = format!("{:#010x} for {value:#010x}", !value);
            return Err(Failure::new(expected, format!("{answer:#010x}"), REPORT_IT).into());
        }
    }
    Ok(((), "it inverts what is written".to_owned()))
}

fn factorial(edu: &Edu) -> Verdict<()> {
    let result = edu.factorial(10).map_err(refused("3628800"))?;
    if result == 3_628_800 {
        Ok(((), result.to_string()))
    } else {
        Err(Failure::new("3628800", result.to_string(), REPORT_IT).into())
    }
}

/// Attaches, unless so much memory may not be locked.
fn attach(space: Space<'_>, edu: &Edu, plan: &Plan) -> Verdict<Attached> {
    match (edu.file().attach(space.id), plan.lock_limit) {
        (Ok(table), _) => Ok((Attached::Whole, format!("page table number {table}"))),
        (Err(Errno::NOMEM), Some(limit)) if limit < plan.size() => {
            let found =
                format!("refused rightly: {} is over this user's {limit} of locked memory", plan.size());
            Ok((Attached::OverLimit, found))
        }
        (Err(errno), _) => {
            let advice = match errno {
                Errno::NOMEM => {
                    "other processes of this user have memory locked, or there is too little; try a smaller --size"
                }
                _ => REPORT_IT,
            };
            Err(Failure::new("a page table", errno.to_string(), advice).into())
        }
    }
}

/// Attaches with what may be locked.
fn attach_reduced(space: Space<'_>, memory: &DmaMemory, edu: &Edu, plan: &Plan) -> Verdict<Attached> {
    for area in plan.far {
        unmap(space, area)?;
    }
    map(space, memory, plan.small_far)?;
    let table = edu.file().attach(space.id).map_err(|errno| {
        Failure::new("a page table", errno.to_string(), "raise the limit on locked memory (ulimit -l)")
    })?;
    let left = Bytes(plan.near().iter().map(|area| area.length).sum::<u64>() + plan.small_far.length);
    Ok((Attached::Reduced, format!("{left}, page table number {table} (raise `ulimit -l` for all of it)")))
}

fn second_device(
    report: &mut Report,
    path: &Path,
    iommu: &Held<Iommufd>,
    space: &Held<Space<'_>>,
    attached: &Held<Attached>,
) -> Held<Edu> {
    let name = name(path);
    let file = report.step(format!("open {name}"), || match VfioDevice::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Stop::Absent("there is no second device".to_owned()))
        }
        _ => open_device(path),
    });
    let edu = bring_up(report, &name, iommu.as_ref(), file);
    report.after(
        space.as_ref().and(edu).if_also(attached),
        format!("attach {name} to the same space"),
        |(space, edu)| {
            let table = edu.file().attach(space.id).map_err(refused("a page table"))?;
            Ok((edu, format!("page table number {table}")))
        },
    )
}

/// What should be known to be mapped.
struct Mapped<'probe> {
    device: &'probe Path,
    areas: u64,
    bytes: &'probe Plan,
    reduced: bool,
}

impl Mapped<'_> {
    fn expected_bytes(&self) -> u64 {
        let near = self.bytes.near().iter().map(|area| area.length).sum::<u64>();
        let all = if self.reduced { near + self.bytes.small_far.length } else { self.bytes.size().0 };
        let whole = if self.reduced { 5 } else { self.bytes.areas().count() as u64 };
        all - (whole - self.areas) * self.bytes.doomed.length
    }
}

fn mapped_and_charged(space: Space<'_>, expected: &Mapped<'_>) -> Verdict<()> {
    let machine = match status::ask().map_err(refused("an answer"))? {
        Known::Server(machine) => machine,
        Known::Kernel(lines) => return Ok(((), format!("{lines} (a kernel tells no more)"))),
    };
    let bytes = expected.expected_bytes();
    let wanted = || format!("{} areas, {}, all of it charged", expected.areas, Bytes(bytes));
    let Some(found) = machine.address_space(&expected.device.to_string_lossy(), space.id) else {
        return Err(Failure::new(wanted(), "the address space is not listed", "see /dev/ioasid").into());
    };
    // Other programs of the same user may be charged too.
    if found.area_count != expected.areas
        || found.mapped_bytes != bytes
        || machine.charged_pages() < bytes / 4096
    {
        let happened =
            format!("{} areas, {}, {}", found.area_count, Bytes(found.mapped_bytes), machine.charges());
        return Err(Failure::new(wanted(), happened, "see /dev/ioasid").into());
    }
    Ok(((), format!("{} areas, {}; {}", expected.areas, Bytes(bytes), machine.charges())))
}

/// The leaves of the space's own table cover what is mapped, no more and no less.
fn tables(space: Space<'_>, device: &Path) -> Verdict<()> {
    let machine = match status::ask().map_err(refused("an answer"))? {
        Known::Server(machine) => machine,
        Known::Kernel(_) => return Err(Stop::Absent("a kernel does not tell".to_owned())),
    };
    let found = machine.address_space(&device.to_string_lossy(), space.id);
    let found =
        found.ok_or_else(|| Failure::new("the address space", "it is not listed", "see /dev/ioasid"))?;
    if found.leaf_bytes() != found.mapped_bytes {
        let expected = format!("leaves for {}", Bytes(found.mapped_bytes));
        return Err(Failure::new(expected, Bytes(found.leaf_bytes()).to_string(), "see /dev/ioasid").into());
    }
    Ok(((), found.tables()))
}

fn detach(edu: &Edu) -> Verdict<()> {
    edu.file().detach().map_err(refused("success"))?;
    Ok(((), String::new()))
}

/// After everything was closed, the device is not ours any more.
fn nothing_left(device: &Path, space: u32) -> Verdict<()> {
    match status::ask().map_err(refused("an answer"))? {
        Known::Kernel(lines) => Ok(((), lines)),
        Known::Server(machine) if machine.address_space(&device.to_string_lossy(), space).is_some() => {
            let advice = "another program may have bound the device at once; otherwise see /dev/ioasid";
            Err(Failure::new("no address space of the device", "there still is one", advice).into())
        }
        Known::Server(machine) => Ok(((), machine.charges())),
    }
}
