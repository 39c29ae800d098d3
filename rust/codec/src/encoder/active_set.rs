//! Bounds on a fitted row: values that do not increase, and errors that are not worse than the
//! unweighted fit's.
//!
//! Near its minimum the KL divergence is the parabola ½ (c − c*)ᵀ H (c − c*) in the coefficients c,
//! and every bound is linear in them:
//!
//! ```text
//! F(t+1) − F(t) ≤ −margin     F(first) ≤ ceiling     |F(t) − y(t)| ≤ E for the likely ranks
//! ```
//!
//! With H = L·Lᵀ and z = Lᵀ(c − c*) the solution is the point nearest to the origin under linear
//! inequalities. The dual active-set method (Goldfarb and Idnani 1983) finds it: start at the
//! origin, activate the bound that is violated most, move towards it along the active bounds, drop
//! an active bound whose multiplier would become negative on the way, and repeat until nothing is
//! violated. One or two bounds are enough for most rows.
//!
//! The parabola is less true the farther a row is moved. Values that come out with too much
//! probability are lowered by the same amount, as R has only so much to give. Where bounds cost
//! more than [`FAR`], all of it is repeated once with the parabola of the new point.

use super::linalg::{Basis, cholesky, dot_short, solve_lower, solve_upper};
use super::row::{Ceiling, RowInput, likely_ranks};
use super::solver::{Fit, FitScratch, Fitted, Limits};
use crate::simd::lanes::{LANES, Lanes, larger, no_unroll};

/// How many bounds are activated before giving up: several times what real rows need.
const MOST_ROUNDS: usize = 24;
/// Violations below this part of the margin, and below this many nats, are float32's rounding.
const TOLERANCE: f32 = 0.5;
const LEAST_TOLERANCE: f32 = 1e-5;
/// Twice the KL in nats that bounds may cost a row before its total probability is looked at.
const NEAR: f64 = 1e-4;
/// Twice the KL in nats that bounds may cost a row before another parabola is drawn.
const FAR: f64 = 6e-3;
/// A normal depends on the active ones if the part of its square that is orthogonal to them is no
/// larger than this.
const LEAST_PROGRESS: f64 = 1e-10;

/// What a row is held to; all values as the fit sees them (without what the decoder adds).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds<'a> {
    /// The first rank that must not exceed the one before it.
    pub(crate) from: usize,
    /// What the value at rank `from` must not exceed.
    pub(crate) ceiling: f64,
    /// By how much each value must be below the one before it.
    pub(crate) margin: f64,
    /// Log-probabilities of the likely ranks, which come first.
    pub(crate) likely: &'a [f32],
    /// What to subtract from them.
    pub(crate) base: f64,
    /// The largest error of those ranks.
    pub(crate) error: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    /// The value at `from` and the ceiling.
    Ceiling,
    /// The value at t + 1 and the one at t.
    Step(usize),
    /// y + error at t.
    Above(usize),
    /// y − error at t.
    Below(usize),
}

/// Buffers, kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct BoundsScratch {
    values: Vec<[f32; LANES]>,
    likely: Vec<[f32; LANES]>,
    active: ActiveSet,
    /// Coefficients to return to.
    kept: Vec<f64>,
}

/// The active bounds, and the point z on them that is the nearest to the origin:
/// −Σ multiplier·normal.
#[derive(Debug, Default)]
struct ActiveSet {
    bounds: Vec<Bound>,
    /// L⁻¹ a of each bound a·c ≤ b; r numbers.
    normals: Vec<f64>,
    /// None of them is negative.
    multipliers: Vec<f64>,
    point: Vec<f64>,
    /// The normal of the bound that is being activated.
    normal: Vec<f64>,
    /// The part of that normal along which the point moves.
    direction: Vec<f64>,
    /// The active bounds' shares of the rest of that normal.
    shares: Vec<f64>,
    system: Vec<f64>,
}

impl<'a> Bounds<'a> {
    /// The limits of a row of a group.
    #[inline(always)]
    fn of(row: &RowInput<'a>, from: usize, limits: Limits, fitted: &Fitted) -> Self {
        Self {
            from,
            ceiling: row.ceiling.last,
            margin: f64::from(limits.margin),
            likely: likely_ranks(row.y, limits.likely),
            base: f64::from(row.base as f32),
            error: f64::from(fitted.unweighted_error.max(limits.error)),
        }
    }

