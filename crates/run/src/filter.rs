//! The seccomp filter: which system calls of a client come to us.
//!
//! Only four sorts do: opens (a filter cannot follow the pointer to the path, so all of them, and most are handed
//! back to the kernel), ioctls of type `;` without a size in their number (VFIO and iommufd), positioned reads and
//! writes whose offset lies in a device region ([`REGION_MAGIC`]), and mappings of files, since the number of a descriptor
//! does not say whose it is. Everything else runs at native speed: for a system
//! call number that the filter allows whatever the arguments, the kernel does not even run it.
//!
//! Of the mappings of files those with `MAP_DENYWRITE` are let through: the kernel ignores the flag, and nobody sets it but
//! the dynamic loader, which maps each library in several pieces (docs/decisions/0034).
//!
//! System calls of other architectures (32-bit programs, x32) are allowed: their numbers mean something else, and a
//! program that uses them merely does not see our files.

use ioasid_server::{REGION_MAGIC, REGION_MAGIC_MASK};

use crate::sys::seccomp::Instruction;

/// The numbers of the system calls that matter, on one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Architecture {
    /// The architecture's number in `seccomp_data`.
    pub(crate) audit: u32,
    /// System call numbers from here on belong to another calling convention.
    pub(crate) numbers_end: Option<u32>,
    /// `open` and `creat`, where they exist.
    pub(crate) open: Option<u32>,
    pub(crate) creat: Option<u32>,
    pub(crate) openat: u32,
    pub(crate) openat2: u32,
    pub(crate) ioctl: u32,
    pub(crate) pread64: u32,
    pub(crate) pwrite64: u32,
    pub(crate) preadv: u32,
    pub(crate) pwritev: u32,
    pub(crate) preadv2: u32,
    pub(crate) pwritev2: u32,
    pub(crate) mmap: u32,
}

impl Architecture {
    pub(crate) const X86_64: Self = Self {
        audit: 0xc000_003e,
        numbers_end: Some(0x4000_0000),
        open: Some(2),
        creat: Some(85),
        openat: 257,
        openat2: 437,
        ioctl: 16,
        pread64: 17,
        pwrite64: 18,
        preadv: 295,
        pwritev: 296,
        preadv2: 327,
        pwritev2: 328,
        mmap: 9,
    };

    pub(crate) const AARCH64: Self = Self {
        audit: 0xc000_00b7,
        numbers_end: None,
        open: None,
        creat: None,
        openat: 56,
        openat2: 437,
        ioctl: 29,
        pread64: 67,
        pwrite64: 68,
        preadv: 69,
        pwritev: 70,
        preadv2: 286,
        pwritev2: 287,
        mmap: 222,
    };

    /// The architecture that this program was built for; its clients are of the same.
    pub(crate) const fn native() -> Option<Self> {
        if cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) {
            Some(Self::X86_64)
        } else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
            Some(Self::AARCH64)
        } else {
            None
        }
    }

    /// What a system call number stands for, if it is one that the filter may send to us.
    pub(crate) fn call(&self, number: i32) -> Option<SystemCall> {
        let number = u32::try_from(number).ok()?;
        Some(match number {
            _ if Some(number) == self.open => SystemCall::Open,
            _ if Some(number) == self.creat => SystemCall::Creat,
            _ if number == self.openat => SystemCall::OpenAt,
            _ if number == self.openat2 => SystemCall::OpenAt2,
            _ if number == self.ioctl => SystemCall::Ioctl,
            _ if number == self.mmap => SystemCall::Map,
            _ if number == self.pread64 => SystemCall::Read,
            _ if number == self.pwrite64 => SystemCall::Write,
            _ if number == self.preadv || number == self.preadv2 => SystemCall::ReadVectored,
            _ if number == self.pwritev || number == self.pwritev2 => SystemCall::WriteVectored,
            _ => return None,
        })
    }

    fn opens(&self) -> impl Iterator<Item = u32> {
        [self.open, self.creat, Some(self.openat), Some(self.openat2)].into_iter().flatten()
    }

    fn positioned(&self) -> [u32; 6] {
        [self.pread64, self.pwrite64, self.preadv, self.pwritev, self.preadv2, self.pwritev2]
    }
}

