//! The fit of a row's values by the terms of its configuration: which coefficients make KL(given ‖ decoded) least.
//!
//! With F(t) = Σ c·term(t) in place of the log-probabilities y(t) of the ranks that are not stored exactly, p = eʸ, the part of the KL
//! divergence that c changes is Σ (e^F − p·F) (up to a constant; the generalised form, whose minimum has the right total mass and is also
//! the minimum of the renormalised divergence wherever a constant is among the terms). It is convex in c:
//!
//! ```text
//! gradient  Σ (e^F − p)·q        Hessian  Σ e^F·q·qᵀ        q(t): the terms at rank t, orthonormalised
//! ```
//!
//! so Newton's method from a weighted least-squares fit arrives in one to four steps. A small multiple of Σ (F − y)² is added to the
//! objective ([`RIDGE`]): it costs nothing that can be measured and keeps ranks that have no probability from running away.
//!
//! The terms of a published configuration (powers up to 111⁴ beside √t) make a matrix whose singular values spread over eight decades,
//! so they are scaled and orthogonalised once per configuration, in float64 (Gram–Schmidt, done twice, which is enough: Giraud et al.
//! 2005). In that basis everything is well conditioned and the search runs in float32, sixteen rows at a time; corrections add up, so its
//! rounding does not; the solution is mapped back to raw coefficients in float64.

use crate::float::FloatType;
use crate::lanes::{LANES, Lanes, exp, one_step};
use crate::simd::Isa;

/// A column whose part orthogonal to the earlier ones is smaller than this (of its own length) adds nothing that a coefficient could use.
const DEPENDENT: f64 = 1e-9;
/// Rounding error of the fitted values, relative to the values, above which coefficients are rounded one at a time.
const VISIBLE_ROUNDING: f64 = 1e-4;
/// Weight of Σ (F − y)² beside the KL divergence, in units of the largest fitted probability.
const RIDGE: f32 = 1e-4;
/// The same for the least-squares fit that Newton's method starts from.
const FIRST_RIDGE: f32 = 1e-3;
/// Weight of ranks with a residual of their own, and the least weight, in a fit that is followed by residuals.
const COVERED_SHARE: f32 = 0.01;
pub(crate) const LEAST_WEIGHT: f32 = 1e-3;
/// No step moves a fitted value by more nats than this: farther away e^F is not the parabola that the step assumes.
const LONGEST_STEP: f32 = 2.0;
/// Log-probabilities below this are fitted as this: their probability is 0 in every float type, and a fit that reaches for −1e30 loses all
/// others.
pub(crate) const DEEPEST: f32 = -1000.0;
/// Newton's method stops after the step that promised to lower KL by less than this (nats).
const ENOUGH: f32 = 2e-5;
const MOST_STEPS: usize = 4;

/// An orthonormal basis of some columns, and the way back to their coefficients.
#[derive(Debug, Clone)]
pub(crate) struct Basis {
    /// r orthonormal columns of n.
    pub(crate) q: Vec<Vec<f64>>,
    /// r columns of m: raw coefficients of each orthonormal column.
    to_raw: Vec<Vec<f64>>,
}

/// Σ a·b in eight interleaved sums: one order of additions everywhere, and one that vectorises.
#[inline(always)]
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
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
        let mut basis = Self { q: Vec::new(), to_raw: Vec::new() };
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

    /// Raw coefficients of the combination `c` of the orthonormal columns.
    #[inline(always)]
    fn raw(&self, c: &[f64], out: &mut [f64]) {
        out.fill(0.0);
        for (b, raw) in c.iter().zip(&self.to_raw) {
            out.iter_mut().zip(raw).for_each(|(x, y)| *x += b * y);
        }
    }

    /// How much larger than a fitted value its parts can be: what rounding a coefficient is multiplied by.
    fn amplification(&self, columns: &[&[f64]]) -> f64 {
        let largest = |i: usize| columns[i].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let parts = self.to_raw.iter().flat_map(|raw| (0..columns.len()).map(move |i| raw[i].abs() * largest(i)));
        parts.fold(0.0, f64::max)
    }
}

