//! Documents to rows: heads first, then the ids and values of [`LANES`] rows side by side.

use super::document::{Frame, LANES, corrupt};
use super::model::{MASSES, Model, NEXT};
use super::numbers::{Kind, SYMBOLS};
use super::tables::{Entry, SLOTS_LOG};
use crate::error::Result;

const GAP_BASES: [u32; SYMBOLS] = Kind::Gap.bases();
const BASES: [u32; SYMBOLS] = Kind::Other.bases();
/// A stream is read in words of this many bytes; so many zeros follow a document.
const WORD: usize = 8;

/// What precedes a row's ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) cluster: u16,
    pub(super) shape: u8,
    pub(super) count: u16,
    pub(super) mass: u16,
}

/// A row as it is stored: positions ascending, and the level at each.
#[derive(Debug)]
pub(super) struct StoredRow<'a> {
    pub(super) row: usize,
    pub(super) head: Head,
    pub(super) positions: &'a [u32],
    pub(super) levels: &'a [u16],
    /// The place of the most probable id among all by falling level.
    pub(super) top: usize,
    /// Bits of head, ids, values.
    pub(super) bits: [u32; 3],
}

/// Ids and levels of a row while it is read.
#[derive(Debug, Default, Clone)]
struct Buffers {
    positions: Vec<u32>,
    levels: Vec<u16>,
}

/// A stream that is being read.
#[derive(Debug, Clone, Copy)]
struct Stream<'a> {
    /// The whole document, zeros after it.
    data: &'a [u8],
    bit: usize,
    state: u32,
}

impl<'a> Stream<'a> {
    fn new(data: &'a [u8], byte: usize) -> Self {
        let mut stream = Self { data, bit: 8 * byte, state: 0 };
        stream.state = stream.raw(SLOTS_LOG);
        stream
    }

    /// The next bits, at least 57; zeros after the document.
    #[inline(always)]
    fn window(&self) -> u64 {
        let at = (self.bit >> 3).min(self.data.len() - WORD);
        let mut word = [0; WORD];
        word.copy_from_slice(&self.data[at..at + WORD]);
        u64::from_le_bytes(word) >> (self.bit & 7)
    }

    fn raw(&mut self, bits: u32) -> u32 {
        let number = self.window() as u32 & ((1 << bits) - 1);
        self.bit += bits as usize;
        number
    }

    /// The next number of a table.
    #[inline(always)]
    fn number(&mut self, entries: &[Entry], table: u32, bases: &[u32; SYMBOLS]) -> u32 {
        let entry = entries[(table + self.state) as usize];
        let window = self.window();
        self.state = entry.base() + (window as u32 & ((1 << entry.bits()) - 1));
        let extra = (window >> entry.bits()) as u32 & ((1 << entry.extra()) - 1);
        self.bit += (entry.bits() + entry.extra()) as usize;
        bases[entry.symbol()] + extra
    }

    /// Checks that the stream was used up: the state is back where it began, and only zero bits
    /// are left.
    fn finish(&self, what: &str, first: usize, stream: &[u8], padding: usize) -> Result<()> {
        let used = self.bit - 8 * first;
        let bytes = used.div_ceil(8).max(padding.min(stream.len()));
        if bytes != stream.len() {
            return corrupt(format!(
                "document: {what} has {} bytes, its rows use {bytes}",
                stream.len()
            ));
        }
        let rest = stream.get(used / 8..).unwrap_or(&[]);
        let clean = rest
            .iter()
            .enumerate()
            .all(|(i, &byte)| if i == 0 { u32::from(byte) >> (used % 8) == 0 } else { byte == 0 });
        if self.state != 0 || !clean {
            return corrupt(format!("document: {what} does not end as streams do"));
        }
        Ok(())
    }
}

