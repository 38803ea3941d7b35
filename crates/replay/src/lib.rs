//! Recorded DMA mappings, replayed through I/O address spaces.
//!
//! A *trace* is what a kernel's drivers asked of an IOMMU while they did real work: one line for each map and each unmap. It
//! has what no synthetic load has: how mappings of many sizes come and go together, which addresses are used again and
//! when, which processor unmaps what another has mapped.
//!
//! - [`trace`] reads the format, line by line, compressed or not, whatever the length of the file. What is wrong with a
//!   line is said by its number and a reason, and reading goes on.
//! - [`play`] makes a space for each device of the trace, with a software device on a table of the chosen kind, and does
//!   what the trace says, on as many threads as wanted. Each mapping is used for one DMA, of which every byte is checked.
//! - [`Report`] is what came of it: rates, latencies, mappings, leaves, tables, and everything that was not as it should be; and
//!   its [`Course`], what was live and how long calls took over the time of the recording.
//!
//! ```
//! use ioasid_replay::{Options, play, trace::Trace};
//!
//! let text = "\
//! t_ns,cpu,dev,op,iova,phys,bytes,dir
//! 0,0,00:03.0,map,ffffe000,121818000,8192,FROM_DEVICE
//! 1200,0,00:03.0,unmap,ffffe000,-,8192,FROM_DEVICE
//! ";
//! let report = play(Trace::new(text.as_bytes())?, &Options::default(), &mut |_| ())?;
//! assert_eq!((report.maps, report.unmaps, report.dma.count), (1, 1, 1));
//! assert!(report.is_right());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod live;
mod player;
mod random;
mod statistics;
pub mod trace;

pub use live::Misfit;
pub use player::{
    Disturbance, Disturbed, LONGEST_PAUSE, MOST_DEVICES, MOST_LIVE, Mode, Options, Peer, PlayError, Speed,
    play,
};
pub use statistics::{
    BriefLatency, Course, HistogramBin, Latency, LatencyStep, LeafCount, Live, LiveStep, Note, Noted, Report,
};
