//! The limit on the table pages of a process; alone in its program, since it holds for all of it.

use ioasid_pagetable::{Attributes, Gather, HeapTables, IovaRange, MapError, Native, Oa, OutOfTables, Radix};

#[test]
fn a_mapping_over_the_limit_is_refused_whole() {
    let radix = Radix::native(Native::new());
    // 1 GiB that no large leaf fits takes 512 tables and three on the way there.
    let gigabyte = IovaRange::with_length(0, 1 << 30).unwrap();
    let map_within = |pages: u64| {
        HeapTables::set_limit(pages * 4096);
        let mut gather = Gather::new();
        let result = radix.map(gigabyte, Oa::new(0x1000), Attributes::READ, &mut gather);
        for table in gather.retired {
            // SAFETY: nobody else uses the radix.
            unsafe { table.free() };
        }
        result
    };
    assert_eq!(map_within(514), Err(MapError::OutOfTables(OutOfTables)));
    assert!(radix.walk(0).is_err());
    assert_eq!(map_within(515), Ok(()));
    assert_eq!(radix.table_count(), 515);
    // What is there stays when the limit is lowered, and can be unmapped.
    HeapTables::set_limit(0);
    assert_eq!(radix.walk(0x12_3456).unwrap().output(0x12_3456), Oa::new(0x12_4456));
    let mut gather = Gather::new();
    radix.unmap(gigabyte, &mut gather).unwrap();
    assert!(radix.walk(0x12_3456).is_err());
}
