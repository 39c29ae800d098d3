//! The values of a row in both published formats: exact ones, coefficients, and residuals; bytes in FORMAT.md §2 and §3.
//!
//! The formats differ in their ids and in how a configuration describes its terms; what is here takes the terms as they are evaluated.

use std::ops::Range;

use crate::bits::Packing;
use crate::bounds::{Bounds, BoundsScratch, enforce, enforce_group, likely};
use crate::config::{MAX_TERMS, ResidualBin};
use crate::error::{CodecError, Result};
use crate::exact::{ExactScratch, Together, round_together};
use crate::fit::{Ceiling, DEEPEST, Fit, FitRow, FitScratch, Fitted, LEAST_WEIGHT, Limits, by_rank, combination, padded};
use crate::float::FloatType;
use crate::lanes::{LANES, Lanes, all_finite, exp, one_step, order_and_mass, sum_exp};
use crate::quantize::{Errors, Residual, decode_bin, encode_bin};
use crate::rows::RowResult;
use crate::simd::{Isa, Portable, multiversion};

/// How much each value must be below the one before it, nats: tried in turn until the decoder's rounding leaves the row in order.
const MARGINS: [f64; 3] = [4e-5, 3.2e-4, 2.6e-3];
/// ln 1e-6: errors of ids above this are bounded by …
const LIKELY: f32 = -13.815_51;
/// … the unweighted fit's largest error in that row, or this many nats with one coefficient, half as many with each further one, where the
/// row's is less; …
const ALLOWED_ERROR: f64 = 16.0;
/// … but no more than this many for each e-fold of ranks, divided by one more than there are coefficients, or the second many, divided by
/// the square of the first rank that is neither exact nor has a residual: below what the unweighted fits of real rows get wrong at worst.
const ALLOWED_FOLD: f64 = 6.4;
const ALLOWED_FIRST: f64 = 100.0;
/// Coefficients beyond this many leave the allowed error as it is.
const ALLOWED_TERMS: usize = 6;
/// Where order and errors exclude each other, errors may be this many times larger, in turn.
const RELAXED: [f64; 7] = [1.0, 1.25, 1.6, 2.0, 2.5, 3.2, f64::INFINITY];
/// All exact values are lowered by this much (nats) at most; where a layout can't hold a row better than that, its exact values matter more.
const LARGEST_LOWERING: f64 = 1e-2;
/// Decoded mass may exceed 1 by this much: the rounding of its own computation.
const MASS_ROUNDING: f64 = 1e-6;
/// A mass that was added up in float32, rank by rank, is looked at more closely where it is nearer to 1 than this.
const MASS_DOUBT: f64 = 1e-4;

/// How a configuration stores values.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) exact_k: usize,
    pub(crate) exact_dtype: FloatType,
    /// Type of the stored coefficients.
    pub(crate) coefficient_dtype: FloatType,
    /// The polynomial is evaluated in float64 instead of float32.
    pub(crate) wide: bool,
    pub(crate) residual_bins: Vec<ResidualBin>,
    pub(crate) delta_encoding: bool,
    pub(crate) error_diffusion: bool,
}

/// Encodes and decodes the values of rows.
#[derive(Debug, Clone)]
pub(crate) struct Values {
    layout: Layout,
    /// Ranks that are not exact.
    n: usize,
    /// Those of them with a residual of their own; they come first.
    covered: usize,
    /// m rows of n: the terms as the decoder evaluates them.
    terms: Vec<f64>,
    /// In float32: for [`LANES`] ranks at a time (zero beyond the last) a vector of each term.
    terms_of_block: Vec<Lanes>,
    /// For [`combination`].
    terms_of_rank: Vec<f32>,
    m: usize,
    fit: Option<Fit>,
    /// A term that is 1 at every rank.
    constant: Option<usize>,
    /// Largest error of likely ids that is never fought.
    allowed_error: f64,
    /// [`MARGINS`], unless values are all the same anyway.
    margins: [f64; 3],
}

/// Buffers of one thread, kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct ValuesScratch {
    exact: ExactScratch,
    fit: FitScratch,
    fitted: Vec<Fitted>,
    bounds: BoundsScratch,
    group: GroupScratch,
    row: RowScratch,
}

/// Stored coefficients of a group, by term; and as the decoder multiplies them.
#[derive(Debug, Default)]
struct GroupScratch {
    stored: Vec<[f64; LANES]>,
    of_term: Vec<Lanes>,
}

/// What the coefficients of a group decode to.
#[derive(Debug, Clone, Copy)]
struct Decoded {
    first: Lanes,
    /// Σ eˣ, with the rounding of as many float32 additions as there are ranks.
    mass: Lanes,
    /// 1 where the values are finite and do not increase, else 0.
    ordered: Lanes,
}

/// A row to encode.
#[derive(Debug, Clone, Copy)]
struct Given<'a> {
    /// Its place in the group.
    lane: usize,
    row: &'a [f32],
    /// What the decoder adds to the approximated values.
    base: f64,
    /// By how much they should be above the given ones, since the exact values are.
    moved: f64,
    /// What the first of them must not exceed, without `base`.
    ceiling: f64,
}

