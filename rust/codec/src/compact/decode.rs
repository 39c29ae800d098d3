//! Documents to rows: heads first, then the ids and values of [`LANES`] rows side by side.

use std::array;

use super::document::{Frame, LANES, corrupt};
use super::model::{MASSES, Model, NEXT};
use super::numbers::{Kind, SYMBOLS, bucket};
use super::tables::{Entry, SLOTS_LOG};
use crate::error::Result;
use crate::simd::{Backend, multiversion};

pub(super) const GAP_BASES: [u32; SYMBOLS] = Kind::Gap.bases();
pub(super) const BASES: [u32; SYMBOLS] = Kind::Other.bases();
/// A stream is read in words of this many bytes; so many zeros follow a document.
pub(super) const WORD: usize = 8;

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
#[derive(Debug, Clone)]
struct Buffers {
    positions: Vec<u32>,
    levels: Vec<u16>,
}

impl Buffers {
    fn new(k: usize) -> Self {
        Self { positions: vec![0; k], levels: vec![0; k] }
    }
}

/// A stream that is being read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream<'a> {
    /// The whole document, zeros after it.
    data: &'a [u8],
    pub(super) bit: usize,
    state: u32,
}

impl<'a> Stream<'a> {
    pub(super) fn new(data: &'a [u8], byte: usize) -> Self {
        let mut stream = Self { data, bit: 8 * byte, state: 0 };
        stream.state = stream.raw(SLOTS_LOG);
        stream
    }

    /// The next bits, at least 57; zeros after the document.
    #[inline(always)]
    fn window(&self) -> u64 {
        let word = self.data.get(self.bit >> 3..).and_then(|rest| rest.first_chunk());
        word.map_or(0, |&word| u64::from_le_bytes(word)) >> (self.bit & 7)
    }

    #[inline(always)]
    fn raw(&mut self, bits: u32) -> u32 {
        let number = self.window() as u32 & ((1 << bits) - 1);
        self.bit += bits as usize;
        number
    }

    /// The next number of a table.
    #[inline(always)]
    pub(super) fn number(&mut self, entries: &[Entry], table: u32, bases: &[u32; SYMBOLS]) -> u32 {
        let entry = entries[(table + self.state) as usize];
        let window = self.window();
        self.state = entry.base() + (window as u32 & ((1 << entry.bits()) - 1));
        let extra = (window >> entry.bits()) as u32 & ((1 << entry.extra()) - 1);
        self.bit += (entry.bits() + entry.extra()) as usize;
        bases[entry.symbol()] + extra
    }

    /// Checks that the stream was used up: the state is back where it began, and only zero bits
    /// are left.
    pub(super) fn finish(
        &self,
        what: &str,
        first: usize,
        stream: &[u8],
        padding: usize,
    ) -> Result<()> {
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

/// Runs a block for each lane, written out: a loop would keep the lanes in memory.
macro_rules! unrolled {
    ($count:ident, $lane:ident => $block:block) => {{
        {
            let $lane: usize = 0;
            if $lane < $count {
                $block
            }
        }
        {
            let $lane: usize = 1;
            if $lane < $count {
                $block
            }
        }
        {
            let $lane: usize = 2;
            if $lane < $count {
                $block
            }
        }
        {
            let $lane: usize = 3;
            if $lane < $count {
                $block
            }
        }
    }};
}

/// Takes the rows of a document, in any order.
pub(super) trait RowSink {
    fn row(&mut self, row: &StoredRow);
}

/// Calls a function for every row.
pub(super) struct OnRow<'a>(pub(super) &'a mut dyn FnMut(&StoredRow));

impl RowSink for OnRow<'_> {
    fn row(&mut self, row: &StoredRow) {
        (self.0)(row);
    }
}

/// What the rows of a document are read from.
#[derive(Debug)]
struct Lanes<'a> {
    heads: &'a [Head],
    /// Bits of each head.
    head_bits: &'a [u32],
    /// The rows as they are dealt to the streams.
    order: &'a [u32],
    streams: Vec<Stream<'a>>,
}

