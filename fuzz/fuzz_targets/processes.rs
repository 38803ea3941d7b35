//! Several programs at once over one server: they share a device, pass files to each other and close them in any order.
//!
//! Two or three threads each play a program of their own through the calls of the input. Which thread is when ahead is up
//! to the machine, so an input is not one run but many; what must hold holds in all of them: every call returns, the
//! status is one that can be, and when all have ended nothing is open, mapped or charged.
//!
//! `cargo +nightly fuzz run processes -- -max_total_time=60`

#![no_main]

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use ioasid_server::{DeviceOptions, Errno, InProcess, Limit, Limits, Server, ServerOptions, TableKind};
use ioasid_uapi::{Command, iommufd, vfio};
use libfuzzer_sys::fuzz_target;

const PAGE: u64 = 4096;
const BUFFER: u64 = 0x10_0000;
const BUFFER_PAGES: u64 = 16;
const CALLS_MAX: usize = 200;

/// Small limits, so that programs meet them, and each other at them.
const LIMITS: Limits = Limits {
    files: Limit { per_client: 8, total: 20 },
    objects: Limit { per_client: 12, total: 24 },
    areas: Limit { per_client: 24, total: 48 },
};

#[derive(Arbitrary, Debug, Clone)]
enum Call {
    OpenIommu,
    OpenDevice(bool),
    Close(u8),
    /// Another process with the same files takes this one's place.
    Fork,
    /// This process ends, and a new one begins.
    Exit,
    /// Leaves a process with the same files for somebody to take.
    Pass,
    Take,
    UnmapMemory(u8),
    MapMemory(u8),
    Limit(Option<u8>),
    Alloc(u8),
    Destroy(u8, u8),
    Map {
        fd: u8,
        ioas: u8,
        page: u8,
        pages: u8,
        iova: u8,
        fixed: bool,
    },
    Copy {
        fd: u8,
        from: u8,
        to: u8,
        pages: u8,
        source: u8,
        destination: u8,
    },
    Unmap {
        fd: u8,
        ioas: u8,
        pages: u8,
        iova: u8,
    },
    UnmapAll(u8, u8),
    Table {
        fd: u8,
        device: u8,
        ioas: u8,
        for_pasids: bool,
    },
    Bind(u8, u8),
    Attach(u8, u8),
    Detach(u8),
    AttachPasid {
        fd: u8,
        pasid: u8,
        table: u8,
    },
    DetachPasid {
        fd: u8,
        pasid: u8,
    },
    UsePasid {
        fd: u8,
        pasid: Option<u8>,
    },
    Dma {
        fd: u8,
        page: u8,
        to_memory: bool,
    },
    Status,
}

fn descriptor(number: u8) -> i32 {
    3 + i32::from(number % 9)
}

fn object(number: u8) -> u32 {
    u32::from(number % 10)
}

fn pages(number: u8) -> u64 {
    u64::from(number % 20) * PAGE
}

fn program(user: u32) -> InProcess {
    let client = InProcess::new(user);
    client.map_memory(BUFFER, BUFFER_PAGES * PAGE);
    client
}

/// What the threads share.
struct Machine {
    server: Arc<Server>,
    /// Programs that were left for somebody to take.
    passed: Mutex<Vec<InProcess>>,
}

