//! A device: opened, bound, recognised, tried by itself.

use std::io;
use std::path::Path;

use ioasid_soft::edu::spec;
use ioasid_uapi::pci;
use ioasid_uapi::vfio::{DeviceFlags, PCI_BAR0_REGION_INDEX, PCI_CONFIG_REGION_INDEX};
use rustix::io::Errno;

use super::super::report::{Failure, Held, Report, Stop, Verdict};
use super::{LOOK_DEEPER, unexpected};
use crate::client::{Edu, Iommufd, VfioDevice};
use crate::quantity::Bytes;

/// Why `/dev/iommu` or a device could not be opened.
pub(super) fn open_failure(error: &io::Error) -> Failure {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            "start this under `ioasid run`, or on a kernel with iommufd and VFIO and a device bound to vfio-pci"
        }
        io::ErrorKind::PermissionDenied => "on a kernel: become the owner of the file, or root",
        _ => LOOK_DEEPER,
    };
    Failure::new("an open file", error.to_string(), advice)
}

pub(super) fn open(path: &Path) -> Verdict<VfioDevice> {
    let device = VfioDevice::open(path).map_err(|error| open_failure(&error))?;
    Ok((device, String::new()))
}

/// Opens a device that need not be there.
pub(super) fn open_if_there(path: &Path) -> Verdict<VfioDevice> {
    match VfioDevice::open(path) {
        Ok(device) => Ok((device, String::new())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Stop::Absent("there is no second device".to_owned()))
        }
        Err(error) => Err(open_failure(&error).into()),
    }
}

/// Binds, and makes sure that it is the device that the rest drives.
pub(super) fn bring_up(
    report: &mut Report,
    name: &str,
    iommu: Held<&Iommufd>,
    file: Held<VfioDevice>,
) -> Held<Edu> {
    let bound = report.after(iommu.and(file), format!("bind {name}"), |(iommu, file)| bind(iommu, file));
    let edu = report.after(bound, format!("{name} is an edu device"), identify);
    report.after(edu, format!("{name} may do DMA"), |edu| {
        let command = edu.file().enable_bus_master().map_err(unexpected("the bus master bit set"))?;
        if command.contains(pci::Command::BUS_MASTER) {
            Ok((edu, format!("command register {:#06x}", command.bits())))
        } else {
            Err(Failure::new("the bus master bit set", format!("{:#06x}", command.bits()), LOOK_DEEPER)
                .into())
        }
    })
}

fn bind(iommu: &Iommufd, file: VfioDevice) -> Verdict<VfioDevice> {
    let id = file.bind(iommu).map_err(|errno| {
        let advice = match errno {
            Errno::INVAL => {
                "another program has bound the device: wait for its end, or name another one (--device)"
            }
            _ => LOOK_DEEPER,
        };
        Failure::new("a device number", errno.to_string(), advice)
    })?;
    Ok((file, format!("object number {id}")))
}

/// Reads the ids in configuration space, the regions, and the device's own word.
fn identify(file: VfioDevice) -> Verdict<Edu> {
    const ADVICE: &str = "name the file of an edu device (--device)";
    let info = file.info().map_err(unexpected("GET_INFO"))?;
    let config = file.region(PCI_CONFIG_REGION_INDEX).map_err(unexpected("a configuration space"))?;
    let bar = file.region(PCI_BAR0_REGION_INDEX).map_err(unexpected("BAR 0"))?;
    let (vendor, device) = file.pci_ids().map_err(unexpected("PCI ids"))?;
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
    let edu = Edu::new(file).map_err(unexpected("registers"))?;
    let identification = edu.identification().map_err(unexpected("the identification register"))?;
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

pub(super) fn alive(edu: &Edu) -> Verdict<()> {
    for value in [0, 0x1234_5678, u32::MAX] {
        let answer = edu.invert(value).map_err(unexpected("an answer"))?;
        if answer != !value {
            let expected = format!("{:#010x} for {value:#010x}", !value);
            return Err(Failure::new(expected, format!("{answer:#010x}"), LOOK_DEEPER).into());
        }
    }
    Ok(((), "it inverts what is written".to_owned()))
}

pub(super) fn factorial(edu: &Edu) -> Verdict<()> {
    let result = edu.factorial(10).map_err(unexpected("3628800"))?;
    if result == 3_628_800 {
        Ok(((), result.to_string()))
    } else {
        Err(Failure::new("3628800", result.to_string(), LOOK_DEEPER).into())
    }
}

pub(super) fn detach(edu: &Edu) -> Verdict<()> {
    edu.file().detach().map_err(unexpected("success"))?;
    Ok(((), String::new()))
}
