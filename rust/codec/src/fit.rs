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
const ENOUGH: f32 = 1e-3;
const MOST_STEPS: usize = 4;
/// No step can promise as much.
const LARGEST_DECREASE: f32 = 1e30;

/// An orthonormal basis of some columns, and the way back to their coefficients.
#[derive(Debug, Clone)]
pub(crate) struct Basis {
    /// r orthonormal columns of n.
    pub(crate) q: Vec<Vec<f64>>,
    /// r columns of m: raw coefficients of each orthonormal column.
    to_raw: Vec<Vec<f64>>,
    /// The same, for each raw coefficient its r parts.
    parts: Vec<f64>,
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
        let mut basis = Self { q: Vec::new(), to_raw: Vec::new(), parts: Vec::new() };
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
        for (out, parts) in out.iter_mut().zip(self.parts.chunks(c.len().max(1))) {
            *out = 0.0;
            for (c, part) in c.iter().zip(parts) {
                *out += c * part;
            }
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
    for (i, row) in l.chunks_exact(r.max(1)).take(b.len()).enumerate() {
        let (known, rest) = b.split_at_mut(i);
        let mut left = rest[0];
        for (l, x) in row.iter().zip(known) {
            left -= l * *x;
        }
        rest[0] = left * row[i];
    }
}

/// b ← L⁻ᵀ b, of a factor by [`cholesky`].
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

#[derive(Debug, Default)]
struct NormalEquations {
    /// r × r, lower half.
    gram: Vec<f64>,
    rhs: Vec<f64>,
    /// A column times the weights.
    weighted: Vec<f64>,
}

/// Sums that are built at a time: few enough for the registers of every instruction set.
const TILE: usize = 4;

/// Tables of n float32 columns, for sums over the ranks of a group's rows.
#[derive(Debug, Clone)]
struct Columns {
    /// Blocks of up to [`TILE`] columns, of nearly the same size, each rank by rank.
    tiles: Vec<(usize, Vec<f32>)>,
}

impl Columns {
    fn new(columns: &[Vec<f64>], n: usize) -> Self {
        let (mut tiles, mut left) = (Vec::new(), columns);
        while !left.is_empty() {
            let (block, rest) = left.split_at(left.len().div_ceil(left.len().div_ceil(TILE)));
            let ranks = (0..n).flat_map(|t| block.iter().map(move |column| column[t] as f32));
            tiles.push((block.len(), ranks.collect()));
            left = rest;
        }
        Self { tiles }
    }

    /// Σ w·column for each column and row.
    #[inline(always)]
    fn sums(&self, w: &[Lanes], mut out: &mut [Lanes]) {
        for (width, tile) in &self.tiles {
            let (here, rest) = out.split_at_mut(*width);
            match width {
                4 => Self::tile_sums::<4>(w, tile, here),
                3 => Self::tile_sums::<3>(w, tile, here),
                2 => Self::tile_sums::<2>(w, tile, here),
                _ => Self::tile_sums::<1>(w, tile, here),
            }
            out = rest;
        }
    }

    #[inline(always)]
    fn tile_sums<const WIDTH: usize>(w: &[Lanes], tile: &[f32], out: &mut [Lanes]) {
        let mut sums = [Lanes::ZERO; WIDTH];
        for (w, columns) in w.iter().zip(tile.as_chunks::<WIDTH>().0) {
            for i in 0..WIDTH {
                one_step();
                sums[i] += *w * Lanes::splat(columns[i]);
            }
        }
        out.copy_from_slice(&sums);
    }
}

/// Σ w·product for the products of two orthonormal columns, and for the columns themselves.
///
/// Products of powers are powers again, so the r(r + 3)/2 of them span far fewer dimensions (13 for the 27 of six terms, 5 for the 9 of
/// three): sums are built over the ranks for a basis of that span only, and combined to all of them afterwards.
#[derive(Debug, Clone)]
struct Products {
    basis: Columns,
    rank: usize,
    /// Each product, then each column, as a combination of the basis.
    parts: Vec<f32>,
}

impl Products {
    /// What float32 doesn't see of a product, relative to its length.
    const UNSEEN: f64 = 3e-7;

