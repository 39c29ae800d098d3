//! Small dense linear algebra: an orthonormal basis of the terms, Cholesky factors, and normal
//! equations.

use crate::simd::lanes::Lanes;

/// A column whose part orthogonal to the earlier ones is smaller than this (relative to its length)
/// adds nothing that a coefficient could use.
const DEPENDENT: f64 = 1e-9;
/// A pivot below this, relative to the largest diagonal element, is not safely positive.
const LEAST_PIVOT: f64 = 1e-14;

/// Σ a·b in eight interleaved sums: one order of additions everywhere, and one that vectorises.
#[inline(always)]
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let a_chunks = a.chunks_exact(8);
    let b_chunks = b.chunks_exact(8);
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let rest: f64 = rest.map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..8 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let quarters =
        [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]) + rest
}

/// Σ a·b of a few numbers, one after the other.
#[inline(always)]
pub(crate) fn dot_short(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (a, b) in a.iter().zip(b) {
        sum += a * b;
    }
    sum
}

/// Index pairs (i, j), j ≤ i, of the lower triangle of an r × r matrix, row by row.
pub(crate) fn lower_triangle(r: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..r).flat_map(|i| (0..=i).map(move |j| (i, j)))
}

/// An orthonormal basis of some columns, and the way back to the coefficients of those columns.
#[derive(Debug, Clone, Default)]
pub(crate) struct Basis {
    /// r orthonormal columns of n.
    pub(crate) q: Vec<Vec<f64>>,
    /// r columns of m: the raw coefficients of each orthonormal column.
    to_raw: Vec<Vec<f64>>,
    /// The same, as m rows of r: what each raw coefficient is composed of.
    parts: Vec<f64>,
}

impl Basis {
    /// Scales the columns and orthogonalises them by Gram–Schmidt, done twice, which is enough
    /// (Giraud et al. 2005).
    pub(crate) fn new(columns: &[&[f64]]) -> Self {
        let m = columns.len();
        let mut basis = Self::default();
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
        basis.parts = (0..m).flat_map(|i| basis.to_raw.iter().map(move |raw| raw[i])).collect();
        basis
    }

    /// The number of orthonormal columns, r.
    #[inline(always)]
    pub(crate) fn rank(&self) -> usize {
        self.q.len()
    }

    /// For each raw coefficient its r parts.
    #[inline(always)]
    pub(crate) fn parts(&self) -> impl Iterator<Item = &[f64]> {
        self.parts.chunks_exact(self.rank().max(1))
    }

    /// The raw coefficients of Σ c·q.
    #[inline(always)]
    pub(crate) fn raw(&self, c: &[f64], out: &mut [f64]) {
        for (out, parts) in out.iter_mut().zip(self.parts.chunks(c.len().max(1))) {
            *out = 0.0;
            for (c, part) in c.iter().zip(parts) {
                *out += c * part;
            }
        }
    }

    /// The raw coefficients that minimise Σ w (y − fit)².
    pub(crate) fn solve(
        &self,
        y: &[f64],
        w: &[f64],
        normal: &mut NormalEquations,
        out: &mut [f64],
    ) {
        let NormalEquations { gram, rhs, weighted } = normal;
        let r = self.rank();
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
        if cholesky(gram, r) {
            solve_lower(gram, rhs, r);
            solve_upper(gram, rhs, r);
        } else {
            // Weights that leave directions undetermined: the unweighted fit determines them all.
            for (b, q) in rhs.iter_mut().zip(&self.q) {
                *b = dot(q, y);
            }
        }
        self.raw(rhs, out);
    }

    /// How much larger than a fitted value its parts can be: what the relative rounding error of a
    /// coefficient is multiplied by.
    pub(crate) fn amplification(&self, columns: &[&[f64]]) -> f64 {
        let largest = |i: usize| columns[i].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let parts = |raw: &[f64]| {
            let part = |i: usize| raw[i].abs() * largest(i);
            (0..columns.len()).map(part).fold(0.0, f64::max)
        };
        self.to_raw.iter().map(|raw| parts(raw)).fold(0.0, f64::max)
    }
}

