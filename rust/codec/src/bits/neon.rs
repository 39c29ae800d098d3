//! Unpacking with NEON: byte permutes and shifts by another count for every value, two or four
//! values at a time.

use std::arch::aarch64::{
    int32x4_t, int64x2_t, uint8x16_t, uint32x4_t, uint64x2_t, vandq_u32, vandq_u64, vbslq_u64,
    vcgtq_u64, vdupq_n_u32, vdupq_n_u64, vgetq_lane_u64, vld1q_s32, vld1q_s64, vld1q_u8, vmaxq_u32,
    vmaxvq_u32, vorrq_u32, vqtbl1q_u8, vreinterpretq_u32_u8, vreinterpretq_u64_u8, vshlq_u32,
    vshlq_u64, vst1q_u32, vst1q_u64,
};

use super::pairs::{Fours, Pairs};
use super::private::ValuesMut;
use super::{Value, five_bytes, max_value, nine_bytes, portable};

pub(super) use portable::pack;

#[inline]
#[target_feature(enable = "neon")]
fn load_16(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_2(counts: [i64; 2]) -> int64x2_t {
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_s64(counts.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_2(values: &mut [u64; 2], vector: uint64x2_t) {
    // SAFETY: the array has 16 bytes.
    unsafe { vst1q_u64(values.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_4(counts: [i32; 4]) -> int32x4_t {
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_s32(counts.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_4(values: &mut [u32; 4], vector: uint32x4_t) {
    // SAFETY: the array has 16 bytes.
    unsafe { vst1q_u32(values.as_mut_ptr(), vector) }
}

/// Loads 16 bytes from `start` on.
///
/// # Safety
/// `data` has them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_16_at(data: &[u8], start: usize) -> uint8x16_t {
    debug_assert!(start + 16 <= data.len());
    // SAFETY: the caller's promise.
    unsafe { vld1q_u8(data.as_ptr().add(start)) }
}

/// See [`super::unpack_values`].
#[target_feature(enable = "neon")]
pub(super) fn unpack<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> u64 {
    match V::typed(out) {
        ValuesMut::U32(out) if five_bytes(width) => unpack_fours::<true>(data, width, out),
        ValuesMut::U32(out) => unpack_fours::<false>(data, width, out),
        ValuesMut::U64(out) if nine_bytes(width as usize) => portable::unpack(data, width, out),
        ValuesMut::U64(out) => unpack_pairs(data, width, out),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_fours<const FIVE: bool>(data: &[u8], width: u32, out: &mut [u32]) -> u64 {
    let fours = Fours::of(width);
    let start = [0, fours.second];
    let last = fours.last.map(|bytes| load_16(&bytes));
    let before = fours.before.map(|bytes| load_16(&bytes));
    // Shifts to the right, and for the bytes before to the left; those by 32 leave nothing.
    let right = fours.after.map(|after| load_4(after.map(|count| -(count as i32))));
    let left = fours.after.map(|after| load_4(after.map(|count| 32 - count as i32)));
    let mask = vdupq_n_u32(max_value(width) as u32);
    let mut largest = vdupq_n_u32(0);
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
        for (four, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: the group has 16 bytes from the second four's start on, which is at most 16.
            let loaded = unsafe { load_16_at(group, start[four]) };
            let mut values =
                vshlq_u32(vreinterpretq_u32_u8(vqtbl1q_u8(loaded, last[four])), right[four]);
            if FIVE {
                let upper = vreinterpretq_u32_u8(vqtbl1q_u8(loaded, before[four]));
                values = vorrq_u32(values, vshlq_u32(upper, left[four]));
            }
            let values = vandq_u32(values, mask);
            largest = vmaxq_u32(largest, values);
            store_4(out, values);
        }
        rest = &rest[width as usize..];
    }
    portable::unpack_last(rest, width as usize, 0, last_values).max(vmaxvq_u32(largest).into())
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_pairs(data: &[u8], width: u32, out: &mut [u64]) -> u64 {
    let pairs = Pairs::of(width);
    let bytes = [0, 1, 2, 3].map(|pair| load_16(&pairs.bytes[pair]));
    let shift = pairs.after.map(|after| load_2(after.map(|count| -(count as i64))));
    let mask = vdupq_n_u64(max_value(width));
    let mut largest = vdupq_n_u64(0);
    let start = pairs.start;
    assert!(start.iter().all(|&start| start <= pairs.start[3]), "the pairs follow each other");
    // Groups whose last pair has its 16 bytes.
    let groups = ((data.len() + width as usize).saturating_sub(start[3] + 16) / width as usize)
        .min(out.len() / 8);
    let mut rest = data;
    for out in &mut out.as_chunks_mut::<8>().0[..groups] {
        let group = &rest[..start[3] + 16];
        for (pair, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            // SAFETY: the group has 16 bytes from the last pair's start on, and that is the largest
            // of all starts.
            let loaded = unsafe { load_16_at(group, start[pair]) };
            let heads = vreinterpretq_u64_u8(vqtbl1q_u8(loaded, bytes[pair]));
            let values = vandq_u64(vshlq_u64(heads, shift[pair]), mask);
            largest = vbslq_u64(vcgtq_u64(values, largest), values, largest);
            store_2(out, values);
        }
        rest = &rest[width as usize..];
    }
    let largest = vgetq_lane_u64::<0>(largest).max(vgetq_lane_u64::<1>(largest));
    portable::unpack_last(data, width as usize, 8 * groups, out).max(largest)
}
