//! The encoder of a row's values: which bytes decode to a distribution close to the given one. Close
//! is KL over K ∪ {R}: the row's ids, and all others together as one more outcome R.
//!
//! docs/encoder.md explains the method and why each step is there. In short, for a group of up to
//! sixteen rows, one in each lane of a vector:
//!
//! ```text
//! exact ← round the first exact_k log-probabilities to their type         rounding, joint_rounding
//! y     ← the other log-probabilities − what the decoder adds to them
//! c     ← argmin Σ (F − y)²                 F = Σ c·q, q the orthonormal terms              solver
//! c     ← argmin Σ p (F − y)²               p = eʸ
//! repeat up to 4 times:                                            Newton's method on the KL
//!     g ← Σ (e^F − p)·q
//!     H ← Σ e^F·q·qᵀ                                                                  column_sums
//!     c ← c − H⁻¹ g, shortened so that no value moves by more than 2 nats
//!     stop a row whose step promised less than 1e-3 nats
//! for each row that is out of order, or wrong by more than the unweighted fit:
//!     H ← H + s·sᵀ / R, s = Σ p·q                              the cost of a wrong total probability
//!     c ← argmin (c − c*)ᵀ H (c − c*) within these bounds                              active_set
//! stored  ← round the coefficients of the terms, c mapped back                       coefficients
//! decoded ← what the decoder computes from them                                       group_check
//! for each row whose decoded values are not finite, in order and of total probability ≤ 1:
//!     bounds with a larger margin, errors relaxed, all values shifted down                 repair
//!     round exact values down                                                                mass
//! residual bins ← quantise y − decoded                                                  residuals
//! ```
//!
//! It departs from the textbook methods in these points:
//!
//! 1. Newton's method has no line search. It starts from weighted least squares, whose error is of
//!    third order, and a step is only shortened where e^F would leave the parabola far behind.
//! 2. The products q·qᵀ of powers are powers again. Sums over the ranks are built for a basis of
//!    their span (13 columns instead of 27 for six terms); these also give the gradient, which
//!    needs no pass of its own.
//! 3. A small ridge, 1e-4 of the largest fitted probability, keeps ranks without probability from
//!    running away. It costs nothing that can be measured.
//! 4. The search runs in float32, in an orthonormal basis that was found in float64. No operation
//!    is fused and lanes never see each other, so bytes depend on neither the machine nor the rows
//!    beside a row.
//! 5. Bounds are met on one parabola, that of the unbounded minimum, and on a second one where they
//!    cost much, instead of one for each point on the way (sequential quadratic programming).
//! 6. The dual active-set method factorises its few active normals anew in each step instead of
//!    updating the factor, starts with the violation that the group's check found, and accepts
//!    violations below half the margin.
//! 7. Bounds that exclude each other are relaxed. Errors may grow in steps up to any size, since
//!    order comes first.
//! 8. Coefficients in types too coarse for one rounding are rounded one at a time, and the others
//!    are fitted again after each.
//! 9. Nothing is believed: what was rounded is decoded as the decoder does it, and repaired.
//!
//! Modules import in this order, each only from those before it (tests/layers.rs checks it), and
//! nothing that decodes knows any of them:
//!
//! ```text
//! row, linalg → column_sums, coefficients, joint_rounding → solver, rounding → active_set → plan
//! → mass → residuals → repair → group_check → this one
//! ```

mod active_set;
mod coefficients;
mod column_sums;
mod group_check;
mod joint_rounding;
mod linalg;
mod mass;
mod plan;
mod repair;
mod residuals;
mod rounding;
mod row;
mod solver;
#[cfg(test)]
mod testing;

pub(crate) use plan::Plan;
pub(crate) use row::Group;

use self::active_set::satisfy_group_bounds;
use self::group_check::{GroupScratch, decode_group};
use self::mass::limit_mass_with_bins;
use self::repair::{RowJob, RowScratch};
use self::residuals::write_bins;
use self::rounding::ExactScratch;
use self::row::{MIN_LOGPROB, StoredRow};
use self::solver::{FitScratch, Fitted};
use crate::error::{CodecError, Result, RowResult};
use crate::simd::lanes::LANES;
use crate::simd::{Isa, Portable, multiversion};
use crate::values::DecoderScratch;

/// Where the values of a group's rows go: each at the start of `stride` bytes.
pub(crate) struct GroupOut<'a> {
    pub(crate) bytes: &'a mut [u8],
    pub(crate) stride: usize,
}

/// Buffers of one thread, kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct EncoderScratch {
    exact: ExactScratch,
    fit: FitScratch,
    fitted: Vec<Fitted>,
    group: GroupScratch,
    row: RowScratch,
}

