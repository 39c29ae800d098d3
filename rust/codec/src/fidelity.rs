//! How close decoded rows are to those that were encoded.

use crate::error::{CodecError, Result};

/// The least missing probability that is told from none.
const LEAST_MISSING: f64 = 1e-12;

/// What comparing rows of `k` ids gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// (R) KL(p ‖ p̂) in nats over the ids of a row and all others together.
    pub kl: Vec<f64>,
    /// Rows whose most probable id is still that.
    pub top1: usize,
    /// Σ |Σ p̂ − Σ p| over the rows.
    pub mass_error: f64,
    /// The largest error of a log-probability.
    pub worst_error: f64,
    /// (4, `k`) by rank: sums of log-probabilities, of their squares and of the squares of their
    /// errors, and the number of rows that have an id there.
    pub ranks: Vec<f64>,
}

/// Compares rows of `k` log-probabilities of the same ids, −inf at places without an id.
#[must_use]
pub fn compare(before: &[f64], after: &[f64], k: usize) -> Comparison {
    let mut found = Comparison {
        kl: Vec::with_capacity(before.len() / k.max(1)),
        top1: 0,
        mass_error: 0.0,
        worst_error: 0.0,
        ranks: vec![0.0; 4 * k],
    };
    let (mut p, mut q) = (Outcomes::new(k), Outcomes::new(k));
    for (before, after) in before.chunks_exact(k.max(1)).zip(after.chunks_exact(k.max(1))) {
        p.read(before);
        q.read(after);
        found.kl.push(divergence(&p, before, &q, after));
        found.top1 += usize::from(first_largest(before) == first_largest(after));
        found.mass_error += (q.stored - p.stored).abs();
        found.add_ranks(before, after);
    }
    found
}

impl Comparison {
    fn add_ranks(&mut self, before: &[f64], after: &[f64]) {
        let (sums, rest) = self.ranks.split_at_mut(before.len());
        let (squares, rest) = rest.split_at_mut(before.len());
        let (errors, counts) = rest.split_at_mut(before.len());
        for (place, (&before, &after)) in before.iter().zip(after).enumerate() {
            if before > f64::NEG_INFINITY {
                let error = after - before;
                sums[place] += before;
                squares[place] += before * before;
                errors[place] += error * error;
                counts[place] += 1.0;
                self.worst_error = self.worst_error.max(error.abs());
            }
        }
    }
}

/// The probabilities of a row's ids, and of all others as one more outcome.
struct Outcomes {
    /// (k) before they are divided by `total`.
    p: Vec<f64>,
    /// The same of all other ids.
    missing: f64,
    /// The logarithm of their probability.
    log_missing: f64,
    /// The probability of the stored ids.
    stored: f64,
    /// Of all outcomes; rounding may take it above 1.
    total: f64,
    /// The logarithm of what all outcomes sum to.
    log_total: f64,
}

impl Outcomes {
    fn new(k: usize) -> Self {
        let p = vec![0.0; k];
        Self { p, missing: 0.0, log_missing: 0.0, stored: 0.0, total: 1.0, log_total: 0.0 }
    }

    fn read(&mut self, logs: &[f64]) {
        // Coarse formats decode some rows to more than any float holds.
        let highest = logs.iter().copied().fold(0.0, f64::max);
        for (p, log) in self.p.iter_mut().zip(logs) {
            *p = (log - highest).exp();
        }
        let sum: f64 = self.p.iter().sum();
        self.stored = sum * highest.exp();
        let missing = (1.0 - self.stored).max(LEAST_MISSING);
        self.missing = missing * (-highest).exp();
        self.log_missing = missing.ln();
        self.total = sum + self.missing;
        self.log_total = highest + self.total.ln();
    }
}

fn divergence(p: &Outcomes, before: &[f64], q: &Outcomes, after: &[f64]) -> f64 {
    let scale = q.log_total - p.log_total;
    let mut sum = p.missing * (p.log_missing - q.log_missing + scale);
    for (&p, (&before, &after)) in p.p.iter().zip(before.iter().zip(after)) {
        if before > f64::NEG_INFINITY {
            sum += p * (before - after + scale);
        }
    }
    (sum / p.total).max(0.0)
}

fn first_largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (place, &value) in values.iter().enumerate() {
        if value > values[best] {
            best = place;
        }
    }
    best
}

/// Looks up what rows of `n` ids have for the ids of others, of `k` ids.
///
/// Returns the log-probabilities (R, `k`), −inf at places without an id and of ids that the row does
/// not have; and of each row, whether it has all.
pub fn values_of(
    (ids, logprobs, n): (&[i64], &[f32], usize),
    (wanted, stored, k): (&[i64], &[f32], usize),
) -> Result<(Vec<f32>, Vec<bool>)> {
    let highest = ids.iter().chain(wanted).copied().max().unwrap_or(0);
    if ids.iter().chain(wanted).any(|&id| !(0..i64::from(u32::MAX)).contains(&id)) {
        return Err(CodecError::Input(format!("ids up to {highest}, expected 0 to {}", u32::MAX)));
    }
    // What an id that is not among a row's finds in the table has another id.
    let mut table = vec![0_u32; highest as usize + 1];
    let (mut values, mut found) = (Vec::with_capacity(wanted.len()), Vec::new());
    let rows = ids.chunks_exact(n.max(1)).zip(logprobs.chunks_exact(n.max(1)));
    let others = wanted.chunks_exact(k.max(1)).zip(stored.chunks_exact(k.max(1)));
    for ((ids, logprobs), (wanted, stored)) in rows.zip(others) {
        for (place, (&id, &log)) in ids.iter().zip(logprobs).enumerate() {
            // Places without an id repeat the row's first one.
            if log > f32::NEG_INFINITY {
                table[id as usize] = place as u32;
            }
        }
        let mut all = true;
        for (&id, &log) in wanted.iter().zip(stored) {
            let place = table[id as usize] as usize;
            let known = ids[place] == id && logprobs[place] > f32::NEG_INFINITY;
            let there = log > f32::NEG_INFINITY;
            all &= known || !there;
            values.push(if known && there { logprobs[place] } else { f32::NEG_INFINITY });
        }
        found.push(all);
    }
    Ok((values, found))
}
