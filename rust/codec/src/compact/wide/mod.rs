//! The rows of [`LANES`] lanes side by side, each in its lane of [`Vectors`].
//!
//! Indices come from the document, which may be damaged: those beyond a table's end are cut off
//! there, and what is read then is refused by the checks at the end of a row. Lanes without an id
//! read something as well, which is ignored.

mod rank;
mod vectors;

use std::array;

use super::decode::{Head, RowSink, Source, StoredRow, Stream, TOP_LEVELS, read_top};
use super::document::{LANES, corrupt};
use super::model::{BUCKETS, Model};
use super::numbers::ESCAPE_BITS;
use super::order::{FirstIds, Ids};
use super::tables::{Entry, SLOTS, SLOTS_LOG};
use crate::error::Result;
pub(super) use rank::rank;
use vectors::{Mask, Vector, prefetch};
pub(super) use vectors::{Numbers, Vectors};

/// Bits that can be used of 32 that begin at a whole byte.
const WINDOW: u32 = 32 - 7;
/// Bits are counted in 32 bits, and no row has as many as this many bytes do.
const MAX_BYTES: usize = 1 << 28;

/// Whether a document can be read here.
pub(super) const fn takes(source: &Source, streams: &[Stream]) -> bool {
    streams.len() == 2 * LANES && source.data.len() <= MAX_BYTES
}

/// Which of the lanes have an id at a step; all have if `ALL`.
#[derive(Clone, Copy)]
struct Active<I: Vectors, const ALL: bool> {
    isa: I,
    mask: Mask,
}

impl<I: Vectors, const ALL: bool> Active<I, ALL> {
    /// Those with at least so many ids: rows are aligned at their end.
    #[inline(always)]
    fn new(isa: I, counts: Vector, left: usize) -> Self {
        Self { isa, mask: isa.above(counts, isa.splat(left as u32 - 1)) }
    }

    /// The new number of active lanes, the other one of others.
    #[inline(always)]
    fn or(self, new: Vector, other: Vector) -> Vector {
        if ALL { new } else { self.isa.select(self.mask, new, other) }
    }

    /// The numbers of active lanes, 0 for others.
    #[inline(always)]
    fn only(self, numbers: Vector) -> Vector {
        if ALL { numbers } else { self.isa.only(self.mask, numbers) }
    }
}

/// A stream of each lane.
#[derive(Clone, Copy)]
struct Streams {
    bit: Vector,
    state: Vector,
    /// The bits from there on, and how many bits before them were in the same window.
    window: Vector,
    used: Vector,
}

impl Streams {
    #[inline(always)]
    fn load<I: Vectors>(isa: I, streams: &[Stream]) -> Self {
        let bits = Numbers(array::from_fn(|lane| streams[lane].bit as u32));
        let states = Numbers(array::from_fn(|lane| streams[lane].state));
        let [window, used] = [isa.splat(0); 2];
        Self { bit: isa.load(&bits), state: isa.load(&states), window, used }
    }

    #[inline(always)]
    fn store<I: Vectors>(&self, isa: I, streams: &mut [Stream]) {
        let (mut bits, mut states) = (Numbers::default(), Numbers::default());
        isa.store(self.bit, &mut bits);
        isa.store(self.state, &mut states);
        for (lane, stream) in streams.iter_mut().enumerate() {
            *stream = Stream { bit: bits.0[lane] as usize, state: states.0[lane] };
        }
    }
}

/// What numbers are read from: the document, with zeros after it, and tables of a [`Model`].
#[derive(Clone, Copy)]
struct Reader<'a, I> {
    isa: I,
    data: &'a [u8],
    entries: &'a [u32],
    gap: &'a [u32],
    level: &'a [u32],
    lefts: &'a [u32],
}

