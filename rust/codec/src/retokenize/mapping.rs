//! The numbers of rows: probabilities of the teacher's, and the student's from what is added up to
//! what is written.

use crate::simd::doubles::{exp, ln, sum, sum_of};
use crate::simd::{Backend, multiversion};

/// A probability that every format can store.
const LEAST: f64 = 1e-30;

/// Probabilities of the student's ids while a row is computed.
#[derive(Debug)]
pub(super) struct Mapping {
    /// (V) one more than the place in `ids` and `p` of those that have one, 0 of the others.
    places: Vec<u32>,
    ids: Vec<u32>,
    p: Vec<f64>,
    /// What is written of the row, the most probable first: of positive numbers, the larger have the
    /// larger bits. Ids break ties.
    order: Vec<u64>,
}

impl Mapping {
    pub(super) fn new(known: usize) -> Self {
        let (ids, p, order) = (Vec::new(), Vec::new(), Vec::new());
        Self { places: vec![0; known], ids, p, order }
    }

    #[inline(always)]
    pub(super) fn add(&mut self, id: u32, p: f64) {
        if p > 0.0 {
            match self.places[id as usize] {
                0 => {
                    self.ids.push(id);
                    self.p.push(p);
                    self.places[id as usize] = self.ids.len() as u32;
                }
                place => self.p[place as usize - 1] += p,
            }
        }
    }

    /// Completes a row: the probabilities given something of this probability. Returns that of an
    /// id.
    pub(super) fn complete(&mut self, backend: Backend, total: f64, id: u32) -> f64 {
        // What rounding adds must not make a row sum to more than 1.
        divide(backend, &mut self.p, total);
        let own = match self.places[id as usize] {
            0 => 0.0,
            place => self.p[place as usize - 1],
        };
        self.order.clear();
        let key = |(&p, &id): (&f64, &u32)| u64::from(!(p as f32).to_bits()) << 32 | u64::from(id);
        self.order.extend(self.p.iter().zip(&self.ids).map(key));
        for id in self.ids.drain(..) {
            self.places[id as usize] = 0;
        }
        self.p.clear();
        own
    }

    /// Writes the row's most probable ids. Returns their probability and that of the id `next`, which
    /// has an even share of what is missing if it is not among them.
    pub(super) fn write(
        &mut self,
        backend: Backend,
        (ids, logprobs): (&mut [i64], &mut [f32]),
        next: u32,
    ) -> (f64, f64) {
        if self.order.len() > ids.len() {
            self.order.select_nth_unstable(ids.len());
            self.order.truncate(ids.len());
        }
        self.order.sort_unstable();
        // Those of no float32 have the highest keys.
        while self.order.last().is_some_and(|&key| probability(key) == 0.0) {
            self.order.pop();
        }
        let count = self.order.len();
        let out = (&mut ids[..count], &mut logprobs[..count]);
        let mass = write_row(backend, &self.order, out);
        if count > 0 {
            // Places without an id repeat the first one.
            let first = ids[0];
            ids[count..].fill(first);
        }
        let written = self.order.iter().position(|&key| key as u32 == next);
        let others = (self.places.len() - count).max(1) as f64;
        let even = (1.0 - mass).max(0.0) / others;
        (mass, written.map_or(even, |place| probability(self.order[place])))
    }

    /// Gives the places without an id the first ids that the row does not have, with an even share of
    /// what the others, of this probability, leave.
    pub(super) fn fill(&self, ids: &mut [i64], logprobs: &mut [f32], mass: f64) {
        let count = self.order.len();
        let even = (1.0 - mass).max(0.0) / (self.places.len() - count).max(1) as f64;
        let last = if count > 0 { logprobs[count - 1] } else { 0.0 };
        let log = (ln(even.max(LEAST)) as f32).min(last);
        // Few ids of a row are among the first.
        let mut taken: Vec<u32> = self
            .order
            .iter()
            .map(|&key| key as u32)
            .filter(|&id| (id as usize) < 2 * ids.len())
            .collect();
        taken.sort_unstable();
        let unused = (0..self.places.len() as u32).filter(|id| taken.binary_search(id).is_err());
        for (place, id) in (count..ids.len()).zip(unused) {
            (ids[place], logprobs[place]) = (i64::from(id), log);
        }
    }
}

