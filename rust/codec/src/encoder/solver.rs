//! The fit of a group's rows by the terms of their configuration: which coefficients make
//! KL(given ‖ decoded) least.
//!
//! With F(t) = Σ c·term(t) in place of the log-probabilities y(t) of the ranks that are not stored
//! exactly, and p = eʸ, the part of the KL divergence that c changes is Σ (e^F − p·F) up to a
//! constant. (This is the generalised form. Its minimum has the right total mass, and is also the
//! minimum of the divergence over K ∪ {R} wherever a constant is among the terms.) It is convex in
//! c:
//!
//! ```text
//! gradient  Σ (e^F − p)·q      Hessian  Σ e^F·q·qᵀ      q(t): the orthonormal terms at rank t
//! ```
//!
//! so Newton's method arrives in one to four steps from a weighted least-squares fit. A small
//! multiple of Σ (F − y)² is added to the objective ([`RIDGE`]). It costs nothing that can be
//! measured and keeps ranks that have no probability from running away.
//!
//! In the orthonormal basis everything is well conditioned, so the search runs in float32, sixteen
//! rows at a time. Each step corrects the one before it, so rounding errors do not add up.

use super::coefficients::{CoefficientRounding, FIRST_RIDGE, least_squares_weight};
use super::column_sums::{Columns, Products, dot_terms, padded, rank_table};
use super::linalg::{
    Basis, add_square, cholesky, dot_short, lower_triangle, solve_lanes, solve_lower, solve_upper,
};
use super::row::{MIN_LOGPROB, RowInput};
use crate::float::FloatType;
use crate::simd::lanes::{LANES, Lanes, exp, no_unroll};

/// Weight of Σ (F − y)² beside the KL divergence, in units of the largest fitted probability.
const RIDGE: f32 = 1e-4;
/// The least pivot of the equations: weights are at least the ridge, so pivots are positive but for
/// rounding.
const LEAST_PIVOT: f32 = RIDGE * 1e-3;
/// No step moves a fitted value by more nats than this: farther away e^F is not the parabola that
/// the step assumes.
const LONGEST_STEP: f32 = 2.0;
/// Fitted values are taken to be no more than this many nats above the reference: beyond e^20 the
/// step is cut anyway.
const HIGHEST: f32 = 20.0;
/// Newton's method stops after the step that promised to lower KL by less than this (nats).
const ENOUGH: f32 = 1e-3;
const MOST_STEPS: usize = 4;
/// Where another parabola is drawn, R is taken to be left at least this part of its probability.
const LEAST_LEFT: f64 = 0.1;
/// A decrease that no step can promise.
const LARGEST_DECREASE: f32 = 1e30;

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

/// Buffers of [`Fit`], kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct FitScratch {
    /// For each rank the target that F should meet, weights, and weighted errors.
    target: Vec<Lanes>,
    w: Vec<Lanes>,
    u: Vec<Lanes>,
    system: System,
    /// The lowest target of a likely rank.
    floor: Lanes,
    /// The unweighted fit's largest error.
    unweighted_error: Lanes,
    /// What F must not exceed at the first rank.
    ceiling: Lanes,
}

/// The equations of a group's rows, whose unknowns are the coefficients of the r orthonormal
/// columns.
#[derive(Debug, Default)]
struct System {
    /// The lower triangle: r(r + 1)/2 numbers a row.
    gram: Vec<Lanes>,
    /// [`padded`] r numbers a row.
    rhs: Vec<Lanes>,
    factor: Vec<Lanes>,
    c: Vec<Lanes>,
    /// Σ target·q, Σ p·q and the current Σ w·q.
    of_target: Vec<Lanes>,
    of_p: Vec<Lanes>,
    of_w: Vec<Lanes>,
    /// [`padded`] [`Products::rank`] sums.
    of_basis: Vec<Lanes>,
}

impl System {
    fn resize(&mut self, r: usize, rank: usize) {
        let Self { gram, rhs, factor, c, of_target, of_p, of_w, of_basis } = self;
        gram.resize(r * (r + 1) / 2, Lanes::ZERO);
        factor.resize(gram.len(), Lanes::ZERO);
        // Other configurations leave other numbers behind.
        for of_columns in [rhs, c, of_target, of_p, of_w] {
            of_columns.clear();
            of_columns.resize(padded(r), Lanes::ZERO);
        }
        of_basis.clear();
        of_basis.resize(padded(rank), Lanes::ZERO);
    }
}

