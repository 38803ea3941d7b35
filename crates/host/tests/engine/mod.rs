//! Tables of the machine's IOMMU for the engine's own tests.
//!
//! The engine's test programs are built in this crate once more, as they are; their double of an IOMMU hands some of its
//! calls on to a [`HostTable`]. A device is attached to each such table, so that memory is really mapped, and whenever a test
//! looks at the table, what the table says of itself is compared with what the server says.
//!
//! # What is run, program by program
//!
//! | program of `crates/ioasid/tests` | with tables of the machine |
//! |---|---|
//! | `sequences` | all of it: two kinds of devices on tables of the machine beside those of other formats. In `threads` the space then has leaves of a page, and a refused change in place counts as not done |
//! | `tables`, `deferred`, `slices` | the device `DERIVED` has such a table; the tests that need what Linux cannot do are left out, by name, below |
//! | `dma` | no: its devices are programs that walk the double's tables, and the kernel's cannot be walked by a program. `under_run` has real devices do DMA instead. Races of DMA with unmaps have no counterpart here |
//! | `groups` | no: Linux moves the devices of its groups itself, and none of this host's is in one with others |
//! | `shuttle`, `loom` | no: models of schedules, in which no system call can be made |
//! | `allocations`, `iova`, `ledger`, `pasids`, `snapshot`, `sources`, `spaces`, `vm_memory` | no: they have no derived tables of an IOMMU; `files_are_mapped_as_files_and_may_grow` in `under_run` is for `sources` |

#[path = "../machine/mod.rs"]
mod machine;

use super::{AttachError, Bus, Leaf, Observed};
use ioasid::{
    Attributes, Change, DerivedTable, HostBytes, Iommu, IovaRange, Oa, PageSize, Rid, Runs, TableClass,
    TableError,
};
use ioasid_host::{Host, HostOptions, HostTable, MappedArea};
use ioasid_uapi::vfio::{DeviceAttachIommufdPt, DeviceBindIommufd};
use rustix::fd::{AsFd, AsRawFd};
use serde_json::Value;
use std::any::Any;
use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What needs more than Linux can do.
const SKIPPED: &[&str] = &[
    // An area is cut: something is unmapped of a mapping that was made while the table was there, in a space that does not
    // say how finely it will be cut.
    "a_table_holds_what_is_mapped_and_follows_from_then_on",
    "a_table_is_filled_beside_operations_that_run",
    "a_table_that_came_while_operations_ran_is_in_step_when_they_end",
    "an_unmap_that_fails_anywhere_has_not_happened",
    "who_sleeps_in_an_iommu_keeps_only_overlapping_operations_waiting",
    "an_alias_of_what_never_rests_gives_up_and_leaves_nothing",
    "after_a_flush_memory_is_the_programs_own_and_neighbours_never_fault",
    "iommus_are_invalidated_once_for_many_and_before_the_addresses_are_used_again",
    "no_more_ranges_wait_than_there_is_room_for",
    "time_passes_also_when_nobody_calls",
    "whoever_wants_the_addresses_flushes",
    "an_unmap_that_gets_no_slice_back_fails_and_changes_nothing",
    "who_borrows_behind_the_first_look_of_an_unmap_is_seen_at_the_second",
    // Rights or outputs are changed in place.
    "a_mapping_that_comes_while_a_protect_waits_is_protected_whole_or_not_at_all",
    "a_protect_that_fails_anywhere_has_not_happened",
    "a_remap_that_fails_anywhere_has_not_happened",
    "rights_that_are_borrowed_are_not_taken_away",
    "a_change_in_place_and_a_borrower_never_miss_each_other",
    // Areas are split or merged.
    "a_table_that_is_split_says_the_same_in_small_leaves",
    "blocks_plugged_one_by_one_and_merged_are_large_leaves_again",
    // The other way round: a table that has large leaves in a space of small ones. The host's has small areas, too.
    "dropped_memory_leaves_even_a_table_that_cannot_be_cut",
];

/// Whether the double's tables of a format are the machine's.
pub(super) fn makes(format: &str, variant: u64) -> bool {
    match env!("CARGO_CRATE_NAME") {
        "sequences" => format == "amdv1",
        _ => format == "vtdss" && variant == 0,
    }
}