/// A system call that the filter may send to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SystemCall {
    Open,
    Creat,
    OpenAt,
    OpenAt2,
    Ioctl,
    Read,
    Write,
    ReadVectored,
    WriteVectored,
    Map,
}

/// Offsets in `seccomp_data`. Arguments are 64-bit and are read as two words.
mod data {
    pub(super) const NUMBER: u32 = 0;
    pub(super) const ARCHITECTURE: u32 = 4;
    pub(super) const fn argument_low(index: u32) -> u32 {
        16 + 8 * index
    }
    pub(super) const fn argument_high(index: u32) -> u32 {
        argument_low(index) + 4
    }
}

/// A place in the program that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Allow,
    Notify,
    Ioctl,
    Positioned,
    Map,
}

/// One step of the program; jumps go forward only, as classic BPF demands.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Loads the 32-bit word at this offset of `seccomp_data`.
    Load(u32),
    /// Masks the loaded word.
    And(u32),
    /// Jumps if the loaded word equals the constant, else falls through.
    IfEqual(u32, Label),
    /// Jumps if it differs.
    IfNotEqual(u32, Label),
    /// Jumps if it is the constant or above.
    IfAtLeast(u32, Label),
    /// Jumps if it has none of the constant's bits.
    IfNoneOf(u32, Label),
    /// Ends with a verdict.
    Return(u32),
    /// Not an instruction: the label stands for the next step.
    Here(Label),
}

/// Jump targets are eight-bit distances; a longer program would need another shape.
fn assemble(steps: &[Step]) -> Vec<Instruction> {
    // Opcodes of classic BPF: class | size | mode, or class | operation | source.
    const LOAD_WORD_ABSOLUTE: u16 = 0x20;
    const AND_CONSTANT: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const JUMP_IF_AT_LEAST: u16 = 0x35;
    const JUMP_IF_ANY_OF: u16 = 0x45;
    const RETURN_CONSTANT: u16 = 0x06;

    let is_instruction = |step: &&Step| !matches!(step, Step::Here(_));
    let distance = |from: usize, label: Label| -> u8 {
        let between = steps[from + 1..]
            .iter()
            .take_while(|step| !matches!(step, Step::Here(here) if *here == label))
            .filter(is_instruction)
            .count();
        u8::try_from(between).unwrap_or(u8::MAX)
    };
    steps
        .iter()
        .enumerate()
        .filter_map(|(at, step)| {
            let instruction = |code, k, jt, jf| Instruction { code, jt, jf, k };
            Some(match *step {
                Step::Load(offset) => instruction(LOAD_WORD_ABSOLUTE, offset, 0, 0),
                Step::And(mask) => instruction(AND_CONSTANT, mask, 0, 0),
                Step::IfEqual(k, label) => instruction(JUMP_IF_EQUAL, k, distance(at, label), 0),
                Step::IfNotEqual(k, label) => instruction(JUMP_IF_EQUAL, k, 0, distance(at, label)),
                Step::IfAtLeast(k, label) => instruction(JUMP_IF_AT_LEAST, k, distance(at, label), 0),
                Step::IfNoneOf(k, label) => instruction(JUMP_IF_ANY_OF, k, 0, distance(at, label)),
                Step::Return(verdict) => instruction(RETURN_CONSTANT, verdict, 0, 0),
                Step::Here(_) => return None,
            })
        })
        .collect()
}

