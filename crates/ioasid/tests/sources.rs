//! Where memory comes from: files, huge pages, memory that grows, that is given back in parts, that must be resident.

use ioasid::pagetable::Native;
use ioasid::{
    Account, Backing, Bus, FileError, Iova, IovaRange, LateBound, MapError, Memory, MemoryGone, PageSize,
    Permissions, RegisterError, ReleaseError, Residency, ResidencyError, Space, UnmapError,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

fn memfd(length: u64, seals: SealFlags) -> OwnedFd {
    let memfd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memfd, length).unwrap();
    fcntl_add_seals(&memfd, seals).unwrap();
    memfd
}

fn account() -> Account {
    Account::new("test", None)
}

fn output(space: &Space, iova: u64) -> Option<u64> {
    space.walk(Iova::new(iova)).map(|leaf| leaf.output(iova).get())
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// The value of a line of /proc/self/status, in KiB.
fn status_kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_file_is_one_object_wherever_its_descriptor_comes_from() {
    let bus = Bus::new();
    let account = account();
    let file = memfd(4 * K4, SealFlags::SHRINK);
    let first = Backing::file(&bus, &file).unwrap();
    // Another open file description of the same inode.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let reopened = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let second = Backing::file(&bus, &reopened).unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    let registered = [
        Memory::register(&first, 0, 4 * K4, &account).unwrap(),
        Memory::register(&second, 2 * K4, 2 * K4, &account).unwrap(),
    ];
    assert_eq!(account.charged_pages(), 4);
    // The same page is at the same place on the bus.
    let space = Space::new(&bus);
    space.map(Iova::new(0), &registered[0], 0, 4 * K4, RW).unwrap();
    space.map(Iova::new(G1), &registered[1], 0, 2 * K4, RW).unwrap();
    assert_eq!(output(&space, 2 * K4), output(&space, G1));
    // The descriptor was only borrowed.
    drop(file);
    first.write(5, b"text").unwrap();
    let mut text = [0; 4];
    second.read(5, &mut text).unwrap();
    assert_eq!(&text, b"text");
    // On another bus it is another object.
    let elsewhere = Backing::file(&Bus::new(), &reopened).unwrap();
    assert!(!Arc::ptr_eq(&first, &elsewhere));
    drop((elsewhere, reopened, registered));
    let known = Arc::downgrade(&first);
    drop((first, second));
    assert!(known.upgrade().is_none() && account.charged_pages() == 0);
}

#[test]
fn a_file_that_is_not_known_to_anybody_is_forgotten() {
    let bus = Bus::new();
    let file = memfd(K4, SealFlags::SHRINK);
    for _ in 0..3 {
        let backing = Backing::file(&bus, &file).unwrap();
        backing.revoke();
        assert!(backing.is_revoked());
    }
    assert!(!Backing::file(&bus, &file).unwrap().is_revoked());
}

#[test]
fn what_has_no_memory_to_share_is_refused() {
    let bus = Bus::new();
    let directory = std::fs::File::open("/").unwrap();
    assert!(matches!(Backing::file(&bus, &directory), Err(FileError::NotRegular)));
    let file = memfd(K4, SealFlags::SHRINK);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let reader = std::fs::File::open(path).unwrap();
    assert!(matches!(Backing::file(&bus, &reader), Err(FileError::NotWritable)));
    // Whoever seals a file against writing has nothing for devices to write to.
    let sealed = memfd(K4, SealFlags::SHRINK | SealFlags::WRITE);
    let backing = Backing::file(&bus, &sealed).unwrap();
    let refused = Memory::register(&backing, 0, K4, &account());
    assert!(matches!(refused, Err(RegisterError::Unreachable(_))), "{refused:?}");
}