/// The only host.
fn host() -> &'static Arc<Host> {
    static HOST: OnceLock<Arc<Host>> = OnceLock::new();
    HOST.get_or_init(|| {
        let host = Host::open(HostOptions::default()).unwrap();
        host.add_device(RID, machine::device(machine::NATIVE_DEVICES)).unwrap();
        host
    })
}

/// A device that says what class of table it wants.
const RID: Rid = Rid(0);

/// A table of the machine for a space on the bus.
pub(super) fn table(largest_leaf: PageSize, bus: &Arc<Bus>) -> Result<Box<dyn Observed>, AttachError> {
    let class: TableClass = host().requirements(RID).unwrap().class;
    let table = host().new_table(class, largest_leaf, bus)?;
    let mut observed = ObservedTable { probe: None, table, bus: bus.clone() };
    observed.probe = Some(Probe::attach(observed.host_table().ioas()));
    Ok(Box::new(observed))
}

/// A device that is attached to a table of the machine, so that it has to lead somewhere.
#[derive(Debug)]
struct Probe {
    number: usize,
    _file: File,
}

/// Devices that no table has.
fn free_probes() -> std::sync::MutexGuard<'static, Vec<usize>> {
    static FREE: OnceLock<Mutex<Vec<usize>>> = OnceLock::new();
    let first = machine::NATIVE_DEVICES + 1;
    let free = FREE.get_or_init(|| Mutex::new((first..first + machine::RISC_V_DEVICES - 1).collect()));
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probe {
    fn attach(ioas: u32) -> Probe {
        let number = free_probes().pop().expect("more tables than devices");
        let file = File::options().read(true).write(true).open(machine::device(number)).unwrap();
        let iommufd = host().as_fd().as_raw_fd();
        machine::vfio(&file, &mut DeviceBindIommufd { iommufd, ..DeviceBindIommufd::default() });
        machine::vfio(&file, &mut DeviceAttachIommufdPt { pt_id: ioas, ..DeviceAttachIommufdPt::default() });
        Probe { number, _file: file }
    }
}

/// A table under observation.
#[derive(Debug)]
struct ObservedTable {
    probe: Option<Probe>,
    table: Arc<dyn DerivedTable>,
    bus: Arc<Bus>,
}

impl Drop for ObservedTable {
    fn drop(&mut self) {
        // The device has to be closed before somebody else opens it.
        if let Some(Probe { number, _file }) = self.probe.take() {
            drop(_file);
            free_probes().push(number);
        }
    }
}

/// Mapped bytes as the server knows them: first address, length, address or offset of the memory, permissions.
type Piece = (u64, u64, u64, String);

