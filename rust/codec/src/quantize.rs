//! Residual bins: one scale and a run of codes of 1–64 bits.
//!
//! A code q of b bits means (q − 2^(b−1))·scale, and for b = 1 it means −scale or +scale; products in float32.

use crate::bits::{Packing, check_padding, max_value, pack_with, packed_len, unpack_values_body};
use crate::config::ResidualBin;
use crate::error::Result;
use crate::float::power;

/// The value of a code.
#[inline]
fn dequantize(code: u64, bits: u32, scale: f32) -> f32 {
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

/// The code whose value is nearest to `value`.
#[inline]
fn quantize(value: f64, bits: u32, scale: f32) -> u64 {
    if bits == 1 {
        return u64::from(value * f64::from(scale) >= 0.0);
    }
    let half = 1i64 << (bits - 1).min(62);
    let (low, high) = if bits == 64 { (i64::MIN, i64::MAX) } else { (-half, half - 1) };
    let steps = (value / f64::from(scale)).round_ties_even();
    // A float to integer cast saturates, so the clamp holds for 64 bits too.
    let centred = (steps as i64).clamp(low, high);
    (centred as u64).wrapping_add(1 << (bits - 1)) & max_value(bits)
}

/// What an element should say, and how much its squared error counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Residual {
    pub(crate) wanted: f64,
    pub(crate) weight: f64,
    /// Its error counts for the largest one.
    pub(crate) likely: bool,
}

/// What becomes of an element's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errors {
    /// It stays where it is.
    Stay,
    /// It is added to what the next element should say (`error_diffusion`).
    Diffuse,
    /// The same, and has to be, since the decoder adds up the elements (`delta_encoding`): errors would add up otherwise.
    AddUp,
}

impl Errors {
    /// The element's code, and the error of what is decoded in its place. `carry`: of the elements before it, and then with it.
    #[inline]
    fn quantize(self, wanted: f64, carry: &mut f64, bits: u32, scale: f32) -> (u64, f64) {
        if self == Self::Stay {
            let code = quantize(wanted, bits, scale);
            return (code, wanted - f64::from(dequantize(code, bits, scale)));
        }
        let before = *carry;
        let code = quantize(wanted + before, bits, scale);
        *carry = wanted + before - f64::from(dequantize(code, bits, scale));
        (code, if self == Self::AddUp { *carry } else { *carry - before })
    }
}

/// The scale of least weighted squared error among a ladder of candidates below the one that reaches every residual: with few bits it pays
/// to cut off the rare large ones, as long as no error of a likely element is above `allowed` (and above that candidate's). One bit: the
/// weighted mean |r|, the least-squares choice for ±scale.
fn choose_scale(residuals: &[Residual], bin: &ResidualBin, errors: Errors, carry: f64, allowed: f64) -> f32 {
    let dtype = bin.scale_dtype;
    let stored = |scale: f64| dtype.round(scale.clamp(dtype.smallest_positive(), dtype.max().min(f64::from(f32::MAX)))) as f32;
    let up = residuals.iter().fold(0.0, |a: f64, r| a.max(r.wanted));
    let down = residuals.iter().fold(0.0, |a: f64, r| a.max(-r.wanted));
    if up.max(down) == 0.0 {
        return 1.0;
    }
    if bin.element_bits == 1 {
        let weight: f64 = residuals.iter().map(|r| r.weight).sum();
        return stored(residuals.iter().map(|r| r.weight * r.wanted.abs()).sum::<f64>() / weight);
    }
    // Codes go one further down than up.
    let codes = 2f64.powi(bin.element_bits as i32 - 1);
    let reaching = (up / (codes - 1.0)).max(down / codes);
    let judge = |scale: f32| -> (f64, f64) {
        let (mut carry, mut sum, mut largest) = (carry, 0.0, 0.0f64);
        for residual in residuals {
            let (_, error) = errors.quantize(residual.wanted, &mut carry, bin.element_bits, scale);
            sum += residual.weight * error * error;
            if residual.likely {
                largest = largest.max(error.abs());
            }
        }
        (sum, largest)
    };
    let candidates = [reaching, up.max(down) / codes].into_iter().chain((1..=LADDER).map(|step| reaching * power(STEP, step)));
    let (mut allowed, mut least, mut best) = (allowed, f64::INFINITY, None);
    for (i, scale) in candidates.enumerate() {
        // A float32 scale can underflow to zero for wide codes of tiny residuals; then every code is zero's.
        let scale = stored(scale).max(f32::from_bits(1));
        let (error, largest) = judge(scale);
        if i == 0 {
            allowed = allowed.max(largest);
        }
        if error < least && largest <= allowed {
            (least, best) = (error, Some(scale));
        }
    }
    best.unwrap_or(1.0)
}