/// The order in which rows are dealt to streams: those with the most ids first, then by shape.
pub(super) fn dealt(heads: &[Head]) -> Vec<u32> {
    let mut order: Vec<u64> = heads
        .iter()
        .zip(0..)
        .map(|(head, row): (&Head, u64)| {
            u64::from(u16::MAX - head.count) << 48 | u64::from(head.shape) << 40 | row
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|key| key as u32).collect()
}

impl Model {
    /// Reads all rows of a document, in any order.
    pub(super) fn read(
        &self,
        data: &[u8],
        frame: &Frame,
        mut on_row: impl FnMut(&StoredRow),
    ) -> Result<()> {
        if frame.rows == 0 {
            return Ok(());
        }
        let mut padded = Vec::with_capacity(data.len() + WORD);
        padded.extend_from_slice(data);
        padded.resize(data.len() + WORD, 0);
        let (heads, head_bits) = self.heads(&padded, frame)?;
        let order = dealt(&heads);
        let lanes = frame.lanes.len();
        let mut first = frame.bytes + frame.head.len();
        let mut streams = Vec::new();
        let mut firsts = Vec::new();
        for lane in &frame.lanes {
            streams.push(Stream::new(&padded, first));
            firsts.push(first);
            first += lane.len();
        }
        let mut buffers = vec![Buffers::default(); lanes];
        for buffer in &mut buffers {
            buffer.positions.resize(self.config.k, 0);
            buffer.levels.resize(self.config.k, 0);
        }
        for rows in order.chunks(lanes) {
            let mut bits = [[0; 3]; LANES];
            for (((stream, buffer), &row), bits) in
                streams.iter_mut().zip(&mut buffers).zip(rows).zip(&mut bits)
            {
                let start = stream.bit;
                self.ids(stream, heads[row as usize], &mut buffer.positions)
                    .or_else(|()| bad_position(row))?;
                let middle = stream.bit;
                self.values(stream, heads[row as usize], &buffer.positions, &mut buffer.levels)
                    .or_else(|()| bad_level(row))?;
                *bits = [
                    head_bits[row as usize],
                    (middle - start) as u32,
                    (stream.bit - middle) as u32,
                ];
            }
            for (((stream, buffer), &row), mut bits) in
                streams.iter_mut().zip(&buffers).zip(rows).zip(bits)
            {
                let head = heads[row as usize];
                let count = usize::from(head.count);
                let levels = &buffer.levels[..count];
                let top = read_top(stream, levels, row, &mut bits[2])?;
                let positions = &buffer.positions[..count];
                on_row(&StoredRow { row: row as usize, head, positions, levels, top, bits });
            }
        }
        let least = frame.rows.div_ceil(super::document::ROWS_PER_BYTE);
        for (number, (stream, lane)) in streams.iter().zip(&frame.lanes).enumerate() {
            let last = number + 1 == lanes;
            let padding = if last { least.saturating_sub(firsts[number]) } else { 0 };
            stream.finish(&format!("stream {}", number + 1), firsts[number], lane, padding)?;
        }
        Ok(())
    }

    fn heads(&self, data: &[u8], frame: &Frame) -> Result<(Vec<Head>, Vec<u32>)> {
        let mut stream = Stream::new(data, frame.bytes);
        let mut heads = Vec::with_capacity(frame.rows);
        let mut bits = Vec::with_capacity(frame.rows);
        for row in 0..frame.rows {
            let start = stream.bit;
            let mut next = |table: u32| stream.number(&self.entries, table, &BASES);
            let cluster = next(self.cluster);
            let Some(prepared) = self.clusters.get(cluster as usize) else {
                return corrupt(format!("row {row}: cluster {cluster} of {}", self.clusters.len()));
            };
            let shape = next(self.shape[prepared.shape_class]);
            if shape as usize >= self.dimensions.shapes {
                return corrupt(format!("row {row}: shape {shape} of {}", self.dimensions.shapes));
            }
            let number = next(self.count[shape as usize]);
            let Some(count) = self.count(number) else {
                return corrupt(format!("row {row}: a count beyond k = {}", self.config.k));
            };
            let mass = next(self.mass[shape as usize]);
            if mass >= MASSES {
                return corrupt(format!("row {row}: missing mass {mass} of {MASSES}"));
            }
            heads.push(Head {
                cluster: cluster as u16,
                shape: shape as u8,
                count: count as u16,
                mass: mass as u16,
            });
            bits.push((stream.bit - start) as u32);
            // Rows of a damaged document may take no bits; what is read lies within the document.
            if stream.bit > 8 * data.len() {
                return corrupt(format!("row {row}: the document has ended"));
            }
        }
        stream.finish("the stream of heads", frame.bytes, frame.head, 0)?;
        Ok((heads, bits))
    }

    fn ids(
        &self,
        stream: &mut Stream,
        head: Head,
        positions: &mut [u32],
    ) -> std::result::Result<(), ()> {
        let vocab = self.config.vocab_size;
        let count = usize::from(head.count);
        let class = self.clusters[usize::from(head.cluster)].gap_class;
        let mut previous = 0;
        for (i, position) in positions[..count].iter_mut().enumerate() {
            let table = self.gap[self.dimensions.gap(class, previous, (count - i) as u32)];
            let next = previous + stream.number(&self.entries, table, &GAP_BASES);
            if next >= vocab {
                return Err(());
            }
            *position = next;
            previous = next + 1;
        }
        Ok(())
    }

    fn values(
        &self,
        stream: &mut Stream,
        head: Head,
        positions: &[u32],
        levels: &mut [u16],
    ) -> std::result::Result<(), ()> {
        let count = usize::from(head.count);
        let mut state = 0u8;
        for (&position, level) in positions[..count].iter().zip(levels) {
            let quantiser = usize::from(state >> 1);
            let table =
                self.level[self.dimensions.level(usize::from(head.shape), quantiser, position)];
            let number = stream.number(&self.entries, table, &BASES);
            let fine = 2 * number as usize + quantiser;
            if fine >= self.levels.len() {
                return Err(());
            }
            *level = fine as u16;
            state = NEXT[usize::from(state)][number as usize & 1];
        }
        Ok(())
    }
}

fn bad_position<T>(row: u32) -> Result<T> {
    corrupt(format!("row {row}: an id beyond the vocabulary"))
}

fn bad_level<T>(row: u32) -> Result<T> {
    corrupt(format!("row {row}: a value beyond the scale"))
}

/// The bits that say which of `near` ids is first.
pub(super) const fn top_bits(near: usize) -> u32 {
    usize::BITS - (near - 1).leading_zeros()
}

/// How many levels below the highest one the most probable id may be.
pub(super) const TOP_LEVELS: u16 = 3;

/// How many ids may be the most probable one.
pub(super) fn near_top(levels: &[u16]) -> usize {
    let highest = levels.iter().max().copied().unwrap_or(0);
    levels.iter().filter(|&&level| level + TOP_LEVELS >= highest).count()
}

fn read_top(stream: &mut Stream, levels: &[u16], row: u32, bits: &mut u32) -> Result<usize> {
    let near = near_top(levels);
    if near < 2 {
        return Ok(0);
    }
    *bits += top_bits(near);
    let top = stream.raw(top_bits(near)) as usize;
    if top >= near {
        return corrupt(format!("row {row}: the most probable id is number {top} of {near}"));
    }
    Ok(top)
}

/// Puts the rows of a document in rank order.
#[derive(Debug)]
pub(super) struct Ranking<'a> {
    model: &'a Model,
    /// For each level, its number of ids, then where its next one goes.
    places: Vec<u16>,
    /// Which levels occur.
    occur: Vec<u64>,
}