#[derive(Debug, Default)]
struct RowScratch {
    exact: Vec<f64>,
    coefficients: Vec<f64>,
    exact32: Vec<f32>,
    /// What the polynomial decodes to; in float64 only where more is done with it.
    approximate: Vec<f64>,
    approximate32: Vec<f32>,
    residuals: Vec<Residual>,
}

impl Values {
    /// `terms`: m rows of n; coefficients are stored even where n = 0.
    pub(crate) fn new(layout: Layout, n: usize, m: usize, terms: Vec<f64>) -> Self {
        let covered = layout.residual_bins.iter().map(|bin| bin.num_elements).sum();
        let fit = (m * n > 0).then(|| {
            // The residuals leave the running sum where the last of them is right, whatever the polynomial says before.
            let restart = if layout.delta_encoding && covered < n { covered } else { 0 };
            let sums = |row: &[f64]| [running_sum(&row[..restart]), running_sum(&row[restart..])].concat();
            let columns = terms.chunks(n).map(|row| if layout.delta_encoding { sums(row) } else { row.to_vec() });
            Fit::new(columns.collect(), layout.coefficient_dtype, covered, restart)
        });
        // Terms that are 0 at every rank leave nothing to choose.
        let fit = fit.filter(|fit| !fit.basis().q.is_empty());
        let constant = (m * n > 0).then(|| terms.chunks(n).position(|row| row.iter().all(|&value| value == 1.0))).flatten();
        let terms_of_block = by_block(&terms, n);
        let terms_of_rank = by_rank(&terms.chunks(n.max(1)).map(<[f64]>::to_vec).collect::<Vec<_>>(), n);
        let first = (layout.exact_k + covered).max(1) as f64;
        let folds = libm::log((layout.exact_k + n).max(1) as f64 / first);
        let a_fold = (ALLOWED_FOLD / (m + 1) as f64).min(ALLOWED_FIRST / (first * first));
        let allowed_error = (ALLOWED_ERROR * 0.5f64.powi(m.min(ALLOWED_TERMS) as i32 - 1)).min(a_fold * folds);
        let margins = if m == 1 && constant.is_some() && !layout.delta_encoding { [0.0; 3] } else { MARGINS };
        Self { layout, n, covered, terms, terms_of_block, terms_of_rank, m, fit, constant, allowed_error, margins }
    }

    /// The terms at the approximated ranks, m rows of n.
    pub(crate) fn terms(&self) -> &[f64] {
        &self.terms
    }

    /// Encodes the values of up to [`LANES`] rows of k sorted log-probabilities, and of these total probabilities, into the start of each
    /// `stride` bytes of `out`.
    /// The failing row comes with its error.
    #[inline(always)]
    fn encode<I: Isa>(
        &self,
        isa: I,
        logprobs: &[f32],
        masses: Lanes,
        out: &mut [u8],
        stride: usize,
        scratch: &mut ValuesScratch,
    ) -> RowResult {
        let (k, exact_k) = (self.layout.exact_k + self.n, self.layout.exact_k);
        let ValuesScratch { exact: exact_scratch, fit: fit_scratch, fitted, bounds, group, row: row_scratch } = scratch;
        let (mut base, mut together, mut ceiling) = ([0.0; LANES], Together::default(), [Ceiling::default(); LANES]);
        row_scratch.exact.clear();
        if self.rounds_together() {
            let allowed = self.allowed_error as f32;
            together = round_together(logprobs, k, exact_k, masses, allowed, exact_scratch, &mut row_scratch.exact);
        }
        for (i, row) in logprobs.chunks(k).enumerate() {
            if !self.rounds_together() {
                base[i] = self.round_exact(&row[..exact_k], &mut row_scratch.exact);
            }
            let exact = &row_scratch.exact[i * exact_k..(i + 1) * exact_k];
            self.check_exact(exact, row).map_err(|error| (i, error))?;
            ceiling[i] = self.ceiling(row, exact, f64::from(together.moved.0[i]), f64::from(together.shared.0[i]));
        }
        if let Some(fit) = &self.fit {
            let rows: [FitRow; LANES] = std::array::from_fn(|i| {
                let i = if i * k < logprobs.len() { i } else { 0 };
                let y = &logprobs[i * k + exact_k..(i + 1) * k];
                FitRow { y, base: base[i] as f32, moved: together.moved.0[i], ceiling: ceiling[i] }
            });
            fitted.resize_with(LANES, Fitted::default);
            let limits = Limits { likely: LIKELY, error: self.allowed_error as f32, margin: self.margins[0] as f32 };
            let rows = &rows[..logprobs.len() / k];
            fit.solve(isa, rows, limits, fit_scratch, fitted);
            enforce_group(fit, rows, limits, fit_scratch, fitted, bounds);
        } else {
            fitted.clear();
        }
        let decoded = self.decode_group(fitted, fit_scratch, group);
        for (i, (row, out)) in logprobs.chunks(k).zip(out.chunks_mut(stride)).enumerate() {
            let ceiling = if fitted.get(i).is_some_and(|fitted| fitted.raises) { ceiling[i].raised } else { ceiling[i].last };
            let exact = i * exact_k..(i + 1) * exact_k;
            if let Some(decoded) = decoded.filter(|decoded| fitted[i].inside && decoded.ordered.0[i] > 0.0)
                && self.write_decoded(decoded, i, ceiling, exact.clone(), group, row_scratch, out)
            {
                continue;
            }
            let given = Given { lane: i, row, base: base[i], moved: f64::from(together.moved.0[i]), ceiling };
            self.choose_coefficients(given, exact.clone(), fitted.get_mut(i), bounds, fit_scratch, row_scratch);
            let allowed = fitted.get(i).map_or(0.0, |fitted| f64::from(fitted.plain_error)).max(self.allowed_error);
            // Residuals are of the moved values.
            self.write(given, exact, allowed - given.moved.abs(), row_scratch, out);
        }
        Ok(())
    }

