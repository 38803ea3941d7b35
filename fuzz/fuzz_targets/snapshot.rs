//! Arbitrary bytes as a snapshot of a space.
//!
//! They are either nothing but bytes, or a snapshot that a space gave and in which some numbers were changed, with a
//! checksum that is right again. Whatever is accepted must say the same when it is written again, must be restored as a
//! whole or not at all, and what was restored must give a snapshot of which the same holds.
//!
//! `cargo +nightly fuzz run snapshot -- -max_total_time=60`

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use ioasid::{
    Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, ReservationOwner, Snapshot, Space,
};
use libfuzzer_sys::fuzz_target;

/// Bytes of each memory.
const LENGTH: u64 = 4 << 20;
const PAGE: u64 = 4 << 10;

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    Changed { steps: Vec<Step>, changes: Vec<Change> },
}

#[derive(Arbitrary, Debug)]
enum Step {
    Map { page: u16, memory: u8, from: u16, pages: u16, permissions: u8 },
    Unmap { page: u16, pages: u16 },
    Reserve { page: u16, pages: u16, owner: u64 },
    Allow { page: u16, pages: u16 },
}

/// A number that is set or added to, somewhere behind the magic.
#[derive(Arbitrary, Debug)]
struct Change {
    at: u16,
    value: u64,
    bytes: u8,
    add: bool,
}

fn range(page: u16, pages: u16) -> Option<IovaRange> {
    IovaRange::with_length(u64::from(page) * PAGE, u64::from(pages) * PAGE)
}

fn permissions(bits: u8) -> Permissions {
    [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE][usize::from(bits % 3)]
}

/// Memories by every name there is.
struct Memories([Arc<Memory>; 2]);

impl Memories {
    fn new(bus: &Arc<Bus>) -> Memories {
        let account = Account::new("fuzz", None);
        let register = |_| {
            let backing = Backing::anonymous(bus, LENGTH).expect("memory");
            Memory::register(&backing, 0, LENGTH, &account).expect("registration")
        };
        Memories([0, 1].map(register))
    }

    fn named(&self, name: u64) -> &Arc<Memory> {
        &self.0[(name % 2) as usize]
    }
}

fn original(bus: &Arc<Bus>, memories: &Memories, steps: &[Step]) -> Vec<u8> {
    let space = Space::new(bus);
    for step in steps {
        match *step {
            Step::Map { page, memory, from, pages, permissions: bits } => {
                let (iova, from) = (Iova::new(u64::from(page) * PAGE), u64::from(from) * PAGE);
                let memory = memories.named(memory.into());
                let _ = space.map(iova, memory, from, u64::from(pages) * PAGE, permissions(bits));
            }
            Step::Unmap { page, pages } => drop(range(page, pages).map(|range| space.unmap(range))),
            Step::Reserve { page, pages, owner } => {
                let _ = range(page, pages).map(|range| space.reserve(range, ReservationOwner::User(owner)));
            }
            Step::Allow { page, pages } => {
                let _ = range(page, pages).map(|range| space.set_allowed(&[range]));
            }
        }
    }
    let names = [(0, memories.named(0)), (1, memories.named(1))];
    space.snapshot(names).expect("all memories have names").to_bytes()
}

fn change(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    let content = bytes.len() - 4;
    for change in changes {
        let at = 8 + usize::from(change.at) % (content - 8);
        let field = &mut bytes[at..(at + 1 + usize::from(change.bytes % 8)).min(content)];
        let mut number = [0; 8];
        number[..field.len()].copy_from_slice(field);
        let old = if change.add { u64::from_le_bytes(number) } else { 0 };
        field.copy_from_slice(&old.wrapping_add(change.value).to_le_bytes()[..field.len()]);
    }
    let checksum = crc32fast::hash(&bytes[..content]);
    bytes[content..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fuzz_target!(|input: Input| {
    let bus = Bus::new();
    let memories = Memories::new(&bus);
    let bytes = match input {
        Input::Bytes(bytes) => bytes,
        Input::Changed { steps, changes } => {
            let bytes = original(&bus, &memories, &steps);
            let snapshot = Snapshot::from_bytes(&bytes).expect("what was written is read");
            let restored = snapshot.restore(&bus, |name| Some(memories.named(name).clone()));
            let restored = restored.expect("what was mapped is mapped");
            let names = [(0, memories.named(0)), (1, memories.named(1))];
            assert_eq!(restored.snapshot(names).expect("the same memories"), snapshot);
            change(bytes, &changes)
        }
    };
    let Ok(snapshot) = Snapshot::from_bytes(&bytes) else { return };
    assert_eq!(snapshot.to_bytes(), bytes);
    // Every name is some memory, but none is so long that a run may be.
    let Ok(restored) = snapshot.restore(&bus, |name| Some(memories.named(name).clone())) else { return };
    let names = [(0, memories.named(0)), (1, memories.named(1))];
    let again = restored.snapshot(names).expect("only these memories were mapped");
    assert!(again.leaves() >= snapshot.leaves());
    let third =
        again.restore(&bus, |name| Some(memories.named(name).clone())).expect("it was possible before");
    assert_eq!(third.snapshot(names).expect("the same memories"), again);
});
