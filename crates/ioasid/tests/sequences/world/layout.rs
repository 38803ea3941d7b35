//! Where nothing may be mapped, and the tables and devices that say so.

use super::errors::{Kind, expect};
use super::{Attached, World};
use crate::double::WIDE;
use crate::plain::numbers;
use crate::steps::{DEVICES, END, LATE, OF_THE_MACHINE, Pages};
use ioasid::{IovaRange, ReservationOwner, Table};

impl World {
    fn refuse_reservation(&self, space: usize, ranges: &[IovaRange]) -> Option<&'static str> {
        let plain = &self.plain[space];
        let allowed = |range: &IovaRange| plain.allowed.iter().any(|allowed| allowed.overlaps(range));
        let mapped = |range: &IovaRange| plain.first_mapped(numbers(*range)).is_some();
        if ranges.iter().any(allowed) {
            Some("Allowed")
        } else {
            ranges.iter().any(mapped).then_some("Mapped")
        }
    }

    pub(super) fn reserve(&mut self, space: usize, pages: Pages, owner: u64) {
        let Some(range) = pages.range() else { return };
        let owner = ReservationOwner::User(owner);
        let result = self.spaces[space].reserve(range, owner);
        if expect(result, self.refuse_reservation(space, &[range])).is_some() {
            self.plain[space].reserved.push((range, owner));
        }
    }

    pub(super) fn allow(&mut self, space: usize, ranges: &[Pages]) {
        let mut sorted: Vec<IovaRange> = ranges.iter().filter_map(|pages| pages.range()).collect();
        let result = self.spaces[space].set_allowed(&sorted);
        sorted.sort_unstable();
        let plain = &mut self.plain[space];
        let refusal = if sorted.windows(2).any(|pair| pair[0].overlaps(&pair[1])) {
            Some("Overlapping")
        } else {
            sorted.iter().any(|range| plain.reserved_in(*range)).then_some("Reserved")
        };
        if expect(result, refusal).is_some() {
            plain.allowed = sorted;
        }
    }

    /// What a table of the device's kind cannot translate.
    fn outside(&self, device: usize) -> Vec<IovaRange> {
        let aperture = self.devices[device].requirements().aperture;
        let above = aperture.last().checked_add(1).and_then(|first| IovaRange::new(first, u64::MAX));
        above.into_iter().collect()
    }

    /// Why a device cannot be attached.
    pub(super) fn refuse_attachment(&self, device: usize, space: usize, own: bool) -> Option<&'static str> {
        let class = self.devices[device].requirements().class;
        let shared = Attached { space, class, own: None };
        if own || !self.attached.contains(&Some(shared)) {
            let outside = self.outside(device);
            if let Some(refusal) = self.refuse_reservation(space, &outside) {
                return Some(refusal);
            }
            let mapped = self.plain[space].runs(0..END);
            if DEVICES[device] == WIDE && mapped.iter().any(|run| run.end > 1 << 36) {
                return Some("Table(DoesNotFit");
            }
            let leads = self.plain[space].pieces(0..END);
            let late = leads.iter().any(|(_, lead)| self.objects[lead.object].kind == LATE);
            if late && OF_THE_MACHINE.contains(&DEVICES[device]) {
                return Some("Table(Refused");
            }
        }
        if self.attached[device].is_some_and(|attached| attached.space == space) {
            return None;
        }
        self.refuse_reservation(space, &self.devices[device].requirements().reserved)
    }

    pub(super) fn attach(&mut self, device: usize, space: usize, own: bool) {
        let class = self.devices[device].requirements().class;
        let refusal = self.refuse_attachment(device, space, own);
        let real = self.spaces[space].clone();
        let result = self.call(|world| {
            let device = &world.devices[device];
            let table = if own { Table::new(&real, device) } else { Table::for_device(&real, device) };
            device.attach(&table?)
        });
        if self.is_explained(false, result.as_ref().err().and_then(Kind::of_attach)) {
            return;
        }
        if expect(result, refusal).is_some() {
            self.own_tables += 1;
            let own = own.then_some(self.own_tables);
            self.attached[device] = Some(Attached { space, class, own });
            self.reservations_of_tables();
        }
    }

    /// The tables that there are, with a device that is attached to each.
    pub(crate) fn tables(&self) -> Vec<(Attached, usize)> {
        let mut tables: Vec<(Attached, usize)> = Vec::new();
        for (device, attached) in self.attached.iter().enumerate() {
            let Some(attached) = attached else { continue };
            if tables.iter().all(|(table, _)| table != attached) {
                tables.push((*attached, device));
            }
        }
        tables
    }

    /// What tables and devices reserve follows from what is attached.
    pub(super) fn reservations_of_tables(&mut self) {
        for plain in &mut self.plain {
            plain.reserved.retain(|(_, owner)| matches!(owner, ReservationOwner::User(_)));
        }
        for (table, device) in self.tables() {
            for range in self.outside(device) {
                self.plain[table.space].reserved.push((range, ReservationOwner::Table(0)));
            }
        }
        for (device, attached) in self.attached.iter().enumerate() {
            let Some(attached) = attached else { continue };
            for range in &self.devices[device].requirements().reserved {
                self.plain[attached.space].reserved.push((*range, ReservationOwner::Device(0)));
            }
        }
    }
}