/// The probability that a key of [`Mapping::order`] has.
#[inline(always)]
fn probability(key: u64) -> f64 {
    f64::from(f32::from_bits(!((key >> 32) as u32)))
}

multiversion! {
    /// The probabilities of rows. Coarse formats decode some rows to more than 1, which are divided
    /// by their sum.
    pub(super) fn probabilities(logprobs: &[f32], width: usize) -> Vec<f64> = probabilities_body;
}

#[inline(always)]
fn probabilities_body<I>(_isa: I, logprobs: &[f32], width: usize) -> Vec<f64> {
    let mut p = vec![0.0; logprobs.len()];
    for (p, &log) in p.iter_mut().zip(logprobs) {
        *p = exp(f64::from(log));
    }
    for row in p.chunks_exact_mut(width.max(1)) {
        let sum = sum(row);
        if sum > 1.0 {
            for p in row {
                *p /= sum;
            }
        }
    }
    p
}

multiversion! {
    /// Divides probabilities by their sum or by `total`, whichever is more.
    fn divide(p: &mut [f64], total: f64) = divide_body;
}

#[inline(always)]
fn divide_body<I>(_isa: I, p: &mut [f64], total: f64) {
    let total = total.max(sum(p));
    if total > 0.0 {
        for p in p {
            *p /= total;
        }
    }
}

multiversion! {
    /// Writes ids and log-probabilities of keys. Returns what the probabilities sum to.
    fn write_row(keys: &[u64], out: (&mut [i64], &mut [f32])) -> f64 = write_row_body;
}

#[inline(always)]
fn write_row_body<I>(_isa: I, keys: &[u64], (ids, logprobs): (&mut [i64], &mut [f32])) -> f64 {
    for ((&key, id), log) in keys.iter().zip(ids).zip(logprobs) {
        *id = i64::from(key as u32);
        // Rounded down, so that no row sums to more than 1.
        let exact = ln(probability(key));
        let rounded = exact as f32;
        let below = f32::from_bits(rounded.to_bits() + 1);
        *log = if f64::from(rounded) > exact { below } else { rounded };
    }
    sum_of(keys, |&key| probability(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Adds ids to a row and writes it.
    fn written(backend: Backend, entries: &[(u32, f64)], keep: usize) -> (Vec<i64>, Vec<u32>, f64) {
        let mut mapping = Mapping::new(100);
        for &(id, p) in entries {
            mapping.add(id, p);
        }
        mapping.complete(backend, 0.5, 3);
        let (mut ids, mut logs) = (vec![0; keep], vec![f32::NEG_INFINITY; keep]);
        let (mass, _) = mapping.write(backend, (&mut ids, &mut logs), 3);
        let stored: f64 = logs.iter().map(|&log| f64::from(log).exp()).sum();
        assert!(stored <= mass && mass < stored + 1e-6 && mass < 1.0 + 1e-7);
        (ids, logs.into_iter().map(f32::to_bits).collect(), mass)
    }

    proptest! {
        #[test]
        fn every_backend_writes_alike(
            entries in prop::collection::vec((0_u32..100, 1e-9..0.1_f64), 1..60),
            keep in 1_usize..70,
        ) {
            let expected = written(Backend::Portable, &entries, keep);
            for backend in Backend::available() {
                prop_assert_eq!(&written(backend, &entries, keep), &expected);
            }
            let logs: Vec<f32> = entries.iter().map(|&(_, p)| p.ln() as f32).collect();
            let p = probabilities(Backend::Portable, &logs, 7);
            for backend in Backend::available() {
                prop_assert_eq!(&probabilities(backend, &logs, 7), &p);
            }
        }
    }
}
