//! How close decoded rows are to those that were encoded.

use crate::error::{CodecError, Result};
use crate::simd::doubles::{LANES, exp, ln, sum, total};
use crate::simd::lanes::no_unroll;
use crate::simd::{Backend, multiversion};

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
///
/// Fails with [`CodecError::Config`] as [`Backend::from_env`] does.
pub fn compare<T: LogProb>(before: &[T], after: &[T], k: usize) -> Result<Comparison> {
    Ok(compare_rows(Backend::from_env()?, before, after, k))
}

/// A type of log-probabilities.
pub trait LogProb: Copy + Into<f64> {}
impl LogProb for f32 {}
impl LogProb for f64 {}

multiversion! {
    fn compare_rows<T: LogProb>(before: &[T], after: &[T], k: usize) -> Comparison = compare_body;
}

#[inline(always)]
fn compare_body<I, T: LogProb>(_isa: I, before: &[T], after: &[T], k: usize) -> Comparison {
    let width = k.max(1);
    let (mut p, mut q, mut ranks) = (Outcomes::new(width), Outcomes::new(width), Ranks::new(width));
    let (mut kl, mut top1, mut mass_error) = (Vec::with_capacity(before.len() / width), 0, 0.0);
    for (before, after) in before.chunks_exact(width).zip(after.chunks_exact(width)) {
        p.read(before);
        q.read(after);
        kl.push(divergence(&p, &q));
        top1 += usize::from(p.first == q.first);
        mass_error += (q.stored - p.stored).abs();
        ranks.add(&p.logs, &q.logs);
    }
    let worst_error = largest(&ranks.worst);
    Comparison { kl, top1, mass_error, worst_error, ranks: ranks.sums(k) }
}

/// Numbers that are added up, or compared, side by side.
type Lanes = [f64; LANES];

/// The lanes that `k` places take. In those beyond there is no id, so nothing looks at an end.
fn lanes_of(k: usize) -> usize {
    k.div_ceil(LANES)
}

/// Sums over the rows by rank, LANES ranks side by side.
struct Ranks {
    /// Those of [`Comparison::ranks`].
    sums: Vec<[Lanes; 4]>,
    worst: Lanes,
}

impl Ranks {
    fn new(k: usize) -> Self {
        Self { sums: vec![[[0.0; LANES]; 4]; lanes_of(k)], worst: [0.0; LANES] }
    }

    #[inline(always)]
    fn add(&mut self, before: &[Lanes], after: &[Lanes]) {
        for ((before, after), sums) in before.iter().zip(after).zip(&mut self.sums) {
            no_unroll();
            for lane in 0..LANES {
                let there = before[lane] > f64::NEG_INFINITY;
                let known = if there { before[lane] } else { 0.0 };
                let error = if there { after[lane] - before[lane] } else { 0.0 };
                sums[0][lane] += known;
                sums[1][lane] += known * known;
                sums[2][lane] += error * error;
                sums[3][lane] += if there { 1.0 } else { 0.0 };
                self.worst[lane] = larger(self.worst[lane], error.abs());
            }
        }
    }

    /// (4, `k`)
    fn sums(&self, k: usize) -> Vec<f64> {
        let of_kind = |kind| self.sums.iter().flat_map(move |sums| sums[kind]).take(k);
        (0..4).flat_map(of_kind).collect()
    }
}

/// The probabilities of a row's ids, and of all others as one more outcome.
struct Outcomes {
    /// Log-probabilities.
    logs: Vec<Lanes>,
    /// Probabilities before they are divided by `total`.
    p: Vec<Lanes>,
    /// The first place of those with the largest.
    first: usize,
    /// The probability of the stored ids.
    stored: f64,
    /// The probability of all other ids.
    missing: f64,
    /// The logarithm of what `p` is to be multiplied by.
    highest: f64,
    /// What that of all other ids is in the units of `p`.
    p_missing: f64,
    /// Of all outcomes; rounding may take it above 1.
    total: f64,
}

impl Outcomes {
    fn new(k: usize) -> Self {
        Self {
            logs: vec![[f64::NEG_INFINITY; LANES]; lanes_of(k)],
            p: vec![[0.0; LANES]; lanes_of(k)],
            first: 0,
            stored: 0.0,
            missing: 1.0,
            highest: 0.0,
            p_missing: 1.0,
            total: 1.0,
        }
    }

