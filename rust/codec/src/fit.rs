//! Weighted least squares in float64 over a basis that is orthogonalised once per configuration.
//!
//! The terms of a published configuration (powers up to 111⁴ beside √t) make a matrix whose singular values spread over eight decades,
//! so a fit in the raw terms loses most of what it should keep. Here the columns are scaled and orthogonalised once (Gram–Schmidt, done
//! twice, which is enough: Giraud et al. 2005). A row is then fitted by r × r normal equations in the orthonormal basis, which are as
//! well conditioned as the row's weights, and its solution is mapped back to raw coefficients.
//!
//! Stored coefficients are rounded. Where that would show (16-bit types, nearly dependent terms), the terms are rounded one at a time,
//! largest first, and after each rounding the others are fitted again to what is left, so that they absorb its error.

use crate::float::FloatType;

/// A column whose part orthogonal to the earlier ones is smaller than this (of its own length) adds nothing that a coefficient could use.
const DEPENDENT: f64 = 1e-9;
/// Rounding error of the fitted values, relative to the values, above which coefficients are rounded one at a time.
const VISIBLE_ROUNDING: f64 = 1e-4;

/// An orthonormal basis of some columns, and the way back to their coefficients.
#[derive(Debug, Clone)]
struct Basis {
    m: usize,
    /// r orthonormal columns of n.
    q: Vec<Vec<f64>>,
    /// r columns of m: raw coefficients of each orthonormal column.
    to_raw: Vec<Vec<f64>>,
}

/// Buffers of [`Fit`], kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct FitScratch {
    normal: NormalEquations,
    left: Vec<f64>,
    raw: Vec<f64>,
}

#[derive(Debug, Default)]
struct NormalEquations {
    /// r × r, lower half.
    gram: Vec<f64>,
    rhs: Vec<f64>,
    /// A column times the weights.
    weighted: Vec<f64>,
}

/// Σ a·b in eight interleaved sums: one order of additions everywhere, and one that vectorises.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..8 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let quarters = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]) + rest
}

impl Basis {
    fn new(columns: &[&[f64]]) -> Self {
        let m = columns.len();
        let mut basis = Self { m, q: Vec::new(), to_raw: Vec::new() };
        for (j, column) in columns.iter().enumerate() {
            let scale = dot(column, column).sqrt();
            if scale == 0.0 {
                continue;
            }
            let mut v: Vec<f64> = column.iter().map(|x| x / scale).collect();
            let mut raw = vec![0.0; m];
            raw[j] = 1.0 / scale;
            for _ in 0..2 {
                for (q, q_raw) in basis.q.iter().zip(&basis.to_raw) {
                    let along = dot(q, &v);
                    v.iter_mut().zip(q).for_each(|(x, y)| *x -= along * y);
                    raw.iter_mut().zip(q_raw).for_each(|(x, y)| *x -= along * y);
                }
            }
            let length = dot(&v, &v).sqrt();
            if length > DEPENDENT {
                basis.q.push(v.iter().map(|x| x / length).collect());
                basis.to_raw.push(raw.iter().map(|x| x / length).collect());
            }
        }
        basis
    }

    /// Raw coefficients that minimise Σ w (y − fit)².
    fn solve(&self, y: &[f64], w: &[f64], normal: &mut NormalEquations, out: &mut [f64]) {
        let NormalEquations { gram, rhs, weighted } = normal;
        let r = self.q.len();
        gram.clear();
        gram.resize(r * r, 0.0);
        rhs.clear();
        rhs.resize(r, 0.0);
        for (i, qi) in self.q.iter().enumerate() {
            weighted.clear();
            weighted.extend(w.iter().zip(qi).map(|(weight, q)| weight * q));
            for (j, qj) in self.q[..=i].iter().enumerate() {
                gram[i * r + j] = dot(weighted, qj);
            }
            rhs[i] = dot(weighted, y);
        }
        if !cholesky_solve(gram, rhs, r) {
            // Weights that leave directions undetermined: the unweighted fit determines them all.
            for (b, q) in rhs.iter_mut().zip(&self.q) {
                *b = dot(q, y);
            }
        }
        out.fill(0.0);
        for (b, raw) in rhs.iter().zip(&self.to_raw) {
            out.iter_mut().zip(raw).for_each(|(x, y)| *x += b * y);
        }
    }

