//! An IOMMU for tests: it does what a real one does, checks that the engine keeps its side of the contract, and
//! fails, sleeps or blocks on request.
//!
//! Its derived tables are VT-d second-stage tables, unless a device asks for another format. Every call is checked: no two
//! at the same time for one address (except cuts), no mapping over a mapping, no unmap whose ends were not cut before, no
//! change that is not invalidated.

#![allow(dead_code, reason = "every test program uses its own part of it")]

use ioasid::pagetable::{AmdV1, Format, Native, RiscV, VtdSecondStage, X86_64};
use ioasid::pasid::Pasid;
use ioasid::{
    AttachError, Attributes, Bus, Change, DerivedTable, Device, FirstStage, Iommu, IovaRange, Leaf, Oa,
    PageSize, RadixTable, Requirements, Rid, Runs, Space, Table, TableClass, TableError,
};
use std::any::Any;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use search::CERTAINTY;

pub(crate) mod connected;
pub(crate) mod search;

/// Where these tests are run for the machine's IOMMU, some of the tables are its own.
#[cfg(host_iommu)]
#[path = "../../../host/tests/engine/mod.rs"]
mod host;

/// A mapping as it is compared: first address, bytes, output address, attributes.
pub(crate) type Mapping = (u64, u64, u64, Attributes);

/// Neighbouring leaves that say the same, joined: what is mapped, whatever the leaves are.
fn join(leaves: impl IntoIterator<Item = Leaf>) -> Vec<Mapping> {
    let mut joined: Vec<Mapping> = Vec::new();
    for leaf in leaves {
        let (iova, bytes, oa) = (leaf.iova, leaf.size.bytes(), leaf.oa.get());
        let attributes = leaf.attributes & (Attributes::READ | Attributes::WRITE);
        match joined.last_mut() {
            Some((first, length, first_oa, before))
                if first.checked_add(*length) == Some(iova)
                    && *first_oa + *length == oa
                    && *before == attributes =>
            {
                *length += bytes;
            }
            _ => joined.push((iova, bytes, oa, attributes)),
        }
    }
    joined
}

/// A derived table whose entries can be looked at.
trait Observed: DerivedTable {
    fn leaves(&self, range: IovaRange) -> Vec<Leaf>;

    fn leaf_at(&self, iova: u64) -> Option<Leaf>;
}

impl<F: Format> Observed for RadixTable<F> {
    fn leaves(&self, range: IovaRange) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        self.radix().leaves(range, |leaf| {
            leaves.push(leaf);
            ControlFlow::Continue(())
        });
        leaves
    }

    fn leaf_at(&self, iova: u64) -> Option<Leaf> {
        self.radix().walk(iova).ok()
    }
}

/// What is mapped in the space, by its native table.
pub(crate) fn mappings(space: &Space) -> Vec<Mapping> {
    join(space.leaves(IovaRange::ALL))
}

/// The calls that can be told to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    NewTable,
    Attach,
    Map,
    Fill,
    Cut,
    Protect,
    Remap,
    Split,
}

impl Call {
    pub(crate) const ALL: [Call; 8] = [
        Call::NewTable,
        Call::Attach,
        Call::Map,
        Call::Fill,
        Call::Cut,
        Call::Protect,
        Call::Remap,
        Call::Split,
    ];
}

/// What the double shall do wrong.
#[derive(Debug, Default)]
pub(crate) struct Switches {
    /// Calls of each kind until one fails: 1 is the next; 0: none fails.
    countdown: [AtomicI64; Call::ALL.len()],
    /// The same for calls of any kind.
    any: AtomicU64,
    any_failed: AtomicBool,
    /// A call that fails does its work first and undoes it.
    pub(crate) late: AtomicBool,
    /// A call that fails panics.
    pub(crate) panics: AtomicBool,
    /// Leaves cannot be cut.
    pub(crate) uncuttable: AtomicBool,
    /// Every call sleeps this long.
    pub(crate) sleep_micros: AtomicU64,
    gate: Mutex<Gate>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    closed: Option<Stop>,
    waiting: usize,
}

