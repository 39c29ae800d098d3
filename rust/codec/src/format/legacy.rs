//! The published legacy format (`legacy_logit_compression`); its bytes are in FORMAT.md §3.

use std::sync::Arc;

use super::{RowFormat, outside_vocabulary};
use crate::bits::{Packing, max_value};
use crate::config::{LegacyConfig, Term};
use crate::error::{CodecError, Result};
use crate::float::FloatType;
use crate::values::{Layout, Terms, ValueDecoder};

/// A prepared configuration.
#[derive(Debug, Clone)]
pub struct Legacy {
    config: LegacyConfig,
    values: Arc<ValueDecoder>,
}

impl Legacy {
    pub(crate) fn new(config: LegacyConfig) -> Self {
        let n = config.approximated();
        let terms = config.terms();
        let at = |term: &Term, j: usize| config.term_dtype.round(term.at((j + 1) as f64));
        let values = terms.iter().flat_map(|term| (0..n).map(move |j| at(term, j))).collect();
        let layout = Layout {
            exact_k: config.exact_k,
            exact_dtype: FloatType::Float16,
            coefficient_dtype: config.coefficient_type(),
            wide: false,
            residual_bins: Vec::new(),
            delta_encoding: false,
            published_rounding: false,
        };
        let values = ValueDecoder::new(layout, Terms::new(values, terms.len(), n));
        Self { config, values: Arc::new(values) }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &LegacyConfig {
        &self.config
    }

    /// The terms at the approximated ranks, m rows of n, rounded to `term_dtype`: what a decoder
    /// multiplies coefficients with.
    #[must_use]
    pub fn terms(&self) -> &[f64] {
        self.values.terms().values()
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

    fn values(&self) -> &Arc<ValueDecoder> {
        &self.values
    }

    #[inline(always)]
    fn write_ids<I: Packing>(&self, _isa: I, ids: &[i64], out: &mut [u8]) {
        let bits = self.config.id_bits();
        let words = ids.chunks(self.config.ids_per_word());
        for (word_ids, bytes) in words.zip(out.chunks_mut(8)) {
            let join = |word: u64, &id: &i64| word.checked_shl(bits).unwrap_or(0) | id as u64;
            let word = word_ids.iter().rev().fold(0, join);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    #[inline(always)]
    fn read_ids<I: Packing>(&self, _isa: I, data: &[u8], ids: &mut [i64]) -> Result<()> {
        let bits = self.config.id_bits();
        let mut largest = 0;
        let words = ids.chunks_mut(self.config.ids_per_word()).zip(data.chunks(8));
        for (w, (word_ids, bytes)) in words.enumerate() {
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
                let message = format!("unused bits of id word {w} are not zero");
                return Err(CodecError::Corrupt(message));
            }
        }
        if largest < self.config.vocab_size {
            return Ok(());
        }
        Err(outside_vocabulary(ids, self.config.vocab_size))
    }
}
