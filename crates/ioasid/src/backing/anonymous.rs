//! Memory that is made here.

use super::{Backing, Source};
use crate::bus::Bus;
use crate::host_memory::HostMemory;
use std::io;
use std::sync::Arc;

impl Backing {
    /// `length` bytes of fresh zeroed memory of this process. Its pages come when they are touched.
    pub fn anonymous(bus: &Arc<Bus>, length: u64) -> io::Result<Arc<Backing>> {
        Ok(Backing::whole(bus, Source::Host(HostMemory::anonymous(length)?), Some(length)))
    }
}