/// Who stops at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Calls that can fail.
    Calls,
    /// Calls that cut.
    Cuts,
    /// Calls that empty a table.
    Unmaps,
}

impl Switches {
    /// Lets the `number`th call of this kind from now on fail, once.
    pub(crate) fn fail(&self, call: Call, number: i64) {
        self.countdown[call as usize].store(number, Ordering::SeqCst);
    }

    /// Takes back what [`fail`](Self::fail) asked for. Whether the call has failed.
    pub(crate) fn has_failed(&self, call: Call) -> bool {
        self.countdown[call as usize].swap(0, Ordering::SeqCst) <= 0
    }

    /// Lets the `number`th call from now on fail that can, once.
    pub(crate) fn fail_any(&self, number: u64) {
        self.any_failed.store(false, Ordering::SeqCst);
        self.any.store(number, Ordering::SeqCst);
    }

    /// Takes back what [`fail_any`](Self::fail_any) asked for. Whether a call has failed.
    pub(crate) fn any_has_failed(&self) -> bool {
        self.any.store(0, Ordering::SeqCst);
        self.any_failed.swap(false, Ordering::SeqCst)
    }

    fn any_fails(&self) -> bool {
        let left = self.any.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        let fails = left == Ok(1);
        if fails {
            self.any_failed.store(true, Ordering::SeqCst);
        }
        fails
    }

    fn fails(&self, call: Call) -> bool {
        let micros = self.sleep_micros.load(Ordering::Relaxed);
        if micros > 0 {
            std::thread::sleep(Duration::from_micros(micros));
        }
        self.pass_gate(Stop::Calls);
        let countdown = &self.countdown[call as usize];
        let one = countdown.load(Ordering::SeqCst) > 0 && countdown.fetch_sub(1, Ordering::SeqCst) == 1;
        let fails = one || self.any_fails();
        assert!(!(fails && self.panics.load(Ordering::SeqCst)), "the test wants this call to panic");
        fails
    }

    /// Stops these calls at their beginning until the gate is opened.
    pub(crate) fn close_gate(&self, stop: Stop) {
        self.gate.lock().unwrap().closed = Some(stop);
    }

    pub(crate) fn open_gate(&self) {
        self.gate.lock().unwrap().closed = None;
        self.moved.notify_all();
    }

    /// Returns when a call stands at the gate.
    pub(crate) fn wait_for_call(&self) {
        let gate = self.gate.lock().unwrap();
        let (gate, waited) =
            self.moved.wait_timeout_while(gate, CERTAINTY, |gate| gate.waiting == 0).unwrap();
        drop(gate);
        assert!(!waited.timed_out(), "no call came");
    }

    fn pass_gate(&self, stop: Stop) {
        let mut gate = self.gate.lock().unwrap();
        if gate.closed == Some(stop) {
            gate.waiting += 1;
            self.moved.notify_all();
            gate = self.moved.wait_while(gate, |gate| gate.closed == Some(stop)).unwrap();
            gate.waiting -= 1;
        }
    }
}

/// The test's own error.
#[derive(Debug, thiserror::Error)]
#[error("the test wants this call to fail")]
struct Wanted;

fn refused() -> TableError {
    TableError::Refused(Box::new(Wanted))
}

/// Whether a table has refused because the test wanted it, and not for reasons of its own.
pub(crate) fn is_wanted(error: &TableError) -> bool {
    matches!(error, TableError::Refused(source) if source.is::<Wanted>())
}

/// A derived table under observation.
#[derive(Debug)]
pub(crate) struct DoubleTable {
    inner: Box<dyn Observed>,
    /// What a leaf in it says that was made with these attributes.
    says: fn(Attributes) -> Attributes,
    /// Changed, and not invalidated yet.
    changed: Mutex<Vec<IovaRange>>,
    /// A change was refused once.
    refused: AtomicBool,
    switches: Arc<Switches>,
    /// The ranges of the calls that are running, other than cuts.
    running: Mutex<Vec<IovaRange>>,
    /// What was unmapped and not invalidated since: hardware may still be using it.
    stale: Mutex<Vec<IovaRange>>,
    invalidations: AtomicU64,
}