    fn new(q: &[Vec<f64>], n: usize) -> Self {
        let product = |(i, j): (usize, usize)| q[i].iter().zip(&q[j]).map(|(a, b)| a * b).collect::<Vec<f64>>();
        let wanted: Vec<Vec<f64>> = lower(q.len()).map(product).chain(q.iter().cloned()).collect();
        let lengths: Vec<f64> = wanted.iter().map(|column| dot(column, column).sqrt()).collect();
        let mut left = wanted.clone();
        let mut basis: Vec<Vec<f64>> = Vec::new();
        // Gram-Schmidt with the column first of which most is left.
        loop {
            let share = |i: &usize| dot(&left[*i], &left[*i]).sqrt() / lengths[*i];
            let Some(most) = (0..left.len()).max_by(|a, b| share(a).total_cmp(&share(b))) else { break };
            if basis.len() == left.len() || share(&most) < Self::UNSEEN {
                break;
            }
            let mut next = left[most].clone();
            for known in &basis {
                let along = dot(known, &next);
                next.iter_mut().zip(known).for_each(|(x, y)| *x -= along * y);
            }
            let length = dot(&next, &next).sqrt();
            for x in &mut next {
                *x /= length;
            }
            for column in &mut left {
                let along = dot(&next, column);
                column.iter_mut().zip(&next).for_each(|(x, y)| *x -= along * y);
            }
            basis.push(next);
        }
        let part = |column: &[f64], known: Option<&Vec<f64>>| known.map_or(0.0, |known| dot(known, column) as f32);
        let parts = wanted.iter().flat_map(|column| (0..padded(basis.len())).map(|i| part(column, basis.get(i)))).collect();
        Self { rank: basis.len(), basis: Columns::new(&basis, n), parts }
    }

    /// The products' sums into `gram`, the columns' into `sums`.
    #[inline(always)]
    fn sums(&self, w: &[Lanes], of_basis: &mut [Lanes], gram: &mut [Lanes], sums: &mut [Lanes]) {
        self.basis.sums(w, of_basis);
        for (out, parts) in gram.iter_mut().chain(sums).zip(self.parts.chunks_exact(of_basis.len())) {
            one_step();
            *out = combination(parts, of_basis);
        }
    }
}

/// Columns that a combination takes at a time; vectors and tables for it are filled up with zeros to a multiple of this.
const STRIDE: usize = 3;

/// Σ q·c.
#[inline(always)]
pub(crate) fn combination(q: &[f32], c: &[Lanes]) -> Lanes {
    let mut sum = Lanes::ZERO;
    for (q, c) in q.as_chunks::<STRIDE>().0.iter().zip(c.as_chunks::<STRIDE>().0) {
        one_step();
        for i in 0..STRIDE {
            sum += c[i] * Lanes::splat(q[i]);
        }
    }
    sum
}

/// How many numbers a combination of `count` columns needs.
pub(crate) fn padded(count: usize) -> usize {
    count.next_multiple_of(STRIDE)
}

/// A table with [`padded`] numbers for each rank.
pub(crate) fn by_rank(columns: &[Vec<f64>], n: usize) -> Vec<f32> {
    let at = |column: Option<&Vec<f64>>, t: usize| column.map_or(0.0, |column| column[t] as f32);
    (0..n).flat_map(|t| (0..padded(columns.len())).map(move |i| at(columns.get(i), t))).collect()
}

/// Buffers of [`Fit`], kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct FitScratch {
    /// Of each rank: the target F should meet, weights, and weighted errors.
    target: Vec<Lanes>,
    w: Vec<Lanes>,
    u: Vec<Lanes>,
    system: System,
    /// Of the likely ranks' lowest target, the unweighted fit's largest error, and what F must not exceed at the first rank.
    floor: Lanes,
    plain_error: Lanes,
    ceiling: Lanes,
    normal: NormalEquations,
    left: Vec<f64>,
    weights: Vec<f64>,
    raw: Vec<f64>,
    /// r coefficients of each row.
    of_row: Vec<[f64; LANES]>,
}