impl<I: Vectors> Reader<'_, I> {
    /// The next bits, at least [`WINDOW`]; zeros after the document.
    #[inline(always)]
    fn window(self, bit: Vector) -> Vector {
        let bytes = self.isa.gather_bytes(self.data, self.isa.right_by(bit, 3));
        self.isa.right(bytes, self.isa.and(bit, self.isa.splat(7)))
    }

    /// The next number of each table. Bits are read anew only if `FRESH`, or where those that were
    /// read do not suffice, which is seldom.
    #[inline(always)]
    fn numbers<const ALL: bool, const FRESH: bool>(
        self,
        streams: &mut Streams,
        tables: Vector,
        active: Active<I, ALL>,
    ) -> Vector {
        let isa = self.isa;
        let entries = isa.gather(self.entries, isa.add(tables, streams.state));
        if FRESH {
            streams.window = self.window(streams.bit);
            streams.used = isa.splat(0);
        }
        let (ones, count) = (isa.splat(u32::MAX), isa.splat((1 << Entry::COUNT) - 1));
        let bits = isa.and(isa.right_by(entries, SLOTS_LOG), count);
        let extra = isa.and(isa.right_by(entries, SLOTS_LOG + Entry::COUNT), count);
        let base = isa.and(entries, isa.splat(SLOTS as u32 - 1));
        let taken = active.only(isa.add(bits, extra));
        streams.used = isa.add(streams.used, taken);
        let mut rest = isa.right(streams.window, bits);
        if isa.bits(isa.above(streams.used, isa.splat(WINDOW))) > 0 {
            streams.window = self.window(streams.bit);
            streams.used = taken;
            // The extra bits have a window of their own: 8 bits and 24 do not fit in one.
            rest = self.window(isa.add(streams.bit, bits));
        }
        let low = isa.and_not(isa.left(ones, bits), streams.window);
        streams.window = active.or(isa.right(rest, extra), streams.window);
        streams.state = active.or(isa.add(base, low), streams.state);
        streams.bit = isa.add(streams.bit, taken);
        let lead = isa.left(isa.right_by(entries, SLOTS_LOG + 2 * Entry::COUNT), extra);
        isa.add(lead, isa.and_not(isa.left(ones, extra), rest))
    }
}

/// Reads the positions of a row of each lane.
struct Gaps {
    streams: Streams,
    /// Where the contexts of each row's cluster are.
    contexts: Vector,
    /// One more than the last position, and its bucket.
    next: Vector,
    bucket: Vector,
    /// All positions, or-ed.
    all: Vector,
}

impl Gaps {
    #[inline(always)]
    fn new<I: Vectors>(isa: I, streams: Streams, group: &Group) -> Self {
        let [next, bucket, all] = [isa.splat(0); 3];
        Self { streams, contexts: isa.load(&group.gaps), next, bucket, all }
    }

    /// The next positions, `left` of which are left.
    #[inline(always)]
    fn next<I: Vectors, const ALL: bool, const FRESH: bool>(
        &mut self,
        reader: Reader<I>,
        active: Active<I, ALL>,
        left: usize,
    ) -> Vector {
        let isa = reader.isa;
        let context = isa.add(isa.add(self.contexts, isa.splat(reader.lefts[left])), self.bucket);
        let tables = isa.gather(reader.gap, context);
        let gap = reader.numbers::<ALL, FRESH>(&mut self.streams, tables, active);
        let position = isa.add(self.next, gap);
        let after = isa.add(position, isa.splat(1));
        self.next = active.or(after, self.next);
        self.bucket = active.or(isa.buckets(after), self.bucket);
        self.all = isa.or(self.all, active.only(position));
        position
    }

    /// A bit for each lane with a position beyond the vocabulary.
    #[inline(always)]
    fn beyond<I: Vectors>(&self, isa: I, model: &Model) -> u32 {
        // Gaps are below 2²⁴: positions ascend as long as none is beyond that. `over` is right only
        // where they do.
        let large = isa.above(isa.right_by(self.all, ESCAPE_BITS), isa.splat(0));
        let over = isa.above(self.next, isa.splat(model.config.vocab_size));
        isa.bits(large) | isa.bits(over)
    }
}

/// Reads the levels of a row of each lane.
struct Levels {
    streams: Streams,
    /// Where the contexts of each row's shape are.
    contexts: Vector,
    /// 16 for the second quantiser: of the next level, and of the one after it if the next number is
    /// even.
    quantiser: Vector,
    following: Vector,
    /// All levels, or-ed.
    all: Vector,
}

