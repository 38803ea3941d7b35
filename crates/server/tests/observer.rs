//! What an observer hears: what devices reach and do, in an order in which it can have happened.

mod program;

use ioasid_server::{Event, MemoryAt, MemoryOwner, Observer, Server, ServerOptions};
use program::{BUFFER, BoundDevice, FIXED, PAGE, Program, READ, WRITE, memfd};
use std::sync::{Arc, Mutex};

/// Writes down what it hears, as text.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn happened(&self, event: &Event<'_>) {
        let note = match event {
            Event::Attached { requester } => format!("{requester} attached"),
            Event::Detached { requester } => format!("{requester} detached"),
            Event::Mapped { requester, range, memory: MemoryAt { owner, offset }, permissions } => {
                let owner = if matches!(owner, MemoryOwner::File(..)) { "file" } else { "process" };
                let (first, length) = (range.first(), range.length().unwrap());
                format!("{requester} mapped {first:#x}+{length:#x} {permissions:?} {owner} {offset:#x}")
            }
            Event::Unmapped { requester, range, .. } => {
                format!("{requester} unmapped {:#x}+{:#x}", range.first(), range.length().unwrap())
            }
            Event::Dma { requester, iova, length, write, result } => {
                let (verb, end) = (
                    if *write { "writes" } else { "reads" },
                    if result.is_ok() { "" } else { " and faults" },
                );
                format!("{requester} {verb} {iova:#x}+{length:#x}{end}")
            }
            Event::Closing { device, context, .. } => {
                let areas: usize = context.address_spaces.iter().map(|space| space.area_count).sum();
                match device {
                    Some(device) => format!("vfio{device} closing, {areas} areas"),
                    None => format!("context {} closing, {areas} areas", context.number),
                }
            }
            other => panic!("{other:?}"),
        };
        self.0.lock().unwrap().push(note);
    }
}

struct Machine {
    program: Program,
    notes: Arc<Notes>,
    iommu: i32,
}

impl Machine {
    fn new() -> Machine {
        Machine::of(["edu", "edu:table=vtd"])
    }

    fn of(devices: [&str; 2]) -> Machine {
        let notes = Arc::new(Notes::default());
        let devices = devices.map(|device| device.parse().unwrap()).to_vec();
        let server = Server::with_observer(
            ServerOptions { devices, ..ServerOptions::default() },
            Arc::clone(&notes) as _,
        )
        .unwrap();
        let program = Program::of(&server);
        let iommu = program.iommu();
        Machine { program, notes, iommu }
    }

    fn device(&self, number: u32) -> BoundDevice {
        self.program.bind_device(self.iommu, number)
    }

    fn map(&self, ioas: u32, page: u64, pages: u64, iova: u64) {
        self.program.map_fixed(self.iommu, ioas, BUFFER + page * PAGE, pages * PAGE, iova).unwrap();
    }

    /// What was heard since this was asked last.
    #[track_caller]
    fn heard(&self, expected: &[String]) {
        let notes = std::mem::take(&mut *self.notes.0.lock().unwrap());
        assert_eq!(notes, expected);
    }
}

fn mapped(device: &str, iova: u64, pages: u64, page: u64) -> String {
    let memory = BUFFER + page * PAGE;
    format!("{device} mapped {iova:#x}+{:#x} READ_WRITE process {memory:#x}", pages * PAGE)
        .replace("READ_WRITE", &format!("{:?}", ioasid::Permissions::READ_WRITE))
}

const FIRST: &str = "00:01.0";
const SECOND: &str = "00:02.0";

#[test]
fn spaces_without_devices_are_not_heard_of_until_one_comes() {
    let m = Machine::new();
    let ioas = m.program.ioas(m.iommu);
    m.map(ioas, 0, 1, 0x10000);
    m.map(ioas, 1, 2, 0x20000);
    m.program.unmap(m.iommu, ioas, 0x10000, PAGE).unwrap();
    m.heard(&[]);
    let (first, second) = (m.device(0), m.device(1));
    m.program.attach(&first, ioas).unwrap();
    m.heard(&[format!("{FIRST} attached"), mapped(FIRST, 0x20000, 2, 1)]);
    m.program.attach(&second, ioas).unwrap();
    m.heard(&[format!("{SECOND} attached"), mapped(SECOND, 0x20000, 2, 1)]);
    // From now on each line is there for both.
    m.map(ioas, 5, 1, 0x22000);
    m.heard(&[mapped(FIRST, 0x22000, 1, 5), mapped(SECOND, 0x22000, 1, 5)]);
    m.program.detach(&first).unwrap();
    m.heard(&[format!("{FIRST} unmapped 0x20000+0x3000"), format!("{FIRST} detached")]);
    m.program.unmap(m.iommu, ioas, 0x22000, PAGE).unwrap();
    m.heard(&[format!("{SECOND} unmapped 0x22000+0x1000")]);
    // What is refused is not heard of.
    assert!(m.program.unmap(m.iommu, ioas, 0x20000, PAGE).is_err());
    assert!(m.program.map_fixed(m.iommu, ioas, BUFFER, PAGE, 0x21000).is_err());
    assert!(m.program.map_fixed(m.iommu, ioas, 0x1000, PAGE, 0x40000).is_err());
    m.heard(&[]);
}