    /// What the fitted coefficients, rounded, decode to, for all rows of a group; `None` where rows have to be taken one by one.
    #[inline(always)]
    fn decode_group(&self, fitted: &[Fitted], fit_scratch: &mut FitScratch, group: &mut GroupScratch) -> Option<Decoded> {
        let fit = self.fit.as_ref()?;
        if self.is_sequence() || !fit.rounds_at_once() {
            return None;
        }
        group.stored.resize(self.m, [0.0; LANES]);
        group.of_term.resize(padded(self.m), Lanes::ZERO);
        fit.rounded_group(fitted, fit_scratch, &mut group.stored);
        for (of_term, stored) in group.of_term.iter_mut().zip(&group.stored) {
            one_step();
            for (of_row, stored) in of_term.0.iter_mut().zip(stored) {
                *of_row = *stored as f32;
            }
        }
        let width = group.of_term.len();
        let first = combination(&self.terms_of_rank[..width], &group.of_term);
        let (mut before, mut mass, mut ordered) = (first, Lanes::ZERO, Lanes::splat(1.0));
        for terms in self.terms_of_rank.chunks_exact(width) {
            one_step();
            let value = combination(terms, &group.of_term);
            ordered = before.where_not_less(value, ordered, Lanes::ZERO);
            mass += value.min(Lanes::splat(80.0)).exp();
            before = value;
        }
        ordered = before.where_greater(Lanes::splat(f32::MIN), ordered, Lanes::ZERO);
        Some(Decoded { first, mass, ordered })
    }

    /// Writes a row whose coefficients decode to what is as it should be; false, and nothing is written, where something is left to do.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a row of a group, and the scratch")]
    fn write_decoded(
        &self,
        decoded: Decoded,
        lane: usize,
        ceiling: f64,
        exact: Range<usize>,
        group: &GroupScratch,
        scratch: &mut RowScratch,
        out: &mut [u8],
    ) -> bool {
        let RowScratch { exact: all, exact32, .. } = scratch;
        let first = f64::from(decoded.first.0[lane]);
        if first > ceiling {
            return false;
        }
        let last = all[exact.clone()].last().copied().unwrap_or(0.0);
        let raised = if first > last { self.raise_last(&mut all[exact.clone()]) } else { 0 };
        exact32.clear();
        exact32.extend(all[exact.clone()].iter().map(|&value| value as f32));
        if sum_exp(exact32) + f64::from(decoded.mass.0[lane]) > 1.0 - MASS_DOUBT {
            all[exact.end - raised..exact.end].fill(last);
            return false;
        }
        let mut out = self.layout.exact_dtype.write_all(&all[exact], out);
        for stored in &group.stored {
            out = self.layout.coefficient_dtype.write(stored[lane], out);
        }
        true
    }

    /// Whether exact values are rounded with an eye on each other. In the other types their errors are too small for that to matter; and where
    /// nothing has larger errors than they have, these are kept least.
    #[inline(always)]
    fn rounds_together(&self) -> bool {
        let layout = &self.layout;
        layout.exact_dtype == FloatType::Bfloat16 && !layout.delta_encoding && layout.exact_k > 0 && self.allowed_error > 0.0
    }

    /// Appends the stored exact values and returns where the sequence stands: without differences 0, with them the running sum, less the
    /// mean error of the values so far, weighted by their probabilities.
    ///
    /// Differences are rounded against what was stored before, so errors do not add up; and not to the values but to the values moved by
    /// that mean error, since KL is blind to an error that all values share.
    #[inline(always)]
    fn round_exact(&self, y: &[f32], exact: &mut Vec<f64>) -> f64 {
        let dtype = self.layout.exact_dtype;
        let (mut sum, mut shared, mut mass, mut error) = (0.0, 0.0, 0.0, 0.0);
        if self.layout.delta_encoding {
            for &value in y {
                let stored = dtype.round(f64::from(value) + shared - sum);
                exact.push(stored);
                sum += stored;
                let p = f64::from(exp(value));
                mass += p;
                error += p * (sum - f64::from(value));
                shared = if mass > 0.0 { error / mass } else { 0.0 };
            }
        } else {
            dtype.round_all(y, exact);
        }
        sum - shared
    }