/// Overwrites the lower half of an r × r matrix with its Cholesky factor L, with the inverse of L's diagonal in place of it; false when the matrix is not
/// safely positive definite.
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
                if s.is_nan() || s <= 1e-14 * largest {
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

/// b ← L⁻¹ b, of a factor by [`cholesky`].
#[inline(always)]
pub(crate) fn solve_lower(l: &[f64], b: &mut [f64], r: usize) {
    for i in 0..r {
        for j in 0..i {
            b[i] -= l[i * r + j] * b[j];
        }
        b[i] *= l[i * r + i];
    }
}

/// b ← L⁻ᵀ b, of a factor by [`cholesky`].
#[inline(always)]
pub(crate) fn solve_upper(l: &[f64], b: &mut [f64], r: usize) {
    for i in (0..r).rev() {
        for j in i + 1..r {
            b[i] -= l[j * r + i] * b[j];
        }
        b[i] *= l[i * r + i];
    }
}

#[derive(Debug, Default)]
struct NormalEquations {
    /// r × r, lower half.
    gram: Vec<f64>,
    rhs: Vec<f64>,
    /// A column times the weights.
    weighted: Vec<f64>,
}

/// Tables of n float32 columns, for sums and combinations over a group of rows.
#[derive(Debug, Clone)]
struct Columns {
    count: usize,
    /// Blocks of [`TILE`] columns, each block rank by rank; the last block is filled up with zeros.
    tiles: Vec<Vec<[f32; TILE]>>,
}

/// Sums that are built at a time: few enough for the registers of every instruction set.
const TILE: usize = 4;

impl Columns {
    fn new(columns: &[Vec<f64>], n: usize) -> Self {
        let at = |block: &[Vec<f64>], t: usize| {
            let mut row = [0.0; TILE];
            row.iter_mut().zip(block).for_each(|(out, column)| *out = column[t] as f32);
            row
        };
        let tiles = columns.chunks(TILE).map(|block| (0..n).map(|t| at(block, t)).collect()).collect();
        Self { count: columns.len(), tiles }
    }

    /// Σ w·column for each column and row.
    #[inline(always)]
    fn sums(&self, w: &[Lanes], out: &mut [Lanes]) {
        for (tile, out) in self.tiles.iter().zip(out[..self.count].chunks_mut(TILE)) {
            let mut sums = [Lanes::ZERO; TILE];
            for (w, columns) in w.iter().zip(tile) {
                one_step();
                for i in 0..TILE {
                    sums[i] += *w * Lanes::splat(columns[i]);
                }
            }
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    /// Adds Σ c·column, over the columns, to each rank and row.
    #[inline(always)]
    fn add_combination(&self, c: &[Lanes], out: &mut [Lanes]) {
        for (tile, c) in self.tiles.iter().zip(c[..self.count].chunks(TILE)) {
            let mut padded = [Lanes::ZERO; TILE];
            padded[..c.len()].copy_from_slice(c);
            for (out, columns) in out.iter_mut().zip(tile) {
                one_step();
                let [a, b, c, d] = columns.map(Lanes::splat);
                *out += (padded[0] * a + padded[1] * b) + (padded[2] * c + padded[3] * d);
            }
        }
    }
}

/// Buffers of [`Fit`], kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct FitScratch {
    /// Of each rank: the target F should meet, F, p, weights, weighted errors, and a step of F.
    target: Vec<Lanes>,
    f: Vec<Lanes>,
    p: Vec<Lanes>,
    w: Vec<Lanes>,
    u: Vec<Lanes>,
    step: Vec<Lanes>,
    /// r(r + 1)/2 and r numbers a row.
    gram: Vec<Lanes>,
    rhs: Vec<Lanes>,
    factor: Vec<Lanes>,
    c: Vec<Lanes>,
    /// Of the likely ranks' lowest target, the unweighted fit's largest error, and what F must not exceed at the first rank.
    floor: Lanes,
    plain_error: Lanes,
    ceiling: Lanes,
    normal: NormalEquations,
    left: Vec<f64>,
    weights: Vec<f64>,
    raw: Vec<f64>,
}

/// What a group's fit found for one row.
#[derive(Debug, Default)]
pub(crate) struct Fitted {
    /// r coefficients of the orthonormal columns.
    pub(crate) c: Vec<f64>,
    /// Those of least KL, whatever the bounds.
    pub(crate) free: Vec<f64>,
    /// Cholesky factor of the Hessian (r × r, lower half, by [`cholesky`]), in units of the first fitted probability.
    pub(crate) factor: Vec<f64>,
    /// Largest |F − y| of the unweighted least-squares fit, over the likely ranks.
    pub(crate) plain_error: f32,
    /// The coefficients keep the limits.
    pub(crate) inside: bool,
}

/// One row of the group to fit. All in nats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FitRow<'a> {
    /// Log-probabilities of the n ranks, descending.
    pub(crate) y: &'a [f32],
    /// What the decoder adds to F: F + base is fitted to y.
    pub(crate) base: f32,
    /// What F must not exceed at the first rank.
    pub(crate) ceiling: f32,
}

/// What rows are held to, if they can be; all in nats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Log-probabilities above this count for the largest error.
    pub(crate) likely: f32,
    /// Errors up to this are good enough, whatever the unweighted fit's largest error is.
    pub(crate) error: f32,
    /// How much each value must be below the one before it.
    pub(crate) margin: f32,
}

