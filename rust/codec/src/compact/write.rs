//! Rows as they are stored, to the bytes of a document.

use std::array;

use super::decode::{Head, StoredRow, dealt, highest, near_top, top_bits};
use super::document::{self, Content, LANES, lanes};
use super::model::{Model, NEXT, level_place};
use super::numbers::{Kind, bucket};
use super::prior::Prior;
use super::tables::{SLOTS, SLOTS_LOG, Table, Writer};
use crate::error::Result;
use crate::simd::{Backend, multiversion};

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

/// A number, and the table it is written with, as the place of the table's first entry in a decoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) table: u32,
    pub(super) number: u32,
    pub(super) kind: Kind,
}

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
    pub(super) fn write(
        &self,
        backend: Backend,
        model: &Model,
        rows: &StoredRows,
        builtin: bool,
    ) -> Vec<u8> {
        let count = rows.heads.len();
        if count == 0 {
            return document::write(Content::Compact, builtin, 0, &[]);
        }
        let mut streams = vec![self.heads(model, &rows.heads)];
        streams.extend(write_rows(backend, &self.writers, model, rows));
        document::write(Content::Compact, builtin, count, &streams)
    }

    /// A stream of numbers.
    pub(super) fn stream(&self, steps: &[Step]) -> Vec<u8> {
        let mut stream = Stream::default();
        stream.bits.reserve(steps.len());
        for &Step { table, number, kind } in steps.iter().rev() {
            stream.number(&self.writers, (table, number), kind);
        }
        stream.finish()
    }

    fn heads(&self, model: &Model, heads: &[Head]) -> Vec<u8> {
        let mut stream = Stream::default();
        for head in heads.iter().rev() {
            let class = model.clusters[usize::from(head.cluster)].shape_class;
            let shape = usize::from(head.shape);
            let numbers = [
                (model.cluster, u32::from(head.cluster)),
                (model.shape[class], u32::from(head.shape)),
                (model.count[shape], model.count_number(usize::from(head.count))),
                (model.mass[shape], u32::from(head.mass)),
            ];
            stream.bits.reserve(numbers.len());
            for number in numbers.into_iter().rev() {
                stream.number(&self.writers, number, Kind::Other);
            }
        }
        stream.finish()
    }
}

multiversion! {
    /// The streams of all rows.
    fn write_rows(writers: &[Writer], model: &Model, rows: &StoredRows) -> Vec<Vec<u8>> =
        write_rows_body;
}

/// Writes from the last id to the first, one of each lane in turn: while one waits for its table,
/// the others go on.
#[inline(always)]
fn write_rows_body<I>(
    _isa: I,
    writers: &[Writer],
    model: &Model,
    rows: &StoredRows,
) -> Vec<Vec<u8>> {
    let starts = rows.starts();
    let order = dealt(&rows.heads);
    let count = lanes(rows.heads.len());
    let mut lanes: [[Lane; TOGETHER]; LANES / TOGETHER] =
        array::from_fn(|_| array::from_fn(|_| Lane::default()));
    for group in order.chunks(count).rev() {
        for (lanes, group) in lanes.iter_mut().zip(group.chunks(TOGETHER)) {
            for (lane, &row) in lanes.iter_mut().zip(group) {
                lane.begin(model, rows, row as usize, starts[row as usize]);
            }
            write_together(writers, lanes, group.len());
        }
    }
    let lanes = lanes.into_iter().flatten().take(count);
    let (mut streams, levels): (Vec<_>, Vec<_>) =
        lanes.map(|lane| (lane.gap_stream.finish(), lane.level_stream.finish())).unzip();
    streams.extend(levels);
    streams
}

/// Rows that are written side by side.
const TOGETHER: usize = 4;

/// Writes a row of each lane, an id of each in turn.
#[inline(always)]
fn write_together(writers: &[Writer], lanes: &mut [Lane; TOGETHER], used: usize) {
    let least = lanes.iter().map(|lane| lane.levels.len()).min().unwrap_or(0);
    let together = if used == TOGETHER { least } else { 0 };
    for lane in &mut lanes[..used] {
        (together..lane.levels.len()).rev().for_each(|i| lane.id(writers, i));
    }
    let [a, b, c, d] = lanes;
    for i in (0..together).rev() {
        a.id(writers, i);
        b.id(writers, i);
        c.id(writers, i);
        d.id(writers, i);
    }
}

