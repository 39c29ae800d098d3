//! Bounds on a fitted row: values that do not increase, and errors that are not worse than the unweighted fit's.
//!
//! Near its minimum the KL divergence is the parabola ½ (c − c*)ᵀ H (c − c*) in the coefficients c, and every bound is linear in them:
//!
//! ```text
//! F(t+1) − F(t) ≤ −margin     F(first) ≤ the value before it     |F(t) − y(t)| ≤ E for the likely ranks
//! ```
//!
//! With H = L·Lᵀ and z = Lᵀ(c − c*) this is the point nearest to the origin under linear inequalities, solved by the dual active-set
//! method (Goldfarb and Idnani 1983): start at the origin, take up the bound that is violated most, move to the nearest point on the
//! bounds taken up, let go of a bound whose multiplier is negative, and repeat until nothing is violated. One or two bounds do for most
//! rows; doing it again with the parabola of the new point changes the mean KL by less than 0.2%.

use crate::config::MAX_TERMS;
use crate::fit::{Basis, Fit, FitRow, FitScratch, Fitted, Limits, cholesky, solve_lower, solve_upper};
use crate::lanes::{LANES, larger, one_step};

/// Bounds taken up before giving up: several times what real rows need.
const MOST_ROUNDS: usize = 24;
/// Violations below this part of the margin are float32's rounding.
const TOLERANCE: f32 = 0.5;

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
    values: Vec<f32>,
    likely: Vec<f32>,
    active: Vec<Active>,
    system: Vec<f64>,
    multipliers: Vec<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Active {
    bound: Bound,
    /// L⁻¹ a of the bound a·c ≤ b; r numbers.
    normal: [f64; MAX_TERMS],
    /// b − a·c*: how far the start is inside.
    slack: f64,
}

impl<'a> Bounds<'a> {
    /// The limits of a row of a group.
    #[inline(always)]
    fn of(row: &FitRow<'a>, limits: Limits, fitted: &Fitted) -> Self {
        let error = f64::from(fitted.plain_error.max(limits.error));
        let (margin, base) = (f64::from(limits.margin), f64::from(row.base));
        Self { from: 0, ceiling: f64::from(row.ceiling), margin, likely: row.y, base, error }
    }

    /// The bound that [`Fit::most_exceeded`] means by a number.
    #[inline(always)]
    fn decode(&self, which: usize, n: usize, q: &[Vec<f64>], c: &[f64]) -> Bound {
        if which <= n {
            return if which == n { Bound::Ceiling } else { Bound::Step(which) };
        }
        let t = which - n - 1;
        let value: f64 = q.iter().zip(c).map(|(q, c)| q[t] * c).sum();
        if value > f64::from(self.likely[t]) - self.base { Bound::Above(t) } else { Bound::Below(t) }
    }

    /// The bound that `values` violate most; `likely` are the values that the likely ranks should have.
    #[inline(always)]
    fn worst(&self, values: &[f32], likely: &[f32]) -> Option<Bound> {
        let (mut most, mut worst) = (TOLERANCE * self.margin as f32, None);
        if let [first, rest @ ..] = &values[self.from..] {
            let over = first - self.ceiling as f32 + self.margin as f32;
            if over > most {
                (most, worst) = (over, Some(Bound::Ceiling));
            }
            let (step, t) = largest(rest, &values[self.from..], |next, this| next - this);
            if step + self.margin as f32 > most {
                (most, worst) = (step + self.margin as f32, Some(Bound::Step(self.from + t)));
            }
        }
        let (error, t) = largest(values, likely, |value, likely| (value - likely).abs());
        if error - self.error as f32 > most {
            worst = Some(if values[t] > likely[t] { Bound::Above(t) } else { Bound::Below(t) });
        }
        worst
    }

    /// The bound's normal a and its limit b: a·c ≤ b.
    #[inline(always)]
    fn row(&self, bound: Bound, q: &[Vec<f64>]) -> ([f64; MAX_TERMS], f64) {
        let mut normal = [0.0; MAX_TERMS];
        for (a, q) in normal.iter_mut().zip(q) {
            *a = match bound {
                Bound::Ceiling => q[self.from],
                Bound::Step(t) => q[t + 1] - q[t],
                Bound::Above(t) => q[t],
                Bound::Below(t) => -q[t],
            };
        }
        let limit = match bound {
            Bound::Ceiling => self.ceiling - self.margin,
            Bound::Step(_) => -self.margin,
            Bound::Above(t) => f64::from(self.likely[t]) - self.base + self.error,
            Bound::Below(t) => self.base + self.error - f64::from(self.likely[t]),
        };
        (normal, limit)
    }
}

