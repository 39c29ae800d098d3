//! Exact values rounded together.
//!
//! With errors eᵢ of the exact values, a move s of all approximated ones, and T their probability, the second order of what rounding costs is
//!
//! ```text
//! P·KL of the renormalised rows  ½ (Σ pᵢeᵢ² + T s² − A²/P)        A = Σ pᵢeᵢ + T s: the error of the total probability P
//! KL of the missing probability  ½ A² / (P (1 − P))
//! ```
//!
//! and a row minimises the first and [`MISSING`] times the second. Of s it is a parabola; with the best s, what is left is
//! Σ pᵢeᵢ² + K (Σ pᵢeᵢ)² with K = κ / (1 + T κ), κ = ([`MISSING`] / (1 − P) − 1) / P.
//!
//! Where K is negative (much probability is missing), errors may go in one direction together: the minimum is the rounding of the values
//! moved by some amount, which is searched for on a grid. Where it is positive (hardly any is), errors have to cancel: after the grid, values
//! change to their other neighbour, the most probable first, where that helps. Both look at the first [`JUDGES`] ranks, which have nearly all
//! the probability; s is cut off at [`LARGEST_SHIFT`]. Every exact value stays one of its two neighbours.

use crate::fit::DEEPEST;
use crate::float::nearest_bfloat16;
use crate::lanes::{LANES, Lanes, one_step};

/// What the KL of the missing probability counts beside that of the renormalised row.
const MISSING: f32 = 0.01;
/// Less missing probability than this counts as this: sums of float32 probabilities know no better.
const LEAST_MISSING: f32 = 1e-4;
/// Values are moved by up to this many times a step, in both directions.
const MOVES: usize = 6;
const MOVE: f32 = 1e-3;
/// Ranks that the moves are judged by, and that change to their other neighbour one by one.
const JUDGES: usize = 32;
/// Approximated values follow by no more (nats).
const LARGEST_SHIFT: f32 = 0.01;
/// Ids of at most this probability are rounded to nearest: what they cost is their error alone.
const LIKELY: f32 = 1e-6;

/// Buffers, kept from group to group: of each exact rank.
#[derive(Debug, Default)]
pub(crate) struct ExactScratch {
    ranks: Vec<Rank>,
}

/// An exact value of each row of a group.
#[derive(Debug, Clone, Copy, Default)]
struct Rank {
    /// Its neighbours, and their errors.
    up: Lanes,
    down: Lanes,
    up_error: Lanes,
    down_error: Lanes,
    p: Lanes,
    /// Moved by this, it is as near to the one as to the other.
    turn: Lanes,
    /// 1 where `up` is stored, else 0.
    is_up: Lanes,
}

impl Rank {
    #[inline(always)]
    fn new(y: Lanes) -> Self {
        let (mut up, mut down, mut deep) = (y, y, y);
        for lane in 0..LANES {
            // Without the lower half of its bits a negative value is nearer to 0.
            let (value, cut) = (y.0[lane], y.0[lane].to_bits() & 0xFFFF_0000);
            let nearest = nearest_bfloat16(value);
            let (above, below) = (f32::from_bits(cut), f32::from_bits(cut.wrapping_add(0x1_0000)));
            // Values above 0 are a teacher's rounding; the deepest have no probability, and their errors cost nothing.
            let single = (value >= 0.0) | (above == value) | (value < DEEPEST);
            deep.0[lane] = if value < DEEPEST { nearest } else { value };
            up.0[lane] = if single { nearest } else { above };
            down.0[lane] = if single { nearest } else { below };
        }
        let (up_error, down_error) = (up - deep, down - deep);
        let turn = Lanes::splat(0.5) * (up_error + down_error);
        let is_up = positive(Lanes::ZERO - turn);
        Self { up, down, up_error, down_error, p: y.exp(), turn, is_up }
    }