    /// The bound that [`Fit::most_violated`] means by a number.
    #[inline(always)]
    fn numbered(&self, which: usize, n: usize, q: &[Vec<f64>], c: &[f64]) -> Bound {
        if which <= n {
            return if which == 0 { Bound::Ceiling } else { Bound::Step(which - 1) };
        }
        let t = which - n - 1;
        let mut value = 0.0;
        for (q, c) in q.iter().zip(c) {
            value += q[t] * c;
        }
        if value > f64::from(self.likely[t]) - self.base {
            Bound::Above(t)
        } else {
            Bound::Below(t)
        }
    }

    /// The bound that the n `values` violate most. `likely` are the values that the likely ranks
    /// should have, and NaN for the others. After the values, −∞ follows at least once.
    #[inline(always)]
    fn most_violated(&self, values: &[f32], likely: &[f32], n: usize) -> Option<Bound> {
        let margin = self.margin as f32;
        let mut most = tolerance(margin);
        let mut worst = None;
        if self.from < n {
            let over = values[self.from] - self.ceiling as f32 + margin;
            if over > most {
                most = over;
                worst = Some(Bound::Ceiling);
            }
            let from = &values[self.from..];
            let (step, at) = largest(&from[1..], from, |next, this| next - this);
            if step + margin > most {
                most = step + margin;
                worst = at().map(|t| Bound::Step(self.from + t));
            }
        }
        let (error, at) = largest(values, likely, |value, likely| (value - likely).abs());
        if error - self.error as f32 > most {
            let bound = |t| if values[t] > likely[t] { Bound::Above(t) } else { Bound::Below(t) };
            worst = at().map(bound);
        }
        worst
    }

    /// Appends the bound's normal a to `normals` and returns its limit b: a·c ≤ b.
    #[inline(always)]
    fn row(&self, bound: Bound, q: &[Vec<f64>], normals: &mut Vec<f64>) -> f64 {
        for q in q {
            normals.push(match bound {
                Bound::Ceiling => q[self.from],
                Bound::Step(t) => q[t + 1] - q[t],
                Bound::Above(t) => q[t],
                Bound::Below(t) => -q[t],
            });
        }
        match bound {
            Bound::Ceiling => self.ceiling - self.margin,
            Bound::Step(_) => -self.margin,
            Bound::Above(t) => f64::from(self.likely[t]) - self.base + self.error,
            Bound::Below(t) => self.base + self.error - f64::from(self.likely[t]),
        }
    }
}

#[inline(always)]
fn tolerance(margin: f32) -> f32 {
    larger(TOLERANCE * margin, LEAST_TOLERANCE)
}

/// The largest of `of(a[t], b[t])` over whole [`LANES`] of the shorter of the two, and a function
/// that finds the first such t. NaN is passed over.
#[inline(always)]
fn largest(
    a: &[f32],
    b: &[f32],
    of: impl Fn(f32, f32) -> f32,
) -> (f32, impl FnOnce() -> Option<usize>) {
    let pairs = move || a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0);
    let mut lanes = Lanes::splat(f32::NEG_INFINITY);
    for (a, b) in pairs() {
        no_unroll();
        for lane in 0..LANES {
            lanes.0[lane] = larger(lanes.0[lane], of(a[lane], b[lane]));
        }
    }
    let most = lanes.largest();
    let find = move || {
        let here = |a: &[f32; LANES], b: &[f32; LANES]| {
            a.iter().zip(b).fold(false, |here, (&a, &b)| here | (of(a, b) == most))
        };
        let block = pairs().position(|(a, b)| here(a, b))? * LANES;
        (block..block + LANES).find(|&t| of(a[t], b[t]) == most)
    };
    (most, find)
}

/// Moves the rows of a group that are outside their limits to the least KL within them, and marks
/// those that are inside.
#[inline(always)]
pub(crate) fn satisfy_group_bounds(
    fit: &Fit,
    rows: &[RowInput],
    limits: Limits,
    fit_scratch: &FitScratch,
    fitted: &mut [Fitted],
    scratch: &mut BoundsScratch,
) {
    let (most, which) = fit.most_violated(limits, fit_scratch);
    for (lane, (fitted, row)) in fitted.iter_mut().zip(rows).enumerate() {
        fitted.inside = most.0[lane] <= tolerance(limits.margin);
        if !fitted.inside && fit.residual_count() == 0 {
            fit.take_factor(fit_scratch, lane, row, fitted);
            let mut bounds = Bounds::of(row, fit.residual_count(), limits, fitted);
            let which = which.0[lane] as usize;
            let first = bounds.numbered(which, row.y.len(), &fit.basis().q, &fitted.c);
            fitted.inside = satisfy_from(Some(first), &bounds, fit, fitted, scratch);
            try_raising(&mut bounds, row.ceiling, fit, fitted, scratch);
            if fitted.inside {
                draw_again(&bounds, fit, fitted, scratch);
            }
        }
    }
}

