//! Ids and log-probabilities of sixteen rows by falling probability.

use std::array;
use std::ops::Range;

use super::vectors::flat;
use super::{Group, Key, Numbers, Vectors};
use crate::compact::document::LANES;
use crate::compact::model::{Model, WEIGHT_HALF};
use crate::compact::rank::fill;

/// Writes the rows of a group: by falling level, ids of a level by position, then what is absent.
/// There is room for all rows of the document in `ids` and `logprobs`.
#[inline(always)]
pub(in crate::compact) fn rank<I: Vectors>(
    isa: I,
    model: &Model,
    group: &mut Group,
    ids: &mut [i64],
    logprobs: &mut [f32],
) {
    sort(isa, group.padded_keys());
    let totals = totals(isa, model, group);
    let k = model.config.k;
    let rows: [Row; LANES] = array::from_fn(|lane| {
        if lane >= group.used {
            return Row::default();
        }
        let begin = group.rows[lane] * k;
        let places = begin..begin + group.counts.0[lane] as usize;
        Row { places, shift: model.shift(usize::from(group.heads[lane].mass), totals[lane]) }
    });
    let low = isa.low(&model.level_bits);
    for rank in (0..group.steps).step_by(LANES) {
        let keys = transposed(isa, &group.keys[rank..group.steps]);
        for (lane, (key, row)) in keys.iter().zip(&rows).enumerate() {
            let places = row.places.start + rank..row.places.end;
            if places.is_empty() {
                continue;
            }
            let key = isa.load(key);
            let place = isa.left(Key::step(isa, key), isa.splat(LANES.ilog2()));
            let found = isa.gather(flat(&group.ids), isa.add(place, isa.splat(lane as u32)));
            let levels = isa.gather_low(&model.level_bits, &low, Key::level(isa, key));
            let values = isa.shifted(levels, row.shift);
            let (ids, logprobs) = (&mut ids[places.clone()], &mut logprobs[places]);
            if let (Some(ids), Some(logprobs)) = (ids.first_chunk_mut(), logprobs.first_chunk_mut())
            {
                isa.store_ids(found, ids);
                isa.store_floats(values, logprobs);
            } else {
                let (mut last_ids, mut last_logprobs) = ([0; LANES], [0.0; LANES]);
                isa.store_ids(found, &mut last_ids);
                isa.store_floats(values, &mut last_logprobs);
                ids.copy_from_slice(&last_ids[..ids.len()]);
                logprobs.copy_from_slice(&last_logprobs[..logprobs.len()]);
            }
        }
    }
    for (lane, row) in rows.iter().enumerate().take(group.used) {
        let places = row.places.start..row.places.start + k;
        let (ids, logprobs) = (&mut ids[places.clone()], &mut logprobs[places]);
        // Values stay in order: the most probable id takes the highest.
        if group.tops[lane] > 0 {
            ids[..=group.tops[lane]].rotate_right(1);
        }
        fill(ids, logprobs, row.places.len());
    }
}

/// Where a row's ids go, and what is added to its levels.
#[derive(Default)]
struct Row {
    places: Range<usize>,
    shift: f32,
}

/// The keys of up to sixteen ranks, those of a lane together.
#[inline(always)]
fn transposed<I: Vectors>(isa: I, keys: &[Numbers]) -> [Numbers; LANES] {
    let mut out = [Numbers::default(); LANES];
    if let Some(keys) = keys.first_chunk() {
        isa.transpose(keys, &mut out);
    } else {
        let mut last = [Numbers::default(); LANES];
        last[..keys.len()].copy_from_slice(keys);
        isa.transpose(&last, &mut out);
    }
    out
}

