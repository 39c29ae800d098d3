//! Which levels the values of a row are stored as.

use std::array;

use super::{GROUP, Picked};
use crate::compact::model::STATES;
use crate::compact::numbers::{Kind, SYMBOLS};
use crate::compact::prior::{Dimensions, Prior};

/// Units of a bit in costs of levels.
pub(super) const LEVEL_UNITS: f32 = 1024.0;
/// No decision: costs of a state that cannot be reached.
const UNREACHED: f32 = 1e30;

/// What levels cost in bits.
#[derive(Debug)]
pub(super) struct LevelCosts {
    /// By the first of four neighbouring levels: their log-probabilities, in the order of a step.
    values: Vec<[f32; STATES]>,
    /// By table: the costs of each number of a quantiser and the next one, the even one first.
    bits: Vec<[u16; 2]>,
    /// Where `bits` has them for both quantisers, by shape and bucket of the position + 1.
    contexts: Vec<[u32; 2]>,
    /// Buckets of a shape.
    buckets: usize,
}

impl LevelCosts {
    pub(super) fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let levels = &prior.levels;
        let numbers = levels.len().div_ceil(2) as u32;
        let quadruple = |first: usize| {
            // One for each remainder by 4.
            let value = |remainder: usize| levels[first + (remainder.wrapping_sub(first) & 3)];
            REMAINDERS.map(value)
        };
        let bits = |costs: &[f32; SYMBOLS], number: u32| {
            let cost = |number: u32| (costs[Kind::Other.symbol(number)] * LEVEL_UNITS) as u16;
            let even = number.next_multiple_of(2);
            let odd = if even == number { number + 1 } else { number };
            [cost(even), cost(odd)]
        };
        let buckets = dimensions.positions;
        let context = |shape: usize, quantiser: usize, bucket: usize| {
            let table = prior.contexts.level[(shape * 2 + quantiser) * buckets + bucket];
            u32::from(table) * numbers
        };
        let contexts = (0..dimensions.shapes)
            .flat_map(|shape| (0..buckets).map(move |bucket| (shape, bucket)))
            .map(|(shape, bucket)| [0, 1].map(|half| context(shape, half, bucket)));
        Self {
            values: (0..levels.len() - 3).map(quadruple).collect(),
            bits: costs
                .iter()
                .flat_map(|costs| (0..numbers).map(|number| bits(costs, number)))
                .collect(),
            contexts: contexts.collect(),
            buckets,
        }
    }

    /// The levels that cost least in divergence and bits together, over all ways through the
    /// states of the quantiser (the Viterbi algorithm), of rows side by side.
    #[inline(always)]
    pub(super) fn quantise(&self, rows: &[Picked], trellis: &mut Trellis) {
        let length = rows.iter().map(|row| row.positions.len()).max().unwrap_or(0);
        trellis.steps.resize(length, Step::default());
        trellis.ways.resize(length, [0; GROUP]);
        trellis.levels.resize(length, [0; GROUP]);
        for (lane, row) in rows.iter().enumerate() {
            self.costs(row, lane, trellis);
        }
        trellis.run();
    }

    /// What the four levels around each value cost, each at the place of its remainder by 4. Rows
    /// end together: shorter ones stay in the first state before they begin.
    #[inline(always)]
    fn costs(&self, row: &Picked, lane: usize, trellis: &mut Trellis) {
        let contexts = &self.contexts[row.shape * self.buckets..][..self.buckets];
        let last = self.values.len() as i32 - 1;
        let waiting = trellis.steps.len() - row.positions.len();
        let (before, steps) = trellis.steps.split_at_mut(waiting);
        for Step(costs) in before {
            for (costs, remainder) in costs.iter_mut().zip(REMAINDERS) {
                costs[lane] = if remainder == 0 { 0.0 } else { UNREACHED };
            }
        }
        let firsts = &mut trellis.levels[waiting..];
        let values = row.logprobs.iter().zip(&row.weights).zip(row.scaled.iter().zip(&row.buckets));
        let steps = steps.iter_mut().zip(firsts);
        for ((Step(costs), firsts), ((&value, &weight), (&scaled, &bucket))) in steps.zip(values) {
            let first = (scaled as i32 - 1).clamp(0, last) as u32;
            firsts[lane] = first;
            // A quantiser has the even or the odd ones.
            let [even, odd] = contexts[usize::from(bucket)];
            let even = self.bits[(even + first.div_ceil(2)) as usize];
            let odd = self.bits[(odd + first / 2) as usize];
            let bits = [even[0], even[1], odd[0], odd[1]];
            let levels = &self.values[first as usize];
            let all: [f32; STATES] = array::from_fn(|i| {
                let error = levels[i] - value;
                weight * error * error + f32::from(bits[i])
            });
            for (costs, cost) in costs.iter_mut().zip(all) {
                costs[lane] = cost;
            }
        }
    }
}