/// Where the ceiling holds a row back that was just moved within its bounds, tries what raising the
/// ceiling is worth.
#[inline(always)]
fn try_raising(
    bounds: &mut Bounds,
    ceiling: Ceiling,
    fit: &Fit,
    fitted: &mut Fitted,
    scratch: &mut BoundsScratch,
) {
    let held_back = !fitted.inside || scratch.active.bounds.contains(&Bound::Ceiling);
    if ceiling.raised <= ceiling.last || !held_back {
        return;
    }
    let inside = fitted.inside;
    let cost = if inside { scratch.active.cost() } else { f64::INFINITY };
    scratch.kept.clone_from(&fitted.c);
    bounds.ceiling = ceiling.raised;
    if satisfy_bounds(bounds, fit, fitted, scratch) && scratch.active.cost() + ceiling.price < cost
    {
        fitted.inside = true;
        fitted.raises = true;
    } else {
        // A row that fits below neither ceiling will have other bounds relaxed below the higher.
        fitted.raises = !fitted.inside;
        fitted.c.clone_from(&scratch.kept);
        bounds.ceiling = ceiling.last;
    }
}

/// Where bounds moved a row far, draws another parabola where it is now, and moves it to the least
/// KL on that one.
#[inline(always)]
fn draw_again(bounds: &Bounds, fit: &Fit, fitted: &mut Fitted, scratch: &mut BoundsScratch) {
    if scratch.active.cost() * fitted.first < FAR {
        return;
    }
    scratch.kept.clone_from(&fitted.c);
    let before = fit.take_parabola(fitted, &mut scratch.values);
    if !satisfy_bounds(bounds, fit, fitted, scratch)
        || fit.objective(fitted, &mut scratch.values) >= before
    {
        fitted.c.clone_from(&scratch.kept);
    }
}

/// Moves the coefficients of one row to the least KL within the bounds. Returns false, and moves
/// nothing, when that was not found.
#[inline(always)]
pub(crate) fn satisfy_bounds(
    bounds: &Bounds,
    fit: &Fit,
    fitted: &mut Fitted,
    scratch: &mut BoundsScratch,
) -> bool {
    satisfy_from(None, bounds, fit, fitted, scratch)
}

/// The same, where the bound is known that the row violates first.
#[inline(always)]
fn satisfy_from(
    mut first: Option<Bound>,
    bounds: &Bounds,
    fit: &Fit,
    fitted: &mut Fitted,
    scratch: &mut BoundsScratch,
) -> bool {
    let BoundsScratch { values, likely, active, .. } = scratch;
    active.clear(fit.basis().rank());
    // NaN is no limit.
    likely.clear();
    likely.resize(fit.ranks().div_ceil(LANES), [f32::NAN; LANES]);
    let targets = likely.as_flattened_mut().iter_mut().zip(bounds.likely);
    for (likely, value) in targets.skip(bounds.from) {
        *likely = value - bounds.base as f32;
    }
    fitted.c.clone_from(&fitted.unconstrained);
    for _ in 0..MOST_ROUNDS {
        let bound = if let Some(bound) = first.take() {
            bound
        } else {
            fit.combine(&fitted.c, values);
            values.push([f32::NEG_INFINITY; LANES]);
            let values = values.as_flattened_mut();
            values[fit.ranks()..].fill(f32::NEG_INFINITY);
            let worst = bounds.most_violated(values, likely.as_flattened(), fit.ranks());
            let Some(bound) = worst else {
                if active.cost() * fitted.first > NEAR {
                    fit.lower_mass(fitted, values);
                }
                return true;
            };
            bound
        };
        if !activate(bound, bounds, fit.basis(), fitted, active) {
            break;
        }
    }
    fitted.c.clone_from(&fitted.unconstrained);
    false
}

/// Activates one more bound and moves the row to the least KL on the active ones. Returns false
/// where no point is within them.
#[inline(always)]
fn activate(
    bound: Bound,
    bounds: &Bounds,
    basis: &Basis,
    fitted: &mut Fitted,
    active: &mut ActiveSet,
) -> bool {
    let r = basis.rank();
    if active.bounds.contains(&bound) {
        // The point is on it, except for rounding.
        return false;
    }
    active.normal.clear();
    let limit = bounds.row(bound, &basis.q, &mut active.normal);
    let excess = dot_short(&active.normal, &fitted.c) - limit;
    solve_lower(&fitted.factor, &mut active.normal, r);
    if !active.move_to(bound, excess, r) {
        return false;
    }
    fitted.c.clone_from(&active.point);
    solve_upper(&fitted.factor, &mut fitted.c, r);
    for (c, unconstrained) in fitted.c.iter_mut().zip(&fitted.unconstrained) {
        *c += unconstrained;
    }
    true
}

