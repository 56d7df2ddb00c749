//! The block formats as sixteen rows see them: one function for each format, which takes a block
//! apart into bytes, scales and minimums. What the numbers mean is in `src/quant`.

use super::simd::{LANES, Rows, Simd};

/// Sixteen rows of a matrix at one block each: where the fields of the blocks are. `at` is a field's
/// place in a block.
///
/// # Safety
/// For all functions: the instruction set of `S` is there, and the field lies inside the block.
pub(super) trait Place: Copy {
    /// The place `bytes` further on in each row.
    fn after(self, bytes: usize) -> Self;
    /// The same place, of which the compiler forgets where its rows are: it would keep each row's
    /// address in a register, and has too few.
    ///
    /// # Safety
    /// As for all functions.
    #[inline(always)]
    unsafe fn forgotten<S: Simd>(self) -> Self {
        self
    }
    /// A half-precision number of each row.
    unsafe fn half<S: Simd>(self, at: usize) -> S::F;
    /// Four bytes of each row.
    unsafe fn four<S: Simd>(self, at: usize) -> S::I;
    /// Sixteen bytes of each row.
    unsafe fn sixteen<S: Simd>(self, at: usize) -> [S::I; 4];
    /// 32 bytes of each row.
    #[inline(always)]
    unsafe fn thirty_two<S: Simd>(self, at: usize) -> [S::I; 8] {
        // SAFETY: passed on.
        let ([a, b, c, d], [e, f, g, h]) =
            unsafe { (self.sixteen::<S>(at), self.sixteen::<S>(at + 16)) };
        [a, b, c, d, e, f, g, h]
    }
}

/// Rows one after the other, as GGUF has them.
#[derive(Clone, Copy)]
pub(super) struct InRows(pub Rows);

impl Place for InRows {
    #[inline(always)]
    unsafe fn forgotten<S: Simd>(self) -> Self {
        InRows(Rows {
            // SAFETY: passed on.
            stride: unsafe { S::hidden(self.0.stride) },
            ..self.0
        })
    }
    #[inline(always)]
    fn after(self, bytes: usize) -> Self {
        InRows(Rows {
            start: self.0.start.wrapping_add(bytes),
            ..self.0
        })
    }
    #[inline(always)]
    unsafe fn half<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: passed on.
        unsafe { S::gather_half(self.0, at) }
    }
    #[inline(always)]
    unsafe fn four<S: Simd>(self, at: usize) -> S::I {
        // SAFETY: passed on.
        unsafe { S::gather_4(self.0, at) }
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(self, at: usize) -> [S::I; 4] {
        // SAFETY: passed on.
        unsafe { S::gather_16(self.0, at) }
    }
}

/// The sixteen rows' blocks interleaved, as `src/quant/tiles.rs` tells.
#[derive(Clone, Copy)]
pub(super) struct InTile(pub *const u8);

impl Place for InTile {
    #[inline(always)]
    fn after(self, bytes: usize) -> Self {
        InTile(self.0.wrapping_add(LANES * bytes))
    }
    #[inline(always)]
    unsafe fn half<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: sixteen numbers of two bytes are there.
        unsafe { S::load_half(&*self.0.add(LANES * at).cast()) }
    }
    #[inline(always)]
    unsafe fn four<S: Simd>(self, at: usize) -> S::I {
        // SAFETY: sixteen times four bytes are there.
        unsafe { S::load_words(&*self.0.add(LANES * at).cast()) }
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(self, at: usize) -> [S::I; 4] {
        // SAFETY: passed on.
        unsafe {
            [
                self.four::<S>(at),
                self.four::<S>(at + 4),
                self.four::<S>(at + 8),
                self.four::<S>(at + 12),
            ]
        }
    }
}