/// What the fit of a group found for one row.
#[derive(Debug, Default)]
pub(crate) struct Fitted {
    /// r coefficients of the orthonormal columns.
    pub(crate) c: Vec<f64>,
    /// Those of least KL, whatever the bounds.
    pub(crate) unconstrained: Vec<f64>,
    /// Cholesky factor of the Hessian (r × r, lower triangle, as by
    /// [`cholesky`](super::linalg::cholesky)), in units of the first fitted probability.
    pub(crate) factor: Vec<f64>,
    /// The first fitted probability, its target F, and in its units Σ p, Σ p·q and the probability
    /// of R.
    pub(crate) first: f64,
    pub(crate) reference: f32,
    pub(crate) mass: f64,
    pub(crate) of_p: Vec<f64>,
    pub(crate) missing: f64,
    /// Room for Σ e^F·q.
    pub(crate) of_f: Vec<f64>,
    /// Largest |F − target| of the unweighted least-squares fit, over the likely ranks.
    pub(crate) unweighted_error: f32,
    /// The coefficients keep the limits.
    pub(crate) inside: bool,
    /// The last exact value is raised to make room for them.
    pub(crate) raises: bool,
}

impl Fitted {
    /// e^F in units of the first fitted probability.
    #[inline(always)]
    fn probabilities(&self, values: &[f32; LANES]) -> Lanes {
        (Lanes(*values) - Lanes::splat(self.reference)).min(Lanes::splat(HIGHEST)).exp()
    }

    /// What values of probability `mass` leave for R, at least `part` of what R should have.
    #[inline(always)]
    fn left(&self, mass: Lanes, part: f64) -> f64 {
        (self.mass + self.missing - f64::from(mass.total())).max(part * self.missing)
    }
}

/// Fits rows of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct Fit {
    coefficients: CoefficientRounding,
    /// The number of ranks, n.
    n: usize,
    /// Ranks with a residual of their own; they come first.
    residual_count: usize,
    /// The rank from which on F is fitted to what y falls below the rank before (0: nowhere).
    restart: usize,
    /// All values can be shifted alike.
    has_constant: bool,
    /// The orthonormal columns in float32: [`padded`] r numbers for each rank; r vectors for
    /// [`LANES`] ranks at a time (zero beyond the last); and tables for sums.
    q_of_rank: Vec<f32>,
    q_of_block: Vec<Lanes>,
    columns_q: Columns,
    products: Products,
    /// Σ q of each column, and its largest |q|.
    totals: Vec<f32>,
    largest: Vec<f32>,
}

impl Fit {
    /// `columns` are the terms at the n ranks as the decoder evaluates them: after its rounding,
    /// and summed up where it sums, anew from `restart` on. `dtype` stores the coefficients.
    pub(crate) fn new(
        columns: Vec<Vec<f64>>,
        dtype: FloatType,
        residual_count: usize,
        restart: usize,
    ) -> Self {
        let n = columns.first().map_or(0, Vec::len);
        let coefficients = CoefficientRounding::new(columns, dtype, residual_count);
        let q = &coefficients.basis().q;
        let largest = |column: &Vec<f64>| column.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let total = |column: &Vec<f64>| column.iter().sum::<f64>();
        let along_ones: f64 = q.iter().map(|column| total(column).powi(2)).sum();
        Self {
            n,
            residual_count,
            restart,
            has_constant: (along_ones - n as f64).abs() < 1e-9 * n as f64,
            q_of_rank: rank_table(q, n),
            q_of_block: block_table(q, n),
            columns_q: Columns::new(q, n),
            products: Products::new(q, n),
            totals: q.iter().map(|column| total(column) as f32).collect(),
            largest: q.iter().map(|column| largest(column) as f32).collect(),
            coefficients,
        }
    }

    /// The rounding of the coefficients that are found.
    #[inline(always)]
    pub(crate) const fn coefficients(&self) -> &CoefficientRounding {
        &self.coefficients
    }

    /// The orthonormal basis that [`Fitted::c`] refers to.
    #[inline(always)]
    pub(crate) fn basis(&self) -> &Basis {
        self.coefficients.basis()
    }