impl ActiveSet {
    /// Twice the KL that the active bounds cost, in units of the first fitted probability.
    #[inline(always)]
    fn cost(&self) -> f64 {
        dot_short(&self.point, &self.point)
    }

    fn clear(&mut self, r: usize) {
        self.bounds.clear();
        self.normals.clear();
        self.multipliers.clear();
        self.point.clear();
        self.point.resize(r, 0.0);
    }

    /// Moves the point by `excess` against `self.normal`, along the active bounds. Those that would
    /// hold it back are dropped on the way. Returns false where the bounds exclude each other.
    #[inline(always)]
    fn move_to(&mut self, bound: Bound, mut excess: f64, r: usize) -> bool {
        let square = dot_short(&self.normal, &self.normal);
        let mut multiplier = 0.0;
        // Each turn but the last drops one.
        for _ in 0..=self.bounds.len() {
            if !self.find_direction(r) {
                return false;
            }
            let progress = dot_short(&self.direction, &self.normal);
            let moves = progress > square * LEAST_PROGRESS;
            let whole = if moves { excess / progress } else { f64::INFINITY };
            let mut step = whole;
            let mut blocking = None;
            let active = self.multipliers.iter().zip(&self.shares);
            for (i, (multiplier, share)) in active.enumerate() {
                if *share > 0.0 && multiplier / share < step {
                    step = multiplier / share;
                    blocking = Some(i);
                }
            }
            if !step.is_finite() {
                return false;
            }
            multiplier += step;
            for (multiplier, share) in self.multipliers.iter_mut().zip(&self.shares) {
                *multiplier -= step * share;
            }
            if whole.is_finite() {
                excess -= step * progress;
                for (z, d) in self.point.iter_mut().zip(&self.direction) {
                    *z -= step * d;
                }
            }
            let Some(blocking) = blocking else {
                self.bounds.push(bound);
                self.normals.extend_from_slice(&self.normal);
                self.multipliers.push(multiplier);
                return true;
            };
            self.bounds.remove(blocking);
            self.multipliers.remove(blocking);
            self.normals.drain(blocking * r..(blocking + 1) * r);
        }
        false
    }