/// A table, as the place of its first entry in a decoder, and a number.
type Number = (u32, u32);

/// Two streams, and the row that is written to them.
#[derive(Debug, Default)]
struct Lane {
    gap_stream: Stream,
    level_stream: Stream,
    gaps: Vec<Number>,
    levels: Vec<Number>,
}

impl Lane {
    /// Begins a row: finds its numbers, and writes which id is the most probable one.
    #[inline(always)]
    fn begin(&mut self, model: &Model, rows: &StoredRows, row: usize, start: usize) {
        let head = rows.heads[row];
        let ids = start..start + usize::from(head.count);
        let (positions, levels) = (&rows.positions[ids.clone()], &rows.levels[ids]);
        let place = model.gap_place(head.cluster) as usize;
        let mut previous = 0;
        self.gaps.clear();
        self.gaps.extend(positions.iter().zip((1..=positions.len()).rev()).map(
            |(&position, left)| {
                let table = model.gap[place + model.lefts[left] as usize + bucket(previous)];
                let gap = position - previous;
                previous = position + 1;
                (table, gap)
            },
        ));
        let contexts = model.level(usize::from(head.shape));
        let mut state = 0u8;
        self.levels.clear();
        self.levels.extend(positions.iter().zip(levels).map(|(&position, &level)| {
            let quantiser = u32::from(state >> 1);
            let number = u32::from(level) >> 1;
            state = NEXT[usize::from(state)][number as usize & 1];
            (level_place(contexts[bucket(position + 1)], quantiser), number)
        }));
        self.gap_stream.bits.reserve(positions.len());
        let bits = &mut self.level_stream.bits;
        bits.reserve(levels.len() + 1);
        let near = near_top(levels, highest(levels));
        if near > 1 {
            bits.push(u64::from(rows.tops[row]), top_bits(near));
        }
    }

    /// Writes the gap and the level of an id.
    #[inline(always)]
    fn id(&mut self, writers: &[Writer], i: usize) {
        self.gap_stream.number(writers, self.gaps[i], Kind::Gap);
        self.level_stream.number(writers, self.levels[i], Kind::Other);
    }
}

/// A stream that is written from its last number to its first.
#[derive(Debug, Default)]
struct Stream {
    state: u32,
    bits: Bits,
}

impl Stream {
    #[inline(always)]
    fn number(&mut self, writers: &[Writer], (table, number): Number, kind: Kind) {
        let writer = &writers[table as usize / SLOTS];
        let (bits, count) = writer.write(&mut self.state, number, kind);
        self.bits.push(bits, count);
    }

    /// The first state, and then everything that was written.
    fn finish(mut self) -> Vec<u8> {
        self.bits.reserve(1);
        self.bits.push(u64::from(self.state), SLOTS_LOG);
        self.bits.finish()
    }
}

/// Bits, the last ones of which are written first.
#[derive(Debug, Default)]
struct Bits {
    /// Whole bytes are at the end.
    bytes: Vec<u8>,
    /// Where they begin.
    start: usize,
    /// Bits before them, fewer than 8.
    rest: u64,
    count: u32,
}

impl Bits {
    /// Makes room for so many numbers.
    fn reserve(&mut self, numbers: usize) {
        let needed = 5 * numbers + 8;
        if self.start < needed {
            let length = self.bytes.len();
            let more = needed.max(length);
            self.bytes.resize(length + more, 0);
            self.bytes.copy_within(self.start..length, self.start + more);
            self.start += more;
        }
    }

    /// Puts at most 40 bits before what is there.
    #[inline(always)]
    fn push(&mut self, bits: u64, count: u32) {
        let rest = self.rest << count | bits;
        let count = self.count + count;
        let word = rest << 1 << (63 - count);
        self.bytes[self.start - 8..self.start].copy_from_slice(&word.to_le_bytes());
        self.start -= count as usize / 8;
        self.count = count % 8;
        self.rest = rest & ((1 << self.count) - 1);
    }

    /// The bytes, the first bit at the bottom of the first one.
    fn finish(mut self) -> Vec<u8> {
        if self.count == 0 {
            return self.bytes.split_off(self.start);
        }
        let bytes = &self.bytes[self.start - 1..];
        let next = bytes[1..].iter().chain(&[0]);
        let shifted = bytes
            .iter()
            .zip(next)
            .map(|(&byte, &next)| (u16::from_le_bytes([byte, next]) >> (8 - self.count)) as u8);
        shifted.collect()
    }
}