/// The filter for clients of one architecture.
pub(crate) fn program(architecture: &Architecture) -> Vec<Instruction> {
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
    /// Type `;`, any number, and no direction or size. The kernel truncates the command to 32 bits, so its high
    /// word is not looked at.
    const COMMAND_MASK: u32 = 0xffff_ff00;
    const COMMAND: u32 = 0x3b00;
    const OFFSET_MASK: u32 = (REGION_MAGIC_MASK >> 32) as u32;
    const OFFSET: u32 = (REGION_MAGIC >> 32) as u32;
    const NOT_TO_BE_LOOKED_AT: u32 = (libc::MAP_ANONYMOUS | libc::MAP_DENYWRITE) as u32;

    let mut steps = vec![
        Step::Load(data::ARCHITECTURE),
        Step::IfNotEqual(architecture.audit, Label::Allow),
        Step::Load(data::NUMBER),
    ];
    if let Some(end) = architecture.numbers_end {
        steps.push(Step::IfAtLeast(end, Label::Allow));
    }
    steps.push(Step::IfEqual(architecture.ioctl, Label::Ioctl));
    steps.push(Step::IfEqual(architecture.mmap, Label::Map));
    steps.extend(architecture.positioned().map(|number| Step::IfEqual(number, Label::Positioned)));
    steps.extend(architecture.opens().map(|number| Step::IfEqual(number, Label::Notify)));
    steps.extend([
        Step::Here(Label::Allow),
        Step::Return(ALLOW),
        Step::Here(Label::Ioctl),
        Step::Load(data::argument_low(1)),
        Step::And(COMMAND_MASK),
        Step::IfEqual(COMMAND, Label::Notify),
        Step::Return(ALLOW),
        Step::Here(Label::Positioned),
        Step::Load(data::argument_high(3)),
        Step::And(OFFSET_MASK),
        Step::IfEqual(OFFSET, Label::Notify),
        Step::Return(ALLOW),
        Step::Here(Label::Map),
        Step::Load(data::argument_low(3)),
        Step::IfNoneOf(NOT_TO_BE_LOOKED_AT, Label::Notify),
        Step::Return(ALLOW),
        Step::Here(Label::Notify),
        Step::Return(NOTIFY),
    ]);
    assemble(&steps)
}

#[cfg(test)]
mod tests {
    use libc::{MAP_ANONYMOUS, MAP_DENYWRITE, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MAP_SHARED_VALIDATE};

    use super::*;