#[test]
fn a_file_that_can_shrink_kills_nobody() {
    let bus = Bus::new();
    let account = account();
    let file = memfd(4 * K4, SealFlags::empty());
    let backing = Backing::file(&bus, &file).unwrap();
    assert!(!backing.is_direct());
    let memory = Memory::register(&backing, 0, 4 * K4, &account).unwrap();
    backing.write(3 * K4 - 2, b"abcd").unwrap();
    let mut bytes = [0; 4];
    rustix::io::pread(&file, &mut bytes, 3 * K4 - 2).unwrap();
    assert_eq!(&bytes, b"abcd");
    ftruncate(&file, 3 * K4).unwrap();
    // A plain copy would have raised SIGBUS here.
    assert_eq!(backing.read(3 * K4 - 2, &mut bytes), Err(MemoryGone { offset: 3 * K4 - 2 }));
    assert_eq!(backing.write(3 * K4, &[1]), Err(MemoryGone { offset: 3 * K4 }));
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as u64, 3 * K4, "a write makes no file longer");
    backing.read(3 * K4 - 4, &mut bytes).unwrap();
    // What is not there is not registered; when it comes back, it can be.
    assert!(matches!(
        Memory::register(&backing, 3 * K4, K4, &account),
        Err(RegisterError::OutOfBounds { .. })
    ));
    ftruncate(&file, 4 * K4).unwrap();
    let again = Memory::register(&backing, 3 * K4, K4, &account).unwrap();
    backing.write(3 * K4, &[7]).unwrap();
    drop((again, memory));
    // A file on a disk has no seals, and is reached the same way.
    let path = std::env::temp_dir().join(format!("ioasid-sources-{}", std::process::id()));
    let disk = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    disk.set_len(K4).unwrap();
    let backing = Backing::file(&bus, &disk).unwrap();
    assert!(!backing.is_direct());
    backing.write(1, &[9]).unwrap();
    let trusted = Bus::new();
    let backing = Backing::trusted_file(&trusted, &disk).unwrap();
    assert!(backing.is_direct());
    let mut byte = [0];
    backing.read(1, &mut byte).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn memory_grows_with_its_file_and_keeps_its_mappings() {
    let bus = Bus::new();
    let account = Account::new("test", Some(6));
    // Not a whole page at first, and in the end in two windows of the bus.
    let file = memfd(K4 + 100, SealFlags::SHRINK);
    let backing = Backing::file(&bus, &file).unwrap();
    assert!(backing.is_direct());
    let memory = Memory::register(&backing, 0, K4 + 100, &account).unwrap();
    assert_eq!(account.charged_pages(), 2);
    let space = Space::new(&bus);
    space.map(Iova::new(0), &memory, 0, K4, RW).unwrap();
    let before = output(&space, 0);
    backing.write(K4, b"kept").unwrap();

    assert!(matches!(memory.grow(1), Err(RegisterError::OutOfBounds { offset: 4196, length: 1 })));
    ftruncate(&file, 3 * K4).unwrap();
    memory.grow(2 * K4 - 100).unwrap();
    assert_eq!((memory.length(), account.charged_pages(), backing.length()), (3 * K4, 3, Some(3 * K4)));
    space.map(Iova::new(K4), &memory, K4, 2 * K4, RW).unwrap();
    assert_eq!(output(&space, 0), before);
    assert_eq!(output(&space, 2 * K4), before.map(|oa| oa + 2 * K4));
    let mut bytes = [0; 4];
    backing.read(K4, &mut bytes).unwrap();
    assert_eq!(&bytes, b"kept");

    // Over the limit: nothing changes.
    ftruncate(&file, 8 * K4).unwrap();
    assert!(matches!(memory.grow(4 * K4), Err(RegisterError::OverLimit(_))));
    assert_eq!((memory.length(), account.charged_pages()), (3 * K4, 3));
    assert!(matches!(space.map(Iova::new(G1), &memory, 3 * K4, K4, RW), Err(MapError::BeyondMemory { .. })));
    assert!(matches!(memory.grow(0), Err(RegisterError::Empty)));
    assert!(matches!(memory.grow(u64::MAX), Err(RegisterError::OutOfBounds { .. })));

    account.set_limit(None);
    ftruncate(&file, G1 + 2 * K4).unwrap();
    memory.grow(G1 - K4).unwrap();
    assert_eq!(account.charged_pages(), (1 << 18) + 2);
    space.map(Iova::new(G1), &memory, G1, 2 * K4, RW).unwrap();
    backing.write(G1 - 1, b"over the border").unwrap();
    let mut bytes = [0; 15];
    rustix::io::pread(&file, &mut bytes, G1 - 1).unwrap();
    assert_eq!(&bytes, b"over the border");
    drop(memory);
    assert!(account.charged_pages() == 0 && space.leaves(IovaRange::ALL).is_empty());
}