multiversion! {
    /// Reads all rows whose heads are known.
    fn read_rows<S: RowSink>(model: &Model, lanes: &mut Lanes<'_>, sink: &mut S) -> Result<()> =
        read_rows_body;
}

#[inline(always)]
fn read_rows_body<I, S: RowSink>(
    _isa: I,
    model: &Model,
    lanes: &mut Lanes,
    sink: &mut S,
) -> Result<()> {
    let Lanes { heads, head_bits, order, streams } = lanes;
    let mut buffers = vec![Buffers::new(model.config.k); streams.len()];
    for rows in order.chunks(streams.len()) {
        let mut bits = [[0; 3]; LANES];
        for (bits, &row) in bits.iter_mut().zip(rows) {
            bits[0] = head_bits[row as usize];
        }
        if let Ok(rows) = <&[u32; LANES]>::try_from(rows)
            && let Ok(streams) = <&mut [Stream; LANES]>::try_from(&mut streams[..])
            && let Ok(buffers) = <&mut [Buffers; LANES]>::try_from(&mut buffers[..])
        {
            let rows = rows.map(|row| (row, heads[row as usize]));
            rows_together(model, streams, rows, buffers, &mut bits)?;
        } else {
            let alone = streams.iter_mut().zip(rows).zip(&mut buffers).zip(&mut bits);
            for (((stream, &row), buffer), bits) in alone {
                let rows = [(row, heads[row as usize])];
                let (stream, buffer) = (array::from_mut(stream), array::from_mut(buffer));
                rows_together(model, stream, rows, buffer, array::from_mut(bits))?;
            }
        }
        let read = streams.iter_mut().zip(&buffers).zip(rows).zip(bits);
        for (((stream, buffer), &row), mut bits) in read {
            let head = heads[row as usize];
            let count = usize::from(head.count);
            let levels = &buffer.levels[..count];
            let top = read_top(stream, levels, row, &mut bits[2])?;
            let positions = &buffer.positions[..count];
            sink.row(&StoredRow { row: row as usize, head, positions, levels, top, bits });
        }
    }
    Ok(())
}

impl Model {
    /// Reads all rows of a document.
    pub(super) fn read<S: RowSink>(
        &self,
        backend: Backend,
        data: &[u8],
        frame: &Frame,
        sink: &mut S,
    ) -> Result<()> {
        if frame.rows == 0 {
            return Ok(());
        }
        let mut padded = Vec::with_capacity(data.len() + WORD);
        padded.extend_from_slice(data);
        padded.resize(data.len() + WORD, 0);
        let (heads, head_bits) = self.heads(&padded, frame)?;
        let mut first = frame.bytes + frame.head.len();
        let mut firsts = Vec::new();
        for lane in &frame.lanes {
            firsts.push(first);
            first += lane.len();
        }
        let streams = firsts.iter().map(|&first| Stream::new(&padded, first)).collect();
        let order = &dealt(&heads);
        let mut lanes = Lanes { heads: &heads, head_bits: &head_bits, order, streams };
        read_rows(backend, self, &mut lanes, sink)?;
        let least = frame.rows.div_ceil(super::document::ROWS_PER_BYTE);
        for (number, (stream, lane)) in lanes.streams.iter().zip(&frame.lanes).enumerate() {
            let is_last = number + 1 == frame.lanes.len();
            let padding = if is_last { least.saturating_sub(firsts[number]) } else { 0 };
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
}

/// Reads ids and values of N rows side by side, one from each stream: while one waits for its
/// table, the others go on.
#[inline(always)]
fn rows_together<const N: usize>(
    model: &Model,
    streams: &mut [Stream; N],
    rows: [(u32, Head); N],
    buffers: &mut [Buffers; N],
    bits: &mut [[u32; 3]; N],
) -> Result<()> {
    let mut own = *streams;
    let counts = rows.map(|(_, head)| usize::from(head.count));
    let together = counts.iter().copied().min().unwrap_or(0);
    let mut gaps = rows.map(|(_, head)| GapReader::new(model, head));
    for i in 0..together {
        unrolled!(N, lane => {
            buffers[lane].positions[i] = gaps[lane].next(model, &mut own[lane], counts[lane] - i);
        });
    }
    for lane in 0..N {
        for i in together..counts[lane] {
            buffers[lane].positions[i] = gaps[lane].next(model, &mut own[lane], counts[lane] - i);
        }
        bits[lane][1] = (own[lane].bit - streams[lane].bit) as u32;
        if gaps[lane].beyond {
            return corrupt(format!("row {}: an id beyond the vocabulary", rows[lane].0));
        }
    }
    let middle = own.map(|stream| stream.bit);
    let mut values = rows.map(|(_, head)| LevelReader::new(model, head));
    for i in 0..together {
        unrolled!(N, lane => {
            let position = buffers[lane].positions[i];
            buffers[lane].levels[i] = values[lane].next(model, &mut own[lane], position);
        });
    }
    for lane in 0..N {
        for i in together..counts[lane] {
            let position = buffers[lane].positions[i];
            buffers[lane].levels[i] = values[lane].next(model, &mut own[lane], position);
        }
        bits[lane][2] = (own[lane].bit - middle[lane]) as u32;
        if values[lane].beyond {
            return corrupt(format!("row {}: a value beyond the scale", rows[lane].0));
        }
    }
    *streams = own;
    Ok(())
}

/// Reads the positions of a row.
#[derive(Debug, Clone, Copy)]
struct GapReader<'a> {
    /// The contexts of the row's class.
    contexts: &'a [u32],
    /// One more than the last position.
    previous: u32,
    /// A position was not below the vocabulary.
    beyond: bool,
}

impl<'a> GapReader<'a> {
    fn new(model: &'a Model, head: Head) -> Self {
        let class = model.clusters[usize::from(head.cluster)].gap_class;
        let first = model.dimensions.gap(class, 0, 0);
        Self { contexts: &model.gap[first..], previous: 0, beyond: false }
    }

    #[inline(always)]
    fn next(&mut self, model: &Model, stream: &mut Stream, left: usize) -> u32 {
        let left = usize::from(model.left_buckets[left]);
        let context = bucket(self.previous) * model.dimensions.left + left;
        let gap = stream.number(&model.entries, self.contexts[context], &GAP_BASES);
        let position = self.previous + gap;
        self.beyond |= position >= model.config.vocab_size;
        let position = position.min(model.config.vocab_size - 1);
        self.previous = position + 1;
        position
    }
}

/// Reads the levels of a row.
#[derive(Debug, Clone, Copy)]
struct LevelReader<'a> {
    /// The contexts of the row's shape.
    contexts: &'a [u32],
    state: u8,
    /// A level was not on the scale.
    beyond: bool,
}

impl<'a> LevelReader<'a> {
    fn new(model: &'a Model, head: Head) -> Self {
        let first = 2 * usize::from(head.shape) * model.dimensions.positions;
        Self { contexts: &model.level[first..], state: 0, beyond: false }
    }

    #[inline(always)]
    fn next(&mut self, model: &Model, stream: &mut Stream, position: u32) -> u16 {
        let quantiser = usize::from(self.state >> 1);
        let context = quantiser * model.dimensions.positions + bucket(position + 1);
        let number = stream.number(&model.entries, self.contexts[context], &BASES) as usize;
        self.state = NEXT[usize::from(self.state & 3)][number & 1];
        let level = 2 * number + quantiser;
        self.beyond |= level >= model.levels.len();
        level.min(model.levels.len() - 1) as u16
    }
}

/// The bits that say which of `near` ids is first.
pub(super) const fn top_bits(near: usize) -> u32 {
    usize::BITS - (near - 1).leading_zeros()
}

/// How many levels below the highest one the most probable id may be.
pub(super) const TOP_LEVELS: u16 = 3;

/// How many ids may be the most probable one.
#[inline(always)]
pub(super) fn near_top(levels: &[u16]) -> usize {
    let highest = levels.iter().max().copied().unwrap_or(0);
    levels.iter().filter(|&&level| level + TOP_LEVELS >= highest).count()
}

#[inline(always)]
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
    ids: &'a mut [i64],
    logprobs: &'a mut [f32],
    /// For each level, its number of ids, then where its next one goes.
    places: Vec<u16>,
    /// Which levels occur.
    occur: Vec<u64>,
}

impl<'a> Ranking<'a> {
    /// `ids` and `logprobs` have room for k numbers a row.
    pub(super) fn new(model: &'a Model, ids: &'a mut [i64], logprobs: &'a mut [f32]) -> Self {
        let levels = model.levels.len();
        let (places, occur) = (vec![0; levels], vec![0; levels.div_ceil(64)]);
        Self { model, ids, logprobs, places, occur }
    }
}

impl RowSink for Ranking<'_> {
    /// Writes a row: by falling level, ids of a level by position, then what is absent.
    #[inline(always)]
    fn row(&mut self, row: &StoredRow) {
        let Self { model, places, occur, .. } = self;
        let at = row.row * model.config.k..(row.row + 1) * model.config.k;
        let (ids, logprobs) = (&mut self.ids[at.clone()], &mut self.logprobs[at]);
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
