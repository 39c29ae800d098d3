//! Rows as they are stored, to the bytes of a document.

use std::array;

use super::decode::{Head, StoredRow, dealt, highest, near_top, top_bits};
use super::document::{self, Content, LANES, lanes};
use super::model::{Model, NEXT};
use super::numbers::{Kind, bucket};
use super::prior::Prior;
use super::tables::{SLOTS, SLOTS_LOG, Table, Writer};
use crate::error::Result;

/// The rows of a document as they are stored: what decoding starts from, and encoding ends with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredRows {
    pub(super) heads: Vec<Head>,
    /// The place of the most probable id among all by falling level.
    pub(super) tops: Vec<u16>,
    /// Of all rows, one after the other.
    pub(super) positions: Vec<u32>,
    pub(super) levels: Vec<u16>,
}

impl StoredRows {
    /// Appends a row.
    #[inline(always)]
    pub(super) fn push(&mut self, row: &StoredRow) {
        self.heads.push(row.head);
        self.tops.push(row.top as u16);
        self.positions.extend_from_slice(row.positions);
        self.levels.extend_from_slice(row.levels);
    }

    /// Appends all rows of another document.
    pub(super) fn append(&mut self, other: &Self) {
        self.heads.extend_from_slice(&other.heads);
        self.tops.extend_from_slice(&other.tops);
        self.positions.extend_from_slice(&other.positions);
        self.levels.extend_from_slice(&other.levels);
    }

    /// Where each row's ids begin.
    fn starts(&self) -> Vec<usize> {
        let mut start = 0;
        let next = |head: &Head| {
            let this = start;
            start += usize::from(head.count);
            this
        };
        self.heads.iter().map(next).collect()
    }
}

/// Writes documents.
#[derive(Debug)]
pub(super) struct DocumentWriter {
    writers: Vec<Writer>,
}

/// A number to be written with a table; raw bits have none.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Number { table: u32, number: u32, kind: Kind },
    Raw { bits: u32, number: u32 },
}

/// Bits to write: how many they are is above [`COUNT_AT`].
type Part = u64;
const COUNT_AT: u32 = 48;

impl DocumentWriter {
    pub(super) fn new(prior: &Prior) -> Result<Self> {
        Ok(Self::of(&prior.tables, &prior.kinds()?))
    }

    /// A writer with these tables, which code numbers of these kinds.
    pub(super) fn of(tables: &[Table], kinds: &[Option<Kind>]) -> Self {
        let tables = tables.iter().zip(kinds);
        Self {
            writers: tables
                .map(|(table, kind)| table.writer(kind.unwrap_or(Kind::Other)))
                .collect(),
        }
    }

    /// The bytes of a document.
    pub(super) fn write(&self, model: &Model, rows: &StoredRows, builtin: bool) -> Vec<u8> {
        let count = rows.heads.len();
        if count == 0 {
            return document::write(Content::Compact, builtin, 0, &[]);
        }
        let mut heads = Vec::new();
        for &head in &rows.heads {
            head_steps(model, head, &mut heads);
        }
        let starts = rows.starts();
        let order = dealt(&rows.heads);
        let lane = |lane: usize| {
            let mut steps = Vec::with_capacity(2 * rows.levels.len() / lanes(count) + count);
            for &row in order.iter().skip(lane).step_by(lanes(count)) {
                let row = row as usize;
                let ids = starts[row]..starts[row] + usize::from(rows.heads[row].count);
                let (positions, levels) = (&rows.positions[ids.clone()], &rows.levels[ids]);
                row_steps(model, rows.heads[row], positions, levels, &mut steps);
                top_step(levels, rows.tops[row], &mut steps);
            }
            steps
        };
        let mut streams = self.streams(&[heads]);
        if lanes(count) == LANES {
            streams.extend(self.streams(&array::from_fn::<_, LANES, _>(lane)));
        } else {
            streams.extend((0..lanes(count)).flat_map(|number| self.streams(&[lane(number)])));
        }
        document::write(Content::Compact, builtin, count, &streams)
    }

