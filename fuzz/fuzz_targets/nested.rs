//! A guest that writes anything into its tables, behind which its devices read and write.
//!
//! All of the guest's memory is tables and data alike: sixteen pages in which any word may be an entry, while the space below takes
//! pages away, gives others, and forbids writing. Beside them on the bus lies memory that the guest was never given. Whatever it
//! does, every access ends, nothing of that memory is read, and nothing in it changes.
//!
//! `cargo +nightly fuzz run nested -- -max_total_time=60`

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use ioasid::{
    Account, Backing, Bus, Device, FirstStage, Iova, IovaRange, Memory, Permissions, Rid, Space, Table,
};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{AtomicOperation, DmaSegment, SoftIommu, TableKind};
use libfuzzer_sys::fuzz_target;

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
/// What stands in all words of memory that is somebody else's.
const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec3;
const RW: Permissions = Permissions::READ_WRITE;

#[derive(Arbitrary, Debug)]
struct Input {
    first_stage: u8,
    root: u8,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    /// The guest writes an entry: a page of its own, or any address, and bits around it.
    Entry {
        page: u8,
        index: u8,
        to: Target,
        low: u16,
        high: u8,
    },
    Word {
        page: u8,
        index: u16,
        word: u64,
    },
    Read {
        iova: Address,
        length: u16,
    },
    Write {
        iova: Address,
        length: u16,
    },
    Add {
        iova: Address,
    },
    List {
        iovas: [Address; 3],
    },
    Invalidate {
        iova: Address,
        length: u64,
    },
    Unmap {
        page: u8,
        pages: u8,
    },
    Map {
        page: u8,
        from: u8,
    },
    Protect {
        page: u8,
        pages: u8,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Target {
    Page(u8),
    Far(u64),
}

/// Most are translated by the first few entries of each table.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Near { indexes: [u8; 5], offset: u16 },
    Any(u64),
}

impl Address {
    fn get(self) -> u64 {
        match self {
            Address::Near { indexes, offset } => {
                let bits = indexes.iter().fold(0, |bits, index| bits << 9 | u64::from(index % 3));
                (bits << 12 | u64::from(offset) % PAGE) & (1 << 47) - 1
            }
            Address::Any(address) => address,
        }
    }
}

struct World {
    space: Arc<Space>,
    ram: Arc<Memory>,
    port: Arc<ioasid_soft::iommu::Port>,
    table: Arc<Table>,
}

impl World {
    fn pages(first: u8, count: u8) -> Option<IovaRange> {
        IovaRange::with_length(u64::from(first) % PAGES * PAGE, (1 + u64::from(count) % 4) * PAGE)
    }

    fn set(&self, page: u8, index: u64, word: u64) {
        let place = u64::from(page) % PAGES * PAGE + index % 512 * 8;
        // The guest's processor is not told the secret, and cannot guess it.
        if word != SECRET {
            self.ram.backing().write(place, &word.to_le_bytes()).unwrap();
        }
    }

    fn carry_out(&self, operation: &Operation) {
        let nesting = self.table.nesting().unwrap();
        let mut buffer = [0; 2 * PAGE as usize];
        match *operation {
            Operation::Entry { page, index, to, low, high } => {
                let address = match to {
                    Target::Page(page) => u64::from(page) % PAGES * PAGE,
                    Target::Far(address) => address,
                };
                let shift = match nesting.first_stage() {
                    FirstStage::X86_64 | FirstStage::X86_64La57 => 0,
                    FirstStage::Sv39 | FirstStage::Sv48 | FirstStage::Sv57 => 2,
                };
                let word =
                    (address & !0xfff) >> shift | u64::from(low) & 0xfff >> shift | u64::from(high) << 56;
                self.set(page, (index % 3).into(), word);
            }
            Operation::Word { page, index, word } => self.set(page, index.into(), word),
            Operation::Read { iova, length } => {
                let bytes = &mut buffer[..usize::from(length) % (2 * PAGE as usize)];
                if self.port.read(iova.get(), bytes).is_ok() {
                    let secret = SECRET.to_le_bytes();
                    assert!(!bytes.windows(8).any(|word| word == secret), "another one's memory was read");
                }
            }
            Operation::Write { iova, length } => {
                let _ = self.port.write(iova.get(), &buffer[..usize::from(length) % (2 * PAGE as usize)]);
            }
            Operation::Add { iova } => {
                let _ = self.port.atomic_u64(iova.get() & !7, AtomicOperation::FetchAdd(1));
            }
            Operation::List { iovas } => {
                let list = iovas.map(|iova| DmaSegment { iova: iova.get(), length: 100 });
                let _ = self.port.read_list(&list, &mut buffer);
            }
            Operation::Invalidate { iova, length } => {
                if let Some(range) = IovaRange::with_length(iova.get(), length) {
                    nesting.invalidate(range);
                }
            }
            Operation::Unmap { page, pages } => {
                World::pages(page, pages).map(|pages| self.space.unmap(pages).unwrap());
            }
            Operation::Map { page, from } => {
                let (to, from) = (u64::from(page) % PAGES * PAGE, u64::from(from) % PAGES * PAGE);
                let _ = self.space.map(Iova::new(to), &self.ram, from, PAGE, RW);
            }
            Operation::Protect { page, pages } => {
                World::pages(page, pages).map(|pages| self.space.protect(pages, Permissions::READ));
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let (first_stage, kind) = match input.first_stage % 5 {
        0 => (FirstStage::X86_64, TableKind::VtdSecondStage),
        1 => (FirstStage::X86_64La57, TableKind::Native),
        2 => (FirstStage::Sv39, TableKind::Sv39),
        3 => (FirstStage::Sv48, TableKind::Native),
        _ => (FirstStage::Sv57, TableKind::Sv57),
    };
    let bus = Bus::new();
    let account = Account::new("guest", None);
    let memory = |length| {
        let backing = Backing::anonymous(&bus, length).unwrap();
        Memory::register(&backing, 0, length, &account).unwrap()
    };
    let (ram, other) = (memory(PAGES * PAGE), memory(PAGES * PAGE));
    let secret = SECRET.to_le_bytes().repeat((PAGES * PAGE / 8) as usize);
    other.backing().write(0, &secret).unwrap();
    let space = Space::new(&bus);
    space.map(Iova::new(0), &ram, 0, PAGES * PAGE, RW).unwrap();
    let iommu = SoftIommu::new();
    let port = iommu.add_device(Rid(8), kind).unwrap();
    let device = Device::new(iommu, Rid(8)).unwrap();
    let root = Iova::new(u64::from(input.root) % PAGES * PAGE);
    let table = Table::nested(&space, &device, first_stage, root).unwrap();
    device.attach(&table).unwrap();
    let world = World { space, ram, port, table };
    for operation in input.operations.iter().take(200) {
        world.carry_out(operation);
    }
    let mut found = vec![0; secret.len()];
    other.backing().read(0, &mut found).unwrap();
    assert!(found == secret, "another one's memory was written");
    // What the space has lost, the shadow has not.
    world.space.unmap(IovaRange::ALL).unwrap();
    assert_eq!(world.table.nesting().unwrap().remembered(), 0);
});
