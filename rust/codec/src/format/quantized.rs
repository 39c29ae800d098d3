//! The published "distribution quantization" format (`logprob_compressor`); its bytes are in
//! FORMAT.md §2.

use std::sync::Arc;

use super::{RowFormat, outside_vocabulary};
use crate::bits::{Packing, check_padding, pack_ids_body, unpack_ids_body};
use crate::config::{QuantizedConfig, Term};
use crate::error::Result;
use crate::float::FloatType;
use crate::values::{Layout, Terms, ValueDecoder};

/// A prepared configuration.
#[derive(Debug, Clone)]
pub struct Quantized {
    config: QuantizedConfig,
    values: Arc<ValueDecoder>,
}

impl Quantized {
    pub(crate) fn new(config: QuantizedConfig) -> Self {
        let n = config.approximated();
        let terms = config.terms();
        let at = |term: &Term, j: usize| config.term_dtype.round(term.at(config.t(j)));
        let values = terms.iter().flat_map(|term| (0..n).map(move |j| at(term, j))).collect();
        let layout = Layout {
            exact_k: config.exact_k,
            exact_dtype: config.exact_dtype,
            coefficient_dtype: config.term_dtype,
            wide: config.term_dtype == FloatType::Float64,
            residual_bins: config.residual_bins.clone(),
            delta_encoding: config.delta_encoding,
            published_rounding: config.published_rounding,
        };
        let values = ValueDecoder::new(layout, Terms::new(values, terms.len(), n));
        Self { config, values: Arc::new(values) }
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &QuantizedConfig {
        &self.config
    }

    /// The terms at the approximated ranks, m rows of n, rounded to `term_dtype`: what a decoder
    /// multiplies coefficients with.
    #[must_use]
    pub fn terms(&self) -> &[f64] {
        self.values.terms().values()
    }
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

    fn values(&self) -> &Arc<ValueDecoder> {
        &self.values
    }

    #[inline(always)]
    fn write_ids<I: Packing>(&self, isa: I, ids: &[i64], out: &mut [u8]) {
        pack_ids_body(isa, ids, self.config.id_bits(), out);
    }

    #[inline(always)]
    fn read_ids<I: Packing>(&self, isa: I, data: &[u8], ids: &mut [i64]) -> Result<()> {
        check_padding(data, self.config.k, self.config.id_bits())?;
        if unpack_ids_body(isa, data, self.config.id_bits(), ids) < self.config.d {
            return Ok(());
        }
        Err(outside_vocabulary(ids, self.config.d))
    }
}
