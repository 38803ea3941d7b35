//! Spaces for devices of rust-vmm.
//!
//! Such devices are written against vm-memory: they name memory by guest addresses, and an
//! [`IommuMemory`](vm_memory::iommu::IommuMemory) in between turns I/O addresses into these. What it asks is the trait
//! [`vm_memory::iommu::Iommu`], which [`SpaceIommu`] implements on a [`Space`]: the device sees exactly what is mapped in the space,
//! by the same table that all other devices of the space use, and without a change to the device.
//!
//! # From the bus to guest addresses
//!
//! A leaf of the space leads to an output address, and vm-memory wants a guest address. [`GuestRam`] knows both of every
//! region that was plugged in. It holds a registration of its own for each, so that the output addresses stay what they are
//! until the region is unplugged. Spaces of the same guest share it.
//!
//! # No IOTLB to go stale
//!
//! vm-memory would have each IOMMU keep a cache, an `Iotlb`, which has to be invalidated beside every unmap. Here each
//! translation is a fresh one that holds what the access needs and nothing else; the walk behind it is cheaper than a look
//! into that cache. An unmapped address faults from the moment it is unmapped.
//!
//! What vm-memory gives a device to copy from and to are slices of the mapped region, and a device may hold on to them. No unmap
//! can wait for them, other than for DMA through the engine. The region's memory itself stays, so a late copy is one
//! that a slow device could have made as well, but whoever needs strictness has the device stop first.

use crate::backing::{Backing, RegionError};
use crate::bus::Bus;
use crate::ledger::Account;
use crate::memory::{Memory, RegisterError};
use crate::space::{Permissions, Space};
use arc_swap::ArcSwap;
use ioasid_pagetable::{Attributes, Iova, Leaf};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::bitmap::Bitmap;
use vm_memory::iommu::{Error, Iommu, Iotlb, IotlbIterator, IovaRange};
use vm_memory::{Address, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

/// Where the regions of a guest's memory stand on a bus.
#[derive(Debug)]
pub struct GuestRam {
    bus: Arc<Bus>,
    /// The runs by output address, for translations.
    runs: ArcSwap<Vec<Run>>,
    /// The regions that are plugged in. Held while one comes or goes.
    regions: Mutex<Vec<Region>>,
}

/// Output addresses that stand for consecutive guest addresses.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    last: u64,
    guest: u64,
}

#[derive(Debug)]
struct Region {
    base: GuestAddress,
    last: GuestAddress,
    /// Keeps the region's output addresses.
    _memory: Arc<Memory>,
}

/// Why a region was not plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The region cannot be used.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The region's memory was not registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Its memory or some of its guest addresses are taken.
    #[error("the memory of the region, or another region at its guest addresses, is plugged in already")]
    AlreadyPlugged,
}

impl GuestRam {
    /// A guest without memory.
    pub fn new(bus: &Arc<Bus>) -> Arc<GuestRam> {
        Arc::new(GuestRam { bus: bus.clone(), runs: ArcSwap::default(), regions: Mutex::default() })
    }

    /// Registers a region, charged to `account`, and lets translations find it. What is returned is for mapping it.
    ///
    /// # Errors
    ///
    /// [`PlugError`]; then nothing is charged.
    pub fn plug<B>(&self, region: &GuestRegionMmap<B>, account: &Account) -> Result<Arc<Memory>, PlugError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, last) = (region.start_addr(), region.last_addr());
        if regions.iter().any(|other| other.base <= last && first <= other.last) {
            return Err(PlugError::AlreadyPlugged);
        }
        let (backing, offset) = Backing::guest_region(&self.bus, region)?;
        // One registration is ours, and cannot be given back in parts by anybody; the other is the caller's.
        let ours = Memory::register(&backing, offset, region.len(), account)?;
        let theirs = Memory::register(&backing, offset, region.len(), account)?;
        let mut runs = Vec::clone(&self.runs.load());
        let mut guest = region.start_addr().raw_value();
        for piece in ours.pieces(0, region.len()).into_iter().flatten() {
            let run = Run { first: piece.oa.get(), last: piece.last(), guest };
            let index = runs.partition_point(|other| other.last < run.first);
            if runs.get(index).is_some_and(|other| other.first <= run.last) {
                return Err(PlugError::AlreadyPlugged);
            }
            runs.insert(index, run);
            guest = guest.wrapping_add(piece.length);
        }
        self.runs.store(Arc::new(runs));
        regions.push(Region { base: first, last, _memory: ours });
        Ok(theirs)
    }

    /// Forgets the region that begins at a guest address; whether there was one. Translations that lead there fault
    /// from now on. When the memory that [`plug`](Self::plug) has returned is dropped as well, it is unmapped everywhere.
    pub fn unplug(&self, base: GuestAddress) -> bool {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = regions.iter().position(|region| region.base == base) else { return false };
        let region = regions.swap_remove(index);
        let guest = region.base.raw_value()..=region.last.raw_value();
        let mut runs = Vec::clone(&self.runs.load());
        runs.retain(|run| !guest.contains(&run.guest));
        self.runs.store(Arc::new(runs));
        true
    }

    /// The guest address that an output address stands for, and how many bytes more follow it.
    fn find(runs: &[Run], oa: u64) -> Option<(u64, u64)> {
        let run = runs.get(runs.partition_point(|run| run.last < oa)).filter(|run| run.first <= oa)?;
        Some((run.guest + (oa - run.first), run.last - oa))
    }
}

