//! Instructions on sixteen numbers of 32 bits: [`Vectors`].
//!
//! The only unsafe code of the compact format. Instructions need a token that proves the
//! instruction set; what is read through indices lies within its slice, which is checked to be long
//! enough for one, since indices beyond the end are cut off.

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_cvtsi128_si64,
    _mm_extract_epi64, _mm_insert_epi32, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_andnot_si256, _mm256_blendv_epi8, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmpgt_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu32_epi64, _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_max_epi32,
    _mm256_max_epu32, _mm256_min_epu32, _mm256_min_ps, _mm256_movemask_ps, _mm256_or_si256,
    _mm256_permute2x128_si256, _mm256_set_m128i, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_sllv_epi32, _mm256_srli_epi32, _mm256_srlv_epi32,
    _mm256_storeu_si256, _mm256_sub_epi32, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64,
    _mm256_unpacklo_epi32, _mm256_unpacklo_epi64, _mm256_xor_si256, _mm512_castsi256_si512,
    _mm512_castsi512_si256, _mm512_extracti64x4_epi64, _mm512_inserti64x4, _mm512_loadu_si512,
    _mm512_mask_blend_epi32, _mm512_permutex2var_epi32, _mm512_set1_epi32, _mm512_test_epi32_mask,
};

use crate::compact::document::LANES;
use crate::compact::order::Ids;
use crate::simd::{Avx2, Avx512, Isa};

/// A number of each lane, in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(in crate::compact) struct Numbers(pub(in crate::compact) [u32; LANES]);

/// All elements of [`Numbers`].
#[inline(always)]
pub(super) fn flat(numbers: &[Numbers]) -> &[u32] {
    // SAFETY: `Numbers` has the size and the content of its array.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), LANES * numbers.len()) }
}

/// Prefetches ids.
#[inline(always)]
pub(super) fn prefetch(table: &Ids, at: &Numbers) {
    if cfg!(miri) {
        return;
    }
    for &at in &at.0 {
        let place = match table {
            Ids::Narrow(table) => table.as_ptr().wrapping_add(at as usize).cast(),
            Ids::Wide(table) => table.as_ptr().wrapping_add(at as usize).cast(),
        };
        // SAFETY: x86-64 has SSE, and prefetching does nothing that can be seen, wherever it is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place) }
    }
}

/// A number of each lane, in two registers: CPUs wait less for them than for one of 512 bits.
#[derive(Clone, Copy)]
pub(in crate::compact) struct Vector([__m256i; 2]);

/// Some of the lanes.
#[derive(Clone, Copy)]
pub(in crate::compact) struct Mask([__m256i; 2]);

/// How many elements of a table [`Vectors::Low`] has.
const LOW: usize = 64;

/// AVX2 instructions for each half, written out: closures would be functions without AVX2.
macro_rules! halves {
    ($result:ident, |$half:ident| $body:expr) => {
        $result([
            {
                let $half = 0;
                $body
            },
            {
                let $half = 1;
                $body
            },
        ])
    };
}

