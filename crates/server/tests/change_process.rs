//! IOAS_CHANGE_PROCESS: another process pays.

mod program;

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test::{AccessPages, CreateAccess, CreateAccessFlags, DestroyAccessPages};
use program::{BUFFER, PAGE, Program, memfd, server};

fn change(program: &Program, iommu: i32) -> Result<(), Errno> {
    program.run(iommu, uapi::IoasChangeProcess::default()).map(drop)
}

/// A program with a limit in pages, an iommufd, an address space with a device, and a file; and a second process.
fn two_processes(limits: [Option<u64>; 2], per_process: bool) -> (Program, Program, i32, u32, i32) {
    let program = Program::of(&server());
    program.set_may_change_resource_mode(true);
    program.set_memory_lock_limit(limits[0].map(|pages| pages * PAGE));
    let iommu = program.iommu();
    program.option(iommu, uapi::OPTION_RLIMIT_MODE, uapi::OPTION_OP_SET, 0, per_process.into()).unwrap();
    let ioas = program.ioas(iommu);
    let device = program.bind(iommu);
    program.attach(&device, ioas).unwrap();
    let file = program.insert_foreign(memfd(16 * PAGE));
    let second = program.forked();
    second.set_memory_lock_limit(limits[1].map(|pages| pages * PAGE));
    (program, second, iommu, ioas, file)
}

/// What each account is charged, in pages, those that are charged nothing left out.
fn charged(program: &Program) -> Vec<u64> {
    let status = program.server.status();
    status.accounts.iter().map(|account| account.charged_pages).filter(|pages| *pages > 0).collect()
}

#[test]
fn only_files_change_their_payer() {
    let (program, second, iommu, ioas, file) = two_processes([Some(100), Some(100)], true);
    assert_eq!(change(&program, iommu), Ok(()), "nothing is mapped");
    assert_eq!(
        program.run(iommu, uapi::IoasChangeProcess { reserved: 1, ..Default::default() }),
        Err(Errno::OPNOTSUPP)
    );
    program.map_file(iommu, ioas, file, 0, 2 * PAGE).unwrap();
    let other = program.ioas(iommu);
    let iova = program.map(iommu, other, BUFFER, PAGE).unwrap();
    assert_eq!(change(&second, iommu), Err(Errno::INVAL), "in another space, without a table");
    program.unmap(iommu, other, iova, PAGE).unwrap();
    assert_eq!(change(&second, iommu), Ok(()));
    assert_eq!(charged(&program), [2]);
}

#[test]
fn the_limit_of_the_new_process_holds_for_all_or_nothing() {
    let (program, second, iommu, ioas, file) = two_processes([Some(100), Some(5)], true);
    let first = program.map_file(iommu, ioas, file, 0, 3 * PAGE).unwrap();
    program.map_file(iommu, ioas, file, 3 * PAGE, 3 * PAGE).unwrap();
    // The same pages once more cost nothing more.
    program.map_file(iommu, ioas, file, 0, 3 * PAGE).unwrap();
    assert_eq!(change(&second, iommu), Err(Errno::NOMEM));
    assert_eq!(charged(&program), [6]);
    program.set_memory_lock_limit(Some(6 * PAGE));
    assert_eq!(
        program.map_file(iommu, ioas, file, 8 * PAGE, PAGE),
        Err(Errno::NOMEM),
        "the first still pays"
    );
    second.set_memory_lock_limit(Some(6 * PAGE));
    assert_eq!(change(&second, iommu), Ok(()));
    assert_eq!(charged(&program), [6]);
    program.map_file(iommu, ioas, file, 8 * PAGE, 6 * PAGE).unwrap();
    assert_eq!(charged(&program), [6, 6], "the first has its limit to itself again");
    // What is unmapped is given back to who pays.
    program.unmap(iommu, ioas, first, 3 * PAGE).unwrap();
    program.unmap(iommu, ioas, 0, u64::MAX).unwrap();
    assert_eq!(charged(&program), [0; 0]);
}

