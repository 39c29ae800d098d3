//! Rounding of the exact values, before anything is fitted: each to one of its two neighbours.

use super::joint_rounding::{JointRounding, JointScratch, LARGEST_SHIFT, round_jointly};
use super::row::{Ceiling, Group, LEAST_MISSING, RowInput};
use crate::error::{CodecError, Result, RowResult};
use crate::float::FloatType;
use crate::simd::lanes::{LANES, exp};
use crate::values::Layout;

/// Rounds the exact values of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct ExactRounding {
    exact_k: usize,
    dtype: FloatType,
    delta_encoding: bool,
    /// The largest error of likely ids that is never fought (nats).
    allowed_error: f64,
}

/// Buffers, kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct ExactScratch {
    joint: JointScratch,
    /// The stored values of a group, row by row.
    pub(crate) exact: Vec<f64>,
}

impl ExactRounding {
    pub(crate) const fn new(layout: &Layout, allowed_error: f64) -> Self {
        Self {
            exact_k: layout.exact_k,
            dtype: layout.exact_dtype,
            delta_encoding: layout.delta_encoding,
            allowed_error,
        }
    }

    /// Whether the values of a row are rounded jointly. In types other than bfloat16 their errors
    /// are too small for that to matter.
    #[inline(always)]
    fn is_joint(&self) -> bool {
        self.dtype == FloatType::Bfloat16 && !self.delta_encoding && self.exact_k > 0
    }

    /// Rounds the exact values of a group's rows, and returns what is to be fitted in each row;
    /// lanes beyond the last row are empty. Fails where a stored value is not finite.
    #[inline(always)]
    pub(crate) fn round_group<'a>(
        &self,
        group: Group<'a>,
        scratch: &mut ExactScratch,
    ) -> RowResult<[RowInput<'a>; LANES]> {
        let ExactScratch { joint, exact } = scratch;
        let mut rows = [RowInput::default(); LANES];
        let mut jointly = JointRounding::default();
        exact.clear();
        if self.is_joint() {
            let allowed = self.allowed_error as f32;
            jointly = round_jointly(group, self.exact_k, allowed, joint, exact);
        }
        for (i, (row, logprobs)) in rows.iter_mut().zip(group.logprobs.chunks(group.k)).enumerate()
        {
            let (first, y) = logprobs.split_at(self.exact_k);
            let base = if self.is_joint() { 0.0 } else { self.round_row(first, exact) };
            let stored = &exact[i * self.exact_k..(i + 1) * self.exact_k];
            self.check(stored, first).map_err(|error| (i, error))?;
            let shift = f64::from(jointly.shift.0[i]);
            let missing = f64::from((1.0 - group.masses.0[i]).max(LEAST_MISSING));
            *row = RowInput { logprobs, y, base, shift, missing, ceiling: Ceiling::default() };
            row.ceiling = self.ceiling(row, stored, f64::from(jointly.shared.0[i]));
        }
        Ok(rows)
    }

    /// Appends the stored values of one row and returns where the sequence stands: 0 without
    /// differences, and with them the running sum, less the shift of the values that follow.
    ///
    /// Differences are rounded against what was stored before, so errors do not add up. They are
    /// rounded not to the values but to the values shifted by −S/M (see `joint_rounding.rs`): errors
    /// so far have taken S from the probability M of everything else.
    #[inline(always)]
    fn round_row(&self, y: &[f32], exact: &mut Vec<f64>) -> f64 {
        if !self.delta_encoding {
            self.dtype.round_all(y, exact);
            return 0.0;
        }
        let mut sum = 0.0;
        let mut shift = 0.0f64;
        let mut rest = 1.0;
        let mut error = 0.0;
        for &value in y {
            let stored = self.dtype.round(f64::from(value) + shift - sum);
            exact.push(stored);
            sum += stored;
            let p = f64::from(exp(value));
            rest -= p;
            error += p * (sum - f64::from(value));
            let limit = f64::from(LARGEST_SHIFT);
            shift = (-error / rest.max(f64::from(LEAST_MISSING))).clamp(-limit, limit);
        }
        sum - shift
    }

    /// Fails when a stored value of a row is not finite.
    #[inline(always)]
    fn check(&self, stored: &[f64], y: &[f32]) -> Result<()> {
        if stored.iter().fold(true, |finite, stored| finite & stored.is_finite()) {
            return Ok(());
        }
        let rank = stored.iter().position(|stored| !stored.is_finite()).unwrap_or(0);
        Err(CodecError::Input(format!(
            "log-probability {} at rank {rank} is too large for {:?} (exact_dtype)",
            y[rank], self.dtype
        )))
    }

    /// What the first approximated value must not exceed, without `base`. `stored` are the row's
    /// stored exact values, `shared` is as in [`JointRounding`].
    #[inline(always)]
    fn ceiling(&self, row: &RowInput, stored: &[f64], shared: f64) -> Ceiling {
        let &[.., last] = stored else { return Ceiling::default() };
        if self.delta_encoding || row.y.is_empty() {
            return Ceiling::default();
        }
        let y = &row.logprobs[..stored.len()];
        if last >= f64::from(y[y.len() - 1]) {
            return Ceiling { last, raised: last, price: 0.0 };
        }
        // It was rounded down, and so were those that are stored alike: when they are raised, they
        // are still neighbours of the given values.
        let raised = self.dtype.next_up(last);
        let step = raised - last;
        let first = row.y[0];
        let mut price = 0.0;
        let mut mass = 0.0;
        for &y in &y[y.len() - tied_suffix_len(stored)..] {
            let more = f64::from(exp((y - first).min(80.0))) * step;
            price += more * (step + 2.0 * (last - f64::from(y) - row.shift));
            mass += more;
        }
        Ceiling { last, raised, price: price + shared * mass * mass * f64::from(exp(first)) }
    }

    /// Stores the last exact value of a row, and those like it, one step higher; returns how many.
    #[inline(always)]
    pub(crate) fn raise_last_exact(&self, exact: &mut [f64]) -> usize {
        let count = tied_suffix_len(exact);
        let end = exact.len();
        if let Some(last) = exact.last().copied() {
            exact[end - count..].fill(self.dtype.next_up(last));
        }
        count
    }
}

/// How many of the last values are the same.
#[inline(always)]
fn tied_suffix_len(exact: &[f64]) -> usize {
    exact.iter().rev().take_while(|&value| Some(value) == exact.last()).count()
}