/// Either, found out for each field: half the code, where speed does not matter.
impl<A: Place, B: Place> Place for Result<A, B> {
    fn after(self, bytes: usize) -> Self {
        self.map(|a| a.after(bytes)).map_err(|b| b.after(bytes))
    }
    unsafe fn half<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: passed on, as for the others.
        unsafe {
            match self {
                Ok(a) => a.half::<S>(at),
                Err(b) => b.half::<S>(at),
            }
        }
    }
    unsafe fn four<S: Simd>(self, at: usize) -> S::I {
        // SAFETY: as above.
        unsafe {
            match self {
                Ok(a) => a.four::<S>(at),
                Err(b) => b.four::<S>(at),
            }
        }
    }
    unsafe fn sixteen<S: Simd>(self, at: usize) -> [S::I; 4] {
        // SAFETY: as above.
        unsafe {
            match self {
                Ok(a) => a.sixteen::<S>(at),
                Err(b) => b.sixteen::<S>(at),
            }
        }
    }
}

/// 32 columns of sixteen rows: `weight = scale · (number − BIAS) + minimum`.
#[derive(Clone, Copy)]
#[repr(C)] // equal for instruction sets of equal registers
pub(super) struct Group<S: Simd> {
    /// Columns 4k to 4k + 3 of each row.
    pub numbers: [S::I; 8],
    /// Scale of the first sixteen columns, or of all.
    pub scale: S::F,
    /// The last sixteen columns' scale ([`Format::HALVES`]) or the minimum ([`Format::MINIMUMS`]).
    /// No format has both.
    pub other: S::F,
}

/// A block format.
pub(super) trait Format {
    /// Bytes of a block.
    const BYTES: usize;
    /// Groups of 32 columns in a block.
    const GROUPS: usize;
    /// What is taken off each number.
    const BIAS: i32 = 0;
    /// The largest magnitude of a number.
    const MAX: i32;
    /// Whether numbers are signed bytes; else they are from 0 to 127.
    const SIGNED: bool = false;
    /// Whether the two halves of a group have scales of their own.
    const HALVES: bool = false;
    /// Whether groups have minimums.
    const MINIMUMS: bool = false;
    /// What is worked out once for a block.
    type Head<S: Simd>;

    /// # Safety
    /// The instruction set of `S` is there, and each row has a whole block at the place.
    unsafe fn head<S: Simd>(place: impl Place) -> Self::Head<S>;
    /// # Safety
    /// As above; `index` is below [`Format::GROUPS`].
    unsafe fn group<S: Simd>(place: impl Place, head: &Self::Head<S>, index: usize) -> Group<S>;
}

#[inline(always)]
unsafe fn low<S: Simd>(bytes: S::I) -> S::I {
    // SAFETY: the caller has the instruction set, as in all of this file.
    unsafe { S::and(bytes, S::splat(0x0f0f_0f0f)) }
}

#[inline(always)]
unsafe fn high<S: Simd>(bytes: S::I) -> S::I {
    // SAFETY: as above.
    unsafe { low::<S>(S::shr::<4>(bytes)) }
}

/// 32 numbers out of 16 bytes: the lower halves of the bytes are columns 0 to 15.
#[inline(always)]
unsafe fn nibbles<S: Simd>(bytes: [S::I; 4]) -> [S::I; 8] {
    let [a, b, c, d] = bytes;
    // SAFETY: as above.
    unsafe {
        [
            low::<S>(a),
            low::<S>(b),
            low::<S>(c),
            low::<S>(d),
            high::<S>(a),
            high::<S>(b),
            high::<S>(c),
            high::<S>(d),
        ]
    }
}

/// Bits 4k to 4k + 3 of `bits` as bit 4 of the bytes of numbers k.
#[inline(always)]
unsafe fn with_fifth_bits<S: Simd>(numbers: [S::I; 8], bits: S::I) -> [S::I; 8] {
    // SAFETY: as above.
    unsafe {
        let mut out = numbers;
        for (k, number) in out.iter_mut().enumerate() {
            let four = S::and(S::shr_by(bits, 4 * k as u32), S::splat(0xf));
            // Bit i to bit 8i + 4, for each i: shifted copies, of which a mask keeps one bit each.
            let spread = S::or(
                S::or(S::shl::<4>(four), S::shl::<11>(four)),
                S::or(S::shl::<18>(four), S::shl::<25>(four)),
            );
            *number = S::or(*number, S::and(spread, S::splat(0x1010_1010)));
        }
        out
    }
}

