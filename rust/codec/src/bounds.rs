//! Bounds on a fitted row: values that do not increase, and errors that are not worse than the unweighted fit's.
//!
//! Near its minimum the KL divergence is the parabola ½ (c − c*)ᵀ H (c − c*) in the coefficients c, and every bound is linear in them:
//!
//! ```text
//! F(t+1) − F(t) ≤ −margin     F(first) ≤ the value before it     |F(t) − y(t)| ≤ E for the likely ranks
//! ```
//!
//! With H = L·Lᵀ and z = Lᵀ(c − c*) this is the point nearest to the origin under linear inequalities, solved by the dual active-set
//! method (Goldfarb and Idnani 1983): start at the origin, take up the bound that is violated most, move towards it along the bounds taken
//! up so far, let go of one whose multiplier would become negative on the way, and repeat until nothing is violated. One or two bounds do for most
//! rows; doing it again with the parabola of the new point changes the mean KL by less than 0.2%.

use crate::fit::{Basis, Ceiling, Fit, FitRow, FitScratch, Fitted, Limits, cholesky, solve_lower, solve_upper};
use crate::lanes::{LANES, Lanes, larger, one_step};

/// Bounds taken up before giving up: several times what real rows need.
const MOST_ROUNDS: usize = 24;
/// Violations below this part of the margin, and below this many nats, are float32's rounding.
const TOLERANCE: f32 = 0.5;
const LEAST_TOLERANCE: f32 = 1e-5;
/// A normal whose square is orthogonal to the others in no larger part than this depends on them.
const LEAST_PROGRESS: f64 = 1e-10;

/// What a row is held to; all values as the fit sees them (without what the decoder adds).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds<'a> {
    /// First rank that must not exceed the one before it.
    pub(crate) from: usize,
    /// What the value at rank `from` must not exceed.
    pub(crate) ceiling: f64,
    /// By how much each value must be below the one before it.
    pub(crate) margin: f64,
    /// Log-probabilities of the likely ranks, which come first, and the value to subtract from them.
    pub(crate) likely: &'a [f32],
    pub(crate) base: f64,
    /// Largest error of those ranks.
    pub(crate) error: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
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

/// The bounds taken up, and the point z that is the nearest to the origin on them: −Σ multiplier·normal.
#[derive(Debug, Default)]
struct ActiveSet {
    bounds: Vec<Bound>,
    /// L⁻¹ a of each bound a·c ≤ b; r numbers.
    normals: Vec<f64>,
    /// None is negative.
    multipliers: Vec<f64>,
    point: Vec<f64>,
    /// Of the bound that is being taken up: its normal, the part of that along which the point moves, and the others' share of the rest.
    normal: Vec<f64>,
    direction: Vec<f64>,
    shares: Vec<f64>,
    system: Vec<f64>,
}

impl<'a> Bounds<'a> {
    /// The limits of a row of a group.
    #[inline(always)]
    fn of(row: &FitRow<'a>, from: usize, limits: Limits, fitted: &Fitted) -> Self {
        let error = f64::from(fitted.plain_error.max(limits.error));
        let (margin, base) = (f64::from(limits.margin), f64::from(row.base));
        Self { from, ceiling: row.ceiling.last, margin, likely: likely(row.y, limits.likely), base, error }
    }

    /// The bound that [`Fit::most_exceeded`] means by a number.
    #[inline(always)]
    fn decode(&self, which: usize, n: usize, q: &[Vec<f64>], c: &[f64]) -> Bound {
        if which <= n {
            return if which == 0 { Bound::Ceiling } else { Bound::Step(which - 1) };
        }
        let t = which - n - 1;
        let mut value = 0.0;
        for (q, c) in q.iter().zip(c) {
            value += q[t] * c;
        }
        if value > f64::from(self.likely[t]) - self.base { Bound::Above(t) } else { Bound::Below(t) }
    }