/// A call that is running.
struct Running<'a>(&'a DoubleTable, IovaRange);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = self.0.running.lock().unwrap();
        let index = running.iter().position(|range| *range == self.1).unwrap();
        running.swap_remove(index);
    }
}

impl DoubleTable {
    fn run(&self, range: IovaRange) -> Running<'_> {
        let mut running = self.running.lock().unwrap();
        let clash = running.iter().find(|other| other.overlaps(&range)).copied();
        running.push(range);
        // Other calls go on when this one panics.
        drop(running);
        let running = Running(self, range);
        assert!(clash.is_none(), "two calls at the same time for {range} and {}", clash.unwrap());
        running
    }

    /// Whether something that was unmapped has not been invalidated yet.
    pub(crate) fn is_stale(&self) -> bool {
        !self.stale.lock().unwrap().is_empty()
    }

    /// How often anything was invalidated.
    pub(crate) fn invalidations(&self) -> u64 {
        self.invalidations.load(Ordering::SeqCst)
    }

    /// Hardware that still remembers the former translation would use it in place of a new one.
    fn assert_fresh(&self, range: IovaRange) {
        let stale = self.stale.lock().unwrap();
        let before = stale.iter().find(|stale| stale.overlaps(&range));
        assert!(before.is_none(), "{range} is mapped, but {} was not invalidated", before.unwrap());
    }

    /// What is mapped in it.
    pub(crate) fn mappings(&self) -> Vec<Mapping> {
        join(self.inner.leaves(IovaRange::ALL))
    }

    /// Its leaves.
    pub(crate) fn leaves(&self) -> Vec<Leaf> {
        self.inner.leaves(IovaRange::ALL)
    }

    /// What should be mapped in it, by the native table.
    pub(crate) fn expected(&self, space: &Space) -> Vec<Mapping> {
        let leaves = space.leaves(IovaRange::ALL).into_iter();
        join(leaves.map(|leaf| Leaf { attributes: (self.says)(leaf.attributes), ..leaf }))
    }

    /// Whether devices have been told of everything that has changed.
    pub(crate) fn is_invalidated(&self) -> bool {
        self.changed.lock().unwrap().is_empty()
    }

    /// The sizes of its leaves, and how many there are of each.
    pub(crate) fn leaf_sizes(&self) -> std::collections::BTreeMap<u64, usize> {
        let mut sizes = std::collections::BTreeMap::new();
        for leaf in self.inner.leaves(IovaRange::ALL) {
            *sizes.entry(leaf.size.bytes()).or_default() += 1;
        }
        sizes
    }

    /// Puts leaves back that were there before a change of the range.
    fn put_back(&self, range: IovaRange, before: &[Leaf]) {
        for (iova, length, oa, attributes) in join(before.iter().copied()) {
            let part = IovaRange::with_length(iova, length).unwrap().intersection(&range).unwrap();
            let oa = Oa::new(oa + (part.first() - iova));
            self.inner.remap(part, oa, attributes).unwrap();
        }
    }

    /// The table for a walker of its own.
    pub(crate) fn radix(&self) -> &ioasid::pagetable::Radix<VtdSecondStage> {
        self.inner.as_any().downcast_ref::<RadixTable<VtdSecondStage>>().unwrap().radix()
    }

    /// The translation of one address.
    pub(crate) fn walk(&self, iova: u64) -> Option<(u64, Attributes)> {
        let leaf = self.inner.leaf_at(iova)?;
        Some((leaf.output(iova).get(), leaf.attributes & (Attributes::READ | Attributes::WRITE)))
    }

    fn mappings_in(&self, range: IovaRange) -> Vec<Mapping> {
        join(self.inner.leaves(range))
    }

    fn note<T>(&self, call: Call, result: Result<T, TableError>) -> Result<T, TableError> {
        if result.is_err() {
            self.refused.store(true, Ordering::SeqCst);
            // What follows is the way back, which cannot fail.
            self.switches.countdown[call as usize].store(0, Ordering::SeqCst);
        }
        result
    }

    fn try_protect(&self, range: IovaRange, permissions: Attributes) -> Result<(), TableError> {
        let _running = self.run(range);
        let fails = self.switches.fails(Call::Protect);
        if fails && !self.switches.late.load(Ordering::SeqCst) {
            return Err(refused());
        }
        self.refuse_cuts(range)?;
        let before = self.inner.leaves(range);
        self.changed.lock().unwrap().push(range);
        self.inner.protect(range, permissions)?;
        if fails {
            for leaf in before {
                let part = leaf.range().intersection(&range).unwrap();
                self.inner.protect(part, leaf.attributes).unwrap();
            }
            return Err(refused());
        }
        Ok(())
    }

    fn try_remap(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let _running = self.run(range);
        let fails = self.switches.fails(Call::Remap);
        if fails && !self.switches.late.load(Ordering::SeqCst) {
            return Err(refused());
        }
        self.refuse_cuts(range)?;
        let before = self.inner.leaves(range);
        if self.switches.uncuttable.load(Ordering::SeqCst) {
            let output = |leaf: &Leaf| oa.get().wrapping_add(leaf.iova.wrapping_sub(range.first()));
            if let Some(leaf) = before.iter().find(|leaf| output(leaf) & (leaf.size.bytes() - 1) != 0) {
                return Err(TableError::NeedsBreak { at: leaf.iova });
            }
        }
        self.changed.lock().unwrap().push(range);
        self.inner.remap(range, oa, attributes)?;
        if fails {
            self.put_back(range, &before);
            return Err(refused());
        }
        Ok(())
    }

    fn try_split(&self, range: IovaRange, largest: PageSize) -> Result<bool, TableError> {
        let _running = self.run(range);
        let fails = self.switches.fails(Call::Split);
        if fails && !self.switches.late.load(Ordering::SeqCst) {
            return Err(refused());
        }
        // Leaves may reach over the ends, where others are at work.
        let said = || {
            let inside = |(iova, length, oa, attributes): Mapping| {
                let part = IovaRange::with_length(iova, length).unwrap().intersection(&range).unwrap();
                (part, oa + (part.first() - iova), attributes)
            };
            self.mappings_in(range).into_iter().map(inside).collect::<Vec<_>>()
        };
        let before = said();
        let result = self.inner.split(range, largest);
        assert_eq!(said(), before, "splitting {range} has changed a translation");
        let cut = result?;
        if cut {
            self.changed.lock().unwrap().push(range);
        }
        if fails { Err(refused()) } else { Ok(cut) }
    }

    /// Refuses to change a range at whose ends a leaf would have to be cut, if leaves cannot be cut.
    fn refuse_cuts(&self, range: IovaRange) -> Result<(), TableError> {
        let mut ends = std::iter::once(range.first()).chain(range.last().checked_add(1));
        let uncuttable = self.switches.uncuttable.load(Ordering::SeqCst);
        match ends.find(|at| uncuttable && self.across(*at).is_some()) {
            Some(at) => Err(TableError::CannotCut { at }),
            None => Ok(()),
        }
    }

    /// The leaf that reaches over a boundary.
    fn across(&self, at: u64) -> Option<Leaf> {
        self.inner.leaf_at(at).filter(|leaf| leaf.iova < at)
    }
}

