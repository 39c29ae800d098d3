//! Rows with something left to do after the group's fit, taken one by one: their coefficients are
//! rounded, decoded and checked; a row that fails is moved into its bounds again with a larger
//! margin, or shifted down.

use super::active_set::{Bounds, BoundsScratch, satisfy_bounds};
use super::coefficients::RoundingScratch;
use super::mass::{MASS_ROUNDING, limit_mass, shift_for_excess};
use super::plan::Plan;
use super::residuals::Residual;
use super::row::{LIKELY_LOGPROB, MIN_LOGPROB, RowInput, StoredRow, likely_ranks};
use super::solver::{Fit, FitScratch, Fitted};
use crate::simd::lanes::{all_finite, exp, order_and_mass, sum_exp};

/// Where order and errors exclude each other, errors may be this many times larger, in turn.
const RELAXED: [f64; 7] = [1.0, 1.25, 1.6, 2.0, 2.5, 3.2, f64::INFINITY];

/// Where float32 does not resolve the terms, coefficients whose rounding makes no value rise by more
/// than this (nats) stay as they are: to be in order they would have to do without most terms.
const ROUNDED_RISE: f64 = 0.5;
/// How often the constant is lowered to meet the ceiling.
const MOST_SHIFTS: usize = 16;
/// A shift that did not suffice is doubled up to this many times its size: the constant's rounding
/// may hide small ones.
const STRONGEST: f64 = 1e6;
/// Less probability than this is not aimed at.
const LEAST_MASS: f64 = 1e-30;

/// One row of a group to write.
#[derive(Clone, Copy)]
pub(crate) struct RowJob<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) input: &'a RowInput<'a>,
    /// Its place in the group.
    pub(crate) lane: usize,
    /// What the first approximated value must not exceed, without what the decoder adds.
    pub(crate) ceiling: f64,
}

/// Buffers, kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct RowScratch {
    pub(crate) stored: StoredRow,
    pub(crate) residuals: Vec<Residual>,
    rounding: RoundingScratch,
    pub(crate) bounds: BoundsScratch,
}

