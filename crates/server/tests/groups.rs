//! Devices of one group, and whether their DMA is coherent, as programs see it.

mod program;

use std::sync::Arc;

use ioasid_server::{DeviceOptions, Errno, Server, ServerOptions};
use ioasid_uapi::iommufd::VFIO_IOAS_SET;
use ioasid_uapi::{iommufd, vfio};
use program::{BUFFER, FIXED, PAGE, Program, READ, WRITE};

fn machine(devices: &[&str]) -> Arc<Server> {
    let devices = devices.iter().map(|device| device.parse::<DeviceOptions>().unwrap()).collect();
    Server::new(ServerOptions { devices, ..Default::default() }).unwrap()
}

fn device(program: &Program, number: u32) -> i32 {
    program.open(&format!("/dev/vfio/devices/vfio{number}"))
}

#[test]
fn a_group_is_bound_to_one_iommufd() {
    let server = machine(&["edu:bus=2", "edu:bus=2", "edu"]);
    let (one, other) = (Program::of(&server), Program::of(&server));
    let (ones, others) = (one.iommu(), other.iommu());
    let first = one.bind_device(ones, 0);
    let second = device(&other, 1);
    assert_eq!(other.bind_at(second, others), Err(Errno::PERM), "the group is another's");
    other.bind_device(others, 2);
    assert!(one.bind_device(ones, 1).id > first.id);
    // Another open of the same program is another owner, too.
    let again = one.iommu();
    assert_eq!(one.bind_at(device(&one, 1), again), Err(Errno::INVAL), "bound through another file");
}

#[test]
fn a_group_is_free_when_its_last_device_is_closed() {
    let server = machine(&["edu:bus=2", "edu:bus=2"]);
    let (one, other) = (Program::of(&server), Program::of(&server));
    let iommu = one.iommu();
    let devices = [0, 1].map(|number| one.bind_device(iommu, number));
    let (wanted, others) = (device(&other, 0), other.iommu());
    one.close(devices[0].fd).unwrap();
    assert_eq!(other.bind_at(wanted, others), Err(Errno::PERM));
    one.close(devices[1].fd).unwrap();
    other.bind_at(wanted, others).unwrap();
}

#[test]
fn devices_of_a_group_share_an_address_space() {
    let server = machine(&["edu:bus=2", "edu:bus=2"]);
    let program = Program::of(&server);
    let iommu = program.iommu();
    let devices = [0, 1].map(|number| program.bind_device(iommu, number));
    let [ioas, elsewhere] = [(); 2].map(|()| program.ioas(iommu));
    program.map_flags(iommu, ioas, FIXED | READ | WRITE, BUFFER, PAGE, 0).unwrap();
    program.attach(&devices[0], ioas).unwrap();
    assert_eq!(program.attach(&devices[1], elsewhere), Err(Errno::INVAL));
    let hwpt = program.hwpt(iommu, devices[1].id, ioas).unwrap();
    assert_eq!(program.attach(&devices[1], hwpt), Err(Errno::INVAL), "not even another table");
    // The bridge makes requests for both, and its way is open.
    program.put(BUFFER, b"seen").unwrap();
    program.device_copies(&devices[1], 0, 8, 4);
    assert_eq!(program.get(BUFFER + 8, 4).unwrap(), b"seen");
    program.attach(&devices[1], ioas).unwrap();
    program.detach(&devices[0]).unwrap();
    program.detach(&devices[1]).unwrap();
    program.attach(&devices[1], elsewhere).unwrap();
}