/// Fits rows of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct Fit {
    columns: Vec<Vec<f64>>,
    stored: FloatType,
    /// Ranks with a residual of their own; they come first.
    covered: usize,
    /// Term indices in the order in which their coefficients are rounded.
    order: Vec<usize>,
    /// `bases[i]` spans the terms `order[i..]`; only the first where one rounding of all is good enough.
    bases: Vec<Basis>,
    /// The orthonormal columns in float32, column by column and in tiles.
    q32: Vec<Vec<f32>>,
    columns_q: Columns,
    /// The products of two columns, row by row of the lower half.
    products: Columns,
}

impl Fit {
    /// `columns`: the terms at the n points, as the decoder evaluates them (after its rounding; summed up where it sums).
    pub(crate) fn new(columns: Vec<Vec<f64>>, stored: FloatType, covered: usize) -> Self {
        let n = columns.first().map_or(0, Vec::len);
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
        let q = &bases[0].q;
        let product = |i: usize, j: usize| q[i].iter().zip(&q[j]).map(|(a, b)| a * b).collect::<Vec<_>>();
        let products: Vec<Vec<f64>> = (0..q.len()).flat_map(|i| (0..=i).map(move |j| product(i, j))).collect();
        let q32 = q.iter().map(|q| q.iter().map(|&x| x as f32).collect()).collect();
        let (columns_q, products) = (Columns::new(q, n), Columns::new(&products, n));
        Self { columns, stored, covered, order, bases, q32, columns_q, products }
    }

    /// The orthonormal basis that [`Fitted::c`] refers to.
    pub(crate) fn basis(&self) -> &Basis {
        &self.bases[0]
    }

    /// Fits up to [`LANES`] rows.
    #[inline(always)]
    pub(crate) fn solve<I: Isa>(&self, _isa: I, rows: &[FitRow], limits: Limits, scratch: &mut FitScratch, fitted: &mut [Fitted]) {
        let r = self.basis().q.len();
        let shift = load(rows, scratch);
        let FitScratch { target, f, p, w, u, step, gram, rhs, factor, c, .. } = scratch;
        for (buffer, size) in [(&mut *gram, r * (r + 1) / 2), (rhs, r), (factor, r * (r + 1) / 2), (c, r)] {
            buffer.clear();
            buffer.resize(size, Lanes::ZERO);
        }

        // The unweighted fit: the basis is orthonormal, so sums are its coefficients.
        self.columns_q.sums(target, c);
        self.columns_q.add_combination(c, f);
        let floor = each(rows, |row| limits.likely - row.base);
        let plain_error = self.weigh(target, f, p, shift, floor, w, u);

        self.products.sums(w, gram);
        self.columns_q.sums(u, rhs);
        newton_step(gram, rhs, r);
        factor.copy_from_slice(gram);
        (0..r).for_each(|i| c[i] += rhs[i]);
        self.columns_q.add_combination(rhs, f);
        if self.covered == 0 {
            let scale = each(rows, |row| row.y[0]).exp();
            self.newton(shift, scale, [target, f, p, w, u, step, gram, rhs, factor, c]);
        }
        (scratch.floor, scratch.plain_error, scratch.ceiling) = (floor, plain_error, each(rows, |row| row.ceiling));
        for (lane, row) in fitted[..rows.len()].iter_mut().enumerate() {
            row.c.clear();
            row.c.extend(c.iter().map(|c| f64::from(c.0[lane])));
            row.free.clone_from(&row.c);
            row.factor.clear();
            row.plain_error = plain_error.0[lane];
        }
    }

    /// Copies a row's factor out of the group's.
    #[inline(always)]
    pub(crate) fn take_factor(&self, scratch: &FitScratch, lane: usize, row: &mut Fitted) {
        let r = self.columns_q.count;
        if row.factor.is_empty() {
            row.factor.resize(r * r, 0.0);
            for ((i, j), value) in lower(r).zip(&scratch.factor) {
                row.factor[i * r + j] = f64::from(value.0[lane]);
            }
        }
    }

    /// values[t] = Σ c·q[t].
    #[inline(always)]
    pub(crate) fn combine(&self, c: &[f64], values: &mut Vec<f32>) {
        values.clear();
        values.resize(self.columns.first().map_or(0, Vec::len), 0.0);
        for (q, c) in self.q32.iter().zip(c) {
            let c = *c as f32;
            values.iter_mut().zip(q).for_each(|(value, q)| *value += c * q);
        }
    }