impl RowJob<'_> {
    /// Leaves the row's stored coefficients and what they decode to in `scratch`, and its exact
    /// values such that the row is in order and has a total probability of at most 1, where the
    /// layout allows that.
    #[inline(always)]
    pub(crate) fn choose_coefficients(
        &self,
        exact: &mut [f64],
        fitted: Option<&mut Fitted>,
        fit_scratch: &FitScratch,
        scratch: &mut RowScratch,
    ) {
        let plan = self.plan;
        scratch.stored.coefficients.clear();
        scratch.stored.coefficients.resize(plan.decoder().terms().count(), 0.0);
        let (Some(fit), Some(fitted)) = (plan.fit(), fitted) else {
            self.evaluate(scratch);
            self.limit_mass(exact, sum_exp(&scratch.stored.evaluated.narrow), scratch);
            return;
        };
        for margin in plan.margins() {
            if !fitted.inside {
                fit.take_factor(fit_scratch, self.lane, self.input, fitted);
                self.keep_bounds(fit, margin, fitted, &mut scratch.bounds);
            }
            self.round(fit, &fitted.c, scratch);
            self.evaluate(scratch);
            if self.settle(exact, scratch) {
                return;
            }
            // Rounding disturbed what the fit left in order.
            fitted.inside = false;
        }
        self.choose_without_order(fit, fitted, scratch);
        if !all_finite(&scratch.stored.evaluated.narrow) {
            self.flat_fallback(scratch);
        }
        let left = self.take_excess(exact, scratch);
        let rise = if fit.coefficients().is_simultaneous() { 0.0 } else { ROUNDED_RISE };
        if plan.keeps_order() && (left > MASS_ROUNDING || self.largest_rise(scratch) > rise) {
            self.choose_in_order(exact, scratch);
        }
    }

    /// Takes away what the row has above a total probability of 1, whether it is in order or not:
    /// from exact values that were rounded up, and then from all approximated ones alike. Returns
    /// what is left of it.
    fn take_excess(&self, exact: &mut [f64], scratch: &mut RowScratch) -> f64 {
        let mut stronger = 1.0;
        loop {
            let mass = sum_exp(&scratch.stored.evaluated.narrow);
            let excess = self.limit_mass(exact, mass, scratch);
            if excess <= MASS_ROUNDING || self.plan.constant().is_none() || stronger > STRONGEST {
                return excess;
            }
            let shift = stronger * shift_for_excess(excess, mass);
            let lowered = self.plan.shift_down(shift, &mut scratch.stored.coefficients);
            self.evaluate(scratch);
            if !lowered || !all_finite(&scratch.stored.evaluated.narrow) {
                self.flat_fallback(scratch);
            }
            stronger *= 2.0;
        }
    }

    /// By how much a value is at most above the one before it, or the first above the ceiling;
    /// infinite where a value is not finite.
    fn largest_rise(&self, scratch: &RowScratch) -> f64 {
        let mut before = self.ceiling;
        let mut largest = 0.0f64;
        for value in &scratch.stored.evaluated.narrow {
            let value = f64::from(*value);
            let rise = value - before;
            largest = if rise.is_finite() { largest.max(rise) } else { f64::INFINITY };
            before = value;
        }
        largest
    }

    /// Raises the last exact value where the first approximated one needs it, and takes away what
    /// the row has above a total probability of 1: from exact values that were rounded up, and then
    /// from all approximated ones alike. Returns false where the row is not in order, or has still
    /// too much.
    #[inline(always)]
    fn settle(&self, exact: &mut [f64], scratch: &mut RowScratch) -> bool {
        let mut stronger = 1.0;
        while stronger < STRONGEST {
            let Some(mass) = self.mass_if_ordered(scratch) else { return false };
            self.raise_last_exact_if_below(exact, scratch);
            let excess = self.limit_mass(exact, mass, scratch);
            if excess <= MASS_ROUNDING || self.plan.constant().is_none() {
                return true;
            }
            let shift = stronger * shift_for_excess(excess, mass);
            if !self.plan.shift_down(shift, &mut scratch.stored.coefficients) {
                return false;
            }
            self.evaluate(scratch);
            stronger *= 2.0;
        }
        false
    }

    /// The constant and one other term: their sum is in order whatever its coefficients are rounded
    /// to, if the sign is right. Of all such pairs, that of least KL over K ∪ {R}; each has the
    /// right probability where the ceiling allows it.
    #[cold]
    fn choose_in_order(&self, exact: &mut [f64], scratch: &mut RowScratch) {
        let y = self.input.y;
        let p: Vec<f64> = y.iter().map(|&y| f64::from(exp(y))).collect();
        let mass: f64 = p.iter().sum();
        let mut least = f64::INFINITY;
        let mut best = vec![0.0; scratch.stored.coefficients.len()];
        let terms = self.plan.decoder().terms();
        for (index, term) in terms.rows().enumerate() {
            let Some(falling) = direction(term) else { continue };
            let slope = falling * (falling * weighted_slope(term, y, &p)).max(0.0);
            let dtype = self.plan.decoder().layout().coefficient_dtype;
            let slope = dtype.round(slope.clamp(-dtype.max(), dtype.max()));
            scratch.stored.coefficients.fill(0.0);
            scratch.stored.coefficients[index] = slope;
            if !self.level(mass, scratch) {
                continue;
            }
            let mut cost = 0.0;
            for ((p, value), y) in p.iter().zip(&scratch.stored.evaluated.narrow).zip(y) {
                cost += p * (f64::from(*y) - f64::from(*value));
            }
            let left = self.input.missing + mass - sum_exp(&scratch.stored.evaluated.narrow);
            cost -= self.input.missing * libm::log(left.max(f64::MIN_POSITIVE));
            if cost < least {
                least = cost;
                best.clone_from(&scratch.stored.coefficients);
            }
        }
        scratch.stored.coefficients = best;
        self.evaluate(scratch);
        if least.is_infinite() {
            self.level(mass, scratch);
        }
        self.settle(exact, scratch);
    }

    /// Sets the coefficient of the constant term such that the values have the probability `mass`,
    /// or less where the first of them would exceed the ceiling. Returns false where the values are
    /// not finite.
    fn level(&self, mass: f64, scratch: &mut RowScratch) -> bool {
        let Some(constant) = self.plan.constant() else { return false };
        let dtype = self.plan.decoder().layout().coefficient_dtype;
        self.evaluate(scratch);
        let values = &scratch.stored.evaluated.narrow;
        let first = f64::from(values[0]);
        if !all_finite(values) {
            return false;
        }
        let relative: f64 = values.iter().map(|&value| libm::exp(f64::from(value) - first)).sum();
        let highest = libm::log(mass.max(LEAST_MASS) / relative).min(self.ceiling);
        let mut lower = 0.0;
        for _ in 0..MOST_SHIFTS {
            let c = &mut scratch.stored.coefficients[constant];
            *c = dtype.next_down(dtype.round(highest - lower - first)).max(-dtype.max());
            self.evaluate(scratch);
            if self.mass_if_ordered(scratch).is_some() {
                return true;
            }
            // The sum was rounded up to above the ceiling.
            lower = 2.0 * lower + first.abs().max(1.0) * 1e-7;
        }
        false
    }

    /// Moves the fit into its bounds. Order comes before errors where a row cannot have both.
    ///
    /// It is for few rows, and not inlined: that would be much code in every instruction set's
    /// entry.
    #[inline(never)]
    fn keep_bounds(
        &self,
        fit: &Fit,
        margin: f64,
        fitted: &mut Fitted,
        scratch: &mut BoundsScratch,
    ) {
        let likely = likely_ranks(self.input.y, LIKELY_LOGPROB);
        let (base, ceiling) = self.before_fit(fit);
        let allowed = self.allowed_error(fitted);
        for relaxed in RELAXED {
            let bounds = Bounds {
                from: fit.residual_count(),
                ceiling,
                margin,
                likely: if relaxed.is_finite() { likely } else { &[] },
                base,
                error: allowed * relaxed,
            };
            if satisfy_bounds(&bounds, fit, fitted, scratch) {
                return;
            }
        }
    }

    /// Leaves coefficients, and what they decode to, for a row whose coefficients' type is too
    /// coarse for order. They are those of least KL, those within bounds, or the unweighted fit's:
    /// whichever first keeps errors of likely ids where they belong, or keeps them least.
    #[cold]
    fn choose_without_order(&self, fit: &Fit, fitted: &mut Fitted, scratch: &mut RowScratch) {
        let (base, _) = self.before_fit(fit);
        let allowed = self.allowed_error(fitted);
        self.keep_bounds(fit, 0.0, fitted, &mut scratch.bounds);
        let mut least = f64::INFINITY;
        let mut best = vec![0.0; scratch.stored.coefficients.len()];
        for c in [&fitted.unconstrained, &fitted.c, &fit.unweighted(self.input.y, base)] {
            self.round(fit, c, scratch);
            self.evaluate(scratch);
            let error = self.likely_error(base, scratch);
            if error <= allowed {
                return;
            }
            if error < least {
                least = error;
                best.clone_from(&scratch.stored.coefficients);
            }
        }
        scratch.stored.coefficients = best;
        self.evaluate(scratch);
    }

    /// One level for all approximated values, of the right mass if there is a constant term: for
    /// rows whose fit does not fit into the coefficients' type.
    #[cold]
    fn flat_fallback(&self, scratch: &mut RowScratch) {
        let layout = self.plan.decoder().layout();
        scratch.stored.coefficients.fill(0.0);
        if let Some(constant) = self.plan.constant()
            && !layout.delta_encoding
        {
            let y = self.input.y;
            let dtype = layout.coefficient_dtype;
            // Neither a row without probability nor a ceiling beyond the type has a finite level.
            let lowest = -dtype.max();
            let level = libm::log(sum_exp(y) / y.len() as f64).max(f64::from(MIN_LOGPROB));
            let stored = dtype.round(level.min(self.ceiling).max(lowest));
            let stored = if stored > self.ceiling { dtype.next_down(stored) } else { stored };
            scratch.stored.coefficients[constant] = stored.max(lowest);
        }
        self.evaluate(scratch);
    }

    /// The largest error that likely ids are allowed.
    #[inline(always)]
    pub(crate) fn allowed_error(&self, fitted: &Fitted) -> f64 {
        f64::from(fitted.unweighted_error).max(self.plan.allowed_error())
    }

    /// The largest error of a likely id that has no residual; NaN counts as infinite.
    fn likely_error(&self, base: f64, scratch: &RowScratch) -> f64 {
        let layout = self.plan.decoder().layout();
        let likely = likely_ranks(self.input.y, LIKELY_LOGPROB);
        let ranks = likely.iter().zip(&scratch.stored.evaluated.narrow);
        let mut sum = 0.0;
        let mut largest = 0.0f64;
        for (y, value) in ranks.skip(layout.residual_count()) {
            let value = f64::from(*value);
            sum = if layout.delta_encoding { sum + value } else { value };
            let error = (base + sum - f64::from(*y)).abs();
            largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
        }
        largest
    }

    /// What the decoder adds to the fit of the ranks without a residual, and what the first of
    /// these must not exceed, without that.
    fn before_fit(&self, fit: &Fit) -> (f64, f64) {
        match (fit.restart(), fit.residual_count()) {
            (0, 0) => (self.input.base, self.ceiling),
            (0, _) => (self.input.base, f64::INFINITY),
            (restart, _) => (f64::from(self.input.y[restart - 1].max(MIN_LOGPROB)), 0.0),
        }
    }

    #[inline(always)]
    fn round(&self, fit: &Fit, c: &[f64], scratch: &mut RowScratch) {
        let RowScratch { rounding, stored, .. } = scratch;
        fit.coefficients().round_row(c, self.input.y, rounding, &mut stored.coefficients);
    }

    #[inline(always)]
    fn evaluate(&self, scratch: &mut RowScratch) {
        scratch.stored.evaluate(self.plan.decoder());
    }

    /// Σ eˣ of the polynomial's values, if they decode to finite values that do not increase from
    /// the first rank without a residual on, where they are below the ceiling.
    #[inline(always)]
    fn mass_if_ordered(&self, scratch: &RowScratch) -> Option<f64> {
        let layout = self.plan.decoder().layout();
        let all = &scratch.stored.evaluated.narrow;
        let (with_residual, values) = all.split_at(layout.residual_count());
        if layout.delta_encoding {
            let ordered = values.iter().fold(true, |ordered, &step| ordered & (step <= 0.0));
            return (ordered && all_finite(all)).then_some(0.0);
        }
        let (ordered, mass) = order_and_mass(values);
        // In order, the first is the largest and the last the least.
        let finite =
            values.last().is_none_or(|&last| last > f32::NEG_INFINITY) && all_finite(with_residual);
        let ceiling = if with_residual.is_empty() { self.ceiling } else { f64::from(f32::MAX) };
        let below = values.first().is_none_or(|&first| f64::from(first) <= ceiling);
        (ordered && finite && below).then_some(mass)
    }

    /// Raises the last exact value where the first approximated one is above it.
    #[inline(always)]
    fn raise_last_exact_if_below(&self, exact: &mut [f64], scratch: &RowScratch) {
        let layout = self.plan.decoder().layout();
        let Some(&last) = exact.last() else { return };
        if layout.delta_encoding || !layout.residual_bins.is_empty() {
            return;
        }
        if f64::from(scratch.stored.evaluated.narrow[0]) > last {
            self.plan.rounding().raise_last_exact(exact);
        }
    }

    /// Limits the total probability of a row without residuals, and returns what is left of the
    /// excess. With residuals it is known only when they are written.
    #[inline(always)]
    fn limit_mass(&self, exact: &mut [f64], mass: f64, scratch: &mut RowScratch) -> f64 {
        if !self.plan.decoder().layout().residual_bins.is_empty() {
            return 0.0;
        }
        limit_mass(self.plan, self.input.logprobs, exact, mass, &mut scratch.stored)
    }
}

/// −1 where a term increases from rank to rank, and so falls with a negative coefficient, 1 where it
/// decreases; `None` where it does neither, or nothing at all.
fn direction(term: &[f64]) -> Option<f64> {
    if term.first() == term.last() {
        None
    } else if term.is_sorted() {
        Some(-1.0)
    } else {
        term.is_sorted_by(|a, b| a >= b).then_some(1.0)
    }
}

/// The slope of the line through the points (term, y), with weights p.
fn weighted_slope(term: &[f64], y: &[f32], p: &[f64]) -> f64 {
    let mass: f64 = p.iter().sum();
    let points = || term.iter().zip(y).zip(p).map(|((x, y), p)| (*x, f64::from(*y), *p));
    // A rank without probability has no say, however low its value is.
    let mean_x = points().map(|(x, _, p)| p * x).sum::<f64>() / mass;
    let mean_y = points().map(|(_, y, p)| p * y).sum::<f64>() / mass;
    let along: f64 = points().map(|(x, y, p)| p * (x - mean_x) * (y - mean_y)).sum();
    let square: f64 = points().map(|(x, _, p)| p * (x - mean_x).powi(2)).sum();
    if square > 0.0 { along / square } else { 0.0 }
}
