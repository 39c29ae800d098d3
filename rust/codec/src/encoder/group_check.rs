//! What the rounded coefficients of a group decode to, found for all its rows at once.

use super::column_sums::{dot_terms, padded};
use super::plan::Plan;
use super::repair::RowJob;
use super::solver::Fitted;
use crate::simd::lanes::{LANES, Lanes, no_unroll, sum_exp};

/// Approximated values are cut off here before their exponentials are added up: a row with larger
/// ones is looked at again by itself.
const HIGHEST: f32 = 80.0;
/// A mass that was added up in float32, rank by rank, is looked at more closely where it is nearer
/// to 1 than this.
const MASS_DOUBT: f64 = 1e-4;

/// Stored coefficients of a group, by term; and as the decoder multiplies them.
#[derive(Debug, Default)]
pub(crate) struct GroupScratch {
    stored: Vec<[f64; LANES]>,
    of_term: Vec<Lanes>,
    /// Coefficients of the orthonormal columns.
    c: Vec<[f64; LANES]>,
}

/// What the coefficients of a group decode to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodedStats<'a> {
    /// The stored coefficients, by term.
    stored: &'a [[f64; LANES]],
    /// The first approximated value.
    first: Lanes,
    /// Σ eˣ, with the rounding of as many float32 additions as there are ranks.
    mass: Lanes,
    /// 1 where the values are finite and do not increase, else 0.
    ordered: Lanes,
}

/// Rounds the fitted coefficients into the scratch and evaluates them at every rank, as the decoder
/// does. Returns `None` where rows have to be taken one by one.
#[inline(always)]
pub(crate) fn decode_group<'a>(
    plan: &Plan,
    fitted: &[Fitted],
    scratch: &'a mut GroupScratch,
) -> Option<DecodedStats<'a>> {
    let coefficients = plan.fit()?.coefficients();
    if !plan.decoder().layout().is_plain() || !coefficients.is_simultaneous() {
        return None;
    }
    let GroupScratch { stored, of_term, c } = scratch;
    let m = plan.decoder().terms().count();
    stored.resize(m, [0.0; LANES]);
    of_term.resize(padded(m), Lanes::ZERO);
    coefficients.round_group(fitted.iter().map(|fitted| fitted.c.as_slice()), c, stored);
    for (of_term, stored) in of_term.iter_mut().zip(stored.iter()) {
        no_unroll();
        for (of_row, stored) in of_term.0.iter_mut().zip(stored) {
            *of_row = *stored as f32;
        }
    }
    let terms = plan.terms_of_rank();
    let width = of_term.len();
    let first = dot_terms(&terms[..width], of_term);
    let mut before = first;
    let mut mass = Lanes::ZERO;
    let mut ordered = Lanes::splat(1.0);
    for terms in terms.chunks_exact(width) {
        no_unroll();
        let value = dot_terms(terms, of_term);
        ordered = before.where_not_less(value, ordered, Lanes::ZERO);
        mass += value.min(Lanes::splat(HIGHEST)).exp();
        before = value;
    }
    ordered = before.where_greater(Lanes::splat(f32::MIN), ordered, Lanes::ZERO);
    Some(DecodedStats { stored, first, mass, ordered })
}

impl DecodedStats<'_> {
    /// Writes a row that decodes to values in order and to a total probability that is surely at
    /// most 1. Returns false, and writes nothing, where something is left to do.
    #[inline(always)]
    pub(crate) fn write_row(
        &self,
        job: &RowJob,
        exact: &mut [f64],
        exact32: &mut Vec<f32>,
        out: &mut [u8],
    ) -> bool {
        let lane = job.lane;
        let first = f64::from(self.first.0[lane]);
        let ordered = self.ordered.0[lane] > 0.0;
        if !ordered || first > job.ceiling {
            return false;
        }
        let last = exact.last().copied().unwrap_or(0.0);
        let raised = if first > last { job.plan.rounding().raise_last_exact(exact) } else { 0 };
        exact32.clear();
        exact32.extend(exact.iter().map(|&value| value as f32));
        if sum_exp(exact32) + f64::from(self.mass.0[lane]) > 1.0 - MASS_DOUBT {
            let end = exact.len();
            exact[end - raised..].fill(last);
            return false;
        }
        let layout = job.plan.decoder().layout();
        let mut out = layout.exact_dtype.write_all(exact, out);
        for stored in self.stored {
            out = layout.coefficient_dtype.write(stored[lane], out);
        }
        true
    }
}
