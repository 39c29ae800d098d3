//! The bytes of tokens, and whether two tokens of a BPE stay apart when they meet.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU32;

use crate::error::{CodecError, Result};

/// A hash map of integers.
pub(super) type IntMap<V> = HashMap<u64, V, BuildHasherDefault<Mix>>;

/// Hashes one integer by a multiplication.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

/// The bytes of each id.
#[derive(Debug, Clone)]
pub struct Strings {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Strings {
    /// All bytes, and where those of each id end.
    pub fn new(bytes: Vec<u8>, ends: &[i64]) -> Result<Self> {
        let ends: Vec<usize> = ends.iter().map(|&end| end as usize).collect();
        if !ends.is_sorted() || ends.last().copied().unwrap_or(0) != bytes.len() {
            return Err(CodecError::Input("the ends of strings do not divide their bytes".into()));
        }
        Ok(Self { bytes, ends })
    }

    /// Number of ids.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no id.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }
}

/// The merges of a BPE tokenizer.
#[derive(Debug)]
pub struct Merges {
    /// The rank of each merge, by its two tokens.
    ranks: IntMap<u32>,
    /// The first part of each token, which is merged of two, and the rank of that merge.
    firsts: Vec<Option<Part>>,
    /// The last part, and the same.
    lasts: Vec<Option<Part>>,
    /// A bit for the hash of each pair that has a rank. It tells most that have none in a cache's
    /// size; the ranks are all over the memory.
    ranked: Vec<u64>,
}

/// A part of a token, and one more than the rank of the merge that made the token.
type Part = (u32, NonZeroU32);

/// Bits for each pair in `Merges::ranked`, at least.
const RANKED_BITS: usize = 8;

impl Merges {
    /// Merges in the order of their ranks: left, right and merged token, of `ids` ids.
    pub(super) fn new(ids: usize, merges: &[(u32, u32, u32)]) -> Self {
        let words = (RANKED_BITS * merges.len()).next_power_of_two().div_ceil(64);
        let (firsts, lasts) = (vec![None; ids], vec![None; ids]);
        let mut made = Self { ranks: IntMap::default(), firsts, lasts, ranked: vec![0; words] };
        made.ranks.reserve(merges.len());
        for (rank, &(left, right, _)) in merges.iter().enumerate() {
            let (word, bit) = made.ranked_bit(pair(left, right));
            made.ranked[word] |= bit;
            made.ranks.entry(pair(left, right)).or_insert(rank as u32);
        }
        for (&(left, right, merged), next) in merges.iter().zip(1..) {
            // Of several pairs that would make a token, the first makes it whose parts can meet.
            if made.firsts[merged as usize].is_none() && made.apart(left, right, next - 1) {
                made.firsts[merged as usize] = NonZeroU32::new(next).map(|next| (left, next));
                made.lasts[merged as usize] = NonZeroU32::new(next).map(|next| (right, next));
            }
        }
        made
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> Option<u32> {
        let key = pair(left, right);
        let (word, bit) = self.ranked_bit(key);
        if self.ranked[word] & bit == 0 { None } else { self.ranks.get(&key).copied() }
    }

    /// The word and the bit of a pair in `ranked`, which has a power of two of words.
    #[inline]
    fn ranked_bit(&self, key: u64) -> (usize, u64) {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (hash as usize >> 6 & (self.ranked.len() - 1), 1 << (hash & 63))
    }

    /// Whether no merge joins two tokens that meet, before the merge of rank `limit`.
    ///
    /// Merges happen in the order of their ranks, and at equal rank from the left. So the two are
    /// joined if two of the parts that they consisted of on both sides of the border, at some time,
    /// have a merge that comes before the one that made either part into something larger. This
    /// goes back in time: what was merged last is taken apart first.
    pub(super) fn apart(&self, mut left: u32, mut right: u32, mut limit: u32) -> bool {
        loop {
            if self.rank(left, right).is_some_and(|rank| rank < limit) {
                return false;
            }
            match (self.lasts[left as usize], self.firsts[right as usize]) {
                (None, None) => return true,
                (None, Some((first, next))) => (right, limit) = (first, next.get()),
                (Some((_, ours)), Some((first, next))) if ours <= next => {
                    (right, limit) = (first, next.get());
                }
                (Some((last, next)), _) => (left, limit) = (last, next.get() - 1),
            }
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A BPE over a, b, c, done step by step: what the tokens' bytes become.
    fn merged(text: &[u32], merges: &[(u32, u32, u32)]) -> Vec<u32> {
        let mut tokens = text.to_vec();
        loop {
            let ranked = tokens.windows(2).enumerate().filter_map(|(place, two)| {
                let rank = merges.iter().position(|&(l, r, _)| l == two[0] && r == two[1])?;
                Some((rank, place))
            });
            let Some((rank, place)) = ranked.min() else { return tokens };
            tokens.splice(place..place + 2, [merges[rank].2]);
        }
    }

    #[test]
    fn two_tokens_stay_apart_if_and_only_if_the_merges_done_one_by_one_leave_them() {
        // Merges that overlap, repeat a letter, and make one token in two ways.
        let merges = [
            (0, 0, 3),
            (1, 2, 4),
            (0, 1, 5),
            (3, 0, 6),
            (0, 3, 6),
            (5, 2, 7),
            (0, 4, 7),
            (2, 2, 8),
            (4, 2, 9),
            (1, 8, 9),
            (3, 5, 10),
            (6, 1, 10),
            (8, 8, 11),
            (7, 0, 12),
            (2, 0, 13),
            (1, 13, 14),
        ];
        let mut texts = vec![vec![0], vec![1], vec![2]];
        for &(left, right, merged_id) in &merges {
            if texts.len() == merged_id as usize {
                let text = [texts[left as usize].clone(), texts[right as usize].clone()].concat();
                texts.push(text);
            }
        }
        let table = Merges::new(texts.len(), &merges);
        let whole = |id: u32| merged(&texts[id as usize], &merges) == [id];
        let ids: Vec<u32> = (0..texts.len() as u32).filter(|&id| whole(id)).collect();
        assert!(ids.len() > 8);
        let mut apart = 0;
        for &left in &ids {
            for &right in &ids {
                let text = [texts[left as usize].clone(), texts[right as usize].clone()].concat();
                let stays = merged(&text, &merges) == [left, right];
                assert_eq!(table.apart(left, right, u32::MAX), stays, "{left} {right}");
                apart += usize::from(stays);
            }
        }
        assert!(apart > 20);
    }
}