impl Levels {
    #[inline(always)]
    fn new<I: Vectors>(isa: I, streams: Streams, group: &Group) -> Self {
        let [quantiser, following, all] = [isa.splat(0); 3];
        Self { streams, contexts: isa.load(&group.shapes), quantiser, following, all }
    }

    /// The next levels, of ids at positions in these buckets.
    #[inline(always)]
    fn next<I: Vectors, const ALL: bool, const FRESH: bool>(
        &mut self,
        reader: Reader<I>,
        active: Active<I, ALL>,
        buckets: Vector,
    ) -> Vector {
        let isa = reader.isa;
        let both = isa.gather(reader.level, isa.add(self.contexts, buckets));
        let table = isa.and(isa.right(both, self.quantiser), isa.splat(0xffff));
        let tables = isa.left(table, isa.splat(SLOTS_LOG));
        let number = reader.numbers::<ALL, FRESH>(&mut self.streams, tables, active);
        let level = isa.add(isa.add(number, number), isa.right_by(self.quantiser, 4));
        self.all = isa.or(self.all, active.only(level));
        let odd = isa.left(isa.and(number, isa.splat(1)), isa.splat(4));
        let next = isa.xor(self.following, odd);
        self.following = active.or(self.quantiser, self.following);
        self.quantiser = active.or(next, self.quantiser);
        level
    }

    /// A bit for each lane with a level that is too large for a key.
    #[inline(always)]
    fn too_large<I: Vectors>(&self, isa: I) -> u32 {
        isa.bits(isa.above(isa.right_by(self.all, 16), isa.splat(0)))
    }
}

/// Where the ids of a row of each lane are looked up.
struct Places<'a> {
    ids: &'a Ids,
    /// The first and the last place of each cluster, the latter from there on.
    begin: Vector,
    last: Vector,
}

impl<'a> Places<'a> {
    #[inline(always)]
    fn new<I: Vectors>(isa: I, group: &Group, first: &'a FirstIds) -> Self {
        let last = isa.splat(first.positions as u32 - 1);
        Self { ids: &first.ids, begin: isa.load(&group.first), last }
    }

    /// Positions that are not in the table have the last place.
    #[inline(always)]
    fn of<I: Vectors>(&self, isa: I, positions: Vector) -> Vector {
        isa.add(self.begin, isa.min(positions, self.last))
    }
}

/// A row of each lane, while it is read.
struct Reading<'a, I: Vectors> {
    reader: Reader<'a, I>,
    gaps: &'a mut Gaps,
    levels: &'a mut Levels,
    counts: Vector,
    places: Places<'a>,
    /// Those of the last two steps.
    last_places: [Numbers; 2],
    positions: &'a mut [Numbers],
    keys: &'a mut [Numbers],
}

impl<I: Vectors> Reading<'_, I> {
    #[inline(always)]
    fn active<const ALL: bool>(&self, step: usize) -> Active<I, ALL> {
        Active::new(self.reader.isa, self.counts, self.positions.len() - step)
    }

    /// Reads the positions of a step, if there is one, and the levels of the one before: neither
    /// waits for the other's tables. Even steps have a fresh window of the gaps, odd ones of the
    /// levels.
    #[inline(always)]
    fn step<const ALL: bool, const EVEN: bool>(&mut self, step: usize) {
        let (reader, isa) = (self.reader, self.reader.isa);
        let buckets = self.gaps.bucket;
        let steps = self.positions.len();
        if step < steps {
            let active = self.active(step);
            let position = self.gaps.next::<I, ALL, EVEN>(reader, active, steps - step);
            isa.store(position, &mut self.positions[step]);
            isa.store(self.places.of(isa, position), &mut self.last_places[step % 2]);
        }
        if let Some(before) = step.checked_sub(1).filter(|&before| before < steps) {
            // Of the ids before this one, so that what was stored need not be waited for.
            prefetch(self.places.ids, &self.last_places[before % 2]);
            let active = self.active(before);
            let level = if EVEN {
                self.levels.next::<I, ALL, false>(reader, active, buckets)
            } else {
                self.levels.next::<I, ALL, true>(reader, active, buckets)
            };
            let key = Key::of(isa, level, before);
            isa.store(active.or(key, isa.splat(Key::ABSENT)), &mut self.keys[before]);
        }
    }
}