/// Buffers of [`Basis::solve`].
#[derive(Debug, Default)]
pub(crate) struct NormalEquations {
    /// r × r, lower triangle.
    gram: Vec<f64>,
    rhs: Vec<f64>,
    /// A column times the weights.
    weighted: Vec<f64>,
}

/// Overwrites the lower triangle of an r × r matrix with its Cholesky factor L, with the inverse of
/// L's diagonal in place of the diagonal. Returns false when the matrix is not safely positive
/// definite.
#[inline(always)]
pub(crate) fn cholesky(a: &mut [f64], r: usize) -> bool {
    let largest = (0..r).map(|i| a[i * r + i]).fold(0.0, f64::max);
    for i in 0..r {
        for j in 0..=i {
            let mut s = a[i * r + j];
            for l in 0..j {
                s -= a[i * r + l] * a[j * r + l];
            }
            if i == j {
                if s.is_nan() || s <= LEAST_PIVOT * largest {
                    return false;
                }
                a[i * r + i] = 1.0 / s.sqrt();
            } else {
                a[i * r + j] = s * a[j * r + j];
            }
        }
    }
    true
}

/// Changes a factor of A from [`cholesky`] into that of A + v·vᵀ; v is overwritten.
#[inline(always)]
pub(crate) fn add_square(l: &mut [f64], v: &mut [f64], r: usize) {
    for k in 0..r {
        let inverse = l[k * r + k];
        let t = v[k] * inverse;
        let stretch = (1.0 + t * t).sqrt();
        l[k * r + k] = inverse / stretch;
        for i in k + 1..r {
            let below = (l[i * r + k] + t * v[i]) / stretch;
            v[i] = (v[i] - t * l[i * r + k]) / stretch;
            l[i * r + k] = below;
        }
    }
}

/// b ← L⁻¹ b, with a factor from [`cholesky`].
#[inline(always)]
pub(crate) fn solve_lower(l: &[f64], b: &mut [f64], r: usize) {
    for (i, row) in l.chunks_exact(r.max(1)).take(b.len()).enumerate() {
        let (known, rest) = b.split_at_mut(i);
        let mut left = rest[0];
        for (l, x) in row.iter().zip(known) {
            left -= l * *x;
        }
        rest[0] = left * row[i];
    }
}

/// b ← L⁻ᵀ b, with a factor from [`cholesky`].
#[inline(always)]
pub(crate) fn solve_upper(l: &[f64], b: &mut [f64], r: usize) {
    for (i, row) in l.chunks_exact(r.max(1)).take(b.len()).enumerate().rev() {
        let (before, rest) = b.split_at_mut(i);
        let x = rest[0] * row[i];
        rest[0] = x;
        for (b, l) in before.iter_mut().zip(row) {
            *b -= l * x;
        }
    }
}

/// Solves gram·x = rhs for each row of a group, leaves x in `rhs`, and returns rhs·x. `gram` is the
/// lower triangle, row by row, and is overwritten with its Cholesky factor as by [`cholesky`];
/// pivots are taken to be at least `least_pivot`.
#[inline(always)]
pub(crate) fn solve_lanes(
    gram: &mut [Lanes],
    rhs: &mut [Lanes],
    r: usize,
    least_pivot: f32,
) -> Lanes {
    let row = |i: usize| i * (i + 1) / 2;
    let least = Lanes::splat(least_pivot);
    for i in 0..r {
        for j in 0..=i {
            let mut s = gram[row(i) + j];
            for l in 0..j {
                s -= gram[row(i) + l] * gram[row(j) + l];
            }
            gram[row(i) + j] =
                if i == j { Lanes::splat(1.0) / s.max(least).sqrt() } else { s * gram[row(j) + j] };
        }
    }
    let mut product = Lanes::ZERO;
    for i in 0..r {
        let mut s = rhs[i];
        for j in 0..i {
            s -= gram[row(i) + j] * rhs[j];
        }
        rhs[i] = s * gram[row(i) + i];
        product += rhs[i] * rhs[i];
    }
    for i in (0..r).rev() {
        let mut s = rhs[i];
        for j in i + 1..r {
            s -= gram[row(j) + i] * rhs[j];
        }
        rhs[i] = s * gram[row(i) + i];
    }
    product
}