/// Devices that share a requester ID: both are heard of when one is replaced.
#[test]
fn a_group_that_moves_is_heard_of_device_by_device() {
    let m = Machine::of(["edu:bus=2", "edu:bus=2"]);
    let [one, two] = [(); 2].map(|()| m.program.ioas(m.iommu));
    m.map(one, 0, 1, 0x10000);
    m.map(two, 1, 1, 0x20000);
    let devices = [m.device(0), m.device(1)];
    let names = ["02:01.0", "02:02.0"];
    for (device, name) in devices.iter().zip(names) {
        m.program.attach(device, one).unwrap();
        m.heard(&[format!("{name} attached"), mapped(name, 0x10000, 1, 0)]);
    }
    m.program.attach(&devices[1], two).unwrap();
    let moved = |name| {
        [format!("{name} unmapped 0x10000+0x1000"), format!("{name} attached"), mapped(name, 0x20000, 1, 1)]
    };
    m.heard(&names.map(moved).concat());
    // From now on both reach what is mapped there, and neither what is mapped elsewhere.
    m.map(one, 2, 1, 0x30000);
    m.map(two, 3, 1, 0x30000);
    m.heard(&names.map(|name| mapped(name, 0x30000, 1, 3)));
    m.program.detach(&devices[0]).unwrap();
    m.heard(&[
        format!("{} unmapped 0x20000+0x1000", names[0]),
        format!("{} unmapped 0x30000+0x1000", names[0]),
        format!("{} detached", names[0]),
    ]);
}

#[test]
fn a_replaced_space_is_unmapped_and_the_new_one_mapped() {
    let m = Machine::new();
    let device = m.device(0);
    let (a, b) = (m.program.ioas(m.iommu), m.program.ioas(m.iommu));
    m.map(a, 0, 1, 0x10000);
    m.map(a, 1, 1, 0x30000);
    m.map(b, 2, 1, 0x10000);
    m.program.attach(&device, a).unwrap();
    m.heard(&[format!("{FIRST} attached"), mapped(FIRST, 0x10000, 1, 0), mapped(FIRST, 0x30000, 1, 1)]);
    m.program.attach(&device, b).unwrap();
    m.heard(&[
        format!("{FIRST} unmapped 0x10000+0x1000"),
        format!("{FIRST} unmapped 0x30000+0x1000"),
        format!("{FIRST} attached"),
        mapped(FIRST, 0x10000, 1, 2),
    ]);
    // To a table of the same space: everything stays.
    let hwpt = m.program.hwpt(m.iommu, device.id, b).unwrap();
    m.program.attach(&device, hwpt).unwrap();
    m.heard(&[format!("{FIRST} attached")]);
    m.map(b, 3, 1, 0x50000);
    m.map(a, 3, 1, 0x50000);
    m.heard(&[mapped(FIRST, 0x50000, 1, 3)]);
    // A refused attach changes nothing.
    assert!(m.program.attach(&device, 77).is_err());
    m.heard(&[]);
}

#[test]
fn dma_is_heard_of_between_the_map_and_the_unmap() {
    let m = Machine::new();
    let device = m.device(0);
    let ioas = m.program.ioas(m.iommu);
    m.program.device_copies(&device, 0x10000, 0x11000, 16);
    m.heard(&[
        format!("{FIRST} reads 0x10000+0x10 and faults"),
        format!("{FIRST} writes 0x11000+0x10 and faults"),
    ]);
    m.program.attach(&device, ioas).unwrap();
    m.program.map_flags(m.iommu, ioas, FIXED | READ, BUFFER, PAGE, 0x10000).unwrap();
    m.program.map_flags(m.iommu, ioas, FIXED | WRITE, BUFFER, PAGE, 0x11000).unwrap();
    m.notes.0.lock().unwrap().clear();
    m.program.device_copies(&device, 0x10ff0, 0x11000, 16);
    m.program.device_copies(&device, 0x10ff0, 0x10000, 17);
    m.program.unmap(m.iommu, ioas, 0x10000, 2 * PAGE).unwrap();
    m.heard(&[
        format!("{FIRST} reads 0x10ff0+0x10"),
        format!("{FIRST} writes 0x11000+0x10"),
        format!("{FIRST} reads 0x10ff0+0x11 and faults"),
        format!("{FIRST} writes 0x10000+0x11 and faults"),
        // Two, as what they allowed was not the same.
        format!("{FIRST} unmapped 0x10000+0x1000"),
        format!("{FIRST} unmapped 0x11000+0x1000"),
    ]);
}