#[test]
fn parts_are_given_back_exactly() {
    let bus = Bus::new();
    let account = account();
    let backing = Backing::anonymous(&bus, 4 * M2).unwrap();
    let memory = Memory::register(&backing, 0, 4 * M2, &account).unwrap();
    let spaces = [Space::new(&bus), Space::new(&bus)];
    spaces[0].map(Iova::new(0), &memory, 0, 4 * M2, RW).unwrap();
    spaces[1].map(Iova::new(G1), &memory, M2, M2, RW).unwrap();
    spaces[1].map(Iova::new(2 * G1), &memory, M2 + K4, K4, RW).unwrap();

    memory.release(M2 + K4, 2 * K4).unwrap();
    assert_eq!(account.charged_pages(), 4 * 512 - 2);
    assert_eq!(backing.holds(M2 + K4, 2 * K4), 0..=0);
    let mapped = |space: &Space, first: u64, pages: u64| {
        (0..pages).filter(|page| space.walk(Iova::new(first + page * K4)).is_some()).count() as u64
    };
    assert_eq!(mapped(&spaces[0], 0, 2048), 2046);
    assert!(output(&spaces[0], M2 + K4).is_none() && output(&spaces[0], M2 + 2 * K4).is_none());
    assert_eq!((mapped(&spaces[1], G1, 512), mapped(&spaces[1], 2 * G1, 1)), (510, 0));
    // Neither mapped nor given back again; next to it everything can be.
    for (offset, length) in [(M2 + K4, K4), (M2, 2 * K4), (0, 4 * M2), (M2 + 2 * K4, 2 * K4)] {
        let refused = spaces[1].map(Iova::new(3 * G1), &memory, offset, length, RW);
        assert!(matches!(refused, Err(MapError::BeyondMemory { .. })), "{offset:#x} {length:#x}");
        let refused = memory.release(offset, length);
        assert!(matches!(refused, Err(ReleaseError::NotRegistered { .. })), "{offset:#x} {length:#x}");
    }
    spaces[1].map(Iova::new(3 * G1), &memory, M2 + 3 * K4, K4, RW).unwrap();
    for (offset, length) in [(100, K4), (0, 100), (4 * M2 - 100, 100), (0, 0), (4 * M2, K4), (1, u64::MAX)] {
        assert!(memory.release(offset, length).is_err(), "{offset:#x} {length:#x}");
    }

    // The end, up to the hole: now the memory ends before it, and grows from there.
    memory.release(M2 + 3 * K4, 3 * M2 - 3 * K4).unwrap();
    assert_eq!((memory.length(), account.charged_pages()), (M2 + K4, 513));
    memory.grow(2 * K4).unwrap();
    spaces[1].map(Iova::new(4 * G1), &memory, M2 + K4, 2 * K4, RW).unwrap();
    // All of it, and again.
    memory.release(0, memory.length()).unwrap();
    assert_eq!((memory.length(), account.charged_pages()), (0, 0));
    assert!(spaces.iter().all(|space| space.leaves(IovaRange::ALL).is_empty()));
    assert!(memory.release(0, K4).is_err());
    memory.grow(K4).unwrap();
    spaces[0].map(Iova::new(0), &memory, 0, K4, RW).unwrap();
    drop(memory);
    assert!(account.charged_pages() == 0 && spaces[0].leaves(IovaRange::ALL).is_empty());
}