/// Methods of AVX2 instructions for each half.
macro_rules! methods {
    ($($(#[$attribute:meta])* $name:ident($($argument:ident: $kind:ident),+)
        -> $result:ident = $body:expr;)*) => {$(
        $(#[$attribute])*
        #[inline(always)]
        fn $name(self, $($argument: $kind),+) -> $result {
            // SAFETY: the token proves AVX2.
            halves!($result, |half| unsafe {
                $(let $argument = $argument.0[half];)+
                $body
            })
        }
    )*};
}

const _: () = assert!(LANES == 16, "a vector has two registers of eight lanes");

/// What an instruction set with AVX2 does with a number of each lane.
///
/// # Safety
/// The token proves AVX2.
pub(in crate::compact) unsafe trait Vectors: Isa {
    /// The first [`LOW`] elements of a table, if they can be kept in registers.
    type Low;

    fn low(self, table: &[u32]) -> Self::Low;

    /// [`Vectors::gather`] from a table, which is quicker where the indices are below [`LOW`].
    fn gather_low(self, table: &[u32], low: &Self::Low, at: Vector) -> Vector;

    methods! {
        add(a: Vector, b: Vector) -> Vector = _mm256_add_epi32(a, b);
        sub(a: Vector, b: Vector) -> Vector = _mm256_sub_epi32(a, b);
        and(a: Vector, b: Vector) -> Vector = _mm256_and_si256(a, b);
        /// The bits of `b` that `a` has not.
        and_not(a: Vector, b: Vector) -> Vector = _mm256_andnot_si256(a, b);
        or(a: Vector, b: Vector) -> Vector = _mm256_or_si256(a, b);
        xor(a: Vector, b: Vector) -> Vector = _mm256_xor_si256(a, b);
        min(a: Vector, b: Vector) -> Vector = _mm256_min_epu32(a, b);
        max(a: Vector, b: Vector) -> Vector = _mm256_max_epu32(a, b);
        left(a: Vector, bits: Vector) -> Vector = _mm256_sllv_epi32(a, bits);
        right(a: Vector, bits: Vector) -> Vector = _mm256_srlv_epi32(a, bits);
        /// Where `a` is above `b`; both are below 2³¹.
        above(a: Vector, b: Vector) -> Mask = _mm256_cmpgt_epi32(a, b);
        /// `yes` in the lanes of the mask, `no` in others.
        select(mask: Mask, yes: Vector, no: Vector) -> Vector = _mm256_blendv_epi8(no, yes, mask);
        /// The numbers in the lanes of the mask, 0 in others.
        only(mask: Mask, numbers: Vector) -> Vector = _mm256_and_si256(mask, numbers);
        /// [`bucket`](crate::compact::numbers::bucket) of numbers above 0 and at most 2²⁴, by the
        /// exponents and highest bits of floats.
        buckets(numbers: Vector) -> Vector = {
            let bits = _mm256_castps_si256(_mm256_cvtepi32_ps(numbers));
            let buckets = _mm256_sub_epi32(_mm256_srli_epi32::<22>(bits), _mm256_set1_epi32(2 * 127));
            _mm256_max_epi32(buckets, _mm256_set1_epi32(1))
        };
    }

    #[inline(always)]
    fn splat(self, number: u32) -> Vector {
        // SAFETY: the token proves AVX2.
        Vector([unsafe { _mm256_set1_epi32(number as i32) }; 2])
    }

    /// Shifted right by as many bits in every lane.
    #[inline(always)]
    fn right_by(self, a: Vector, bits: u32) -> Vector {
        self.right(a, self.splat(bits))
    }

    #[inline(always)]
    fn load(self, numbers: &Numbers) -> Vector {
        let halves: &[[u32; 8]] = numbers.0.as_chunks().0;
        // SAFETY: the token proves AVX2, and there are eight numbers.
        halves!(Vector, |half| unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) })
    }

    #[inline(always)]
    fn store(self, vector: Vector, numbers: &mut Numbers) {
        for (half, vector) in numbers.0.as_chunks_mut::<8>().0.iter_mut().zip(vector.0) {
            // SAFETY: the token proves AVX2, and there is room for eight numbers.
            unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), vector) }
        }
    }

    /// A bit for each lane.
    #[inline(always)]
    fn bits(self, mask: Mask) -> u32 {
        // SAFETY: the token proves AVX2.
        let low = unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(mask.0[0])) };
        // SAFETY: as above.
        let high = unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(mask.0[1])) };
        (low | high << 8) as u32
    }

    /// Elements of a table that is not empty; the last one for indices beyond it.
    #[inline(always)]
    fn gather(self, table: &[u32], at: Vector) -> Vector {
        assert!(!table.is_empty(), "there is an element to read");
        let at = self.min(at, self.splat((table.len() - 1) as u32));
        // SAFETY: the token proves AVX2, and no index is beyond the last element.
        halves!(Vector, |half| unsafe { read_eight::<4>(table.as_ptr().cast(), at.0[half]) })
    }

    /// The low 16 bits are those at each index of a table of two elements at least; the last but
    /// one for indices beyond that.
    #[inline(always)]
    fn gather_narrow(self, table: &[u16], at: Vector) -> Vector {
        assert!(table.len() >= 2, "there are two elements to read");
        let at = self.min(at, self.splat((table.len() - 2) as u32));
        // SAFETY: the token proves AVX2, and no index is beyond the last element but one; two are
        // read.
        halves!(Vector, |half| unsafe { read_eight::<2>(table.as_ptr().cast(), at.0[half]) })
    }

    /// The four bytes from each on, of at least four and fewer than 2³²; the last four for indices
    /// beyond those.
    #[inline(always)]
    fn gather_bytes(self, bytes: &[u8], at: Vector) -> Vector {
        assert!(bytes.len() >= 4, "there are four bytes to read");
        let at = self.min(at, self.splat((bytes.len() - 4) as u32));
        // SAFETY: the token proves AVX2, and four bytes are read, none beyond the last one.
        halves!(Vector, |half| unsafe { read_eight::<1>(bytes.as_ptr(), at.0[half]) })
    }

    /// Float32 sums of numbers given by their bits and one number, at most 0.
    #[inline(always)]
    fn shifted(self, floats: Vector, shift: f32) -> Vector {
        // SAFETY: the token proves AVX2.
        halves!(Vector, |half| unsafe {
            let sums = _mm256_add_ps(_mm256_castsi256_ps(floats.0[half]), _mm256_set1_ps(shift));
            _mm256_castps_si256(_mm256_min_ps(sums, _mm256_setzero_ps()))
        })
    }

    #[inline(always)]
    fn store_floats(self, floats: Vector, out: &mut [f32; LANES]) {
        for (half, floats) in out.as_chunks_mut::<8>().0.iter_mut().zip(floats.0) {
            // SAFETY: the token proves AVX2, and there is room for eight numbers.
            unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), floats) }
        }
    }

    #[inline(always)]
    fn store_ids(self, ids: Vector, out: &mut [i64; LANES]) {
        for (half, ids) in out.as_chunks_mut::<8>().0.iter_mut().zip(ids.0) {
            // SAFETY: the token proves AVX2, and there is room for twice four numbers.
            unsafe {
                let low = _mm256_cvtepu32_epi64(_mm256_castsi256_si128(ids));
                let high = _mm256_cvtepu32_epi64(_mm256_extracti128_si256::<1>(ids));
                _mm256_storeu_si256(half.as_mut_ptr().cast(), low);
                _mm256_storeu_si256(half[4..].as_mut_ptr().cast(), high);
            }
        }
    }

    /// Makes the columns of sixteen rows the rows of others.
    #[inline(always)]
    fn transpose(self, rows: &[Numbers; LANES], out: &mut [Numbers; LANES]) {
        for block in [0, 8] {
            for half in 0..2 {
                // SAFETY: the token proves AVX2.
                let columns = unsafe { transpose_eight(&rows[block..block + 8], half) };
                for (column, out) in columns.into_iter().zip(&mut out[8 * half..]) {
                    // SAFETY: as above, and there is room for eight numbers.
                    unsafe {
                        _mm256_storeu_si256(out.0[block..block + 8].as_mut_ptr().cast(), column);
                    }
                }
            }
        }
    }
}

