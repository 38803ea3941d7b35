//! Makes a sequence that fails shorter, so that a person can see why.

use super::{comparison::Difference, operations::Operation};

/// Leaves out operations, many at a time at first, as long as the rest still fails. Returns what is left, and how it
/// fails.
pub(crate) fn minimise(
    operations: Vec<Operation>,
    difference: Difference,
    mut fails: impl FnMut(&[Operation]) -> Option<Difference>,
) -> (Vec<Operation>, Difference) {
    let (mut operations, mut difference) = (operations, difference);
    let mut length = operations.len();
    while length > 0 {
        let mut at = 0;
        while at < operations.len() {
            let end = operations.len().min(at + length);
            let without = [&operations[..at], &operations[end..]].concat();
            match fails(&without) {
                Some(still) => (operations, difference) = (without, still),
                None => at = end,
            }
        }
        length /= 2;
    }
    (operations, difference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid_pagetable::IovaRange;

    #[test]
    fn only_what_matters_is_left() {
        let unmap = |page: u64| Operation::Unmap { range: IovaRange::new(page, page).unwrap() };
        let all: Vec<_> = (0..50).map(unmap).collect();
        let fails = |some: &[Operation]| {
            let both = some.contains(&unmap(3)) && some.contains(&unmap(41));
            both.then(|| Difference { after: some.len(), what: String::new() })
        };
        let (left, difference) = minimise(all.clone(), fails(&all).unwrap(), fails);
        assert_eq!(left, [unmap(3), unmap(41)]);
        assert_eq!(difference.after, 2);
    }
}