    #[inline(always)]
    fn read<T: LogProb>(&mut self, logs: &[T]) {
        let places = self.logs.as_flattened_mut();
        places.iter_mut().zip(logs).for_each(|(place, &log)| *place = log.into());
        let mut highest = self.logs[0];
        for logs in &self.logs[1..] {
            no_unroll();
            for lane in 0..LANES {
                highest[lane] = larger(highest[lane], logs[lane]);
            }
        }
        let highest = largest(&highest);
        let first = self.logs.as_flattened().iter().position(|&log| log == highest);
        self.first = first.unwrap_or(0);
        // Coarse formats decode some rows to more than any float holds.
        self.highest = larger(highest, 0.0);
        for (p, &log) in self.p.as_flattened_mut().iter_mut().zip(self.logs.as_flattened()) {
            *p = exp(log - self.highest);
        }
        let sum = sum(self.p.as_flattened());
        let (up, down) =
            if self.highest > 0.0 { (exp(self.highest), exp(-self.highest)) } else { (1.0, 1.0) };
        self.stored = sum * up;
        self.missing = larger(1.0 - self.stored, LEAST_MISSING);
        self.p_missing = self.missing * down;
        self.total = sum + self.p_missing;
    }
}

#[inline(always)]
fn divergence(p: &Outcomes, q: &Outcomes) -> f64 {
    let [p_missing, q_missing, p_total, q_total] = [p.missing, q.missing, p.total, q.total].map(ln);
    let scale = (q.highest + q_total) - (p.highest + p_total);
    let mut sums = [0.0; LANES];
    for (p_of, (before, after)) in p.p.iter().zip(p.logs.iter().zip(&q.logs)) {
        no_unroll();
        for lane in 0..LANES {
            let term = p_of[lane] * (before[lane] - after[lane] + scale);
            sums[lane] += if before[lane] > f64::NEG_INFINITY { term } else { 0.0 };
        }
    }
    let sum = p.p_missing * (p_missing - q_missing + scale) + total(sums);
    larger(sum / p.total, 0.0)
}

fn largest(lanes: &Lanes) -> f64 {
    lanes.iter().copied().fold(f64::NEG_INFINITY, larger)
}

/// The larger one; `a` where one is NaN.
#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
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
    let (mut values, mut found) = (vec![f32::NEG_INFINITY; wanted.len()], Vec::new());
    let rows = ids.chunks_exact(n.max(1)).zip(logprobs.chunks_exact(n.max(1)));
    let others = wanted.chunks_exact(k.max(1)).zip(stored.chunks_exact(k.max(1)));
    for (((ids, logprobs), others), values) in rows.zip(others).zip(values.chunks_mut(k.max(1))) {
        for (place, (&id, &log)) in ids.iter().zip(logprobs).enumerate() {
            // Places without an id repeat the row's first one.
            if log > f32::NEG_INFINITY {
                table[id as usize] = place as u32;
            }
        }
        let mut all = true;
        for ((&id, &log), value) in others.0.iter().zip(others.1).zip(values) {
            let place = table[id as usize] as usize;
            let (own, known) = (logprobs[place], ids[place] == id);
            let there = log > f32::NEG_INFINITY;
            let is_known = known & (own > f32::NEG_INFINITY);
            all &= is_known | !there;
            *value = if is_known & there { own } else { f32::NEG_INFINITY };
        }
        found.push(all);
    }
    Ok((values, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_compares_alike_and_by_the_definition() {
        for k in [1, 7, 8, 21] {
            let log = |i: usize| -0.7 - (i % k) as f64 - (i / k) as f64 * 0.01;
            let absent = |i: usize| k > 1 && i % k + 1 == k && i / k == 2;
            let before: Vec<f64> =
                (0..5 * k).map(|i| if absent(i) { f64::NEG_INFINITY } else { log(i) }).collect();
            let after: Vec<f64> =
                before.iter().enumerate().map(|(i, log)| log + 0.1 * (i as f64).sin()).collect();
            let found = compare_rows(Backend::Portable, &before, &after, k);
            for (row, kl) in found.kl.iter().enumerate() {
                let rows = |logs: &[f64]| {
                    let p: Vec<f64> =
                        logs[row * k..(row + 1) * k].iter().map(|x| x.exp()).collect();
                    let missing = (1.0 - p.iter().sum::<f64>()).max(LEAST_MISSING);
                    let all = [p, vec![missing]].concat();
                    let total: f64 = all.iter().sum();
                    all.into_iter().map(|p| p / total).collect::<Vec<_>>()
                };
                let both = rows(&before).into_iter().zip(rows(&after));
                let expected: f64 =
                    both.map(|(p, q)| if p > 0.0 { p * (p / q).ln() } else { 0.0 }).sum();
                assert!((kl - expected).abs() < 1e-14, "{k} {row}: {kl} {expected}");
            }
            assert_eq!(found.ranks[4 * k - 1], if k > 1 { 4.0 } else { 5.0 });
            for backend in Backend::available() {
                assert_eq!(compare_rows(backend, &before, &after, k), found, "{}", backend.name());
            }
        }
    }
}
