//! Sorting of indices, in one place: each order that the compiler sees takes ten kilobytes of code.

use std::cmp::Ordering;

/// Sorts indices, or numbers of any kind, as `order` has it, without memory; equal ones in any order.
pub(crate) fn sort_by(indices: &mut [u32], order: &dyn Fn(u32, u32) -> Ordering) {
    indices.sort_unstable_by(|a, b| order(*a, *b));
}
