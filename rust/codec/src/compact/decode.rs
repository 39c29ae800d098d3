//! Documents to rows: heads first, then the ids and values of [`LANES`] rows side by side.

use std::array;
use std::ops::Range;

use super::document::{Frame, LANES, corrupt};
use super::model::{BUCKETS, MASSES, Model, level_place};
use super::numbers::{ESCAPE_BITS, bucket};
use super::order::FirstIds;
use super::tables::{Entry, SLOTS_LOG};
#[cfg(target_arch = "x86_64")]
use super::wide::{self, Group, Vectors};
use crate::error::Result;
#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
use crate::simd::{Backend, Isa, Portable, multiversion};

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
    /// The id at each.
    pub(super) ids: &'a [u32],
    pub(super) levels: &'a [u16],
    /// The place of the most probable id among all by falling level.
    pub(super) top: usize,
    /// Bits of head, ids, values.
    pub(super) bits: [u32; 3],
}

/// A stream that is being read, of a document with zeros after it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stream {
    pub(super) bit: usize,
    pub(super) state: u32,
}

impl Stream {
    pub(super) fn new(data: &[u8], byte: usize) -> Self {
        let mut stream = Self { bit: 8 * byte, state: 0 };
        stream.state = stream.raw(data, SLOTS_LOG);
        stream
    }

    /// The next bits, at least 57; zeros after the document.
    #[inline(always)]
    fn window(&self, data: &[u8]) -> u64 {
        let byte = self.bit >> 3;
        let word = data.get(byte..byte + WORD).and_then(|word| word.first_chunk());
        word.map_or(0, |&word| u64::from_le_bytes(word)) >> (self.bit & 7)
    }

    #[inline(always)]
    pub(super) fn raw(&mut self, data: &[u8], bits: u32) -> u32 {
        let number = self.window(data) as u32 & ((1 << bits) - 1);
        self.bit += bits as usize;
        number
    }

    /// The next number of a table.
    #[inline(always)]
    pub(super) fn number(&mut self, data: &[u8], entries: &[u32], table: u32) -> u32 {
        let entry = Entry(entries[(table + self.state) as usize]);
        let (bits, extra) = (entry.bits(), entry.extra());
        let window = self.window(data);
        self.state = entry.base() + (window as u32 & ((1 << bits) - 1));
        self.bit += (bits + extra) as usize;
        (entry.lead() << extra) + ((window >> bits) as u32 & ((1 << extra) - 1))
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

/// Takes the rows of a document, in any order.
pub(super) trait RowSink {
    fn row(&mut self, row: &StoredRow);

    /// Takes the rows of a group.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn group<I: Vectors>(&mut self, _isa: I, source: &Source, group: &mut Group) {
        group.each_row(source, |row| self.row(row));
    }
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
pub(super) struct Source<'a> {
    /// The document, zeros after it.
    pub(super) data: &'a [u8],
    pub(super) heads: &'a [Head],
    /// Bits of each head.
    pub(super) head_bits: &'a [u32],
    /// The rows as they are dealt to the lanes.
    pub(super) order: &'a [u32],
    pub(super) first: &'a FirstIds,
}

/// Two streams, and the row that is read from them.
#[derive(Debug)]
struct Lane<'a> {
    gaps: Stream,
    levels: Stream,
    row: usize,
    head: Head,
    count: usize,
    gap_place: u32,
    level_contexts: &'a [u32; BUCKETS],
    /// One more than the last position, and its bucket.
    previous: u32,
    bucket: u32,
    /// The quantiser of the next level, and that of the one after it if the next number is even.
    quantisers: [u32; 2],
    /// All numbers of levels, or-ed.
    numbers: u32,
    /// All positions, or-ed.
    beyond: u32,
    ids: RowIds,
}

/// Room for k ids; those of a row with fewer are the last ones.
#[derive(Debug)]
struct RowIds {
    positions: Vec<u32>,
    /// Buckets of the positions + 1.
    buckets: Vec<u8>,
    ids: Vec<u32>,
    levels: Vec<u16>,
}

impl<'a> Lane<'a> {
    fn new(model: &'a Model, [gaps, levels]: [Stream; 2]) -> Self {
        let k = model.config.k;
        Self {
            gaps,
            levels,
            row: 0,
            head: Head::default(),
            count: 0,
            gap_place: 0,
            level_contexts: model.level(0),
            previous: 0,
            bucket: 0,
            quantisers: [0; 2],
            numbers: 0,
            beyond: 0,
            ids: RowIds {
                positions: vec![0; k],
                buckets: vec![0; k],
                ids: vec![0; k],
                levels: vec![0; k],
            },
        }
    }