#[test]
fn closing_tells_what_is_left_and_then_unmaps_it() {
    let m = Machine::new();
    let device = m.device(0);
    let ioas = m.program.ioas(m.iommu);
    m.map(ioas, 0, 1, 0x10000);
    let file = m.program.insert_foreign(memfd(PAGE));
    let iova = m.program.map_file(m.iommu, ioas, file, 0, PAGE).unwrap();
    m.program.attach(&device, ioas).unwrap();
    let permissions = ioasid::Permissions::READ_WRITE;
    let of_file = format!("{FIRST} mapped {iova:#x}+0x1000 {permissions:?} file 0x0");
    m.heard(&[format!("{FIRST} attached"), of_file, mapped(FIRST, 0x10000, 1, 0)]);
    m.program.close(m.iommu).unwrap();
    m.heard(&[]);
    m.program.close(device.fd).unwrap();
    m.heard(&[
        "vfio0 closing, 2 areas".to_owned(),
        format!("{FIRST} unmapped {iova:#x}+0x1000"),
        format!("{FIRST} unmapped 0x10000+0x1000"),
        format!("{FIRST} detached"),
        "context 1 closing, 2 areas".to_owned(),
    ]);
}

/// Maps and unmaps of one thread against the DMA of a device: whether a DMA was let through is what the events before it say.
#[test]
fn what_is_let_through_agrees_with_what_was_heard_before() {
    let m = Machine::new();
    let device = m.device(0);
    let ioas = m.program.ioas(m.iommu);
    m.program.attach(&device, ioas).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                m.map(ioas, 0, 1, 0x10000);
                m.program.unmap(m.iommu, ioas, 0x10000, PAGE).unwrap();
            }
        });
        for _ in 0..150 {
            m.program.device_copies(&device, 0x10000, 0x10800, 64);
        }
    });
    let (mut live, mut dma) = (false, 0);
    for note in m.notes.0.lock().unwrap().iter() {
        match note {
            note if note.contains(" mapped ") => live = true,
            note if note.contains("unmapped") => live = false,
            note if note.contains("reads") || note.contains("writes") => {
                assert_eq!(note.contains("faults"), !live, "{note}");
                dma += 1;
            }
            _ => {}
        }
    }
    assert_eq!(dma, 300);
}

/// Requests with a PASID are heard of by themselves, and so is what they reach.
#[test]
fn a_pasid_is_a_requester_of_its_own() {
    let m = Machine::new();
    let device = m.device(0);
    let (plain, other) = (m.program.ioas(m.iommu), m.program.ioas(m.iommu));
    let table = |ioas| m.program.hwpt_for_pasids(m.iommu, device.id, ioas).unwrap();
    let (plain_table, other_table) = (table(plain), table(other));
    let five = format!("{FIRST} with PASID 5");
    m.map(other, 0, 1, 0x10000);
    m.program.attach(&device, plain_table).unwrap();
    m.program.attach_pasid(&device, 5, other_table).unwrap();
    m.heard(&[format!("{FIRST} attached"), format!("{five} attached"), mapped(&five, 0x10000, 1, 0)]);
    m.map(plain, 1, 1, 0x20000);
    m.map(other, 1, 1, 0x30000);
    m.heard(&[mapped(FIRST, 0x20000, 1, 1), mapped(&five, 0x30000, 1, 1)]);

    m.program.use_pasid(&device, Some(5));
    m.program.device_copies(&device, 0x10000, 0x20000, 16);
    m.heard(&[format!("{five} reads 0x10000+0x10"), format!("{five} writes 0x20000+0x10 and faults")]);
    m.program.attach_pasid(&device, 5, plain_table).unwrap();
    m.heard(&[
        format!("{five} unmapped 0x10000+0x1000"),
        format!("{five} unmapped 0x30000+0x1000"),
        format!("{five} attached"),
        mapped(&five, 0x20000, 1, 1),
    ]);
    m.program.unmap(m.iommu, plain, 0x20000, PAGE).unwrap();
    m.heard(&[format!("{FIRST} unmapped 0x20000+0x1000"), format!("{five} unmapped 0x20000+0x1000")]);
    m.program.detach_pasid(&device, 5).unwrap();
    m.heard(&[format!("{five} detached")]);
    m.program.device_copies(&device, 0x10000, 0x20000, 16);
    m.heard(&[
        format!("{five} reads 0x10000+0x10 and faults"),
        format!("{five} writes 0x20000+0x10 and faults"),
    ]);

    // What is attached when the device is closed is heard of to the end.
    m.program.attach_pasid(&device, 5, other_table).unwrap();
    m.notes.0.lock().unwrap().clear();
    m.program.close(device.fd).unwrap();
    m.heard(&[
        "vfio0 closing, 2 areas".to_owned(),
        format!("{five} unmapped 0x10000+0x1000"),
        format!("{five} unmapped 0x30000+0x1000"),
        format!("{five} detached"),
        format!("{FIRST} detached"),
    ]);
}
