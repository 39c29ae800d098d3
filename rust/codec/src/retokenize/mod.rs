//! Rows over one vocabulary as rows over another, along a text that both have tokenised.
//! docs/retokenize.md derives what is computed here and says what is exact.

mod border;
mod document;
mod mapping;
mod vocabulary;

pub use document::{Document, Kind, Mapped, Sums, Tokens};
pub use vocabulary::{Merges, Strings};

use std::collections::HashMap;

use crate::error::{CodecError, Result};
use border::Borders;
use mapping::Mapping;

/// Tokenises strings by the student's tokenizer, each as if in the middle of a text.
pub type Tokenize<'a> = dyn FnMut(&[Vec<u8>]) -> Result<Vec<Vec<u32>>> + 'a;

/// Stands for a token that is not known.
const NONE: u32 = u32::MAX;

/// How a teacher's token begins. There is one for each of its ids, read all over the memory: small.
#[derive(Debug, Clone, Copy)]
struct Head {
    /// Its first bytes.
    start: Start,
    /// Its first piece, and two bits.
    piece: u32,
}

impl Head {
    /// Whether the token's pieces may be others behind some texts, although no token crosses the
    /// border: a pre-tokenizer that divides `'s` from a word divides it otherwise behind a comma.
    const VARIES: u32 = 1 << 31;
    /// Whether the token has no bytes.
    const EMPTY: u32 = 1 << 30;
    /// More ids than this no vocabulary has.
    const MOST: u32 = Self::EMPTY - 1;

    fn new(bytes: &[u8], pieces: &[u32]) -> Self {
        let empty = if bytes.is_empty() { Self::EMPTY } else { 0 };
        let piece = pieces.first().map_or(Self::MOST, |&piece| piece);
        Self { start: Start::of(bytes), piece: piece | empty }
    }

    /// The token's first piece; `NONE` if that is not known.
    #[inline]
    fn piece(self) -> u32 {
        let piece = self.piece & Self::MOST;
        if piece == Self::MOST { NONE } else { piece }
    }

    #[inline]
    fn varies(self) -> bool {
        self.piece & Self::VARIES != 0
    }

    /// The token's first byte, if it has one.
    #[inline]
    fn byte(self) -> Option<u8> {
        (self.piece & Self::EMPTY == 0).then_some(self.start.0[0])
    }
}

/// The first bytes of a string, which tell most that do not begin with another without looking.
#[derive(Debug, Clone, Copy)]
struct Start([u8; 4]);

impl Start {
    fn of(bytes: &[u8]) -> Self {
        let mut start = [0; 4];
        let known = bytes.len().min(4);
        start[..known].copy_from_slice(&bytes[..known]);
        Self(start)
    }

    /// The bits that a string of this length determines.
    fn mask(length: usize) -> u32 {
        u32::MAX.checked_shr(8 * 4_usize.saturating_sub(length) as u32).unwrap_or(0)
    }

    /// Whether no other bytes than these of a string are to be looked at: they are all that there
    /// is, and differ from those that stand for the end of a string.
    fn is_whole(bytes: &[u8]) -> bool {
        bytes.len() <= 4 && !bytes.contains(&0)
    }

    /// Whether a string that begins so may begin with another, by the bits that that determines.
    #[inline]
    fn may_begin_with(self, other: Self, mask: u32) -> bool {
        (u32::from_le_bytes(self.0) ^ u32::from_le_bytes(other.0)) & mask == 0
    }
}

/// A teacher's and a student's vocabulary, and what has been found out of the borders of their
/// tokens so far. What it computes does not depend on what it was asked before.
#[derive(Debug)]
pub struct TokenMap {
    teacher: Strings,
    student: Strings,
    /// Of each teacher token, its pieces: the student's tokens of its bytes.
    pieces: Vec<Vec<u32>>,
    /// Of each teacher token, what most questions are about.
    heads: Vec<Head>,
    /// The teacher's ids in the order of their bytes.
    by_bytes: Vec<u32>,
    /// Of bytes that were asked for, the number of the teacher's ids that begin so.
    begun: HashMap<Vec<u8>, usize>,
    borders: Borders,
    mapping: Mapping,
}

impl TokenMap {
    /// # Arguments
    ///
    /// - `teacher`, `student`: the bytes of each id; empty for ids that never stand for text.
    /// - `pieces`: of each teacher token; shorter where its end is not known, empty if nothing is.
    /// - `varying`: the teacher tokens whose pieces may depend on the text before them.
    /// - `merges`: those of the student's tokenizer if it is a BPE.
    pub fn new(
        teacher: Strings,
        student: Strings,
        pieces: Vec<Vec<u32>>,
        varying: &[i64],
        merges: Option<&[(u32, u32, u32)]>,
    ) -> Result<Self> {
        if pieces.len() != teacher.len() {
            let (found, expected) = (pieces.len(), teacher.len());
            return Err(CodecError::Input(format!(
                "pieces of {found} tokens, expected {expected}"
            )));
        }
        let known = student.len();
        if known > Head::MOST as usize {
            let most = Head::MOST;
            return Err(CodecError::Input(format!("a student with {known} ids, at most {most}")));
        }
        let ids = pieces
            .iter()
            .flatten()
            .chain(merges.into_iter().flatten().flat_map(|(l, r, m)| [l, r, m]));
        if let Some(id) = ids.copied().find(|&id| id as usize >= known) {
            return Err(CodecError::Input(format!("id {id} of a student with {known} ids")));
        }
        let mut by_bytes: Vec<u32> = (0..teacher.len() as u32).collect();
        by_bytes.sort_by(|&a, &b| teacher.get(a).cmp(teacher.get(b)));
        let borders = Borders::new(&student, merges.map(|merges| Merges::new(known, merges)));
        let mapping = Mapping::new(known);
        let head = |(id, pieces): (u32, &Vec<u32>)| Head::new(teacher.get(id), pieces);
        let mut heads: Vec<Head> = (0..).zip(&pieces).map(head).collect();
        for &id in varying {
            let known = usize::try_from(id).ok().and_then(|id| heads.get_mut(id));
            let message = || format!("id {id} of a teacher with {} ids", pieces.len());
            known.ok_or_else(|| CodecError::Input(message()))?.piece |= Head::VARIES;
        }
        let begun = HashMap::new();
        Ok(Self { teacher, student, pieces, heads, by_bytes, begun, borders, mapping })
    }

    /// Number of the teacher's ids whose bytes begin so.
    fn begun_by(&mut self, bytes: &[u8]) -> usize {
        if let Some(&count) = self.begun.get(bytes) {
            return count;
        }
        let before = self.by_bytes.partition_point(|&id| self.teacher.get(id) < bytes);
        let begun = |&id: &u32| self.teacher.get(id).starts_with(bytes);
        let count = self.by_bytes[before..].partition_point(begun);
        self.begun.insert(bytes.to_vec(), count);
        count
    }
}