    /// The number of ranks, n.
    #[inline(always)]
    pub(crate) const fn ranks(&self) -> usize {
        self.n
    }

    /// The rank from which on F is fitted to what y falls below the rank before; 0: nowhere.
    #[inline(always)]
    pub(crate) const fn restart(&self) -> usize {
        self.restart
    }

    /// Ranks with a residual of their own.
    #[inline(always)]
    pub(crate) const fn residual_count(&self) -> usize {
        self.residual_count
    }

    /// Fits up to [`LANES`] rows, and leaves the result for each of them in `fitted`.
    #[inline(always)]
    pub(crate) fn solve(
        &self,
        rows: &[RowInput],
        limits: Limits,
        scratch: &mut FitScratch,
        fitted: &mut [Fitted],
    ) {
        let r = self.basis().rank();
        scratch.system.resize(r, self.products.rank());
        let reference = self.load(rows, scratch);
        let floor = each(rows, |row| limits.likely - row.base as f32 + row.shift as f32);
        let unweighted_error = self.fit_unweighted(reference, floor, scratch);
        self.fit_weighted(scratch);
        if self.residual_count == 0 {
            let scale = each(rows, |row| row.y[0]).exp();
            self.newton(reference, scale, scratch);
        }
        scratch.unweighted_error = unweighted_error;
        scratch.ceiling =
            if self.restart > 0 { Lanes::ZERO } else { each(rows, |row| row.ceiling.last as f32) };
        // Errors are bounded where the values are, not where they were shifted to.
        let shift = each(rows, |row| row.shift as f32);
        scratch.floor = floor - self.before_restart(&scratch.target) - shift;
        for target in &mut scratch.target {
            no_unroll();
            *target -= shift;
        }
        for (lane, row) in fitted[..rows.len()].iter_mut().enumerate() {
            row.c.clear();
            row.c.extend(scratch.system.c[..r].iter().map(|c| f64::from(c.0[lane])));
            row.unconstrained.clone_from(&row.c);
            row.factor.clear();
            row.unweighted_error = unweighted_error.0[lane];
            row.raises = false;
        }
    }

    /// Fills the targets with y − base + shift (neither y nor base below [`MIN_LOGPROB`]), and from
    /// [`Fit::restart`] on with what y falls below the rank before. Makes room in the other
    /// buffers, and returns the target of the first rank, which probabilities are relative to.
    /// Unused lanes repeat the first row.
    #[inline(always)]
    fn load(&self, rows: &[RowInput], scratch: &mut FitScratch) -> Lanes {
        let n = rows[0].y.len();
        for buffer in [&mut scratch.target, &mut scratch.w, &mut scratch.u] {
            buffer.resize(n, Lanes::ZERO);
        }
        let mut base = each(rows, |row| (row.base as f32).max(MIN_LOGPROB) - row.shift as f32);
        let rows: [&[f32]; LANES] =
            std::array::from_fn(|lane| &rows.get(lane).unwrap_or(&rows[0]).y[..n]);
        for (t, target) in scratch.target.iter_mut().enumerate() {
            no_unroll();
            let mut y = Lanes::ZERO;
            for (y, row) in y.0.iter_mut().zip(&rows) {
                *y = row[t];
            }
            let y = y.max(Lanes::splat(MIN_LOGPROB));
            *target = y - base;
            if t + 1 == self.restart {
                base = y;
            }
        }
        scratch.target[0]
    }

    /// The target of the rank before [`Fit::restart`], 0 if there is none.
    #[inline(always)]
    fn before_restart(&self, target: &[Lanes]) -> Lanes {
        if self.restart > 0 { target[self.restart - 1] } else { Lanes::ZERO }
    }

