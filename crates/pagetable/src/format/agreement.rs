//! What every format promises, tried on every format: patterns agree with decoding, reading undoes writing, and
//! nothing is impossible input.

use super::{AmdV1, Attributes, Entry, Format, MemoryType, Native, Pattern, RiscV, VtdSecondStage, X86_64};
use crate::address::PageSize;
use core::ops::RangeInclusive;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

const LEVELS: RangeInclusive<u8> = 1..=6;

/// A format, and what a test has to know of it besides.
struct Subject<F> {
    format: F,
    /// What a leaf that is written with these attributes says, but for the memory type.
    says: fn(Attributes) -> Attributes,
    /// Whether whatever decodes is in order. The native format believes what it reads: nobody else writes it.
    checks: bool,
}

/// Something to try on any format.
trait Check {
    fn check<F: Format>(&self, subject: &Subject<F>) -> Result<(), TestCaseError>;
}

fn check_everywhere(check: &impl Check) -> Result<(), TestCaseError> {
    fn no_execute(attributes: Attributes) -> Attributes {
        attributes - Attributes::EXECUTE
    }
    fn no_execute_no_snoop(attributes: Attributes) -> Attributes {
        no_execute(attributes) - Attributes::FORCE_SNOOP
    }
    fn unmarked(attributes: Attributes) -> Attributes {
        no_execute(attributes) - Attributes::USED
    }
    // A and D preset, no forced snooping, and writing implies reading.
    fn preset(attributes: Attributes) -> Attributes {
        let said = (attributes - Attributes::FORCE_SNOOP) | Attributes::ACCESSED;
        if said.contains(Attributes::WRITE) { said | Attributes::READ | Attributes::DIRTY } else { said }
    }
    fn preset_no_execute(attributes: Attributes) -> Attributes {
        no_execute(preset(attributes))
    }

    for format in [
        Native::new(),
        Native::new().with_granule(PageSize(11)).unwrap(),
        Native::new().with_granule(PageSize(16)).unwrap().with_largest_leaf(PageSize::SIZE_1G),
    ] {
        check.check(&Subject { format, says: unmarked, checks: false })?;
    }
    for levels in 3..=5 {
        let format = VtdSecondStage::new(levels).unwrap();
        check.check(&Subject { format: format.clone(), says: no_execute, checks: true })?;
        check.check(&Subject {
            format: format.clone().with_memory_types(true).with_host_address_width(39).unwrap(),
            says: no_execute,
            checks: true,
        })?;
        let small = format.with_snoop_control(false).with_large_pages(0);
        check.check(&Subject { format: small, says: no_execute_no_snoop, checks: true })?;
        let format = RiscV::new(levels).unwrap();
        check.check(&Subject { format: format.clone(), says: preset, checks: true })?;
        let format = format.with_napot(false).with_memory_types(true);
        check.check(&Subject { format, says: preset, checks: true })?;
    }
    for levels in 4..=5 {
        let format = X86_64::new(levels).unwrap();
        check.check(&Subject { format: format.clone(), says: preset_no_execute, checks: true })?;
        check.check(&Subject {
            format: format
                .clone()
                .with_execute_disable(true)
                .with_host_address_width(46)
                .unwrap()
                .with_page_attribute_table([
                    MemoryType::WriteBack,
                    MemoryType::WriteCombining,
                    MemoryType::Uncached,
                    MemoryType::Uncached,
                    MemoryType::WriteBack,
                    MemoryType::WriteProtected,
                    MemoryType::Uncached,
                    MemoryType::WriteThrough,
                ]),
            says: preset,
            checks: true,
        })?;
        let small = format.with_large_pages(PageSize::SIZE_2M.bytes());
        check.check(&Subject { format: small, says: preset_no_execute, checks: true })?;
    }
    let plain = AmdV1::new();
    let finer = AmdV1::new().with_granule_2k();
    for format in [plain.clone(), plain.with_leaf_sizes(1 << 12 | 1 << 16 | 1 << 21)] {
        check.check(&Subject { format, says: no_execute, checks: true })?;
    }
    for format in [finer.clone(), finer.with_leaf_sizes(0x1f_ffff_f800)] {
        check.check(&Subject { format, says: no_execute, checks: true })?;
    }
    Ok(())
}