    /// How much larger than a fitted value its parts can be: what rounding a coefficient is multiplied by.
    fn amplification(&self, columns: &[&[f64]]) -> f64 {
        let largest = |i: usize| columns[i].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let parts = self.to_raw.iter().flat_map(|raw| (0..self.m).map(move |i| raw[i].abs() * largest(i)));
        parts.fold(0.0, f64::max)
    }
}

/// Solves the r × r system in place; false when the (lower half of the) matrix is not safely positive definite.
fn cholesky_solve(a: &mut [f64], b: &mut [f64], r: usize) -> bool {
    let largest = (0..r).map(|i| a[i * r + i]).fold(0.0, f64::max);
    for i in 0..r {
        for j in 0..=i {
            let s = a[i * r + j] - (0..j).map(|l| a[i * r + l] * a[j * r + l]).sum::<f64>();
            if i == j {
                if s.is_nan() || s <= 1e-14 * largest {
                    return false;
                }
                a[i * r + i] = s.sqrt();
            } else {
                a[i * r + j] = s / a[j * r + j];
            }
        }
    }
    for i in 0..r {
        b[i] = (b[i] - (0..i).map(|l| a[i * r + l] * b[l]).sum::<f64>()) / a[i * r + i];
    }
    for i in (0..r).rev() {
        b[i] = (b[i] - (i + 1..r).map(|l| a[l * r + i] * b[l]).sum::<f64>()) / a[i * r + i];
    }
    true
}

/// Fits rows of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct Fit {
    columns: Vec<Vec<f64>>,
    stored: FloatType,
    /// Term indices in the order in which their coefficients are rounded.
    order: Vec<usize>,
    /// `bases[i]` spans the terms `order[i..]`; only the first where one rounding of all is good enough.
    bases: Vec<Basis>,
}

impl Fit {
    /// `columns`: the terms at the n points, as the decoder evaluates them (after its rounding; summed up where it sums).
    pub(crate) fn new(columns: Vec<Vec<f64>>, stored: FloatType) -> Self {
        let mut order: Vec<usize> = (0..columns.len()).collect();
        let largest = |i: &usize| columns[*i].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let spread = |i: &usize| columns[*i].iter().fold(0.0, |a: f64, x| a.max((x - columns[*i][0]).abs()));
        // Large and steep terms first; the constant, which can absorb any offset, last.
        order.sort_by(|a, b| (largest(b), spread(b)).partial_cmp(&(largest(a), spread(a))).unwrap_or(std::cmp::Ordering::Equal));
        let basis_from = |i: usize| Basis::new(&order[i..].iter().map(|&c| columns[c].as_slice()).collect::<Vec<_>>());
        let mut bases = vec![basis_from(0)];
        let ordered: Vec<&[f64]> = order.iter().map(|&c| columns[c].as_slice()).collect();
        let epsilon = match stored {
            FloatType::Float16 => 2f64.powi(-11),
            FloatType::Bfloat16 => 2f64.powi(-8),
            FloatType::Float32 => 2f64.powi(-24),
            FloatType::Float64 => 2f64.powi(-53),
        };
        if epsilon * bases[0].amplification(&ordered) > VISIBLE_ROUNDING {
            bases.extend((1..order.len()).map(basis_from));
        }
        Self { columns, stored, order, bases }
    }