    /// Runs a program of the instructions above on `seccomp_data`, by the definition of classic BPF.
    fn verdict(program: &[Instruction], data: &[u8; 64]) -> u32 {
        let mut accumulator = 0u32;
        let mut at = 0;
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                0x20 => {
                    let offset = k as usize;
                    assert_eq!(offset % 4, 0, "the kernel refuses unaligned loads");
                    accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                0x54 => accumulator &= k,
                0x15 => at += usize::from(if accumulator == k { jt } else { jf }),
                0x35 => at += usize::from(if accumulator >= k { jt } else { jf }),
                0x45 => at += usize::from(if accumulator & k != 0 { jt } else { jf }),
                0x06 => return k,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn traps(architecture: &Architecture, audit: u32, number: u32, arguments: [u64; 6]) -> bool {
        let mut data = [0u8; 64];
        data[0..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&audit.to_le_bytes());
        for (index, argument) in arguments.iter().enumerate() {
            data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        match verdict(&program(architecture), &data) {
            libc::SECCOMP_RET_ALLOW => false,
            libc::SECCOMP_RET_USER_NOTIF => true,
            other => panic!("verdict {other:#x}"),
        }
    }

    const BOTH: [Architecture; 2] = [Architecture::X86_64, Architecture::AARCH64];

    #[test]
    fn opens_trap_whatever_their_arguments() {
        for architecture in &BOTH {
            for number in architecture.opens() {
                assert!(traps(architecture, architecture.audit, number, [0; 6]));
                assert!(traps(architecture, architecture.audit, number, [u64::MAX; 6]));
            }
        }
    }

    #[test]
    fn ioctls_trap_by_type_and_without_a_size() {
        for architecture in &BOTH {
            let ioctl = |command| {
                traps(architecture, architecture.audit, architecture.ioctl, [3, command, 0, 0, 0, 0])
            };
            for command in [0x3b00, 0x3b64, 0x3b80, 0x3bff, 0xdead_beef_0000_3b81] {
                assert!(ioctl(command), "{command:#x}");
            }
            for command in [0, 0x5401, 0x3a80, 0x3c80, 0x1_3b80, 0xc008_3b80, 0x3b80 << 16, 0x3b81_0000_0000]
            {
                assert!(!ioctl(command), "{command:#x}");
            }
        }
    }

    #[test]
    fn positioned_access_traps_only_inside_device_regions() {
        for architecture in &BOTH {
            for number in architecture.positioned() {
                let access =
                    |offset| traps(architecture, architecture.audit, number, [3, 0, 4, offset, 0, 0]);
                for index in [0, 7, 8] {
                    assert!(access(REGION_MAGIC | index << 40 | 0xfff));
                }
                for offset in
                    [0, 4096, u64::MAX, !REGION_MAGIC, REGION_MAGIC >> 32, 1 << 48, 0x10a5, 0x10a6 << 48]
                {
                    assert!(!access(offset), "{offset:#x}");
                }
            }
        }
    }

    #[test]
    fn mappings_of_files_trap_but_for_the_loaders() {
        for architecture in &BOTH {
            let map = |flags: i32| {
                traps(architecture, architecture.audit, architecture.mmap, [0, 4096, 1, flags as u64, 3, 0])
            };
            for flags in [MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_SHARED | MAP_FIXED, 0] {
                assert!(map(flags), "{flags:#x}");
                assert!(!map(flags | MAP_ANONYMOUS), "{flags:#x}");
                assert!(!map(flags | MAP_DENYWRITE), "{flags:#x}");
            }
        }
    }

    #[test]
    fn nothing_else_traps() {
        for architecture in &BOTH {
            let telling = [3, 0x3b80, 0, REGION_MAGIC, 0, 0];
            let mut trapped: Vec<u32> = (0..1024)
                .filter(|number| traps(architecture, architecture.audit, *number, telling))
                .collect();
            let mut expected: Vec<u32> = architecture.opens().chain(architecture.positioned()).collect();
            expected.extend([architecture.ioctl, architecture.mmap]);
            trapped.sort_unstable();
            expected.sort_unstable();
            assert_eq!(trapped, expected);
            assert!(expected.iter().all(|number| architecture.call(*number as i32).is_some()));
        }
    }

    #[test]
    fn other_architectures_and_x32_are_left_alone() {
        let telling = [3, 0x3b80, 0, REGION_MAGIC, 0, 0];
        for architecture in &BOTH {
            for audit in [0x4000_0003, 0, !architecture.audit] {
                for number in [2, 5, 16, 29, 54, 56, 257, 295, 437] {
                    assert!(!traps(architecture, audit, number, telling));
                }
            }
        }
        let x86_64 = &Architecture::X86_64;
        for number in [2, 16, 17, 257, 437, 514] {
            assert!(!traps(x86_64, x86_64.audit, 0x4000_0000 | number, telling));
        }
    }

    #[test]
    fn the_native_numbers_are_those_of_the_c_library() {
        let Some(native) = Architecture::native() else { return };
        for (ours, theirs) in [
            (native.openat, libc::SYS_openat),
            (native.openat2, libc::SYS_openat2),
            (native.ioctl, libc::SYS_ioctl),
            (native.pread64, libc::SYS_pread64),
            (native.pwrite64, libc::SYS_pwrite64),
            (native.preadv, libc::SYS_preadv),
            (native.pwritev, libc::SYS_pwritev),
            (native.preadv2, libc::SYS_preadv2),
            (native.pwritev2, libc::SYS_pwritev2),
            (native.mmap, libc::SYS_mmap),
        ] {
            assert_eq!(libc::c_long::from(ours), theirs);
        }
    }
}