/// A space as the IOMMU of devices that are written against vm-memory.
///
/// ```
/// use ioasid::{Account, Bus, GuestRam, Iova, IovaRange, Permissions, Space, SpaceIommu};
/// use vm_memory::iommu::IommuMemory;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x10_0000), 0x4000)])?;
/// let bus = Bus::new();
/// let ram = GuestRam::new(&bus);
/// let region = guest.find_region(GuestAddress(0x10_0000)).unwrap();
/// let memory = ram.plug(region, &Account::new("guest", None))?;
///
/// let space = Space::new(&bus);
/// space.map(Iova::new(0x8000_0000), &memory, 0x1000, 0x1000, Permissions::READ_WRITE)?;
///
/// // What a device is given in place of guest memory:
/// let seen = IommuMemory::new(guest.clone(), SpaceIommu::new(&space, &ram), true, ());
/// seen.write_obj(42u32, GuestAddress(0x8000_0010))?;
/// assert_eq!(guest.read_obj::<u32>(GuestAddress(0x10_1010))?, 42);
///
/// space.unmap(IovaRange::with_length(0x8000_0000, 0x1000).unwrap())?;
/// assert!(seen.read_obj::<u32>(GuestAddress(0x8000_0010)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct SpaceIommu {
    space: Arc<Space>,
    ram: Arc<GuestRam>,
}

/// One translation, as vm-memory wants to hold it.
#[derive(Debug)]
pub struct Translation(Iotlb);

impl Deref for Translation {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0
    }
}

/// Why an access ends at an address.
enum Fault {
    NotMapped,
    NoPermission,
    NotRam,
    PastTheEnd,
}

impl Fault {
    fn reason(&self) -> &'static str {
        match self {
            Fault::NotMapped => "nothing is mapped there",
            Fault::NoPermission => "the mapping does not permit it",
            Fault::NotRam => "the mapping leads to no memory of the guest",
            Fault::PastTheEnd => "vm-memory cannot name the last byte of 2^64",
        }
    }
}

impl SpaceIommu {
    /// Translates by what is mapped in the space, to regions of the guest's memory that are plugged in.
    pub fn new(space: &Arc<Space>, ram: &Arc<GuestRam>) -> SpaceIommu {
        SpaceIommu { space: space.clone(), ram: ram.clone() }
    }

    /// The space.
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// Enters all that an access needs, from its first address up to the end. On a fault, says from which address on.
    fn collect(
        &self,
        iotlb: &mut Iotlb,
        first: u64,
        end: u64,
        access: vm_memory::Permissions,
    ) -> Result<(), (u64, Fault)> {
        let runs = self.ram.runs.load();
        let mut leaf: Option<Leaf> = None;
        let mut at = first;
        while at < end {
            let covering = leaf.filter(|leaf| leaf.range().contains(at));
            let found = covering.or_else(|| self.space.walk(Iova::new(at))).ok_or((at, Fault::NotMapped))?;
            leaf = Some(found);
            let permissions = permissions(&found);
            if !permissions.allow(access) {
                return Err((at, Fault::NoPermission));
            }
            let oa = found.output(at).get();
            let (guest, more) = GuestRam::find(&runs, oa).ok_or((at, Fault::NotRam))?;
            // Neither the leaf nor the run nor the access goes on behind this.
            let last = found.range().last().min(at.saturating_add(more)).min(end - 1);
            let length = usize::try_from(last - at + 1).map_err(|_| (at, Fault::PastTheEnd))?;
            iotlb
                .set_mapping(GuestAddress(at), GuestAddress(guest), length, permissions)
                .map_err(|_| (at, Fault::NotMapped))?;
            at = last + 1;
        }
        Ok(())
    }
}

fn permissions(leaf: &Leaf) -> vm_memory::Permissions {
    let permissions = Permissions::of(leaf.attributes).attributes();
    match (permissions.contains(Attributes::READ), permissions.contains(Attributes::WRITE)) {
        (true, true) => vm_memory::Permissions::ReadWrite,
        (true, false) => vm_memory::Permissions::Read,
        (false, true) => vm_memory::Permissions::Write,
        (false, false) => vm_memory::Permissions::No,
    }
}

impl Iommu for SpaceIommu {
    type IotlbGuard<'a> = Translation;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: vm_memory::Permissions,
    ) -> Result<IotlbIterator<Translation>, Error> {
        let unresolved = |at: u64, fault: &Fault| Error::CannotResolve {
            iova_range: IovaRange { base: GuestAddress(at), length: length - (at - iova.0) as usize },
            reason: fault.reason().to_owned(),
        };
        // The lookup below takes the end for an address, too.
        let end = iova.0.checked_add(length as u64).ok_or_else(|| unresolved(iova.0, &Fault::PastTheEnd))?;
        let mut iotlb = Iotlb::new();
        self.collect(&mut iotlb, iova.0, end, access).map_err(|(at, fault)| unresolved(at, &fault))?;
        Iotlb::lookup(Translation(iotlb), iova, length, access)
            .map_err(|_| unresolved(iova.0, &Fault::NotMapped))
    }
}