/// The equations of a group's rows, whose unknowns are the coefficients of the r orthonormal columns.
#[derive(Debug, Default)]
struct System {
    /// r(r + 1)/2 numbers a row, and [`padded`] r.
    gram: Vec<Lanes>,
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

/// What a group's fit found for one row.
#[derive(Debug, Default)]
pub(crate) struct Fitted {
    /// r coefficients of the orthonormal columns.
    pub(crate) c: Vec<f64>,
    /// Those of least KL, whatever the bounds.
    pub(crate) free: Vec<f64>,
    /// Cholesky factor of the Hessian (r × r, lower half, by [`cholesky`]), in units of the first fitted probability.
    pub(crate) factor: Vec<f64>,
    /// Largest |F − target| of the unweighted least-squares fit, over the likely ranks.
    pub(crate) plain_error: f32,
    /// The coefficients keep the limits.
    pub(crate) inside: bool,
    /// The last exact value is raised to make place for them.
    pub(crate) raises: bool,
}

/// One row of the group to fit. All in nats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FitRow<'a> {
    /// Log-probabilities of the n ranks, descending.
    pub(crate) y: &'a [f32],
    /// What the decoder adds to F: F + base is fitted to y (+ `moved`).
    pub(crate) base: f32,
    /// By how much F + base should be above y, since the exact values are.
    pub(crate) moved: f32,
    pub(crate) ceiling: Ceiling,
}

/// What F must not exceed at the first rank: the last exact value as it is, or what it can be raised to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ceiling {
    pub(crate) last: f64,
    pub(crate) raised: f64,
    /// Twice the KL that raising costs, in units of the first fitted probability.
    pub(crate) price: f64,
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
    /// The rank from which on F is fitted to what y falls below the rank before (0: nowhere).
    restart: usize,
    /// Term indices in the order in which their coefficients are rounded.
    order: Vec<usize>,
    /// `bases[i]` spans the terms `order[i..]`; only the first where one rounding of all is good enough.
    bases: Vec<Basis>,
    /// The orthonormal columns in float32: for each rank [`padded`] r numbers, for [`LANES`] ranks at a time (zero beyond the last) r vectors of
    /// them, and for sums.
    q_of_rank: Vec<f32>,
    q_of_block: Vec<Lanes>,
    columns_q: Columns,
    /// Σ q of each column, and its largest |q|.
    totals: Vec<f32>,
    largest: Vec<f32>,
    products: Products,
}

impl Fit {
    /// `columns`: the terms at the n points, as the decoder evaluates them (after its rounding; summed up where it sums, anew from `restart` on).
    pub(crate) fn new(columns: Vec<Vec<f64>>, stored: FloatType, covered: usize, restart: usize) -> Self {
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
        let at = |column: &Vec<f64>, t: usize| column.get(t).map_or(0.0, |&x| x as f32);
        let q_of_rank = by_rank(q, n);
        let blocks = (0..n).step_by(LANES);
        let q_of_block = blocks.flat_map(|t| q.iter().map(move |column| Lanes(std::array::from_fn(|i| at(column, t + i))))).collect();
        let totals = q.iter().map(|column| column.iter().sum::<f64>() as f32).collect();
        let largest = q.iter().map(|column| column.iter().fold(0.0, |a: f64, x| a.max(x.abs())) as f32).collect();
        let (columns_q, products) = (Columns::new(q, n), Products::new(q, n));
        Self { columns, stored, covered, restart, order, bases, q_of_rank, q_of_block, columns_q, totals, largest, products }
    }

    /// The orthonormal basis that [`Fitted::c`] refers to.
    pub(crate) fn basis(&self) -> &Basis {
        &self.bases[0]
    }