    /// Ranks with a residual of their own.
    pub(crate) fn covered(&self) -> usize {
        self.covered
    }

    /// The limit that each row of the group exceeds most, and by how much (nats). The limit is t for the step from rank t to t + 1, n for
    /// the ceiling, and n + 1 + t for the error of rank t. Of a fit that is followed by residuals only the ranks after them matter.
    #[inline(always)]
    pub(crate) fn most_exceeded(&self, limits: Limits, scratch: &FitScratch) -> (Lanes, Lanes) {
        let FitScratch { f, target, floor, plain_error, ceiling, .. } = scratch;
        let n = f.len();
        let (mut most, mut which) = (Lanes::splat(f32::NEG_INFINITY), Lanes::splat(n as f32));
        if self.covered == 0 {
            most = f[0] - *ceiling + Lanes::splat(limits.margin);
        }
        let from = self.covered.min(n - 1);
        for t in from..n - 1 {
            one_step();
            let step = f[t + 1] - f[t] + Lanes::splat(limits.margin);
            which = step.where_greater(most, Lanes::splat(t as f32), which);
            most = step.max(most);
        }
        if self.covered == 0 {
            let allowed = plain_error.max(Lanes::splat(limits.error));
            for t in 0..n {
                one_step();
                let over = target[t].where_greater(*floor, (f[t] - target[t]).abs() - allowed, Lanes::splat(f32::NEG_INFINITY));
                which = over.where_greater(most, Lanes::splat((n + 1 + t) as f32), which);
                most = over.max(most);
            }
        }
        (most, which)
    }

    /// Weights of the least-squares fit and weighted errors of the unweighted one into `w` and `u`; returns its largest errors.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the parts of one scratch")]
    fn weigh(&self, target: &[Lanes], f: &[Lanes], p: &mut [Lanes], shift: Lanes, floor: Lanes, w: &mut [Lanes], u: &mut [Lanes]) -> Lanes {
        let mut largest = Lanes::ZERO;
        for (t, ((target, f), (p, (w, u)))) in target.iter().zip(f).zip(p.iter_mut().zip(w.iter_mut().zip(u))).enumerate() {
            one_step();
            *p = (*target - shift).exp();
            let error = *target - *f;
            largest = largest.max(target.where_greater(floor, error.abs(), Lanes::ZERO));
            *w = self.weight(t, *p);
            *u = *w * error;
        }
        largest
    }

    /// The weight of rank t, of probability p relative to the first rank's, in a least-squares fit.
    #[inline(always)]
    fn weight(&self, t: usize, p: Lanes) -> Lanes {
        if self.covered == 0 {
            return p + Lanes::splat(FIRST_RIDGE);
        }
        // p^¾: where residuals follow, the tail must not make their scale large.
        let root = p.sqrt();
        let share = Lanes::splat(if t < self.covered { COVERED_SHARE } else { 1.0 });
        (share * root * root.sqrt()).max(Lanes::splat(LEAST_WEIGHT))
    }

    /// Newton's method on the KL divergence, from the fit in `f` and `c`. A row stops by itself, whatever the others do.
    #[inline(always)]
    fn newton(&self, shift: Lanes, scale: Lanes, [target, f, p, w, u, step, gram, rhs, factor, c]: [&mut Vec<Lanes>; 10]) {
        let r = self.columns_q.count;
        let mut active = Lanes::splat(1.0);
        let half = Lanes::splat(0.5);
        for _ in 0..MOST_STEPS {
            for t in 0..f.len() {
                one_step();
                // Beyond e^20 the step is cut anyway.
                let e = (f[t] - shift).min(Lanes::splat(20.0)).exp();
                w[t] = e + Lanes::splat(RIDGE);
                u[t] = (p[t] - e) + Lanes::splat(RIDGE) * (target[t] - f[t]);
            }
            self.products.sums(w, gram);
            self.columns_q.sums(u, rhs);
            let decrease = newton_step(gram, rhs, r) * scale * half;
            for (kept, new) in factor.iter_mut().zip(gram.iter()) {
                *kept = active.where_greater(half, *new, *kept);
            }
            step.fill(Lanes::ZERO);
            self.columns_q.add_combination(rhs, step);
            let mut longest = Lanes::splat(LONGEST_STEP);
            for step in step.iter() {
                one_step();
                longest = longest.max(step.abs());
            }
            let length = active * (Lanes::splat(LONGEST_STEP) / longest);
            for (f, step) in f.iter_mut().zip(step.iter()) {
                one_step();
                *f += length * *step;
            }
            for (c, step) in c.iter_mut().zip(rhs.iter()) {
                *c += length * *step;
            }
            active = decrease.where_greater(Lanes::splat(ENOUGH), active, Lanes::ZERO);
            if active.0.iter().all(|&active| active == 0.0) {
                break;
            }
        }
    }