#[test]
fn pages_that_others_hold_stay_mapped_until_the_last_gives_them_back() {
    let bus = Bus::new();
    let account = account();
    let backing = Backing::anonymous(&bus, 4 * K4).unwrap();
    let whole = Memory::register(&backing, 0, 4 * K4, &account).unwrap();
    let part = Memory::register(&backing, K4, K4, &account).unwrap();
    let space = Space::new(&bus);
    space.map(Iova::new(0), &whole, 0, 4 * K4, RW).unwrap();
    whole.release(K4, 2 * K4).unwrap();
    assert!(output(&space, K4).is_some() && output(&space, 2 * K4).is_none());
    assert_eq!(account.charged_pages(), 3);
    // Mapped by the one, held by the other alone.
    drop(part);
    assert!(output(&space, K4).is_none() && output(&space, 3 * K4).is_some());
    assert_eq!(account.charged_pages(), 2);
}

#[test]
fn a_part_of_a_window_gives_back_no_window() {
    let bus = Bus::new();
    let account = account();
    // Two windows of a GiB.
    let backing = Backing::anonymous(&bus, 2 * G1).unwrap();
    let memory = Memory::register(&backing, 0, 2 * G1, &account).unwrap();
    let space = Space::new(&bus);
    memory.release(K4, G1).unwrap();
    space.map(Iova::new(0), &memory, 0, K4, RW).unwrap();
    space.map(Iova::new(K4), &memory, G1 + K4, K4, RW).unwrap();
    let places = [output(&space, 0), output(&space, K4)];
    // Somebody else takes and leaves what is between.
    drop(Memory::register(&backing, K4, G1, &account).unwrap());
    let other = Memory::register(&Backing::anonymous(&bus, G1).unwrap(), 0, G1, &account).unwrap();
    space.map(Iova::new(4 * G1), &other, 0, K4, RW).unwrap();
    assert_eq!([output(&space, 0), output(&space, K4)], places);
    assert!(!places.contains(&output(&space, 4 * G1)));
    // With the last page it goes, and somebody else gets it.
    memory.release(G1 + K4, G1 - K4).unwrap();
    let next = Memory::register(&Backing::anonymous(&bus, G1).unwrap(), 0, G1, &account).unwrap();
    space.map(Iova::new(8 * G1), &next, K4, K4, RW).unwrap();
    assert_eq!(output(&space, 8 * G1), places[1]);
}

#[test]
fn a_space_that_cannot_unmap_exactly_keeps_the_part_registered() {
    let bus = Bus::new();
    let account = account();
    let memory = Memory::register(&Backing::anonymous(&bus, 4 * M2).unwrap(), 0, 4 * M2, &account).unwrap();
    let granule = PageSize::from_log2(16).unwrap();
    let space = Space::with_format(&bus, Native::new().with_granule(granule).unwrap());
    space.map(Iova::new(0), &memory, 0, 4 * M2, RW).unwrap();
    let refused = memory.release(M2, K4);
    assert!(matches!(refused, Err(ReleaseError::Unmap(UnmapError::Misaligned { .. }))), "{refused:?}");
    assert_eq!(account.charged_pages(), 2048);
    assert_eq!(space.statistics().mapped_bytes, 4 * M2);
    space.unmap(range(0, M2)).unwrap();
    space.map(Iova::new(0), &memory, M2, M2, RW).unwrap();
    memory.release(M2, M2).unwrap();
    assert_eq!(space.statistics().mapped_bytes, 2 * M2);
}

