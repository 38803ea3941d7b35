//! The two kinds of address that a page table joins, and ranges of the first kind.
//!
//! An I/O virtual address (IOVA) is what a device puts on the bus; an output address (OA) is what the table
//! gives for it. They are both 64-bit integers and nothing else keeps a program from mixing them up, so each is
//! a type of its own.
//!
//! A range holds its first and its *last* address. With an exclusive end the last page of the 2^64 bytes that an
//! IOVA can name has no representation, and every caller would have to remember that.

use core::fmt;

/// An I/O virtual address: what a device asks for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(u64);

/// An output address: what a table answers. In the engine it is an address on the bus; in a host's table it is
/// a physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Oa(u64);

macro_rules! address {
    ($name:ident) => {
        impl $name {
            /// The address with this value, in bytes.
            pub const fn new(value: u64) -> $name {
                $name(value)
            }

            /// Its value, in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on, or `None` past 2^64 - 1.
            pub const fn checked_add(self, bytes: u64) -> Option<$name> {
                match self.0.checked_add(bytes) {
                    Some(value) => Some($name(value)),
                    None => None,
                }
            }

            /// Whether the address is a multiple of `size`.
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & (size.bytes() - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}
address!(Iova);
address!(Oa);

/// The size of a leaf: a power of two from 1 byte to 2^63 bytes, kept as its logarithm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(pub(crate) u8);

impl PageSize {
    /// 4 KiB.
    pub const SIZE_4K: PageSize = PageSize(12);
    /// 2 MiB.
    pub const SIZE_2M: PageSize = PageSize(21);
    /// 1 GiB.
    pub const SIZE_1G: PageSize = PageSize(30);

    /// The size 2^`log2` bytes; `None` from 2^64 on.
    pub const fn from_log2(log2: u32) -> Option<PageSize> {
        if log2 < 64 { Some(PageSize(log2 as u8)) } else { None }
    }

    /// The exponent.
    pub const fn log2(self) -> u32 {
        self.0 as u32
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PageSize {
    /// The usual short form: `4K`, `2M`, `1G`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["", "K", "M", "G", "T", "P", "E"];
        let unit = usize::from(self.0 / 10);
        write!(f, "{}{}", 1u32 << (self.0 % 10), units[unit])
    }
}

/// A non-empty range of I/O virtual addresses, inclusive at both ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// Every address.
    pub const ALL: IovaRange = IovaRange { first: 0, last: u64::MAX };

    /// From `first` to `last`, both included; `None` if `first` is beyond `last`.
    pub const fn new(first: u64, last: u64) -> Option<IovaRange> {
        if first <= last { Some(IovaRange { first, last }) } else { None }
    }

    /// `length` bytes from `first` on; `None` if there are none or if they reach past 2^64.
    pub const fn with_length(first: u64, length: u64) -> Option<IovaRange> {
        if length == 0 {
            return None;
        }
        match first.checked_add(length - 1) {
            Some(last) => Some(IovaRange { first, last }),
            None => None,
        }
    }

    /// The first address.
    pub const fn first(&self) -> u64 {
        self.first
    }

    /// The last address.
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// How many bytes; `None` for all 2^64 of them, which no `u64` can say.
    pub const fn length(&self) -> Option<u64> {
        (self.last - self.first).checked_add(1)
    }

    /// Whether `iova` lies in the range.
    pub const fn contains(&self, iova: u64) -> bool {
        self.first <= iova && iova <= self.last
    }

    /// Whether all of `other` lies in this range.
    pub const fn covers(&self, other: &IovaRange) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether the two ranges share an address.
    pub const fn overlaps(&self, other: &IovaRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// What both ranges hold.
    pub fn intersection(&self, other: &IovaRange) -> Option<IovaRange> {
        IovaRange::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// Whether both ends lie on multiples of `size`.
    pub const fn is_aligned(&self, size: PageSize) -> bool {
        let mask = size.bytes() - 1;
        self.first & mask == 0 && self.last & mask == mask
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}
