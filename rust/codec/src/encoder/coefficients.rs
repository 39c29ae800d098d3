//! From the fit's coefficients, in an orthonormal basis, to the stored ones.
//!
//! The terms of a published configuration (powers up to 111⁴ beside √t) make a matrix whose
//! singular values spread over eight decades, so they are scaled and orthogonalised once per
//! configuration, in float64, and the fit is searched for in that basis. What is found is mapped
//! back to raw coefficients in float64, and these are rounded to the type that stores them.

use std::cmp::Ordering;

use super::linalg::{Basis, NormalEquations};
use super::row::LEAST_WEIGHT;
use crate::float::FloatType;
use crate::simd::lanes::{LANES, Lanes, exp, no_unroll};

/// Rounding error of the fitted values, relative to the values, above which coefficients are
/// rounded one at a time.
const VISIBLE_ROUNDING: f64 = 1e-4;
/// Weight of Σ (F − y)² beside the weighted least-squares fit that Newton's method starts from, in
/// units of the largest fitted probability.
pub(crate) const FIRST_RIDGE: f32 = 1e-3;
/// Weight of ranks with a residual of their own in a fit that is followed by residuals.
const RESIDUAL_SHARE: f32 = 0.01;

/// Rounds the coefficients of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct CoefficientRounding {
    columns: Vec<Vec<f64>>,
    dtype: FloatType,
    /// Ranks with a residual of their own; they come first.
    residual_count: usize,
    /// Term indices in the order in which their coefficients are rounded.
    order: Vec<usize>,
    /// `bases[i]` spans the terms `order[i..]`. There is only the first where one rounding of all
    /// coefficients is good enough.
    bases: Vec<Basis>,
}

/// Buffers, kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct RoundingScratch {
    normal: NormalEquations,
    left: Vec<f64>,
    weights: Vec<f64>,
    raw: Vec<f64>,
}

impl CoefficientRounding {
    /// `columns` are the terms at the n ranks, as the fit sees them.
    pub(crate) fn new(columns: Vec<Vec<f64>>, dtype: FloatType, residual_count: usize) -> Self {
        let mut order: Vec<usize> = (0..columns.len()).collect();
        let largest = |i: usize| columns[i].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let spread =
            |i: usize| columns[i].iter().fold(0.0, |a: f64, x| a.max((x - columns[i][0]).abs()));
        // Large and steep terms come first; the constant, which can absorb any offset, comes last.
        order.sort_by(|&a, &b| {
            let descending = (largest(b), spread(b)).partial_cmp(&(largest(a), spread(a)));
            descending.unwrap_or(Ordering::Equal)
        });
        let ordered: Vec<&[f64]> = order.iter().map(|&i| columns[i].as_slice()).collect();
        let mut bases = vec![Basis::new(&ordered)];
        if half_step(dtype) * bases[0].amplification(&ordered) > VISIBLE_ROUNDING {
            bases.extend((1..ordered.len()).map(|i| Basis::new(&ordered[i..])));
        }
        Self { columns, dtype, residual_count, order, bases }
    }

    /// The orthonormal basis of all terms.
    #[inline(always)]
    pub(crate) fn basis(&self) -> &Basis {
        &self.bases[0]
    }

    /// Whether all coefficients are rounded at once, whatever the values.
    #[inline(always)]
    pub(crate) fn is_simultaneous(&self) -> bool {
        self.bases.len() == 1
    }

    /// Rounds the coefficients of a group's rows into one vector for each term, where they are
    /// rounded at once ([`CoefficientRounding::is_simultaneous`]). `rows` are coefficients of the
    /// orthonormal columns, and `c` is room for them.
    #[inline(always)]
    pub(crate) fn round_group<'a>(
        &self,
        rows: impl Iterator<Item = &'a [f64]>,
        c: &mut Vec<[f64; LANES]>,
        stored: &mut [[f64; LANES]],
    ) {
        c.resize(self.basis().rank(), [0.0; LANES]);
        for (lane, row) in rows.enumerate() {
            for (c, value) in c.iter_mut().zip(row) {
                c[lane] = *value;
            }
        }
        for (parts, &term) in self.basis().parts().zip(&self.order) {
            let mut sum = [0.0; LANES];
            for (part, c) in parts.iter().zip(c.iter()) {
                no_unroll();
                for lane in 0..LANES {
                    sum[lane] += c[lane] * part;
                }
            }
            no_unroll();
            for lane in 0..LANES {
                stored[term][lane] = self.round(sum[lane]);
            }
        }
    }

    /// Rounds the coefficients of one row. `c` are those of the orthonormal columns; the stored
    /// ones are all finite.
    ///
    /// Where rounding would show (16-bit types, nearly dependent terms), the terms are rounded one
    /// at a time, the largest first. After each rounding the others are fitted again to what is
    /// left, with the weights of the ranks, so that they absorb its error.
    #[inline(always)]
    pub(crate) fn round_row(
        &self,
        c: &[f64],
        y: &[f32],
        scratch: &mut RoundingScratch,
        stored: &mut [f64],
    ) {
        let RoundingScratch { normal, left, weights, raw } = scratch;
        raw.clear();
        raw.resize(self.order.len(), 0.0);
        if self.is_simultaneous() {
            self.basis().raw(c, raw);
            for (value, &term) in raw.iter().zip(&self.order) {
                stored[term] = self.round(*value);
            }
            return;
        }
        left.clear();
        left.resize(self.columns.first().map_or(0, Vec::len), 0.0);
        for (c, q) in c.iter().zip(&self.basis().q) {
            left.iter_mut().zip(q).for_each(|(x, q)| *x += c * q);
        }
        let weight = |(t, value): (usize, &f32)| {
            let p = Lanes::splat(exp(value - y[0]));
            f64::from(least_squares_weight(self.residual_count, t, p).0[0])
        };
        weights.clear();
        weights.extend(y.iter().enumerate().map(weight));
        for (i, basis) in self.bases.iter().enumerate() {
            raw.truncate(self.order.len() - i);
            basis.solve(left, weights, normal, raw);
            let term = self.order[i];
            stored[term] = self.round(raw[0]);
            let column = &self.columns[term];
            left.iter_mut().zip(column).for_each(|(x, column)| *x -= stored[term] * column);
        }
    }

    #[inline(always)]
    fn round(&self, value: f64) -> f64 {
        let limit = self.dtype.max();
        self.dtype.round(value.clamp(-limit, limit))
    }
}

/// The largest relative error of rounding to a type.
fn half_step(dtype: FloatType) -> f64 {
    match dtype {
        FloatType::Float16 => 2f64.powi(-11),
        FloatType::Bfloat16 => 2f64.powi(-8),
        FloatType::Float32 => 2f64.powi(-24),
        FloatType::Float64 => 2f64.powi(-53),
    }
}

/// The weight of rank t, of probability p relative to the first rank's, in a least-squares fit.
#[inline(always)]
pub(crate) fn least_squares_weight(residual_count: usize, t: usize, p: Lanes) -> Lanes {
    if residual_count == 0 {
        return p + Lanes::splat(FIRST_RIDGE);
    }
    // p^¾: where residuals follow, the tail must not make their scale large.
    let root = p.sqrt();
    let share = Lanes::splat(if t < residual_count { RESIDUAL_SHARE } else { 1.0 });
    (share * root * root.sqrt()).max(Lanes::splat(LEAST_WEIGHT))
}