    /// Begins a row.
    fn begin(&mut self, model: &'a Model, source: &Source, row: usize) {
        let head = source.heads[row];
        self.row = row;
        self.head = head;
        self.count = usize::from(head.count);
        self.gap_place = model.gap_place(head.cluster);
        self.level_contexts = model.level(usize::from(head.shape));
        self.previous = 0;
        self.bucket = 0;
        self.quantisers = [0; 2];
        self.numbers = 0;
        self.beyond = 0;
    }

    /// Where the buffers have the row.
    #[inline(always)]
    fn places(&self) -> Range<usize> {
        self.ids.levels.len() - self.count..self.ids.levels.len()
    }

    /// Reads the position for place `at` of the buffers; `left` is that of [`Model::lefts`].
    #[inline(always)]
    fn position(&mut self, model: &Model, data: &[u8], at: usize, left: u32) {
        let table = model.gap[(left + self.gap_place + self.bucket) as usize];
        let gap = self.gaps.number(data, &model.entries, table);
        let position = self.previous.wrapping_add(gap);
        self.ids.positions[at] = position;
        self.beyond |= position;
        self.previous = position.wrapping_add(1);
        self.bucket = bucket(self.previous) as u32;
        self.ids.buckets[at] = self.bucket as u8;
    }

    /// Reads the level for place `at` of the buffers, where the position is known.
    #[inline(always)]
    fn level(&mut self, model: &Model, data: &[u8], at: usize) {
        let [quantiser, after] = self.quantisers;
        let bucket = usize::from(self.ids.buckets[at]);
        let table = level_place(self.level_contexts[bucket % BUCKETS], quantiser);
        let number = self.levels.number(data, &model.entries, table);
        self.ids.levels[at] = (2 * number + quantiser) as u16;
        self.quantisers = [after ^ (number & 1), quantiser];
        self.numbers |= number;
    }

    /// Checks the positions.
    #[inline(always)]
    fn check_positions(&self, model: &Model) -> Result<()> {
        // Gaps are below 2²⁴: positions ascend as long as none is beyond that.
        if self.beyond >> ESCAPE_BITS > 0 || self.previous > model.config.vocab_size {
            return corrupt(format!("row {}: an id beyond the vocabulary", self.row));
        }
        Ok(())
    }

    /// Checks the levels; reads which id is the most probable one.
    #[inline(always)]
    fn read_top(&mut self, model: &Model, data: &[u8]) -> Result<usize> {
        let levels = &self.ids.levels[self.places()];
        let fits = self.numbers <= u32::from(u16::MAX) / 2;
        let highest = if fits { highest(levels) } else { u16::MAX };
        let near = near_top(levels, highest);
        read_top(model, data, &mut self.levels, (highest, near), self.row)
    }
}

/// Checks the highest level of a row; reads which of the ids near it is the most probable one.
#[inline(always)]
pub(super) fn read_top(
    model: &Model,
    data: &[u8],
    stream: &mut Stream,
    (highest, near): (u16, usize),
    row: usize,
) -> Result<usize> {
    if usize::from(highest) >= model.levels.len() {
        return corrupt(format!("row {row}: a value beyond the scale"));
    }
    if near < 2 {
        return Ok(0);
    }
    let top = stream.raw(data, top_bits(near)) as usize;
    if top >= near {
        return corrupt(format!("row {row}: the most probable id is number {top} of {near}"));
    }
    Ok(top)
}

multiversion! {
    /// Reads all rows whose heads are known.
    fn read_rows<S: RowSink>(
        model: &Model,
        source: &Source<'_>,
        streams: &mut [Stream],
        sink: &mut S,
    ) -> Result<()> = ReadRows::read_rows;
}

/// How an instruction set reads the rows of [`LANES`] lanes.
trait ReadRows: Isa {
    #[inline(always)]
    fn read_rows<S: RowSink>(
        self,
        model: &Model,
        source: &Source,
        streams: &mut [Stream],
        sink: &mut S,
    ) -> Result<()> {
        read_fours(model, source, streams, sink)
    }
}

impl ReadRows for Portable {}

#[cfg(target_arch = "aarch64")]
impl ReadRows for Neon {}

#[cfg(target_arch = "x86_64")]
impl<I: Vectors> ReadRows for I {
    #[inline(always)]
    fn read_rows<S: RowSink>(
        self,
        model: &Model,
        source: &Source,
        streams: &mut [Stream],
        sink: &mut S,
    ) -> Result<()> {
        if wide::takes(source, streams) {
            return wide::read_rows(self, model, source, streams, sink);
        }
        read_fours(model, source, streams, sink)
    }
}

