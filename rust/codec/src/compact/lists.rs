//! Lists of ids, packed.
//!
//! How likely an id is matters to half an octave only, so within a bucket of positions ids stand in
//! a fixed order, and a bucket is stored as the gaps of a set. That halves a prior.

use super::numbers::bucket;
use crate::error::{CodecError, Result};

/// Buckets below this position are 8 ids; from here on an octave of positions has two.
const FIRST: u32 = 16;

/// The buckets of a list: where each begins, and where it ends.
fn buckets(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let here = bucket(start as u32 + FIRST);
        let (octave, half) = (here / 2, here % 2);
        // Where the next bucket begins.
        let end = if half == 0 { 3 << (octave - 1) } else { 1 << (octave + 1) } - FIRST as usize;
        let range = start..end.min(length);
        start = range.end;
        (!range.is_empty()).then_some(range)
    })
}

/// Puts ids, the likeliest first, into an order that [`pack`] takes: each stays in its bucket,
/// where they ascend by `rank`.
pub(super) fn arrange(list: &mut [u32], rank: impl Fn(u32) -> u32) {
    for range in buckets(list.len()) {
        list[range].sort_unstable_by_key(|&id| rank(id));
    }
}

/// Whether ids are in an order that [`pack`] takes: `rank` ascends within each bucket.
pub(super) fn is_arranged(list: &[u32], rank: impl Fn(u32) -> u32) -> bool {
    buckets(list.len())
        .all(|range| list[range].windows(2).all(|pair| rank(pair[0]) < rank(pair[1])))
}

/// Appends an arranged list: each bucket as a byte r, then for each id the ranks that were left out
/// before it, g: g >> r zeros, a one, and the r low bits, in bytes filled from their lowest bit.
pub(super) fn pack(list: &[u32], rank: impl Fn(u32) -> u32, out: &mut Vec<u8>) {
    let mut gaps = Vec::new();
    for range in buckets(list.len()) {
        gaps.clear();
        let mut next = 0;
        for &id in &list[range] {
            gaps.push(rank(id) - next);
            next = rank(id) + 1;
        }
        let size = |low: u32| {
            gaps.iter().map(|&gap| u64::from(gap >> low) + 1 + u64::from(low)).sum::<u64>()
        };
        let low = (0..24).min_by_key(|&low| size(low)).unwrap_or(0);
        out.push(low as u8);
        let mut bits = BitWriter { out, buffer: 0, held: 0 };
        for &gap in &gaps {
            for _ in 0..gap >> low {
                bits.put(0, 1);
            }
            bits.put(1, 1);
            bits.put(gap & ((1 << low) - 1), low);
        }
        bits.end();
    }
}

/// Reads `length` ids; `order` has the id of each rank. `data` is left with what follows.
///
/// Fails with [`CodecError::Corrupt`].
pub(super) fn unpack(
    data: &mut &[u8],
    length: usize,
    order: impl Fn(u32) -> Option<u32>,
) -> Result<Vec<u32>> {
    let mut list = Vec::new();
    for range in buckets(length) {
        let ended = || CodecError::Corrupt("prior: a list ends early".to_owned());
        let (&low, rest) = data.split_first().ok_or_else(ended)?;
        if low >= 24 {
            return Err(CodecError::Corrupt(format!(
                "prior: a list has {low} low bits, expected at most 23"
            )));
        }
        let mut bits = BitReader { data: rest, read: 0 };
        let mut next = 0u32;
        for _ in range {
            let mut high = 0u32;
            while bits.take(1).ok_or_else(ended)? == 0 {
                high += 1;
            }
            let gap =
                u64::from(high) << low | u64::from(bits.take(u32::from(low)).ok_or_else(ended)?);
            let rank = u64::from(next) + gap;
            let id = u32::try_from(rank).ok().filter(|&rank| rank < u32::MAX).and_then(&order);
            list.push(id.ok_or_else(|| {
                CodecError::Corrupt(format!("prior: a list has rank {rank}, which no id has"))
            })?);
            next = rank as u32 + 1;
        }
        *data = &rest[bits.read.div_ceil(8)..];
    }
    Ok(list)
}

struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    buffer: u64,
    held: u32,
}

impl BitWriter<'_> {
    fn put(&mut self, value: u32, bits: u32) {
        self.buffer |= u64::from(value) << self.held;
        self.held += bits;
        while self.held >= 8 {
            self.out.push(self.buffer as u8);
            self.buffer >>= 8;
            self.held -= 8;
        }
    }

    fn end(self) {
        if self.held > 0 {
            self.out.push(self.buffer as u8);
        }
    }
}

struct BitReader<'a> {
    data: &'a [u8],
    read: usize,
}

impl BitReader<'_> {
    fn take(&mut self, bits: u32) -> Option<u32> {
        let mut value = 0;
        for place in 0..bits {
            let byte = *self.data.get(self.read / 8)?;
            value |= u32::from(byte >> (self.read % 8) & 1) << place;
            self.read += 1;
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every id once, in an order without a pattern.
    fn shuffled(count: u32, factor: u32) -> Vec<u32> {
        (0..count).map(|place| (place * factor + 17) % count).collect()
    }

    fn ranks(order: &[u32]) -> Vec<u32> {
        let mut ranks = vec![0; order.len()];
        order.iter().enumerate().for_each(|(rank, &id)| ranks[id as usize] = rank as u32);
        ranks
    }

    #[test]
    fn buckets_cover_a_list() {
        let ends: Vec<usize> = buckets(100).map(|range| range.end).collect();
        assert_eq!(ends, [8, 16, 32, 48, 80, 100]);
        assert_eq!(buckets(0).count(), 0);
        assert_eq!(buckets(1).next(), Some(0..1));
    }

    #[test]
    fn a_list_comes_back_with_what_follows_it() {
        let order = shuffled(5003, 1999);
        let rank = ranks(&order);
        for length in [0, 1, 7, 8, 9, 100, 5003] {
            let likeliest = shuffled(5003, 31);
            let mut list = likeliest[..length].to_vec();
            arrange(&mut list, |id| rank[id as usize]);
            assert!(is_arranged(&list, |id| rank[id as usize]));
            let distance = list.iter().enumerate().map(|(place, id)| {
                likeliest.iter().position(|other| other == id).unwrap_or(0).abs_diff(place)
            });
            assert!(distance.max().unwrap_or(0) <= length / 3 + 8);
            let mut bytes = Vec::new();
            pack(&list, |id| rank[id as usize], &mut bytes);
            bytes.extend([1, 2, 3]);
            let mut left = bytes.as_slice();
            let read = unpack(&mut left, length, |rank| order.get(rank as usize).copied());
            assert_eq!((read.as_deref(), left), (Ok(list.as_slice()), [1, 2, 3].as_slice()));
        }
    }

    #[test]
    fn damage_is_an_error_or_another_list() {
        let mut list = shuffled(997, 31)[..200].to_vec();
        arrange(&mut list, |id| id);
        let mut bytes = Vec::new();
        pack(&list, |id| id, &mut bytes);
        let known = |rank| (rank < 997).then_some(rank);
        for end in 0..bytes.len() {
            assert!(unpack(&mut &bytes[..end], 200, known).is_err());
        }
        for bit in 0..8 * bytes.len() {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = unpack(&mut damaged.as_slice(), 200, known) {
                assert!(is_arranged(&other, |id| id) && other.iter().all(|&id| id < 997));
            }
        }
    }
}
