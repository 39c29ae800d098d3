//! Unpacking with AVX2: byte permutes within 128 bits and shifts by another count for every value.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_loadu_si128, _mm256_and_si256, _mm256_blendv_epi8, _mm256_cmpgt_epi64,
    _mm256_loadu_si256, _mm256_max_epu32, _mm256_or_si256, _mm256_set_m128i, _mm256_set1_epi32,
    _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_sllv_epi32,
    _mm256_srlv_epi32, _mm256_srlv_epi64, _mm256_storeu_si256, _mm256_sub_epi32,
};

use super::pairs::{Fours, Pairs};
use super::private::ValuesMut;
use super::{Value, five_bytes, max_value, nine_bytes, portable};

pub(super) use portable::pack;

#[inline]
#[target_feature(enable = "avx2")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array has 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_4(values: &[[u64; 2]; 2]) -> __m256i {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_4(values: &mut [u64; 4], vector: __m256i) {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_8(values: &[[u32; 4]; 2]) -> __m256i {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_8(values: &mut [u32; 8], vector: __m256i) {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), vector) }
}

/// Loads 16 bytes from `low` on and 16 from `high` on.
///
/// # Safety
/// `data` has them.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_16s(data: &[u8], low: usize, high: usize) -> __m256i {
    debug_assert!(low.max(high) + 16 <= data.len());
    // SAFETY: the caller's promise.
    let [low, high] = unsafe { [data.as_ptr().add(low), data.as_ptr().add(high)] };
    // SAFETY: as above.
    unsafe { _mm256_set_m128i(_mm_loadu_si128(high.cast()), _mm_loadu_si128(low.cast())) }
}

/// See [`super::unpack_values`].
#[target_feature(enable = "avx2")]
pub(super) fn unpack<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> u64 {
    match V::typed(out) {
        ValuesMut::U32(out) if five_bytes(width) => unpack_fours::<true>(data, width, out),
        ValuesMut::U32(out) => unpack_fours::<false>(data, width, out),
        // Signed comparisons of 64 bits do not order these, and there are no others.
        ValuesMut::U64(out) if width == 64 || nine_bytes(width as usize) => {
            portable::unpack(data, width, out)
        }
        ValuesMut::U64(out) if width <= 32 => unpack_pairs::<true>(data, width, out),
        ValuesMut::U64(out) => unpack_pairs::<false>(data, width, out),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn unpack_fours<const FIVE: bool>(data: &[u8], width: u32, out: &mut [u32]) -> u64 {
    let fours = Fours::of(width);
    let both = |bytes: &[[u8; 16]; 2]| _mm256_set_m128i(load_16(&bytes[1]), load_16(&bytes[0]));
    let last = both(&fours.last);
    let before = both(&fours.before);
    let after = load_8(&fours.after);
    let missing = _mm256_sub_epi32(_mm256_set1_epi32(32), after);
    let mask = _mm256_set1_epi32(max_value(width) as i32);
    let mut largest = _mm256_setzero_si256();
    let (groups, last_values) = out.as_chunks_mut::<8>();
    let mut rest = data;
    let mut padded = [0; 32];
    for out in groups {
        // The second four of the last groups lacks some of its 16 bytes.
        let group = if rest.len() < fours.second + 16 {
            padded[..rest.len()].copy_from_slice(rest);
            &padded
        } else {
            rest
        };
        // SAFETY: the group has 16 bytes from the second four's start on, which is at most 16.
        let loaded = unsafe { load_16s(group, 0, fours.second) };
        let mut values = _mm256_srlv_epi32(_mm256_shuffle_epi8(loaded, last), after);
        if FIVE {
            // A shift by 32 leaves nothing, and is where the last byte ends with the value.
            values = _mm256_or_si256(
                values,
                _mm256_sllv_epi32(_mm256_shuffle_epi8(loaded, before), missing),
            );
        }
        let values = _mm256_and_si256(values, mask);
        largest = _mm256_max_epu32(largest, values);
        store_8(out, values);
        rest = &rest[width as usize..];
    }
    let mut lanes = [0; 8];
    store_8(&mut lanes, largest);
    let largest = lanes.into_iter().fold(0, u32::max);
    portable::unpack_last(rest, width as usize, 0, last_values).max(largest.into())
}

/// The larger of values that all have at most 32 (`SHORT`) or 63 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn larger<const SHORT: bool>(a: __m256i, b: __m256i) -> __m256i {
    if SHORT { _mm256_max_epu32(a, b) } else { _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(b, a)) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn unpack_pairs<const SHORT: bool>(data: &[u8], width: u32, out: &mut [u64]) -> u64 {
    let pairs = Pairs::of(width);
    let bytes = [0, 2]
        .map(|pair| _mm256_set_m128i(load_16(&pairs.bytes[pair + 1]), load_16(&pairs.bytes[pair])));
    let after =
        [load_4(&[pairs.after[0], pairs.after[1]]), load_4(&[pairs.after[2], pairs.after[3]])];
    let mask = _mm256_set1_epi64x(max_value(width) as i64);
    let mut largest = [_mm256_setzero_si256(); 2];
    let [second, third, fourth] = [pairs.start[1], pairs.start[2], pairs.start[3]];
    assert!(
        pairs.start[0] == 0 && second <= fourth && third <= fourth,
        "the pairs follow each other"
    );
    // Groups whose last pair has its 16 bytes.
    let groups = ((data.len() + width as usize).saturating_sub(fourth + 16) / width as usize)
        .min(out.len() / 8);
    let mut rest = data;
    for out in &mut out.as_chunks_mut::<8>().0[..groups] {
        let group = &rest[..fourth + 16];
        // SAFETY: the group has 16 bytes from the last pair's start on, and that is the largest of
        // all starts.
        let (low, high) = unsafe { (load_16s(group, 0, second), load_16s(group, third, fourth)) };
        let low =
            _mm256_and_si256(_mm256_srlv_epi64(_mm256_shuffle_epi8(low, bytes[0]), after[0]), mask);
        let high = _mm256_and_si256(
            _mm256_srlv_epi64(_mm256_shuffle_epi8(high, bytes[1]), after[1]),
            mask,
        );
        largest = [larger::<SHORT>(largest[0], low), larger::<SHORT>(largest[1], high)];
        let (halves, _) = out.as_chunks_mut::<4>();
        store_4(&mut halves[0], low);
        store_4(&mut halves[1], high);
        rest = &rest[width as usize..];
    }
    let mut both = [0; 4];
    store_4(&mut both, larger::<SHORT>(largest[0], largest[1]));
    let largest = both.into_iter().fold(0, u64::max);
    portable::unpack_last(data, width as usize, 8 * groups, out).max(largest)
}
