//! Cutting a program's access into bus accesses.
//!
//! Each piece is the widest naturally aligned one, up to 8 bytes, that fits what is left. This is how
//! Linux carries out a read or write of a BAR through VFIO, so a program gets the same accesses, and
//! from a register that allows only one width the same answers, as from hardware.

/// The width of one bus access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccessWidth {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl AccessWidth {
    /// The width in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// The widest naturally aligned access at `offset` that is no longer than `length` (at least 1).
    fn widest(offset: u64, length: usize) -> Self {
        [Self::Qword, Self::Dword, Self::Word]
            .into_iter()
            .find(|width| width.bytes() <= length && offset & (width.bytes() as u64 - 1) == 0)
            .unwrap_or(Self::Byte)
    }
}

/// Fills `buffer`, which begins at `offset` of a BAR, by calling `register(offset, width)` for each bus
/// access in ascending order. Of the value returned, as many low bytes count as the access is wide.
///
/// `offset` plus the length must not exceed 2^64; a caller that has cut the access to a BAR has seen to it.
pub fn read_split(offset: u64, buffer: &mut [u8], mut register: impl FnMut(u64, AccessWidth) -> u64) {
    let mut done = 0;
    while done < buffer.len() {
        let position = offset.wrapping_add(done as u64);
        let width = AccessWidth::widest(position, buffer.len() - done);
        let value = register(position, width).to_le_bytes();
        buffer[done..done + width.bytes()].copy_from_slice(&value[..width.bytes()]);
        done += width.bytes();
    }
}

/// Calls `register(offset, width, value)` for each bus access of a write of `bytes` at `offset` of a BAR,
/// in ascending order. Narrow values are extended with zeroes.
///
/// `offset` plus the length must not exceed 2^64; a caller that has cut the access to a BAR has seen to it.
pub fn write_split(offset: u64, bytes: &[u8], mut register: impl FnMut(u64, AccessWidth, u64)) {
    let mut done = 0;
    while done < bytes.len() {
        let position = offset.wrapping_add(done as u64);
        let width = AccessWidth::widest(position, bytes.len() - done);
        let mut value = [0; 8];
        value[..width.bytes()].copy_from_slice(&bytes[done..done + width.bytes()]);
        register(position, width, u64::from_le_bytes(value));
        done += width.bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_odd_access_becomes_aligned_ones() {
        let mut seen = Vec::new();
        let bytes: Vec<u8> = (1..=18).collect();
        write_split(5, &bytes, |offset, width, value| seen.push((offset, width, value)));
        assert_eq!(
            seen,
            [
                (5, AccessWidth::Byte, 0x01),
                (6, AccessWidth::Word, 0x0302),
                (8, AccessWidth::Qword, 0x0b0a_0908_0706_0504),
                (16, AccessWidth::Dword, 0x0f0e_0d0c),
                (20, AccessWidth::Word, 0x1110),
                (22, AccessWidth::Byte, 0x12),
            ]
        );
    }

    proptest! {
        /// Whatever the cut, the bytes arrive in their places, each once.
        #[test]
        fn bytes_survive_the_cut(offset in 0_u64..64, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut memory = [None; 128];
            write_split(offset, &bytes, |position, width, value| {
                assert_eq!(position % width.bytes() as u64, 0);
                for (index, byte) in value.to_le_bytes()[..width.bytes()].iter().enumerate() {
                    assert_eq!(memory[position as usize + index].replace(*byte), None);
                }
            });
            let stored: Vec<u8> = memory.iter().copied().flatten().collect();
            prop_assert_eq!(&stored, &bytes);
            let mut buffer = vec![0; bytes.len()];
            read_split(offset, &mut buffer, |position, width| {
                let mut value = [0xee; 8];
                for (index, byte) in value[..width.bytes()].iter_mut().enumerate() {
                    *byte = memory[position as usize + index].unwrap();
                }
                u64::from_le_bytes(value)
            });
            prop_assert_eq!(buffer, bytes);
        }
    }
}
