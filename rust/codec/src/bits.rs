//! Packing of unsigned integers of 1–64 bits into bytes, most significant bit first.
//!
//! Value `i` of width `w` occupies bits `i·w … (i+1)·w − 1` of the stream; bit 0 is the most significant bit of byte 0. The last byte is
//! padded with zero bits. This is the published layout of token ids and residual codes.

use std::slice;

use crate::error::{CodecError, Result};
use crate::simd::{Backend, Isa, multiversion};

/// Bytes that `count` values of `width` bits occupy.
#[must_use]
pub const fn packed_len(count: usize, width: u32) -> usize {
    (count * width as usize).div_ceil(8)
}

fn check_width(width: u32) -> Result<()> {
    if (1..=64).contains(&width) {
        return Ok(());
    }
    Err(CodecError::Input(format!("bit width {width} is not between 1 and 64")))
}

/// The largest value of `width` bits (1–64).
#[must_use]
pub const fn max_value(width: u32) -> u64 {
    u64::MAX >> (64 - width)
}

/// Packs `values` into `out`, which must be exactly [`packed_len`] bytes.
///
/// Fails with [`CodecError::Input`] when the width is not 1–64, `out` has another size, or a value has more than `width` bits.
pub fn pack(values: &[u64], width: u32, out: &mut [u8]) -> Result<()> {
    check_width(width)?;
    let expected = packed_len(values.len(), width);
    if out.len() != expected {
        return Err(CodecError::Input(format!(
            "output of {} bytes, but {} values of {width} bits fill {expected}",
            out.len(),
            values.len()
        )));
    }
    let limit = max_value(width);
    if let Some((i, value)) = values.iter().enumerate().find(|&(_, &value)| value > limit) {
        return Err(CodecError::Input(format!("value {value} at index {i} does not fit into {width} bits")));
    }
    pack_values(Backend::detect(), values, width, out);
    Ok(())
}

/// Unpacks `out.len()` values of `width` bits from `data`.
///
/// Fails with [`CodecError::Input`] on a bad width, [`CodecError::Truncated`] when `data` is not exactly [`packed_len`] bytes, and
/// [`CodecError::Corrupt`] when a padding bit is set.
pub fn unpack(data: &[u8], width: u32, out: &mut [u64]) -> Result<()> {
    check_width(width)?;
    let expected = packed_len(out.len(), width);
    if data.len() != expected {
        return Err(CodecError::Truncated { what: format!("{} packed values of {width} bits", out.len()), found: data.len(), expected });
    }
    check_padding(data, out.len(), width)?;
    unpack_values(Backend::detect(), data, width, out);
    Ok(())
}

multiversion! {
    /// Unpacks `out.len()` values of `width` bits (1–64) from `data`, which has exactly [`packed_len`] bytes; padding bits are not looked
    /// at. Returns the largest value, 0 if there is none.
    pub(crate) fn unpack_values(data: &[u8], width: u32, out: &mut [u64]) -> u64 = unpack_values_body;
}

multiversion! {
    /// [`unpack_values`] for token ids, which the caller checks by the returned maximum.
    #[allow(dead_code, reason = "the row codec takes it next")]
    pub(crate) fn unpack_ids(data: &[u8], width: u32, out: &mut [i64]) -> u64 = unpack_ids_body;
}

multiversion! {
    /// Packs `values`, each of which fits into `width` bits (1–64), into `out`, which has exactly [`packed_len`] bytes.
    pub(crate) fn pack_values(values: &[u64], width: u32, out: &mut [u8]) = pack_values_body;
}

multiversion! {
    /// [`pack_values`] for token ids that are already checked.
    #[allow(dead_code, reason = "the row codec takes it next")]
    pub(crate) fn pack_ids(ids: &[i64], width: u32, out: &mut [u8]) = pack_ids_body;
}

/// The body of [`unpack_values`], for use in other bodies.
#[inline(always)]
pub(crate) fn unpack_values_body<I: Isa>(_isa: I, data: &[u8], width: u32, out: &mut [u64]) -> u64 {
    let mut largest = 0;
    unpack_with(data, width, out.len(), |i, value| {
        out[i] = value;
        largest = value.max(largest);
    });
    largest
}

/// The body of [`unpack_ids`], for use in other bodies.
#[inline(always)]
pub(crate) fn unpack_ids_body<I: Isa>(isa: I, data: &[u8], width: u32, out: &mut [i64]) -> u64 {
    // SAFETY: i64 and u64 have the same size and alignment, and every bit pattern is valid for both.
    let out = unsafe { slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u64>(), out.len()) };
    unpack_values_body(isa, data, width, out)
}

/// The body of [`pack_values`], for use in other bodies.
#[inline(always)]
pub(crate) fn pack_values_body<I: Isa>(_isa: I, values: &[u64], width: u32, out: &mut [u8]) {
    pack_with(values.len(), width, out, |i| values[i]);
}

/// The body of [`pack_ids`], for use in other bodies.
#[inline(always)]
pub(crate) fn pack_ids_body<I: Isa>(isa: I, ids: &[i64], width: u32, out: &mut [u8]) {
    // SAFETY: i64 and u64 have the same size and alignment, and every bit pattern is valid for both.
    let values = unsafe { slice::from_raw_parts(ids.as_ptr().cast::<u64>(), ids.len()) };
    pack_values_body(isa, values, width, out);
}

