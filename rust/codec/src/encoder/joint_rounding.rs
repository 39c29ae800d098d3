//! Exact values of a row rounded jointly.
//!
//! With errors eᵢ of the exact values and M the probability of everything else (approximated ids
//! and the missing outcome R), the second order of what their rounding adds to KL over K ∪ {R} is
//!
//! ```text
//! ½ (Σ pᵢeᵢ² + S²/M)      S = Σ pᵢeᵢ
//! ```
//!
//! where everything else has the probability M − S: the approximated values are shifted by −S/M,
//! which leaves R the same factor. So the errors should cancel. Each value is first rounded to
//! nearest; then values flip to their other neighbour where that costs less, the most probable
//! first. Only the first [`SEARCHED_RANKS`] ranks do, which have nearly all the probability; the
//! shift is cut off at [`LARGEST_SHIFT`]. Every exact value stays one of its two neighbours.

use super::row::{Group, LEAST_MISSING, LIKELY_PROBABILITY, MIN_LOGPROB};
use crate::float::nearest_bfloat16;
use crate::simd::lanes::{LANES, Lanes, no_unroll};

/// The ranks that may flip to their other neighbour.
const SEARCHED_RANKS: usize = 32;
/// Approximated values follow by no more than this (nats).
pub(crate) const LARGEST_SHIFT: f32 = 0.01;

/// Buffers, kept from group to group.
#[derive(Debug, Default)]
pub(crate) struct JointScratch {
    /// One for each exact rank.
    ranks: Vec<Rank>,
}

/// The exact value of one rank in each row of a group. Ids that are not likely are rounded to
/// nearest: what they cost is their error alone.
#[derive(Debug, Clone, Copy, Default)]
struct Rank {
    /// The neighbours of the value, and their errors.
    up: Lanes,
    down: Lanes,
    up_error: Lanes,
    down_error: Lanes,
    p: Lanes,
    /// 1 where `up` is stored, else 0.
    is_up: Lanes,
}

impl Rank {
    #[inline(always)]
    fn new(y: Lanes) -> Self {
        let mut up = y;
        let mut down = y;
        let mut target = y;
        for lane in 0..LANES {
            let value = y.0[lane];
            // Without the lower half of its bits a negative value is nearer to 0.
            let cut = value.to_bits() & 0xFFFF_0000;
            let nearest = nearest_bfloat16(value);
            let above = f32::from_bits(cut);
            let below = f32::from_bits(cut.wrapping_add(0x1_0000));
            // Values above 0 are a teacher's rounding. The lowest have no probability, and their
            // errors cost nothing.
            let single = (value >= 0.0) | (above == value) | (value < MIN_LOGPROB);
            target.0[lane] = if value < MIN_LOGPROB { nearest } else { value };
            up.0[lane] = if single { nearest } else { above };
            down.0[lane] = if single { nearest } else { below };
        }
        let up_error = up - target;
        let down_error = down - target;
        let is_up = positive(Lanes::ZERO - up_error - down_error);
        Self { up, down, up_error, down_error, p: y.exp(), is_up }
    }

    /// Leaves only the nearer neighbour where the other's error is larger than `allowed`, or the
    /// value not likely.
    #[inline(always)]
    fn keep_within(&mut self, allowed: Lanes) {
        let likely = Lanes::splat(LIKELY_PROBABILITY);
        let allowed = self.p.where_greater(likely, allowed, self.error().abs());
        let up_error = self.up_error;
        let down_error = self.down_error;
        let no_up = up_error - allowed;
        let no_down = Lanes::ZERO - down_error - allowed;
        self.up = no_up.where_greater(Lanes::ZERO, self.down, self.up);
        self.up_error = no_up.where_greater(Lanes::ZERO, down_error, up_error);
        self.down = no_down.where_greater(Lanes::ZERO, self.up, self.down);
        self.down_error = no_down.where_greater(Lanes::ZERO, up_error, down_error);
    }

    #[inline(always)]
    fn stored(&self) -> Lanes {
        self.is_up.where_greater(Lanes::ZERO, self.up, self.down)
    }

    #[inline(always)]
    fn error(&self) -> Lanes {
        self.is_up * self.up_error + (Lanes::splat(1.0) - self.is_up) * self.down_error
    }
}

/// 1 where x > 0, else (and where it is NaN) 0: arithmetic vectorises where choices do not.
#[inline(always)]
fn positive(x: Lanes) -> Lanes {
    (x * Lanes::splat(1e30)).max(Lanes::ZERO).min(Lanes::splat(1.0))
}

/// What joint rounding asks of the approximated values of each row.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct JointRounding {
    /// By how much they should be shifted.
    pub(crate) shift: Lanes,
    /// 1/M, the weight of S².
    pub(crate) shared: Lanes,
}

