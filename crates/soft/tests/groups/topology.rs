//! Random trees of bridges: the groups are what can be reached without passing the root, followed one request at a time.

use ioasid::{
    Account, Backing, Bus, Device, DeviceOwner, Iommu, Iova, Memory, Permissions, Rid, Space, Table,
};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{Bridge, SoftIommu, TableKind, Topology, TopologyError};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// The tree as it was drawn.
#[derive(Clone, Debug)]
struct Tree {
    /// The bridge above bus `n + 1`: the bus that it is on, and its kind.
    bridges: Vec<(u8, Bridge)>,
    devices: BTreeSet<Rid>,
    /// Devices by their first function.
    shared: BTreeSet<Rid>,
}

fn kind() -> impl Strategy<Value = Bridge> {
    prop_oneof![
        3 => Just(Bridge::Port { acs: true }),
        2 => Just(Bridge::Port { acs: false }),
        2 => Just(Bridge::ToConventional),
    ]
}

fn tree() -> impl Strategy<Value = Tree> {
    let bridges = vec((any::<prop::sample::Index>(), kind()), 0..9).prop_map(|drawn| {
        let above =
            |(bus, (above, kind)): (usize, (prop::sample::Index, Bridge))| (above.index(bus + 1) as u8, kind);
        drawn.into_iter().enumerate().map(above).collect::<Vec<_>>()
    });
    bridges.prop_flat_map(|bridges| {
        let rid = (0..=bridges.len() as u16, 1_u16..4, 0_u16..3)
            .prop_map(|(bus, device, function)| Rid(bus << 8 | device << 3 | function));
        let shared =
            vec(rid.clone(), 0..4).prop_map(|rids| rids.into_iter().map(|rid| Rid(rid.0 & !7)).collect());
        (vec(rid, 1..16), shared).prop_map(move |(devices, shared)| Tree {
            bridges: bridges.clone(),
            devices: devices.into_iter().collect(),
            shared,
        })
    })
}

impl Tree {
    /// The devices, and one more on each bus: groups are what they will be when something is plugged in there.
    fn all(&self) -> BTreeSet<Rid> {
        let to_come = (1..=self.bridges.len() as u16).map(|bus| Rid(bus << 8 | 0xff));
        self.devices.iter().copied().chain(to_come).collect()
    }

    fn topology(&self) -> Topology {
        let mut topology = Topology::new();
        for (number, (on, kind)) in self.bridges.iter().enumerate() {
            let at = Rid(u16::from(*on) << 8 | 0x80 | number as u16);
            topology = topology.bridge(at, number as u8 + 1, *kind).unwrap();
        }
        self.shared.iter().fold(topology, |topology, device| topology.shared_functions(*device))
    }

    /// The bridge above a bus.
    fn above(&self, bus: u16) -> Option<(u16, Bridge)> {
        let (on, kind) = self.bridges.get(usize::from(bus).checked_sub(1)?)?;
        Some((u16::from(*on), *kind))
    }

    /// Everything on a bus and below it.
    fn below(&self, bus: u16) -> Vec<Rid> {
        let is_below = |rid: &&Rid| {
            let way = std::iter::successors(Some(rid.0 >> 8), |bus| self.above(*bus).map(|(on, _)| on));
            way.into_iter().any(|on| on == bus)
        };
        self.all().iter().filter(is_below).copied().collect()
    }

    /// Where a request goes that is addressed to whoever will have it, from hop to hop, until the root has it; and whose else
    /// it could be, for all that the root can see.
    fn touches(&self, from: Rid) -> BTreeSet<Rid> {
        let mut touched = BTreeSet::from([from]);
        if self.shared.contains(&Rid(from.0 & !7)) {
            touched.extend(self.devices.iter().filter(|rid| rid.0 & !7 == from.0 & !7));
        }
        let mut bus = from.0 >> 8;
        while let Some((on, kind)) = self.above(bus) {
            match kind {
                // On conventional buses everybody listens, and all requests leave as the bridge's.
                Bridge::ToConventional => touched.extend(self.below(bus)),
                Bridge::Port { acs: true } => {}
                // Down again through another port.
                Bridge::Port { acs: false } => {
                    for other in 1..=self.bridges.len() as u16 {
                        if matches!(self.above(other), Some((other_on, Bridge::Port { .. })) if other_on == on)
                        {
                            touched.extend(self.below(other));
                        }
                    }
                }
            }
            bus = on;
        }
        touched
    }

    /// What is touched, in either direction, and what that touches, and so on.
    fn group(&self, of: Rid) -> Vec<Rid> {
        let touches: BTreeMap<Rid, BTreeSet<Rid>> =
            self.all().into_iter().map(|rid| (rid, self.touches(rid))).collect();
        let mut group = BTreeSet::from([of]);
        loop {
            let before = group.len();
            for (from, touched) in &touches {
                if group.contains(from) || touched.iter().any(|rid| group.contains(rid)) {
                    group.insert(*from);
                    group.extend(touched);
                }
            }
            if group.len() == before {
                return group.intersection(&self.devices).copied().collect();
            }
        }
    }

