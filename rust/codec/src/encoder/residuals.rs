//! Quantising residuals: the scale of each bin, and the codes of its elements.

use super::plan::Plan;
use super::row::{LEAST_WEIGHT, LIKELY_LOGPROB, MIN_LOGPROB, RowInput};
use crate::bits::{max_value, pack_with, packed_len};
use crate::config::ResidualBin;
use crate::float::power;
use crate::simd::lanes::exp;
use crate::values::dequantize;

/// Candidates for the scale are this many steps down from the largest, to 23% of it.
const LADDER: i32 = 9;
/// The ratio of two steps.
const STEP: f64 = 0.85;

/// What an element should say, and how much its squared error counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Residual {
    target: f64,
    weight: f64,
    /// Its error counts for the largest one.
    likely: bool,
}

/// What becomes of an element's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ErrorFlow {
    /// It stays where it is.
    Stay,
    /// It is added to what the next element should say (`error_diffusion`).
    Diffuse,
    /// The same, by necessity: the decoder adds up the elements (`delta_encoding`), so errors would
    /// add up otherwise.
    AddUp,
}

impl ErrorFlow {
    /// The element's code, and the error of what is decoded in its place. `carry` is the error of
    /// the elements before it, and afterwards includes this one's.
    #[inline]
    fn quantize(self, target: f64, carry: &mut f64, bits: u32, scale: f32) -> (u64, f64) {
        if self == Self::Stay {
            let code = quantize(target, bits, scale);
            return (code, target - f64::from(dequantize(code, bits, scale)));
        }
        let before = *carry;
        let code = quantize(target + before, bits, scale);
        *carry = target + before - f64::from(dequantize(code, bits, scale));
        (code, if self == Self::AddUp { *carry } else { *carry - before })
    }
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

/// Writes the bins of a row whose polynomial decodes to `evaluated`. `allowed` is the largest error
/// of a likely element that a smaller scale may cause.
#[inline(always)]
pub(crate) fn write_bins(
    plan: &Plan,
    row: &RowInput,
    evaluated: &[f64],
    allowed: f64,
    residuals: &mut Vec<Residual>,
    mut out: &mut [u8],
) {
    let layout = plan.decoder().layout();
    let y = row.y;
    // What the bins should say is the values, or with differences the steps, less what the
    // polynomial says.
    let value = |j: usize| f64::from(y[j].max(MIN_LOGPROB));
    let residual = |j: usize| {
        let before = match (layout.delta_encoding, j) {
            (false, _) => -row.shift,
            (true, 0) => row.base.max(f64::from(MIN_LOGPROB)),
            (true, _) => value(j - 1),
        };
        Residual {
            target: value(j) - before - evaluated[j],
            weight: f64::from(exp(y[j] - y[0]) + LEAST_WEIGHT),
            likely: y[j] > LIKELY_LOGPROB,
        }
    };
    residuals.clear();
    residuals.extend((0..y.len()).map(residual));
    let flow = match (layout.delta_encoding, plan.error_diffusion()) {
        (true, _) => ErrorFlow::AddUp,
        (false, true) => ErrorFlow::Diffuse,
        (false, false) => ErrorFlow::Stay,
    };
    let mut at = 0;
    let mut carry = 0.0;
    for bin in &layout.residual_bins {
        let residuals = &residuals[at..at + bin.num_elements];
        out = BinEncoder { bin, residuals, flow, allowed }.write(&mut carry, out);
        at += bin.num_elements;
    }
}

/// One bin of a row to encode.
struct BinEncoder<'a> {
    bin: &'a ResidualBin,
    residuals: &'a [Residual],
    flow: ErrorFlow,
    /// The largest error of a likely element that a smaller scale may cause.
    allowed: f64,
}

