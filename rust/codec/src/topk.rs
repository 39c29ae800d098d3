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
    let highest = maximum(row);
    let sum = sum_exp(row, highest);
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

const LANES: usize = 16;

/// The largest logit; NaN is passed over here and found in [`sum_exp`].
fn maximum(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.into_iter().fold(rest, larger)
}

/// Σ exp(logit − highest), NaN if a logit is. Float32 sums of 16 lanes over 1,024 logits at a time, then float64.
fn sum_exp(row: &[f32], highest: f32) -> f64 {
    let mut total = 0.0;
    for block in row.chunks(1024) {
        let mut lanes = [0.0f32; LANES];
        let chunks = block.chunks_exact(LANES);
        let rest: f32 = chunks.remainder().iter().map(|logit| exp_of_negative(logit - highest)).sum();
        for chunk in chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp_of_negative(logit - highest);
            }
        }
        total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>() + f64::from(rest);
    }
    total
}

/// eˣ for x ≤ 0 with a relative error below 2e-7, 0 below −87 and for −∞, NaN for NaN.
///
/// eˣ = 2ⁿ·eʳ with n the integer nearest to x / ln 2 and |r| ≤ ln 2 / 2, and the Taylor polynomial of eʳ up to r⁷. Plain arithmetic without
/// branches: it vectorises, and gives the same bits on every machine.
#[inline]
fn exp_of_negative(x: f32) -> f32 {
    /// Adding and subtracting this rounds to an integer, which is then in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let inside = if x < -87.0 { -87.0 } else { x };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN2_HIGH - n * LN2_LOW;
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127).wrapping_shl(23));
    if x < -87.0 { 0.0 } else { sum * power }
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
    fn exp_is_close() {
        for i in 0..200_000 {
            let x = -87.0 * (i as f32 / 200_000.0);
            let exact = f64::from(x).exp();
            assert!((f64::from(exp_of_negative(x)) / exact - 1.0).abs() < 2e-7, "{x}");
        }
        assert_eq!(exp_of_negative(-1e30).to_bits(), 0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY).to_bits(), 0);
        assert!(exp_of_negative(f32::NAN).is_nan());
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
