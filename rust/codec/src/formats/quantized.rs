//! The published "distribution quantization" format (`logprob_compressor`); bytes in FORMAT.md §2.

use super::{RowFormat, Scratch, check_finite, check_ids, fit_weights};
use crate::bits::{check_padding, pack_with, unpack_with};
use crate::config::QuantizedConfig;
use crate::error::{CodecError, Result};
use crate::fit::Fit;
use crate::float::FloatType;
use crate::quantize::{decode_bin, encode_bin};

/// A prepared configuration: the terms as the decoder sees them, and the fit over them.
#[derive(Debug, Clone)]
pub struct Quantized {
    config: QuantizedConfig,
    /// m rows of n: term i at rank `exact_k` + j, rounded to `term_dtype`.
    terms: Vec<f64>,
    terms32: Vec<f32>,
    fit: Option<Fit>,
}

impl Quantized {
    pub(crate) fn new(config: QuantizedConfig) -> Self {
        let n = config.approximated();
        let at = |term: &crate::config::Term, j| config.term_dtype.round(term.at(config.t(j)));
        let terms: Vec<f64> = config.terms().iter().flat_map(|term| (0..n).map(move |j| at(term, j))).collect();
        let fit = (n > 0 && !config.terms().is_empty()).then(|| {
            let columns = terms.chunks(n).map(|row| if config.delta_encoding { running_sum(row) } else { row.to_vec() });
            Fit::new(columns.collect(), config.term_dtype)
        });
        let terms32 = terms.iter().map(|&value| value as f32).collect();
        Self { config, terms, terms32, fit }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &QuantizedConfig {
        &self.config
    }

    /// The terms at the approximated ranks, m rows of n, rounded to `term_dtype`: what a decoder multiplies coefficients with.
    #[must_use]
    pub fn terms(&self) -> &[f64] {
        &self.terms
    }

    /// Σ coefficient · term at each approximated rank: products and sums in term order, in float32 (float64 for float64 terms).
    fn evaluate(&self, coefficients: &[f64], sum32: &mut Vec<f32>, out: &mut Vec<f64>) {
        let n = self.config.approximated();
        out.clear();
        out.resize(n, 0.0);
        if n == 0 {
            return;
        }
        if self.config.term_dtype == FloatType::Float64 {
            for (c, row) in coefficients.iter().zip(self.terms.chunks(n)) {
                out.iter_mut().zip(row).for_each(|(sum, term)| *sum += c * term);
            }
            return;
        }
        sum32.clear();
        sum32.resize(n, 0.0);
        for (c, row) in coefficients.iter().zip(self.terms32.chunks(n)) {
            let c = *c as f32;
            sum32.iter_mut().zip(row).for_each(|(sum, term)| *sum += c * term);
        }
        out.iter_mut().zip(sum32.iter()).for_each(|(value, sum)| *value = f64::from(*sum));
    }

    /// Adds a residual the way the decoder does.
    fn add_residual(&self, value: f64, residual: f32) -> f64 {
        match self.config.term_dtype {
            FloatType::Float64 => value + f64::from(residual),
            _ => f64::from(value as f32 + residual),
        }
    }

    /// Writes the exact values and returns where the sequence stands: the running sum of differences (0 without differences).
    fn encode_exact<'a>(&self, y: &[f64], mut out: &'a mut [u8]) -> Result<(f64, &'a mut [u8])> {
        let mut sum = 0.0;
        for (rank, value) in y[..self.config.exact_k].iter().enumerate() {
            let stored = self.config.exact_dtype.round(value - sum);
            if !stored.is_finite() {
                return Err(CodecError::Input(format!(
                    "log-probability {value} at rank {rank} is too large for {:?} (exact_dtype)",
                    self.config.exact_dtype
                )));
            }
            out = self.config.exact_dtype.write(stored, out);
            if self.config.delta_encoding {
                sum += stored;
            }
        }
        Ok((sum, out))
    }
}

fn running_sum(values: &[f64]) -> Vec<f64> {
    let sum = |sum: &mut f64, value: &f64| {
        *sum += value;
        Some(*sum)
    };
    values.iter().scan(0.0, sum).collect()
}

impl RowFormat for Quantized {
    fn k(&self) -> usize {
        self.config.k
    }

    fn vocab_size(&self) -> u64 {
        self.config.d
    }

    fn value_bytes(&self) -> usize {
        self.config.value_bytes()
    }

    fn id_bytes(&self) -> usize {
        self.config.id_bytes()
    }

    fn encode_row(&self, scratch: &mut Scratch, out: &mut [u8]) -> Result<()> {
        let config = &self.config;
        let (values, id_bytes) = out.split_at_mut(config.value_bytes());
        pack_with(config.k, config.id_bits(), id_bytes, |i| scratch.ids[i] as u64);
        let (base, mut rest) = self.encode_exact(&scratch.y, values)?;
        let y = &scratch.y[config.exact_k..];

        let Scratch { weights, target, coefficients, approximate, sum32, fit: fit_scratch, .. } = scratch;
        coefficients.clear();
        coefficients.resize(config.terms().len(), 0.0);
        if let Some(fit) = &self.fit {
            fit_weights(y, config.covered(), weights);
            target.clear();
            target.extend(y.iter().map(|value| value - base));
            fit.solve(target, weights, fit_scratch, coefficients);
        }
        for &c in coefficients.iter() {
            rest = config.term_dtype.write(c, rest);
        }

        self.evaluate(coefficients, sum32, approximate);
        // What the bins should say: the values, or with differences the steps, less what the polynomial says.
        target.clear();
        target.extend(y.iter().enumerate().map(|(j, value)| {
            let before = if config.delta_encoding { if j == 0 { base } else { y[j - 1] } } else { 0.0 };
            value - before - approximate[j]
        }));
        let feedback = config.delta_encoding || config.error_diffusion;
        let (mut at, mut carry) = (0, 0.0);
        for bin in &config.residual_bins {
            rest = encode_bin(bin, &target[at..at + bin.num_elements], feedback, &mut carry, rest);
            at += bin.num_elements;
        }
        Ok(())
    }

    fn decode_row(&self, row: &[u8], ids: &mut [i64], logprobs: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let config = &self.config;
        let (values, id_bytes) = row.split_at(config.value_bytes());
        check_padding(id_bytes, config.k, config.id_bits())?;
        unpack_with(id_bytes, config.id_bits(), config.k, |i, id| ids[i] = id as i64);
        check_ids(ids, config.d)?;

        let (exact, rest) = values.split_at(config.exact_k * config.exact_dtype.size());
        let (stored, mut rest) = rest.split_at(config.terms().len() * config.term_dtype.size());
        let Scratch { coefficients, approximate, sum32, y: sequence, .. } = scratch;
        coefficients.clear();
        coefficients.extend((0..config.terms().len()).map(|i| config.term_dtype.read(stored, i)));
        self.evaluate(coefficients, sum32, approximate);
        let mut at = 0;
        for bin in &config.residual_bins {
            rest = decode_bin(bin, rest, |j, residual| {
                approximate[at + j] = self.add_residual(approximate[at + j], residual);
            })?;
            at += bin.num_elements;
        }

        sequence.clear();
        sequence.extend((0..config.exact_k).map(|i| config.exact_dtype.read(exact, i)));
        sequence.extend_from_slice(approximate);
        let mut sum = 0.0;
        for (out, value) in logprobs.iter_mut().zip(sequence.iter()) {
            sum = if config.delta_encoding { sum + value } else { *value };
            *out = sum as f32;
        }
        check_finite(logprobs)
    }
}