/// Steps down from the largest scale, and their ratio: to 23% of it.
const LADDER: i32 = 9;
const STEP: f64 = 0.85;

/// Writes a bin at the start of `out` and returns the rest of it. `carry` goes on into the next bin; `allowed` is the largest error of a
/// likely element that a smaller scale may cause.
pub(crate) fn encode_bin<'a>(
    bin: &ResidualBin,
    residuals: &[Residual],
    errors: Errors,
    allowed: f64,
    carry: &mut f64,
    out: &'a mut [u8],
) -> &'a mut [u8] {
    let bits = bin.element_bits;
    let scale = choose_scale(residuals, bin, errors, *carry, allowed);
    let rest = bin.scale_dtype.write(f64::from(scale), out);
    let (packed, rest) = rest.split_at_mut(packed_len(bin.num_elements, bits));
    pack_with(bin.num_elements, bits, packed, |j| errors.quantize(residuals[j].wanted, carry, bits, scale).0);
    rest
}

/// Elements that are unpacked at a time; a multiple of 8, so that their codes end with a byte.
const BLOCK: usize = 32;

/// Reads a bin from the start of `data`, calling `take(j, values)` with the values of elements `j`, `j` + 1, … until all had their turn,
/// and returns the rest.
#[inline(always)]
pub(crate) fn decode_bin<'a, I: Packing>(
    isa: I,
    bin: &ResidualBin,
    data: &'a [u8],
    mut take: impl FnMut(usize, &[f32]),
) -> Result<&'a [u8]> {
    let (bits, count) = (bin.element_bits, bin.num_elements);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float::FloatType;
    use crate::simd::Portable;
    use proptest::prelude::*;

    fn round_trip(bits: u32, residuals: &[f64]) -> Vec<f32> {
        let bin = ResidualBin { scale_dtype: FloatType::Float32, element_bits: bits, num_elements: residuals.len() };
        let mut out = vec![0; bin.bytes()];
        let residuals: Vec<Residual> = residuals.iter().map(|&wanted| Residual { wanted, weight: 1.0, likely: true }).collect();
        encode_bin(&bin, &residuals, Errors::Stay, 0.0, &mut 0.0, &mut out);
        let mut back = vec![f32::NAN; residuals.len()];
        decode_bin(Portable, &bin, &out, |j, values| back[j..j + values.len()].copy_from_slice(values)).unwrap();
        back
    }

    #[test]
    fn one_bit_keeps_the_sign() {
        let back = round_trip(1, &[-0.5, -0.1, 0.3, -0.7]);
        assert!(back[0] < 0.0 && back[1] < 0.0 && back[2] > 0.0 && back[3] < 0.0);
        assert!((back[2] - 0.4).abs() < 1e-6, "the mean magnitude: {back:?}");
    }

    #[test]
    fn zeros_stay_zero() {
        for bits in 2..=64 {
            assert_eq!(round_trip(bits, &[0.0, 0.0, 0.0]), [0.0; 3]);
        }
    }

    proptest! {
        #[test]
        fn error_is_at_most_a_step(bits in 2u32..=64, residuals in proptest::collection::vec(-30.0..30.0f64, 1..40)) {
            let largest = residuals.iter().fold(0.0, |a: f64, r| a.max(r.abs()));
            // One step of the published scale, plus the float32 product's rounding.
            let step = largest / 2f64.powi(bits as i32 - 1) * 1.0001 + largest * 1e-6;
            for (r, back) in residuals.iter().zip(round_trip(bits, &residuals)) {
                prop_assert!((r - f64::from(back)).abs() <= step * 2.0, "{r} {back} {step}");
            }
        }
    }
}