    /// Streams: each the first state, then the bits of every step. They are found from the last to
    /// the first, side by side: while one waits for its table, the others go on.
    pub(super) fn streams<const N: usize>(&self, steps: &[Vec<Step>; N]) -> Vec<Vec<u8>> {
        let mut states = [0; N];
        let mut parts = steps.each_ref().map(|steps| Vec::with_capacity(steps.len() + 1));
        let together = steps.iter().map(Vec::len).min().unwrap_or(0);
        let mut steps = steps.each_ref().map(|steps| steps.iter().rev());
        for _ in 0..together {
            for ((parts, steps), state) in parts.iter_mut().zip(&mut steps).zip(&mut states) {
                if let Some(step) = steps.next() {
                    parts.push(self.part(state, step));
                }
            }
        }
        for ((parts, steps), state) in parts.iter_mut().zip(steps).zip(&mut states) {
            parts.extend(steps.map(|step| self.part(state, step)));
            parts.push(u64::from(*state) | u64::from(SLOTS_LOG) << COUNT_AT);
        }
        parts.iter().map(|parts| bytes(parts)).collect()
    }

    #[inline(always)]
    fn part(&self, state: &mut u32, step: &Step) -> Part {
        let (bits, count) = match *step {
            Step::Number { table, number, kind } => {
                self.writers[table as usize / SLOTS].write(state, number, kind)
            }
            Step::Raw { bits, number } => (u64::from(number), bits),
        };
        bits | u64::from(count) << COUNT_AT
    }
}

/// The bytes of parts, the last one first.
fn bytes(parts: &[Part]) -> Vec<u8> {
    let total: u64 = parts.iter().map(|part| part >> COUNT_AT).sum();
    let length = total.div_ceil(8) as usize;
    let mut out = vec![0; length + 8];
    let (mut word, mut used, mut at) = (0u64, 0, 0);
    for part in parts.iter().rev() {
        word |= (part & ((1 << COUNT_AT) - 1)) << used;
        used += (part >> COUNT_AT) as u32;
        out[at..at + 8].copy_from_slice(&word.to_le_bytes());
        at += used as usize / 8;
        word >>= used & !7;
        used &= 7;
    }
    out.truncate(length);
    out
}

fn head_steps(model: &Model, head: Head, steps: &mut Vec<Step>) {
    let class = model.clusters[usize::from(head.cluster)].shape_class;
    let shape = usize::from(head.shape);
    let numbers = [
        (model.cluster, u32::from(head.cluster)),
        (model.shape[class], u32::from(head.shape)),
        (model.count[shape], model.count_number(usize::from(head.count))),
        (model.mass[shape], u32::from(head.mass)),
    ];
    let step = |(table, number)| Step::Number { table, number, kind: Kind::Other };
    steps.extend(numbers.map(step));
}

fn row_steps(model: &Model, head: Head, positions: &[u32], levels: &[u16], steps: &mut Vec<Step>) {
    let contexts = model.gap(model.clusters[usize::from(head.cluster)].gap_class);
    let mut previous = 0;
    for (i, &position) in positions.iter().enumerate() {
        let left = model.lefts[positions.len() - i] as usize;
        let table = contexts[left + bucket(previous)];
        steps.push(Step::Number { table, number: position - previous, kind: Kind::Gap });
        previous = position + 1;
    }
    let contexts = model.level(usize::from(head.shape));
    let mut state = 0u8;
    for (&position, &level) in positions.iter().zip(levels) {
        let quantiser = usize::from(state >> 1);
        let table = contexts[2 * bucket(position + 1) + quantiser];
        let number = u32::from(level) >> 1;
        steps.push(Step::Number { table, number, kind: Kind::Other });
        state = NEXT[usize::from(state)][number as usize & 1];
    }
}

fn top_step(levels: &[u16], top: u16, steps: &mut Vec<Step>) {
    let near = near_top(levels, highest(levels));
    if near > 1 {
        steps.push(Step::Raw { bits: top_bits(near), number: u32::from(top) });
    }
}
