//! Whether the student's tokens keep a border of the teacher's, and what they are where they do not.

use super::vocabulary::{IntMap, Merges, Strings};
use super::{Head, NONE, Tokenize};
use crate::error::{CodecError, Result};

/// What precedes a border: the first `length` bytes of a token of the student, by this number.
pub(super) type Prefix = u32;

#[derive(Debug)]
struct Known {
    bytes: Vec<u8>,
    /// Its first and its last token, as far as known.
    ends: Option<(u32, u32)>,
    /// The bytes with which a token may cross the border behind it.
    followers: Bytes,
}

/// A set of bytes.
type Bytes = [u64; 4];

#[derive(Debug)]
pub(super) struct Borders {
    merges: Option<Merges>,
    /// Of every proper prefix of a token, by its hash, the bytes that may follow.
    followers: IntMap<Bytes>,
    numbers: IntMap<Prefix>,
    prefixes: Vec<Known>,
    /// The tokens of a prefix and a teacher token together, by both numbers.
    crossed: IntMap<Vec<u32>>,
}

impl Borders {
    pub(super) fn new(student: &Strings, merges: Option<Merges>) -> Self {
        let mut followers: IntMap<Bytes> = IntMap::default();
        for id in 0..student.len() as u32 {
            let mut hash = 0;
            for two in student.get(id).windows(2) {
                hash = extended(hash, two[0]);
                insert(followers.entry(hash).or_default(), two[1]);
            }
        }
        Self {
            merges,
            followers,
            numbers: IntMap::default(),
            prefixes: Vec::new(),
            crossed: IntMap::default(),
        }
    }

    /// The number of the first `length` bytes of a token.
    pub(super) fn prefix(&mut self, student: &Strings, token: u32, length: usize) -> Prefix {
        let key = u64::from(token) << 32 | length as u64;
        if let Some(&number) = self.numbers.get(&key) {
            return number;
        }
        let bytes = student.get(token)[..length].to_vec();
        let mut all = Bytes::default();
        for start in 0..bytes.len() {
            let hash = bytes[start..].iter().fold(0, |hash, &byte| extended(hash, byte));
            for (all, more) in all.iter_mut().zip(self.followers.get(&hash).unwrap_or(&[0; 4])) {
                *all |= more;
            }
        }
        let ends = (length == student.get(token).len()).then_some((token, token));
        let number = self.prefixes.len() as Prefix;
        self.prefixes.push(Known { bytes, ends, followers: all });
        self.numbers.insert(key, number);
        number
    }

    /// Asks for the tokens of those prefixes of which they are not known.
    pub(super) fn learn_prefixes(
        &mut self,
        wanted: impl Iterator<Item = Prefix>,
        tokenize: &mut Tokenize<'_>,
    ) -> Result<()> {
        let mut unknown: Vec<Prefix> =
            wanted.filter(|&number| self.prefixes[number as usize].ends.is_none()).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if unknown.is_empty() {
            return Ok(());
        }
        let texts: Vec<_> =
            unknown.iter().map(|&number| self.prefixes[number as usize].bytes.clone()).collect();
        for (&number, tokens) in unknown.iter().zip(answers(tokenize, &texts)?) {
            let ends = tokens.first().copied().zip(tokens.last().copied());
            self.prefixes[number as usize].ends = Some(ends.unwrap_or((NONE, NONE)));
        }
        Ok(())
    }

    /// The first token of a prefix by itself; None if that is not known.
    pub(super) fn first_of(&self, prefix: Prefix) -> Option<u32> {
        self.prefixes[prefix as usize].ends.map(|(first, _)| first).filter(|&first| first != NONE)
    }

    /// Whether a token of the student may cross the border between a prefix and a teacher's token,
    /// or what is before the border change how the token is divided.
    #[inline]
    pub(super) fn may_cross(&self, prefix: Prefix, token: Head) -> bool {
        let known = &self.prefixes[prefix as usize];
        let Some(byte) = token.byte() else { return false };
        if token.varies() {
            return true;
        }
        if known.followers[usize::from(byte >> 6)] >> (byte & 63) & 1 == 0 {
            return false;
        }
        let (Some(merges), Some((_, last))) = (&self.merges, known.ends) else { return true };
        last == NONE || token.piece() == NONE || !merges.apart(last, token.piece(), u32::MAX)
    }

    /// Asks for the tokens of those pairs of which they are not known.
    pub(super) fn learn_pairs(
        &mut self,
        wanted: &[(Prefix, u32)],
        teacher: &Strings,
        tokenize: &mut Tokenize<'_>,
    ) -> Result<()> {
        let mut unknown: Vec<u64> = wanted
            .iter()
            .map(|&(prefix, token)| both(prefix, token))
            .filter(|key| !self.crossed.contains_key(key))
            .collect();
        unknown.sort_unstable();
        unknown.dedup();
        if unknown.is_empty() {
            return Ok(());
        }
        let text = |&key: &u64| {
            let bytes = &self.prefixes[(key >> 32) as usize].bytes;
            [bytes.as_slice(), teacher.get(key as u32)].concat()
        };
        let texts: Vec<_> = unknown.iter().map(text).collect();
        let tokens = answers(tokenize, &texts)?;
        self.crossed.extend(unknown.into_iter().zip(tokens));
        Ok(())
    }

    /// The tokens of a pair that `learn_pairs` has asked for.
    pub(super) fn tokens_of(&self, prefix: Prefix, token: u32) -> &[u32] {
        self.crossed.get(&both(prefix, token)).map_or(&[][..], Vec::as_slice)
    }
}

fn answers(tokenize: &mut Tokenize<'_>, texts: &[Vec<u8>]) -> Result<Vec<Vec<u32>>> {
    let found = tokenize(texts)?;
    if found.len() == texts.len() {
        return Ok(found);
    }
    let (found, expected) = (found.len(), texts.len());
    Err(CodecError::Input(format!("the tokens of {found} strings, expected {expected}")))
}

fn both(prefix: Prefix, token: u32) -> u64 {
    u64::from(prefix) << 32 | u64::from(token)
}

/// The hash of a string and one more byte. Two strings of one hash only cost questions.
fn extended(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

fn insert(set: &mut Bytes, byte: u8) {
    set[usize::from(byte >> 6)] |= 1 << (byte & 63);
}