impl DerivedTable for DoubleTable {
    fn map(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let _running = self.run(range);
        self.assert_fresh(range);
        let fails = self.switches.fails(Call::Map);
        if fails && !self.switches.late.load(Ordering::SeqCst) {
            return Err(refused());
        }
        self.inner.map(range, oa, attributes)?;
        if fails {
            self.inner.unmap(range);
            return Err(refused());
        }
        Ok(())
    }

    fn fill(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let _running = self.run(range);
        self.assert_fresh(range);
        let fails = self.switches.fails(Call::Fill);
        if !fails || self.switches.late.load(Ordering::SeqCst) {
            self.inner.fill(range, oa, attributes)?;
        }
        if fails { Err(refused()) } else { Ok(()) }
    }

    fn check(&self, range: IovaRange, change: Change) -> Result<(), TableError> {
        self.inner.check(range, change)
    }

    fn reaches_over(&self, _at: u64) -> bool {
        self.switches.pass_gate(Stop::Cuts);
        true
    }

    fn cut(&self, at: u64) -> Result<(), TableError> {
        if self.switches.fails(Call::Cut) {
            return Err(refused());
        }
        if self.switches.uncuttable.load(Ordering::SeqCst) {
            return if self.across(at).is_some() { Err(TableError::CannotCut { at }) } else { Ok(()) };
        }
        self.inner.cut(at)
    }

