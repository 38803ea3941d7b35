//! Configuration space as a program sees it, against a plain model of bytes and masks.

use ioasid_soft::pci::{
    AccessError, Bar, Command, ConfigSpace, ConfigSpaceSize, HeaderError, RegisterLayout, Type0Header,
};
use proptest::prelude::*;

fn read32(space: &ConfigSpace, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    space.read(offset, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

fn with_bars(bars: &[Bar]) -> Result<ConfigSpace, HeaderError> {
    let mut header = Type0Header::default();
    header.bars[..bars.len()].copy_from_slice(bars);
    ConfigSpace::new(ConfigSpaceSize::Conventional, &header)
}

#[test]
fn the_header_says_what_it_was_given_and_ignores_writes() {
    let header = Type0Header {
        vendor_id: 0x1234,
        device_id: 0x11e8,
        revision: 0x10,
        class_code: 0x01_0802,
        subsystem_vendor_id: 0xaaaa,
        subsystem_id: 0xbbbb,
        ..Type0Header::default()
    };
    let mut space = ConfigSpace::new(ConfigSpaceSize::Conventional, &header).unwrap();
    space.write(0, &[0xff; 256]).unwrap();
    assert_eq!(read32(&space, 0x00), 0x11e8_1234);
    assert_eq!(read32(&space, 0x08), 0x0108_0210);
    assert_eq!(read32(&space, 0x0c), 0, "header type 0, a single function");
    assert_eq!(read32(&space, 0x2c), 0xbbbb_aaaa);
    assert_eq!(read32(&space, 0x30), 0, "no ROM");
    assert_eq!(read32(&space, 0x34), 0, "no capabilities");
    assert_eq!(read32(&space, 0x3c), 0xff, "the line is writable, the pin says that there is none");
}

#[test]
fn command_keeps_its_bits_and_ignores_others() {
    let mut space = with_bars(&[]).unwrap();
    assert_eq!(space.command(), Command::empty());
    space.write(0x04, &[0xff, 0xff]).unwrap();
    assert_eq!(read32(&space, 0x04), 0x0000_0547);
    space.write(0x05, &[0]).unwrap();
    assert_eq!(read32(&space, 0x04), 0x0000_0047);
    space.set_command(Command::MEMORY_SPACE);
    assert_eq!(read32(&space, 0x04), 0x0000_0002);
    space.reset();
    assert_eq!(space.command(), Command::empty());
}

#[test]
fn bars_are_sized_by_writing_all_ones() {
    let mut space = with_bars(&[
        Bar::Memory32 { size: 1 << 20, prefetchable: true },
        Bar::Absent,
        Bar::Memory64 { size: 1 << 33, prefetchable: true },
        Bar::Absent,
        Bar::Io { size: 32 },
        Bar::Memory32 { size: 16, prefetchable: false },
    ])
    .unwrap();
    let reset: Vec<u32> = (0..6).map(|bar| read32(&space, 0x10 + bar * 4)).collect();
    assert_eq!(reset, [0x8, 0, 0xc, 0, 0x1, 0]);
    for bar in 0..6 {
        space.write(0x10 + bar * 4, &[0xff; 4]).unwrap();
    }
    let sizes: Vec<u32> = (0..6).map(|bar| read32(&space, 0x10 + bar * 4)).collect();
    assert_eq!(sizes, [0xfff0_0008, 0, 0x0000_000c, 0xffff_fffe, 0xffff_ffe1, 0xffff_fff0]);
    space.write(0x10, &0xfebf_1234_u32.to_le_bytes()).unwrap();
    assert_eq!(read32(&space, 0x10), 0xfeb0_0008);
}

#[test]
fn the_largest_bars_leave_one_address_bit() {
    let mut space = with_bars(&[
        Bar::Memory32 { size: 1 << 31, prefetchable: false },
        Bar::Memory64 { size: 1 << 63, prefetchable: false },
    ])
    .unwrap();
    space.write(0x10, &[0xff; 12]).unwrap();
    assert_eq!(read32(&space, 0x10), 0x8000_0000);
    assert_eq!(read32(&space, 0x14), 0x0000_0004);
    assert_eq!(read32(&space, 0x18), 0x8000_0000);
}

#[test]
fn impossible_headers_are_refused() {
    let refused = |bars: &[Bar]| with_bars(bars).unwrap_err();
    let memory = |size| Bar::Memory32 { size, prefetchable: false };
    for size in [0, 8, 24] {
        let error = HeaderError::BarSize { bar: 0, size: size.into() };
        assert_eq!(refused(&[memory(size)]), error);
    }
    assert_eq!(refused(&[Bar::Absent, Bar::Io { size: 512 }]), HeaderError::BarSize { bar: 1, size: 512 });
    let wide = Bar::Memory64 { size: 4096, prefetchable: false };
    assert_eq!(refused(&[wide, memory(16)]), HeaderError::NoUpperHalf { bar: 0 });
    let last = [Bar::Absent, Bar::Absent, Bar::Absent, Bar::Absent, Bar::Absent, wide];
    assert_eq!(refused(&last), HeaderError::NoUpperHalf { bar: 5 });
    let header = Type0Header { class_code: 1 << 24, ..Type0Header::default() };
    assert!(ConfigSpace::new(ConfigSpaceSize::Conventional, &header).is_err());
}

#[test]
fn accesses_past_the_end_do_nothing_at_all() {
    let mut space = ConfigSpace::new(ConfigSpaceSize::Extended, &Type0Header::default()).unwrap();
    let layout = RegisterLayout { writable: u32::MAX, ..RegisterLayout::default() };
    space.define(0xffc, layout).unwrap();
    assert!(space.define(0x1000, layout).is_err());
    assert!(space.define(0xffd, layout).is_err());
    space.write(0xffc, &[1, 2, 3, 4]).unwrap();
    let error = AccessError::BeyondConfigSpace { offset: 0xffc, length: 5, size: 4096 };
    assert_eq!(space.write(0xffc, &[9; 5]), Err(error));
    assert!(space.write(u64::MAX, &[9; 2]).is_err());
    let mut bytes = [7; 8];
    assert!(space.read(0xffa, &mut bytes).is_err());
    assert_eq!(bytes, [7; 8]);
    assert!(space.read(0x1000, &mut bytes[..1]).is_err());
    assert_eq!(read32(&space, 0xffc), 0x0403_0201);
}

/// One byte of the model.
#[derive(Clone, Copy, Debug)]
struct ModelByte {
    value: u8,
    reset: u8,
    writable: u8,
    write_one_to_clear: u8,
}

impl ModelByte {
    fn write(&mut self, byte: u8) {
        for bit in (0..8).map(|bit| 1 << bit) {
            if self.write_one_to_clear & bit != 0 {
                if byte & bit != 0 {
                    self.value &= !bit;
                }
            } else if self.writable & bit != 0 {
                self.value = self.value & !bit | byte & bit;
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Offsets and lengths that now and then cross the end.
    let offset = 0_u64..264;
    let length = prop_oneof![4 => 0_usize..10, 1 => 0_usize..300];
    let write = (offset.clone(), length.clone())
        .prop_flat_map(|(offset, length)| (Just(offset), proptest::collection::vec(any::<u8>(), length)))
        .prop_map(|(offset, bytes)| Step::Write(offset, bytes));
    let read = (offset, length).prop_map(|(offset, length)| Step::Read(offset, length));
    proptest::collection::vec(prop_oneof![6 => write, 4 => read, 1 => Just(Step::Reset)], 1..40)
}

fn layouts() -> impl Strategy<Value = Vec<RegisterLayout>> {
    let mask = prop_oneof![Just(0), Just(u32::MAX), any::<u32>()];
    let layout = (any::<u32>(), mask.clone(), mask).prop_map(|(reset, writable, write_one_to_clear)| {
        RegisterLayout { reset, writable, write_one_to_clear }
    });
    proptest::collection::vec(layout, 64)
}

proptest! {
    #[test]
    fn accesses_of_any_shape_agree_with_a_model_of_bytes(layouts in layouts(), steps in steps()) {
        let mut space = with_bars(&[]).unwrap();
        let mut model = Vec::new();
        for (index, layout) in layouts.iter().enumerate() {
            space.define(index * 4, *layout).unwrap();
            let (reset, writable, clear) = (
                layout.reset.to_le_bytes(),
                layout.writable.to_le_bytes(),
                layout.write_one_to_clear.to_le_bytes(),
            );
            model.extend((0..4).map(|byte| ModelByte {
                value: reset[byte],
                reset: reset[byte],
                writable: writable[byte],
                write_one_to_clear: clear[byte],
            }));
        }
        for step in steps {
            match step {
                Step::Write(offset, bytes) => {
                    let range = offset as usize..offset as usize + bytes.len();
                    let written = space.write(offset, &bytes);
                    prop_assert_eq!(written.is_ok(), range.end <= 256);
                    if written.is_ok() {
                        for (byte, value) in model[range].iter_mut().zip(bytes) {
                            byte.write(value);
                        }
                    }
                }
                Step::Read(offset, length) => {
                    let range = offset as usize..offset as usize + length;
                    let mut buffer = vec![0; length];
                    let read = space.read(offset, &mut buffer);
                    prop_assert_eq!(read.is_ok(), range.end <= 256);
                    if read.is_ok() {
                        let expected: Vec<u8> = model[range].iter().map(|byte| byte.value).collect();
                        prop_assert_eq!(buffer, expected);
                    }
                }
                Step::Reset => {
                    space.reset();
                    model.iter_mut().for_each(|byte| byte.value = byte.reset);
                }
            }
        }
        let mut whole = [0; 256];
        space.read(0, &mut whole).unwrap();
        let expected: Vec<u8> = model.iter().map(|byte| byte.value).collect();
        prop_assert_eq!(whole.as_slice(), expected);
    }
}
