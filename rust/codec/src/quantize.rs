//! Residual bins: one scale and a run of codes of 1–64 bits.
//!
//! A code q of b bits means (q − 2^(b−1))·scale, and for b = 1 it means −scale or +scale; products in float32.

use crate::bits::{check_padding, max_value, pack_with, packed_len, unpack_with};
use crate::config::ResidualBin;
use crate::error::Result;

/// The value of a code.
#[inline]
fn dequantize(code: u64, bits: u32, scale: f32) -> f32 {
    if bits == 1 {
        return if code == 1 { scale } else { -scale };
    }
    let centred = code.wrapping_sub(1 << (bits - 1)) as i64;
    centred as f32 * scale
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
}

/// The scale of least weighted squared error among a ladder of candidates below the one that reaches every residual: with few bits it pays
/// to cut off the rare large ones. One bit: the weighted mean |r|, the least-squares choice for ±scale.
fn choose_scale(residuals: &[Residual], bin: &ResidualBin) -> f32 {
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
    let error = |scale: f32| -> f64 {
        let decoded = |r: f64| f64::from(dequantize(quantize(r, bin.element_bits, scale), bin.element_bits, scale));
        residuals.iter().map(|r| r.weight * (r.wanted - decoded(r.wanted)).powi(2)).sum()
    };
    let candidates = [reaching, up.max(down) / codes].into_iter().chain((1..=LADDER).map(|step| reaching * STEP.powi(step)));
    // A float32 scale can underflow to zero for wide codes of tiny residuals; then every code is zero's.
    let candidates = candidates.map(|scale| stored(scale).max(f32::from_bits(1)));
    let best = candidates.map(|scale| (error(scale), scale)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(1.0, |(_, scale)| scale)
}

/// Steps down from the largest scale, and their ratio: to 23% of it.
const LADDER: i32 = 9;
const STEP: f64 = 0.85;

/// Writes a bin at the start of `out` and returns the rest of it.
///
/// With `feedback`, the error of each element is carried into the next one, and on into the next bin: asked for by `error_diffusion`, and
/// always right for differences, whose errors would add up otherwise.
pub(crate) fn encode_bin<'a>(
    bin: &ResidualBin,
    residuals: &[Residual],
    feedback: bool,
    carry: &mut f64,
    out: &'a mut [u8],
) -> &'a mut [u8] {
    let bits = bin.element_bits;
    let scale = choose_scale(residuals, bin);
    let rest = bin.scale_dtype.write(f64::from(scale), out);
    let (packed, rest) = rest.split_at_mut(packed_len(bin.num_elements, bits));
    pack_with(bin.num_elements, bits, packed, |j| {
        let wanted = residuals[j].wanted + *carry;
        let code = quantize(wanted, bits, scale);
        if feedback {
            *carry = wanted - f64::from(dequantize(code, bits, scale));
        }
        code
    });
    rest
}

/// Reads a bin from the start of `data`, calling `take(j, value)` for each element, and returns the rest.
pub(crate) fn decode_bin<'a>(bin: &ResidualBin, data: &'a [u8], mut take: impl FnMut(usize, f32)) -> Result<&'a [u8]> {
    let scale = bin.scale_dtype.read(data, 0) as f32;
    let (packed, rest) = data[bin.scale_dtype.size()..].split_at(packed_len(bin.num_elements, bin.element_bits));
    check_padding(packed, bin.num_elements, bin.element_bits)?;
    unpack_with(packed, bin.element_bits, bin.num_elements, |j, code| take(j, dequantize(code, bin.element_bits, scale)));
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float::FloatType;
    use proptest::prelude::*;

    fn round_trip(bits: u32, residuals: &[f64]) -> Vec<f32> {
        let bin = ResidualBin { scale_dtype: FloatType::Float32, element_bits: bits, num_elements: residuals.len() };
        let mut out = vec![0; bin.bytes()];
        let residuals: Vec<Residual> = residuals.iter().map(|&wanted| Residual { wanted, weight: 1.0 }).collect();
        encode_bin(&bin, &residuals, false, &mut 0.0, &mut out);
        let mut back = vec![f32::NAN; residuals.len()];
        decode_bin(&bin, &out, |j, value| back[j] = value).unwrap();
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