// SAFETY: it does.
unsafe impl Vectors for Avx2 {
    type Low = ();

    #[inline(always)]
    fn low(self, _table: &[u32]) {}

    #[inline(always)]
    fn gather_low(self, table: &[u32], _low: &(), at: Vector) -> Vector {
        self.gather(table, at)
    }
}

// SAFETY: a CPU with it has AVX2, too.
unsafe impl Vectors for Avx512 {
    type Low = [__m512i; LOW / LANES];

    #[inline(always)]
    fn low(self, table: &[u32]) -> Self::Low {
        let mut low = [0; LOW];
        low.iter_mut().zip(table).for_each(|(low, element)| *low = *element);
        // SAFETY: the token proves AVX-512, and there are sixteen numbers.
        unsafe {
            [
                _mm512_loadu_si512(low[..].as_ptr().cast()),
                _mm512_loadu_si512(low[LANES..].as_ptr().cast()),
                _mm512_loadu_si512(low[2 * LANES..].as_ptr().cast()),
                _mm512_loadu_si512(low[3 * LANES..].as_ptr().cast()),
            ]
        }
    }

    #[inline(always)]
    fn gather_low(self, table: &[u32], low: &Self::Low, at: Vector) -> Vector {
        if self.bits(self.above(at, self.splat(LOW as u32 - 1))) > 0 {
            return self.gather(table, at);
        }
        let Vector([first, second]) = at;
        // SAFETY: the token proves AVX-512.
        unsafe {
            let at = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
            // The sixth bit says which half an element is in; those below it, where in the half.
            let lower = _mm512_permutex2var_epi32(low[0], at, low[1]);
            let upper = _mm512_permutex2var_epi32(low[2], at, low[3]);
            let is_upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(LOW as i32 / 2));
            let found = _mm512_mask_blend_epi32(is_upper, lower, upper);
            Vector([_mm512_castsi512_si256(found), _mm512_extracti64x4_epi64::<1>(found)])
        }
    }
}

