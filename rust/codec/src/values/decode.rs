//! Decoding the values of a row.

use super::layout::{Layout, Terms};
use super::residuals::decode_bin;
use crate::bits::Packing;
use crate::config::MAX_TERMS;
use crate::error::{CodecError, Result};
use crate::simd::lanes::all_finite;

/// Decodes the values of rows of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct ValueDecoder {
    layout: Layout,
    terms: Terms,
}

/// What the polynomial of a row decodes to, at each approximated rank.
#[derive(Debug, Default)]
pub(crate) struct Evaluated {
    pub(crate) narrow: Vec<f32>,
    /// In float64, filled only where more is done with it ([`Layout::is_plain`] is false).
    pub(crate) wide: Vec<f64>,
}

/// Buffers of one thread, kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct DecoderScratch {
    evaluated: Evaluated,
}

impl ValueDecoder {
    pub(crate) const fn new(layout: Layout, terms: Terms) -> Self {
        Self { layout, terms }
    }

    #[inline(always)]
    pub(crate) const fn layout(&self) -> &Layout {
        &self.layout
    }

    #[inline(always)]
    pub(crate) const fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Stored ids a row.
    #[inline(always)]
    pub(crate) const fn k(&self) -> usize {
        self.layout.exact_k + self.terms.ranks()
    }

    /// Decodes the values of one row from its first bytes.
    #[inline(always)]
    pub(crate) fn decode<I: Packing>(
        &self,
        isa: I,
        data: &[u8],
        logprobs: &mut [f32],
        scratch: &mut DecoderScratch,
    ) -> Result<()> {
        let layout = &self.layout;
        let m = self.terms.count();
        let (exact, rest) = data.split_at(layout.exact_bytes());
        let (stored, bins) = rest.split_at(m * layout.coefficient_dtype.size());
        let mut coefficients = [0.0; MAX_TERMS + 1];
        for (i, c) in coefficients[..m].iter_mut().enumerate() {
            *c = layout.coefficient_dtype.read(stored, i);
        }
        if layout.wide || layout.delta_encoding || layout.published_rounding {
            self.evaluate(&coefficients[..m], &mut scratch.evaluated);
            self.decode_sequence(isa, (exact, bins), logprobs, &mut scratch.evaluated.wide)?;
        } else {
            let (first, approximate) = logprobs.split_at_mut(layout.exact_k);
            layout.exact_dtype.read_all(exact, first);
            self.terms.evaluate_f32(&coefficients[..m], approximate);
            self.add_residuals(isa, bins, approximate, |value, residual| value + residual)?;
        }
        check_finite(logprobs)
    }

    /// Evaluates the polynomial at each approximated rank, in float32 or (`wide`) float64.
    #[inline(always)]
    pub(crate) fn evaluate(&self, coefficients: &[f64], out: &mut Evaluated) {
        let Evaluated { narrow, wide } = out;
        narrow.resize(self.terms.ranks(), 0.0);
        if !self.layout.wide {
            self.terms.evaluate_f32(coefficients, narrow);
        }
        if self.layout.is_plain() {
            return;
        }
        if self.layout.wide {
            wide.resize(self.terms.ranks(), 0.0);
            self.terms.evaluate_f64(coefficients, wide);
            narrow.iter_mut().zip(wide.iter()).for_each(|(value, sum)| *value = *sum as f32);
        } else {
            wide.clear();
            wide.extend(narrow.iter().map(|&value| f64::from(value)));
        }
        if self.layout.published_rounding {
            let dtype = self.layout.coefficient_dtype;
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                *wide = dtype.round(*wide);
                *narrow = *wide as f32;
            }
        }
    }

    /// Adds the residuals to the approximated values that have one, by `sum`.
    #[inline(always)]
    pub(crate) fn add_residuals<I: Packing, T: Copy>(
        &self,
        isa: I,
        mut bins: &[u8],
        values: &mut [T],
        sum: impl Fn(T, f32) -> T,
    ) -> Result<()> {
        let mut at = 0;
        for bin in &self.layout.residual_bins {
            bins = decode_bin(isa, bin, bins, |j, residuals| {
                for (value, &residual) in values[at + j..].iter_mut().zip(residuals) {
                    *value = sum(*value, residual);
                }
            })?;
            at += bin.num_elements;
        }
        Ok(())
    }

    /// Adds one residual: in float64 where the polynomial is evaluated in it, otherwise in float32,
    /// or as the published decoder does.
    #[inline(always)]
    pub(crate) fn add_residual(&self, value: f64, residual: f32) -> f64 {
        if self.layout.published_rounding {
            self.layout.published_sum(value, residual)
        } else if self.layout.wide {
            value + f64::from(residual)
        } else {
            f64::from(value as f32 + residual)
        }
    }

    /// The general case: float64 terms, differences. `values` are the evaluated polynomial.
    #[inline(always)]
    fn decode_sequence<I: Packing>(
        &self,
        isa: I,
        (exact, bins): (&[u8], &[u8]),
        logprobs: &mut [f32],
        values: &mut [f64],
    ) -> Result<()> {
        let layout = &self.layout;
        self.add_residuals(isa, bins, values, |value, residual| {
            self.add_residual(value, residual)
        })?;
        let mut sum = 0.0;
        let exact = (0..layout.exact_k).map(|i| layout.exact_dtype.read(exact, i));
        for (out, value) in logprobs.iter_mut().zip(exact.chain(values.iter().copied())) {
            if layout.delta_encoding && layout.published_rounding {
                // It sums up float32, and rounds what comes out.
                sum += f64::from(value as f32);
                *out = layout.exact_dtype.round(f64::from(sum as f32)) as f32;
                continue;
            }
            sum = if layout.delta_encoding { sum + value } else { value };
            *out = sum as f32;
        }
        Ok(())
    }
}

/// Fails when a decoded value is not finite.
#[inline(always)]
fn check_finite(logprobs: &[f32]) -> Result<()> {
    if all_finite(logprobs) {
        return Ok(());
    }
    match logprobs.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(rank) => Err(CodecError::Corrupt(format!(
            "log-probability {} at rank {rank} is not finite",
            logprobs[rank]
        ))),
    }
}