/// Neighbours that say the same, joined.
fn join(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some((first, length, source, rights))
                if *first + *length == piece.0 && *source + *length == piece.2 && *rights == piece.3 =>
            {
                *length += piece.1;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

fn number(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

impl ObservedTable {
    fn host_table(&self) -> &HostTable {
        self.table.as_any().downcast_ref().unwrap()
    }

    /// What an area is to the kernel.
    fn piece(&self, area: &MappedArea) -> Vec<Piece> {
        let MappedArea { range, oa, attributes } = *area;
        let mut rights = String::new();
        for (right, letter) in [(Attributes::READ, 'r'), (Attributes::WRITE, 'w')] {
            rights.extend(attributes.contains(right).then_some(letter));
        }
        let length = range.length().unwrap();
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let oa = oa.get() + done;
            let place = self.bus.locate(Oa::new(oa)).unwrap();
            let within = oa - place.first.get();
            let (HostBytes::Address(start) | HostBytes::File(_, start)) = place.memory else {
                panic!("{place:?}")
            };
            let count = (place.length - within).min(length - done);
            pieces.push((range.first() + done, count, start + within, rights.clone()));
            done += count;
        }
        pieces
    }

    /// What the table says of itself, after a comparison with what the server says.
    fn areas(&self) -> Vec<MappedArea> {
        let table = self.host_table();
        assert_eq!(table.broken(), None);
        let areas = table.areas();
        assert_eq!(areas.len() as u64, table.area_count());
        let status = machine::status();
        let spaces = status["contexts"].as_array().unwrap().iter();
        let spaces = spaces.flat_map(|context| context["address_spaces"].as_array().unwrap());
        let space = spaces.into_iter().find(|space| space["id"] == table.ioas()).unwrap();
        let bytes: u64 = areas.iter().map(|area| area.range.length().unwrap()).sum();
        assert_eq!(space["mapped_bytes"], bytes, "{areas:?}, and the server has {space:#}");
        let there: Vec<Piece> = space["areas"]
            .as_array()
            .unwrap()
            .iter()
            .map(|area| {
                let (first, last) = (number(&area["first"]), number(&area["last"]));
                assert_eq!(area["registered"], true);
                let rights = area["permissions"].as_str().unwrap().to_owned();
                (first, last - first + 1, number(&area["source_offset"]), rights)
            })
            .collect();
        // It shows the first of many.
        let end = there.last().map_or(0, |(first, length, ..)| first + length);
        let here = areas.iter().take_while(|area| area.range.first() < end).flat_map(|area| self.piece(area));
        let (here, there) = (join(here), join(there));
        if space["area_count"].as_u64() == space["areas"].as_array().map(|shown| shown.len() as u64) {
            assert_eq!(here, there);
        } else {
            assert_eq!(here[..here.len().saturating_sub(1)], there[..there.len().saturating_sub(1)]);
        }
        areas
    }
}

/// The largest leaf that a part of an area from an address on has room for.
fn leaf_of(area: &MappedArea, iova: u64) -> Leaf {
    let oa = area.oa.get() + (iova - area.range.first());
    let room = (area.range.last() - iova).checked_add(1).map_or(63, u64::ilog2);
    let log2 = (iova | oa).trailing_zeros().min(room).min(63);
    Leaf { iova, oa: Oa::new(oa), size: PageSize::from_log2(log2).unwrap(), attributes: area.attributes }
}

impl Observed for ObservedTable {
    fn leaves(&self, range: IovaRange) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        let areas = if range == IovaRange::ALL { self.areas() } else { self.host_table().areas() };
        for area in areas.iter().filter(|area| area.range.overlaps(&range)) {
            let mut next = Some(area.range.first());
            while let Some(iova) = next.filter(|iova| *iova <= area.range.last()) {
                let leaf = leaf_of(area, iova);
                next = iova.checked_add(leaf.size.bytes());
                if leaf.range().overlaps(&range) {
                    leaves.push(leaf);
                }
            }
        }
        leaves
    }

    fn leaf_at(&self, iova: u64) -> Option<Leaf> {
        let area = self.host_table().areas().into_iter().find(|area| area.range.contains(iova))?;
        // As a whole, for whoever asks whether it reaches over a boundary.
        let size = PageSize::from_log2(area.range.length()?.next_power_of_two().ilog2())?;
        Some(Leaf { iova: area.range.first(), oa: area.oa, size, attributes: area.attributes })
    }
}

impl DerivedTable for ObservedTable {
    fn map(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.table.map(range, oa, attributes)
    }

    fn fill(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.table.fill(range, oa, attributes)
    }

    fn check(&self, range: IovaRange, change: Change) -> Result<(), TableError> {
        self.table.check(range, change)
    }

    fn reaches_over(&self, at: u64) -> bool {
        self.table.reaches_over(at)
    }

    fn cut(&self, at: u64) -> Result<(), TableError> {
        self.table.cut(at)
    }

    fn unmap(&self, range: IovaRange) {
        self.table.unmap(range);
    }

    fn protect(&self, range: IovaRange, permissions: Attributes) -> Result<(), TableError> {
        self.table.protect(range, permissions)
    }

    fn remap(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.table.remap(range, oa, attributes)
    }

    fn merge(&self, range: IovaRange) -> u64 {
        self.table.merge(range)
    }

    fn invalidate(&self, runs: &Runs) {
        self.table.invalidate(runs);
    }

    fn as_any(&self) -> &dyn Any {
        self.table.as_any()
    }
}
