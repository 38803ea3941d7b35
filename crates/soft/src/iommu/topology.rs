//! How a machine's devices are connected, as far as their IOMMU is concerned by it.
//!
//! PCI functions are leaves of a tree of bridges. A function's place is its requester ID: the number in front is that of its
//! bus, and a bus is *secondary* to the bridge above it. What follows from the tree is which functions the IOMMU, at the
//! root, can tell apart and keep apart:
//!
//! - A bridge from PCI Express to conventional PCI takes the requests of all that is behind it upon itself: they go on with
//!   its secondary bus number, device 0, function 0 (PCI Express to PCI/PCI-X Bridge Specification 1.0, section 2.3). What
//!   shares a conventional bus reaches each other there, too.
//! - A port (a root port, or a downstream port of a switch) without Access Control Services hands a request on to another
//!   port of the same bus if the address is there (PCI Express Base Specification, section 6.12). With them it sends it up,
//!   to the IOMMU. So all that is below ports of one bus is one group, unless all these ports have them.
//! - Functions of one device may reach each other within it, unless each has Access Control Services.
//!
//! The sets that follow from this are inside each other or apart, as subtrees are. So a function's group is the outermost set
//! that it is in, and one walk up to the root finds it.

use ioasid::Rid;
use std::collections::{BTreeMap, BTreeSet};

/// How devices are connected. Where nothing is said, functions are alone, on a bus of their own root.
///
/// ```
/// use ioasid::Rid;
/// use ioasid_soft::iommu::{Bridge, Topology};
///
/// // Behind 00:1c.0 is a bridge to the conventional bus 2.
/// let topology = Topology::new()
///     .bridge(Rid(0x00e0), 1, Bridge::Port { acs: true })?
///     .bridge(Rid(0x0100), 2, Bridge::ToConventional)?;
/// assert_eq!(topology.requester(Rid(0x0208)), Rid(0x0200));
/// assert!(topology.same_group(Rid(0x0208), Rid(0x0210)));
/// assert!(!topology.same_group(Rid(0x0208), Rid(0x0300)));
/// # Ok::<(), ioasid_soft::iommu::TopologyError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// By the bus behind it.
    bridges: BTreeMap<u8, (Rid, Bridge)>,
    /// The devices, by their first function, that do not keep their functions apart.
    shared: BTreeSet<Rid>,
}

/// A kind of bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bridge {
    /// A root port or a switch's port.
    Port {
        /// Whether Access Control Services send all requests up.
        acs: bool,
    },
    /// From PCI Express to conventional PCI.
    ToConventional,
}

/// There can be no such bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// Bus numbers grow away from the root.
    #[error(
        "bus {secondary:#04x} cannot be behind bridge {at}: buses have greater numbers than those above them"
    )]
    Order {
        /// The bridge's own requester ID.
        at: Rid,
        /// The bus.
        secondary: u8,
    },
    /// The bus is behind another bridge.
    #[error("bus {secondary:#04x} cannot be behind bridge {at}: it is behind {other}")]
    Taken {
        /// The bridge's own requester ID.
        at: Rid,
        /// The bus.
        secondary: u8,
        /// The other bridge's.
        other: Rid,
    },
}

/// A set of functions that are not kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Function(Rid),
    /// The functions of a device, by the first.
    Device(Rid),
    /// All below the ports of a bus.
    Ports(u8),
    /// All on a bus and below it.
    Bus(u8),
}

fn bus(rid: Rid) -> u8 {
    (rid.0 >> 8) as u8
}

fn first_function(rid: Rid) -> Rid {
    Rid(rid.0 & !7)
}

impl Topology {
    /// One without bridges.
    pub fn new() -> Topology {
        Topology::default()
    }

    /// The same with a bridge, which is where its requester ID says and has the bus `secondary` behind it.
    ///
    /// # Errors
    /// Another bridge has that bus, or its number is not greater than that of the bus that the bridge is on.
    pub fn bridge(mut self, at: Rid, secondary: u8, kind: Bridge) -> Result<Topology, TopologyError> {
        if secondary <= bus(at) {
            return Err(TopologyError::Order { at, secondary });
        }
        if let Some((other, _)) = self.bridges.get(&secondary) {
            return Err(TopologyError::Taken { at, secondary, other: *other });
        }
        self.bridges.insert(secondary, (at, kind));
        Ok(self)
    }

    /// The same with a device whose functions reach each other. Any of its functions may be named.
    pub fn shared_functions(mut self, function: Rid) -> Topology {
        self.shared.insert(first_function(function));
        self
    }

    /// The bridges from a bus to the root, with the bus behind each. Ends, since the bus numbers fall.
    fn upwards(&self, from: u8) -> impl Iterator<Item = (u8, Rid, Bridge)> + '_ {
        let above = move |bus: u8| self.bridges.get(&bus).map(|(at, kind)| (bus, *at, *kind));
        std::iter::successors(above(from), move |(_, at, _)| above(bus(*at)))
    }

    /// The requester ID with which requests of a function arrive at the root: its own, or that of the bridge to conventional
    /// PCI on their way that is nearest to the root.
    pub fn requester(&self, function: Rid) -> Rid {
        let conventional = self.upwards(bus(function)).filter(|(_, _, kind)| *kind == Bridge::ToConventional);
        conventional.last().map_or(function, |(secondary, ..)| Rid(u16::from(secondary) << 8))
    }

    /// Whether a function is behind a bridge to conventional PCI.
    pub fn is_conventional(&self, function: Rid) -> bool {
        self.upwards(bus(function)).any(|(_, _, kind)| kind == Bridge::ToConventional)
    }

    /// Whether two functions are in one group.
    pub fn same_group(&self, one: Rid, other: Rid) -> bool {
        self.outermost(one) == self.outermost(other)
    }

    fn outermost(&self, function: Rid) -> Set {
        let device = first_function(function);
        let innermost =
            if self.shared.contains(&device) { Set::Device(device) } else { Set::Function(function) };
        let wider = self.upwards(bus(function)).filter_map(|(secondary, at, kind)| match kind {
            Bridge::ToConventional => Some(Set::Bus(secondary)),
            Bridge::Port { .. } => self.has_open_port(bus(at)).then_some(Set::Ports(bus(at))),
        });
        wider.last().unwrap_or(innermost)
    }

    /// Whether a port of this bus hands requests on to others.
    fn has_open_port(&self, of: u8) -> bool {
        self.bridges.values().any(|(at, kind)| bus(*at) == of && *kind == Bridge::Port { acs: false })
    }
}