    /// The unweighted fit, of which the largest errors are returned. Leaves the weights of the
    /// weighted fit in `w`, and the errors by these weights in `u`.
    #[inline(always)]
    fn fit_unweighted(&self, reference: Lanes, floor: Lanes, scratch: &mut FitScratch) -> Lanes {
        let FitScratch { target: targets, w, u, system, .. } = scratch;
        let System { c, of_target, .. } = system;
        // The basis is orthonormal, so sums are its coefficients.
        self.columns_q.sums(targets, of_target);
        c.copy_from_slice(of_target);
        let mut largest = Lanes::ZERO;
        let mut before = Lanes::ZERO;
        let q = self.q_of_rank.chunks_exact(c.len());
        let ranks = targets.iter().zip(q).zip(w.iter_mut().zip(u));
        for (t, ((target, q), (w, u))) in ranks.enumerate() {
            no_unroll();
            if t == self.restart {
                before = self.before_restart(targets);
            }
            let error = *target - dot_terms(q, c);
            let y = *target + before;
            if t >= self.residual_count {
                largest = largest.max(y.where_greater(floor, error.abs(), Lanes::ZERO));
            }
            *w = least_squares_weight(self.residual_count, t, (y - reference).exp());
            *u = *w * error;
        }
        largest
    }

    /// The weighted least-squares fit, as a correction of the unweighted one.
    #[inline(always)]
    fn fit_weighted(&self, scratch: &mut FitScratch) {
        let FitScratch { w, u, system, .. } = scratch;
        let System { gram, rhs, factor, c, of_p, of_w, of_basis, .. } = system;
        let r = self.totals.len();
        self.products.sums(w, of_basis, gram, &mut of_w[..r]);
        self.columns_q.sums(u, rhs);
        solve_lanes(gram, rhs, r, LEAST_PIVOT);
        factor.copy_from_slice(gram);
        c.iter_mut().zip(rhs.iter()).for_each(|(c, step)| *c += *step);
        for ((of_p, of_w), total) in of_p.iter_mut().zip(of_w.iter()).zip(&self.totals) {
            *of_p = *of_w - Lanes::splat(FIRST_RIDGE * total);
        }
    }

    /// Newton's method on the KL divergence, from the weighted fit. A row stops by itself, whatever
    /// the others do.
    ///
    /// The columns are orthonormal, so Σ (target − F)·q is the difference of two coefficients, and
    /// the gradient comes out of the sums that the Hessian needs.
    #[inline(always)]
    fn newton(&self, reference: Lanes, scale: Lanes, scratch: &mut FitScratch) {
        let FitScratch { w, system, .. } = scratch;
        let System { gram, rhs, factor, c, of_target, of_p, of_w, of_basis } = system;
        let r = self.totals.len();
        let half = Lanes::splat(0.5);
        let ridge = Lanes::splat(RIDGE);
        let mut active = Lanes::splat(1.0);
        for _ in 0..MOST_STEPS {
            for (w, q) in w.iter_mut().zip(self.q_of_rank.chunks_exact(padded(r))) {
                no_unroll();
                let f = (dot_terms(q, c) - reference).min(Lanes::splat(HIGHEST));
                *w = f.exp() + ridge;
            }
            self.products.sums(w, of_basis, gram, &mut of_w[..r]);
            for i in 0..r {
                no_unroll();
                let of_f = of_w[i] - Lanes::splat(RIDGE * self.totals[i]);
                rhs[i] = (of_p[i] - of_f) + ridge * (of_target[i] - c[i]);
            }
            let decrease = solve_lanes(gram, rhs, r, LEAST_PIVOT) * scale * half;
            // A row that is done does not move any more, nor does one whose equations float32
            // cannot solve.
            active = Lanes::splat(LARGEST_DECREASE).where_greater(decrease, active, Lanes::ZERO);
            for (kept, new) in factor.iter_mut().zip(gram.iter()) {
                *kept = active.where_greater(half, *new, *kept);
            }
            let length = Lanes::splat(LONGEST_STEP) / self.longest_step(rhs);
            for (c, step) in c.iter_mut().zip(rhs.iter()) {
                *c = active.where_greater(half, *c + length * *step, *c);
            }
            active = decrease.where_greater(Lanes::splat(ENOUGH), active, Lanes::ZERO);
            if active.0.iter().all(|&active| active == 0.0) {
                break;
            }
        }
    }

    /// The largest |Σ c·q| of a rank, or [`LONGEST_STEP`] where that is larger.
    #[inline(always)]
    fn longest_step(&self, c: &[Lanes]) -> Lanes {
        let mut longest = Lanes::splat(LONGEST_STEP);
        let mut limit = Lanes::ZERO;
        for (c, largest) in c.iter().zip(&self.largest) {
            limit += c.abs() * Lanes::splat(*largest);
        }
        // In most groups no rank comes near.
        if limit.0.iter().fold(true, |below, &limit| below & (limit < LONGEST_STEP)) {
            return longest;
        }
        for q in self.q_of_rank.chunks_exact(c.len()) {
            no_unroll();
            longest = longest.max(dot_terms(q, c).abs());
        }
        longest
    }

