//! What the encoder works out once per configuration.

use std::iter::repeat_n;
use std::sync::Arc;

use super::column_sums::rank_table;
use super::rounding::ExactRounding;
use super::row::LIKELY_LOGPROB;
use super::solver::{Fit, Limits};
use crate::float::FloatType;
use crate::values::{Terms, ValueDecoder};

/// How much each value must be below the one before it (nats): tried in turn until the decoder's
/// rounding leaves the row in order.
const MARGINS: [f64; 3] = [4e-5, 3.2e-4, 2.6e-3];
/// The error that likely ids are always allowed is the least of three, all in nats. The first is
/// this many with one coefficient, and fewer by this factor with each further one.
const ALLOWED_ERROR: f64 = 50.0;
const ALLOWED_FACTOR: f64 = 0.4;
/// Coefficients beyond this many leave it as it is.
const ALLOWED_TERMS: usize = 6;
/// The second is this many for each e-fold of ranks, divided by one more than there are
/// coefficients.
const ALLOWED_FOLD: f64 = 8.0;
/// The third is this many for each e-fold of ranks, divided by the square of the first rank that is
/// neither exact nor has a residual.
const ALLOWED_FIRST: f64 = 100.0;

/// The prepared encoder of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    decoder: Arc<ValueDecoder>,
    rounding: ExactRounding,
    fit: Option<Fit>,
    /// The terms for [`dot_terms`](super::column_sums::dot_terms).
    terms_of_rank: Vec<f32>,
    /// A term that is 1 at every rank.
    constant: Option<usize>,
    allowed_error: f64,
    margins: [f64; 3],
    error_diffusion: bool,
}

impl Plan {
    /// Prepares the encoder of what `decoder` decodes.
    pub(crate) fn new(decoder: Arc<ValueDecoder>, error_diffusion: bool) -> Self {
        let layout = decoder.layout();
        let terms = decoder.terms();
        let allowed_error = allowed_error(&decoder);
        let constant =
            terms.rows().position(|row| !row.is_empty() && row.iter().all(|&value| value == 1.0));
        // A single constant makes all values the same, so no margin can be kept.
        let flat = terms.count() == 1 && constant.is_some() && !layout.delta_encoding;
        let rows: Vec<Vec<f64>> = terms.rows().map(<[f64]>::to_vec).collect();
        Self {
            rounding: ExactRounding::new(layout, allowed_error),
            fit: fit(&decoder),
            terms_of_rank: rank_table(&rows, terms.ranks()),
            constant,
            allowed_error,
            margins: if flat { [0.0; 3] } else { MARGINS },
            error_diffusion,
            decoder,
        }
    }

    /// The decoder of what is written.
    #[inline(always)]
    pub(crate) fn decoder(&self) -> &ValueDecoder {
        &self.decoder
    }

    #[inline(always)]
    pub(crate) const fn rounding(&self) -> &ExactRounding {
        &self.rounding
    }

    /// The fit, where there is something to choose.
    #[inline(always)]
    pub(crate) const fn fit(&self) -> Option<&Fit> {
        self.fit.as_ref()
    }

    #[inline(always)]
    pub(crate) fn terms_of_rank(&self) -> &[f32] {
        &self.terms_of_rank
    }

    /// The index of a term that is 1 at every rank.
    #[inline(always)]
    pub(crate) const fn constant(&self) -> Option<usize> {
        self.constant
    }

    /// Whether every row can be kept in order and to a total probability of at most 1: values can be
    /// shifted down without residuals or differences behind them, in steps that do not show.
    #[inline(always)]
    pub(crate) fn keeps_order(&self) -> bool {
        let layout = self.decoder.layout();
        let fine = matches!(layout.coefficient_dtype, FloatType::Float32 | FloatType::Float64);
        fine && self.constant.is_some() && !layout.delta_encoding && layout.residual_bins.is_empty()
    }

    /// The largest error of likely ids that is never fought (nats).
    #[inline(always)]
    pub(crate) const fn allowed_error(&self) -> f64 {
        self.allowed_error
    }

    /// How much each value must be below the one before it (nats), tried in turn.
    #[inline(always)]
    pub(crate) const fn margins(&self) -> [f64; 3] {
        self.margins
    }

    /// What rows are held to.
    #[inline(always)]
    pub(crate) const fn limits(&self) -> Limits {
        Limits {
            likely: LIKELY_LOGPROB,
            error: self.allowed_error as f32,
            margin: self.margins[0] as f32,
        }
    }

    /// Each quantisation error of a residual is carried into the next element.
    #[inline(always)]
    pub(crate) const fn error_diffusion(&self) -> bool {
        self.error_diffusion
    }

    /// Lowers every approximated value by `amount` nats, through the constant term. Returns false,
    /// and changes nothing, where its type has no finite value that low.
    #[inline(always)]
    pub(crate) fn shift_down(&self, amount: f64, coefficients: &mut [f64]) -> bool {
        if let Some(constant) = self.constant
            && amount > 0.0
        {
            let dtype = self.decoder.layout().coefficient_dtype;
            let c = &mut coefficients[constant];
            let lower = dtype.next_down(dtype.round(*c - amount));
            if !lower.is_finite() {
                return false;
            }
            *c = lower;
        }
        true
    }
}

/// The error of likely ids that is never fought: below what the unweighted fits of real rows get
/// wrong at worst.
fn allowed_error(decoder: &ValueDecoder) -> f64 {
    let layout = decoder.layout();
    let m = decoder.terms().count();
    let first = (layout.exact_k + layout.residual_count()).max(1) as f64;
    let folds = libm::log(decoder.k().max(1) as f64 / first);
    let a_fold = (ALLOWED_FOLD / (m + 1) as f64).min(ALLOWED_FIRST / (first * first));
    // Not by `powi`, whose rounding std leaves open.
    let further = repeat_n(ALLOWED_FACTOR, m.clamp(1, ALLOWED_TERMS) - 1);
    let of_terms = ALLOWED_ERROR * further.product::<f64>();
    of_terms.min(a_fold * folds)
}

/// The fit to what the decoder does with the terms; `None` where these leave nothing to choose.
fn fit(decoder: &ValueDecoder) -> Option<Fit> {
    let layout = decoder.layout();
    let terms = decoder.terms();
    if terms.count() == 0 || terms.ranks() == 0 {
        return None;
    }
    let residual_count = layout.residual_count();
    // The residuals leave the running sum where the last of them is right, whatever the polynomial
    // says before.
    let restarts = layout.delta_encoding && residual_count < terms.ranks();
    let restart = if restarts { residual_count } else { 0 };
    let columns = if layout.delta_encoding { summed(terms, restart) } else { plain(terms) };
    let fit = Fit::new(columns, layout.coefficient_dtype, residual_count, restart);
    // Terms that are 0 at every rank leave nothing to choose.
    (fit.basis().rank() > 0).then_some(fit)
}

fn plain(terms: &Terms) -> Vec<Vec<f64>> {
    terms.rows().map(<[f64]>::to_vec).collect()
}

/// The terms summed up over the ranks, anew from `restart` on.
fn summed(terms: &Terms, restart: usize) -> Vec<Vec<f64>> {
    let sums = |row: &[f64]| [running_sum(&row[..restart]), running_sum(&row[restart..])].concat();
    terms.rows().map(sums).collect()
}

fn running_sum(values: &[f64]) -> Vec<f64> {
    let add = |sum: &mut f64, value: &f64| {
        *sum += value;
        Some(*sum)
    };
    values.iter().scan(0.0, add).collect()
}