multiversion! {
    /// Encodes the values of up to [`LANES`] rows.
    ///
    /// It has an entry of its own for each instruction set because it is large, and the same for
    /// every format.
    pub(crate) fn encode_values(
        plan: &Plan,
        group: Group<'_>,
        out: GroupOut<'_>,
        scratch: &mut EncoderScratch,
    ) -> RowResult = encode_values_body;
}

#[inline(always)]
fn encode_values_body<I: Isa>(
    _isa: I,
    plan: &Plan,
    group: Group,
    out: GroupOut,
    scratch: &mut EncoderScratch,
) -> RowResult {
    let EncoderScratch { exact, fit: fit_scratch, fitted, group: group_scratch, row } = scratch;
    let GroupOut { bytes, stride } = out;
    let rows = plan.rounding().round_group(group, exact)?;
    let rows = &rows[..group.len()];
    if let Some(fit) = plan.fit() {
        fitted.resize_with(LANES, Fitted::default);
        let limits = plan.limits();
        fit.solve(rows, limits, fit_scratch, fitted);
        satisfy_group_bounds(fit, rows, limits, fit_scratch, fitted, &mut row.bounds);
    } else {
        fitted.clear();
    }
    let decoded = decode_group(plan, fitted, group_scratch);
    let exact_k = plan.decoder().layout().exact_k;
    for (lane, (input, out)) in rows.iter().zip(bytes.chunks_mut(stride)).enumerate() {
        let exact = &mut exact.exact[lane * exact_k..(lane + 1) * exact_k];
        let mut fitted = fitted.get_mut(lane);
        let raises = fitted.as_ref().is_some_and(|fitted| fitted.raises);
        let ceiling = if raises { input.ceiling.raised } else { input.ceiling.last };
        let job = RowJob { plan, input, lane, ceiling };
        if let (Some(decoded), Some(fitted)) = (&decoded, &fitted)
            && fitted.inside
            && decoded.write_row(&job, exact, &mut row.stored.exact32, out)
        {
            continue;
        }
        job.choose_coefficients(exact, fitted.as_deref_mut(), fit_scratch, row);
        let allowed = fitted.map_or(plan.allowed_error(), |fitted| job.allowed_error(fitted));
        write_row(&job, allowed, exact, row, out);
        if may_overflow(&job, &row.stored) {
            check_decodes(&job, out).map_err(|error| (lane, error))?;
        }
    }
    Ok(())
}

/// Whether sums of the decoder might be too large for its types. Rows of a teacher hardly ever have
/// values for which this is worth a closer look.
#[inline(always)]
fn may_overflow(job: &RowJob, stored: &StoredRow) -> bool {
    let RowJob { plan, input, .. } = job;
    // All ranks of a sequence can add up, each with a residual about as large.
    let limit = f32::MAX / (4.0 * input.logprobs.len() as f32);
    let values = &stored.evaluated.narrow;
    plan.decoder().layout().published_rounding
        || input.logprobs.last().is_some_and(|&lowest| lowest < MIN_LOGPROB)
        || !values.iter().fold(true, |small, value| small & (value.abs() < limit))
}

/// Refuses a row whose written values the decoder would refuse.
#[cold]
#[inline(never)]
fn check_decodes(job: &RowJob, data: &[u8]) -> Result<()> {
    let y = job.input.logprobs;
    let mut found = vec![0.0; y.len()];
    let decoder = job.plan.decoder();
    if decoder.decode(Portable, data, &mut found, &mut DecoderScratch::default()).is_ok() {
        return Ok(());
    }
    let rank = found.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(CodecError::Input(format!(
        "log-probability {} at rank {rank} does not fit this configuration: it would decode to {}",
        y[rank], found[rank]
    )))
}

/// Writes exact values, coefficients and residuals.
#[inline(always)]
fn write_row(
    job: &RowJob,
    allowed: f64,
    exact: &mut [f64],
    scratch: &mut RowScratch,
    out: &mut [u8],
) {
    let RowJob { plan, input, .. } = *job;
    let RowScratch { stored, residuals, .. } = scratch;
    let layout = plan.decoder().layout();
    let coefficient_bytes = plan.decoder().terms().count() * layout.coefficient_dtype.size();
    let (head, bins) = out.split_at_mut(layout.exact_bytes() + coefficient_bytes);
    if !layout.residual_bins.is_empty() {
        // Residuals are of the shifted values.
        let allowed = allowed - input.shift.abs();
        write_bins(plan, input, &stored.evaluated.wide, allowed, residuals, bins);
        limit_mass_with_bins(plan, input.logprobs, exact, bins, stored);
    }
    let coefficients = layout.exact_dtype.write_all(exact, head);
    layout.coefficient_dtype.write_all(&stored.coefficients, coefficients);
}