/// The levels that tables of the format have.
fn levels<F: Format>(format: &F) -> RangeInclusive<u8> {
    1..=*format.top_levels().end()
}

/// An output address of the format that is a multiple of 2^`log2`, made of any bits.
fn output<F: Format>(format: &F, bits: u64, log2: u32) -> u64 {
    bits & ((1 << format.output_bits()) - 1) & !((1 << log2) - 1)
}

fn sizes<F: Format>(format: &F, level: u8) -> impl Iterator<Item = PageSize> + use<F> {
    let sizes = format.leaf_sizes(level);
    (0..64).filter(move |&log2| sizes & (1 << log2) != 0).filter_map(PageSize::from_log2)
}

/// Entries read: arbitrary ones, and ones that a few bits keep from being valid.
#[derive(Debug, Clone)]
struct Reading {
    bits: u64,
    flips: u64,
    attributes: Attributes,
}

impl Reading {
    fn check_entry<F: Format>(
        &self,
        subject: &Subject<F>,
        level: u8,
        entry: u64,
    ) -> Result<(), TestCaseError> {
        let format = &subject.format;
        let decoded = format.decode(level, entry);
        let context = || format!("{entry:#x} at level {level} of {format:?}");
        // Nobody looks for tables below level 1.
        if level > 1 && format.table_pattern(level).matches(entry) {
            prop_assert_eq!(decoded, Entry::Table(format.table_address(entry)), "{}", context());
        }
        if format.leaf_pattern(level).matches(entry) {
            let own = format.shift(level);
            prop_assert!(
                matches!(decoded, Entry::Leaf { size, .. } if size.log2() == own),
                "{:?}: {}",
                decoded,
                context()
            );
        }
        if !subject.checks {
            return Ok(());
        }
        match decoded {
            Entry::Table(address) => {
                prop_assert_eq!(address, output(format, address, 12), "{}", context());
            }
            Entry::Leaf { oa, size, .. } => {
                prop_assert_eq!(oa, output(format, oa, size.log2()), "{}", context());
                prop_assert!(format.leaf_sizes(level) & size.bytes() != 0, "{}: {}", size, context());
            }
            Entry::Absent | Entry::Malformed => {}
        }
        Ok(())
    }
}

impl Check for Reading {
    fn check<F: Format>(&self, subject: &Subject<F>) -> Result<(), TestCaseError> {
        let format = &subject.format;
        for level in LEVELS {
            self.check_entry(subject, level, self.bits)?;
            // What a pattern does not look at may be anything.
            for pattern in [format.table_pattern(level), format.leaf_pattern(level)] {
                let entry = self.bits & !pattern.mask | pattern.value;
                prop_assert!(pattern == Pattern::NEVER || pattern.matches(entry));
                self.check_entry(subject, level, entry)?;
                self.check_entry(subject, level, entry ^ self.flips)?;
            }
        }
        for level in levels(format) {
            if level > 1 {
                let table = format.table_entry(level, output(format, self.bits, 12));
                self.check_entry(subject, level, table ^ self.flips)?;
            }
            for size in sizes(format, level) {
                let oa = output(format, self.bits, size.log2());
                let leaf = format.leaf_entry(level, size, oa, self.attributes);
                self.check_entry(subject, level, leaf ^ self.flips)?;
            }
        }
        Ok(())
    }
}

/// Entries written, and read again.
#[derive(Debug, Clone)]
struct Writing {
    bits: u64,
    attributes: Attributes,
}

