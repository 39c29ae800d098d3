//! Total probability at most 1: exact values are lowered where a row would decode to more.

use super::plan::Plan;
use super::row::{LIKELY_LOGPROB, StoredRow, likely_ranks};
use crate::float::FloatType;
use crate::simd::Portable;
use crate::simd::lanes::sum_exp;
use crate::values::Evaluated;

/// Decoded mass may exceed 1 by this much: the rounding of its own computation.
pub(crate) const MASS_ROUNDING: f64 = 1e-6;
/// All exact values of a sequence are lowered by this much (nats) at most; where a layout cannot
/// hold a row better than that, its exact values matter more.
const LARGEST_LOWERING: f64 = 1e-2;

/// By how much the approximated values, of total probability `mass`, have to be shifted down to
/// take away the excess: no further than to half of their probability.
#[inline(always)]
pub(crate) fn shift_for_excess(excess: f64, mass: f64) -> f64 {
    -libm::log(1.0 - (excess / mass).min(0.5))
}

/// Rounds exact values down that were rounded up, where the row would decode to a total probability
/// above 1 (or above the given one's, which a low-precision teacher may have a little too large).
/// The cheapest ones are first. Returns what is left of the excess.
///
/// `mass` is Σ eˣ of the approximated values; it is not looked at with differences, which have to
/// be summed up first.
#[inline(always)]
pub(crate) fn limit_mass(
    plan: &Plan,
    row: &[f32],
    exact: &mut [f64],
    mass: f64,
    stored: &mut StoredRow,
) -> f64 {
    let StoredRow { evaluated, exact32, .. } = stored;
    let layout = plan.decoder().layout();
    let dtype = layout.exact_dtype;
    exact32.clear();
    exact32.extend(exact.iter().map(|&value| value as f32));
    if layout.delta_encoding {
        exact32.extend_from_slice(&evaluated.narrow);
        let mut sum = 0.0;
        for value in exact32.iter_mut() {
            sum += *value;
            *value = sum;
        }
        lower_first_step(dtype, row, exact, sum_exp(exact32));
        return 0.0;
    }
    let decoded = sum_exp(exact32) + mass;
    if decoded <= 1.0 + MASS_ROUNDING {
        return 0.0;
    }
    let first = evaluated.narrow.first().map_or(f64::NEG_INFINITY, |&first| f64::from(first));
    Lowering { dtype, row, after: first }.lower(exact, decoded - sum_exp(row).max(1.0))
}

/// Takes the excess of a row with residuals, of which the `bins` are written already, from the
/// exact values, and what is left of it from the constant term.
#[inline(always)]
pub(crate) fn limit_mass_with_bins(
    plan: &Plan,
    row: &[f32],
    exact: &mut [f64],
    bins: &[u8],
    stored: &mut StoredRow,
) {
    let decoder = plan.decoder();
    if decoder.layout().delta_encoding {
        return;
    }
    let Evaluated { narrow, wide } = &mut stored.evaluated;
    let sum = |value, residual| decoder.add_residual(value, residual);
    // These bytes were just written: their padding is right, and a bin cannot be refused for
    // anything else.
    if decoder.add_residuals(Portable, bins, wide, sum).is_err() {
        return;
    }
    narrow.iter_mut().zip(wide.iter()).for_each(|(narrow, &wide)| *narrow = wide as f32);
    let mass = sum_exp(narrow);
    let excess = limit_mass(plan, row, exact, mass, stored);
    if excess > MASS_ROUNDING {
        // Too much probability does less harm than a coefficient that is not finite.
        let _ = plan.shift_down(shift_for_excess(excess, mass), &mut stored.coefficients);
    }
}

/// Lowers the first of the differences, and with it all values, where they decode to a total
/// probability above 1.
#[inline(always)]
fn lower_first_step(dtype: FloatType, row: &[f32], exact: &mut [f64], decoded: f64) {
    let excess = decoded / sum_exp(row).max(1.0) - 1.0;
    if let Some(first) = exact.first_mut()
        && excess > MASS_ROUNDING
        && excess < LARGEST_LOWERING
    {
        *first = dtype.next_down(dtype.round(*first - excess));
    }
}

/// Which exact values of a row to round down.
struct Lowering<'a> {
    dtype: FloatType,
    row: &'a [f32],
    /// The value after the last exact one.
    after: f64,
}

/// One exact value to round down.
struct Candidate {
    rank: usize,
    lower: f64,
    /// By how much that lowers the total probability.
    less: f64,
}

impl Lowering<'_> {
    /// Lowers values until the excess is gone or no value is left to lower; returns what is left of
    /// the excess.
    #[inline(always)]
    fn lower(&self, exact: &mut [f64], mut excess: f64) -> f64 {
        // Errors stay below the largest that there is, if that suffices.
        let likely = likely_ranks(self.row, LIKELY_LOGPROB);
        let error = |(stored, &y): (&f64, &f32)| (stored - f64::from(y)).abs();
        let mut allowed = exact.iter().zip(likely).map(error).fold(0.0, f64::max);
        while excess > MASS_ROUNDING {
            if let Some(Candidate { rank, lower, less }) = self.cheapest(exact, excess, allowed) {
                exact[rank] = lower;
                excess -= less;
            } else if allowed.is_infinite() {
                break;
            } else {
                allowed = f64::INFINITY;
            }
        }
        excess
    }

    /// Of the exact values that were rounded up, and whose error would be at most `allowed`: the
    /// one that costs least among those that suffice, or the one that lowers the mass most.
    #[inline(always)]
    fn cheapest(&self, exact: &[f64], excess: f64, allowed: f64) -> Option<Candidate> {
        let mut best = None;
        let mut least = f64::INFINITY;
        for (rank, &stored) in exact.iter().enumerate() {
            let y = f64::from(self.row[rank]);
            let next = exact.get(rank + 1).copied().unwrap_or(self.after);
            let lower = self.dtype.next_down(stored);
            if stored <= y || lower < next || y - lower > allowed {
                continue;
            }
            let less = libm::exp(stored) - libm::exp(lower);
            if less <= 0.0 {
                continue;
            }
            let score = if less >= excess {
                libm::exp(y) * ((lower - y).powi(2) - (stored - y).powi(2))
            } else {
                f64::MAX / (1.0 + less)
            };
            if best.is_none() || score < least {
                least = score;
                best = Some(Candidate { rank, lower, less });
            }
        }
        best
    }
}