    /// Fails when a stored exact value of a row is not finite.
    #[inline(always)]
    fn check_exact(&self, exact: &[f64], y: &[f32]) -> Result<()> {
        if exact.iter().fold(true, |finite, stored| finite & stored.is_finite()) {
            return Ok(());
        }
        let rank = exact.iter().position(|stored| !stored.is_finite()).unwrap_or(0);
        let dtype = self.layout.exact_dtype;
        Err(CodecError::Input(format!("log-probability {} at rank {rank} is too large for {dtype:?} (exact_dtype)", y[rank])))
    }

    /// Leaves the row's stored coefficients and what they decode to in `scratch`, and its exact values such that the row is in order and
    /// has a total probability of at most 1, where the layout allows that.
    #[inline(always)]
    fn choose_coefficients(
        &self,
        given: Given,
        exact: Range<usize>,
        fitted: Option<&mut Fitted>,
        bounds: &mut BoundsScratch,
        fit_scratch: &mut FitScratch,
        scratch: &mut RowScratch,
    ) {
        let Given { lane, row, ceiling, .. } = given;
        scratch.coefficients.clear();
        scratch.coefficients.resize(self.m, 0.0);
        let (Some(fit), Some(fitted)) = (&self.fit, fitted) else {
            self.evaluate(scratch);
            self.limit_mass(row, exact, sum_exp(&scratch.approximate32), scratch);
            return;
        };
        let y = &row[self.layout.exact_k..];
        let mut lower = 0.0;
        for margin in self.margins {
            if !fitted.inside {
                fit.take_factor(fit_scratch, lane, fitted);
                self.keep_bounds(fit, given, margin, fitted, bounds);
            }
            fit.rounded(&fitted.c, y, fit_scratch, &mut scratch.coefficients);
            self.lower(lower, scratch);
            self.evaluate(scratch);
            if let Some(mass) = self.mass_if_good(ceiling, scratch) {
                self.make_place(exact.clone(), scratch);
                let excess = self.limit_mass(row, exact.clone(), mass, scratch);
                if excess <= MASS_ROUNDING || lower > 0.0 || self.constant.is_none() {
                    return;
                }
                // Bounds can add mass to the approximated ranks; all of them lowered by the same amount take it away again.
                lower = -libm::log(1.0 - (excess / mass).min(0.5));
                self.lower(lower, scratch);
                self.evaluate(scratch);
                if self.mass_if_good(ceiling, scratch).is_some() {
                    return;
                }
            }
            // What the fit left in order, rounding did not.
            fitted.inside = false;
        }
        self.choose_without_order(fit, given, fitted, bounds, fit_scratch, scratch);
        if !all_finite(&scratch.approximate32) {
            self.level(y, ceiling, scratch);
        }
        self.limit_mass(row, exact, sum_exp(&scratch.approximate32), scratch);
    }

    /// Moves the fit into its bounds. Order comes before errors where a row can't have both.
    ///
    /// For few rows, and not inlined: that would be much code in every instruction set's entry.
    #[inline(never)]
    fn keep_bounds(&self, fit: &Fit, given: Given, margin: f64, fitted: &mut Fitted, scratch: &mut BoundsScratch) {
        let y = &given.row[self.layout.exact_k..];
        let (likely, (base, ceiling)) = (likely(y, LIKELY), self.before_fit(fit, given));
        let allowed = f64::from(fitted.plain_error).max(self.allowed_error);
        for relaxed in RELAXED {
            let likely = if relaxed.is_finite() { likely } else { &[] };
            let bounds = Bounds { from: self.covered, ceiling, margin, likely, base, error: allowed * relaxed };
            if enforce(&bounds, fit, fitted, None, scratch) {
                return;
            }
        }
    }

    /// Leaves coefficients, and what they decode to, for a row whose coefficients' type is too coarse for order: those of least KL, or those
    /// within bounds, or the unweighted fit's, whichever first keeps errors of likely ids where they belong, or keeps them least.
    #[cold]
    fn choose_without_order(
        &self,
        fit: &Fit,
        given: Given,
        fitted: &mut Fitted,
        bounds: &mut BoundsScratch,
        fit_scratch: &mut FitScratch,
        scratch: &mut RowScratch,
    ) {
        let (y, (base, _)) = (&given.row[self.layout.exact_k..], self.before_fit(fit, given));
        let allowed = f64::from(fitted.plain_error).max(self.allowed_error);
        self.keep_bounds(fit, given, 0.0, fitted, bounds);
        let (mut least, mut best) = (f64::INFINITY, vec![0.0; self.m]);
        for c in [&fitted.free, &fitted.c, &fit.unweighted(y, base)] {
            fit.rounded(c, y, fit_scratch, &mut scratch.coefficients);
            self.evaluate(scratch);
            let error = self.likely_error(y, base, scratch);
            if error <= allowed {
                return;
            }
            if error < least {
                least = error;
                best.clone_from(&scratch.coefficients);
            }
        }
        scratch.coefficients = best;
        self.evaluate(scratch);
    }

