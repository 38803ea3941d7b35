//! Opening, and what calls on open and other files answer.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::calls::*;

pub(super) fn open_and_close() {
    assert_eq!(files_in_server(), 0);
    let iommu = open_iommu();
    assert_ne!(allocate(&iommu).unwrap(), 0);
    assert_eq!(ioctl(iommu.as_raw_fd(), UNKNOWN, 0), Err(Errno::NOTTY));
    let mut short = [4u32, 0, 0];
    assert_eq!(allocate_at(&iommu, (&raw mut short).addr() as u64), Err(Errno::INVAL));
    assert_eq!(files_in_server(), 1);
    drop(iommu);
    assert_eq!(files_in_server(), 0);
}

pub(super) fn every_way_to_open() {
    let flags = OFlags::RDWR;
    let dev = open("/dev", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
    let path = c"/dev/iommu".as_ptr().addr() as u64;
    let relative = c"../dev/./iommu".as_ptr().addr() as u64;
    let mut opened = vec![
        open("/dev/iommu", flags).unwrap(),
        open("//dev//.././dev/iommu", flags).unwrap(),
        open("/proc/../dev/iommu", flags).unwrap(),
        rustix::fs::openat(&dev, "iommu", flags, Mode::empty()).unwrap(),
        rustix::fs::openat(&dev, "/dev/iommu", flags, Mode::empty()).unwrap(),
        rustix::fs::openat2(&dev, "iommu", flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).unwrap(),
    ];
    let mut raw =
        vec![system_call(libc::SYS_openat, [dev.as_raw_fd() as u64, relative, libc::O_RDWR as u64, 0])];
    std::env::set_current_dir("/dev").unwrap();
    opened.push(open("iommu", flags).unwrap());
    #[cfg(target_arch = "x86_64")]
    {
        raw.push(system_call(libc::SYS_open, [path, libc::O_RDWR as u64, 0, 0]));
        raw.push(system_call(libc::SYS_creat, [path, 0o600, 0, 0]));
    }
    let high_garbage = 0xdead_beef_0000_0000 | libc::O_RDWR as u64;
    raw.push(system_call(libc::SYS_openat, [libc::AT_FDCWD as u64, path, high_garbage, 0]));

    let link = std::env::temp_dir().join(format!("ioasid-link-{}", std::process::id()));
    std::os::unix::fs::symlink("/dev/iommu", &link).unwrap();
    let through_link = open(link.to_str().unwrap(), flags);
    std::fs::remove_file(&link).unwrap();
    opened.push(through_link.unwrap());

    for fd in &raw {
        // SAFETY: the call has just returned it to us.
        opened.push(unsafe { OwnedFd::from_raw_fd(fd.unwrap() as i32) });
    }
    for fd in &opened {
        allocate(fd).unwrap();
    }
    assert_eq!(files_in_server(), opened.len());
    drop(opened);
    assert_eq!(files_in_server(), 0);

    for path in ["/dev/iommu/", "/dev/iommu/x", "/dev/iomm", "/dev/iommu2", "/iommu"] {
        assert!(open(path, flags).is_err(), "{path}");
    }
    assert_eq!(open("/dev/vfio/nothing", flags).err(), Some(Errno::NOENT));
    let nowhere = system_call(libc::SYS_openat, [libc::AT_FDCWD as u64, 8, 0, 0]);
    assert_eq!(nowhere, Err(Errno::FAULT));
}

pub(super) fn open_flags() {
    let close_on_exec = |flags| {
        let fd = open("/dev/iommu", flags).unwrap();
        rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC)
    };
    assert!(close_on_exec(OFlags::RDWR | OFlags::CLOEXEC));
    assert!(!close_on_exec(OFlags::RDWR));
    let nonblocking = open("/dev/iommu", OFlags::RDWR | OFlags::NONBLOCK).unwrap();
    assert!(rustix::fs::fcntl_getfl(&nonblocking).unwrap().contains(OFlags::NONBLOCK));
    let read_only = open("/dev/iommu", OFlags::RDONLY).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&read_only).unwrap() & OFlags::RWMODE, OFlags::RDONLY);
    allocate(&read_only).unwrap();
    assert_eq!(open("/dev/iommu", OFlags::RDWR | OFlags::DIRECTORY).err(), Some(Errno::NOTDIR));
    assert_eq!(open("/dev/iommu", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL).err(), Some(Errno::EXIST));
    drop((nonblocking, read_only));
    assert_eq!(files_in_server(), 0);
}

