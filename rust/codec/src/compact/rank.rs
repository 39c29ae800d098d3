//! Stored rows to ids and log-probabilities by falling probability.

use std::array;

#[cfg(target_arch = "x86_64")]
use super::decode::Source;
use super::decode::{RowSink, StoredRow};
use super::model::Model;
#[cfg(target_arch = "x86_64")]
use super::wide::{self, Group, Vectors};

/// Levels below this are counted, and each takes its place by that; the few ids of all others are
/// sorted.
const LOW: u16 = 64;
/// A row is counted in this many parts: an id does not wait for the count of the one before it.
const PARTS: usize = 4;

/// Puts the rows of a document in rank order.
#[derive(Debug)]
pub(super) struct Ranking<'a> {
    model: &'a Model,
    ids: &'a mut [i64],
    logprobs: &'a mut [f32],
    /// Of those with a high level: what they are sorted by.
    keys: Vec<u32>,
}

impl<'a> Ranking<'a> {
    /// `ids` and `logprobs` have room for k numbers a row.
    pub(super) fn new(model: &'a Model, ids: &'a mut [i64], logprobs: &'a mut [f32]) -> Self {
        let k = model.config.k;
        Self { model, ids, logprobs, keys: vec![0; k + 1] }
    }
}

impl RowSink for Ranking<'_> {
    /// Writes a row: by falling level, ids of a level by position, then what is absent.
    #[inline(always)]
    fn row(&mut self, row: &StoredRow) {
        let Self { model, keys, .. } = self;
        let count = row.levels.len();
        let at = row.row * model.config.k..(row.row + 1) * model.config.k;
        let (ids, logprobs) = (&mut self.ids[at.clone()], &mut self.logprobs[at]);
        let (mut places, highs) = count_levels(row.levels, keys);
        let keys = &mut keys[..highs];
        keys.sort_unstable();
        let high_level = |key: u32| usize::from(!((key >> 16) as u16));
        let high_weights = keys.iter().map(|&key| model.weights[high_level(key)]);
        let total = high_weights.sum::<u64>() + to_places(&mut places, highs, &model.weights);
        let shift = model.shift(usize::from(row.head.mass), total);
        let mut values = [0f32; LOW as usize + 1];
        for (value, &level) in values.iter_mut().zip(&model.levels) {
            *value = (level + shift).min(0.0);
        }
        each(row.levels, |i, part, level| {
            let level = usize::from(level.min(LOW));
            let place = &mut places[level][part];
            let at = usize::from(*place);
            *place += 1;
            ids[at] = i64::from(row.ids[i]);
            logprobs[at] = values[level];
        });
        for (at, &key) in keys.iter().enumerate() {
            ids[at] = i64::from(row.ids[key as usize & 0xffff]);
            logprobs[at] = (model.levels[high_level(key)] + shift).min(0.0);
        }
        // Values stay in order: the most probable id takes the highest.
        if row.top > 0 {
            ids[..=row.top].rotate_right(1);
        }
        fill(ids, logprobs, count);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn group<I: Vectors>(&mut self, isa: I, _source: &Source, group: &mut Group) {
        wide::rank(isa, self.model, group, self.ids, self.logprobs);
    }
}

/// Fills the places of a row that has fewer ids.
#[inline(always)]
pub(super) fn fill(ids: &mut [i64], logprobs: &mut [f32], count: usize) {
    if count < ids.len() {
        let first = ids[0];
        ids[count..].fill(first);
        logprobs[count..].fill(f32::NEG_INFINITY);
    }
}

/// Numbers of each level and part; the last level stands for all high ones.
type Places = [[u16; PARTS]; LOW as usize + 1];

/// Calls a function with the index, the part and the level of every id; those of a part in order,
/// and one of each part in turn.
#[inline(always)]
fn each(levels: &[u16], mut call: impl FnMut(usize, usize, u16)) {
    let length = levels.len() / PARTS;
    let (whole, rest) = levels.split_at(PARTS * length);
    let parts: [&[u16]; PARTS] = array::from_fn(|part| &whole[part * length..(part + 1) * length]);
    for i in 0..length {
        for (part, levels) in parts.iter().enumerate() {
            call(part * length + i, part, levels[i]);
        }
    }
    for (i, &level) in rest.iter().enumerate() {
        call(PARTS * length + i, PARTS - 1, level);
    }
}

/// How many ids there are of each level and part, and how many have a high one: these are the first
/// of `keys`, which has room for all and one more.
#[inline(always)]
fn count_levels(levels: &[u16], keys: &mut [u32]) -> (Places, usize) {
    let mut counts: Places = [[0; PARTS]; LOW as usize + 1];
    let mut highs = 0;
    each(levels, |i, part, level| {
        counts[usize::from(level.min(LOW))][part] += 1;
        keys[highs] = u32::from(!level) << 16 | i as u32;
        highs += usize::from(level >= LOW);
    });
    (counts, highs)
}

/// Replaces counts by the rank of the first id: high levels first. Returns the sum of all
/// probabilities of low levels.
#[inline(always)]
fn to_places(counts: &mut Places, highs: usize, weights: &[u64]) -> u64 {
    // Four numbers of 16 bits in one: a product with ONES adds to each those below it.
    const ONES: u64 = 0x0001_0001_0001_0001;
    let (mut next, mut total) = (highs as u64 * ONES, 0);
    for (counts, &weight) in counts[..usize::from(LOW)].iter_mut().zip(weights).rev() {
        let own =
            u64::from_le_bytes(array::from_fn(|byte| counts[byte / 2].to_le_bytes()[byte % 2]));
        let up_to = own.wrapping_mul(ONES);
        let first = next.wrapping_add(up_to).wrapping_sub(own);
        *counts = array::from_fn(|part| (first >> (16 * part)) as u16);
        let all = up_to >> 48;
        next = next.wrapping_add(all.wrapping_mul(ONES));
        total += all * weight;
    }
    counts[usize::from(LOW)] = [0; PARTS];
    total
}