    /// The largest error of a likely id that has no residual, NaN counting as infinite.
    fn likely_error(&self, y: &[f32], base: f64, scratch: &RowScratch) -> f64 {
        let (mut sum, mut largest) = (0.0, 0.0f64);
        for (y, value) in likely(y, LIKELY).iter().zip(&scratch.approximate32).skip(self.covered) {
            sum = if self.layout.delta_encoding { sum + f64::from(*value) } else { f64::from(*value) };
            let error = (base + sum - f64::from(*y)).abs();
            largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
        }
        largest
    }

    /// What the decoder adds to the fit of the ranks without a residual, and what their first must not exceed, without that.
    fn before_fit(&self, fit: &Fit, given: Given) -> (f64, f64) {
        match (fit.restart(), self.covered) {
            (0, 0) => (given.base, given.ceiling),
            (0, _) => (given.base, f64::INFINITY),
            (restart, _) => (f64::from(given.row[self.layout.exact_k + restart - 1].max(DEEPEST)), 0.0),
        }
    }

    /// Lowers every approximated value by `amount` nats, through the constant term.
    #[inline(always)]
    fn lower(&self, amount: f64, scratch: &mut RowScratch) {
        if let (Some(constant), true) = (self.constant, amount > 0.0) {
            let c = &mut scratch.coefficients[constant];
            *c = self.layout.coefficient_dtype.next_down(self.layout.coefficient_dtype.round(*c - amount));
        }
    }

    /// One level for all approximated values, of the right mass if there is a constant term: for rows whose fit does not fit into the
    /// coefficients' type.
    #[cold]
    fn level(&self, y: &[f32], ceiling: f64, scratch: &mut RowScratch) {
        scratch.coefficients.fill(0.0);
        if let (Some(constant), false) = (self.constant, self.layout.delta_encoding) {
            let level = libm::log(sum_exp(y) / self.n as f64).min(ceiling);
            let stored = self.layout.coefficient_dtype.round(level);
            scratch.coefficients[constant] = if stored > ceiling { self.layout.coefficient_dtype.next_down(stored) } else { stored };
        }
        self.evaluate(scratch);
    }

    /// What the first approximated value must not exceed, without `base`; `exact` are the exact values stored for the row, the rest as in
    /// [`Together`].
    #[inline(always)]
    fn ceiling(&self, row: &[f32], exact: &[f64], moved: f64, shared: f64) -> Ceiling {
        let ([.., last], false) = (exact, self.layout.delta_encoding || self.n == 0) else { return Ceiling::default() };
        let (last, y) = (*last, &row[..exact.len()]);
        if last >= f64::from(y[exact.len() - 1]) {
            return Ceiling { last, raised: last, price: 0.0 };
        }
        // It was rounded down, and so were those that are stored alike: raised, they are still neighbours of what was given.
        let raised = self.layout.exact_dtype.next_up(last);
        let (step, first) = (raised - last, row[exact.len()]);
        let (mut price, mut mass) = (0.0, 0.0);
        for &y in &y[exact.len() - alike(exact)..] {
            let more = f64::from(exp((y - first).min(80.0))) * step;
            price += more * (step + 2.0 * (last - f64::from(y) - moved));
            mass += more;
        }
        Ceiling { last, raised, price: price + shared * mass * mass * f64::from(exp(first)) }
    }

    /// Stores the last exact value, and those like it, one step higher; returns how many.
    #[inline(always)]
    fn raise_last(&self, exact: &mut [f64]) -> usize {
        let (count, end) = (alike(exact), exact.len());
        if let Some(last) = exact.last().copied() {
            exact[end - count..].fill(self.layout.exact_dtype.next_up(last));
        }
        count
    }

    /// Raises the last exact value where the first approximated one is above it.
    #[inline(always)]
    fn make_place(&self, exact: Range<usize>, scratch: &mut RowScratch) {
        if self.layout.delta_encoding || exact.is_empty() || self.covered > 0 {
            return;
        }
        if f64::from(scratch.approximate32[0]) > scratch.exact[exact.end - 1] {
            self.raise_last(&mut scratch.exact[exact]);
        }
    }

    /// Σ eˣ of the polynomial's values, if they decode to finite values that do not increase from the first rank without a residual on.
    #[inline(always)]
    fn mass_if_good(&self, ceiling: f64, scratch: &RowScratch) -> Option<f64> {
        let (covered, values) = scratch.approximate32.split_at(self.covered);
        if self.layout.delta_encoding {
            let ordered = values.iter().fold(true, |ordered, &step| ordered & (step <= 0.0));
            return (ordered && all_finite(&scratch.approximate32)).then_some(0.0);
        }
        let (ordered, mass) = order_and_mass(values);
        // In order, the first is the largest and the last the least.
        let finite = values.last().is_none_or(|&last| last > f32::NEG_INFINITY) && all_finite(covered);
        let below = if self.covered > 0 { f64::from(f32::MAX) } else { ceiling };
        (ordered && finite && values.first().is_none_or(|&first| f64::from(first) <= below)).then_some(mass)
    }

