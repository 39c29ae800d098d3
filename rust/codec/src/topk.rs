//! One row of dense logits → its k most probable ids and their log-probabilities under the full softmax.

use half::{bf16, f16};

use crate::error::{CodecError, Result};

/// A type that logits come in.
pub trait Logit: Copy + Sync {
    /// The value in float32, exactly.
    fn to_f32(self) -> f32;
}

impl Logit for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}

impl Logit for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Logit for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Buffers of [`topk_row`], kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct TopkScratch {
    row: Vec<f32>,
    best: Vec<(f32, u32)>,
}

/// Descending by logit, ascending by id: a total order, so the result does not depend on how it is found.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that sorting takes")]
fn before(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Fills `ids` and `logprobs` (both k long) and returns log Σ exp.
pub(crate) fn topk_row<L: Logit>(logits: &[L], ids: &mut [i64], logprobs: &mut [f32], scratch: &mut TopkScratch) -> Result<f64> {
    let TopkScratch { row, best } = scratch;
    row.clear();
    row.extend(logits.iter().map(|logit| logit.to_f32()));
    let highest = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    // Chunks keep the float32 sums short; NaN spreads into the sum, +∞ is the maximum.
    let sum: f64 = row.chunks(256).map(|chunk| f64::from(chunk.iter().map(|logit| (logit - highest).exp()).sum::<f32>())).sum();
    if !highest.is_finite() || !sum.is_finite() {
        let what = if highest == f32::NEG_INFINITY { "no finite logit" } else { "logits that are NaN or infinite" };
        return Err(CodecError::Input(format!("the row has {what}")));
    }
    select(row, ids.len(), best);
    if let Some(rank) = best.iter().position(|(logit, _)| !logit.is_finite()) {
        return Err(CodecError::Input(format!("only {rank} logits are finite, fewer than k = {}", ids.len())));
    }
    let log_sum = sum.ln();
    for ((id, logprob), &(logit, index)) in ids.iter_mut().zip(logprobs).zip(best.iter()) {
        *id = i64::from(index);
        *logprob = (f64::from(logit) - f64::from(highest) - log_sum) as f32;
    }
    Ok(f64::from(highest) + log_sum)
}

/// Leaves the first k of `row` in the order of [`before`] in `best`.
///
/// Keeps what passes a rising threshold in a buffer of a few k, and thins the buffer out to k whenever it is full.
fn select(row: &[f32], k: usize, best: &mut Vec<(f32, u32)>) {
    let room = (4 * k).max(256);
    best.clear();
    let mut threshold = f32::NEG_INFINITY;
    for (id, &logit) in row.iter().enumerate() {
        if logit >= threshold {
            best.push((logit, id as u32));
            if best.len() == room {
                best.select_nth_unstable_by(k - 1, before);
                best.truncate(k);
                threshold = best[k - 1].0;
            }
        }
    }
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, before);
        best.truncate(k);
    }
    best.sort_unstable_by(before);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(logits: &[f32], k: usize) -> Result<(Vec<i64>, Vec<f32>, f64)> {
        let (mut ids, mut logprobs) = (vec![0; k], vec![0.0; k]);
        let log_sum = topk_row(logits, &mut ids, &mut logprobs, &mut TopkScratch::default())?;
        Ok((ids, logprobs, log_sum))
    }

    #[test]
    fn refusals() {
        assert!(run(&[0.0, f32::NAN, 1.0], 1).is_err());
        assert!(run(&[0.0, f32::INFINITY], 1).is_err());
        assert!(run(&[f32::NEG_INFINITY; 3], 1).is_err());
        assert!(run(&[f32::NEG_INFINITY, 0.0, 1.0], 3).is_err());
        assert_eq!(run(&[f32::NEG_INFINITY, 0.0, 1.0], 2).unwrap().0, [2, 1]);
    }

    proptest! {
        #[test]
        fn equals_the_definition(steps in proptest::collection::vec(-40i32..40, 1..1500), k in 1usize..200) {
            // Coarse steps make ties.
            let logits: Vec<f32> = steps.iter().map(|&s| s as f32 * 0.25).collect();
            let k = k.min(logits.len());
            let (ids, logprobs, log_sum) = run(&logits, k).unwrap();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let exact = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            prop_assert!((log_sum - exact).abs() < 1e-5);
            for rank in 0..k {
                prop_assert_eq!(ids[rank], order[rank] as i64);
                prop_assert!((f64::from(logprobs[rank]) - (f64::from(logits[order[rank]]) - exact)).abs() < 1e-5);
            }
        }
    }
}