/// Fills `exact` with the stored bfloat16 values of each row's first `exact_k` ranks, row by row.
/// Errors are not above `allowed` (nats), or the largest that rounding to nearest makes of the
/// row's likely values.
#[inline(always)]
pub(crate) fn round_jointly(
    group: Group,
    exact_k: usize,
    allowed: f32,
    scratch: &mut JointScratch,
    exact: &mut Vec<f64>,
) -> JointRounding {
    let Group { logprobs, k, .. } = group;
    let row = |lane: usize| logprobs.get(lane * k..(lane + 1) * k).unwrap_or(&logprobs[..k]);
    let rows: [&[f32]; LANES] = std::array::from_fn(row);
    let JointScratch { ranks } = scratch;
    ranks.resize(exact_k, Rank::default());
    let mut mass = Lanes::ZERO;
    let mut allowed = Lanes::splat(allowed);
    for (i, rank) in ranks.iter_mut().enumerate() {
        no_unroll();
        let mut y = Lanes::ZERO;
        for (y, row) in y.0.iter_mut().zip(&rows) {
            *y = row[i];
        }
        *rank = Rank::new(y);
        mass += rank.p;
        let larger = allowed.max(rank.error().abs());
        allowed = rank.p.where_greater(Lanes::splat(LIKELY_PROBABILITY), larger, allowed);
    }
    let one = Lanes::splat(1.0);
    let shared = one / (one - mass).max(Lanes::splat(LEAST_MISSING));
    for rank in ranks.iter_mut() {
        no_unroll();
        rank.keep_within(allowed);
    }
    let next = Lanes(rows.map(|row| row.get(exact_k).copied().unwrap_or(f32::NEG_INFINITY)));
    let error = coordinate_descent(ranks, shared, next);
    exact.resize(logprobs.len() / k * exact_k, 0.0);
    for (i, rank) in ranks.iter().enumerate() {
        let stored = rank.stored();
        for (row, stored) in exact.chunks_exact_mut(exact_k).zip(stored.0) {
            row[i] = f64::from(stored);
        }
    }
    let limit = Lanes::splat(LARGEST_SHIFT);
    let shift = (Lanes::ZERO - error * shared).min(limit).max(Lanes::ZERO - limit);
    JointRounding { shift, shared }
}

