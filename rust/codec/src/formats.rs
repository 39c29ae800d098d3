//! One module a published format; what they share: the row interface.

pub(crate) mod legacy;
pub(crate) mod quantized;

use crate::error::{CodecError, Result};
use crate::fit::FitScratch;

/// Buffers of one thread, kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Sorted log-probabilities of the row.
    pub(crate) y: Vec<f64>,
    /// Sorted ids of the row.
    pub(crate) ids: Vec<i64>,
    pub(crate) order: Vec<usize>,
    pub(crate) weights: Vec<f64>,
    pub(crate) target: Vec<f64>,
    pub(crate) coefficients: Vec<f64>,
    pub(crate) approximate: Vec<f64>,
    pub(crate) sum32: Vec<f32>,
    pub(crate) fit: FitScratch,
}

/// A format with a fixed number of bytes a row. Rows and buffers have the right sizes when these are called.
pub(crate) trait RowFormat: Sync {
    fn k(&self) -> usize;
    fn vocab_size(&self) -> u64;
    fn value_bytes(&self) -> usize;
    fn id_bytes(&self) -> usize;
    /// Encodes `scratch.y` and `scratch.ids`, which are checked and sorted.
    fn encode_row(&self, scratch: &mut Scratch, out: &mut [u8]) -> Result<()>;
    /// Decodes a row; ids are below the vocabulary size and values finite, or it fails.
    fn decode_row(&self, row: &[u8], ids: &mut [i64], logprobs: &mut [f32], scratch: &mut Scratch) -> Result<()>;
}

/// Weights of the approximated ranks in the fit: (p / p of the first of them)^¾, a hundredth of it for the `covered` ranks, whose residuals
/// are stored too; at least [`WEIGHT_FLOOR`].
///
/// Squared errors of log-probabilities weighted by p are the second-order term of the KL divergence; the smaller exponent and the floor
/// keep the far tail, which KL hardly sees, from running away. The three numbers were chosen on real distributions.
pub(crate) fn fit_weights(y: &[f64], covered: usize, weights: &mut Vec<f64>) {
    weights.clear();
    let Some(first) = y.first() else { return };
    weights.extend(y.iter().enumerate().map(|(j, value)| {
        let share = if j < covered { COVERED_SHARE } else { 1.0 };
        (share * (WEIGHT_EXPONENT * (value - first)).exp()).max(WEIGHT_FLOOR)
    }));
}

const WEIGHT_EXPONENT: f64 = 0.75;
const COVERED_SHARE: f64 = 0.01;
const WEIGHT_FLOOR: f64 = 1e-3;

/// Fails when an id is outside the vocabulary.
pub(crate) fn check_ids(ids: &[i64], vocab_size: u64) -> Result<()> {
    match ids.iter().enumerate().find(|&(_, &id)| id as u64 >= vocab_size) {
        None => Ok(()),
        Some((rank, id)) => Err(CodecError::Corrupt(format!("id {id} at rank {rank} is outside the vocabulary of {vocab_size}"))),
    }
}

/// Fails when a decoded value is not finite.
pub(crate) fn check_finite(logprobs: &[f32]) -> Result<()> {
    // A sum is finite only if all its parts are, and it vectorises; only a bad row is looked at one by one.
    if logprobs.iter().map(|value| value.abs()).sum::<f32>().is_finite() {
        return Ok(());
    }
    match logprobs.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(rank) => Err(CodecError::Corrupt(format!("log-probability {} at rank {rank} is not finite", logprobs[rank]))),
    }
}
