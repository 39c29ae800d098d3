//! Draws with replacement from the softmax of dense logits.
//!
//! A draw is a uniform number u and the first id, in the order of ids, up to which the
//! probabilities add up to more than u. The numbers of a row depend on a seed, a document and a
//! position alone ([`uniforms`]): whatever else is computed beside it, the same logits give the
//! same draws.

use crate::compact::log_share;
use crate::error::{CodecError, Result};
use crate::simd::lanes::{LANES, LEAST_EXPONENT, exp, larger};
use crate::simd::{Backend, multiversion};
use crate::tasks::{dense_task_rows, run_tasks};
use crate::topk::Logit;

/// Ids whose probabilities are added up together.
const BLOCK: usize = 128;

/// Uniform numbers in [0, 1) for the draws of consecutive positions of a document, the first of
/// which is `first`: `draws` for each position, ascending.
///
/// They are the output of `SplitMix64` from a state that is the XXH3-64 of seed, document and
/// position, each as 8 little-endian bytes: the upper 53 bits of each number, times 2⁻⁵³.
#[must_use]
pub fn uniforms(seed: u64, document: u64, first: u64, positions: usize, draws: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(positions * draws);
    let mut row = Vec::with_capacity(draws);
    for position in (first..).take(positions) {
        let mut key = [0; 24];
        for (part, number) in key.chunks_exact_mut(8).zip([seed, document, position]) {
            part.copy_from_slice(&number.to_le_bytes());
        }
        let mut state = xxhash_rust::xxh3::xxh3_64(&key);
        row.clear();
        row.extend((0..draws).map(|_| split_mix(&mut state) >> 11));
        row.sort_unstable();
        out.extend(row.iter().map(|&number| number as f64 * (0.5f64).powi(53)));
    }
    out
}

/// The next number of `SplitMix64` (Steele, Lea and Flood, 2014).
const fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Draws from softmax(logits / temperature), rows of `width`, with the uniform numbers of each row,
/// ascending, as many as draws.
///
/// Fills `ids` and `logprobs` with k places a row, the lesser of draws and width: the ids that were
/// drawn and the logarithms of their shares ([`log_share`](crate::compact::log_share)), by falling count, ids of a count
/// ascending; then the first id with −∞.
///
/// Fails with [`CodecError::Input`] on sizes that do not fit, and, naming the row, on NaN, +∞, and
/// rows without finite logits.
pub fn draw<L: Logit>(
    logits: &[L],
    width: usize,
    temperature: f64,
    uniforms: &[f64],
    ids: &mut [i64],
    logprobs: &mut [f32],
) -> Result<()> {
    let rows = logits.len() / width.max(1);
    let draws = uniforms.len() / rows.max(1);
    let k = draws.min(width);
    let fits = logits.len() == rows * width
        && uniforms.len() == rows * draws
        && ids.len() == rows * k
        && logprobs.len() == rows * k
        && u32::try_from(draws).is_ok();
    if !fits || (rows > 0 && k == 0) {
        return Err(CodecError::Input(format!(
            "{} logits in rows of {width}, {} uniform numbers, and outputs for {} ids and {} \
             log-probabilities do not fit together",
            logits.len(),
            uniforms.len(),
            ids.len(),
            logprobs.len()
        )));
    }
    if rows == 0 {
        return Ok(());
    }
    if !(temperature > 0.0 && temperature.is_finite()) {
        return Err(CodecError::Input(format!("temperature is {temperature}, must be positive")));
    }
    let backend = Backend::from_env()?;
    let task_rows = dense_task_rows(rows);
    let inputs = logits.chunks(width * task_rows).zip(uniforms.chunks(draws * task_rows));
    let outputs = ids.chunks_mut(k * task_rows).zip(logprobs.chunks_mut(k * task_rows));
    run_tasks(task_rows, inputs.zip(outputs).collect(), |task, scratch: &mut Scratch| {
        let ((logits, uniforms), (ids, logprobs)) = task;
        let outputs = ids.chunks_mut(k).zip(logprobs.chunks_mut(k));
        let rows = logits.chunks(width).zip(uniforms.chunks(draws)).zip(outputs);
        for (i, ((logits, uniforms), (ids, logprobs))) in rows.enumerate() {
            draw_row(backend, logits, 1.0 / temperature, uniforms, scratch)
                .map_err(|error| (i, error))?;
            rank(&scratch.drawn, &mut scratch.keys, ids, logprobs);
        }
        Ok(())
    })
}