impl Check for Writing {
    fn check<F: Format>(&self, subject: &Subject<F>) -> Result<(), TestCaseError> {
        let format = &subject.format;
        let memory_type = self.attributes.memory_type();
        let memory_type = if format.has_memory_type(memory_type) { memory_type } else { MemoryType::Inherit };
        let attributes = (subject.says)(self.attributes).with_memory_type(memory_type);
        for level in levels(format) {
            if level > 1 {
                let address = output(format, self.bits, 12);
                let table = format.table_entry(level, address);
                prop_assert!(format.table_pattern(level).matches(table), "{:#x} of {:?}", table, format);
                prop_assert_eq!(format.table_address(table), address);
                prop_assert_eq!(format.decode(level, table), Entry::Table(address));
                let tentative = table | F::TENTATIVE;
                prop_assert!(table & F::TENTATIVE == 0 && !format.table_pattern(level).matches(tentative));
                prop_assert_eq!(format.decode(level, tentative), Entry::Table(address), "{:?}", format);
            }
            for size in sizes(format, level) {
                let oa = output(format, self.bits, size.log2());
                let leaf = Entry::Leaf { oa, size, attributes };
                let entry = format.leaf_entry(level, size, oa, self.attributes);
                prop_assert_eq!(format.decode(level, entry), leaf, "{:#x} of {:?}", entry, format);
                // Software's bits say nothing.
                let marked = entry | (self.bits & format.software_bits(level));
                prop_assert_eq!(format.decode(level, marked), leaf, "{:#x} of {:?}", marked, format);
                // The dirty bit says one thing.
                let dirty = attributes | Attributes::DIRTY;
                let marks = [
                    (entry | format.dirty_bit(), dirty),
                    (entry & !format.dirty_bit(), dirty - Attributes::DIRTY),
                ];
                // The native format has none.
                for (entry, attributes) in marks.into_iter().filter(|_| format.dirty_bit() != 0) {
                    let leaf = Entry::Leaf { oa, size, attributes };
                    prop_assert_eq!(format.decode(level, entry), leaf, "{:#x} of {:?}", entry, format);
                }
                // The common case, with whatever hardware or software adds, is seen at a glance.
                let used = self.attributes & Attributes::USED;
                let plain = format.leaf_entry(level, size, oa, Attributes::READ | Attributes::WRITE | used);
                let plain = plain | (self.bits & format.software_bits(level));
                let own = size.log2() == format.shift(level);
                prop_assert_eq!(
                    format.leaf_pattern(level).matches(plain),
                    own,
                    "{:#x} of {:?}",
                    plain,
                    format
                );
            }
        }
        Ok(())
    }
}

/// Attributes of a mapping: reading, writing or both, and anything else.
fn any_attributes() -> impl Strategy<Value = Attributes> {
    let access = prop_oneof![
        Just(Attributes::READ),
        Just(Attributes::WRITE),
        Just(Attributes::READ.union(Attributes::WRITE))
    ];
    let memory_type = prop_oneof![
        Just(MemoryType::Inherit),
        Just(MemoryType::Uncached),
        Just(MemoryType::WriteCombining),
        Just(MemoryType::WriteThrough),
        Just(MemoryType::WriteProtected),
        Just(MemoryType::WriteBack)
    ];
    let others = Attributes::FORCE_SNOOP | Attributes::USED | Attributes::EXECUTE;
    (access, any::<u32>(), memory_type).prop_map(move |(access, bits, memory_type)| {
        (access | Attributes::from_bits_truncate(bits) & others).with_memory_type(memory_type)
    })
}

/// No to three bits.
fn any_flips() -> impl Strategy<Value = u64> {
    proptest::collection::vec(0..64u32, 0..=3).prop_map(|bits| bits.iter().fold(0, |all, bit| all | 1 << bit))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn what_a_pattern_passes_is_what_it_says(
        bits in any::<u64>(),
        flips in any_flips(),
        attributes in any_attributes(),
    ) {
        check_everywhere(&Reading { bits, flips, attributes })?;
    }

    #[test]
    fn reading_undoes_writing(bits in any::<u64>(), attributes in any_attributes()) {
        check_everywhere(&Writing { bits, attributes })?;
    }
}