    fn unmap(&self, range: IovaRange) {
        let _running = self.run(range);
        self.switches.pass_gate(Stop::Unmaps);
        for at in std::iter::once(range.first()).chain(range.last().checked_add(1)) {
            assert!(self.across(at).is_none(), "unmap of {range} across a leaf at {at:#x}");
        }
        self.inner.unmap(range);
        self.stale.lock().unwrap().push(range);
    }

    fn protect(&self, range: IovaRange, permissions: Attributes) -> Result<(), TableError> {
        self.note(Call::Protect, self.try_protect(range, permissions))
    }

    fn remap(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.note(Call::Remap, self.try_remap(range, oa, attributes))
    }

    fn merge(&self, range: IovaRange) -> u64 {
        let _running = self.run(range);
        let before = self.mappings_in(range);
        let merged = self.inner.merge(range);
        assert_eq!(self.mappings_in(range), before, "merging {range} has changed a translation");
        if merged > 0 {
            self.changed.lock().unwrap().push(range);
        }
        merged
    }

    fn split(&self, range: IovaRange, largest: PageSize) -> Result<bool, TableError> {
        self.note(Call::Split, self.try_split(range, largest))
    }

    fn invalidate(&self, runs: &Runs) {
        assert!(!runs.is_empty(), "nothing to invalidate");
        self.invalidations.fetch_add(1, Ordering::SeqCst);
        self.stale.lock().unwrap().retain(|stale| !runs.iter().any(|run| run.covers(stale)));
        for run in runs.iter() {
            let unchanged = {
                let mut changed = self.changed.lock().unwrap();
                let before = changed.len();
                changed.retain(|range| !run.covers(range));
                changed.len() == before
            };
            // After a refusal the engine cannot know how far the table had got.
            if unchanged && !self.refused.load(Ordering::SeqCst) {
                let leaves = self.inner.leaves(run);
                assert!(leaves.is_empty(), "{leaves:?} are to be invalidated but still mapped");
            }
        }
    }