#[test]
fn pages_are_brought_in_on_request() {
    let bus = Bus::new();
    let account = account();
    const LENGTH: u64 = 16 << 20;
    // Of a file, because its pages count in its own status and not in that of the process.
    let file = memfd(LENGTH, SealFlags::SHRINK);
    let blocks = |file: &OwnedFd| rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512;
    let backing = Backing::file(&bus, &file).unwrap();
    let lazy = Memory::register(&backing, 0, LENGTH, &account).unwrap();
    assert_eq!(blocks(&file), 0);
    let part = Memory::register_resident(&backing, M2, M2, &account, Residency::Populated).unwrap();
    // The machine may have filled whole huge pages.
    assert!((M2..LENGTH).contains(&blocks(&file)), "{}", blocks(&file));
    drop(lazy);
    // What grows is as resident as the rest.
    part.grow(LENGTH - 2 * M2).unwrap();
    assert!(blocks(&file) >= LENGTH - M2);

    #[derive(Debug)]
    struct Elsewhere;
    impl LateBound for Elsewhere {
        fn read(&self, offset: u64, _buffer: &mut [u8]) -> Result<(), MemoryGone> {
            Err(MemoryGone { offset })
        }
        fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
            Err(MemoryGone { offset })
        }
    }
    let charged = account.charged_pages();
    let elsewhere = Backing::late_bound(&bus, Arc::new(Elsewhere));
    for residency in [Residency::Populated, Residency::Locked] {
        let refused = Memory::register_resident(&elsewhere, 0, K4, &account, residency);
        assert!(matches!(refused, Err(RegisterError::Residency(ResidencyError::NotMapped))));
    }
    assert_eq!(account.charged_pages(), charged);
    // A file that has become shorter says so, and nobody dies.
    let file = memfd(4 * K4, SealFlags::empty());
    let backing = Backing::trusted_file(&bus, &file).unwrap();
    let memory = Memory::register(&backing, 0, 4 * K4, &account).unwrap();
    ftruncate(&file, K4).unwrap();
    let refused = Memory::register_resident(&backing, 0, 4 * K4, &account, Residency::Populated);
    assert!(matches!(refused, Err(RegisterError::OutOfBounds { .. })));
    drop(memory);
}

/// Runs one of the tests below in a process of its own, where it may do what other tests would notice.
fn in_a_process_of_its_own(test: &str) -> bool {
    const ALONE: &str = "IOASID_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", test, "--nocapture", "--test-threads", "1"];
    let status = Command::new(program).args(arguments).env(ALONE, "1").status().unwrap();
    assert!(status.success(), "{test}: {status}");
    false
}

#[test]
fn pages_are_locked_until_the_last_registration_goes() {
    if !in_a_process_of_its_own("pages_are_locked_until_the_last_registration_goes") {
        return;
    }
    let bus = Bus::new();
    let account = account();
    let backing = Backing::anonymous(&bus, 64 << 20).unwrap();
    let locked = || status_kib("VmLck:");
    assert_eq!(locked(), 0);
    let register =
        |offset, length| Memory::register_resident(&backing, offset, length, &account, Residency::Locked);
    let first = register(0, 64 * K4).unwrap();
    let second = register(32 * K4, 64 * K4).unwrap();
    let plain = Memory::register(&backing, 0, M2, &account).unwrap();
    assert_eq!(locked(), 96 * 4);
    drop(first);
    assert_eq!(locked(), 64 * 4);
    second.release(16 * K4, 8 * K4).unwrap();
    assert_eq!(locked(), 56 * 4);
    second.release(48 * K4, 16 * K4).unwrap();
    assert_eq!((locked(), second.length()), (40 * 4, 48 * K4));
    second.grow(4 * K4).unwrap();
    assert_eq!(locked(), 44 * 4);
    drop(second);
    assert_eq!(locked(), 0);
    drop(plain);

    // Without the capability, and above the limit: nothing is locked, and the error says what to do.
    let limit = rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    rustix::process::setrlimit(rustix::process::Resource::Memlock, limit).unwrap();
    let mut capabilities = rustix::thread::capabilities(None).unwrap();
    capabilities.effective.remove(rustix::thread::CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, capabilities).unwrap();
    let small = register(0, 64 * K4).unwrap();
    let refused = register(32 * K4, 32 << 20).unwrap_err();
    let RegisterError::Residency(ResidencyError::NotLocked { limit, source, .. }) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!((*limit, source.raw_os_error()), (Some(1 << 20), Some(Errno::NOMEM.raw_os_error())));
    assert!(refused.to_string().contains("RLIMIT_MEMLOCK allows this process 0x100000"), "{refused}");
    assert_eq!((locked(), account.charged_pages()), (64 * 4, 64));
    drop(small);
    assert_eq!((locked(), account.charged_pages()), (0, 0));
}