    /// Leaves only the nearer neighbour where the other's error is larger than `allowed`, or the value not likely.
    #[inline(always)]
    fn keep_within(&mut self, allowed: Lanes) {
        let allowed = self.p.where_greater(Lanes::splat(LIKELY), allowed, self.error().abs());
        let (up_error, down_error) = (self.up_error, self.down_error);
        let (no_up, no_down) = (up_error - allowed, Lanes::ZERO - down_error - allowed);
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

/// 1 where x > 0, else (and where it is NaN) 0: arithmetic becomes vectors where choices between them do not.
#[inline(always)]
fn positive(x: Lanes) -> Lanes {
    (x * Lanes::splat(1e30)).max(Lanes::ZERO).min(Lanes::splat(1.0))
}

/// By how much the approximated values of each row should be moved, and K.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Together {
    pub(crate) moved: Lanes,
    pub(crate) shared: Lanes,
}

/// Fills `exact` with the stored bfloat16 values of each row's first `exact_k` ranks, row by row. `masses` are the rows' total probabilities.
/// Errors are not above `allowed` (nats), or the largest that rounding to nearest makes of the row's likely values.
#[inline(always)]
pub(crate) fn round_together(
    logprobs: &[f32],
    k: usize,
    exact_k: usize,
    masses: Lanes,
    allowed: f32,
    scratch: &mut ExactScratch,
    exact: &mut Vec<f64>,
) -> Together {
    let row = |lane: usize| logprobs.get(lane * k..(lane + 1) * k).unwrap_or(&logprobs[..k]);
    let rows: [&[f32]; LANES] = std::array::from_fn(row);
    let ExactScratch { ranks } = scratch;
    ranks.resize(exact_k, Rank::default());
    let (mut mass, mut allowed) = (Lanes::ZERO, Lanes::splat(allowed));
    for (i, rank) in ranks.iter_mut().enumerate() {
        one_step();
        let mut y = Lanes::ZERO;
        for (y, row) in y.0.iter_mut().zip(&rows) {
            *y = row[i];
        }
        *rank = Rank::new(y);
        mass += rank.p;
        allowed = rank.p.where_greater(Lanes::splat(LIKELY), allowed.max(rank.error().abs()), allowed);
    }
    let rest = (masses - mass).max(Lanes::ZERO);
    let missing = (Lanes::splat(1.0) - masses).max(Lanes::splat(LEAST_MISSING));
    let kappa = (Lanes::splat(MISSING) / missing - Lanes::splat(1.0)) / masses;
    let shared = kappa / (Lanes::splat(1.0) + rest * kappa);
    move_together(ranks, allowed, shared);
    let next = Lanes(rows.map(|row| row.get(exact_k).copied().unwrap_or(f32::NEG_INFINITY)));
    let error = change_one_by_one(ranks, shared, next);
    exact.resize(logprobs.len() / k * exact_k, 0.0);
    for (i, rank) in ranks.iter().enumerate() {
        let stored = rank.stored();
        for (row, stored) in exact.chunks_exact_mut(exact_k).zip(stored.0) {
            row[i] = f64::from(stored);
        }
    }
    let limit = Lanes::splat(LARGEST_SHIFT);
    Together { moved: (Lanes::ZERO - error * shared).min(limit).max(Lanes::ZERO - limit), shared }
}

/// Rounds the values moved by what costs each row least, with errors within `allowed`.
#[inline(always)]
fn move_together(ranks: &mut [Rank], allowed: Lanes, shared: Lanes) {
    let judges = ranks.len().min(JUDGES);
    // Of all values rounded down; and what each adds when it is rounded up.
    let (mut sum_down, mut squares_down) = (Lanes::ZERO, Lanes::ZERO);
    let mut gains = [[Lanes::ZERO; 2]; JUDGES];
    for (i, rank) in ranks.iter_mut().enumerate() {
        one_step();
        rank.keep_within(allowed);
        if let Some([sum, squares]) = gains.get_mut(i) {
            let (down, up) = (rank.p * rank.down_error, rank.p * rank.up_error);
            (sum_down, squares_down) = (sum_down + down, squares_down + down * rank.down_error);
            (*sum, *squares) = (up - down, up * rank.up_error - down * rank.down_error);
        }
    }
    let (judges, gains) = (&ranks[..judges], &gains[..judges]);
    let (mut best, mut least) = (Lanes::ZERO, Lanes::splat(f32::INFINITY));
    for step in 0..=2 * MOVES {
        // Smaller ones first: 0, 1, −1, 2, −2, …
        let size = step.div_ceil(2) as f32 * MOVE;
        let moved = Lanes::splat(if step % 2 == 1 { size } else { -size });
        let (mut sum, mut squares) = (sum_down, squares_down);
        for (rank, [of_sum, of_squares]) in judges.iter().zip(gains) {
            one_step();
            let is_up = positive(moved - rank.turn);
            sum += is_up * *of_sum;
            squares += is_up * *of_squares;
        }
        let cost = squares + shared * sum * sum;
        best = least.where_greater(cost, moved, best);
        least = least.min(cost);
    }
    for rank in ranks {
        one_step();
        rank.is_up = positive(best - rank.turn);
    }
}

/// Changes values to their other neighbour, in order of rank, where that costs a row less and keeps it in order; returns Σ p·error.
#[inline(always)]
fn change_one_by_one(ranks: &mut [Rank], shared: Lanes, next: Lanes) -> Lanes {
    let one = Lanes::splat(1.0);
    let mut sum = Lanes::ZERO;
    for rank in ranks.iter() {
        one_step();
        sum += rank.p * rank.error();
    }
    let mut before = Lanes::splat(f32::MAX);
    for i in 0..ranks.len().min(JUDGES) {
        one_step();
        let after = ranks.get(i + 1).map_or(next, Rank::stored);
        let rank = &mut ranks[i];
        let (error, is_up, is_down) = (rank.error(), rank.is_up, one - rank.is_up);
        let other = is_down * rank.up_error + is_up * rank.down_error;
        let changed = sum + rank.p * (other - error);
        let gain = rank.p * (error * error - other * other) + shared * (sum * sum - changed * changed);
        let (too_high, too_low) = (positive(rank.up - before), positive(after - rank.down));
        let change = positive(gain) * (one - is_down * too_high - is_up * too_low);
        rank.is_up = is_up + change * (is_down - is_up);
        sum += change * (changed - sum);
        before = rank.stored();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::tests::Numbers;

    /// Log-probabilities of a row with that much probability missing.
    fn row(k: usize, missing: f64, numbers: &mut Numbers) -> Vec<f32> {
        let mut logits: Vec<f64> = (0..k).map(|i| -1.2 * (1.0 + i as f64).ln() - numbers.next()).collect();
        logits.sort_by(|a, b| b.total_cmp(a));
        let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        logits.iter().map(|logit| (logit - log_sum + (1.0 - missing).ln()) as f32).collect()
    }

    /// The cost in the module's documentation, with the approximated values moved by what is best; and what that is.
    fn cost(row: &[f32], stored: &[f64]) -> (f64, f64) {
        let p = |y: &f32| f64::from(*y).exp();
        let total: f64 = row.iter().map(p).sum();
        let rest: f64 = row[stored.len()..].iter().map(p).sum();
        let errors = || row.iter().zip(stored).map(|(y, stored)| (p(y), stored - f64::from(*y)));
        let (sum, squares) = errors().fold((0.0, 0.0), |(sum, squares), (p, e)| (sum + p * e, squares + p * e * e));
        let of = |moved: f64| {
            let mass = sum + rest * moved;
            squares + rest * moved * moved - mass * mass / total + f64::from(MISSING) * mass * mass / (total * (1.0 - total))
        };
        // A parabola through three points has its least value here.
        let (low, middle, high) = (of(-1.0), of(0.0), of(1.0));
        let best = 0.5 * (low - high) / (low + high - 2.0 * middle);
        (of(best), best)
    }

    fn round(row: &[f32], exact_k: usize, allowed: f32) -> Vec<f64> {
        together(row, exact_k, allowed).0
    }

    /// The stored values, and by how much the others should be moved.
    fn together(row: &[f32], exact_k: usize, allowed: f32) -> (Vec<f64>, f64) {
        let mut exact = Vec::new();
        let mass = row.iter().map(|y| y.exp()).sum();
        let found = round_together(row, row.len(), exact_k, Lanes::splat(mass), allowed, &mut ExactScratch::default(), &mut exact);
        (exact, f64::from(found.moved.0[0]))
    }

    #[test]
    fn finds_nearly_the_best_of_all_neighbours() {
        let (exact_k, mut numbers) = (8, Numbers(1));
        let (mut nearest_cost, mut found_cost, mut best_cost) = (0.0, 0.0, 0.0);
        for missing in [0.5, 0.2, 0.05, 0.02, 0.003, 0.001] {
            for _ in 0..100 {
                let row = row(40, missing, &mut numbers);
                let values = &row[..exact_k];
                let nearest: Vec<f64> = values.iter().map(|&y| f64::from(nearest_bfloat16(y))).collect();
                let (found, moved) = together(&row, exact_k, 1.0);
                let best = cost(&row, &found).1.clamp(-f64::from(LARGEST_SHIFT), f64::from(LARGEST_SHIFT));
                assert!((moved - best).abs() < 1e-5, "{moved} {best}");
                assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
                let either = |i: u32, rank: usize| {
                    let toward_zero = f32::from_bits(values[rank].to_bits() & 0xFFFF_0000);
                    let away = f32::from_bits((values[rank].to_bits() & 0xFFFF_0000) + 0x1_0000);
                    f64::from(if i >> rank & 1 == 0 { toward_zero } else { away })
                };
                let all = (0..1u32 << exact_k).map(|i| (0..exact_k).map(|rank| either(i, rank)).collect::<Vec<f64>>());
                let ordered = all.filter(|stored| stored.is_sorted_by(|a, b| a >= b));
                best_cost += ordered.map(|stored| cost(&row, &stored).0).fold(f64::INFINITY, f64::min);
                nearest_cost += cost(&row, &nearest).0;
                found_cost += cost(&row, &found).0;
            }
        }
        assert!(
            best_cost <= found_cost && found_cost < best_cost + 0.25 * (nearest_cost - best_cost),
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
            for deep in [-1e5, -1e21, -1e38] {
                row[60..].fill(deep);
                let alone = [&row[..60], &[-1000.0; 20]].concat();
                let ((found, moved), (expected, expected_moved)) = (together(&row, 70, 1.0), together(&alone, 70, 1.0));
                assert_eq!((&found[..60], moved), (&expected[..60], expected_moved));
            }
        }
    }

    #[test]
    fn rounds_to_nearest_where_no_larger_error_is_allowed() {
        let mut numbers = Numbers(2);
        let row = row(1, 0.1, &mut numbers);
        assert_eq!(round(&row, 1, 0.0), [f64::from(nearest_bfloat16(row[0]))]);
        // Nothing to choose: 0, a teacher's rounding above it, and values that are bfloat16 already.
        for value in [0.0, 0.003, -0.5, -90.0] {
            assert_eq!(round(&[value, -100.0], 1, 1.0), [f64::from(nearest_bfloat16(value))]);
        }
    }
}
