//! What the steps of the encoder share: rows on their way through it, and thresholds.

use crate::simd::lanes::Lanes;
use crate::values::{Evaluated, ValueDecoder};

/// Log-probabilities below this count as this: their probability is 0 in every float type, and a
/// fit that reaches for −1e30 loses all others.
pub(crate) const MIN_LOGPROB: f32 = -1000.0;
/// Ids above this probability are *likely*. The errors of likely ids are bounded.
pub(crate) const LIKELY_PROBABILITY: f32 = 1e-6;
/// The same as a log-probability.
pub(crate) const LIKELY_LOGPROB: f32 = -13.815_51;
/// Less probability of the missing outcome than this counts as this: sums of float32 probabilities
/// are no better.
pub(crate) const LEAST_MISSING: f32 = 1e-4;
/// The least weight of a rank in a fit that is followed by residuals, and in their quantisation.
pub(crate) const LEAST_WEIGHT: f32 = 1e-3;

/// Up to [`LANES`](crate::simd::lanes::LANES) rows of `k` sorted log-probabilities.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) logprobs: &'a [f32],
    pub(crate) k: usize,
    /// The total probability of each row.
    pub(crate) masses: Lanes,
}

impl Group<'_> {
    /// The number of rows.
    #[inline(always)]
    pub(crate) const fn len(&self) -> usize {
        self.logprobs.len() / self.k
    }
}

/// What is fitted in one row. All numbers are in nats.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowInput<'a> {
    /// Log-probabilities of all k ranks, in descending order.
    pub(crate) logprobs: &'a [f32],
    /// Those of the approximated ranks.
    pub(crate) y: &'a [f32],
    /// What the decoder adds to the fit F: F + base is fitted to y + `shift`.
    pub(crate) base: f64,
    /// By how much F + base should be above y, because the exact values are below it.
    pub(crate) shift: f64,
    /// The probability of the missing outcome R, at least [`LEAST_MISSING`].
    pub(crate) missing: f64,
    pub(crate) ceiling: Ceiling,
}

/// What the fit must not exceed at the first rank: the last exact value as it is, or what that can
/// be raised to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ceiling {
    pub(crate) last: f64,
    pub(crate) raised: f64,
    /// Twice the KL that raising costs, in units of the first fitted probability.
    pub(crate) price: f64,
}

/// What will be stored for a row beside its exact values, and what that decodes to.
#[derive(Debug, Default)]
pub(crate) struct StoredRow {
    pub(crate) coefficients: Vec<f64>,
    pub(crate) evaluated: Evaluated,
    /// Room for the exact values as they decode.
    pub(crate) exact32: Vec<f32>,
}

impl StoredRow {
    /// Decodes the coefficients.
    #[inline(always)]
    pub(crate) fn evaluate(&mut self, decoder: &ValueDecoder) {
        decoder.evaluate(&self.coefficients, &mut self.evaluated);
    }
}

/// The first ranks, whose log-probabilities are above `floor`.
#[inline(always)]
pub(crate) fn likely_ranks(y: &[f32], floor: f32) -> &[f32] {
    let mut count = 0;
    for value in y {
        count += u32::from(*value > floor);
    }
    &y[..count as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likely_is_the_same_as_a_probability_and_as_a_logarithm() {
        let exact = f64::from(LIKELY_PROBABILITY).ln();
        assert!((f64::from(LIKELY_LOGPROB) - exact).abs() < f64::from(f32::EPSILON) * exact.abs());
    }
}