/// The largest of `of(a[t], b[t])`, over the shorter of the two, and the first t where it is; −∞ where there is none.
#[inline(always)]
fn largest(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f32) -> (f32, usize) {
    let count = a.len().min(b.len());
    let (a, b) = (&a[..count], &b[..count]);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_blocks.remainder().iter().zip(b_blocks.remainder()).fold(f32::NEG_INFINITY, |most, (&a, &b)| larger(most, of(a, b)));
    for (a, b) in a_blocks.zip(b_blocks) {
        one_step();
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], of(a[lane], b[lane]));
        }
    }
    let most = lanes.into_iter().fold(rest, larger);
    let here = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(false, |here, (&a, &b)| here | (of(a, b) == most));
    let block = a.chunks(LANES).zip(b.chunks(LANES)).position(|(a, b)| here(a, b)).unwrap_or(0);
    let at = (block * LANES..count).find(|&t| of(a[t], b[t]) == most);
    (most, at.unwrap_or(0))
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
        row.inside = most.0[lane] <= TOLERANCE * limits.margin;
        if !row.inside && fit.covered() == 0 {
            fit.take_factor(fit_scratch, lane, row);
            let bounds = Bounds::of(given, limits, row);
            let first = bounds.decode(which.0[lane] as usize, given.y.len(), &fit.basis().q, &row.c);
            row.inside = enforce(&bounds, fit, row, Some(first), scratch);
        }
    }
}

/// Moves the coefficients of one row to the least KL within the bounds, of which it violates `first`, if that is known. False, and nothing
/// is moved, when that was not found.
#[inline(always)]
pub(crate) fn enforce(bounds: &Bounds, fit: &Fit, fitted: &mut Fitted, mut first: Option<Bound>, scratch: &mut BoundsScratch) -> bool {
    let BoundsScratch { values, likely, active, system, multipliers } = scratch;
    active.clear();
    likely.clear();
    likely.extend(bounds.likely.iter().map(|value| value - bounds.base as f32));
    fitted.c.clone_from(&fitted.free);
    for _ in 0..MOST_ROUNDS {
        let bound = if let Some(bound) = first.take() {
            bound
        } else {
            fit.combine(&fitted.c, values);
            let Some(bound) = bounds.worst(values, likely) else { return true };
            bound
        };
        if !take_up(bound, bounds, fit.basis(), fitted, active, system, multipliers) {
            break;
        }
    }
    fitted.c.clone_from(&fitted.free);
    false
}

/// Takes up one more bound and moves the row to the least KL on those taken up; false where that leads nowhere.
#[inline(always)]
fn take_up(
    bound: Bound,
    bounds: &Bounds,
    basis: &Basis,
    fitted: &mut Fitted,
    active: &mut Vec<Active>,
    system: &mut Vec<f64>,
    multipliers: &mut Vec<f64>,
) -> bool {
    let r = basis.q.len();
    if active.len() > r || active.iter().any(|taken| taken.bound == bound) {
        return false;
    }
    let (mut normal, limit) = bounds.row(bound, &basis.q);
    let slack = limit - normal.iter().zip(&fitted.free).map(|(a, c)| a * c).sum::<f64>();
    solve_lower(&fitted.factor, &mut normal, r);
    active.push(Active { bound, normal, slack });
    if !nearest(active, system, multipliers) {
        return false;
    }
    fitted.c.fill(0.0);
    for (taken, multiplier) in active.iter().zip(multipliers.iter()) {
        fitted.c.iter_mut().zip(&taken.normal).for_each(|(z, a)| *z -= multiplier * a);
    }
    solve_upper(&fitted.factor, &mut fitted.c, r);
    fitted.c.iter_mut().zip(&fitted.free).for_each(|(c, free)| *c += free);
    true
}

/// Multipliers λ ≥ 0 of the point nearest to the origin on the active bounds, −Σ λ·normal; bounds that hold it back are let go of.
#[inline(always)]
fn nearest(active: &mut Vec<Active>, system: &mut Vec<f64>, multipliers: &mut Vec<f64>) -> bool {
    loop {
        let s = active.len();
        system.clear();
        system.resize(s * s, 0.0);
        for i in 0..s {
            for j in 0..=i {
                system[i * s + j] = active[i].normal.iter().zip(&active[j].normal).map(|(a, b)| a * b).sum();
            }
        }
        if !cholesky(system, s) {
            return false;
        }
        multipliers.clear();
        multipliers.extend(active.iter().map(|taken| -taken.slack));
        solve_lower(system, multipliers, s);
        solve_upper(system, multipliers, s);
        let Some((least, multiplier)) = multipliers.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1)) else { return true };
        if multiplier >= 0.0 {
            return true;
        }
        active.swap_remove(least);
    }
}
