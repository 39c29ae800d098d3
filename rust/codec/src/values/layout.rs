//! How a configuration stores values, and its terms as the decoder evaluates them.

use crate::config::{MAX_TERMS, ResidualBin};
use crate::float::FloatType;
use crate::simd::lanes::{LANES, Lanes, no_unroll};

/// How a configuration stores the values of a row.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) exact_k: usize,
    pub(crate) exact_dtype: FloatType,
    /// Type of the stored coefficients.
    pub(crate) coefficient_dtype: FloatType,
    /// The polynomial is evaluated in float64 instead of float32.
    pub(crate) wide: bool,
    pub(crate) residual_bins: Vec<ResidualBin>,
    pub(crate) delta_encoding: bool,
    /// Values are rounded wherever the published decoder rounds them (FORMAT.md §2.4).
    pub(crate) published_rounding: bool,
}

impl Layout {
    /// Approximated ranks with a residual of their own; they come first.
    #[inline(always)]
    pub(crate) fn residual_count(&self) -> usize {
        self.residual_bins.iter().map(|bin| bin.num_elements).sum()
    }

    /// Bytes of the exact values.
    #[inline(always)]
    pub(crate) fn exact_bytes(&self) -> usize {
        self.exact_k * self.exact_dtype.size()
    }

    /// Whether a row decodes from exact values and float32 terms alone, without float64, residuals
    /// or a running sum.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        !self.wide
            && !self.delta_encoding
            && !self.published_rounding
            && self.residual_bins.is_empty()
    }

    /// The type of a sum of a polynomial's value and a residual in the published decoder.
    #[inline(always)]
    fn published_sum_type(&self) -> FloatType {
        let types = (self.coefficient_dtype, self.exact_dtype);
        match types {
            (term, exact) if term == exact => exact,
            (FloatType::Float64, _) | (_, FloatType::Float64) => FloatType::Float64,
            _ => FloatType::Float32,
        }
    }

    /// A polynomial's value plus a residual, as the published decoder adds them.
    #[inline(always)]
    pub(crate) fn published_sum(&self, value: f64, residual: f32) -> f64 {
        let residual = self.exact_dtype.round(f64::from(residual));
        match self.published_sum_type() {
            FloatType::Float64 => value + residual,
            // Sums of 16-bit floats are float32 first.
            dtype => dtype.round(f64::from((value + residual) as f32)),
        }
    }
}

/// The terms at the approximated ranks, as the decoder evaluates them.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    /// m rows of n values.
    values: Vec<f64>,
    /// The same in float32: for [`LANES`] ranks at a time (zero beyond the last) a vector of each
    /// term.
    blocks: Vec<Lanes>,
    m: usize,
    n: usize,
}

impl Terms {
    /// `values` are m rows of n. Coefficients are stored even where n = 0.
    pub(crate) fn new(values: Vec<f64>, m: usize, n: usize) -> Self {
        let blocks = blocks_of_ranks(&values, n);
        Self { values, blocks, m, n }
    }

    /// The number of terms, m.
    #[inline(always)]
    pub(crate) const fn count(&self) -> usize {
        self.m
    }

    /// The number of approximated ranks, n.
    #[inline(always)]
    pub(crate) const fn ranks(&self) -> usize {
        self.n
    }

    /// m rows of n values.
    pub(crate) fn values(&self) -> &[f64] {
        &self.values
    }

    /// The values of each term; none where no rank is approximated.
    #[inline(always)]
    pub(crate) fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks(self.n.max(1))
    }

    /// Σ coefficient · term at each rank in float64: products and sums in term order.
    #[inline(always)]
    pub(crate) fn evaluate_f64(&self, coefficients: &[f64], out: &mut [f64]) {
        out.fill(0.0);
        for (c, row) in coefficients.iter().zip(self.rows()) {
            out.iter_mut().zip(row).for_each(|(sum, term)| *sum += c * term);
        }
    }

    /// The same in float32.
    #[inline(always)]
    pub(crate) fn evaluate_f32(&self, coefficients: &[f64], out: &mut [f32]) {
        let mut narrow = [0.0; MAX_TERMS + 1];
        for (narrow, c) in narrow.iter_mut().zip(coefficients) {
            *narrow = *c as f32;
        }
        if self.m == 0 {
            out.fill(0.0);
            return;
        }
        let (blocks, rest) = out.as_chunks_mut::<LANES>();
        let mut terms = self.blocks.chunks_exact(self.m);
        for (out, terms) in blocks.iter_mut().zip(&mut terms) {
            *out = polynomial(&narrow, terms);
        }
        if let Some(terms) = terms.next() {
            rest.copy_from_slice(&polynomial(&narrow, terms)[..rest.len()]);
        }
    }
}

/// Rows of n numbers: for [`LANES`] columns at a time (zero beyond the last) a vector of each row.
fn blocks_of_ranks(rows: &[f64], n: usize) -> Vec<Lanes> {
    let at = |row: &[f64], t: usize| row.get(t).map_or(0.0, |&value| value as f32);
    let block = |t: usize| {
        rows.chunks(n.max(1)).map(move |row| Lanes(std::array::from_fn(|i| at(row, t + i))))
    };
    (0..n).step_by(LANES).flat_map(block).collect()
}

/// Σ coefficient · term, in the order of the terms.
#[inline(always)]
fn polynomial(coefficients: &[f32; MAX_TERMS + 1], terms: &[Lanes]) -> [f32; LANES] {
    let mut sum = Lanes::ZERO;
    for (c, term) in coefficients.iter().zip(terms) {
        no_unroll();
        sum += Lanes::splat(*c) * *term;
    }
    sum.0
}
