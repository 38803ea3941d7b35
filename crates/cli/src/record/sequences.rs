//! Whatever a program does, its recording replays: every DMA that was let through is let through again, every one that was
//! refused is refused, and no line is a misfit.

use std::path::Path;
use std::sync::Arc;

use ioasid_replay::trace::Trace;
use ioasid_replay::{Options, Report, play};
use ioasid_server::{DeviceOptions, InProcess, Opened, REGION_MAGIC, Server, ServerOptions};
use ioasid_soft::iommu::TableKind;
use proptest::collection::vec;
use proptest::prelude::*;

use super::recorder::Recorder;
use super::recorder::tests::Shared;

const PAGE: u64 = 4096;
const BUFFER: u64 = 0x7f12_3460_0000;
const BUFFER_PAGES: u64 = 16;
/// I/O virtual addresses begin here.
const IOVA: u64 = 0x10_0000;

#[derive(Debug, Clone)]
enum Step {
    Map {
        space: usize,
        page: u64,
        pages: u64,
        memory: u64,
        flags: u32,
    },
    Unmap {
        space: usize,
        page: u64,
        pages: u64,
    },
    Attach {
        device: usize,
        space: usize,
    },
    Detach {
        device: usize,
    },
    /// To a table of its own; 0: the requests without a PASID, which may not be beside PASIDs otherwise.
    AttachTable {
        device: usize,
        pasid: u32,
        space: usize,
    },
    DetachPasid {
        device: usize,
        pasid: u32,
    },
    /// With PASID 0: without one.
    Dma {
        device: usize,
        pasid: u32,
        at: u64,
        length: u64,
        write: bool,
    },
    Reopen {
        device: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let two = || 0..2_usize;
    let step = prop_oneof![
        4 => (two(), 0..12_u64, 1..4_u64, 0..BUFFER_PAGES, 1..4_u32).prop_map(
            |(space, page, pages, memory, access)| Step::Map { space, page, pages, memory, flags: 1 | access << 1 },
        ),
        2 => (two(), 0..12_u64, 1..8_u64).prop_map(|(space, page, pages)| Step::Unmap { space, page, pages }),
        2 => (two(), two()).prop_map(|(device, space)| Step::Attach { device, space }),
        1 => two().prop_map(|device| Step::Detach { device }),
        3 => (two(), 0..3_u32, two())
            .prop_map(|(device, pasid, space)| Step::AttachTable { device, pasid, space }),
        1 => (two(), 1..3_u32).prop_map(|(device, pasid)| Step::DetachPasid { device, pasid }),
        6 => (two(), 0..3_u32, 0..12 * PAGE, 1..=PAGE, any::<bool>())
            .prop_map(|(device, pasid, at, length, write)| Step::Dma { device, pasid, at, length, write }),
        1 => two().prop_map(|device| Step::Reopen { device }),
    ];
    vec(step, 1..50)
}

/// A program with an iommufd, two spaces and two devices.
struct Program {
    server: Arc<Server>,
    client: InProcess,
    iommu: i32,
    spaces: Vec<u32>,
    devices: Vec<i32>,
    /// The devices' numbers, and the tables that were made of each space for each device, which stay.
    numbers: Vec<u32>,
    tables: [[Option<u32>; 2]; 2],
}

impl Program {
    fn new(server: Arc<Server>) -> Program {
        let client = InProcess::new(1000);
        client.map_memory(BUFFER, BUFFER_PAGES * PAGE);
        let (spaces, devices, numbers) = (Vec::new(), vec![-1; 2], vec![0; 2]);
        let tables = <[[Option<u32>; 2]; 2]>::default();
        let mut program = Program { server, client, iommu: 0, spaces, devices, numbers, tables };
        program.iommu = program.open("/dev/iommu");
        program.spaces =
            (0..2).map(|_| program.call(program.iommu, 0x3b81, &[12, 0, 0]).unwrap()[2]).collect();
        (0..2).for_each(|number| program.open_device(number));
        program
    }

    fn open(&self, path: &str) -> i32 {
        match self.server.open(&self.client, Path::new(path)) {
            Some(Ok(Opened::File(file))) => self.client.insert(file),
            other => panic!("{other:?}"),
        }
    }

    /// Opens and binds, and lets the device do DMA.
    fn open_device(&mut self, number: usize) {
        let fd = self.open(&format!("/dev/vfio/devices/vfio{number}"));
        let bound = self.call(fd, 0x3b76, &[24, 0, self.iommu as u32, 0, 0, 0]).unwrap();
        self.client.pwrite(fd, REGION_MAGIC + (7 << 40) + 4, &[6, 0]).unwrap();
        (self.devices[number], self.numbers[number]) = (fd, bound[3]);
    }

