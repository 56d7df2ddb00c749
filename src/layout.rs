//! Memory in parts: lists of them, from which plans and what uses their memory are made.

use crate::cpu::attention::Seat;
use crate::error::{Error, Result};
use crate::plan::Row;
use crate::sampling::Candidate;

/// A part of a plan's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Region {
    /// Where it begins.
    pub offset: usize,
    /// Its size without padding.
    pub bytes: usize,
}

/// Adds up regions, each of which begins at a multiple of `ALIGNMENT`.
pub(crate) struct Layout<const ALIGNMENT: usize> {
    pub bytes: usize,
}

impl<const ALIGNMENT: usize> Layout<ALIGNMENT> {
    pub fn new() -> Self {
        Layout { bytes: 0 }
    }

    /// A region for items of so many bytes.
    #[inline(never)]
    pub fn add(&mut self, item: usize, dims: &[usize]) -> Result<Region> {
        let bytes = dims
            .iter()
            .try_fold(item, |size, dim| size.checked_mul(*dim))
            .ok_or_else(too_large)?;
        let offset = self.bytes;
        // `isize::MAX` is the most that one allocation can be.
        self.bytes = offset
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
            .filter(|end| *end <= isize::MAX as usize)
            .ok_or_else(too_large)?;
        Ok(Region { offset, bytes })
    }
}

pub(crate) fn too_large() -> Error {
    Error::argument(
        "the session would be larger than can be addressed; plan a smaller context or fewer sequences",
    )
}

/// Makes of a list of parts, `name: item = [dimensions],` each, the struct of their regions, whose
/// `lay_out` puts them one after another. Dimensions are expressions with the argument of `lay_out`,
/// whose name and type stand in parentheses.
macro_rules! regions {
    (
        $(#[$doc:meta])*
        $vis:vis struct $regions:ident; ($sizes:ident: $of:ty)
        $($(#[$about:meta])* $part:ident: $item:ty = $dims:expr,)*
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        $vis struct $regions {
            $($(#[$about])* pub $part: $crate::layout::Region,)*
        }

        impl $regions {
            $vis fn lay_out<const ALIGNMENT: usize>(
                layout: &mut $crate::layout::Layout<ALIGNMENT>,
                $sizes: $of,
            ) -> $crate::error::Result<Self> {
                Ok($regions { $($part: layout.add(size_of::<$item>(), &$dims)?,)* })
            }
        }
    };
}
pub(crate) use regions;

/// As [`regions`], and makes the struct of slices, whose `carve` cuts them out of the memory. It has one field more, the
/// one in braces, which `carve` is given.
macro_rules! parts {
    (
        $(#[$doc:meta])*
        $vis:vis struct $slices:ident<$life:lifetime> { $(#[$with_doc:meta])* $with:ident: $with_type:ty }
        $(#[$regions_doc:meta])*
        struct $regions:ident; ($sizes:ident: $of:ty)
        $($(#[$about:meta])* $part:ident: $item:ty = $dims:expr,)*
    ) => {
        $crate::layout::regions! {
            $(#[$regions_doc])*
            $vis struct $regions; ($sizes: $of)
            $($(#[$about])* $part: $item = $dims,)*
        }

        $(#[$doc])*
        $vis struct $slices<$life> {
            $(#[$with_doc])*
            pub $with: $with_type,
            $($(#[$about])* pub $part: &$life mut [$item],)*
        }

        impl<$life> $slices<$life> {
            $vis fn carve(
                regions: &$regions,
                carver: &mut $crate::layout::Carver<$life>,
                $with: $with_type,
            ) -> Self {
                $slices { $with, $($part: carver.take(regions.$part),)* }
            }
        }
    };
}
pub(crate) use parts;

/// Types that may lie in a session's memory.
///
/// # Safety
/// Any bytes are a valid value, there is no padding, and the alignment divides
/// [`ARENA_ALIGNMENT`](crate::plan::ARENA_ALIGNMENT).
pub(crate) unsafe trait Plain {}
// SAFETY: plain numbers, and `repr(C)` structs of numbers of one size.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for [f32; 2] {}
// SAFETY: as above.
unsafe impl Plain for Row {}
// SAFETY: as above.
unsafe impl Plain for Seat {}
// SAFETY: as above.
unsafe impl Plain for Candidate {}

/// Hands out regions in the order of their offsets.
pub(crate) struct Carver<'a> {
    rest: &'a mut [u8],
    at: usize,
}

impl<'a> Carver<'a> {
    /// All of `memory`, whose beginning is aligned as any [`Plain`] type.
    pub fn new(memory: &'a mut [u8]) -> Self {
        Carver {
            rest: memory,
            at: 0,
        }
    }

    /// One function for each type, not one for each part.
    #[inline(never)]
    pub fn take<T: Plain>(&mut self, region: Region) -> &'a mut [T] {
        let rest = std::mem::take(&mut self.rest);
        let (_, rest) = rest.split_at_mut(region.offset - self.at);
        let (bytes, rest) = rest.split_at_mut(region.bytes);
        self.rest = rest;
        self.at = region.offset + region.bytes;
        // SAFETY: `Plain` types take any bytes as values.
        let (before, items, after) = unsafe { bytes.align_to_mut::<T>() };
        debug_assert!(
            before.is_empty() && after.is_empty(),
            "the memory is aligned"
        );
        items
    }
}
