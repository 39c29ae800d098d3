//! Decoding residual bins: one scale and a run of codes of 1–64 bits.
//!
//! A code q of b bits means (q − 2^(b−1))·scale, and for b = 1 it means −scale or +scale; products
//! are rounded to float32.

use crate::bits::{Packing, check_padding, packed_len, unpack_values_body};
use crate::config::ResidualBin;
use crate::error::Result;

/// The number of elements that are unpacked at a time; a multiple of 8, so that their codes end
/// with a byte.
const BLOCK: usize = 32;

/// The value of a code.
#[inline]
pub(crate) fn dequantize(code: u64, bits: u32, scale: f32) -> f32 {
    if bits == 1 {
        return if code == 1 { scale } else { -scale };
    }
    let centred = code.wrapping_sub(1 << (bits - 1)) as i64;
    centred as f32 * scale
}

/// The same for at most 32 bits, from integers that every instruction set has vectors for.
#[inline(always)]
fn dequantize_narrow(code: u32, bits: u32, scale: f32) -> f32 {
    if bits == 1 {
        return if code == 1 { scale } else { -scale };
    }
    code.wrapping_sub(1 << (bits - 1)) as i32 as f32 * scale
}

/// Reads a bin from the start of `data` and returns the rest of it. `take(j, values)` is called
/// with the values of the elements `j`, `j` + 1, … until it was called for all of them.
#[inline(always)]
pub(crate) fn decode_bin<'a, I: Packing>(
    isa: I,
    bin: &ResidualBin,
    data: &'a [u8],
    mut take: impl FnMut(usize, &[f32]),
) -> Result<&'a [u8]> {
    let bits = bin.element_bits;
    let count = bin.num_elements;
    let scale = bin.scale_dtype.read(data, 0) as f32;
    let (packed, rest) = data[bin.scale_dtype.size()..].split_at(packed_len(count, bits));
    check_padding(packed, count, bits)?;
    for (at, packed) in (0..count).step_by(BLOCK).zip(packed.chunks(BLOCK / 8 * bits as usize)) {
        let here = BLOCK.min(count - at);
        let mut values = [0.0; BLOCK];
        if bits <= u32::BITS {
            let mut codes = [0u32; BLOCK];
            unpack_values_body(isa, packed, bits, &mut codes[..here]);
            for (value, &code) in values.iter_mut().zip(&codes) {
                *value = dequantize_narrow(code, bits, scale);
            }
        } else {
            let mut codes = [0u64; BLOCK];
            unpack_values_body(isa, packed, bits, &mut codes[..here]);
            for (value, &code) in values.iter_mut().zip(&codes) {
                *value = dequantize(code, bits, scale);
            }
        }
        take(at, &values[..here]);
    }
    Ok(rest)
}