    /// A table for PASIDs, if the space can have one for the device at the moment.
    fn table(&mut self, device: usize, space: usize) -> Option<u32> {
        if self.tables[device][space].is_none() {
            let mut command = [0; 12];
            command[..4].copy_from_slice(&[48, 8, self.numbers[device], self.spaces[space]]);
            self.tables[device][space] = Some(self.call(self.iommu, 0x3b89, &command)?[4]);
        }
        self.tables[device][space]
    }

    fn call(&self, fd: i32, command: u32, words: &[u32]) -> Option<Vec<u32>> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.client.call(fd, command, &mut bytes).ok()?;
        Some(bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect())
    }

    fn step(&mut self, step: &Step) {
        let halves = |value: u64| [value as u32, (value >> 32) as u32];
        match *step {
            Step::Map { space, page, pages, memory, flags } => {
                let (address, length) = (halves(BUFFER + memory * PAGE), halves(pages * PAGE));
                let iova = halves(IOVA + page * PAGE);
                let head = [40, flags, self.spaces[space], 0];
                self.call(self.iommu, 0x3b85, &[&head[..], &address, &length, &iova].concat());
            }
            Step::Unmap { space, page, pages } => {
                let (iova, length) = (halves(IOVA + page * PAGE), halves(pages * PAGE));
                self.call(self.iommu, 0x3b86, &[&[24, self.spaces[space]][..], &iova, &length].concat());
            }
            Step::Attach { device, space } => {
                self.call(self.devices[device], 0x3b77, &[12, 0, self.spaces[space]]);
            }
            Step::Detach { device } => {
                self.call(self.devices[device], 0x3b78, &[8, 0]);
            }
            Step::AttachTable { device, pasid, space } => {
                let Some(table) = self.table(device, space) else { return };
                self.call(self.devices[device], 0x3b77, &[16, u32::from(pasid != 0), table, pasid]);
            }
            Step::DetachPasid { device, pasid } => {
                self.call(self.devices[device], 0x3b78, &[12, 1, pasid]);
            }
            Step::Dma { device, pasid, at, length, write } => {
                const OWN: u64 = 0x40000;
                let (memory, command) = (IOVA + at, if write { 3 } else { 1 });
                let (source, destination) = if write { (OWN, memory) } else { (memory, OWN) };
                let registers: Vec<u8> =
                    [source, destination, length, command].into_iter().flat_map(u64::to_le_bytes).collect();
                let fd = self.devices[device];
                let chosen = if pasid == 0 { 0 } else { u64::from(pasid) | 1 << 31 };
                self.client.pwrite(fd, REGION_MAGIC + 0xa0, &chosen.to_le_bytes()).unwrap();
                self.client.pwrite(fd, REGION_MAGIC + 0x80, &registers).unwrap();
                while self.client.pread(fd, REGION_MAGIC + 0x98, 8).unwrap()[0] & 1 != 0 {
                    std::thread::yield_now();
                }
            }
            Step::Reopen { device } => {
                self.client.close(self.devices[device]).unwrap();
                self.open_device(device);
            }
        }
    }
}

fn replayed(steps: &[Step], compressed: bool, table: TableKind, threads: usize) -> Report {
    let file = Shared::default();
    let (recorder, writing) = Recorder::start(file.clone(), compressed).unwrap();
    let devices: Vec<DeviceOptions> = vec!["edu".parse().unwrap(), "edu:table=vtd".parse().unwrap()];
    let server =
        Server::with_observer(ServerOptions { devices, ..ServerOptions::default() }, Arc::new(recorder))
            .unwrap();
    let mut program = Program::new(server);
    steps.iter().for_each(|step| program.step(step));
    drop(program);
    writing.finish().unwrap();
    let bytes = file.0.lock().unwrap().clone();
    let options = Options { table, threads, strict_input: true, memory: 1 << 20, ..Options::default() };
    play(Trace::new(&bytes[..]).unwrap(), &options, &mut |_| ()).unwrap_or_else(|error| {
        panic!(
            "{error}\n{}",
            Trace::new(&bytes[..])
                .unwrap()
                .map(|entry| format!("{}\n", entry.unwrap().1))
                .collect::<String>()
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_recorded_replays(
        steps in steps(),
        compressed: bool,
        table in prop::sample::select(TableKind::ALL.as_slice()),
        threads in 1..3_usize,
    ) {
        let report = replayed(&steps, compressed, table, threads);
        prop_assert!(report.is_right(), "{report:#?}");
        let dma = steps.iter().filter(|step| matches!(step, Step::Dma { .. })).count() as u64;
        prop_assert_eq!(report.recorded_dma, dma);
        prop_assert_eq!(report.dma.count + report.faults_as_recorded <= dma, true);
        prop_assert_eq!(report.live_at_end.mappings, 0);
    }
}
