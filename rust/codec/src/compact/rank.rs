//! Stored rows to ids and log-probabilities by falling probability.

use super::config::MAX_K;
use super::decode::{RowSink, StoredRow};
use super::model::Model;

/// Levels below this are counted, and each takes its place by that; the few ids of all others are
/// sorted.
const LOW: u16 = 64;
/// Values are written in groups of this many: what is too much is overwritten by the next ones.
const GROUP: usize = 8;

/// Puts the rows of a document in rank order.
#[derive(Debug)]
pub(super) struct Ranking<'a> {
    model: &'a Model,
    ids: &'a mut [i64],
    logprobs: &'a mut [f32],
    /// Of one row, by position: levels, or [`LOW`] for higher ones.
    slots: Vec<u8>,
    by_position: Vec<u32>,
    /// Of one row, by rank: where it is by position, and what its level stands for.
    origins: Box<[u16; MAX_K]>,
    values: Vec<f32>,
    /// Of those with a high level: what they are sorted by, and the ids.
    keys: Vec<u32>,
    high: Vec<i64>,
}

impl<'a> Ranking<'a> {
    /// `ids` and `logprobs` have room for k numbers a row.
    pub(super) fn new(model: &'a Model, ids: &'a mut [i64], logprobs: &'a mut [f32]) -> Self {
        let k = model.config.k;
        Self {
            model,
            ids,
            logprobs,
            slots: vec![0; k],
            by_position: vec![0; k],
            origins: Box::new([0; MAX_K]),
            values: vec![0.0; k + GROUP],
            keys: Vec::with_capacity(k),
            high: Vec::with_capacity(k),
        }
    }
}

impl RowSink for Ranking<'_> {
    /// Writes a row: by falling level, ids of a level by position, then what is absent.
    #[inline(always)]
    fn row(&mut self, row: &StoredRow) {
        let Self { model, by_position, slots, origins, values, keys, high, .. } = self;
        let count = row.levels.len();
        let at = row.row * model.config.k..(row.row + 1) * model.config.k;
        let (ids, logprobs) = (&mut self.ids[at.clone()], &mut self.logprobs[at]);
        let order = &model.clusters[usize::from(row.head.cluster)].order;

        let by_position = &mut by_position[..count];
        order.ids(row.positions, &model.order, by_position);
        let slots = &mut slots[..count];
        for (slot, level) in slots.iter_mut().zip(row.levels) {
            *slot = (*level).min(LOW) as u8;
        }
        // How many ids each low level has, then where its next one goes; the others come first.
        let mut places = [0u16; 256];
        for &slot in &*slots {
            places[usize::from(slot)] += 1;
        }
        let highs = usize::from(places[usize::from(LOW)]);
        let mut occur = (0..)
            .zip(&places[..usize::from(LOW)])
            .fold(0u64, |occur, (level, &count)| occur | u64::from(count > 0) << level);
        let mut next = highs;
        let mut total = 0;
        places[usize::from(LOW)] = 0;
        while occur > 0 {
            let level = 63 - occur.leading_zeros() as usize;
            occur ^= 1 << level;
            let count = usize::from(places[level]);
            places[level] = next as u16;
            total += count as u64 * model.weights[level];
            let value = model.levels[level];
            values[next..next + GROUP].fill(value);
            if count > GROUP {
                values[next + GROUP..next + count].fill(value);
            }
            next += count;
        }
        for (origin, (&slot, &id)) in (0..).zip(slots.iter().zip(&*by_position)) {
            let place = &mut places[usize::from(slot)];
            let at = usize::from(*place);
            *place += 1;
            ids[at] = i64::from(id);
            origins[at % MAX_K] = origin;
        }

        keys.clear();
        keys.extend(
            origins[..highs]
                .iter()
                .zip(0..)
                .map(|(origin, at)| u32::from(!row.levels[usize::from(*origin)]) << 16 | at),
        );
        keys.sort_unstable();
        high.clear();
        high.extend_from_slice(&ids[..highs]);
        for (at, &key) in keys.iter().enumerate() {
            let level = usize::from(!((key >> 16) as u16));
            ids[at] = high[key as usize & 0xffff];
            values[at] = model.levels[level];
            total += model.weights[level];
        }

        let shift = model.shift(usize::from(row.head.mass), total);
        for (logprob, &value) in logprobs.iter_mut().zip(&values[..count]) {
            *logprob = (value + shift).min(0.0);
        }
        // Values stay in order: the most probable id takes the highest.
        if row.top > 0 {
            ids[..=row.top].rotate_right(1);
        }
        if count < ids.len() {
            let first = ids[0];
            ids[count..].fill(first);
            logprobs[count..].fill(f32::NEG_INFINITY);
        }
    }
}