/// The remainders by 4 of the levels of a step: first those of one quantiser.
const REMAINDERS: [usize; STATES] = [0, 2, 1, 3];

/// What the levels of a value cost, by remainder by 4 (in the order of [`REMAINDERS`]) and row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Step([[f32; GROUP]; STATES]);

/// The ways of rows through the states of the quantiser, side by side.
#[derive(Debug, Default)]
pub(super) struct Trellis {
    steps: Vec<Step>,
    /// By value and row: for each state a bit, whether it is reached from the second one before.
    ways: Vec<[u32; GROUP]>,
    /// The first of four neighbouring levels, then the one that is stored.
    levels: Vec<[u32; GROUP]>,
}

impl Trellis {
    /// Finds the levels.
    #[inline(always)]
    fn run(&mut self) {
        let mut paths = [[UNREACHED; GROUP]; STATES];
        paths[0] = [0.0; GROUP];
        for (Step(costs), ways) in self.steps.iter().zip(&mut self.ways) {
            // Each state is reached from two, in the order of [`back`].
            let [a, b, c, d] = paths;
            let [e, g, f, h] = costs;
            let ones = [added(&a, e), added(&c, f), added(&a, g), added(&c, h)];
            let others = [added(&b, g), added(&d, h), added(&b, e), added(&d, f)];
            let [e, f, g, h] =
                array::from_fn(|state| where_less(&others[state], &ones[state], 1 << state));
            *ways = array::from_fn(|lane| e[lane] | f[lane] | g[lane] | h[lane]);
            paths = array::from_fn(|state| lesser(&ones[state], &others[state]));
        }
        let mut states = [0u32; GROUP];
        for (lane, best) in states.iter_mut().enumerate() {
            let better = |best: usize, state: usize| {
                if paths[state][lane] < paths[best][lane] { state } else { best }
            };
            *best = (0..STATES).fold(0, better) as u32;
        }
        for (levels, ways) in self.levels.iter_mut().zip(&self.ways).rev() {
            let second: [u32; GROUP] =
                array::from_fn(|lane| ways[lane] >> (states[lane] % STATES as u32) & 1);
            let remainder: [u32; GROUP] = array::from_fn(|lane| back(states[lane], second[lane]).1);
            *levels = array::from_fn(|lane| {
                levels[lane] + (remainder[lane].wrapping_sub(levels[lane]) & 3)
            });
            states = array::from_fn(|lane| back(states[lane], second[lane]).0);
        }
    }

    /// The levels of a row.
    #[inline(always)]
    pub(super) fn levels(&self, lane: usize, count: usize, out: &mut Vec<u16>) {
        out.resize(count, 0);
        for (out, levels) in out.iter_mut().zip(&self.levels[self.levels.len() - count..]) {
            *out = levels[lane] as u16;
        }
    }
}

#[inline(always)]
fn added(a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
    array::from_fn(|lane| a[lane] + b[lane])
}

#[inline(always)]
fn lesser(a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
    array::from_fn(|lane| if b[lane] < a[lane] { b[lane] } else { a[lane] })
}

/// The bit where `a` < `b`.
#[inline(always)]
fn where_less(a: &[f32; GROUP], b: &[f32; GROUP], bit: u32) -> [u32; GROUP] {
    array::from_fn(|lane| if a[lane] < b[lane] { bit } else { 0 })
}

/// The state before, and the level's remainder by 4, on the first or second way to a state.
#[inline(always)]
const fn back(state: u32, second: u32) -> (u32, u32) {
    let quantiser = state & 1;
    let parity = second ^ (state >> 1);
    (quantiser << 1 | second, quantiser | parity << 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compact::model::NEXT;

    #[test]
    fn ways_back_are_the_ways_forward() {
        let mut ways = 0;
        for state in 0..STATES as u32 {
            for second in 0..2 {
                let (previous, remainder) = back(state, second);
                assert_eq!(previous >> 1, remainder & 1);
                let next = NEXT[previous as usize][remainder as usize >> 1];
                assert_eq!(u32::from(next), state);
                ways |= 1 << (previous * 4 + remainder);
            }
        }
        assert_eq!(ways, 0b1010_1010_0101_0101);
    }
}