impl Machine {
    fn perform(&self, client: &mut InProcess, user: u32, call: &Call) -> Result<(), Errno> {
        fn run<T: Command>(client: &InProcess, fd: u8, command: T) -> Result<(), Errno> {
            client.run(descriptor(fd), command).map(drop)
        }
        match *call {
            Call::OpenIommu => client.open(&self.server, "/dev/iommu").map(drop),
            Call::OpenDevice(second) => {
                client.open(&self.server, format!("/dev/vfio/devices/vfio{}", u8::from(second))).map(drop)
            }
            Call::Close(fd) => client.close(descriptor(fd)),
            Call::Fork => {
                *client = client.second_process();
                Ok(())
            }
            Call::Exit => {
                *client = program(user);
                Ok(())
            }
            Call::Pass => {
                let mut passed = self.passed.lock().expect("nobody panics");
                if passed.len() < 4 {
                    passed.push(client.second_process());
                }
                Ok(())
            }
            Call::Take => {
                let taken = self.passed.lock().expect("nobody panics").pop();
                *client = taken.ok_or(Errno::NOENT)?;
                Ok(())
            }
            Call::UnmapMemory(count) => {
                client.unmap_memory(BUFFER, pages(count));
                Ok(())
            }
            Call::MapMemory(count) => {
                client.map_memory(BUFFER, pages(count));
                Ok(())
            }
            Call::Limit(limit) => {
                client.set_memory_lock_limit(limit.map(pages));
                Ok(())
            }
            Call::Alloc(fd) => run(client, fd, iommufd::IoasAlloc::default()),
            Call::Destroy(fd, id) => run(client, fd, iommufd::Destroy { size: 0, id: object(id) }),
            Call::Map { fd, ioas, page, pages: count, iova, fixed } => {
                let command = iommufd::IoasMap {
                    flags: 6 | u32::from(fixed),
                    ioas_id: object(ioas),
                    user_va: BUFFER + pages(page),
                    length: pages(count),
                    iova: pages(iova),
                    ..Default::default()
                };
                run(client, fd, command)
            }
            Call::Copy { fd, from, to, pages: count, source, destination } => {
                let command = iommufd::IoasCopy {
                    flags: 7,
                    src_ioas_id: object(from),
                    dst_ioas_id: object(to),
                    length: pages(count),
                    src_iova: pages(source),
                    dst_iova: pages(destination),
                    ..Default::default()
                };
                run(client, fd, command)
            }
            Call::Unmap { fd, ioas, pages: count, iova } => {
                let (iova, length) = (pages(iova), pages(count));
                let command =
                    iommufd::IoasUnmap { ioas_id: object(ioas), iova, length, ..Default::default() };
                run(client, fd, command)
            }
            Call::UnmapAll(fd, ioas) => {
                let command =
                    iommufd::IoasUnmap { ioas_id: object(ioas), length: u64::MAX, ..Default::default() };
                run(client, fd, command)
            }
            Call::Table { fd, device, ioas, for_pasids } => {
                let command = iommufd::HwptAlloc {
                    flags: u32::from(for_pasids) * iommufd::HwptAllocFlags::PASID.bits(),
                    dev_id: object(device),
                    pt_id: object(ioas),
                    ..Default::default()
                };
                run(client, fd, command)
            }
            Call::Bind(fd, iommu) => {
                let command = vfio::DeviceBindIommufd { iommufd: descriptor(iommu), ..Default::default() };
                run(client, fd, command)
            }
            Call::Attach(fd, table) => {
                run(client, fd, vfio::DeviceAttachIommufdPt { pt_id: object(table), ..Default::default() })
            }
            Call::Detach(fd) => run(client, fd, vfio::DeviceDetachIommufdPt::default()),
            Call::AttachPasid { fd, pasid, table } => {
                let (pasid, pt_id) = (u32::from(pasid % 4), object(table));
                let command = vfio::DeviceAttachIommufdPt { flags: 1, pasid, pt_id, ..Default::default() };
                run(client, fd, command)
            }
            Call::DetachPasid { fd, pasid } => {
                let pasid = u32::from(pasid % 4);
                run(client, fd, vfio::DeviceDetachIommufdPt { flags: 1, pasid, ..Default::default() })
            }
            Call::UsePasid { fd, pasid } => {
                let value = pasid.map_or(0, |pasid| u64::from(pasid % 4) | 1 << 31);
                let register = ioasid_server::REGION_MAGIC + 0xa0;
                client.pwrite(descriptor(fd), register, &value.to_le_bytes()).map(drop)
            }
            Call::Dma { fd, page, to_memory } => {
                let region = |index: u64| ioasid_server::REGION_MAGIC | index << 40;
                client.pwrite(descriptor(fd), region(7) + 4, &[6, 0])?;
                let (buffer, memory) = (0x40000, pages(page));
                let words = if to_memory { [buffer, memory, 64, 3] } else { [memory, buffer, 64, 1] };
                let words = words.map(u64::to_le_bytes).concat();
                client.pwrite(descriptor(fd), region(0) + 0x80, &words).map(drop)
            }
            Call::Status => {
                self.check_status();
                Ok(())
            }
        }
    }