    /// Coefficients, already rounded to their stored type, that come close to minimising Σ w (y − fit)²; all finite.
    pub(crate) fn solve(&self, y: &[f64], w: &[f64], scratch: &mut FitScratch, coefficients: &mut [f64]) {
        let FitScratch { normal, left, raw } = scratch;
        left.clear();
        left.extend_from_slice(y);
        for (i, basis) in self.bases.iter().enumerate() {
            raw.clear();
            raw.resize(basis.m, 0.0);
            basis.solve(left, w, normal, raw);
            if self.bases.len() == 1 {
                for (value, &term) in raw.iter().zip(&self.order) {
                    coefficients[term] = self.round(*value);
                }
                return;
            }
            let term = self.order[i];
            coefficients[term] = self.round(raw[0]);
            left.iter_mut().zip(&self.columns[term]).for_each(|(x, c)| *x -= coefficients[term] * c);
        }
    }

    fn round(&self, value: f64) -> f64 {
        let limit = self.stored.max();
        self.stored.round(value.clamp(-limit, limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NamedTerm, Term};

    fn columns(terms: &[Term], n: usize) -> Vec<Vec<f64>> {
        terms.iter().map(|term| (0..n).map(|t| term.at(t as f64)).collect()).collect()
    }

    fn powers_and_sqrt() -> Vec<Term> {
        (0..5).map(Term::Power).chain([Term::Named(NamedTerm::Sqrt)]).collect()
    }

    fn fitted(columns: &[Vec<f64>], coefficients: &[f64], t: usize) -> f64 {
        columns.iter().zip(coefficients).map(|(column, c)| column[t] * c).sum()
    }

    #[test]
    fn recovers_what_the_terms_can_say() {
        let columns = columns(&powers_and_sqrt(), 112);
        let truth = [-3.0, -0.05, 3e-4, -1e-6, 2e-9, -0.4];
        let y: Vec<f64> = (0..112).map(|t| fitted(&columns, &truth, t)).collect();
        let w: Vec<f64> = (0..112).map(|t| (-0.05 * f64::from(t)).exp()).collect();
        let mut found = [0.0; 6];
        Fit::new(columns.clone(), FloatType::Float64).solve(&y, &w, &mut FitScratch::default(), &mut found);
        for (t, value) in y.iter().enumerate() {
            assert!((fitted(&columns, &found, t) - value).abs() < 1e-9, "t = {t}");
        }
    }

    #[test]
    fn dependent_and_zero_columns_get_no_weight() {
        let columns = vec![vec![1.0; 8], vec![2.0; 8], vec![0.0; 8]];
        let mut found = [f64::NAN; 3];
        Fit::new(columns.clone(), FloatType::Float32).solve(&[-4.0; 8], &[1.0; 8], &mut FitScratch::default(), &mut found);
        assert!((fitted(&columns, &found, 0) + 4.0).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn rounding_one_at_a_time_beats_rounding_all_at_once() {
        let columns: Vec<Vec<f64>> = (0..3).map(|i| (0..28).map(|t| (f64::from(t) / 27.0).powi(i)).collect()).collect();
        let y: Vec<f64> = (0..28).map(|t| -5.0 - 2.3 * (f64::from(t) / 27.0).sqrt()).collect();
        let w = vec![1.0; 28];
        let error = |c: &[f64]| (0..28).map(|t| (fitted(&columns, c, t) - y[t]).powi(2)).sum::<f64>();
        let (mut refined, mut exact) = ([0.0; 3], [0.0; 3]);
        Fit::new(columns.clone(), FloatType::Bfloat16).solve(&y, &w, &mut FitScratch::default(), &mut refined);
        Fit::new(columns.clone(), FloatType::Float64).solve(&y, &w, &mut FitScratch::default(), &mut exact);
        let rounded = exact.map(|c| FloatType::Bfloat16.round(c));
        assert!(error(&refined) <= error(&rounded), "{} {}", error(&refined), error(&rounded));
        assert!(error(&refined) < 1.5 * error(&exact) + 1e-3);
    }
}