    /// Fits up to [`LANES`] rows.
    #[inline(always)]
    pub(crate) fn solve<I: Isa>(&self, _isa: I, rows: &[FitRow], limits: Limits, scratch: &mut FitScratch, fitted: &mut [Fitted]) {
        let r = self.basis().q.len();
        scratch.system.resize(r, self.products.rank);
        let shift = self.load(rows, scratch);
        let FitScratch { target, w, u, system, .. } = scratch;
        let System { gram, rhs, factor, c, of_target, of_p, of_w, of_basis } = system;

        // The unweighted fit: the basis is orthonormal, so sums are its coefficients.
        self.columns_q.sums(target, of_target);
        c.copy_from_slice(of_target);
        let floor = each(rows, |row| limits.likely - row.base + row.moved);
        let plain_error = self.weigh(c, target, shift, floor, w, u);

        self.products.sums(w, of_basis, gram, &mut of_w[..r]);
        self.columns_q.sums(u, rhs);
        newton_step(gram, rhs, r);
        factor.copy_from_slice(gram);
        c.iter_mut().zip(rhs.iter()).for_each(|(c, step)| *c += *step);
        if self.covered == 0 {
            for ((of_p, of_w), total) in of_p.iter_mut().zip(of_w.iter()).zip(&self.totals) {
                *of_p = *of_w - Lanes::splat(FIRST_RIDGE * total);
            }
            let scale = each(rows, |row| row.y[0]).exp();
            self.newton(shift, scale, w, system);
        }
        let ceiling = if self.restart > 0 { Lanes::ZERO } else { each(rows, |row| row.ceiling.last as f32) };
        (scratch.floor, scratch.plain_error, scratch.ceiling) = (floor - self.before_restart(target), plain_error, ceiling);
        // Errors are bounded where the values are, not where they were moved to.
        let moved = each(rows, |row| row.moved);
        scratch.floor -= moved;
        for target in &mut scratch.target {
            one_step();
            *target -= moved;
        }
        for (lane, row) in fitted[..rows.len()].iter_mut().enumerate() {
            row.c.clear();
            row.c.extend(scratch.system.c[..r].iter().map(|c| f64::from(c.0[lane])));
            row.free.clone_from(&row.c);
            row.factor.clear();
            row.plain_error = plain_error.0[lane];
            row.raises = false;
        }
    }

