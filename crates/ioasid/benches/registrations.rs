//! What registering costs: a million separate pieces of 4 KiB, registered and mapped.
//!
//! The peer is an insertion into a `BTreeMap`, which is what a VMM that keeps a list of its mappings does for each of
//! them. All are measured in turn in the same run; printed are nanoseconds for each piece, the fastest and the middle
//! round.
//!
//! ```text
//! cargo bench -p ioasid --bench registrations [-- PART-OF-A-NAME]
//! ```

use ioasid::{Account, Backing, Bus, Iova, Memory, Permissions, Space};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

const K4: u64 = 1 << 12;
const PIECES: u64 = 1_000_000;
const ROUNDS: usize = 5;

/// The time that this thread has had on a processor; what else the machine does is left out as far as that goes.
struct Clock(Duration);

impl Clock {
    fn now() -> Clock {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Clock(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    fn elapsed(&self) -> Duration {
        Clock::now().0 - self.0
    }
}

/// A fixed random order (xorshift, Fisher-Yates).
fn shuffled(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}

/// Registers, and maps if `map`, pages of an object at `stride` pages from one another, each once.
fn register(order: &[u64], stride: u64, map: bool, account: &Account) -> Duration {
    let bus = Bus::new();
    let backing = Backing::anonymous(&bus, PIECES * stride * K4).unwrap();
    let space = Space::new(&bus);
    let mut memories: Vec<Arc<Memory>> = Vec::with_capacity(order.len());
    let start = Clock::now();
    for piece in order {
        let offset = piece * stride * K4;
        let memory = Memory::register(&backing, offset, K4, account).unwrap();
        if map {
            space.map(Iova::new(offset), &memory, 0, K4, Permissions::READ_WRITE).unwrap();
        }
        memories.push(memory);
    }
    let elapsed = start.elapsed();
    if std::env::var_os("LEAK").is_some() {
        std::mem::forget((memories, backing, space));
    }
    elapsed
}

fn insert(order: &[u64]) -> Duration {
    let mut map = BTreeMap::new();
    let start = Clock::now();
    for piece in order {
        // First address, and what a mapping needs to say: length, memory, permissions.
        map.insert(piece * K4, (K4, *piece, 3u64));
    }
    let elapsed = start.elapsed();
    black_box(&map);
    elapsed
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let in_order: Vec<u64> = (0..PIECES).collect();
    let random = shuffled(PIECES);
    let account = Account::new("bench", None);
    let rows: [(&str, &dyn Fn() -> Duration); 8] = [
        ("in order, register", &|| register(&in_order, 1, false, &account)),
        ("in order, register and map", &|| register(&in_order, 1, true, &account)),
        ("in order, every other page, register and map", &|| register(&in_order, 2, true, &account)),
        ("in order, BTreeMap insert", &|| insert(&in_order)),
        ("random order, register", &|| register(&random, 1, false, &account)),
        ("random order, register and map", &|| register(&random, 1, true, &account)),
        ("random order, every other page, register and map", &|| register(&random, 2, true, &account)),
        ("random order, BTreeMap insert", &|| insert(&random)),
    ];
    let wanted = |name: &str| filter.as_deref().is_none_or(|filter| name.contains(filter));
    let mut times = vec![Vec::new(); rows.len()];
    for _ in 0..ROUNDS {
        for ((name, row), times) in rows.iter().zip(&mut times) {
            if wanted(name) {
                times.push(row());
            }
        }
    }
    for ((name, _), mut times) in rows.iter().zip(times) {
        times.sort_unstable();
        let each = |time: Duration| time.as_nanos() as f64 / PIECES as f64;
        if let (Some(fastest), Some(middle)) = (times.first(), times.get(times.len() / 2)) {
            println!("{name:52} {:6.0} ns  (median {:6.0} ns)", each(*fastest), each(*middle));
        }
    }
}