/// Buffers of one row after the other.
#[derive(Debug, Default)]
struct Scratch {
    block: Vec<f32>,
    /// What the probabilities of each block add up to, times a factor.
    sums: Vec<f64>,
    drawn: Vec<u32>,
    keys: Vec<u64>,
}

multiversion! {
    /// Draws ids, ascending, into the scratch.
    fn draw_row<L: Logit>(
        logits: &[L],
        sharpness: f64,
        uniforms: &[f64],
        scratch: &mut Scratch,
    ) -> Result<()> = draw_row_body;
}

#[inline(always)]
fn draw_row_body<I, L: Logit>(
    _isa: I,
    logits: &[L],
    sharpness: f64,
    uniforms: &[f64],
    scratch: &mut Scratch,
) -> Result<()> {
    let Scratch { block: buffer, sums, drawn, .. } = scratch;
    buffer.resize(BLOCK, 0.0);
    let highest = highest(logits, buffer)?;
    let sharpness = sharpness as f32;
    sums.clear();
    let mut weights = [0.0; BLOCK];
    for block in logits.chunks(BLOCK) {
        weigh(block, highest, sharpness, buffer, &mut weights);
        let mut lanes = [0.0; LANES];
        for vector in weights.as_chunks::<LANES>().0 {
            lanes.iter_mut().zip(vector).for_each(|(sum, &weight)| *sum += f64::from(weight));
        }
        sums.push(lanes.iter().sum());
    }
    let total: f64 = sums.iter().sum();
    drawn.clear();
    let mut before = 0.0;
    for (number, (block, &sum)) in logits.chunks(BLOCK).zip(&*sums).enumerate() {
        let next = before + sum;
        let reached = uniforms[drawn.len()..].iter().take_while(|&&u| u * total < next).count();
        if reached > 0 {
            weigh(block, highest, sharpness, buffer, &mut weights);
            let targets = &uniforms[drawn.len()..drawn.len() + reached];
            within(&weights, before, total, targets, (number * BLOCK) as u32, drawn);
        }
        before = next;
    }
    // Rounding may leave the highest numbers beyond the sum: they belong to the last id.
    let missing = uniforms.len() - drawn.len();
    if missing > 0 {
        let last = logits.iter().rposition(|logit| logit.to_f32() - highest > LEAST_EXPONENT);
        drawn.extend(std::iter::repeat_n(last.unwrap_or(0) as u32, missing));
    }
    Ok(())
}

/// The highest logit.
#[inline(always)]
fn highest<L: Logit>(logits: &[L], buffer: &mut [f32]) -> Result<f32> {
    let mut highest = f32::NEG_INFINITY;
    let mut has_nan = false;
    for block in logits.chunks(BLOCK) {
        let block = L::widen(block, &mut buffer[..block.len()]);
        for &logit in block {
            highest = larger(highest, logit);
            has_nan |= logit.is_nan();
        }
    }
    if has_nan || !highest.is_finite() {
        return Err(CodecError::Input(
            "the row has logits that are NaN or infinite, or none that is finite".into(),
        ));
    }
    Ok(highest)
}

/// Probabilities of a block, times a factor; 0 after its end.
#[inline(always)]
fn weigh<L: Logit>(
    block: &[L],
    highest: f32,
    sharpness: f32,
    buffer: &mut [f32],
    weights: &mut [f32; BLOCK],
) {
    let block = L::widen(block, &mut buffer[..block.len()]);
    for (weight, &logit) in weights.iter_mut().zip(block) {
        let exponent = (logit - highest) * sharpness;
        *weight = if exponent > LEAST_EXPONENT { exp(exponent) } else { 0.0 };
    }
    weights[block.len()..].fill(0.0);
}

/// Draws from a block.
#[inline(always)]
fn within(
    weights: &[f32; BLOCK],
    before: f64,
    total: f64,
    uniforms: &[f64],
    first: u32,
    drawn: &mut Vec<u32>,
) {
    let mut sum = before;
    let mut left = uniforms;
    let mut last = first;
    for (&weight, id) in weights.iter().zip(first..) {
        if weight == 0.0 {
            continue;
        }
        sum += f64::from(weight);
        last = id;
        while let [u, rest @ ..] = left
            && u * total < sum
        {
            drawn.push(id);
            left = rest;
        }
    }
    // The sum of the block was taken in another order.
    drawn.extend(left.iter().map(|_| last));
}