    /// The ID after all bridges on the way have had their say.
    fn requester(&self, from: Rid) -> Rid {
        let (mut requester, mut bus) = (from, from.0 >> 8);
        while let Some((on, kind)) = self.above(bus) {
            if kind == Bridge::ToConventional {
                requester = Rid(bus << 8);
            }
            bus = on;
        }
        requester
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn groups_are_what_requests_touch(tree in tree()) {
        let iommu = SoftIommu::with_topology(tree.topology());
        for rid in &tree.devices {
            iommu.add_device(*rid, TableKind::Native).unwrap();
        }
        for rid in &tree.devices {
            prop_assert_eq!(iommu.group(*rid), tree.group(*rid));
            prop_assert_eq!(iommu.requester(*rid), tree.requester(*rid));
        }
    }

    /// Owners bind, attach, detach and unbind as they like. A device is bound exactly if nobody else has one of its group, and
    /// its DMA passes exactly if somebody has attached a device with its requester ID. What is attached of a group is attached to one
    /// space, and moves as one.
    #[test]
    fn nobody_gets_past_his_group(
        tree in tree(),
        steps in vec((any::<prop::sample::Index>(), 0..2_usize, 0..4_u8), 1..60),
    ) {
        let iommu = SoftIommu::with_topology(tree.topology());
        let rids: Vec<Rid> = tree.devices.iter().copied().collect();
        let ports: Vec<_> = rids.iter().map(|rid| iommu.add_device(*rid, TableKind::Native).unwrap()).collect();
        let owners = [DeviceOwner::new("one"), DeviceOwner::new("other")];
        let bus = Bus::new();
        let memory = Memory::register(&Backing::anonymous(&bus, 4096).unwrap(), 0, 4096, &Account::new("all", None)).unwrap();
        let spaces = [Space::new(&bus), Space::new(&bus)];
        for (number, space) in spaces.iter().enumerate() {
            space.map(Iova::new((number as u64 + 1) << 12), &memory, 0, 4096, Permissions::READ).unwrap();
        }
        // By device: whose it is, and where it is attached.
        let mut bound: Vec<Option<(usize, Device, Option<usize>)>> = rids.iter().map(|_| None).collect();
        for (chosen, choice, step) in steps {
            let chosen = chosen.index(rids.len());
            let group: Vec<usize> =
                tree.group(rids[chosen]).iter().map(|rid| rids.binary_search(rid).unwrap()).collect();
            match step {
                0 => {
                    let free = bound[chosen].is_none()
                        && group.iter().all(|member| bound[*member].as_ref().is_none_or(|(owner, ..)| *owner == choice));
                    let result = Device::bind(iommu.clone(), rids[chosen], &owners[choice]);
                    prop_assert_eq!(result.is_ok(), free);
                    if let Ok(device) = result {
                        bound[chosen] = Some((choice, device, None));
                    }
                }
                1 | 2 => {
                    let others = group.iter().filter(|member| **member != chosen);
                    let elsewhere = others.filter_map(|member| bound[*member].as_ref()?.2).any(|space| space != choice);
                    let Some((_, device, attached)) = &bound[chosen] else { continue };
                    let result = device.attach(&Table::for_device(&spaces[choice], device).unwrap());
                    prop_assert_eq!(result.is_ok(), attached.is_some() || !elsewhere);
                    if result.is_ok() {
                        for member in &group {
                            if let Some((_, device, attached)) = &mut bound[*member] {
                                if *member == chosen || attached.is_some() {
                                    *attached = Some(choice);
                                }
                                let there = device.table().map(|table| table.space().id());
                                prop_assert_eq!(there, attached.map(|space| spaces[space].id()));
                            }
                        }
                    }
                }
                _ if choice == 0 => {
                    if let Some((_, device, attached)) = &mut bound[chosen] {
                        device.detach();
                        *attached = None;
                    }
                }
                _ => bound[chosen] = None,
            }
            for (port, rid) in ports.iter().zip(&rids) {
                let same = |other: &&Rid| tree.requester(**other) == tree.requester(*rid);
                let routes = rids.iter().zip(&bound).filter(|(other, _)| same(other));
                let leads_to = routes.filter_map(|(_, bound)| bound.as_ref()?.2).next();
                for space in 0..spaces.len() {
                    let passes = port.read((space as u64 + 1) << 12, &mut [0]).is_ok();
                    prop_assert_eq!(passes, leads_to == Some(space));
                }
            }
        }
    }
}

#[test]
fn bus_numbers_grow_away_from_the_root_and_are_used_once() {
    let port = Bridge::Port { acs: true };
    let refused = Topology::new().bridge(Rid(0x0300), 3, port).unwrap_err();
    assert_eq!(refused, TopologyError::Order { at: Rid(0x0300), secondary: 3 });
    let one = Topology::new().bridge(Rid(0x0300), 0xff, port).unwrap();
    let refused = one.bridge(Rid(0x0108), 0xff, Bridge::ToConventional).unwrap_err();
    assert_eq!(refused, TopologyError::Taken { at: Rid(0x0108), secondary: 0xff, other: Rid(0x0300) });
    assert_eq!(refused.to_string(), "bus 0xff cannot be behind bridge 01:01.0: it is behind 03:00.0");
}
