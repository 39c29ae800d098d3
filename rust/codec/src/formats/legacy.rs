//! The published legacy format (`legacy_logit_compression`); bytes in FORMAT.md §3.

use super::{RowFormat, Scratch, check_finite, check_ids, fit_weights};
use crate::bits::max_value;
use crate::config::LegacyConfig;
use crate::error::{CodecError, Result};
use crate::fit::Fit;
use crate::float::FloatType;

/// A prepared configuration: the terms as the decoder sees them, and the fit over them.
#[derive(Debug, Clone)]
pub struct Legacy {
    config: LegacyConfig,
    /// m rows of n: term i at a = 1 … n, rounded to `term_dtype`.
    terms: Vec<f64>,
    fit: Option<Fit>,
}

impl Legacy {
    pub(crate) fn new(config: LegacyConfig) -> Self {
        let n = config.approximated();
        let at = |term: crate::config::Term, j: usize| config.term_dtype.round(term.at((j + 1) as f64));
        let terms: Vec<f64> = config.terms().into_iter().flat_map(|term| (0..n).map(move |j| at(term, j))).collect();
        let fit = (n > 0).then(|| Fit::new(terms.chunks(n).map(<[f64]>::to_vec).collect(), config.coefficient_type()));
        Self { config, terms, fit }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &LegacyConfig {
        &self.config
    }

    /// The terms at the approximated ranks, m rows of n, rounded to `term_dtype`: what a decoder multiplies coefficients with.
    #[must_use]
    pub fn terms(&self) -> &[f64] {
        &self.terms
    }

    fn write_ids(&self, ids: &[i64], out: &mut [u8]) {
        let bits = self.config.id_bits();
        for (word_ids, bytes) in ids.chunks(self.config.ids_per_word()).zip(out.chunks_mut(8)) {
            let word = word_ids.iter().rev().fold(0u64, |word, &id| word.checked_shl(bits).unwrap_or(0) | id as u64);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn read_ids(&self, data: &[u8], ids: &mut [i64]) -> Result<()> {
        let bits = self.config.id_bits();
        for (w, (word_ids, bytes)) in ids.chunks_mut(self.config.ids_per_word()).zip(data.chunks(8)).enumerate() {
            let mut le = [0; 8];
            le.copy_from_slice(bytes);
            let mut word = u64::from_le_bytes(le);
            for id in word_ids {
                *id = (word & max_value(bits)) as i64;
                word = word.checked_shr(bits).unwrap_or(0);
            }
            if word != 0 {
                return Err(CodecError::Corrupt(format!("unused bits of id word {w} are not zero")));
            }
        }
        Ok(())
    }
}

impl RowFormat for Legacy {
    fn k(&self) -> usize {
        self.config.k
    }

    fn vocab_size(&self) -> u64 {
        self.config.vocab_size
    }

    fn value_bytes(&self) -> usize {
        self.config.value_bytes()
    }

    fn id_bytes(&self) -> usize {
        self.config.id_bytes()
    }

    fn encode_row(&self, scratch: &mut Scratch, out: &mut [u8]) -> Result<()> {
        let (mut rest, id_bytes) = out.split_at_mut(self.config.value_bytes());
        self.write_ids(&scratch.ids, id_bytes);
        let (exact, y) = scratch.y.split_at(self.config.exact_k);
        for (rank, &value) in exact.iter().enumerate() {
            if !FloatType::Float16.round(value).is_finite() {
                return Err(CodecError::Input(format!("log-probability {value} at rank {rank} is too large for float16")));
            }
            rest = FloatType::Float16.write(value, rest);
        }
        let Some(fit) = &self.fit else { return Ok(()) };
        let Scratch { weights, coefficients, fit: fit_scratch, .. } = scratch;
        fit_weights(y, 0, weights);
        coefficients.clear();
        coefficients.resize(self.config.terms().len(), 0.0);
        fit.solve(y, weights, fit_scratch, coefficients);
        for &c in coefficients.iter() {
            rest = self.config.coefficient_type().write(c, rest);
        }
        Ok(())
    }

    fn decode_row(&self, row: &[u8], ids: &mut [i64], logprobs: &mut [f32], _: &mut Scratch) -> Result<()> {
        let config = &self.config;
        let (values, id_bytes) = row.split_at(config.value_bytes());
        self.read_ids(id_bytes, ids)?;
        check_ids(ids, config.vocab_size)?;
        let (exact, coefficients) = values.split_at(config.exact_k * FloatType::Float16.size());
        for (rank, out) in logprobs[..config.exact_k].iter_mut().enumerate() {
            *out = FloatType::Float16.read(exact, rank) as f32;
        }
        let n = config.approximated();
        let approximate = &mut logprobs[config.exact_k..];
        approximate.fill(0.0);
        if n > 0 {
            for (i, row) in self.terms.chunks(n).enumerate() {
                let c = config.coefficient_type().read(coefficients, i) as f32;
                approximate.iter_mut().zip(row).for_each(|(sum, &term)| *sum += c * term as f32);
            }
        }
        check_finite(logprobs)
    }
}
