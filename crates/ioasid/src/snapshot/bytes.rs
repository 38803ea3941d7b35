//! A snapshot as bytes.
//!
//! All numbers are little-endian. A snapshot has exactly as many bytes as its counts say, so that nothing is allocated for
//! what is not there.
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0  | 8 | `IOASNAP` and a zero byte |
//! | 8  | 4 | version: 1 |
//! | 12 | 1 | logarithm of the granule |
//! | 13 | 1 | logarithm of the largest leaf |
//! | 14 | 1 | bit 0: there is a limit to the number of mappings; bit 1: mappings are unmapped whole |
//! | 15 | 1 | 0 |
//! | 16 | 8 | the limit, or 0 |
//! | 24 | 8 | number of reserved ranges |
//! | 32 | 8 | number of allowed ranges |
//! | 40 | 8 | number of runs |
//! | 48 | 24 each | reserved ranges by first address: first, last, owner's number |
//! |    | 16 each | allowed ranges, ascending: first, last |
//! |    | 40 each | runs, ascending: first address, number of leaves, number of the memory, offset in it, and 8 bytes: logarithm of the leaves' size, permissions (1 read, 2 write), which leaves begin a mapping (0 none, 1 the first, 2 each), five times 0 |
//! | end - 4 | 4 | CRC-32 of all before |

use super::{BadSnapshot, Begins, LEAVES, Run, Snapshot};
use crate::space::{MappingPolicy, Permissions};
use ioasid_pagetable::{IovaRange, PageSize};

const MAGIC: [u8; 8] = *b"IOASNAP\0";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const RESERVED: usize = 24;
const ALLOWED: usize = 16;
const RUN: usize = 40;
const CHECKSUM: usize = 4;

const LIMITED: u8 = 1;
const WHOLE_ONLY: u8 = 2;

pub(super) fn write(snapshot: &Snapshot) -> Vec<u8> {
    let Snapshot { granule, largest_leaf, policy, reserved, allowed, runs } = snapshot;
    let length = HEADER + reserved.len() * RESERVED + allowed.len() * ALLOWED + runs.len() * RUN + CHECKSUM;
    let mut bytes = Vec::with_capacity(length);
    let limited = if policy.most.is_some() { LIMITED } else { 0 };
    let whole_only = if policy.whole_only { WHOLE_ONLY } else { 0 };
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([granule.log2() as u8, largest_leaf.log2() as u8, limited | whole_only, 0]);
    let mut put = |number: u64| bytes.extend(number.to_le_bytes());
    put(policy.most.unwrap_or(0));
    [reserved.len(), allowed.len(), runs.len()].into_iter().for_each(|count| put(count as u64));
    for (range, owner) in reserved {
        [range.first(), range.last(), *owner].into_iter().for_each(&mut put);
    }
    for range in allowed {
        [range.first(), range.last()].into_iter().for_each(&mut put);
    }
    for run in runs {
        [run.first, run.leaves, run.memory, run.offset].into_iter().for_each(&mut put);
        let read = u8::from(run.permissions.contains(Permissions::READ));
        let write = u8::from(run.permissions.contains(Permissions::WRITE)) << 1;
        put(u64::from_le_bytes([run.leaf.log2() as u8, read | write, run.begins as u8, 0, 0, 0, 0, 0]));
    }
    let checksum = crc32fast::hash(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

/// What is left to read. Its length was compared with the counts before.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadSnapshot> {
        let (array, rest) = self.0.split_first_chunk().ok_or(BadSnapshot::Length)?;
        self.0 = rest;
        Ok(*array)
    }

    fn number(&mut self) -> Result<u64, BadSnapshot> {
        self.array().map(u64::from_le_bytes)
    }

    fn range(&mut self) -> Result<IovaRange, BadSnapshot> {
        let (first, last) = (self.number()?, self.number()?);
        IovaRange::new(first, last).ok_or(BadSnapshot::Content { at: first })
    }
}