    /// The limit that each row of the group violates most, and by how much (nats). Limit t is the
    /// step to rank t (for the first rank, from the ceiling), and limit n + 1 + t is the error of
    /// rank t. In a fit that is followed by residuals only the ranks after them matter.
    #[inline(always)]
    pub(crate) fn most_violated(&self, limits: Limits, scratch: &FitScratch) -> (Lanes, Lanes) {
        let FitScratch { target, floor, unweighted_error, ceiling, system, .. } = scratch;
        let first = self.residual_count;
        let lowest = Lanes::splat(f32::NEG_INFINITY);
        let errors = Lanes::splat((target.len() + 1) as f32);
        let margin = Lanes::splat(limits.margin);
        let allowed = unweighted_error.max(Lanes::splat(limits.error));
        let mut most = lowest;
        let mut which = Lanes::ZERO;
        // For the step to the first rank only the ceiling is a limit.
        let mut before = if first == self.restart { *ceiling } else { Lanes::splat(f32::INFINITY) };
        let mut rank = Lanes::splat(first as f32);
        let q = &self.q_of_rank[first * system.c.len()..];
        for (target, q) in target[first..].iter().zip(q.chunks_exact(system.c.len())) {
            no_unroll();
            let f = dot_terms(q, &system.c);
            let step = f - before + margin;
            which = step.where_greater(most, rank, which);
            most = step.max(most);
            before = f;
            let over = target.where_greater(*floor, (f - *target).abs() - allowed, lowest);
            which = over.where_greater(most, rank + errors, which);
            most = over.max(most);
            rank += Lanes::splat(1.0);
        }
        (most, which)
    }

    /// Copies a row's factor out of the group's, and adds what an error of the total probability
    /// costs the missing outcome R: half its square divided by R's probability.
    #[inline(always)]
    pub(crate) fn take_factor(
        &self,
        scratch: &FitScratch,
        lane: usize,
        input: &RowInput,
        row: &mut Fitted,
    ) {
        let r = self.totals.len();
        if !row.factor.is_empty() {
            return;
        }
        row.factor.resize(r * r, 0.0);
        for ((i, j), value) in lower_triangle(r).zip(&scratch.system.factor) {
            row.factor[i * r + j] = f64::from(value.0[lane]);
        }
        if self.residual_count > 0 {
            return;
        }
        row.first = f64::from(exp(input.y[0]));
        row.reference = input.y[0] - input.base as f32 + input.shift as f32;
        row.missing = input.missing / row.first;
        row.of_p.clear();
        row.of_p.extend(scratch.system.of_p[..r].iter().map(|sum| f64::from(sum.0[lane])));
        row.mass = 0.0;
        for (sum, total) in row.of_p.iter().zip(&self.totals) {
            row.mass += sum * f64::from(*total);
        }
        // At the minimum Σ e^F·q is Σ p·q.
        let weight = 1.0 / row.missing.sqrt();
        row.of_f.clear();
        row.of_f.extend(row.of_p.iter().map(|sum| weight * sum));
        add_square(&mut row.factor, &mut row.of_f, r);
    }

    /// Lowers all values alike where they have more probability than they should.
    #[inline(always)]
    pub(crate) fn lower_mass(&self, row: &mut Fitted, values: &[f32]) {
        let mut mass = Lanes::ZERO;
        for block in values.as_chunks::<LANES>().0 {
            no_unroll();
            mass += row.probabilities(block);
        }
        let shift = libm::log(row.mass / f64::from(mass.total()));
        if self.has_constant && shift < 0.0 {
            for (c, total) in row.c.iter_mut().zip(&self.totals) {
                *c += shift * f64::from(*total);
            }
        }
    }

