//! Devices that are given back, and devices that Linux cannot tell apart.

use std::sync::Arc;

use ioasid::{AttachError, Bus, Device, Iommu, Rid, Space, Table};
use ioasid_uapi::vfio::DeviceAttachIommufdPt;
use rustix::io::Errno;

use super::reason;
use super::stand_in::StandIn;
use crate::{Host, HostError, HostOptions, OpenError, RemoveError};

const ONE: Rid = Rid(1);
const TWO: Rid = Rid(2);
const THREE: Rid = Rid(3);

fn host() -> (Arc<StandIn>, Arc<Host>) {
    let kernel = Arc::new(StandIn::default());
    let host = Host::over(kernel.clone(), HostOptions::default()).unwrap();
    (kernel, host)
}

fn table(host: &Arc<Host>, rid: Rid) -> (Device, Arc<Table>) {
    let device = Device::new(host.clone(), rid).unwrap();
    let table = Table::new(&Space::new(&Bus::new()), &device).unwrap();
    (device, table)
}

#[test]
fn a_device_is_given_back_when_nobody_uses_it() {
    let (kernel, host) = host();
    assert_eq!(host.remove_device(ONE), Err(RemoveError::NoDevice(ONE)));
    let file = host.add_device(ONE, "one").unwrap();
    let (device, table) = table(&host, ONE);
    device.attach(&table).unwrap();
    assert_eq!(host.remove_device(ONE), Err(RemoveError::Attached(ONE)));
    assert_eq!(kernel.state().attached.len(), 1);
    device.detach();
    assert_eq!(host.remove_device(ONE), Err(RemoveError::FileInUse(ONE)));
    // What is refused has not happened.
    device.attach(&table).unwrap();
    drop((device, file));
    assert_eq!(host.remove_device(ONE), Ok(()));
    assert!(host.requirements(ONE).is_none());

    // The device is anybody's, under any name, and its name is another device's.
    let other = Host::over(kernel.clone(), HostOptions::default()).unwrap();
    other.add_device(TWO, "one").unwrap();
    let busy = host.add_device(ONE, "one");
    assert!(matches!(busy, Err(OpenError::Call(error)) if error.errno == Errno::BUSY), "{busy:?}");
    host.add_device(ONE, "another").unwrap();
    other.remove_device(TWO).unwrap();
    host.add_device(TWO, "one").unwrap();
}

#[test]
fn who_keeps_a_device_that_was_given_back_cannot_attach_it() {
    let (kernel, host) = host();
    host.add_device(ONE, "one").unwrap();
    let (device, table) = table(&host, ONE);
    host.remove_device(ONE).unwrap();
    let refused = device.attach(&table);
    assert!(matches!(refused, Err(AttachError::NoDevice(ONE))), "{refused:?}");
    assert!(kernel.state().attached.is_empty());
}

#[test]
fn devices_of_a_group_are_attached_to_one_table() {
    let (kernel, host) = host();
    for (rid, path) in [(ONE, "group7/one"), (TWO, "group7/two"), (THREE, "group8/three")] {
        host.add_device(rid, path).unwrap();
    }
    let (one, table) = table(&host, ONE);
    let two = Device::new(host.clone(), TWO).unwrap();
    let three = Device::new(host.clone(), THREE).unwrap();
    let other = Table::new(table.space(), &two).unwrap();
    one.attach(&table).unwrap();
    let calls = kernel.count::<DeviceAttachIommufdPt>();
    let Err(AttachError::Table(error)) = two.attach(&other) else { panic!("attached") };
    assert_eq!(reason(&error), HostError::Group { group: 7, device: ONE });
    assert!(reason(&error).to_string().contains("IOMMU group 7"), "{error}");
    assert_eq!(kernel.count::<DeviceAttachIommufdPt>(), calls, "Linux was asked");
    three.attach(&other).unwrap();
    two.attach(&table).unwrap();
    // Neither of them can leave alone.
    assert!(one.attach(&other).is_err() && two.attach(&other).is_err());
    // What Linux says of a new device takes an address space of its own.
    let refused = host.add_device(Rid(4), "group7/four");
    assert!(matches!(refused, Err(OpenError::GroupAttached { group: 7, .. })), "{refused:?}");
    two.detach();
    one.attach(&other).unwrap();
    one.detach();
    host.add_device(Rid(4), "group7/four").unwrap();
}