    /// What is true at every moment.
    fn check_status(&self) {
        let status = self.server.status();
        let numbers: HashSet<u64> = status.contexts.iter().map(|context| context.number).collect();
        assert_eq!(numbers.len(), status.contexts.len(), "{status:?}");
        let spaces = status.contexts.iter().flat_map(|context| &context.address_spaces);
        let areas: usize = spaces.map(|space| space.area_count).sum();
        // Contexts are looked at one after the other, and areas may have moved on meanwhile, but not many times.
        assert!(areas <= 4 * LIMITS.areas.total, "{status:?}");
        assert!(status.contexts.iter().map(|context| context.devices.len()).sum::<usize>() <= 4);
    }
}

fuzz_target!(|input: &[u8]| {
    let devices = [TableKind::Native, TableKind::VtdSecondStage]
        .map(|table| DeviceOptions { table, ..DeviceOptions::default() })
        .to_vec();
    let server = Server::new(ServerOptions { devices, limits: LIMITS, ..Default::default() });
    let server = server.expect("a machine of two devices");
    let mut input = Unstructured::new(input);
    let threads = if bool::arbitrary(&mut input).unwrap_or(false) { 3 } else { 2 };
    let mut calls = vec![Vec::new(); threads];
    for number in 0..CALLS_MAX {
        let Ok(call) = Call::arbitrary(&mut input) else { break };
        calls[number % threads].push(call);
        if input.is_empty() {
            break;
        }
    }
    let machine = Machine { server: Arc::clone(&server), passed: Mutex::default() };
    std::thread::scope(|scope| {
        for (number, calls) in calls.iter().enumerate() {
            let machine = &machine;
            scope.spawn(move || {
                // The first two are of one user.
                let user = 1000 + number as u32 / 2;
                let mut client = program(user);
                for path in ["/dev/iommu", &format!("/dev/vfio/devices/vfio{}", number % 2)] {
                    let _ = client.open(&machine.server, path);
                }
                let bound = vfio::DeviceBindIommufd { iommufd: 3, ..Default::default() };
                let _ = (client.run(4, bound), client.run(3, iommufd::IoasAlloc::default()));
                for call in calls {
                    // Whether it succeeds depends on the others.
                    let _ = machine.perform(&mut client, user, call);
                }
            });
        }
    });
    drop(machine);
    let status = server.status();
    assert!(status.contexts.is_empty(), "{status:?}");
    assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{status:?}");
    // All of the limits are there again.
    let client = program(1000);
    let iommu = client.open(&server, "/dev/iommu").expect("nothing is open");
    for _ in 0..LIMITS.objects.per_client {
        client.run(iommu, iommufd::IoasAlloc::default()).expect("no object is left");
    }
    for number in 0..LIMITS.areas.per_client as u64 {
        let map = iommufd::IoasMap {
            flags: 7,
            ioas_id: 1,
            user_va: BUFFER,
            length: PAGE,
            iova: number * PAGE,
            ..Default::default()
        };
        client.run(iommu, map).expect("no area is left");
    }
    for device in 0..2 {
        let device = client.open(&server, format!("/dev/vfio/devices/vfio{device}")).expect("files are left");
        client.close(device).expect("it is open");
    }
});
