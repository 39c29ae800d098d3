//! Rows as they are stored, to the bytes of a document.

use super::decode::{Head, StoredRow, dealt, near_top, top_bits};
use super::document::{self, lanes};
use super::model::{Model, NEXT};
use super::numbers::Kind;
use super::prior::Prior;
use super::tables::{SLOTS, SLOTS_LOG, Writer};
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
enum Step {
    Number { table: u32, number: u32, kind: Kind },
    Raw { bits: u32, number: u32 },
}

impl DocumentWriter {
    pub(super) fn new(prior: &Prior) -> Result<Self> {
        let tables = prior.tables.iter().zip(prior.kinds()?);
        Ok(Self {
            writers: tables
                .map(|(table, kind)| table.writer(kind.unwrap_or(Kind::Other)))
                .collect(),
        })
    }

    /// The bytes of a document.
    pub(super) fn write(&self, model: &Model, rows: &StoredRows, builtin: bool) -> Vec<u8> {
        let count = rows.heads.len();
        if count == 0 {
            return document::write(builtin, 0, &[]);
        }
        let mut heads = Vec::new();
        rows.heads.iter().for_each(|&head| head_steps(model, head, &mut heads));
        let mut streams = vec![self.stream(&heads)];
        let starts = rows.starts();
        let order = dealt(&rows.heads);
        for lane in 0..lanes(count) {
            let mut steps = Vec::new();
            for &row in order.iter().skip(lane).step_by(lanes(count)) {
                let row = row as usize;
                let ids = starts[row]..starts[row] + usize::from(rows.heads[row].count);
                let (positions, levels) = (&rows.positions[ids.clone()], &rows.levels[ids]);
                row_steps(model, rows.heads[row], positions, levels, &mut steps);
                top_step(levels, rows.tops[row], &mut steps);
            }
            streams.push(self.stream(&steps));
        }
        document::write(builtin, count, &streams)
    }

    /// A stream: the first state, then the bits of every step. They are found from the last to the
    /// first.
    fn stream(&self, steps: &[Step]) -> Vec<u8> {
        let mut state = 0;
        let mut parts = Vec::with_capacity(steps.len() + 1);
        for &step in steps.iter().rev() {
            parts.push(match step {
                Step::Number { table, number, kind } => {
                    self.writers[table as usize / SLOTS].write(&mut state, number, kind)
                }
                Step::Raw { bits, number } => (u64::from(number), bits),
            });
        }
        parts.push((u64::from(state), SLOTS_LOG));
        let mut out = Vec::with_capacity(parts.len());
        let (mut word, mut used) = (0u64, 0);
        for (bits, count) in parts.into_iter().rev() {
            word |= bits << used;
            used += count;
            while used >= 8 {
                out.push(word as u8);
                word >>= 8;
                used -= 8;
            }
        }
        if used > 0 {
            out.push(word as u8);
        }
        out
    }
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
    let class = model.clusters[usize::from(head.cluster)].gap_class;
    let mut previous = 0;
    for (i, &position) in positions.iter().enumerate() {
        let left = (positions.len() - i) as u32;
        let table = model.gap[model.dimensions.gap(class, previous, left)];
        steps.push(Step::Number { table, number: position - previous, kind: Kind::Gap });
        previous = position + 1;
    }
    let mut state = 0u8;
    for (&position, &level) in positions.iter().zip(levels) {
        let quantiser = usize::from(state >> 1);
        let table =
            model.level[model.dimensions.level(usize::from(head.shape), quantiser, position)];
        let number = u32::from(level) >> 1;
        steps.push(Step::Number { table, number, kind: Kind::Other });
        state = NEXT[usize::from(state)][number as usize & 1];
    }
}

fn top_step(levels: &[u16], top: u16, steps: &mut Vec<Step>) {
    let near = near_top(levels);
    if near > 1 {
        steps.push(Step::Raw { bits: top_bits(near), number: u32::from(top) });
    }
}