/// A row of each lane. Ids are in steps: all rows end with the last one.
pub(super) struct Group {
    /// How many of the lanes have a row: the first ones.
    pub(super) used: usize,
    pub(super) rows: [usize; LANES],
    pub(super) heads: [Head; LANES],
    /// The place of the most probable id among all by falling level.
    pub(super) tops: [usize; LANES],
    pub(super) counts: Numbers,
    /// How many ids the longest row has.
    pub(super) steps: usize,
    /// Where the contexts of a row's gaps and levels begin, and the ids of its cluster.
    gaps: Numbers,
    shapes: Numbers,
    first: Numbers,
    positions: Vec<Numbers>,
    pub(super) ids: Vec<Numbers>,
    /// What ids are sorted by: [`Key`].
    pub(super) keys: Vec<Numbers>,
    /// Where the streams of gaps and of levels were before the row, and where they are.
    begun: [Numbers; 2],
    ended: [Numbers; 2],
}

/// The inverse of a level in the high half, the step in the low half: keys ascend as probabilities
/// fall. All ones where a lane has no id.
pub(super) struct Key;

impl Key {
    const ABSENT: u32 = u32::MAX;

    #[inline(always)]
    fn of<I: Vectors>(isa: I, level: Vector, step: usize) -> Vector {
        isa.sub(isa.splat(0xffff_0000 | step as u32), isa.left(level, isa.splat(16)))
    }

    #[inline(always)]
    pub(super) fn level<I: Vectors>(isa: I, key: Vector) -> Vector {
        isa.sub(isa.splat(0xffff), isa.right_by(key, 16))
    }

    #[inline(always)]
    pub(super) fn step<I: Vectors>(isa: I, key: Vector) -> Vector {
        isa.and(key, isa.splat(0xffff))
    }

    const fn level_of(key: u32) -> u16 {
        !(key >> 16) as u16
    }
}

impl Group {
    fn new(k: usize) -> Self {
        Self {
            used: 0,
            rows: [0; LANES],
            heads: [Head::default(); LANES],
            tops: [0; LANES],
            counts: Numbers::default(),
            steps: 0,
            gaps: Numbers::default(),
            shapes: Numbers::default(),
            first: Numbers::default(),
            positions: vec![Numbers::default(); k],
            ids: vec![Numbers::default(); k],
            keys: vec![Numbers::default(); k.next_power_of_two().max(8)],
            begun: [Numbers::default(); 2],
            ended: [Numbers::default(); 2],
        }
    }

    /// Begins rows, at most one of each lane.
    fn begin(&mut self, model: &Model, source: &Source, rows: &[u32]) {
        self.used = rows.len();
        self.counts = Numbers::default();
        for (lane, &row) in rows.iter().enumerate() {
            let head = source.heads[row as usize];
            let cluster = usize::from(head.cluster);
            self.rows[lane] = row as usize;
            self.heads[lane] = head;
            self.counts.0[lane] = u32::from(head.count);
            self.gaps.0[lane] = model.gap_place(head.cluster);
            self.shapes.0[lane] = u32::from(head.shape) * BUCKETS as u32;
            self.first.0[lane] = (cluster * source.first.positions) as u32;
        }
        self.steps = self.counts.0.iter().copied().max().unwrap_or(0) as usize;
    }

    /// Whether all lanes have as many ids.
    fn is_even(&self) -> bool {
        self.counts.0.iter().all(|&count| count as usize == self.steps)
    }

    /// Reads the positions and the levels.
    #[inline(always)]
    fn read<I: Vectors, const ALL: bool>(
        &mut self,
        reader: Reader<I>,
        first: &FirstIds,
        gaps: &mut Gaps,
        levels: &mut Levels,
    ) {
        let isa = reader.isa;
        let mut reading = Reading {
            reader,
            gaps,
            levels,
            counts: isa.load(&self.counts),
            places: Places::new(isa, self, first),
            last_places: [Numbers::default(); 2],
            positions: &mut self.positions[..self.steps],
            keys: &mut self.keys[..self.steps],
        };
        for step in (0..=self.steps).step_by(2) {
            reading.step::<ALL, true>(step);
            reading.step::<ALL, false>(step + 1);
        }
    }