    /// Whether decoding needs more than exact values and float32 terms.
    #[inline(always)]
    fn is_sequence(&self) -> bool {
        self.layout.wide || self.layout.delta_encoding || !self.layout.residual_bins.is_empty()
    }

    /// Σ coefficient · term at each approximated rank: products and sums in term order, in float32 or (`wide`) float64.
    #[inline(always)]
    fn evaluate(&self, scratch: &mut RowScratch) {
        let RowScratch { coefficients, approximate, approximate32, .. } = scratch;
        approximate32.resize(self.n, 0.0);
        if !self.layout.wide {
            self.evaluate32(coefficients, approximate32);
        }
        if !self.is_sequence() {
            return;
        }
        approximate.clear();
        if self.layout.wide {
            approximate.resize(self.n, 0.0);
            for (c, row) in coefficients.iter().zip(self.terms.chunks(self.n.max(1))) {
                approximate.iter_mut().zip(row).for_each(|(sum, term)| *sum += c * term);
            }
            approximate32.iter_mut().zip(approximate.iter()).for_each(|(value, sum)| *value = *sum as f32);
        } else {
            approximate.extend(approximate32.iter().map(|&value| f64::from(value)));
        }
    }

    #[inline(always)]
    fn evaluate32(&self, coefficients: &[f64], out: &mut [f32]) {
        let mut narrow = [0.0; MAX_TERMS + 1];
        for (narrow, c) in narrow.iter_mut().zip(coefficients) {
            *narrow = *c as f32;
        }
        if self.m == 0 {
            out.fill(0.0);
            return;
        }
        let (blocks, rest) = out.as_chunks_mut::<LANES>();
        let mut terms = self.terms_of_block.chunks_exact(self.m);
        for (out, terms) in blocks.iter_mut().zip(&mut terms) {
            *out = polynomial(&narrow, terms);
        }
        if let Some(terms) = terms.next() {
            rest.copy_from_slice(&polynomial(&narrow, terms)[..rest.len()]);
        }
    }

    /// Adds a residual the way the decoder does.
    #[inline(always)]
    fn add_residual(&self, value: f64, residual: f32) -> f64 {
        if self.layout.wide { value + f64::from(residual) } else { f64::from(value as f32 + residual) }
    }

    /// Writes exact values, coefficients and residuals.
    #[inline(always)]
    fn write(&self, given: Given, exact: Range<usize>, allowed: f64, scratch: &mut RowScratch, out: &mut [u8]) {
        let layout = &self.layout;
        let (head, bins) = out.split_at_mut(layout.exact_k * layout.exact_dtype.size() + self.m * layout.coefficient_dtype.size());
        if !layout.residual_bins.is_empty() {
            self.write_bins(given, allowed, scratch, bins);
            self.limit_mass_with_bins(given.row, exact.clone(), scratch, bins);
        }
        let coefficients = layout.exact_dtype.write_all(&scratch.exact[exact], head);
        layout.coefficient_dtype.write_all(&scratch.coefficients, coefficients);
    }

    #[inline(always)]
    fn write_bins(&self, given: Given, allowed: f64, scratch: &mut RowScratch, mut out: &mut [u8]) {
        let RowScratch { approximate, residuals, .. } = scratch;
        // What the bins should say: the values, or with differences the steps, less what the polynomial says.
        let y = &given.row[self.layout.exact_k..];
        let deep = |j: usize| f64::from(y[j].max(DEEPEST));
        residuals.clear();
        residuals.extend((0..y.len()).map(|j| {
            let before = match (self.layout.delta_encoding, j) {
                (false, _) => -given.moved,
                (true, 0) => given.base.max(f64::from(DEEPEST)),
                (true, _) => deep(j - 1),
            };
            let weight = f64::from(exp(y[j] - y[0]) + LEAST_WEIGHT);
            Residual { wanted: deep(j) - before - approximate[j], weight, likely: y[j] > LIKELY }
        }));
        let errors = match (self.layout.delta_encoding, self.layout.error_diffusion) {
            (true, _) => Errors::AddUp,
            (false, true) => Errors::Diffuse,
            (false, false) => Errors::Stay,
        };
        let (mut at, mut carry) = (0, 0.0);
        for bin in &self.layout.residual_bins {
            out = encode_bin(bin, &residuals[at..at + bin.num_elements], errors, allowed, &mut carry, out);
            at += bin.num_elements;
        }
    }