/// Flips values to their other neighbour, in order of rank, where that costs a row less and keeps
/// it in order. Returns Σ p·error.
#[inline(always)]
fn coordinate_descent(ranks: &mut [Rank], shared: Lanes, next: Lanes) -> Lanes {
    let one = Lanes::splat(1.0);
    let mut sum = Lanes::ZERO;
    for rank in ranks.iter() {
        no_unroll();
        sum += rank.p * rank.error();
    }
    let mut before = Lanes::splat(f32::MAX);
    for i in 0..ranks.len().min(SEARCHED_RANKS) {
        no_unroll();
        let after = ranks.get(i + 1).map_or(next, Rank::stored);
        let rank = &mut ranks[i];
        let error = rank.error();
        let is_up = rank.is_up;
        let is_down = one - rank.is_up;
        let other = is_down * rank.up_error + is_up * rank.down_error;
        let flipped = sum + rank.p * (other - error);
        let gain =
            rank.p * (error * error - other * other) + shared * (sum * sum - flipped * flipped);
        let too_high = positive(rank.up - before);
        let too_low = positive(after - rank.down);
        let flip = positive(gain) * (one - is_down * too_high - is_up * too_low);
        rank.is_up = is_up + flip * (is_down - is_up);
        sum += flip * (flipped - sum);
        before = rank.stored();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::testing::Numbers;

    /// Log-probabilities of a row with that much probability missing.
    fn row(k: usize, missing: f64, numbers: &mut Numbers) -> Vec<f32> {
        let mut logits: Vec<f64> =
            (0..k).map(|i| -1.2 * (1.0 + i as f64).ln() - numbers.next()).collect();
        logits.sort_by(|a, b| b.total_cmp(a));
        let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let logprob = |logit: &f64| (logit - log_sum + (1.0 - missing).ln()) as f32;
        logits.iter().map(logprob).collect()
    }

    /// Twice the second order of KL over K ∪ {R} with the best shift of the approximated values, and
    /// that shift: the renormalised row's part and that of the total probability.
    fn cost(row: &[f32], stored: &[f64]) -> (f64, f64) {
        let p = |y: &f32| f64::from(*y).exp();
        let total: f64 = row.iter().map(p).sum();
        let rest: f64 = row[stored.len()..].iter().map(p).sum();
        let mut sum = 0.0;
        let mut squares = 0.0;
        for (y, stored) in row.iter().zip(stored) {
            let error = stored - f64::from(*y);
            sum += p(y) * error;
            squares += p(y) * error * error;
        }
        let of = |shift: f64| {
            let mass = sum + rest * shift;
            let renormalised = squares + rest * shift * shift - mass * mass / total;
            renormalised + mass * mass / (total * (1.0 - total))
        };
        // A parabola through three points has its least value here.
        let [low, middle, high] = [of(-1.0), of(0.0), of(1.0)];
        let best = 0.5 * (low - high) / (low + high - 2.0 * middle);
        (of(best), best)
    }

    fn round(row: &[f32], exact_k: usize, allowed: f32) -> Vec<f64> {
        jointly(row, exact_k, allowed).0
    }

    /// The stored values, and by how much the others should be shifted.
    fn jointly(row: &[f32], exact_k: usize, allowed: f32) -> (Vec<f64>, f64) {
        let mass = row.iter().map(|y| y.exp()).sum();
        let group = Group { logprobs: row, k: row.len(), masses: Lanes::splat(mass) };
        let mut scratch = JointScratch::default();
        let mut exact = Vec::new();
        let found = round_jointly(group, exact_k, allowed, &mut scratch, &mut exact);
        (exact, f64::from(found.shift.0[0]))
    }

    /// The two neighbours of a negative value.
    fn neighbours(value: f32) -> [f64; 2] {
        let cut = value.to_bits() & 0xFFFF_0000;
        [cut, cut + 0x1_0000].map(|bits| f64::from(f32::from_bits(bits)))
    }

    #[test]
    fn finds_nearly_the_best_of_all_neighbours() {
        let exact_k = 8;
        let mut numbers = Numbers(1);
        let mut nearest_cost = 0.0;
        let mut found_cost = 0.0;
        let mut best_cost = 0.0;
        for missing in [0.5, 0.2, 0.05, 0.02, 0.003, 0.001] {
            for _ in 0..100 {
                let row = row(40, missing, &mut numbers);
                let values = &row[..exact_k];
                let nearest: Vec<f64> =
                    values.iter().map(|&y| f64::from(nearest_bfloat16(y))).collect();
                let (found, shift) = jointly(&row, exact_k, 1.0);
                let limit = f64::from(LARGEST_SHIFT);
                let best = cost(&row, &found).1.clamp(-limit, limit);
                assert!((shift - best).abs() < 1e-5, "{shift} {best}");
                assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
                let either = |i: usize| {
                    let pick = |(rank, &y): (usize, &f32)| neighbours(y)[i >> rank & 1];
                    values.iter().enumerate().map(pick).collect::<Vec<f64>>()
                };
                let all = (0..1usize << exact_k).map(either);
                let ordered = all.filter(|stored| stored.is_sorted_by(|a, b| a >= b));
                let costs = ordered.map(|stored| cost(&row, &stored).0);
                best_cost += costs.fold(f64::INFINITY, f64::min);
                nearest_cost += cost(&row, &nearest).0;
                found_cost += cost(&row, &found).0;
            }
        }
        let limit = best_cost + 0.25 * (nearest_cost - best_cost);
        assert!(
            best_cost <= found_cost && found_cost < limit,
            "{best_cost} {found_cost} {nearest_cost}"
        );
    }

    #[test]
    fn many_ranks_and_ties_stay_in_order_and_values_without_probability_have_no_say() {
        let mut numbers = Numbers(3);
        for missing in [0.3, 0.01, 1e-6] {
            let mut row = row(80, missing, &mut numbers);
            let tied = row[20];
            row[20..50].fill(tied);
            let found = round(&row, 70, 1.0);
            assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
            for lowest in [-1e5, -1e21, -1e38] {
                row[60..].fill(lowest);
                let alone = [&row[..60], &[-1000.0; 20]].concat();
                let (found, shift) = jointly(&row, 70, 1.0);
                let (expected, expected_shift) = jointly(&alone, 70, 1.0);
                assert_eq!((&found[..60], shift), (&expected[..60], expected_shift));
            }
        }
    }

    #[test]
    fn rounds_to_nearest_where_no_larger_error_is_allowed() {
        let mut numbers = Numbers(2);
        let row = row(1, 0.1, &mut numbers);
        assert_eq!(round(&row, 1, 0.0), [f64::from(nearest_bfloat16(row[0]))]);
        // Nothing to choose: 0, a teacher's rounding above it, and values that are bfloat16
        // already.
        for value in [0.0, 0.003, -0.5, -90.0] {
            assert_eq!(round(&[value, -100.0], 1, 1.0), [f64::from(nearest_bfloat16(value))]);
        }
    }
}