impl BinEncoder<'_> {
    /// Writes the bin at the start of `out` and returns the rest of it. `carry` goes on into the
    /// next bin.
    fn write<'b>(&self, carry: &mut f64, out: &'b mut [u8]) -> &'b mut [u8] {
        let bin = self.bin;
        let bits = bin.element_bits;
        let scale = self.choose_scale(*carry);
        let rest = bin.scale_dtype.write(f64::from(scale), out);
        let (packed, rest) = rest.split_at_mut(packed_len(bin.num_elements, bits));
        let code = |j: usize| self.flow.quantize(self.residuals[j].target, carry, bits, scale).0;
        pack_with(bin.num_elements, bits, packed, code);
        rest
    }

    /// The scale of least weighted squared error among a ladder of candidates below the one that
    /// reaches every residual: with few bits it pays to cut off the rare large ones, as long as no
    /// error of a likely element is above `allowed` (and above that candidate's). For one bit it is
    /// the weighted mean |r|, the least-squares choice for ±scale.
    fn choose_scale(&self, carry: f64) -> f32 {
        let residuals = self.residuals;
        let bits = self.bin.element_bits;
        let up = residuals.iter().fold(0.0, |a: f64, r| a.max(r.target));
        let down = residuals.iter().fold(0.0, |a: f64, r| a.max(-r.target));
        if up.max(down) == 0.0 {
            return 1.0;
        }
        if bits == 1 {
            let weight: f64 = residuals.iter().map(|r| r.weight).sum();
            let weighted: f64 = residuals.iter().map(|r| r.weight * r.target.abs()).sum();
            return self.stored_scale(weighted / weight);
        }
        // Codes go one further down than up.
        let codes = 2f64.powi(bits as i32 - 1);
        let reaching = (up / (codes - 1.0)).max(down / codes);
        let ladder = (1..=LADDER).map(|step| reaching * power(STEP, step));
        let candidates = [reaching, up.max(down) / codes].into_iter().chain(ladder);
        let mut allowed = self.allowed;
        let mut least = f64::INFINITY;
        let mut best = None;
        for (i, scale) in candidates.enumerate() {
            // A float32 scale can underflow to zero for wide codes of tiny residuals; then every
            // code is zero's.
            let scale = self.stored_scale(scale).max(f32::from_bits(1));
            let (error, largest) = self.errors(scale, carry);
            if i == 0 {
                allowed = allowed.max(largest);
            }
            if error < least && largest <= allowed {
                least = error;
                best = Some(scale);
            }
        }
        best.unwrap_or(1.0)
    }

    /// The nearest scale that can be stored.
    fn stored_scale(&self, scale: f64) -> f32 {
        let dtype = self.bin.scale_dtype;
        let largest = dtype.max().min(f64::from(f32::MAX));
        dtype.round(scale.clamp(dtype.smallest_positive(), largest)) as f32
    }

    /// The weighted squared error of a scale, and the largest error of a likely element.
    fn errors(&self, scale: f32, mut carry: f64) -> (f64, f64) {
        let bits = self.bin.element_bits;
        let mut sum = 0.0;
        let mut largest = 0.0f64;
        for residual in self.residuals {
            let (_, error) = self.flow.quantize(residual.target, &mut carry, bits, scale);
            sum += residual.weight * error * error;
            if residual.likely {
                largest = largest.max(error.abs());
            }
        }
        (sum, largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float::FloatType;
    use crate::simd::Portable;
    use crate::values::decode_bin;
    use proptest::prelude::*;

    fn round_trip(bits: u32, residuals: &[f64]) -> Vec<f32> {
        let bin = ResidualBin {
            scale_dtype: FloatType::Float32,
            element_bits: bits,
            num_elements: residuals.len(),
        };
        let mut out = vec![0; bin.bytes()];
        let residual = |&target: &f64| Residual { target, weight: 1.0, likely: true };
        let residuals: Vec<Residual> = residuals.iter().map(residual).collect();
        let encoder =
            BinEncoder { bin: &bin, residuals: &residuals, flow: ErrorFlow::Stay, allowed: 0.0 };
        encoder.write(&mut 0.0, &mut out);
        let mut back = vec![f32::NAN; residuals.len()];
        let take = |j: usize, values: &[f32]| back[j..j + values.len()].copy_from_slice(values);
        decode_bin(Portable, &bin, &out, take).unwrap();
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
        fn error_is_at_most_a_step(
            bits in 2u32..=64,
            residuals in proptest::collection::vec(-30.0..30.0f64, 1..40),
        ) {
            let largest = residuals.iter().fold(0.0, |a: f64, r| a.max(r.abs()));
            // One step of the published scale, plus the float32 product's rounding.
            let step = largest / 2f64.powi(bits as i32 - 1) * 1.0001 + largest * 1e-6;
            for (r, back) in residuals.iter().zip(round_trip(bits, &residuals)) {
                prop_assert!((r - f64::from(back)).abs() <= step * 2.0, "{r} {back} {step}");
            }
        }
    }
}