    /// Rounds exact values down that were rounded up where the row would decode to a total probability above 1 (or above the given
    /// one's, which a low-precision teacher may have a little too large), the cheapest ones first. Returns what is left of the excess.
    #[inline(always)]
    fn limit_mass(&self, row: &[f32], exact: Range<usize>, approximate: f64, scratch: &mut RowScratch) -> f64 {
        // With residuals it is known only when they are written.
        if self.layout.residual_bins.is_empty() { self.limit_decoded_mass(row, exact, approximate, scratch) } else { 0.0 }
    }

    /// The same for a row with residuals, which are written already; what is left is taken from the constant term.
    #[inline(always)]
    fn limit_mass_with_bins(&self, row: &[f32], exact: Range<usize>, scratch: &mut RowScratch, mut bins: &[u8]) {
        if self.layout.delta_encoding {
            return;
        }
        let mut at = 0;
        for bin in &self.layout.residual_bins {
            let (approximate, approximate32) = (&scratch.approximate, &mut scratch.approximate32);
            let taken = |j: usize, residuals: &[f32]| {
                for (j, &residual) in (at + j..).zip(residuals) {
                    approximate32[j] = self.add_residual(approximate[j], residual) as f32;
                }
            };
            // These bytes were just written: their padding is right, which is all that a bin can be refused for.
            let Ok(rest) = decode_bin(Portable, bin, bins, taken) else { return };
            bins = rest;
            at += bin.num_elements;
        }
        let mass = sum_exp(&scratch.approximate32);
        let excess = self.limit_decoded_mass(row, exact, mass, scratch);
        if excess > MASS_ROUNDING {
            self.lower(-libm::log(1.0 - (excess / mass).min(0.5)), scratch);
        }
    }

    /// `approximate`: Σ eˣ of the approximated values (not looked at with differences, which have to be summed up first).
    #[inline(always)]
    fn limit_decoded_mass(&self, row: &[f32], exact: Range<usize>, approximate: f64, scratch: &mut RowScratch) -> f64 {
        let RowScratch { exact: all, exact32, approximate32, .. } = scratch;
        exact32.clear();
        exact32.extend(all[exact.clone()].iter().map(|&value| value as f32));
        if self.layout.delta_encoding {
            exact32.extend_from_slice(approximate32);
            let mut sum = 0.0;
            for value in exact32.iter_mut() {
                sum += *value;
                *value = sum;
            }
            return self.lower_all(row, &mut all[exact], sum_exp(exact32));
        }
        let decoded = sum_exp(exact32) + approximate;
        if decoded <= 1.0 + MASS_ROUNDING {
            return 0.0;
        }
        let mut excess = decoded - sum_exp(row).max(1.0);
        let after = approximate32.first().map_or(f64::NEG_INFINITY, |&first| f64::from(first));
        let exact = &mut all[exact];
        // Errors stay below the largest that there is, if that suffices.
        let mut allowed = exact.iter().zip(likely(row, LIKELY)).fold(0.0, |a: f64, (stored, &y)| a.max((stored - f64::from(y)).abs()));
        while excess > MASS_ROUNDING {
            let Some((rank, lower, less)) = self.cheapest_lowering(row, exact, after, excess, allowed) else {
                if allowed.is_infinite() {
                    break;
                }
                allowed = f64::INFINITY;
                continue;
            };
            exact[rank] = lower;
            excess -= less;
        }
        excess
    }

    /// Lowers the first of the differences, and with it all values, where they decode to a total probability above 1.
    #[inline(always)]
    fn lower_all(&self, row: &[f32], exact: &mut [f64], decoded: f64) -> f64 {
        let excess = decoded / sum_exp(row).max(1.0) - 1.0;
        if let (Some(first), true) = (exact.first_mut(), excess > MASS_ROUNDING && excess < LARGEST_LOWERING) {
            let dtype = self.layout.exact_dtype;
            *first = dtype.next_down(dtype.round(*first - excess));
        }
        0.0
    }

    /// Of the exact values that were rounded up: the one to round down, its new value, and by how much that lowers the mass. The one that
    /// costs least among those that suffice, or the one that lowers it most; of those whose error is at most `allowed`.
    #[inline(always)]
    fn cheapest_lowering(&self, row: &[f32], exact: &[f64], after: f64, excess: f64, allowed: f64) -> Option<(usize, f64, f64)> {
        let mut best: Option<(f64, (usize, f64, f64))> = None;
        for (rank, &stored) in exact.iter().enumerate() {
            let (y, next) = (f64::from(row[rank]), exact.get(rank + 1).copied().unwrap_or(after));
            let lower = self.layout.exact_dtype.next_down(stored);
            if stored <= y || lower < next || y - lower > allowed {
                continue;
            }
            let less = libm::exp(stored) - libm::exp(lower);
            if less <= 0.0 {
                continue;
            }
            let score = if less >= excess { libm::exp(y) * ((lower - y).powi(2) - (stored - y).powi(2)) } else { f64::MAX / (1.0 + less) };
            if best.is_none_or(|(least, _)| score < least) {
                best = Some((score, (rank, lower, less)));
            }
        }
        best.map(|(_, lowering)| lowering)
    }