impl<'a> Ranking<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        let levels = model.levels.len();
        Self { model, places: vec![0; levels], occur: vec![0; levels.div_ceil(64)] }
    }

    /// Writes a row: by falling level, ids of a level by position, then what is absent.
    pub(super) fn write(&mut self, row: &StoredRow, ids: &mut [i64], logprobs: &mut [f32]) {
        let Self { model, places, occur } = self;
        let mut total = 0;
        for &level in row.levels {
            let level = usize::from(level);
            places[level] += 1;
            occur[level >> 6] |= 1 << (level & 63);
            total += model.weights[level];
        }
        let mut next = 0;
        for (word, bits) in occur.iter_mut().enumerate().rev() {
            while *bits > 0 {
                let bit = 63 - bits.leading_zeros() as usize;
                *bits ^= 1 << bit;
                let place = &mut places[word << 6 | bit];
                let count = *place;
                *place = next;
                next += count;
            }
        }
        let shift = model.shift(usize::from(row.head.mass), total);
        let order = &model.clusters[usize::from(row.head.cluster)].order;
        for (&position, &level) in row.positions.iter().zip(row.levels) {
            let place = &mut places[usize::from(level)];
            let at = usize::from(*place);
            *place += 1;
            ids[at] = i64::from(order.id(position, &model.order));
            logprobs[at] = (model.levels[usize::from(level)] + shift).min(0.0);
        }
        for &level in row.levels {
            places[usize::from(level)] = 0;
        }
        // Values stay in order: the most probable id takes the highest.
        ids[..=row.top].rotate_right(1);
        let count = row.levels.len();
        let first = ids[0];
        ids[count..].fill(first);
        logprobs[count..].fill(f32::NEG_INFINITY);
    }
}
