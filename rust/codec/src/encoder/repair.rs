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
use crate::simd::lanes::{all_finite, order_and_mass, sum_exp};

/// Where order and errors exclude each other, errors may be this many times larger, in turn.
const RELAXED: [f64; 7] = [1.0, 1.25, 1.6, 2.0, 2.5, 3.2, f64::INFINITY];

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
        let mut shift = 0.0;
        for margin in plan.margins() {
            if !fitted.inside {
                fit.take_factor(fit_scratch, self.lane, fitted);
                self.keep_bounds(fit, margin, fitted, &mut scratch.bounds);
            }
            self.round(fit, &fitted.c, scratch);
            plan.shift_down(shift, &mut scratch.stored.coefficients);
            self.evaluate(scratch);
            if let Some(mass) = self.mass_if_ordered(scratch) {
                self.raise_last_exact_if_below(exact, scratch);
                let excess = self.limit_mass(exact, mass, scratch);
                if excess <= MASS_ROUNDING || shift > 0.0 || plan.constant().is_none() {
                    return;
                }
                // Bounds can add mass to the approximated ranks; shifting all of them down by the
                // same amount takes it away again.
                shift = shift_for_excess(excess, mass);
                plan.shift_down(shift, &mut scratch.stored.coefficients);
                self.evaluate(scratch);
                if self.mass_if_ordered(scratch).is_some() {
                    return;
                }
            }
            // Rounding disturbed what the fit left in order.
            fitted.inside = false;
        }
        self.choose_without_order(fit, fitted, scratch);
        if !all_finite(&scratch.stored.evaluated.narrow) {
            self.flat_fallback(scratch);
        }
        self.limit_mass(exact, sum_exp(&scratch.stored.evaluated.narrow), scratch);
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
            let level = libm::log(sum_exp(y) / y.len() as f64).min(self.ceiling);
            let stored = dtype.round(level);
            scratch.stored.coefficients[constant] =
                if stored > self.ceiling { dtype.next_down(stored) } else { stored };
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