    /// Fills `target` with y − base + moved (neither y nor base below [`DEEPEST`]), and with what y falls below the rank before
    /// [`Fit::restart`] from there on, and makes room in the rest; returns the target of the first rank, which probabilities are relative to.
    /// Unused lanes repeat the first row.
    #[inline(always)]
    fn load(&self, rows: &[FitRow], scratch: &mut FitScratch) -> Lanes {
        let n = rows[0].y.len();
        for buffer in [&mut scratch.target, &mut scratch.w, &mut scratch.u] {
            buffer.resize(n, Lanes::ZERO);
        }
        let mut base = each(rows, |row| row.base.max(DEEPEST) - row.moved);
        let rows: [&[f32]; LANES] = std::array::from_fn(|lane| &rows.get(lane).unwrap_or(&rows[0]).y[..n]);
        for (t, target) in scratch.target.iter_mut().enumerate() {
            one_step();
            let mut y = Lanes::ZERO;
            for (y, row) in y.0.iter_mut().zip(&rows) {
                *y = row[t];
            }
            let y = y.max(Lanes::splat(DEEPEST));
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

    /// Coefficients of the orthonormal columns in the unweighted fit of y − base.
    #[cold]
    pub(crate) fn unweighted(&self, y: &[f32], base: f64) -> Vec<f64> {
        let along = |q: &Vec<f64>| q.iter().zip(y).map(|(q, y)| q * (f64::from(y.max(DEEPEST)) - base)).sum();
        self.basis().q.iter().map(along).collect()
    }

    /// Copies a row's factor out of the group's.
    #[inline(always)]
    pub(crate) fn take_factor(&self, scratch: &FitScratch, lane: usize, row: &mut Fitted) {
        let r = self.totals.len();
        if row.factor.is_empty() {
            row.factor.resize(r * r, 0.0);
            for ((i, j), value) in lower(r).zip(&scratch.system.factor) {
                row.factor[i * r + j] = f64::from(value.0[lane]);
            }
        }
    }

    /// values[t] = Σ c·q[t], and 0 up to a whole number of [`LANES`].
    #[inline(always)]
    pub(crate) fn combine(&self, c: &[f64], values: &mut Vec<[f32; LANES]>) {
        values.resize(self.q_of_block.len() / c.len(), [0.0; LANES]);
        for (values, block) in values.iter_mut().zip(self.q_of_block.chunks_exact(c.len())) {
            let mut sum = Lanes::ZERO;
            for (q, c) in block.iter().zip(c) {
                one_step();
                sum += *q * Lanes::splat(*c as f32);
            }
            *values = sum.0;
        }
    }

    /// Whether all coefficients are rounded at once, whatever the values.
    pub(crate) fn rounds_at_once(&self) -> bool {
        self.bases.len() == 1
    }

    /// The n ranks.
    pub(crate) fn ranks(&self) -> usize {
        self.columns.first().map_or(0, Vec::len)
    }

    /// The rank from which on F is fitted to what y falls below the rank before; 0: nowhere.
    pub(crate) fn restart(&self) -> usize {
        self.restart
    }

    /// Ranks with a residual of their own.
    pub(crate) fn covered(&self) -> usize {
        self.covered
    }

    /// The limit that each row of the group exceeds most, and by how much (nats). The limit is t for the step to rank t (from the
    /// ceiling, to the first), and n + 1 + t for the error of rank t. Of a fit that is followed by residuals only the ranks after them matter.
    #[inline(always)]
    pub(crate) fn most_exceeded(&self, limits: Limits, scratch: &FitScratch) -> (Lanes, Lanes) {
        let FitScratch { target, floor, plain_error, ceiling, system, .. } = scratch;
        let n = target.len();
        let (mut most, mut which) = (Lanes::splat(f32::NEG_INFINITY), Lanes::ZERO);
        let errors = Lanes::splat((n + 1) as f32);
        let (margin, lowest) = (Lanes::splat(limits.margin), Lanes::splat(f32::NEG_INFINITY));
        let allowed = plain_error.max(Lanes::splat(limits.error));
        // Of the step to the first rank only the ceiling is a limit.
        let mut before = if self.covered == self.restart { *ceiling } else { Lanes::splat(f32::INFINITY) };
        let mut rank = Lanes::splat(self.covered as f32);
        let q = &self.q_of_rank[self.covered * system.c.len()..];
        for (target, q) in target[self.covered..].iter().zip(q.chunks_exact(system.c.len())) {
            one_step();
            let f = combination(q, &system.c);
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

    /// Weights of the least-squares fit and weighted errors of the fit `c` into `w` and `u`; returns the latter's largest errors.
    #[inline(always)]
    fn weigh(&self, c: &[Lanes], targets: &[Lanes], shift: Lanes, floor: Lanes, w: &mut [Lanes], u: &mut [Lanes]) -> Lanes {
        let (mut largest, mut before) = (Lanes::ZERO, Lanes::ZERO);
        let ranks = targets.iter().zip(self.q_of_rank.chunks_exact(c.len())).zip(w.iter_mut().zip(u));
        for (t, ((target, q), (w, u))) in ranks.enumerate() {
            one_step();
            if t == self.restart {
                before = self.before_restart(targets);
            }
            let error = *target - combination(q, c);
            if t >= self.covered {
                largest = largest.max((*target + before).where_greater(floor, error.abs(), Lanes::ZERO));
            }
            *w = self.weight(t, (*target + before - shift).exp());
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

    /// Newton's method on the KL divergence, from the fit `c`. A row stops by itself, whatever the others do.
    ///
    /// The columns are orthonormal, so Σ (target − F)·q is the difference of two coefficients, and the gradient comes out of the sums that
    /// the Hessian needs.
    #[inline(always)]
    fn newton(&self, shift: Lanes, scale: Lanes, w: &mut [Lanes], system: &mut System) {
        let System { gram, rhs, factor, c, of_target, of_p, of_w, of_basis } = system;
        let r = self.totals.len();
        let mut active = Lanes::splat(1.0);
        let (half, ridge) = (Lanes::splat(0.5), Lanes::splat(RIDGE));
        for _ in 0..MOST_STEPS {
            for (w, q) in w.iter_mut().zip(self.q_of_rank.chunks_exact(padded(r))) {
                one_step();
                // Beyond e^20 the step is cut anyway.
                *w = (combination(q, c) - shift).min(Lanes::splat(20.0)).exp() + ridge;
            }
            self.products.sums(w, of_basis, gram, &mut of_w[..r]);
            for i in 0..r {
                one_step();
                rhs[i] = (of_p[i] - (of_w[i] - Lanes::splat(RIDGE * self.totals[i]))) + ridge * (of_target[i] - c[i]);
            }
            let decrease = newton_step(gram, rhs, r) * scale * half;
            // A row that is done does not move any more, nor one whose equations float32 can not solve.
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
        // Mostly no rank comes near.
        if limit.0.iter().fold(true, |below, &limit| below & (limit < LONGEST_STEP)) {
            return longest;
        }
        for q in self.q_of_rank.chunks_exact(c.len()) {
            one_step();
            longest = longest.max(combination(q, c).abs());
        }
        longest
    }

    /// Coefficients of a group's rows, one vector for each term, rounded to their stored type; only where [`Fit::rounds_at_once`].
    #[inline(always)]
    pub(crate) fn rounded_group(&self, fitted: &[Fitted], scratch: &mut FitScratch, coefficients: &mut [[f64; LANES]]) {
        let r = self.totals.len();
        scratch.of_row.resize(r, [0.0; LANES]);
        for (lane, row) in fitted.iter().enumerate() {
            for (of_row, c) in scratch.of_row.iter_mut().zip(&row.c) {
                of_row[lane] = *c;
            }
        }
        for (parts, &term) in self.basis().parts.chunks_exact(r).zip(&self.order) {
            let mut sum = [0.0; LANES];
            for (part, c) in parts.iter().zip(&scratch.of_row) {
                one_step();
                for lane in 0..LANES {
                    sum[lane] += c[lane] * part;
                }
            }
            one_step();
            for lane in 0..LANES {
                coefficients[term][lane] = self.round(sum[lane]);
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

    #[inline(always)]
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::simd::Portable;

    /// Numbers in 0 … 1 by a linear congruential generator.
    pub(crate) struct Numbers(pub(crate) u64);

    impl Numbers {
        pub(crate) fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// x of a·x = b by Gaussian elimination with the largest pivot; `None` where a is singular.
    pub(crate) fn solved(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Option<Vec<f64>> {
        let n = b.len();
        for i in 0..n {
            let pivot = (i..n).max_by(|&x, &y| a[x][i].abs().total_cmp(&a[y][i].abs()))?;
            if a[pivot][i].abs() < 1e-12 {
                return None;
            }
            a.swap(i, pivot);
            b.swap(i, pivot);
            let (above, below) = a.split_at_mut(i + 1);
            for (j, row) in below.iter_mut().enumerate() {
                let factor = row[i] / above[i][i];
                row.iter_mut().zip(&above[i]).for_each(|(x, y)| *x -= factor * y);
                b[i + 1 + j] -= factor * b[i];
            }
        }
        for i in (0..n).rev() {
            let known: f64 = (i + 1..n).map(|j| a[i][j] * b[j]).sum();
            b[i] = (b[i] - known) / a[i][i];
        }
        Some(b)
    }

    pub(crate) fn columns(n: usize) -> Vec<Vec<f64>> {
        let column = |f: fn(f64) -> f64| (0..n).map(|t| f(t as f64)).collect();
        vec![column(|_| 1.0), column(|t| t), column(f64::sqrt)]
    }

    /// Log-probabilities as real rows have them: steep first, then flat, in order.
    pub(crate) fn row(n: usize, numbers: &mut Numbers) -> Vec<f32> {
        let steep = 0.3 + numbers.next();
        let mut value = -0.5 - 2.0 * numbers.next();
        let mut next = |t: usize| {
            value -= steep * numbers.next() / (1.0 + 0.3 * t as f64);
            value as f32
        };
        (0..n).map(&mut next).collect()
    }

    fn values(c: &[f64], columns: &[Vec<f64>]) -> Vec<f64> {
        (0..columns[0].len()).map(|t| c.iter().zip(columns).map(|(c, column)| c * column[t]).sum()).collect()
    }

    fn weighted_fit(columns: &[Vec<f64>], w: &[f64], y: &[f64]) -> Vec<f64> {
        let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).zip(w).map(|((a, b), w)| a * b * w).sum::<f64>();
        let gram = columns.iter().map(|a| columns.iter().map(|b| sum(a, b)).collect()).collect();
        solved(gram, columns.iter().map(|a| sum(a, y)).collect()).expect("independent columns")
    }

    /// What Newton's method minimises: Σ (e^F − p·F), and the ridge.
    fn objective(f: &[f64], y: &[f64]) -> f64 {
        let ridge = f64::from(RIDGE) * y[0].exp() / 2.0;
        f.iter().zip(y).map(|(f, y)| f.exp() - y.exp() * f + ridge * (f - y).powi(2)).sum()
    }

    /// Its minimum in float64: Newton's method on the raw columns, with steps halved until they help.
    fn minimum(columns: &[Vec<f64>], y: &[f64]) -> f64 {
        let p: Vec<f64> = y.iter().map(|y| y.exp()).collect();
        let mut c = weighted_fit(columns, &p, y);
        let ridge = f64::from(RIDGE) * p[0];
        for _ in 0..50 {
            let f = values(&c, columns);
            let w: Vec<f64> = f.iter().map(|f| f.exp() + ridge).collect();
            // A step of weighted least squares towards −gradient / weight.
            let towards: Vec<f64> = (0..f.len()).map(|t| (p[t] - f[t].exp() + ridge * (y[t] - f[t])) / w[t]).collect();
            let step = weighted_fit(columns, &w, &towards);
            let moved = |length: f64| c.iter().zip(&step).map(|(c, s)| c + length * s).collect::<Vec<f64>>();
            let lengths = (0..40).map(|i| 0.5f64.powi(i));
            let best = lengths.map(moved).find(|moved| objective(&values(moved, columns), y) <= objective(&f, y));
            let Some(best) = best else { break };
            c = best;
        }
        objective(&values(&c, columns), y)
    }

    #[test]
    fn reaches_the_minimum_and_knows_the_unweighted_fit() {
        let (n, mut numbers) = (49, Numbers(1));
        let columns = columns(n);
        let fit = Fit::new(columns.clone(), FloatType::Float64, 0, 0);
        let rows: Vec<Vec<f32>> = (0..LANES).map(|_| row(n, &mut numbers)).collect();
        let given: Vec<FitRow> = rows.iter().map(|y| FitRow { y, base: 0.0, moved: 0.0, ceiling: Ceiling::default() }).collect();
        let limits = Limits { likely: -100.0, error: 0.0, margin: 0.0 };
        let (mut scratch, mut fitted) = (FitScratch::default(), Vec::new());
        fitted.resize_with(LANES, Fitted::default);
        fit.solve(Portable, &given, limits, &mut scratch, &mut fitted);
        for (y, fitted) in rows.iter().zip(&fitted) {
            let y: Vec<f64> = y.iter().map(|&y| f64::from(y)).collect();
            let found = objective(&values(&fitted.c, &fit.basis().q), &y);
            let least = minimum(&columns, &y);
            assert!(found - least < 1e-5 && found - least > -1e-6, "{found} {least}");
            let plain = values(&weighted_fit(&columns, &vec![1.0; n], &y), &columns);
            let error = plain.iter().zip(&y).fold(0.0, |a: f64, (f, y)| a.max((f - y).abs()));
            assert!((f64::from(fitted.plain_error) - error).abs() < 1e-4, "{} {error}", fitted.plain_error);
        }
    }

    #[test]
    fn products_are_combinations_of_few_sums() {
        let (n, mut numbers) = (49, Numbers(2));
        let basis = Basis::new(&columns(n).iter().map(Vec::as_slice).collect::<Vec<_>>());
        let products = Products::new(&basis.q, n);
        assert_eq!(products.rank, 5);
        let w: Vec<Lanes> = (0..n).map(|_| Lanes(std::array::from_fn(|_| numbers.next() as f32))).collect();
        let (mut of_basis, mut gram, mut sums) = (vec![Lanes::ZERO; padded(5)], vec![Lanes::ZERO; 6], vec![Lanes::ZERO; 3]);
        products.sums(&w, &mut of_basis, &mut gram, &mut sums);
        for lane in 0..LANES {
            let sum = |column: &dyn Fn(usize) -> f64| (0..n).map(|t| f64::from(w[t].0[lane]) * column(t)).sum::<f64>();
            for ((i, j), found) in lower(3).zip(&gram) {
                assert!((f64::from(found.0[lane]) - sum(&|t| basis.q[i][t] * basis.q[j][t])).abs() < 1e-6);
            }
            for (q, found) in basis.q.iter().zip(&sums) {
                assert!((f64::from(found.0[lane]) - sum(&|t| q[t])).abs() < 3e-6);
            }
        }
    }
}