    /// What the coefficients change of KL over K ∪ {R}: −Σ p·F − R·ln R̂, in units of the first
    /// fitted probability. Leaves e^F in `values`.
    #[inline(always)]
    pub(crate) fn objective(&self, row: &Fitted, values: &mut Vec<[f32; LANES]>) -> f64 {
        self.values(&row.c, values);
        let mut mass = Lanes::ZERO;
        for block in values.iter_mut() {
            no_unroll();
            let p = row.probabilities(block);
            mass += p;
            *block = p.0;
        }
        let left = row.left(mass, f64::MIN_POSITIVE);
        -dot_short(&row.of_p, &row.c) - row.missing * libm::log(left)
    }

    /// Replaces the parabola of a row by that of its present coefficients, and returns the
    /// objective there.
    ///
    /// It is for few rows, and not inlined: that would be much code in every instruction set's
    /// entry.
    #[inline(never)]
    pub(crate) fn take_parabola(&self, row: &mut Fitted, values: &mut Vec<[f32; LANES]>) -> f64 {
        let before = self.objective(row, values);
        let r = self.totals.len();
        let mut mass = Lanes::ZERO;
        for block in values.iter() {
            mass += Lanes(*block);
        }
        // The parabola for less would be too narrow to move on.
        let ratio = row.missing / row.left(mass, LEAST_LEFT);
        let Fitted { c, unconstrained, factor, of_p, of_f, missing, .. } = row;
        let blocks = || values.iter().zip(self.q_of_block.chunks_exact(r));
        of_f.clear();
        for i in 0..r {
            let mut sum = Lanes::ZERO;
            for (w, q) in blocks() {
                no_unroll();
                sum += q[i] * Lanes(*w);
            }
            of_f.push(ratio * f64::from(sum.total()));
        }
        for (i, j) in lower_triangle(r) {
            let mut sum = Lanes::ZERO;
            for (w, q) in blocks() {
                no_unroll();
                sum += q[i] * q[j] * Lanes(*w);
            }
            factor[i * r + j] = ratio * f64::from(sum.total()) + of_f[i] * of_f[j] / *missing;
        }
        for i in 0..r {
            factor[i * r + i] += f64::from(RIDGE);
        }
        if !cholesky(factor, r) {
            return f64::NEG_INFINITY;
        }
        for ((to, p), f) in unconstrained.iter_mut().zip(of_p).zip(of_f) {
            *to = *p - *f;
        }
        solve_lower(factor, unconstrained, r);
        solve_upper(factor, unconstrained, r);
        unconstrained.iter_mut().zip(c).for_each(|(to, c)| *to += *c);
        before
    }

    /// Σ c·q at each rank, and −∞ beyond the last up to a whole number of [`LANES`].
    #[inline(always)]
    fn values(&self, c: &[f64], values: &mut Vec<[f32; LANES]>) {
        self.combine(c, values);
        values.as_flattened_mut()[self.n..].fill(f32::NEG_INFINITY);
    }

    /// values[t] = Σ c·q[t], and 0 up to a whole number of [`LANES`].
    #[inline(always)]
    pub(crate) fn combine(&self, c: &[f64], values: &mut Vec<[f32; LANES]>) {
        values.resize(self.q_of_block.len() / c.len(), [0.0; LANES]);
        for (values, block) in values.iter_mut().zip(self.q_of_block.chunks_exact(c.len())) {
            let mut sum = Lanes::ZERO;
            for (q, c) in block.iter().zip(c) {
                no_unroll();
                sum += *q * Lanes::splat(*c as f32);
            }
            *values = sum.0;
        }
    }

    /// Coefficients of the orthonormal columns in the unweighted fit of y − base.
    #[cold]
    pub(crate) fn unweighted(&self, y: &[f32], base: f64) -> Vec<f64> {
        let target = |y: f32| f64::from(y.max(MIN_LOGPROB)) - base;
        let along = |q: &Vec<f64>| q.iter().zip(y).map(|(q, &y)| q * target(y)).sum();
        self.basis().q.iter().map(along).collect()
    }
}

/// A number of each row; unused lanes repeat the first row.
#[inline(always)]
fn each(rows: &[RowInput], value: impl Fn(&RowInput) -> f32) -> Lanes {
    Lanes(std::array::from_fn(|lane| value(rows.get(lane).unwrap_or(&rows[0]))))
}