pub(super) fn text_file() {
    let mut text = String::new();
    File::open("/dev/ioasid").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.starts_with('{') && text.ends_with("}\n"), "{text}");
    assert_eq!(open("/dev/ioasid", OFlags::RDWR).err(), Some(Errno::ACCESS));
    let read_only = open("/dev/ioasid", OFlags::RDONLY).unwrap();
    assert!(rustix::io::write(&read_only, b"x").is_err());
    assert_eq!(ioctl(read_only.as_raw_fd(), IOAS_ALLOC, 0), Err(Errno::NOTTY));
}

pub(super) fn foreign_and_closed_descriptors() {
    let null = open("/dev/null", OFlags::RDWR).unwrap();
    assert_eq!(allocate(&null), Err(Errno::NOTTY));
    let memory = rustix::fs::memfd_create("/dev/iommu", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(allocate(&memory), Err(Errno::NOTTY));
    for number in [-1, 1000, i32::MIN, i32::MAX] {
        assert_eq!(allocate_by_number(number), Err(Errno::BADF));
    }
    let iommu = open_iommu();
    let number = iommu.as_raw_fd();
    // The kernel ignores the high words of a descriptor number and of a command.
    let mut words = [12u32, 0, 0];
    let garbage = 0x5a5a_5a5a_0000_0000;
    let arguments =
        [garbage | number as u64, garbage | u64::from(IOAS_ALLOC), (&raw mut words).addr() as u64, 0];
    assert_eq!(system_call(libc::SYS_ioctl, arguments), Ok(0));
    assert_ne!(words[2], 0);
    drop(iommu);
    assert_eq!(allocate_by_number(number), Err(Errno::BADF));
    // The number now means something else.
    let duplicate = rustix::io::dup(&null).unwrap();
    assert_eq!(duplicate.as_raw_fd(), number);
    assert_eq!(allocate_by_number(number), Err(Errno::NOTTY));
    let path_only = open("/dev/null", OFlags::PATH).unwrap();
    assert!(allocate(&path_only).is_err());
}

pub(super) fn bad_pointers() {
    const PAGE: usize = 4096;
    let iommu = open_iommu();
    let memory = pages(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE);
    for address in [0, 1, 0xffff_8000_0000_0000, u64::MAX, u64::MAX - 11] {
        assert_eq!(allocate_at(&iommu, address), Err(Errno::FAULT), "{address:#x}");
    }
    poke(memory, &[12, 0, 0]);
    poke(memory + PAGE as u64 - 12, &[12, 0, 0]);
    poke(memory + PAGE as u64 - 8, &[12, 0, 0]);
    unmap(memory + PAGE as u64, PAGE);
    allocate_at(&iommu, memory).unwrap();
    assert_eq!(allocate_at(&iommu, memory + PAGE as u64 - 8), Err(Errno::FAULT), "its end is not mapped");
    poke(memory + PAGE as u64 - 12, &[12, 0, 0]);
    allocate_at(&iommu, memory + PAGE as u64 - 12).unwrap();

    poke(memory, &[12, 0, 0]);
    protect(memory, PAGE, libc::PROT_READ);
    assert_eq!(allocate_at(&iommu, memory), Err(Errno::FAULT), "the result cannot be written");
    protect(memory, PAGE, libc::PROT_NONE);
    assert_eq!(allocate_at(&iommu, memory), Err(Errno::FAULT));
    protect(memory, PAGE, libc::PROT_READ | libc::PROT_WRITE);
    allocate_at(&iommu, memory).unwrap();

    // Pages of a file beyond its end are mapped, and fault.
    let file = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(allocate_at(&iommu, map_file(&file, PAGE)), Err(Errno::FAULT));
}

pub(super) fn nothing_of_ours_can_be_mapped() {
    use libc::{MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE};
    const PAGE: usize = 4096;
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, PAGE as u64).unwrap();
    let both = PROT_READ | PROT_WRITE;
    // With none of our files open, nobody looks whose it is.
    unmap(try_map(&memory, PAGE, both, MAP_SHARED, 0).unwrap(), PAGE);

    let iommu = open_iommu();
    let read_only = open("/dev/iommu", OFlags::RDONLY).unwrap();
    let write_only = open("/dev/iommu", OFlags::WRONLY).unwrap();
    let device = open("/dev/vfio/devices/vfio0", OFlags::RDWR).unwrap();
    let region = 0x10a5_0000_0000_0000;
    for (file, protection, flags, offset, refusal) in [
        (&iommu, both, MAP_SHARED, 0, Errno::NXIO),
        (&iommu, 0, libc::MAP_SHARED_VALIDATE, 1 << 30, Errno::NXIO),
        (&iommu, PROT_READ, MAP_PRIVATE, 0, Errno::INVAL),
        (&iommu, PROT_READ | PROT_EXEC, MAP_PRIVATE, 0, Errno::INVAL),
        (&iommu, PROT_READ | PROT_EXEC, MAP_SHARED, 0, Errno::PERM),
        (&iommu, both, MAP_SHARED, 1, Errno::INVAL),
        (&iommu, both, 0, 0, Errno::INVAL),
        (&read_only, PROT_READ, MAP_SHARED, 0, Errno::INVAL),
        (&read_only, both, MAP_SHARED, 0, Errno::ACCESS),
        (&write_only, PROT_WRITE, MAP_SHARED, 0, Errno::ACCESS),
        (&device, both, MAP_SHARED, region, Errno::INVAL),
        (&device, both, MAP_PRIVATE, region, Errno::INVAL),
    ] {
        assert_eq!(try_map(file, PAGE, protection, flags, offset), Err(refusal));
    }
    assert_eq!(try_map(&iommu, 0, both, MAP_SHARED, 0), Err(Errno::INVAL));
    // What no file is asked about.
    let validate = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    for file in [&iommu, &device] {
        assert_eq!(try_map(file, 1 << 60, both, MAP_SHARED, 0), Err(Errno::NOMEM));
        assert_eq!(try_map(file, PAGE, both, validate, 0), Err(Errno::OPNOTSUPP));
    }
    assert_eq!(try_map(&iommu, PAGE, both, MAP_SHARED | libc::MAP_HUGETLB, 0), Err(Errno::INVAL));

    // Other files are mapped as ever, beside ours, and so is what is no file.
    unmap(try_map(&memory, PAGE, both, MAP_SHARED, 0).unwrap(), PAGE);
    unmap(try_map(&memory, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, 0).unwrap(), PAGE);
    let null = open("/dev/null", OFlags::RDWR).unwrap();
    assert_eq!(try_map(&null, PAGE, both, MAP_SHARED, 0), Err(Errno::NODEV));
    unmap(pages(PAGE, both), PAGE);
    drop((iommu, read_only, write_only, device));
    assert_eq!(files_in_server(), 0);
}

pub(super) fn too_many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    let first = open_iommu();
    setrlimit(Resource::Nofile, Rlimit { current: Some(first.as_raw_fd() as u64 + 3), ..before }).unwrap();
    let more: Vec<OwnedFd> = std::iter::from_fn(|| match open("/dev/iommu", OFlags::RDWR) {
        Ok(fd) => Some(fd),
        Err(errno) => {
            assert_eq!(errno, Errno::MFILE);
            None
        }
    })
    .take(100)
    .collect();
    assert_eq!(more.len(), 2);
    for _ in 0..20 {
        assert_eq!(open("/dev/iommu", OFlags::RDWR).err(), Some(Errno::MFILE));
    }
    setrlimit(Resource::Nofile, before).unwrap();
    expect_files_in_server(3);
    drop((first, more));
    assert_eq!(files_in_server(), 0);
}