pub(super) struct Q4_0;
impl Format for Q4_0 {
    const BYTES: usize = 18;
    const GROUPS: usize = 1;
    const MAX: i32 = 15;
    const BIAS: i32 = 8;
    type Head<S: Simd> = ();
    #[inline(always)]
    unsafe fn head<S: Simd>(_: impl Place) {}
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, _: &(), _: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            Group {
                numbers: nibbles::<S>(place.sixteen::<S>(2)),
                scale: place.half::<S>(0),
                other: S::splat_float(0.0),
            }
        }
    }
}

pub(super) struct Q4_1;
impl Format for Q4_1 {
    const BYTES: usize = 20;
    const GROUPS: usize = 1;
    const MAX: i32 = 15;
    const MINIMUMS: bool = true;
    type Head<S: Simd> = ();
    #[inline(always)]
    unsafe fn head<S: Simd>(_: impl Place) {}
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, _: &(), _: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            Group {
                numbers: nibbles::<S>(place.sixteen::<S>(4)),
                scale: place.half::<S>(0),
                other: place.half::<S>(2),
            }
        }
    }
}

pub(super) struct Q5_0;
impl Format for Q5_0 {
    const BYTES: usize = 22;
    const GROUPS: usize = 1;
    const MAX: i32 = 31;
    const BIAS: i32 = 16;
    type Head<S: Simd> = ();
    #[inline(always)]
    unsafe fn head<S: Simd>(_: impl Place) {}
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, _: &(), _: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            let numbers = nibbles::<S>(place.sixteen::<S>(6));
            Group {
                numbers: with_fifth_bits::<S>(numbers, place.four::<S>(2)),
                scale: place.half::<S>(0),
                other: S::splat_float(0.0),
            }
        }
    }
}

pub(super) struct Q5_1;
impl Format for Q5_1 {
    const BYTES: usize = 24;
    const GROUPS: usize = 1;
    const MAX: i32 = 31;
    const MINIMUMS: bool = true;
    type Head<S: Simd> = ();
    #[inline(always)]
    unsafe fn head<S: Simd>(_: impl Place) {}
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, _: &(), _: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            let numbers = nibbles::<S>(place.sixteen::<S>(8));
            Group {
                numbers: with_fifth_bits::<S>(numbers, place.four::<S>(4)),
                scale: place.half::<S>(0),
                other: place.half::<S>(2),
            }
        }
    }
}

pub(super) struct Q8_0;
impl Format for Q8_0 {
    const BYTES: usize = 34;
    const GROUPS: usize = 1;
    const MAX: i32 = 128;
    const SIGNED: bool = true;
    type Head<S: Simd> = ();
    #[inline(always)]
    unsafe fn head<S: Simd>(_: impl Place) {}
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, _: &(), _: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            Group {
                numbers: place.thirty_two::<S>(2),
                scale: place.half::<S>(0),
                other: S::splat_float(0.0),
            }
        }
    }
}

/// Scale, minimum, and the 6-bit scales and minimums of eight groups.
pub(super) struct KHead<S: Simd> {
    scale: S::F,
    minimum: S::F,
    /// Groups 0 to 3 and 4 to 7, a byte each.
    scales: [S::I; 2],
    minimums: [S::I; 2],
}

impl<S: Simd> KHead<S> {
    #[inline(always)]
    unsafe fn new(place: impl Place) -> Self {
        // SAFETY: as the trait says. For the packing see `src/quant/k.rs`.
        unsafe {
            let (a, b) = (place.four::<S>(4), place.four::<S>(8));
            let c = place.four::<S>(12);
            let (six, two) = (S::splat(0x3f3f_3f3f), S::splat(0x0303_0303));
            let upper_a = S::shl::<4>(S::and(S::shr::<6>(a), two));
            let upper_b = S::shl::<4>(S::and(S::shr::<6>(b), two));
            KHead {
                scale: place.half::<S>(0),
                minimum: S::mul(place.half::<S>(2), S::splat_float(-1.0)),
                scales: [S::and(a, six), S::or(low::<S>(c), upper_a)],
                minimums: [S::and(b, six), S::or(high::<S>(c), upper_b)],
            }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, packed: &[S::I; 2], whole: S::F, index: usize) -> S::F {
        // SAFETY: as the trait says.
        unsafe {
            let bytes = S::shr_by(packed[index / 4], 8 * (index % 4) as u32);
            S::mul(whole, S::to_float(S::and(bytes, S::splat(0xff))))
        }
    }

    #[inline(always)]
    unsafe fn group(&self, numbers: [S::I; 8], index: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            Group {
                numbers,
                scale: self.of(&self.scales, self.scale, index),
                other: self.of(&self.minimums, self.minimum, index),
            }
        }
    }
}