/// Refuses set padding bits after the last value; `data` is exactly [`packed_len`] bytes.
pub(crate) fn check_padding(data: &[u8], count: usize, width: u32) -> Result<()> {
    let used = (count * width as usize) % 8;
    match data.last() {
        Some(&last) if used > 0 && last << used != 0 => {
            Err(CodecError::Corrupt("padding bits after the last packed value are not zero".into()))
        }
        _ => Ok(()),
    }
}

/// Packs `value(0) … value(count − 1)`; widths and sizes are already checked, and every value fits.
#[inline]
pub(crate) fn pack_with(count: usize, width: u32, out: &mut [u8], mut value: impl FnMut(usize) -> u64) {
    let mut pending: u128 = 0; // its low `bits` bits are not written yet; bits ≤ 63 before a value is added, so 127 always suffice
    let mut bits = 0;
    let mut at = 0;
    for i in 0..count {
        pending = (pending << width) | u128::from(value(i));
        bits += width;
        if bits >= 64 {
            bits -= 64;
            out[at..at + 8].copy_from_slice(&((pending >> bits) as u64).to_be_bytes());
            at += 8;
        }
    }
    if bits > 0 {
        let last = ((pending << (64 - bits)) as u64).to_be_bytes();
        let rest = bits.div_ceil(8) as usize;
        out[at..at + rest].copy_from_slice(&last[..rest]);
    }
}

/// Calls `take(i, value)` for each of `count` packed values; widths and sizes are already checked.
#[inline]
pub(crate) fn unpack_with(data: &[u8], width: u32, count: usize, mut take: impl FnMut(usize, u64)) {
    // A value lies in the 9 bytes from the byte of its first bit on; widths up to 57 lie in 8. The loads of the last values would
    // reach past the end, so those read from a zero-padded copy of the tail.
    let width = width as usize;
    let mut tail = [0u8; 32];
    let tail_start = data.len().saturating_sub(16);
    tail[..data.len() - tail_start].copy_from_slice(&data[tail_start..]);
    let safe = if data.len() < 16 { 0 } else { ((data.len() - 16) * 8).div_ceil(width).min(count) };
    if width <= 57 {
        for i in 0..safe {
            take(i, read_narrow(data, i * width, width));
        }
        for i in safe..count {
            take(i, read_narrow(&tail, i * width - tail_start * 8, width));
        }
    } else {
        for i in 0..safe {
            take(i, read_wide(data, i * width, width));
        }
        for i in safe..count {
            take(i, read_wide(&tail, i * width - tail_start * 8, width));
        }
    }
}

#[inline]
fn read_narrow(data: &[u8], bit: usize, width: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&data[bit / 8..bit / 8 + 8]);
    (u64::from_be_bytes(bytes) << (bit % 8)) >> (64 - width)
}

#[inline]
fn read_wide(data: &[u8], bit: usize, width: usize) -> u64 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&data[bit / 8..bit / 8 + 16]);
    ((u128::from_be_bytes(bytes) << (bit % 8)) >> (128 - width)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, bit by bit.
    fn naive_pack(values: &[u64], width: u32) -> Vec<u8> {
        let mut out = vec![0; packed_len(values.len(), width)];
        for (i, value) in values.iter().enumerate() {
            for b in 0..width as usize {
                let bit = i * width as usize + b;
                out[bit / 8] |= (((value >> (width as usize - 1 - b)) & 1) as u8) << (7 - bit % 8);
            }
        }
        out
    }

    #[test]
    fn every_width_and_count_round_trips() {
        for width in 1..=64 {
            for count in 0..70 {
                let values: Vec<u64> = (0..count as u64)
                    .map(|i| (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(i as u32) & max_value(width))
                    .collect();
                let mut packed = vec![0xFF; packed_len(count, width)];
                pack(&values, width, &mut packed).unwrap();
                assert_eq!(packed, naive_pack(&values, width), "width {width}, count {count}");
                let mut back = vec![0; count];
                unpack(&packed, width, &mut back).unwrap();
                assert_eq!(back, values, "width {width}, count {count}");
            }
        }
    }

    #[test]
    fn refusals() {
        assert!(matches!(pack(&[4], 2, &mut [0]), Err(CodecError::Input(_))));
        assert!(matches!(pack(&[1], 0, &mut [0]), Err(CodecError::Input(_))));
        assert!(matches!(pack(&[1], 65, &mut [0]), Err(CodecError::Input(_))));
        assert!(matches!(pack(&[1], 2, &mut [0, 0]), Err(CodecError::Input(_))));
        assert!(matches!(unpack(&[0, 0], 2, &mut [0]), Err(CodecError::Truncated { .. })));
        assert!(matches!(unpack(&[1], 2, &mut [0]), Err(CodecError::Corrupt(_))));
    }

    proptest! {
        #[test]
        fn round_trip(width in 1u32..=64, raw in proptest::collection::vec(any::<u64>(), 0..200)) {
            let values: Vec<u64> = raw.iter().map(|v| v & max_value(width)).collect();
            let mut packed = vec![0; packed_len(values.len(), width)];
            pack(&values, width, &mut packed).unwrap();
            let mut back = vec![0; values.len()];
            unpack(&packed, width, &mut back).unwrap();
            prop_assert_eq!(back, values);
        }
    }
}