pub(super) fn read(bytes: &[u8]) -> Result<Snapshot, BadSnapshot> {
    let mut rest = Rest(bytes);
    if bytes.len() < HEADER + CHECKSUM {
        // The beginning of something else shall be called that, however short.
        let known = bytes.len().min(MAGIC.len());
        return Err(if bytes[..known] == MAGIC[..known] { BadSnapshot::Length } else { BadSnapshot::Magic });
    }
    if rest.array()? != MAGIC {
        return Err(BadSnapshot::Magic);
    }
    let version = u32::from_le_bytes(rest.array()?);
    if version != VERSION {
        return Err(BadSnapshot::Version { version });
    }
    let (content, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
    if crc32fast::hash(content).to_le_bytes() != checksum {
        return Err(BadSnapshot::Checksum);
    }
    let header = |field| BadSnapshot::Header { field };
    let [granule, largest_leaf, flags, zero] = rest.array()?;
    let granule = PageSize::from_log2(granule.into()).ok_or(header("granule"))?;
    let largest_leaf = PageSize::from_log2(largest_leaf.into()).ok_or(header("largest leaf"))?;
    let most = rest.number()?;
    let limited = flags & LIMITED != 0;
    if flags & !(LIMITED | WHOLE_ONLY) != 0 || zero != 0 || (!limited && most != 0) {
        return Err(header("flags"));
    }
    let policy = MappingPolicy { most: limited.then_some(most), whole_only: flags & WHOLE_ONLY != 0 };
    let counts = [rest.number()?, rest.number()?, rest.number()?];
    let sizes = [RESERVED, ALLOWED, RUN];
    // A sum of three products of less than 2^70 each.
    let length =
        counts.iter().zip(sizes).map(|(count, size)| u128::from(*count) * size as u128).sum::<u128>();
    if length != (rest.0.len() - CHECKSUM) as u128 {
        return Err(BadSnapshot::Length);
    }
    let mut reserved = Vec::with_capacity(counts[0] as usize);
    for _ in 0..counts[0] {
        reserved.push((rest.range()?, rest.number()?));
    }
    let mut allowed = Vec::with_capacity(counts[1] as usize);
    for _ in 0..counts[1] {
        allowed.push(rest.range()?);
    }
    let mut runs = Vec::with_capacity(counts[2] as usize);
    for _ in 0..counts[2] {
        runs.push(read_run(&mut rest)?);
    }
    let snapshot = Snapshot { granule, largest_leaf, policy, reserved, allowed, runs };
    check(&snapshot)?;
    Ok(snapshot)
}

fn read_run(rest: &mut Rest<'_>) -> Result<Run, BadSnapshot> {
    let first = rest.number()?;
    let bad = BadSnapshot::Content { at: first };
    let (leaves, memory, offset) = (rest.number()?, rest.number()?, rest.number()?);
    let [leaf, permissions, begins, zeros @ ..] = rest.array::<8>()?;
    let permissions = match permissions {
        1 => Permissions::READ,
        2 => Permissions::WRITE,
        3 => Permissions::READ_WRITE,
        _ => return Err(bad),
    };
    let begins = match begins {
        0 => Begins::Nowhere,
        1 => Begins::First,
        2 => Begins::Each,
        _ => return Err(bad),
    };
    let leaf = PageSize::from_log2(leaf.into()).filter(|_| zeros == [0; 5]).ok_or(bad)?;
    Ok(Run { first, leaves, memory, offset, leaf, permissions, begins })
}

/// What could not be the picture of a space, although every number by itself could.
fn check(snapshot: &Snapshot) -> Result<(), BadSnapshot> {
    let Snapshot { reserved, allowed, runs, .. } = snapshot;
    snapshot.format()?;
    let bad = |range: &IovaRange| BadSnapshot::Content { at: range.first() };
    if let Some(pair) = reserved.windows(2).find(|pair| pair[0].0.first() > pair[1].0.first()) {
        return Err(bad(&pair[1].0));
    }
    ascending(allowed.iter().copied())?;
    let reserved_ranges = || reserved.iter().map(|(range, _)| *range);
    apart(reserved_ranges(), allowed.iter().copied())?;
    let (mut leaves, mut before) = (0u64, None::<&Run>);
    for run in runs {
        let at = run.first;
        let length = run.leaves.checked_mul(run.leaf.bytes());
        let possible = match run.begins {
            Begins::Nowhere => before.is_some_and(|before| {
                let end = before.range().and_then(|range| range.last().checked_add(1));
                before.begins != Begins::Each && end == Some(at)
            }),
            Begins::First => true,
            Begins::Each => run.leaves > 1,
        };
        let fits = run.leaf >= snapshot.granule
            && run.leaf <= snapshot.largest_leaf.max(snapshot.granule)
            && at % run.leaf.bytes() == 0
            && run.offset.checked_add(length.unwrap_or(0)).is_some();
        if run.range().is_none() || !fits || !possible {
            return Err(BadSnapshot::Content { at });
        }
        leaves = leaves.saturating_add(run.leaves);
        before = Some(run);
    }
    if leaves > LEAVES {
        return Err(BadSnapshot::TooManyLeaves);
    }
    ascending(runs.iter().filter_map(Run::range))?;
    apart(reserved_ranges(), runs.iter().filter_map(Run::range))
}

/// Each of the ranges begins behind the one before.
fn ascending(ranges: impl Iterator<Item = IovaRange>) -> Result<(), BadSnapshot> {
    let mut last = None;
    for range in ranges {
        if last.is_some_and(|last| range.first() <= last) {
            return Err(BadSnapshot::Content { at: range.first() });
        }
        last = Some(range.last());
    }
    Ok(())
}

/// No range of the first kind, sorted by their first addresses, overlaps one of the second, which ascend.
fn apart(
    some: impl Iterator<Item = IovaRange>,
    others: impl Iterator<Item = IovaRange>,
) -> Result<(), BadSnapshot> {
    let mut some = some.peekable();
    // The furthest end of those that begin before the end of the other.
    let mut reach = None;
    for other in others {
        while let Some(range) = some.next_if(|range| range.first() <= other.last()) {
            reach = reach.max(Some(range.last()));
        }
        if reach.is_some_and(|reach| reach >= other.first()) {
            return Err(BadSnapshot::Content { at: other.first() });
        }
    }
    Ok(())
}
