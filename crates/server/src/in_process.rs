//! A client that lives in this process and whose memory is a sparse pretend address space: for unit tests and
//! fuzzers, ours and those of programs that use an iommufd.

/// A pretend client program.
#[derive(Debug)]
pub struct InProcess {}