    /// The keys and absent ones after them: as many as a power of two, at least 8.
    pub(super) fn padded_keys(&mut self) -> &mut [Numbers] {
        let length = self.steps.next_power_of_two().max(8);
        self.keys[self.steps..length].fill(Numbers([Key::ABSENT; LANES]));
        &mut self.keys[..length]
    }

    /// Looks up the ids.
    #[inline(always)]
    fn look_up<I: Vectors>(&mut self, isa: I, first: &FirstIds) {
        let places = Places::new(isa, self, first);
        for (id, positions) in self.ids.iter_mut().zip(&self.positions[..self.steps]) {
            let place = places.of(isa, isa.load(positions));
            let found = match &first.ids {
                Ids::Wide(table) => isa.gather(table, place),
                Ids::Narrow(table) => isa.and(isa.gather_narrow(table, place), isa.splat(0xffff)),
            };
            isa.store(found, id);
        }
    }

    /// The highest level of each lane, and how many ids may be the most probable one.
    #[inline(always)]
    fn near_tops<I: Vectors>(&self, isa: I) -> [(u16, usize); LANES] {
        let keys = &self.keys[..self.steps];
        let mut least = isa.splat(u32::MAX);
        for key in keys {
            least = isa.min(least, isa.load(key));
        }
        // Levels of ids near the top, inverted, are at most this.
        let high = isa.add(isa.right_by(least, 16), isa.splat(u32::from(TOP_LEVELS)));
        let most = isa.min(high, isa.splat(0xffff));
        let mut near = isa.splat(0);
        for key in keys {
            let key = isa.load(key);
            let present = isa.above(isa.splat(0xffff), isa.and(key, isa.splat(0xffff)));
            let beyond = isa.above(isa.right_by(key, 16), most);
            let one = isa.only(present, isa.splat(1));
            near = isa.add(near, isa.select(beyond, isa.splat(0), one));
        }
        let (mut highest, mut nears) = (Numbers::default(), Numbers::default());
        isa.store(least, &mut highest);
        isa.store(near, &mut nears);
        array::from_fn(|lane| (Key::level_of(highest.0[lane]), nears.0[lane] as usize))
    }

    /// Checks the rows, reads which ids are the most probable ones, and looks up those that are not
    /// in the table. `too_large` has a bit for each lane with a level that is.
    #[inline(always)]
    fn finish<I: Vectors>(
        &mut self,
        isa: I,
        model: &Model,
        source: &Source,
        too_large: u32,
    ) -> Result<()> {
        let tops = self.near_tops(isa);
        for (lane, (highest, near)) in tops.into_iter().enumerate().take(self.used) {
            let number = self.rows[lane];
            let [gaps_end, bit] = self.ended.map(|bits| bits.0[lane] as usize);
            if gaps_end.max(bit) > 8 * source.data.len() {
                return corrupt(format!("row {number}: the document has ended"));
            }
            let highest = if too_large >> lane & 1 > 0 { u16::MAX } else { highest };
            let mut stream = Stream { bit, state: 0 };
            self.tops[lane] = read_top(model, source.data, &mut stream, (highest, near), number)?;
            self.ended[1].0[lane] = stream.bit as u32;
            self.look_up_far(model, source, lane);
        }
        Ok(())
    }

    /// Looks up a lane's last ids, those that are not in the table.
    #[inline(always)]
    fn look_up_far(&mut self, model: &Model, source: &Source, lane: usize) {
        let begin = self.steps - self.counts.0[lane] as usize;
        let places = self.positions[begin..self.steps].iter().zip(&mut self.ids[begin..self.steps]);
        for (position, id) in places.rev() {
            let position = position.0[lane];
            if (position as usize) < source.first.positions {
                break;
            }
            let cluster = usize::from(self.heads[lane].cluster);
            id.0[lane] = model.far_id(cluster, position);
        }
    }

    /// Bits of a row's head, ids and values.
    fn bits(&self, source: &Source, lane: usize) -> [u32; 3] {
        let [ids, values] =
            array::from_fn(|part| self.ended[part].0[lane] - self.begun[part].0[lane]);
        [source.head_bits[self.rows[lane]], ids, values]
    }