/// For [`LANES`] ranks at a time (zero beyond the last) a vector of each column.
fn block_table(columns: &[Vec<f64>], n: usize) -> Vec<Lanes> {
    let at = |column: &[f64], t: usize| column.get(t).map_or(0.0, |&x| x as f32);
    let block = |t: usize| {
        columns.iter().map(move |column| Lanes(std::array::from_fn(|i| at(column, t + i))))
    };
    (0..n).step_by(LANES).flat_map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::testing::{Numbers, columns, row, solved};

    fn values(c: &[f64], columns: &[Vec<f64>]) -> Vec<f64> {
        let at = |t: usize| c.iter().zip(columns).map(|(c, column)| c * column[t]).sum();
        (0..columns[0].len()).map(at).collect()
    }

    fn weighted_fit(columns: &[Vec<f64>], w: &[f64], y: &[f64]) -> Vec<f64> {
        let sum =
            |a: &[f64], b: &[f64]| a.iter().zip(b).zip(w).map(|((a, b), w)| a * b * w).sum::<f64>();
        let gram = columns.iter().map(|a| columns.iter().map(|b| sum(a, b)).collect()).collect();
        let rhs = columns.iter().map(|a| sum(a, y)).collect();
        solved(gram, rhs).expect("independent columns")
    }

    /// What Newton's method minimises: Σ (e^F − p·F), and the ridge.
    fn objective(f: &[f64], y: &[f64]) -> f64 {
        let ridge = f64::from(RIDGE) * y[0].exp() / 2.0;
        let rank = |(f, y): (&f64, &f64)| f.exp() - y.exp() * f + ridge * (f - y).powi(2);
        f.iter().zip(y).map(rank).sum()
    }

    /// Its minimum in float64: Newton's method on the raw columns, with steps halved until they
    /// help.
    fn minimum(columns: &[Vec<f64>], y: &[f64]) -> f64 {
        let p: Vec<f64> = y.iter().map(|y| y.exp()).collect();
        let mut c = weighted_fit(columns, &p, y);
        let ridge = f64::from(RIDGE) * p[0];
        for _ in 0..50 {
            let f = values(&c, columns);
            let w: Vec<f64> = f.iter().map(|f| f.exp() + ridge).collect();
            // A step of weighted least squares towards −gradient / weight.
            let towards = |t: usize| (p[t] - f[t].exp() + ridge * (y[t] - f[t])) / w[t];
            let towards: Vec<f64> = (0..f.len()).map(towards).collect();
            let step = weighted_fit(columns, &w, &towards);
            let moved = |length: f64| {
                c.iter().zip(&step).map(|(c, s)| c + length * s).collect::<Vec<f64>>()
            };
            let helps = |c: &Vec<f64>| objective(&values(c, columns), y) <= objective(&f, y);
            let best = (0..40).map(|i| moved(0.5f64.powi(i))).find(helps);
            let Some(best) = best else { break };
            c = best;
        }
        objective(&values(&c, columns), y)
    }

    #[test]
    fn reaches_the_minimum_and_knows_the_unweighted_fit() {
        let n = 49;
        let mut numbers = Numbers(1);
        let columns = columns(n);
        let fit = Fit::new(columns.clone(), FloatType::Float64, 0, 0);
        let rows: Vec<Vec<f32>> = (0..LANES).map(|_| row(n, &mut numbers)).collect();
        let inputs: Vec<RowInput> =
            rows.iter().map(|y| RowInput { logprobs: y, y, ..RowInput::default() }).collect();
        let limits = Limits { likely: -100.0, error: 0.0, margin: 0.0 };
        let mut scratch = FitScratch::default();
        let mut fitted = Vec::new();
        fitted.resize_with(LANES, Fitted::default);
        fit.solve(&inputs, limits, &mut scratch, &mut fitted);
        for (y, fitted) in rows.iter().zip(&fitted) {
            let y: Vec<f64> = y.iter().map(|&y| f64::from(y)).collect();
            let found = objective(&values(&fitted.c, &fit.basis().q), &y);
            let least = minimum(&columns, &y);
            assert!(found - least < 1e-5 && found - least > -1e-6, "{found} {least}");
            let plain = values(&weighted_fit(&columns, &vec![1.0; n], &y), &columns);
            let error = plain.iter().zip(&y).fold(0.0, |a: f64, (f, y)| a.max((f - y).abs()));
            let reported = f64::from(fitted.unweighted_error);
            assert!((reported - error).abs() < 1e-4, "{reported} {error}");
        }
    }
}
