//! The published legacy format (`legacy_logit_compression`); bytes in FORMAT.md §3.

use super::{RowFormat, outside_vocabulary};
use crate::bits::Packing;
use crate::bits::max_value;
use crate::config::LegacyConfig;
use crate::error::{CodecError, Result};
use crate::float::FloatType;
use crate::values::{Layout, Values};

/// A prepared configuration.
#[derive(Debug, Clone)]
pub struct Legacy {
    config: LegacyConfig,
    values: Values,
}

impl Legacy {
    pub(crate) fn new(config: LegacyConfig) -> Self {
        let n = config.approximated();
        let at = |term: crate::config::Term, j: usize| config.term_dtype.round(term.at((j + 1) as f64));
        let terms = config.terms().into_iter().flat_map(|term| (0..n).map(move |j| at(term, j))).collect();
        let layout = Layout {
            exact_k: config.exact_k,
            exact_dtype: FloatType::Float16,
            coefficient_dtype: config.coefficient_type(),
            wide: false,
            residual_bins: Vec::new(),
            delta_encoding: false,
            error_diffusion: false,
        };
        let values = Values::new(layout, n, config.terms().len(), terms);
        Self { config, values }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &LegacyConfig {
        &self.config
    }

    /// The terms at the approximated ranks, m rows of n, rounded to `term_dtype`: what a decoder multiplies coefficients with.
    #[must_use]
    pub fn terms(&self) -> &[f64] {
        self.values.terms()
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

    fn values(&self) -> &Values {
        &self.values
    }

    #[inline(always)]
    fn write_ids<I: Packing>(&self, _isa: I, ids: &[i64], out: &mut [u8]) {
        let bits = self.config.id_bits();
        for (word_ids, bytes) in ids.chunks(self.config.ids_per_word()).zip(out.chunks_mut(8)) {
            let word = word_ids.iter().rev().fold(0u64, |word, &id| word.checked_shl(bits).unwrap_or(0) | id as u64);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    #[inline(always)]
    fn read_ids<I: Packing>(&self, _isa: I, data: &[u8], ids: &mut [i64]) -> Result<()> {
        let bits = self.config.id_bits();
        let mut largest = 0;
        for (w, (word_ids, bytes)) in ids.chunks_mut(self.config.ids_per_word()).zip(data.chunks(8)).enumerate() {
            let mut le = [0; 8];
            le.copy_from_slice(bytes);
            let mut word = u64::from_le_bytes(le);
            for id in word_ids {
                let value = word & max_value(bits);
                largest = value.max(largest);
                *id = value as i64;
                word = word.checked_shr(bits).unwrap_or(0);
            }
            if word != 0 {
                return Err(CodecError::Corrupt(format!("unused bits of id word {w} are not zero")));
            }
        }
        if largest < self.config.vocab_size { Ok(()) } else { Err(outside_vocabulary(ids, self.config.vocab_size)) }
    }
}