    /// Coefficients rounded to their stored type from the combination `c` of the orthonormal columns; all finite.
    ///
    /// Where rounding would show (16-bit types, nearly dependent terms), the terms are rounded one at a time, largest first, and after
    /// each rounding the others are fitted again to what is left, with the weights of the ranks, so that they absorb its error.
    #[inline(always)]
    pub(crate) fn rounded(&self, c: &[f64], y: &[f32], scratch: &mut FitScratch, coefficients: &mut [f64]) {
        let FitScratch { normal, left, weights, raw, .. } = scratch;
        raw.clear();
        raw.resize(self.order.len(), 0.0);
        if self.bases.len() == 1 {
            self.basis().raw(c, raw);
            for (value, &term) in raw.iter().zip(&self.order) {
                coefficients[term] = self.round(*value);
            }
            return;
        }
        left.clear();
        left.resize(self.columns.first().map_or(0, Vec::len), 0.0);
        for (c, q) in c.iter().zip(&self.basis().q) {
            left.iter_mut().zip(q).for_each(|(x, q)| *x += c * q);
        }
        weights.clear();
        weights.extend(y.iter().enumerate().map(|(t, value)| f64::from(self.weight(t, Lanes::splat(exp(value - y[0]))).0[0])));
        for (i, basis) in self.bases.iter().enumerate() {
            raw.truncate(self.order.len() - i);
            basis.solve(left, weights, normal, raw);
            let term = self.order[i];
            coefficients[term] = self.round(raw[0]);
            left.iter_mut().zip(&self.columns[term]).for_each(|(x, column)| *x -= coefficients[term] * column);
        }
    }

    fn round(&self, value: f64) -> f64 {
        let limit = self.stored.max();
        self.stored.round(value.clamp(-limit, limit))
    }
}

/// A number of each row; unused lanes repeat the first row.
#[inline(always)]
fn each(rows: &[FitRow], value: impl Fn(&FitRow) -> f32) -> Lanes {
    Lanes(std::array::from_fn(|lane| value(rows.get(lane).unwrap_or(&rows[0]))))
}

/// Index pairs (i, j), j ≤ i, of the lower half of an r × r matrix, row by row.
fn lower(r: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..r).flat_map(|i| (0..=i).map(move |j| (i, j)))
}

/// Fills `target` with y − base (neither below [`DEEPEST`]), `f` with zeros and makes room in the rest; returns the target of the first
/// rank, which probabilities are relative to. Unused lanes repeat the first row.
#[inline(always)]
fn load(rows: &[FitRow], scratch: &mut FitScratch) -> Lanes {
    let n = rows[0].y.len();
    for buffer in [&mut scratch.target, &mut scratch.f, &mut scratch.p, &mut scratch.w, &mut scratch.u, &mut scratch.step] {
        buffer.resize(n, Lanes::ZERO);
    }
    scratch.f.fill(Lanes::ZERO);
    let base = each(rows, |row| row.base.max(DEEPEST));
    let rows: [&[f32]; LANES] = std::array::from_fn(|lane| &rows.get(lane).unwrap_or(&rows[0]).y[..n]);
    for (t, target) in scratch.target.iter_mut().enumerate() {
        one_step();
        *target = Lanes(rows.map(|y| y[t])).max(Lanes::splat(DEEPEST)) - base;
    }
    scratch.target[0]
}

/// Solves gram·x = rhs for each row, x into `rhs`, and returns rhs·x. `gram` is the lower half, row by row, and is overwritten.
#[inline(always)]
fn newton_step(gram: &mut [Lanes], rhs: &mut [Lanes], r: usize) -> Lanes {
    let row = |i: usize| i * (i + 1) / 2;
    // A Cholesky factorisation with the inverse of its diagonal; weights are at least the ridge, so pivots are positive but for rounding.
    let least = Lanes::splat(RIDGE * 1e-3);
    for i in 0..r {
        for j in 0..=i {
            let mut s = gram[row(i) + j];
            for l in 0..j {
                s -= gram[row(i) + l] * gram[row(j) + l];
            }
            gram[row(i) + j] = if i == j { Lanes::splat(1.0) / s.max(least).sqrt() } else { s * gram[row(j) + j] };
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