/// Ids and log-probabilities of ascending draws.
fn rank(drawn: &[u32], keys: &mut Vec<u64>, ids: &mut [i64], logprobs: &mut [f32]) {
    let draws = drawn.len() as u32;
    keys.clear();
    for same in drawn.chunk_by(|a, b| a == b) {
        keys.push(u64::from(draws - same.len() as u32) << 32 | u64::from(same[0]));
    }
    keys.sort_unstable();
    for ((&key, id), logprob) in keys.iter().zip(&mut *ids).zip(&mut *logprobs) {
        *id = i64::from(key as u32);
        *logprob = log_share(draws - (key >> 32) as u32, draws);
    }
    let first = ids[0];
    ids[keys.len()..].fill(first);
    logprobs[keys.len()..].fill(f32::NEG_INFINITY);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of `SplitMix64` from state 0, as published with it.
    #[test]
    fn numbers_are_those_of_split_mix() {
        let mut state = 0;
        let found: Vec<u64> = (0..3).map(|_| split_mix(&mut state)).collect();
        assert_eq!(found, [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F]);
    }

    #[test]
    fn numbers_depend_on_seed_document_and_position_alone() {
        let whole = uniforms(1, 2, 3, 4, 5);
        assert_eq!(uniforms(1, 2, 5, 1, 5), whole[10..15]);
        assert!(uniforms(1, 2, 5, 1, 5) != uniforms(2, 2, 5, 1, 5));
        assert!(uniforms(1, 2, 5, 1, 5) != uniforms(1, 3, 5, 1, 5));
        for row in whole.chunks(5) {
            assert!(row.windows(2).all(|pair| pair[0] < pair[1]) && row[0] >= 0.0 && row[4] < 1.0);
        }
    }

    #[test]
    fn draws_are_where_the_probabilities_add_up_to_them() {
        // Over three blocks, with ids that cannot be drawn at both ends and within.
        let width = 300;
        let mut logits: Vec<f32> = (0..width).map(|i| ((i * 37 % 101) as f32) / 20.0).collect();
        for i in [0, 127, 128, 299] {
            logits[i] = f32::NEG_INFINITY;
        }
        for temperature in [0.5, 1.0, 3.0] {
            let weights: Vec<f64> =
                logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut numbers = uniforms(7, 7, 7, 1, 200);
            numbers[0] = 0.0;
            numbers[199] = 1.0 - f64::EPSILON / 2.0;
            let expected = |u: &f64| {
                let mut sum = 0.0;
                weights.iter().position(|weight| {
                    sum += weight / total;
                    sum > *u && *weight > 0.0
                })
            };
            let mut counts = vec![0u32; width];
            numbers.iter().map(expected).for_each(|id| counts[id.unwrap_or(298)] += 1);
            let (mut ids, mut logprobs) = (vec![0; 200], vec![0.0; 200]);
            draw(&logits, width, temperature, &numbers, &mut ids, &mut logprobs).expect("fits");
            let mut found = vec![0u32; width];
            for (id, logprob) in ids.iter().zip(&logprobs).filter(|pair| pair.1.is_finite()) {
                found[*id as usize] = (f64::from(logprob.exp()) * 200.0).round() as u32;
            }
            assert_eq!(found, counts);
            assert!(logprobs.windows(2).all(|pair| pair[0] >= pair[1]));
        }
    }

    #[test]
    fn rows_that_are_no_distributions_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5f32; 20];
            logits[13] = bad;
            let numbers = uniforms(0, 0, 0, 2, 3);
            let (mut ids, mut logprobs) = ([0; 6], [0.0; 6]);
            let error = draw(&logits, 10, 1.0, &numbers, &mut ids, &mut logprobs);
            assert!(error.expect_err("refused").to_string().contains("row 1"));
        }
        let (mut ids, mut logprobs) = ([0; 3], [0.0; 3]);
        let none = [f32::NEG_INFINITY; 10];
        let numbers = uniforms(0, 0, 0, 1, 3);
        assert!(draw(&none, 10, 1.0, &numbers, &mut ids, &mut logprobs).is_err());
        assert!(draw(&[0.0f32; 10], 10, 1.0, &numbers, &mut ids[..2], &mut logprobs).is_err());
        assert!(draw(&[0.0f32; 10], 10, 0.0, &numbers, &mut ids, &mut logprobs).is_err());
    }
}