/// The same number, which the compiler must have in a register of its own: it would take the places
/// of all numbers apart in vectors first, and wait for them longer.
#[inline(always)]
#[cfg_attr(miri, expect(unused_mut, reason = "Miri has no assembly"))]
fn scalar(mut number: u64) -> u64 {
    #[cfg(not(miri))]
    // SAFETY: there is no code in it, and it touches neither memory, nor the stack, nor flags.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags));
    }
    number
}

/// Four numbers of 32 bits from these places on, in units of `SCALE` bytes. CPUs read them quicker
/// one by one than by their instructions for that.
///
/// # Safety
/// The numbers lie within what `from` points to.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn read_four<const SCALE: usize>(from: *const u8, places: __m128i) -> __m128i {
    let pairs = [_mm_cvtsi128_si64(places), _mm_extract_epi64::<1>(places)];
    let pairs = [scalar(pairs[0] as u64), scalar(pairs[1] as u64)];
    let read = |place: u64| {
        // SAFETY: the caller's promise.
        unsafe { from.add(SCALE * place as usize).cast::<i32>().read_unaligned() }
    };
    let low = _mm_cvtsi32_si128(read(pairs[0] & 0xffff_ffff));
    let low = _mm_insert_epi32::<1>(low, read(pairs[0] >> 32));
    let low = _mm_insert_epi32::<2>(low, read(pairs[1] & 0xffff_ffff));
    _mm_insert_epi32::<3>(low, read(pairs[1] >> 32))
}

/// [`read_four`] of eight places.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn read_eight<const SCALE: usize>(from: *const u8, places: __m256i) -> __m256i {
    let (low, high) = (_mm256_castsi256_si128(places), _mm256_extracti128_si256::<1>(places));
    // SAFETY: the caller's promise.
    unsafe { _mm256_set_m128i(read_four::<SCALE>(from, high), read_four::<SCALE>(from, low)) }
}

/// The columns of eight rows: their first eight, or the others.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_eight(rows: &[Numbers], half: usize) -> [__m256i; 8] {
    let load = |row: usize| {
        let numbers: &[u32; 8] = &rows[row].0.as_chunks().0[half];
        // SAFETY: there are eight numbers.
        unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
    };
    // Of four rows each: the halves of four numbers of columns c and 4 + c, for c from 0 to 3.
    let fours = |row: usize| {
        let [a, b, c, d] = [load(row), load(row + 1), load(row + 2), load(row + 3)];
        let low = [_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d)];
        let high = [_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d)];
        [
            _mm256_unpacklo_epi64(low[0], low[1]),
            _mm256_unpackhi_epi64(low[0], low[1]),
            _mm256_unpacklo_epi64(high[0], high[1]),
            _mm256_unpackhi_epi64(high[0], high[1]),
        ]
    };
    let (upper, lower) = (fours(0), fours(4));
    [
        _mm256_permute2x128_si256::<0x20>(upper[0], lower[0]),
        _mm256_permute2x128_si256::<0x20>(upper[1], lower[1]),
        _mm256_permute2x128_si256::<0x20>(upper[2], lower[2]),
        _mm256_permute2x128_si256::<0x20>(upper[3], lower[3]),
        _mm256_permute2x128_si256::<0x31>(upper[0], lower[0]),
        _mm256_permute2x128_si256::<0x31>(upper[1], lower[1]),
        _mm256_permute2x128_si256::<0x31>(upper[2], lower[2]),
        _mm256_permute2x128_si256::<0x31>(upper[3], lower[3]),
    ]
}