#[test]
fn replacing_what_one_is_attached_to_moves_all_of_the_group() {
    let server = machine(&["edu:bus=2", "edu:bus=2", "edu:bus=2", "edu"]);
    let program = Program::of(&server);
    let iommu = program.iommu();
    let devices = [0, 1, 2].map(|number| program.bind_device(iommu, number));
    let [first, second, third] = [(); 3].map(|()| program.ioas(iommu));
    for (page, ioas) in [first, second, third].into_iter().enumerate() {
        let at = BUFFER + page as u64 * PAGE;
        program.map_flags(iommu, ioas, FIXED | READ | WRITE, at, PAGE, 0).unwrap();
        program.put(at, format!("page {page}").as_bytes()).unwrap();
    }
    // What a device of the group copies to says where it is.
    let seen = |page: u64| {
        for device in &devices {
            let to = 8 + u64::from(device.id) * 8;
            program.device_copies(device, 0, to, 6);
            assert_eq!(program.get(BUFFER + page * PAGE + to, 6).unwrap(), format!("page {page}").as_bytes());
        }
    };
    let automatic = program.attach(&devices[0], first).unwrap();
    assert_eq!(program.attach(&devices[1], first), Ok(automatic));
    seen(0);
    // The third is not attached, and goes along nevertheless: the bridge makes its requests.
    program.attach(&devices[1], second).unwrap();
    seen(1);
    assert_eq!(program.destroy(iommu, automatic), Err(Errno::NOENT), "nobody has been left behind");
    assert_eq!(program.destroy(iommu, first), Ok(()));
    // Who joins comes to where the others are now.
    assert_eq!(program.attach(&devices[2], third), Err(Errno::INVAL));
    program.attach(&devices[2], second).unwrap();
    let hwpt = program.hwpt(iommu, devices[0].id, third).unwrap();
    assert_eq!(program.attach(&devices[2], hwpt), Ok(hwpt));
    seen(2);
    assert_eq!(program.destroy(iommu, second), Ok(()));
    // What cannot be had by one changes nothing for any.
    let other = program.bind_device(iommu, 3);
    assert_eq!(program.attach(&devices[0], other.id), Err(Errno::INVAL));
    seen(2);
    // Each leaves for itself, by closing or detaching, and the table has a user until the last one has.
    program.detach(&devices[2]).unwrap();
    seen(2);
    program.detach(&devices[2]).unwrap();
    program.close(devices[0].fd).unwrap();
    assert_eq!(program.destroy(iommu, hwpt), Err(Errno::BUSY));
    program.detach(&devices[1]).unwrap();
    assert_eq!(program.destroy(iommu, hwpt), Ok(()));
    assert_eq!(program.destroy(iommu, third), Ok(()));
}

#[test]
fn dma_is_coherent_if_every_table_says_so() {
    let server = machine(&["edu:table=vtd,no-snoop", "edu:table=x86-64,no-snoop", "edu:table=x86-64"]);
    let program = Program::of(&server);
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let command = iommufd::VfioIoas { op: VFIO_IOAS_SET, ioas_id: ioas, ..Default::default() };
    program.run(iommu, command).unwrap();
    let coherent = || program.ioctl(iommu, vfio::CHECK_EXTENSION, vfio::DMA_CC_IOMMU.into()).unwrap();
    assert_eq!(coherent(), 1, "no table, no exception");
    let devices = [0, 1, 2].map(|number| program.bind_device(iommu, number));
    program.attach(&devices[0], ioas).unwrap();
    program.attach(&devices[2], ioas).unwrap();
    assert_eq!(coherent(), 1, "enforced for the one, and the other always snoops");
    let other = program.attach(&devices[1], ioas).unwrap();
    assert_eq!(coherent(), 0);
    // A table that was made without the promise is not for who has it, and is no part of another address space.
    program.detach(&devices[1]).unwrap();
    assert_eq!(coherent(), 1);
    assert_eq!(program.destroy(iommu, other), Err(Errno::NOENT));
    program.attach(&devices[1], program.ioas(iommu)).unwrap();
    assert_eq!(coherent(), 1);
    assert_eq!(program.destroy(iommu, program.hwpt(iommu, devices[1].id, ioas).unwrap()), Ok(()));
}
