//! Getting a command's argument from the client and its answer back, by the rules of each interface.
//!
//! Everything is read once, into our own copy; what the client's other threads do to theirs meanwhile is their loss.

use ioasid_uapi::Command;
use rustix::io::Errno;

use crate::Client;

/// The largest argument that is looked at. The kernel has no limit, but no argument comes near this one.
const LARGEST_ARGUMENT: u64 = 64 << 10;

/// Reads a `u32` of the client.
pub(crate) fn read_u32(client: &dyn Client, address: u64) -> Result<u32, Errno> {
    let mut bytes = [0; 4];
    client.read(address, &mut bytes)?;
    Ok(u32::from_ne_bytes(bytes))
}

/// Copies a structure that says its own size, `user_size`, of which `known` bytes have a meaning: a shorter one is
/// filled up with zeroes, and of a longer one the rest must be zero.
///
/// # Errors
/// `E2BIG` if the rest is not zero; `EFAULT`.
pub(crate) fn receive_sized<T: Command>(
    client: &dyn Client,
    address: u64,
    user_size: u32,
) -> Result<T, Errno> {
    check_tail(client, address, user_size, T::SIZE)?;
    let mut command = T::new_zeroed();
    let length = T::SIZE.min(usize_of(user_size));
    client.read(address, &mut command.as_mut_bytes()[..length])?;
    Ok(command)
}

/// Checks the argument of a command that is not served: that it can be read, and has nothing beyond the `known` bytes.
///
/// # Errors
/// As [`receive_sized`].
pub(crate) fn check_sized(
    client: &dyn Client,
    address: u64,
    user_size: u32,
    known: usize,
) -> Result<(), Errno> {
    check_tail(client, address, user_size, known)?;
    let mut ignored = [0; 128];
    let length = known.min(usize_of(user_size)).min(ignored.len());
    client.read(address, &mut ignored[..length])
}

/// Checks that what a client's structure has beyond the `known` bytes is zero.
///
/// # Errors
/// `E2BIG` if not, or if the structure is absurdly long; `EFAULT`.
pub(crate) fn check_tail(
    client: &dyn Client,
    address: u64,
    user_size: u32,
    known: usize,
) -> Result<(), Errno> {
    let user_size = u64::from(user_size);
    if user_size > LARGEST_ARGUMENT {
        return Err(Errno::TOOBIG);
    }
    let mut chunk = [0; 512];
    let mut at = known as u64;
    while at < user_size {
        let part = &mut chunk[..usize::try_from(user_size - at).unwrap_or(usize::MAX).min(512)];
        client.read(address.checked_add(at).ok_or(Errno::FAULT)?, part)?;
        if part.iter().any(|byte| *byte != 0) {
            return Err(Errno::TOOBIG);
        }
        at += part.len() as u64;
    }
    Ok(())
}

/// Copies the part of a VFIO structure that its first version had, and checks that the client has that much.
///
/// # Errors
/// `EINVAL` if it has less; `EFAULT`.
pub(crate) fn receive_argsz<T: Command>(client: &dyn Client, address: u64) -> Result<T, Errno> {
    let mut command = T::new_zeroed();
    client.read(address, &mut command.as_mut_bytes()[..T::MIN_SIZE])?;
    if argsz(&command) < T::MIN_SIZE {
        return Err(Errno::INVAL);
    }
    Ok(command)
}

/// Copies what a later version of a VFIO structure has behind the first one's end, for a command whose flags say that it is
/// there.
///
/// # Errors
/// `EINVAL` if the client has less; `EFAULT`.
pub(crate) fn receive_rest<T: Command>(
    client: &dyn Client,
    address: u64,
    command: &mut T,
) -> Result<(), Errno> {
    if argsz(command) < T::SIZE {
        return Err(Errno::INVAL);
    }
    let rest = address.checked_add(T::MIN_SIZE as u64).ok_or(Errno::FAULT)?;
    client.read(rest, &mut command.as_mut_bytes()[T::MIN_SIZE..T::SIZE])
}

/// Writes as much of `answer` as the client has room for: `user_size` bytes.
pub(crate) fn respond<T: Command>(
    client: &dyn Client,
    address: u64,
    user_size: u32,
    answer: &T,
) -> Result<(), Errno> {
    let length = T::SIZE.min(usize_of(user_size));
    client.write(address, &answer.as_bytes()[..length])
}

/// The first word of a VFIO structure: the size that the client gave it.
pub(crate) fn argsz<T: Command>(command: &T) -> usize {
    let first = command.as_bytes().first_chunk().copied().unwrap_or_default();
    usize_of(u32::from_ne_bytes(first))
}

fn usize_of(size: u32) -> usize {
    // Lossless on every platform that has these interfaces.
    size as usize
}