    /// Calls a function for every row.
    pub(super) fn each_row(&self, source: &Source, mut on_row: impl FnMut(&StoredRow)) {
        let (mut positions, mut ids, mut levels) = (Vec::new(), Vec::new(), Vec::new());
        for lane in 0..self.used {
            let places = self.steps - self.counts.0[lane] as usize..self.steps;
            positions.clear();
            positions
                .extend(self.positions[places.clone()].iter().map(|position| position.0[lane]));
            ids.clear();
            ids.extend(self.ids[places.clone()].iter().map(|id| id.0[lane]));
            levels.clear();
            levels.extend(self.keys[places].iter().map(|key| Key::level_of(key.0[lane])));
            on_row(&StoredRow {
                row: self.rows[lane],
                head: self.heads[lane],
                positions: &positions,
                ids: &ids,
                levels: &levels,
                top: self.tops[lane],
                bits: self.bits(source, lane),
            });
        }
    }
}

/// Reads all rows whose heads are known.
#[inline(always)]
pub(super) fn read_rows<I: Vectors, S: RowSink>(
    isa: I,
    model: &Model,
    source: &Source,
    streams: &mut [Stream],
    sink: &mut S,
) -> Result<()> {
    let mut group = Group::new(model.config.k);
    let (gap_streams, level_streams) = streams.split_at_mut(LANES);
    let [mut gap_lanes, mut level_lanes] =
        [Streams::load(isa, gap_streams), Streams::load(isa, level_streams)];
    let Model { entries, gap, level, lefts, .. } = model;
    let reader = Reader { isa, data: source.data, entries, gap, level, lefts };
    for rows in source.order.chunks(LANES) {
        group.begin(model, source, rows);
        let mut gaps = Gaps::new(isa, gap_lanes, &group);
        let mut levels = Levels::new(isa, level_lanes, &group);
        isa.store(gap_lanes.bit, &mut group.begun[0]);
        isa.store(level_lanes.bit, &mut group.begun[1]);
        if group.is_even() {
            group.read::<I, true>(reader, source.first, &mut gaps, &mut levels);
        } else {
            group.read::<I, false>(reader, source.first, &mut gaps, &mut levels);
        }
        isa.store(gaps.streams.bit, &mut group.ended[0]);
        isa.store(levels.streams.bit, &mut group.ended[1]);
        let beyond = gaps.beyond(isa, model);
        if beyond > 0 {
            let lane = beyond.trailing_zeros() as usize;
            return corrupt(format!("row {}: an id beyond the vocabulary", group.rows[lane]));
        }
        group.look_up(isa, source.first);
        group.finish(isa, model, source, levels.too_large(isa))?;
        (gap_lanes, level_lanes) = (gaps.streams, levels.streams);
        level_lanes.bit = isa.load(&group.ended[1]);
        sink.group(isa, source, &mut group);
    }
    gap_lanes.store(isa, gap_streams);
    level_lanes.store(isa, level_streams);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compact::model::NEXT;
    use crate::compact::numbers::{ESCAPE, SYMBOLS};
    use crate::compact::write::{DocumentWriter, StoredRows};
    use crate::compact::{
        Cluster, Compact, CompactConfig, Contexts, Dimensions, Prior, Scale, Table, checksum,
    };
    use crate::simd::Backend;

    type Rows = (Vec<i64>, Vec<u32>);

    fn decoded(codec: &Compact, data: &[u8], rows: usize) -> Result<Rows> {
        let k = codec.config().k;
        let (mut ids, mut logprobs) = (vec![0; rows * k], vec![0.0; rows * k]);
        codec.decode_document(data, &mut ids, &mut logprobs)?;
        Ok((ids, logprobs.into_iter().map(f32::to_bits).collect()))
    }

    /// Whole and damaged, a document is read as by the code for one row at a time.
    fn check(config: &CompactConfig, prior: Option<&[u8]>, document: &[u8], rows: usize) {
        let with = |backend| Compact::with_backend(config.clone(), prior, backend).expect("valid");
        let portable = with(Backend::Portable);
        let others: Vec<Compact> = Backend::available().into_iter().map(with).collect();
        let stride = if cfg!(miri) { 4001 } else { 5 };
        for damaged in [None].into_iter().chain((40..8 * document.len()).step_by(stride).map(Some))
        {
            let mut data = document.to_vec();
            if let Some(bit) = damaged {
                data[bit / 8] ^= 1 << (bit % 8);
                let sum = checksum(&data[4..]);
                data[..4].copy_from_slice(&sum.to_le_bytes());
            }
            let expected = decoded(&portable, &data, rows);
            assert!(damaged.is_some() || expected.is_ok());
            for other in &others {
                match (decoded(other, &data, rows), &expected) {
                    (Ok(found), Ok(expected)) => assert_eq!(&found, expected, "bit {damaged:?}"),
                    (found, _) => assert!(found.is_err() && expected.is_err(), "bit {damaged:?}"),
                }
            }
        }
    }

    /// A prior with one table for gaps and one for all else, in which every symbol is as likely.
    fn plain(config: &CompactConfig) -> Prior {
        let mut table = Table([3; SYMBOLS]);
        table.0[1..9].fill(8);
        table.0[56..ESCAPE].fill(0);
        table.0[ESCAPE] = SLOTS as u16 - table.0[..ESCAPE].iter().sum::<u16>();
        let sizes = Dimensions::new(config, 1, 1, 1);
        Prior {
            config: config.clone(),
            order: (0..config.vocab_size).collect(),
            clusters: vec![Cluster::default()],
            levels: Scale::new(config.step).nominals(),
            contexts: Contexts {
                cluster: 1,
                shape: vec![1],
                count: vec![1],
                mass: vec![1],
                gap: vec![0; sizes.positions * sizes.left],
                level: vec![1; 2 * sizes.positions],
            },
            tables: vec![table.clone(), table],
        }
    }

    /// Rows that no encoder wrote.
    #[test]
    fn written_documents_are_read_as_elsewhere() {
        // Miri takes minutes for a document.
        for threshold in if cfg!(miri) { &["0.01"][..] } else { &["null", "0.01"] } {
            let config =
                format!(r#"{{"vocab_size": 40, "k": 3, "step": 0.1, "threshold": {threshold}}}"#);
            let config = CompactConfig::from_json(&config).expect("valid");
            let prior = plain(&config);
            let model = Model::new(&prior).expect("valid");
            let mut rows = StoredRows::default();
            for row in 0..129 {
                let count = if config.is_adaptive() { 1 + row % 3 } else { 3 };
                let head = Head { cluster: 0, shape: 0, count: count as u16, mass: row as u16 };
                let positions: Vec<u32> = (0..count).map(|i| (13 * i + row % 14) as u32).collect();
                // Each quantiser has every second level.
                let mut state = 0;
                let levels = (0..count).map(|i| {
                    let number = (row * (i + 5) % 7) as u16;
                    let level = 2 * number + u16::from(state >> 1);
                    state = NEXT[usize::from(state)][usize::from(number % 2)];
                    level
                });
                rows.heads.push(head);
                rows.tops.push(0);
                rows.levels.extend(levels);
                rows.positions.extend(positions);
            }
            let writer = DocumentWriter::new(&prior).expect("valid");
            let document = writer.write(Backend::Portable, &model, &rows, false);
            check(&config, Some(&prior.to_bytes()), &document, 129);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "the encoder takes roots with inline assembly, and time")]
    fn documents_are_read_as_elsewhere() {
        for (vocab, k, threshold, rows) in
            [(40, 3, "null", 129), (300, 20, "0.004", 130), (70_000, 5, "0.01", 144)]
        {
            let config = format!(
                r#"{{"vocab_size": {vocab}, "k": {k}, "step": 0.01, "threshold": {threshold}}}"#
            );
            let config = CompactConfig::from_json(&config).expect("valid");
            let ids: Vec<i64> = (0..(rows * k) as i64)
                .map(|i| (i % k as i64 * (vocab / 23) + i / k as i64 % 7) % vocab)
                .collect();
            let logprobs: Vec<f32> = (0..rows * k)
                .map(|i| -0.92 - (i % k) as f32 * (0.6 + (i / k % 5) as f32 / 2.0))
                .collect();
            let codec = Compact::new(config.clone(), None).expect("valid");
            let document = codec.encode_document(&ids, &logprobs, k).expect("encodes");
            check(&config, None, &document, rows);
        }
    }
}