    fn table_bytes(&self) -> Option<u64> {
        self.inner.table_bytes()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An IOMMU with devices of any requirements.
#[derive(Debug)]
pub(crate) struct Double {
    devices: HashMap<Rid, Requirements>,
    attached: Mutex<HashMap<Rid, Arc<Table>>>,
    with_pasid: Mutex<HashMap<(Rid, Pasid), Arc<Table>>>,
    tables: Mutex<Vec<Weak<DoubleTable>>>,
    pub(crate) switches: Arc<Switches>,
}

/// Devices that walk the native table.
pub(crate) const NATIVE: Rid = Rid(1);
pub(crate) const NATIVE_TOO: Rid = Rid(2);
/// Devices that share a derived table.
pub(crate) const DERIVED: Rid = Rid(0x10);
pub(crate) const DERIVED_TOO: Rid = Rid(0x11);
/// One more, which takes no mappings in one more place.
pub(crate) const PARTICULAR: Rid = Rid(0x12);
/// A device with a derived table of another kind, without leaves of 1 GiB.
pub(crate) const SMALL: Rid = Rid(0x20);

/// A device with a derived table of yet another kind, that reserves nothing.
pub(crate) const WIDE: Rid = Rid(0x30);

/// Devices with derived tables of other formats, which reserve nothing.
pub(crate) const AMD: Rid = Rid(0x40);
pub(crate) const AMD_ALL_SIZES: Rid = Rid(0x41);
pub(crate) const X86: Rid = Rid(0x50);
pub(crate) const RISC_V: Rid = Rid(0x60);
pub(crate) const OWN_NATIVE: Rid = Rid(0x70);

/// What a format says that cannot forbid reading what may be written.
fn readable(attributes: Attributes) -> Attributes {
    if attributes.contains(Attributes::WRITE) { attributes | Attributes::READ } else { attributes }
}

/// What sign-extended tables can translate on this side of the gap.
fn lower_half() -> IovaRange {
    IovaRange::new(0, (1 << 47) - 1).unwrap()
}

/// The interrupt window of x86.
pub(crate) fn interrupts() -> IovaRange {
    IovaRange::new(0xfee0_0000, 0xfeef_ffff).unwrap()
}

/// Where a `SMALL` or `PARTICULAR` device takes no mappings either.
pub(crate) fn also_reserved() -> IovaRange {
    IovaRange::new(0x2_8000, 0x2_bfff).unwrap()
}

/// What the derived tables can translate.
pub(crate) fn aperture() -> IovaRange {
    IovaRange::new(0, (1 << 48) - 1).unwrap()
}

impl Double {
    pub(crate) fn new() -> Arc<Double> {
        let native = Requirements {
            class: TableClass::NATIVE,
            aperture: IovaRange::ALL,
            reserved: Vec::new(),
            snooping_class: None,
            no_snoop: false,
        };
        let of_variant = |variant| Requirements {
            class: TableClass::Derived { iommu: 1, format: "vtdss", variant },
            aperture: aperture(),
            reserved: vec![interrupts()],
            snooping_class: None,
            no_snoop: false,
        };
        let of_format = |format, variant| Requirements {
            class: TableClass::Derived { iommu: 1, format, variant },
            aperture: lower_half(),
            reserved: Vec::new(),
            snooping_class: None,
            no_snoop: false,
        };
        let devices = [
            (NATIVE, native.clone()),
            (NATIVE_TOO, native),
            (DERIVED, of_variant(0)),
            (DERIVED_TOO, of_variant(0)),
            (PARTICULAR, Requirements { reserved: vec![interrupts(), also_reserved()], ..of_variant(0) }),
            (WIDE, Requirements { aperture: IovaRange::ALL, reserved: Vec::new(), ..of_variant(2) }),
            (AMD, of_format("amdv1", 0)),
            (AMD_ALL_SIZES, of_format("amdv1", 1)),
            (X86, of_format("x86_64", 0)),
            (RISC_V, of_format("riscv", 0)),
            (OWN_NATIVE, of_format("native", 0)),
            (SMALL, Requirements { reserved: vec![interrupts(), also_reserved()], ..of_variant(1) }),
        ];
        Arc::new(Double {
            devices: devices.into(),
            attached: Mutex::default(),
            with_pasid: Mutex::default(),
            tables: Mutex::default(),
            switches: Arc::default(),
        })
    }

    pub(crate) fn device(self: &Arc<Self>, rid: Rid) -> Device {
        Device::new(self.clone(), rid).unwrap()
    }

    /// A device attached to the table of the space that its class shares.
    pub(crate) fn attached(self: &Arc<Self>, rid: Rid, space: &Arc<Space>) -> Device {
        let device = self.device(rid);
        device.attach(&Table::for_device(space, &device).unwrap()).unwrap();
        device
    }

    /// Where the device's DMA goes.
    pub(crate) fn table_of(&self, rid: Rid) -> Option<Arc<Table>> {
        self.attached.lock().unwrap().get(&rid).cloned()
    }

    /// Where the device's DMA with this PASID goes.
    pub(crate) fn table_of_pasid(&self, rid: Rid, pasid: Pasid) -> Option<Arc<Table>> {
        self.with_pasid.lock().unwrap().get(&(rid, pasid)).cloned()
    }

    /// All derived tables that exist, oldest first.
    pub(crate) fn tables(&self) -> Vec<Arc<DoubleTable>> {
        self.tables.lock().unwrap().iter().filter_map(Weak::upgrade).collect()
    }
}

impl Iommu for Double {
    fn requirements(&self, device: Rid) -> Option<Requirements> {
        self.devices.get(&device).cloned()
    }

    fn first_stages(&self, device: Rid) -> &'static [FirstStage] {
        if device == NATIVE || device == NATIVE_TOO { &[FirstStage::X86_64] } else { &[] }
    }

    fn new_table(
        &self,
        class: TableClass,
        _largest_leaf: PageSize,
        _bus: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        if self.switches.fails(Call::NewTable) {
            return Err(TableError::OutOfTables.into());
        }
        let TableClass::Derived { format, variant, .. } = class else { panic!("asked for a native table") };
        let plain: fn(Attributes) -> Attributes = |attributes| attributes;
        let vtd = VtdSecondStage::new(4).unwrap();
        let single = AmdV1::new().with_leaf_sizes(1 << 12 | 1 << 21 | 1 << 30);
        let (inner, says): (Box<dyn Observed>, _) = match format {
            #[cfg(host_iommu)]
            _ if host::makes(format, variant) => (host::table(_largest_leaf, _bus)?, plain),
            "amdv1" if variant == 0 => (Box::new(RadixTable::new(single)), plain),
            "amdv1" => (Box::new(RadixTable::new(AmdV1::new())), plain),
            "x86_64" => (Box::new(RadixTable::new(X86_64::new(4).unwrap())), readable),
            "riscv" => (Box::new(RadixTable::new(RiscV::new(4).unwrap())), readable),
            "native" => (Box::new(RadixTable::new(Native::new())), plain),
            _ if variant == 0 => (Box::new(RadixTable::new(vtd)), plain),
            _ => (Box::new(RadixTable::new(vtd.with_large_pages(2 << 20))), plain),
        };
        let table = Arc::new(DoubleTable {
            inner,
            says,
            changed: Mutex::default(),
            refused: AtomicBool::new(false),
            switches: self.switches.clone(),
            running: Mutex::default(),
            stale: Mutex::default(),
            invalidations: AtomicU64::new(0),
        });
        self.tables.lock().unwrap().push(Arc::downgrade(&table));
        Ok(table)
    }

    fn attach(&self, device: Rid, table: &Arc<Table>) -> Result<(), AttachError> {
        if self.switches.fails(Call::Attach) {
            return Err(refused().into());
        }
        let before = self.attached.lock().unwrap().insert(device, table.clone());
        if let Some(before) = before {
            before.wait_for_dma();
        }
        Ok(())
    }

    fn block(&self, device: Rid) {
        let before = self.attached.lock().unwrap().remove(&device);
        if let Some(before) = before {
            before.wait_for_dma();
        }
    }

    fn attach_pasid(&self, device: Rid, pasid: Pasid, table: &Arc<Table>) -> Result<(), AttachError> {
        if self.switches.fails(Call::Attach) {
            return Err(refused().into());
        }
        let before = self.with_pasid.lock().unwrap().insert((device, pasid), table.clone());
        if let Some(before) = before {
            before.wait_for_dma();
        }
        Ok(())
    }

    fn block_pasid(&self, device: Rid, pasid: Pasid) {
        let before = self.with_pasid.lock().unwrap().remove(&(device, pasid));
        if let Some(before) = before {
            before.wait_for_dma();
        }
    }
}

/// A space whose leaves are no larger than 2^`log2` bytes.
pub(crate) fn space_of_leaves(bus: &Arc<Bus>, log2: u32) -> Arc<Space> {
    let largest = ioasid::PageSize::from_log2(log2).unwrap();
    Space::with_format(bus, Native::new().with_largest_leaf(largest))
}