/// Groups 2j and 2j + 1 are the lower and upper halves of the same 32 bytes.
#[inline(always)]
unsafe fn half_bytes<S: Simd>(bytes: [S::I; 8], index: usize) -> [S::I; 8] {
    let mut numbers = bytes;
    for number in &mut numbers {
        // SAFETY: as the trait says.
        *number = unsafe {
            if index.is_multiple_of(2) {
                low::<S>(*number)
            } else {
                high::<S>(*number)
            }
        };
    }
    numbers
}

pub(super) struct Q4K;
impl Format for Q4K {
    const BYTES: usize = 144;
    const GROUPS: usize = 8;
    const MAX: i32 = 15;
    const MINIMUMS: bool = true;
    type Head<S: Simd> = KHead<S>;
    #[inline(always)]
    unsafe fn head<S: Simd>(place: impl Place) -> KHead<S> {
        // SAFETY: as the trait says.
        unsafe { KHead::new(place) }
    }
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, head: &KHead<S>, index: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            let bytes = place.thirty_two::<S>(16 + 32 * (index / 2));
            head.group(half_bytes::<S>(bytes, index), index)
        }
    }
}

pub(super) struct Q5K;
impl Format for Q5K {
    const BYTES: usize = 176;
    const GROUPS: usize = 8;
    const MAX: i32 = 31;
    const MINIMUMS: bool = true;
    type Head<S: Simd> = KHead<S>;
    #[inline(always)]
    unsafe fn head<S: Simd>(place: impl Place) -> KHead<S> {
        // SAFETY: as the trait says.
        unsafe { KHead::new(place) }
    }
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, head: &KHead<S>, index: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            let bytes = place.thirty_two::<S>(48 + 32 * (index / 2));
            let mut numbers = half_bytes::<S>(bytes, index);
            let fifth = place.thirty_two::<S>(16);
            for (number, bits) in numbers.iter_mut().zip(fifth) {
                let bit = S::and(S::shr_by(bits, index as u32), S::splat(0x0101_0101));
                *number = S::or(*number, S::shl::<4>(bit));
            }
            head.group(numbers, index)
        }
    }
}

pub(super) struct Q6K;
impl Format for Q6K {
    const BYTES: usize = 210;
    const GROUPS: usize = 8;
    const MAX: i32 = 63;
    const BIAS: i32 = 32;
    const HALVES: bool = true;
    /// The scale of the whole block.
    type Head<S: Simd> = S::F;
    #[inline(always)]
    unsafe fn head<S: Simd>(place: impl Place) -> S::F {
        // SAFETY: as the trait says.
        unsafe { place.half::<S>(208) }
    }
    #[inline(always)]
    unsafe fn group<S: Simd>(place: impl Place, head: &S::F, index: usize) -> Group<S> {
        // SAFETY: as the trait says.
        unsafe {
            let (half, quarter) = (index / 4, index % 4);
            let bytes = place.thirty_two::<S>(64 * half + 32 * (quarter % 2));
            let mut numbers = half_bytes::<S>(bytes, quarter / 2);
            let upper = place.thirty_two::<S>(128 + 32 * half);
            for (number, bits) in numbers.iter_mut().zip(upper) {
                let two = S::and(S::shr_by(bits, 2 * quarter as u32), S::splat(0x0303_0303));
                *number = S::or(*number, S::shl::<4>(two));
            }
            // Sixteen signed bytes of scales, two for each group.
            let four = place.four::<S>(192 + 4 * (index / 2));
            let shift = 16 * (index % 2) as u32;
            let first = S::sign_extend_byte(S::shr_by(four, shift));
            let second = S::sign_extend_byte(S::shr_by(four, shift + 8));
            Group {
                numbers,
                scale: S::mul(*head, S::to_float(first)),
                other: S::mul(*head, S::to_float(second)),
            }
        }
    }
}