    /// Decodes the values of one row from its first bytes.
    #[inline(always)]
    pub(crate) fn decode<I: Packing>(&self, isa: I, data: &[u8], logprobs: &mut [f32], scratch: &mut ValuesScratch) -> Result<()> {
        let layout = &self.layout;
        let (exact, rest) = data.split_at(layout.exact_k * layout.exact_dtype.size());
        let (stored, bins) = rest.split_at(self.m * layout.coefficient_dtype.size());
        let mut coefficients = [0.0; MAX_TERMS + 1];
        for (i, c) in coefficients[..self.m].iter_mut().enumerate() {
            *c = layout.coefficient_dtype.read(stored, i);
        }
        if layout.wide || layout.delta_encoding {
            scratch.row.coefficients.clear();
            scratch.row.coefficients.extend_from_slice(&coefficients[..self.m]);
            self.decode_sequence(isa, exact, bins, logprobs, &mut scratch.row)?;
        } else {
            let (first, approximate) = logprobs.split_at_mut(layout.exact_k);
            layout.exact_dtype.read_all(exact, first);
            self.evaluate32(&coefficients[..self.m], approximate);
            self.add_bins(isa, bins, approximate, |value, residual| value + residual)?;
        }
        check_finite(logprobs)
    }

    /// Adds the residuals to the approximated values that have one.
    #[inline(always)]
    fn add_bins<I: Packing, T: Copy>(&self, isa: I, mut bins: &[u8], values: &mut [T], sum: impl Fn(T, f32) -> T) -> Result<()> {
        let mut at = 0;
        for bin in &self.layout.residual_bins {
            bins = decode_bin(isa, bin, bins, |j, residuals| {
                for (value, &residual) in values[at + j..].iter_mut().zip(residuals) {
                    *value = sum(*value, residual);
                }
            })?;
            at += bin.num_elements;
        }
        Ok(())
    }

    /// The general case: float64 terms, differences.
    #[inline(always)]
    fn decode_sequence<I: Packing>(&self, isa: I, exact: &[u8], bins: &[u8], logprobs: &mut [f32], scratch: &mut RowScratch) -> Result<()> {
        let layout = &self.layout;
        self.evaluate(scratch);
        let values = &mut scratch.approximate;
        self.add_bins(isa, bins, values, |value, residual| self.add_residual(value, residual))?;
        let mut sum = 0.0;
        let exact = (0..layout.exact_k).map(|i| layout.exact_dtype.read(exact, i));
        for (out, value) in logprobs.iter_mut().zip(exact.chain(values.iter().copied())) {
            sum = if layout.delta_encoding { sum + value } else { value };
            *out = sum as f32;
        }
        Ok(())
    }
}

multiversion! {
    /// [`Values::encode`], by itself: it is large, and the same for every format.
    pub(crate) fn encode_values(
        values: &Values,
        logprobs: &[f32],
        masses: Lanes,
        out: &mut [u8],
        stride: usize,
        scratch: &mut ValuesScratch,
    ) -> RowResult = encode_values_body;
}

#[inline(always)]
fn encode_values_body<I: Isa>(
    isa: I,
    values: &Values,
    logprobs: &[f32],
    masses: Lanes,
    out: &mut [u8],
    stride: usize,
    scratch: &mut ValuesScratch,
) -> RowResult {
    values.encode(isa, logprobs, masses, out, stride, scratch)
}

/// Rows of n numbers: for [`LANES`] columns at a time (zero beyond the last) a vector of each row.
fn by_block(rows: &[f64], n: usize) -> Vec<Lanes> {
    let at = |row: &[f64], t: usize| row.get(t).map_or(0.0, |&value| value as f32);
    let block = |t: usize| rows.chunks(n.max(1)).map(move |row| Lanes(std::array::from_fn(|i| at(row, t + i))));
    (0..n).step_by(LANES).flat_map(block).collect()
}

/// Σ coefficient · term, in the order of the terms.
#[inline(always)]
fn polynomial(coefficients: &[f32; MAX_TERMS + 1], terms: &[Lanes]) -> [f32; LANES] {
    let mut sum = Lanes::ZERO;
    for (c, term) in coefficients.iter().zip(terms) {
        one_step();
        sum += Lanes::splat(*c) * *term;
    }
    sum.0
}

/// How many of the last values are the same.
#[inline(always)]
fn alike(exact: &[f64]) -> usize {
    exact.iter().rev().take_while(|&value| Some(value) == exact.last()).count()
}

fn running_sum(values: &[f64]) -> Vec<f64> {
    let sum = |sum: &mut f64, value: &f64| {
        *sum += value;
        Some(*sum)
    };
    values.iter().scan(0.0, sum).collect()
}

/// Fails when a decoded value is not finite.
#[inline(always)]
fn check_finite(logprobs: &[f32]) -> Result<()> {
    if all_finite(logprobs) {
        return Ok(());
    }
    match logprobs.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(rank) => Err(CodecError::Corrupt(format!("log-probability {} at rank {rank} is not finite", logprobs[rank]))),
    }
}