/// Reads rows of four lanes at a time.
#[inline(always)]
fn read_fours<S: RowSink>(
    model: &Model,
    source: &Source,
    streams: &mut [Stream],
    sink: &mut S,
) -> Result<()> {
    // On the stack, where reading what was just written takes no time.
    let (gaps, levels) = streams.split_at_mut(streams.len() / 2);
    let mut lanes: [[Lane; TOGETHER]; LANES / TOGETHER] = array::from_fn(|four| {
        array::from_fn(|lane| {
            let lane = TOGETHER * four + lane;
            let of = |streams: &[Stream]| streams.get(lane).copied().unwrap_or_default();
            Lane::new(model, [of(gaps), of(levels)])
        })
    });
    for rows in source.order.chunks(gaps.len()) {
        for (lanes, rows) in lanes.iter_mut().zip(rows.chunks(TOGETHER)) {
            for (lane, &row) in lanes.iter_mut().zip(rows) {
                lane.begin(model, source, row as usize);
            }
            read_together(model, source, lanes, rows.len(), sink)?;
        }
    }
    let lanes = lanes.into_iter().flatten();
    for ((gaps, levels), lane) in gaps.iter_mut().zip(levels).zip(lanes) {
        (*gaps, *levels) = (lane.gaps, lane.levels);
    }
    Ok(())
}

/// Rows that are read side by side.
const TOGETHER: usize = 4;

/// Reads a row of each lane side by side, a number of each in turn: while one waits for its table,
/// the others go on.
#[inline(always)]
fn read_together<S: RowSink>(
    model: &Model,
    source: &Source,
    lanes: &mut [Lane; TOGETHER],
    used: usize,
    sink: &mut S,
) -> Result<()> {
    let (k, data) = (model.config.k, source.data);
    let least = lanes.iter().map(|lane| lane.count).min().unwrap_or(0);
    let together = if used == TOGETHER { least } else { 0 };
    let mut starts = [[0; 2]; TOGETHER];
    for (start, lane) in starts.iter_mut().zip(&mut lanes[..used]) {
        *start = [lane.gaps.bit, lane.levels.bit];
        for left in (together + 1..=lane.count).rev() {
            // Neither waits for the other's table.
            lane.position(model, data, k - left, model.lefts[left]);
            lane.level(model, data, k - left);
        }
    }
    let [a, b, c, d] = lanes;
    for at in k - together..k {
        let left = model.lefts[k - at];
        a.position(model, data, at, left);
        b.position(model, data, at, left);
        c.position(model, data, at, left);
        d.position(model, data, at, left);
    }
    for at in k - together..k {
        a.level(model, data, at);
        b.level(model, data, at);
        c.level(model, data, at);
        d.level(model, data, at);
    }
    for (start, lane) in starts.iter().zip(&mut lanes[..used]) {
        lane.check_positions(model)?;
        let top = lane.read_top(model, data)?;
        let (row, head, places) = (lane.row, lane.head, lane.places());
        let [gaps, levels] = [lane.gaps.bit - start[0], lane.levels.bit - start[1]];
        let RowIds { positions, ids, levels: stored, .. } = &mut lane.ids;
        let (positions, ids) = (&positions[places.clone()], &mut ids[places.clone()]);
        model.ids(source.first, usize::from(head.cluster), positions, ids);
        let levels_of_row = &stored[places];
        let bits = [source.head_bits[row], gaps as u32, levels as u32];
        sink.row(&StoredRow { row, head, positions, ids, levels: levels_of_row, top, bits });
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
        for lane in &frame.streams {
            firsts.push(first);
            first += lane.len();
        }
        let mut streams: Vec<Stream> =
            firsts.iter().map(|&first| Stream::new(&padded, first)).collect();
        let order = &dealt(&heads);
        let first = self.first();
        let source = Source { data: &padded, heads: &heads, head_bits: &head_bits, order, first };
        read_rows(backend, self, &source, &mut streams, sink)?;
        let least = frame.rows.div_ceil(super::document::ROWS_PER_BYTE);
        for (number, (stream, lane)) in streams.iter().zip(&frame.streams).enumerate() {
            let is_last = number + 1 == frame.streams.len();
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
            let mut next = |table: u32| stream.number(data, &self.entries, table);
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

/// The bits that say which of `near` ids is first.
pub(super) const fn top_bits(near: usize) -> u32 {
    usize::BITS - (near - 1).leading_zeros()
}

/// How many levels below the highest one the most probable id may be.
pub(super) const TOP_LEVELS: u16 = 3;

/// The highest of a row's levels.
#[inline(always)]
pub(super) fn highest(levels: &[u16]) -> u16 {
    levels.iter().fold(0, |highest, &level| highest.max(level))
}

/// How many ids may be the most probable one.
#[inline(always)]
pub(super) fn near_top(levels: &[u16], highest: u16) -> usize {
    let least = highest.saturating_sub(TOP_LEVELS);
    usize::from(levels.iter().map(|&level| u16::from(level >= least)).sum::<u16>())
}