#[test]
fn what_is_not_registered_yet_is_charged_to_the_new_process_later() {
    let (program, second, iommu, ioas, file) = two_processes([Some(2), Some(100)], true);
    let other = program.ioas(iommu);
    program.map_file(iommu, other, file, 0, 8 * PAGE).unwrap();
    assert_eq!(change(&second, iommu), Ok(()));
    let device = program::BoundDevice { fd: iommu + 1, id: 2 };
    program.attach(&device, other).unwrap();
    assert_eq!(charged(&program), [8], "the first could not have paid");
    let _ = ioas;
}

#[test]
fn memory_without_a_limit_stays_so() {
    let (program, second, iommu, ioas, file) = two_processes([None, Some(1)], false);
    program.map_file(iommu, ioas, file, 0, 4 * PAGE).unwrap();
    assert_eq!(change(&second, iommu), Ok(()));
    assert_eq!(charged(&program), [4]);
    second.map_file(iommu, ioas, file, 8 * PAGE, PAGE).unwrap();
    assert_eq!(second.map_file(iommu, ioas, file, 9 * PAGE, PAGE), Err(Errno::NOMEM));
}

#[test]
fn processes_of_one_user_share_an_account_and_change_nothing() {
    let (program, second, iommu, ioas, file) = two_processes([Some(4), Some(4)], false);
    program.map_file(iommu, ioas, file, 0, 4 * PAGE).unwrap();
    assert_eq!(change(&second, iommu), Ok(()));
    assert_eq!(change(&program, iommu), Ok(()));
    assert_eq!(charged(&program), [4]);
}

/// What the user of this process pays itself, and has pinned.
fn pinned(program: &Program) -> (u64, u64) {
    let process = ioasid_server::Client::process(&program.client).unwrap().identity();
    let pinned = program.server.pinned_memory(process).unwrap();
    (pinned.locked_pages, pinned.pages)
}

/// Accesses pin by their own right, also where there is no table.
#[test]
fn what_accesses_have_pinned_is_paid_by_the_new_process() {
    let (program, second, iommu, ioas, file) = two_processes([Some(100), Some(5)], true);
    let other = program.ioas(iommu);
    let in_table = program.map_file(iommu, ioas, file, 0, 2 * PAGE).unwrap();
    let pinned_only = program.map_file(iommu, other, file, 4 * PAGE, 8 * PAGE).unwrap();
    let access = |ioas| {
        let flags = CreateAccessFlags::NEEDS_PIN_PAGES.bits();
        program.test(iommu, ioas, &CreateAccess { flags, ..Default::default() }).unwrap().out_access_fd
    };
    let pin = |access, iova, pages: u64| {
        let pages = AccessPages { iova, length: pages * PAGE, ..Default::default() };
        program.test(iommu, access, &pages).unwrap().out_access_pages_id
    };
    let (of_table, of_other) = (access(ioas), access(other));
    pin(of_table, in_table, 2);
    let first = pin(of_other, pinned_only, 3);
    let overlapping = pin(of_other, pinned_only + 2 * PAGE, 2);
    assert_eq!((charged(&program), pinned(&program), pinned(&second)), (vec![6], (6, 6), (0, 0)));

    assert_eq!(change(&second, iommu), Err(Errno::NOMEM), "the pins are counted: 2 pages and 4");
    assert_eq!((charged(&program), pinned(&program)), (vec![6], (6, 6)));
    second.set_memory_lock_limit(Some(6 * PAGE));
    assert_eq!(change(&second, iommu), Ok(()));
    assert_eq!((charged(&program), pinned(&program), pinned(&second)), (vec![6], (0, 0), (6, 6)));
    // What is pinned from now on, and what is given back, is the second's.
    let full = AccessPages { iova: pinned_only + 7 * PAGE, length: PAGE, ..Default::default() };
    assert_eq!(program.test(iommu, of_other, &full).map(drop), Err(Errno::NOMEM));
    for access_pages_id in [first, overlapping] {
        program.test(iommu, of_other, &DestroyAccessPages { access_pages_id }).unwrap();
    }
    assert_eq!((charged(&program), pinned(&second)), (vec![2], (2, 2)));
    program.unmap(iommu, ioas, 0, u64::MAX).unwrap();
    assert_eq!((charged(&program), pinned(&second)), (vec![], (0, 0)));
}