/// From now on this thread may do no system call but leave the process.
fn forbid_system_calls() {
    let number = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        instruction(number, 0, 0, 0),
        instruction(equal, 0, 1, libc::SYS_exit_group as u32),
        instruction(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
        instruction(answer, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain system calls; the program lives until they return.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn mapping_registered_memory_does_no_system_call_and_charges_nothing() {
    if !in_a_process_of_its_own("mapping_registered_memory_does_no_system_call_and_charges_nothing") {
        return;
    }
    /// Counts all accesses.
    #[derive(Debug, Default)]
    struct Counted(AtomicU64);
    impl LateBound for Counted {
        fn read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<(), MemoryGone> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }
    let bus = Bus::new();
    let account = Account::new("test", Some(2048 + 512));
    let calls = Arc::new(Counted::default());
    let file = memfd(4 * M2, SealFlags::SHRINK);
    let backings =
        [Backing::file(&bus, &file).unwrap(), Backing::late_bound(&bus, calls.clone() as Arc<dyn LateBound>)];
    let memories = [
        Memory::register(&backings[0], 0, 4 * M2, &account).unwrap(),
        Memory::register(&backings[1], 0, M2, &account).unwrap(),
    ];
    let space = Space::new(&bus);
    let round = |number: u64| {
        for (index, memory) in memories.iter().enumerate() {
            let iova = Iova::new(index as u64 * G1 + number % 512 * K4);
            space.map(iova, memory, number % 512 * K4, K4, RW).unwrap();
            assert!(space.walk(iova).is_some());
            space.unmap(range(iova.get(), K4)).unwrap();
        }
    };
    // The tables come with the first mapping, the notes of where the memory is with the outermost ones.
    (0..512).for_each(round);
    let before = (account.charged_pages(), account.peak_pages(), account.failures());
    forbid_system_calls();
    (0..2000).for_each(round);
    let after = (account.charged_pages(), account.peak_pages(), account.failures());
    let held = backings.each_ref().map(|backing| backing.holds(0, M2));
    let right = before == after && held == [1..=1, 1..=1] && calls.0.load(Ordering::Relaxed) == 0;
    // SAFETY: ends the process.
    unsafe { libc::_exit(if right { 0 } else { 1 }) };
}

#[test]
fn huge_pages_are_known_and_populated() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = memfd_create("huge", flags) else {
        println!("not run: the kernel has no huge pages of 2 MiB");
        return;
    };
    ftruncate(&file, 2 * M2).unwrap();
    let bus = Bus::new();
    let account = account();
    let backing = Backing::trusted_file(&bus, &file).unwrap();
    assert_eq!((backing.page_size(), backing.length()), (M2, Some(2 * M2)));
    let memory = match Memory::register_resident(&backing, 0, 2 * M2, &account, Residency::Populated) {
        Ok(memory) => memory,
        Err(error) => {
            // All is as if nothing had been asked for.
            assert_eq!((account.charged_pages(), backing.holds(0, 2 * M2)), (0, 0..=0));
            println!("not run: no huge pages are set aside on this machine ({error})");
            return;
        }
    };
    assert_eq!(account.charged_pages(), 1024);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks as u64 * 512, 2 * M2);
    let space = Space::new(&bus);
    space.map(Iova::new(G1), &memory, 0, 2 * M2, RW).unwrap();
    let sizes: Vec<u64> = space.leaves(IovaRange::ALL).iter().map(|leaf| leaf.size.bytes()).collect();
    assert_eq!(sizes, [M2, M2]);
    backing.write(M2 - 3, b"across").unwrap();
    // The same by calls, which can write to it as well.
    let careful = Backing::file(&Bus::new(), &file).unwrap();
    assert!(!careful.is_direct());
    let mut bytes = [0; 6];
    careful.read(M2 - 3, &mut bytes).unwrap();
    assert_eq!(&bytes, b"across");
    careful.write(M2, b"O").unwrap();
    backing.read(M2 - 3, &mut bytes).unwrap();
    assert_eq!(&bytes, b"acrOss".as_slice());
    ftruncate(&file, 3 * M2).unwrap();
    match memory.grow(M2) {
        Ok(()) => assert_eq!(account.charged_pages(), 1536),
        Err(error) => println!("growing not run: {error}"),
    }
}

#[test]
fn what_is_given_back_while_it_is_mapped_is_mapped_nowhere_afterwards() {
    let bus = Bus::new();
    let account = account();
    let backing = Backing::anonymous(&bus, 16 * K4).unwrap();
    let memory = Memory::register(&backing, 0, 16 * K4, &account).unwrap();
    let spaces = [Space::new(&bus), Space::new(&bus)];
    spaces[0].map(Iova::new(0), &memory, 0, K4, RW).unwrap();
    let first = output(&spaces[0], 0).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for space in &spaces {
            scope.spawn(|| {
                let mut page = 0;
                while !stop.load(Ordering::Relaxed) {
                    page = (page + 5) % 12;
                    let _ = space.map(Iova::new(page * K4), &memory, page * K4, 4 * K4, RW);
                    if page % 3 == 0 {
                        space.unmap(range(page * K4, 3 * K4)).unwrap();
                    }
                }
            });
        }
        for round in 0..100 {
            // From the end, so that it can be had again.
            let pages = 1 + round % 9;
            let gone = 16 - pages;
            memory.release(gone * K4, pages * K4).unwrap();
            for space in &spaces {
                let leads_there = |oa: u64| (first + gone * K4..first + 16 * K4).contains(&oa);
                for leaf in space.leaves(IovaRange::ALL) {
                    assert!(!leads_there(leaf.oa.get()), "{leaf:?} leads to what was given back");
                }
            }
            memory.grow(pages * K4).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn whatever_registrations_were_mapped_in_many_spaces_is_found_again() {
    const SPACES: u64 = 6;
    let (bus, account) = (Bus::new(), Account::new("test", None));
    let backing = Backing::anonymous(&bus, SPACES * K4).unwrap();
    // The first space of the object is gone before the others come.
    let early = Memory::register(&backing, 0, K4, &account).unwrap();
    Space::new(&bus).map(Iova::new(0), &early, 0, K4, RW).unwrap();
    let spaces: Vec<_> = (0..SPACES).map(|_| Space::new(&bus)).collect();
    let mut memories: Vec<_> =
        (0..SPACES).map(|page| Memory::register(&backing, page * K4, K4, &account).unwrap()).collect();
    let own = |space: u64| range(space * G1, K4);
    let next = |space: u64| range((space + 64) * G1, K4);
    for number in 0..SPACES {
        // Each in two spaces, far apart from what is there of others.
        for (space, at) in [(number, own(number)), ((number + 1) % SPACES, next(number))] {
            let space = &spaces[space as usize];
            space.map(Iova::new(at.first()), &memories[number as usize], 0, K4, RW).unwrap();
        }
    }
    let mapped = |space: u64| spaces[space as usize].leaves(IovaRange::ALL).len();
    drop(memories.remove(3));
    assert_eq!((0..SPACES).map(mapped).collect::<Vec<_>>(), [2, 2, 2, 1, 1, 2]);
    assert!(spaces[3].walk(Iova::new(next(2).first())).is_some());
    backing.revoke();
    assert_eq!((0..SPACES).map(mapped).sum::<usize>(), 0);
}

/// Where memory goes, whichever way, the notes of its registrations and of its object name every place, in however many spaces and
/// blocks of addresses.
#[test]
fn wherever_memory_was_mapped_it_is_found_when_it_goes() {
    /// The last page of all.
    const LAST: u64 = 0u64.wrapping_sub(K4);
    // Spaces and addresses, in the order in which they are mapped.
    let histories: [&[(usize, u64)]; 9] = [
        &[(0, 0)],
        &[(0, 0), (0, 5 * G1)],
        &[(0, 5 * G1), (0, 0)],
        &[(0, G1 - K4), (0, G1)],
        &[(0, LAST), (0, 0)],
        &[(0, 0), (1, 0), (2, 0)],
        &[(0, 0), (1, 4 * G1), (1, 0), (1, LAST)],
        &[(2, 8 * G1), (1, 4 * G1), (0, 0), (0, 9 * G1), (1, 7 * G1), (2, 3 * G1)],
        &[(0, 0), (1, 0), (0, 2 * G1), (1, 2 * G1), (0, LAST), (1, LAST)],
    ];
    for history in histories {
        for separate in [false, true] {
            for way in ["dropped", "released", "revoked"] {
                let (bus, account) = (Bus::new(), Account::new("test", None));
                let pages = history.len() as u64;
                let backing = Backing::anonymous(&bus, pages * K4).unwrap();
                let spaces = [(); 3].map(|()| Space::new(&bus));
                let all = (!separate).then(|| Memory::register(&backing, 0, pages * K4, &account).unwrap());
                let mut memories = Vec::new();
                for (number, (space, at)) in (0..).zip(history) {
                    let (memory, offset) = match &all {
                        Some(all) => (all.clone(), number * K4),
                        None => (Memory::register(&backing, number * K4, K4, &account).unwrap(), 0),
                    };
                    spaces[*space].map(Iova::new(*at), &memory, offset, K4, RW).unwrap();
                    memories.push((memory, offset));
                }
                match way {
                    "dropped" => drop((memories, all)),
                    "released" => {
                        for (memory, offset) in memories.iter().rev() {
                            memory.release(*offset, K4).unwrap();
                        }
                    }
                    _ => backing.revoke(),
                }
                for space in &spaces {
                    assert_eq!(space.leaves(IovaRange::ALL), [], "{way} {history:?}, separate: {separate}");
                }
            }
        }
    }
    // One mapping in two blocks, and only the second part of it is left.
    let (bus, account) = (Bus::new(), Account::new("test", None));
    let backing = Backing::anonymous(&bus, 2 * K4).unwrap();
    let memory = Memory::register(&backing, 0, 2 * K4, &account).unwrap();
    let space = Space::new(&bus);
    space.map(Iova::new(G1 - K4), &memory, 0, 2 * K4, RW).unwrap();
    space.unmap(range(G1 - K4, K4)).unwrap();
    backing.revoke();
    assert_eq!(space.leaves(IovaRange::ALL), []);
}

/// Notes what leaves the bus.
#[derive(Default)]
struct Leaving(std::sync::Mutex<Vec<(u64, u64)>>);

impl ioasid::BusObserver for Leaving {
    fn vacated(&self, first: ioasid::Oa, length: u64) {
        self.0.lock().unwrap().push((first.get(), length));
    }
}

#[test]
fn a_kernel_can_be_told_where_memory_is_and_when_it_goes() {
    let bus = Bus::new();
    let account = Account::new("test", None);
    let leaving = Arc::new(Leaving::default());
    let observer: std::sync::Weak<Leaving> = Arc::downgrade(&leaving);
    bus.observe(observer);

    let backing = Backing::anonymous(&bus, 24 << 10).unwrap();
    let one = Memory::register(&backing, 0, 4 << 10, &account).unwrap();
    let two = Memory::register(&backing, 8 << 10, 16 << 10, &account).unwrap();
    let place = bus.locate(two.output(0).unwrap()).unwrap();
    // All that is in one place, though not all of it is registered.
    assert_eq!((place.first, place.length), (one.output(0).unwrap(), 24 << 10));
    let ioasid::HostBytes::Address(address) = place.memory else { panic!("{place:?}") };
    backing.write(8 << 10, b"here").unwrap();
    let at = std::ptr::with_exposed_provenance::<[u8; 4]>((address + (8 << 10)) as usize);
    // SAFETY: the memory of the backing, which nobody writes meanwhile.
    assert_eq!(unsafe { at.read() }, *b"here");
    drop(one);
    assert!(leaving.0.lock().unwrap().is_empty());
    drop(two);
    assert_eq!(*leaving.0.lock().unwrap(), [(place.first.get(), 32 << 10)]);
    assert!(bus.locate(place.first).is_none());

    let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 12 << 10).unwrap();
    let file = Backing::file(&bus, &memfd).unwrap();
    let memory = Memory::register(&file, 4 << 10, 4 << 10, &account).unwrap();
    let place = bus.locate(memory.output(0).unwrap()).unwrap();
    assert!(matches!(place.memory, ioasid::HostBytes::File(_, 0)), "{place:?}");
    assert_eq!(place.length, 12 << 10);
    // Also when devices reach it no more.
    file.revoke();
    assert!(bus.locate(place.first).is_some());
    // Who does not listen any more is not told.
    drop(leaving);
    drop(memory);
}