    /// The bound that the n `values` violate most; `likely` are the values that the likely ranks should have, NaN for the others. After
    /// the values −∞ follows once at least.
    #[inline(always)]
    fn worst(&self, values: &[f32], likely: &[f32], n: usize) -> Option<Bound> {
        let margin = self.margin as f32;
        let (mut most, mut worst) = (tolerance(margin), None);
        if self.from < n {
            let over = values[self.from] - self.ceiling as f32 + margin;
            if over > most {
                (most, worst) = (over, Some(Bound::Ceiling));
            }
            let from = &values[self.from..];
            let (step, at) = largest(&from[1..], from, |next, this| next - this);
            if step + margin > most {
                (most, worst) = (step + margin, at().map(|t| Bound::Step(self.from + t)));
            }
        }
        let (error, at) = largest(values, likely, |value, likely| (value - likely).abs());
        if error - self.error as f32 > most {
            worst = at().map(|t| if values[t] > likely[t] { Bound::Above(t) } else { Bound::Below(t) });
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

/// The first ranks, whose log-probabilities are above `floor`.
#[inline(always)]
pub(crate) fn likely(y: &[f32], floor: f32) -> &[f32] {
    let mut count = 0;
    for value in y {
        count += u32::from(*value > floor);
    }
    &y[..count as usize]
}

/// The largest of `of(a[t], b[t])`, over whole [`LANES`] of the shorter of the two, and what finds the first t where it is. NaN is passed over.
#[inline(always)]
fn largest(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f32) -> (f32, impl FnOnce() -> Option<usize>) {
    let pairs = move || a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0);
    let mut lanes = Lanes::splat(f32::NEG_INFINITY);
    for (a, b) in pairs() {
        one_step();
        for lane in 0..LANES {
            lanes.0[lane] = larger(lanes.0[lane], of(a[lane], b[lane]));
        }
    }
    let most = lanes.largest();
    let find = move || {
        let here = |a: &[f32; LANES], b: &[f32; LANES]| a.iter().zip(b).fold(false, |here, (&a, &b)| here | (of(a, b) == most));
        let block = pairs().position(|(a, b)| here(a, b))? * LANES;
        (block..block + LANES).find(|&t| of(a[t], b[t]) == most)
    };
    (most, find)
}

/// Moves the rows of a group that are outside their limits to the least KL within them, and marks those that are inside.
#[inline(always)]
pub(crate) fn enforce_group(
    fit: &Fit,
    rows: &[FitRow],
    limits: Limits,
    fit_scratch: &FitScratch,
    fitted: &mut [Fitted],
    scratch: &mut BoundsScratch,
) {
    let (most, which) = fit.most_exceeded(limits, fit_scratch);
    for (lane, (row, given)) in fitted.iter_mut().zip(rows).enumerate() {
        row.inside = most.0[lane] <= tolerance(limits.margin);
        if !row.inside && fit.covered() == 0 {
            fit.take_factor(fit_scratch, lane, row);
            let bounds = Bounds::of(given, fit.covered(), limits, row);
            let first = bounds.decode(which.0[lane] as usize, given.y.len(), &fit.basis().q, &row.c);
            row.inside = enforce(&bounds, fit, row, Some(first), scratch);
            try_raising(bounds, given.ceiling, fit, row, scratch);
        }
    }
}

/// Where the ceiling holds a row back that was just moved within its bounds: tries what raising it is worth.
#[inline(always)]
fn try_raising(mut bounds: Bounds, ceiling: Ceiling, fit: &Fit, fitted: &mut Fitted, scratch: &mut BoundsScratch) {
    if ceiling.raised <= ceiling.last || (fitted.inside && !scratch.active.bounds.contains(&Bound::Ceiling)) {
        return;
    }
    let cost = if fitted.inside { scratch.active.cost() } else { f64::INFINITY };
    scratch.kept.clone_from(&fitted.c);
    bounds.ceiling = ceiling.raised;
    if enforce(&bounds, fit, fitted, None, scratch) && scratch.active.cost() + ceiling.price < cost {
        (fitted.inside, fitted.raises) = (true, true);
    } else {
        // A row that fits below neither will have other bounds relaxed below the higher one.
        fitted.raises = !fitted.inside;
        fitted.c.clone_from(&scratch.kept);
    }
}

/// Moves the coefficients of one row to the least KL within the bounds, of which it violates `first`, if that is known. False, and nothing
/// is moved, when that was not found.
#[inline(always)]
pub(crate) fn enforce(bounds: &Bounds, fit: &Fit, fitted: &mut Fitted, mut first: Option<Bound>, scratch: &mut BoundsScratch) -> bool {
    let BoundsScratch { values, likely, active, .. } = scratch;
    active.clear(fit.basis().q.len());
    // NaN is no limit.
    likely.clear();
    likely.resize(fit.ranks().div_ceil(LANES), [f32::NAN; LANES]);
    for (likely, value) in likely.as_flattened_mut().iter_mut().zip(bounds.likely).skip(bounds.from) {
        *likely = value - bounds.base as f32;
    }
    fitted.c.clone_from(&fitted.free);
    for _ in 0..MOST_ROUNDS {
        let bound = if let Some(bound) = first.take() {
            bound
        } else {
            fit.combine(&fitted.c, values);
            values.push([f32::NEG_INFINITY; LANES]);
            let values = values.as_flattened_mut();
            values[fit.ranks()..].fill(f32::NEG_INFINITY);
            let Some(bound) = bounds.worst(values, likely.as_flattened(), fit.ranks()) else { return true };
            bound
        };
        if !take_up(bound, bounds, fit.basis(), fitted, active) {
            break;
        }
    }
    fitted.c.clone_from(&fitted.free);
    false
}

/// Takes up one more bound and moves the row to the least KL on those taken up; false where no point is within them.
#[inline(always)]
fn take_up(bound: Bound, bounds: &Bounds, basis: &Basis, fitted: &mut Fitted, active: &mut ActiveSet) -> bool {
    let r = basis.q.len();
    if active.bounds.contains(&bound) {
        // The point is on it, but for rounding.
        return false;
    }
    active.normal.clear();
    let limit = bounds.row(bound, &basis.q, &mut active.normal);
    let excess = product(&active.normal, &fitted.c) - limit;
    solve_lower(&fitted.factor, &mut active.normal, r);
    if !active.move_to(bound, excess, r) {
        return false;
    }
    fitted.c.clone_from(&active.point);
    solve_upper(&fitted.factor, &mut fitted.c, r);
    for (c, free) in fitted.c.iter_mut().zip(&fitted.free) {
        *c += free;
    }
    true
}

/// Σ a·b of a few numbers.
#[inline(always)]
fn product(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (a, b) in a.iter().zip(b) {
        sum += a * b;
    }
    sum
}

impl ActiveSet {
    /// Twice the KL that the bounds taken up cost, in units of the first fitted probability.
    #[inline(always)]
    fn cost(&self) -> f64 {
        product(&self.point, &self.point)
    }

    fn clear(&mut self, r: usize) {
        self.bounds.clear();
        self.normals.clear();
        self.multipliers.clear();
        self.point.clear();
        self.point.resize(r, 0.0);
    }

    /// Moves the point by `excess` against `self.normal`, along the bounds taken up; of those, the ones that would hold it back are let go
    /// of on the way. False where the bounds exclude each other.
    #[inline(always)]
    fn move_to(&mut self, bound: Bound, mut excess: f64, r: usize) -> bool {
        let square = product(&self.normal, &self.normal);
        let mut multiplier = 0.0;
        // Each turn but the last lets go of one.
        for _ in 0..=self.bounds.len() {
            if !self.find_direction(r) {
                return false;
            }
            let progress = product(&self.direction, &self.normal);
            let whole = if progress > square * LEAST_PROGRESS { excess / progress } else { f64::INFINITY };
            let (mut step, mut blocking) = (whole, None);
            for (i, (multiplier, share)) in self.multipliers.iter().zip(&self.shares).enumerate() {
                if *share > 0.0 && multiplier / share < step {
                    (step, blocking) = (multiplier / share, Some(i));
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

    /// Splits `self.normal` into a combination of the normals taken up (`shares`) and what is orthogonal to them (`direction`).
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
                system[i * s + j] = product(a, b);
            }
            shares.push(product(a, normal));
        }
        if !cholesky(system, s) {
            return false;
        }
        solve_lower(system, shares, s);
        solve_upper(system, shares, s);
        for (share, taken) in shares.iter().zip(normals.chunks_exact(r)) {
            for (d, a) in direction.iter_mut().zip(taken) {
                *d -= share * a;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::tests::{Numbers, columns, row, solved};
    use crate::float::FloatType;

    /// Every bound as a·c ≤ b, without margins' tolerance.
    fn inequalities(bounds: &Bounds, q: &[Vec<f64>], n: usize) -> Vec<(Vec<f64>, f64)> {
        let steps = (0..n - 1).map(Bound::Step);
        let errors = (0..bounds.likely.len()).flat_map(|t| [Bound::Above(t), Bound::Below(t)]);
        let row = |bound| {
            let mut normal = Vec::new();
            let limit = bounds.row(bound, q, &mut normal);
            (normal, limit)
        };
        std::iter::once(Bound::Ceiling).chain(steps).chain(errors).map(row).collect()
    }

    /// Minimiser of ½ (c − free)ᵀ H (c − free) on a·c = b for the given bounds, from the equations of Lagrange.
    fn on(active: &[&(Vec<f64>, f64)], h: &[Vec<f64>], free: &[f64]) -> Option<Vec<f64>> {
        let (r, s) = (free.len(), active.len());
        let mut a = vec![vec![0.0; r + s]; r + s];
        let mut b = vec![0.0; r + s];
        for i in 0..r {
            a[i][..r].copy_from_slice(&h[i]);
            b[i] = (0..r).map(|j| h[i][j] * free[j]).sum();
            for (l, (normal, _)) in active.iter().enumerate() {
                (a[i][r + l], a[r + l][i]) = (normal[i], normal[i]);
            }
        }
        active.iter().enumerate().for_each(|(l, (_, limit))| b[r + l] = *limit);
        solved(a, b).map(|x| x[..r].to_vec())
    }

    /// The least value within the inequalities, by trying every set of up to three bounds that may hold with equality.
    fn least(all: &[(Vec<f64>, f64)], h: &[Vec<f64>], free: &[f64], value: &dyn Fn(&[f64]) -> f64) -> Option<f64> {
        let inside = |c: &Vec<f64>| all.iter().all(|(a, b)| a.iter().zip(c).map(|(a, c)| a * c).sum::<f64>() <= b + 1e-9);
        let mut best: Option<f64> = None;
        let mut consider = |active: &[&(Vec<f64>, f64)]| {
            if let Some(c) = on(active, h, free).filter(inside) {
                best = Some(best.map_or(value(&c), |best: f64| best.min(value(&c))));
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

    #[test]
    fn least_within_bounds() {
        let (n, mut numbers) = (8, Numbers(3));
        let fit = Fit::new(columns(n), FloatType::Float64, 0, 0);
        let q = &fit.basis().q;
        let (mut scratch, mut possible, mut found) = (BoundsScratch::default(), 0, 0);
        for _ in 0..200 {
            let y = row(n, &mut numbers);
            let w: Vec<f64> = (0..n).map(|_| 0.01 + numbers.next()).collect();
            let h: Vec<Vec<f64>> =
                q.iter().map(|a| q.iter().map(|b| a.iter().zip(b).zip(&w).map(|((a, b), w)| a * b * w).sum()).collect()).collect();
            let mut factor: Vec<f64> = h.iter().flatten().copied().collect();
            assert!(cholesky(&mut factor, q.len()));
            // A start that is more or less outside.
            let free: Vec<f64> =
                q.iter().map(|q| q.iter().zip(&y).map(|(q, &y)| q * f64::from(y)).sum::<f64>() + 2.0 * numbers.next() - 1.0).collect();
            let (ceiling, error) = (f64::from(y[0]) + 0.2, 0.15 + 0.3 * numbers.next());
            let bounds = Bounds { from: 0, ceiling, margin: 1e-4, likely: &y[..5], base: 0.0, error };
            let value = |c: &[f64]| {
                let d: Vec<f64> = c.iter().zip(&free).map(|(c, free)| c - free).collect();
                h.iter().zip(&d).map(|(row, x)| x * row.iter().zip(&d).map(|(h, y)| h * y).sum::<f64>()).sum::<f64>() / 2.0
            };
            let all = inequalities(&bounds, q, n);
            let least = least(&all, &h, &free, &value);
            let mut fitted = Fitted { c: free.clone(), free: free.clone(), factor, ..Fitted::default() };
            let ok = enforce(&bounds, &fit, &mut fitted, None, &mut scratch);
            possible += u32::from(least.is_some());
            found += u32::from(ok);
            if ok {
                let over = |(a, b): &(Vec<f64>, f64)| a.iter().zip(&fitted.c).map(|(a, c)| a * c).sum::<f64>() - b;
                assert!(all.iter().map(over).fold(0.0, f64::max) < 1e-4);
                // Bounds that are violated within the tolerance make it a little less.
                let least = least.expect("something within the bounds was found");
                assert!((value(&fitted.c) - least).abs() < 1e-3 * (0.1 + least), "{} {least}", value(&fitted.c));
            } else {
                assert_eq!(fitted.c, free);
            }
        }
        assert!(possible > 50 && found >= possible, "{found} of {possible}");
    }
}