    /// Splits `self.normal` into a combination of the active normals (`shares`) and what is
    /// orthogonal to them (`direction`).
    #[inline(always)]
    fn find_direction(&mut self, r: usize) -> bool {
        let Self { bounds, normals, normal, direction, shares, system, .. } = self;
        let s = bounds.len();
        direction.clone_from(normal);
        shares.clear();
        if s == 0 {
            return true;
        }
        system.clear();
        system.resize(s * s, 0.0);
        for (i, a) in normals.chunks_exact(r).enumerate() {
            for (j, b) in normals.chunks_exact(r).take(i + 1).enumerate() {
                system[i * s + j] = dot_short(a, b);
            }
            shares.push(dot_short(a, normal));
        }
        if !cholesky(system, s) {
            return false;
        }
        solve_lower(system, shares, s);
        solve_upper(system, shares, s);
        for (share, active) in shares.iter().zip(normals.chunks_exact(r)) {
            for (d, a) in direction.iter_mut().zip(active) {
                *d -= share * a;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::testing::{Numbers, columns, row, solved};
    use crate::float::FloatType;

    /// A bound as a·c ≤ b.
    type Inequality = (Vec<f64>, f64);

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Every bound, without the margins' tolerance.
    fn inequalities(bounds: &Bounds, q: &[Vec<f64>], n: usize) -> Vec<Inequality> {
        let steps = (0..n - 1).map(Bound::Step);
        let errors = (0..bounds.likely.len()).flat_map(|t| [Bound::Above(t), Bound::Below(t)]);
        let row = |bound| {
            let mut normal = Vec::new();
            let limit = bounds.row(bound, q, &mut normal);
            (normal, limit)
        };
        std::iter::once(Bound::Ceiling).chain(steps).chain(errors).map(row).collect()
    }

    /// ½ (c − free)ᵀ H (c − free).
    struct Parabola {
        h: Vec<Vec<f64>>,
        free: Vec<f64>,
    }

    impl Parabola {
        fn value(&self, c: &[f64]) -> f64 {
            let d: Vec<f64> = c.iter().zip(&self.free).map(|(c, free)| c - free).collect();
            self.h.iter().zip(&d).map(|(row, x)| x * dot(row, &d)).sum::<f64>() / 2.0
        }

        /// The minimiser on a·c = b for the given bounds, from the equations of Lagrange.
        fn minimum_on(&self, active: &[&Inequality]) -> Option<Vec<f64>> {
            let r = self.free.len();
            let size = r + active.len();
            let mut a = vec![vec![0.0; size]; size];
            let mut b = vec![0.0; size];
            for i in 0..r {
                a[i][..r].copy_from_slice(&self.h[i]);
                b[i] = dot(&self.h[i], &self.free);
                for (l, (normal, _)) in active.iter().enumerate() {
                    a[i][r + l] = normal[i];
                    a[r + l][i] = normal[i];
                }
            }
            active.iter().enumerate().for_each(|(l, (_, limit))| b[r + l] = *limit);
            solved(a, b).map(|x| x[..r].to_vec())
        }

        /// The least value within the inequalities, by trying every set of up to three bounds that
        /// may hold with equality.
        fn least_within(&self, all: &[Inequality]) -> Option<f64> {
            let inside = |c: &Vec<f64>| all.iter().all(|(a, b)| dot(a, c) <= b + 1e-9);
            let mut best: Option<f64> = None;
            let mut consider = |active: &[&Inequality]| {
                if let Some(c) = self.minimum_on(active).filter(inside) {
                    let value = self.value(&c);
                    best = Some(best.map_or(value, |best: f64| best.min(value)));
                }
            };
            consider(&[]);
            for i in 0..all.len() {
                consider(&[&all[i]]);
                for j in 0..i {
                    consider(&[&all[i], &all[j]]);
                    (0..j).for_each(|l| consider(&[&all[i], &all[j], &all[l]]));
                }
            }
            best
        }
    }

    #[test]
    fn least_within_bounds() {
        let n = 8;
        let mut numbers = Numbers(3);
        let fit = Fit::new(columns(n), FloatType::Float64, 0, 0);
        let q = &fit.basis().q;
        let mut scratch = BoundsScratch::default();
        let mut possible = 0;
        let mut found = 0;
        for _ in 0..200 {
            let y = row(n, &mut numbers);
            let w: Vec<f64> = (0..n).map(|_| 0.01 + numbers.next()).collect();
            let weighted = |a: &[f64], b: &[f64]| {
                a.iter().zip(b).zip(&w).map(|((a, b), w)| a * b * w).sum::<f64>()
            };
            let h: Vec<Vec<f64>> =
                q.iter().map(|a| q.iter().map(|b| weighted(a, b)).collect()).collect();
            let mut factor: Vec<f64> = h.iter().flatten().copied().collect();
            assert!(cholesky(&mut factor, q.len()));
            // A start that is more or less outside.
            let wide: Vec<f64> = y.iter().map(|&y| f64::from(y)).collect();
            let mut start = |q: &Vec<f64>| dot(q, &wide) + 2.0 * numbers.next() - 1.0;
            let free: Vec<f64> = q.iter().map(&mut start).collect();
            let bounds = Bounds {
                from: 0,
                ceiling: f64::from(y[0]) + 0.2,
                margin: 1e-4,
                likely: &y[..5],
                base: 0.0,
                error: 0.15 + 0.3 * numbers.next(),
            };
            let parabola = Parabola { h, free: free.clone() };
            let all = inequalities(&bounds, q, n);
            let least = parabola.least_within(&all);
            let mut fitted = Fitted {
                c: free.clone(),
                unconstrained: free.clone(),
                factor,
                ..Fitted::default()
            };
            let ok = satisfy_bounds(&bounds, &fit, &mut fitted, &mut scratch);
            possible += u32::from(least.is_some());
            found += u32::from(ok);
            if ok {
                let over = |(a, b): &Inequality| dot(a, &fitted.c) - b;
                assert!(all.iter().map(over).fold(0.0, f64::max) < 1e-4);
                // Bounds that are violated within the tolerance make it a little less.
                let least = least.expect("something within the bounds was found");
                let value = parabola.value(&fitted.c);
                assert!((value - least).abs() < 1e-3 * (0.1 + least), "{value} {least}");
            } else {
                assert_eq!(fitted.c, free);
            }
        }
        assert!(possible > 50 && found >= possible, "{found} of {possible}");
    }
}