/// The sum of each lane's probabilities.
#[inline(always)]
fn totals<I: Vectors>(isa: I, model: &Model, group: &Group) -> [u64; LANES] {
    /// As many numbers below 2²⁵ have a sum below 2³².
    const MOST: usize = 1 << 7;
    let mut totals = [0u64; LANES];
    let [low, high] = &model.weight_halves;
    let (first_low, first_high) = (isa.low(low), isa.low(high));
    for keys in group.keys[..group.steps].chunks(MOST) {
        let mut sums = [isa.splat(0); 2];
        for key in keys {
            let level = Key::level(isa, isa.load(key));
            sums[0] = isa.add(sums[0], isa.gather_low(low, &first_low, level));
            sums[1] = isa.add(sums[1], isa.gather_low(high, &first_high, level));
        }
        let mut halves = [Numbers::default(); 2];
        isa.store(sums[0], &mut halves[0]);
        isa.store(sums[1], &mut halves[1]);
        for (lane, total) in totals.iter_mut().enumerate() {
            let [low, high] = halves.map(|half| u64::from(half.0[lane]));
            *total += low + (high << WEIGHT_HALF);
        }
    }
    // An absent id counts as one of the lowest level.
    for (total, &count) in totals.iter_mut().zip(&group.counts.0) {
        *total -= (group.steps as u64 - u64::from(count)) * model.weights[0];
    }
    totals
}

/// Keys that are sorted in registers.
const BLOCK: usize = 8;

/// Orders pairs of keys in turn, in registers.
macro_rules! exchange {
    ($isa:ident, $keys:expr, $($i:literal $j:literal),+) => {{
        let keys = $keys;
        let mut vectors = keys.each_ref().map(|key| $isa.load(key));
        $(
            let (a, b) = (vectors[$i], vectors[$j]);
            (vectors[$i], vectors[$j]) = ($isa.min(a, b), $isa.max(a, b));
        )+
        keys.into_iter().zip(vectors).for_each(|(key, vector)| $isa.store(vector, key));
    }};
}

/// Sorts the keys of each lane, the number of which is a power of two and at least [`BLOCK`]: merges
/// sorted runs by bitonic networks (Batcher 1968), all runs ascending, two stages a pass or more.
#[inline(always)]
fn sort<I: Vectors>(isa: I, keys: &mut [Numbers]) {
    for keys in keys.as_chunks_mut::<BLOCK>().0 {
        exchange!(isa, keys.each_mut(), 0 2, 1 3, 4 6, 5 7, 0 4, 1 5, 2 6, 3 7, 0 1, 2 3, 4 5, 6 7,
            2 4, 3 5, 1 4, 3 6, 1 2, 3 4, 5 6);
    }
    let mut run = BLOCK;
    while run < keys.len() {
        for runs in keys.chunks_exact_mut(2 * run) {
            // The second run is read backwards.
            let [first, second, third, fourth] = quarters(runs);
            let backwards = third.iter_mut().rev().zip(fourth.iter_mut().rev());
            for ((a, b), (c, d)) in first.iter_mut().zip(second).zip(backwards) {
                exchange!(isa, [a, b, c, d], 0 3, 1 2, 0 1, 2 3);
            }
        }
        let mut distance = run / 4;
        while distance > BLOCK {
            for parts in keys.chunks_exact_mut(2 * distance) {
                let [first, second, third, fourth] = quarters(parts);
                let others = third.iter_mut().zip(fourth);
                for ((a, b), (c, d)) in first.iter_mut().zip(second).zip(others) {
                    exchange!(isa, [a, b, c, d], 0 2, 1 3, 0 1, 2 3);
                }
            }
            distance /= 4;
        }
        if distance == BLOCK {
            for parts in keys.chunks_exact_mut(2 * BLOCK) {
                let (first, second) = parts.split_at_mut(BLOCK);
                for (a, b) in first.iter_mut().zip(second) {
                    exchange!(isa, [a, b], 0 1);
                }
            }
        }
        for keys in keys.as_chunks_mut::<BLOCK>().0 {
            exchange!(isa, keys.each_mut(), 0 4, 1 5, 2 6, 3 7, 0 2, 1 3, 4 6, 5 7, 0 1, 2 3, 4 5,
                6 7);
        }
        run *= 2;
    }
}

/// Four parts, as long as each other.
#[inline(always)]
fn quarters(keys: &mut [Numbers]) -> [&mut [Numbers]; 4] {
    let (low, high) = keys.split_at_mut(keys.len() / 2);
    let (first, second) = low.split_at_mut(low.len() / 2);
    let (third, fourth) = high.split_at_mut(high.len() / 2);
    [first, second, third, fourth]
}
