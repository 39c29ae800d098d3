//! The rows of [`LANES`] streams side by side with AVX2, eight streams a vector.
//!
//! Indices come from the document, which may be damaged: those beyond a table's end are cut off
//! there, and what is read then is refused by the checks at the end of a row.

use std::arch::x86_64::{
    __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_and_si256, _mm256_andnot_si256,
    _mm256_blendv_epi8, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmpgt_epi32,
    _mm256_cvtepi32_ps, _mm256_i32gather_epi32, _mm256_loadu_si256, _mm256_max_epi32,
    _mm256_min_epu32, _mm256_movemask_ps, _mm256_or_si256, _mm256_set1_epi32, _mm256_setzero_si256,
    _mm256_sllv_epi32, _mm256_srli_epi32, _mm256_srlv_epi32, _mm256_storeu_si256, _mm256_sub_epi32,
    _mm256_testz_si256, _mm256_xor_si256,
};
use std::array;

use super::decode::{Head, RowSink, Source, StoredRow, Stream, read_top};
use super::document::{LANES, corrupt};
use super::model::{BUCKETS, GAP_CONTEXTS, Model};
use super::numbers::ESCAPE_BITS;
use super::order::Ids;
use super::tables::{Entry, SLOTS, SLOTS_LOG};
use crate::error::Result;

/// Lanes of a vector.
const WIDTH: usize = 8;
/// Vectors of all lanes.
const HALVES: usize = LANES / WIDTH;
/// A number of each lane.
type Vectors = [__m256i; HALVES];
/// Bits that can be used of 32 that begin at a whole byte.
const WINDOW: u32 = 32 - 7;
/// Bits are counted in 32 bits, and no row has as many as this many bytes do.
const MAX_BYTES: usize = 1 << 28;

/// Whether a document can be read here.
pub(super) const fn takes(source: &Source, streams: &[Stream]) -> bool {
    streams.len() == LANES && source.data.len() <= MAX_BYTES
}

#[inline]
#[target_feature(enable = "avx2")]
fn splat(number: u32) -> __m256i {
    _mm256_set1_epi32(number as i32)
}

/// Eight numbers of a lane each, from the first of a half.
#[inline]
#[target_feature(enable = "avx2")]
fn load(numbers: &[u32; LANES], half: usize) -> __m256i {
    let numbers: &[u32; WIDTH] = &numbers.as_chunks().0[half];
    // SAFETY: there are eight numbers.
    unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(vector: __m256i, numbers: &mut [u32; LANES], half: usize) {
    let numbers: &mut [u32; WIDTH] = &mut numbers.as_chunks_mut().0[half];
    // SAFETY: there is room for eight numbers.
    unsafe { _mm256_storeu_si256(numbers.as_mut_ptr().cast(), vector) }
}

/// Elements of a table that is not empty; the last one for indices beyond it.
#[inline]
#[target_feature(enable = "avx2")]
fn gather(table: &[u32], at: __m256i) -> __m256i {
    let at = _mm256_min_epu32(at, splat(table.len() as u32 - 1));
    // SAFETY: no index is beyond the last element, of which there are fewer than 2³¹.
    unsafe { _mm256_i32gather_epi32::<4>(table.as_ptr().cast(), at) }
}

/// [`gather`] for ids.
#[inline]
#[target_feature(enable = "avx2")]
fn gather_ids(table: &Ids, at: __m256i) -> __m256i {
    match table {
        Ids::Wide(table) => gather(table, at),
        Ids::Narrow(table) => {
            let at = _mm256_min_epu32(at, splat(table.len() as u32 - 2));
            // SAFETY: no index is beyond the last but one; two are read, of which the first is used.
            let two = unsafe { _mm256_i32gather_epi32::<2>(table.as_ptr().cast(), at) };
            _mm256_and_si256(two, splat(u16::MAX.into()))
        }
    }
}

/// Has ids brought near.
#[inline(always)]
fn prefetch(table: &Ids, at: &[u32; LANES]) {
    for &at in at {
        let place = match table {
            Ids::Narrow(table) => table.as_ptr().wrapping_add(at as usize).cast(),
            Ids::Wide(table) => table.as_ptr().wrapping_add(at as usize).cast(),
        };
        // SAFETY: x86-64 has SSE, and prefetching does nothing that can be seen, wherever it is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place) }
    }
}

/// [`super::numbers::bucket`] of numbers above 0 and at most 2²⁴, by the exponents and highest
/// bits of floats.
#[inline]
#[target_feature(enable = "avx2")]
fn buckets(numbers: __m256i) -> __m256i {
    let bits = _mm256_castps_si256(_mm256_cvtepi32_ps(numbers));
    _mm256_max_epi32(_mm256_sub_epi32(_mm256_srli_epi32::<22>(bits), splat(2 * 127)), splat(1))
}

/// What numbers are read from.
#[derive(Clone, Copy)]
struct Reader<'a> {
    /// The document, with zeros after it.
    data: &'a [u8],
    entries: &'a [u32],
}

/// Eight streams.
#[derive(Clone, Copy)]
struct Streams {
    bit: __m256i,
    state: __m256i,
}

/// Which of eight lanes have an id here; all have if `ALL`.
#[derive(Clone, Copy)]
struct Active<const ALL: bool>(__m256i);

impl<const ALL: bool> Active<ALL> {
    /// Those of whose ids so many are left.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(counts: __m256i, left: u32) -> Self {
        Self(_mm256_cmpgt_epi32(counts, splat(left - 1)))
    }

    /// The new number of active lanes, the old one of others.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn update(self, number: &mut __m256i, new: __m256i) {
        *number = if ALL { new } else { _mm256_blendv_epi8(*number, new, self.0) };
    }

    /// The numbers of active lanes, 0 for others.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn only(self, number: __m256i) -> __m256i {
        if ALL { number } else { _mm256_and_si256(number, self.0) }
    }
}

impl Reader<'_> {
    /// The next bits, at least [`WINDOW`]; zeros after the document.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn window(self, bit: __m256i) -> __m256i {
        let last = splat(self.data.len() as u32 - 4);
        let byte = _mm256_min_epu32(_mm256_srli_epi32::<3>(bit), last);
        // SAFETY: four bytes are read, and no index is beyond the last but three; there are at
        // least eight bytes, and at most `MAX_BYTES`.
        let window = unsafe { _mm256_i32gather_epi32::<1>(self.data.as_ptr().cast(), byte) };
        _mm256_srlv_epi32(window, _mm256_and_si256(bit, splat(7)))
    }

    /// The next number of each table.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn numbers<const ALL: bool>(
        self,
        streams: &mut Streams,
        tables: __m256i,
        active: Active<ALL>,
    ) -> __m256i {
        const EXTRA: i32 = (SLOTS_LOG + Entry::COUNT) as i32;
        const LEAD: i32 = (SLOTS_LOG + 2 * Entry::COUNT) as i32;
        let entries = gather(self.entries, _mm256_add_epi32(tables, streams.state));
        let window = self.window(streams.bit);
        let (ones, count) = (splat(u32::MAX), splat((1 << Entry::COUNT) - 1));
        let bits = _mm256_and_si256(_mm256_srli_epi32::<{ SLOTS_LOG as i32 }>(entries), count);
        let extra = _mm256_and_si256(_mm256_srli_epi32::<EXTRA>(entries), count);
        let base = _mm256_and_si256(entries, splat(SLOTS as u32 - 1));
        let low = _mm256_andnot_si256(_mm256_sllv_epi32(ones, bits), window);
        let mut rest = _mm256_srlv_epi32(window, bits);
        let used = _mm256_add_epi32(bits, extra);
        let long = _mm256_cmpgt_epi32(used, splat(WINDOW));
        if _mm256_testz_si256(long, long) == 0 {
            // Numbers that were escaped, or are very large.
            rest = self.window(_mm256_add_epi32(streams.bit, bits));
        }
        active.update(&mut streams.state, _mm256_add_epi32(base, low));
        streams.bit = _mm256_add_epi32(streams.bit, active.only(used));
        let lead = _mm256_sllv_epi32(_mm256_srli_epi32::<LEAD>(entries), extra);
        _mm256_add_epi32(lead, _mm256_andnot_si256(_mm256_sllv_epi32(ones, extra), rest))
    }
}

/// A row of each lane.
struct Group {
    rows: [usize; LANES],
    heads: [Head; LANES],
    counts: [u32; LANES],
    /// Where the contexts of a row's gaps and levels begin, and the ids of its cluster.
    gaps: [u32; LANES],
    shapes: [u32; LANES],
    ids: [u32; LANES],
    /// By the ids that are left after one.
    places: Vec<Places>,
}

/// An id of each lane.
#[derive(Clone, Copy, Default)]
struct Places {
    position: [u32; LANES],
    /// Where the id is looked up, and then the id.
    id: [u32; LANES],
    level: [u32; LANES],
}

impl Group {
    fn new(k: usize) -> Self {
        Self {
            rows: [0; LANES],
            heads: [Head::default(); LANES],
            counts: [0; LANES],
            gaps: [0; LANES],
            shapes: [0; LANES],
            ids: [0; LANES],
            places: vec![Places::default(); k],
        }
    }

    /// Begins rows, at most one of each lane.
    fn begin(&mut self, model: &Model, source: &Source, rows: &[u32]) {
        self.counts = [0; LANES];
        for (lane, &row) in rows.iter().enumerate() {
            let head = source.heads[row as usize];
            let cluster = usize::from(head.cluster);
            self.rows[lane] = row as usize;
            self.heads[lane] = head;
            self.counts[lane] = u32::from(head.count);
            self.gaps[lane] = (model.clusters[cluster].gap_class * GAP_CONTEXTS) as u32;
            self.shapes[lane] = u32::from(head.shape) * (2 * BUCKETS) as u32;
            self.ids[lane] = (cluster * source.first.positions) as u32;
        }
    }

    /// Reads the positions; returns a bit for each lane that has one beyond the vocabulary.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn read_gaps<const ALL: bool>(
        &mut self,
        model: &Model,
        source: &Source,
        streams: &mut [Streams; HALVES],
    ) -> u32 {
        let reader = Reader { data: source.data, entries: &model.entries };
        let counts: Vectors = array::from_fn(|half| load(&self.counts, half));
        let contexts: Vectors = array::from_fn(|half| load(&self.gaps, half));
        let first: Vectors = array::from_fn(|half| load(&self.ids, half));
        let last_first = splat(source.first.positions as u32 - 1);
        // One more than the last position, and its bucket; all positions, or-ed.
        let mut next = [_mm256_setzero_si256(); HALVES];
        let mut bucket = [_mm256_setzero_si256(); HALVES];
        let mut all = [_mm256_setzero_si256(); HALVES];
        for left in (1..=self.most()).rev() {
            let context = splat(model.lefts[left]);
            for half in 0..HALVES {
                let active = Active::<ALL>::new(counts[half], left as u32);
                let at = _mm256_add_epi32(_mm256_add_epi32(contexts[half], bucket[half]), context);
                let tables = gather(&model.gap, at);
                let gap = reader.numbers(&mut streams[half], tables, active);
                let position = _mm256_add_epi32(next[half], gap);
                let after = _mm256_add_epi32(position, splat(1));
                active.update(&mut next[half], after);
                active.update(&mut bucket[half], buckets(after));
                all[half] = _mm256_or_si256(all[half], active.only(position));
                let id = _mm256_add_epi32(first[half], _mm256_min_epu32(position, last_first));
                store(position, &mut self.places[left - 1].position, half);
                store(id, &mut self.places[left - 1].id, half);
            }
            // Of the ids before these, so that what was stored need not be waited for.
            if let Some(before) = self.places.get(left) {
                prefetch(&source.first.ids, &before.id);
            }
        }
        let mut beyond = 0;
        for half in 0..HALVES {
            // Gaps are below 2²⁴: positions ascend as long as none is beyond that.
            let large = _mm256_srli_epi32::<{ ESCAPE_BITS as i32 }>(all[half]);
            let large = _mm256_cmpgt_epi32(large, _mm256_setzero_si256());
            let over = _mm256_cmpgt_epi32(next[half], splat(model.config.vocab_size));
            let lanes = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(large, over)));
            beyond |= (lanes as u32) << (WIDTH * half);
        }
        beyond
    }

    /// Reads the levels, and looks up the ids.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn read_levels<const ALL: bool>(
        &mut self,
        model: &Model,
        source: &Source,
        streams: &mut [Streams; HALVES],
    ) {
        let reader = Reader { data: source.data, entries: &model.entries };
        let counts: Vectors = array::from_fn(|half| load(&self.counts, half));
        let contexts: Vectors = array::from_fn(|half| load(&self.shapes, half));
        // The quantiser of the next level, and that of the one after it if the next number is even.
        let mut quantiser = [_mm256_setzero_si256(); HALVES];
        let mut following = [_mm256_setzero_si256(); HALVES];
        for left in (1..=self.most()).rev() {
            let Places { position, id, level } = &mut self.places[left - 1];
            for half in 0..HALVES {
                let active = Active::<ALL>::new(counts[half], left as u32);
                let bucket = buckets(_mm256_add_epi32(load(position, half), splat(1)));
                let at = _mm256_add_epi32(_mm256_add_epi32(bucket, bucket), quantiser[half]);
                let tables = gather(&model.level, _mm256_add_epi32(contexts[half], at));
                let number = reader.numbers(&mut streams[half], tables, active);
                let twice = _mm256_add_epi32(number, number);
                store(_mm256_add_epi32(twice, quantiser[half]), level, half);
                let odd = _mm256_and_si256(number, splat(1));
                let next = _mm256_xor_si256(following[half], odd);
                active.update(&mut following[half], quantiser[half]);
                active.update(&mut quantiser[half], next);
                store(gather_ids(&source.first.ids, load(id, half)), id, half);
            }
        }
    }

    fn most(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0) as usize
    }

    /// Whether all lanes have as many ids.
    fn is_even(&self) -> bool {
        self.counts.iter().all(|&count| count == self.counts[0])
    }
}

/// One row's ids.
struct Row {
    positions: Vec<u32>,
    ids: Vec<u32>,
    levels: Vec<u16>,
}

impl Row {
    /// Takes those of a lane. Returns all its levels, or-ed.
    fn take(&mut self, group: &Group, lane: usize) -> u32 {
        let places = &group.places[..group.counts[lane] as usize];
        let mut all = 0;
        let fields = self.positions.iter_mut().zip(&mut self.ids).zip(&mut self.levels);
        for (((position, id), level), place) in fields.zip(places.iter().rev()) {
            *position = place.position[lane];
            *id = place.id[lane];
            *level = place.level[lane] as u16;
            all |= place.level[lane];
        }
        all
    }
}

/// Reads all rows whose heads are known.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn read_rows<S: RowSink>(
    model: &Model,
    source: &Source,
    streams: &mut [Stream],
    sink: &mut S,
) -> Result<()> {
    let k = model.config.k;
    let mut group = Group::new(k);
    let mut row = Row { positions: vec![0; k], ids: vec![0; k], levels: vec![0; k] };
    let mut bits: [[u32; LANES]; 3] = [array::from_fn(|lane| streams[lane].bit as u32); 3];
    let states = array::from_fn(|lane| streams[lane].state);
    let mut lanes: [Streams; HALVES] =
        array::from_fn(|half| Streams { bit: load(&bits[0], half), state: load(&states, half) });
    for rows in source.order.chunks(LANES) {
        group.begin(model, source, rows);
        bits[0] = bits[2];
        let even = group.is_even();
        let beyond = if even {
            group.read_gaps::<true>(model, source, &mut lanes)
        } else {
            group.read_gaps::<false>(model, source, &mut lanes)
        };
        if beyond > 0 {
            let lane = beyond.trailing_zeros() as usize;
            return corrupt(format!("row {}: an id beyond the vocabulary", group.rows[lane]));
        }
        (0..HALVES).for_each(|half| store(lanes[half].bit, &mut bits[1], half));
        if even {
            group.read_levels::<true>(model, source, &mut lanes);
        } else {
            group.read_levels::<false>(model, source, &mut lanes);
        }
        (0..HALVES).for_each(|half| store(lanes[half].bit, &mut bits[2], half));
        for lane in 0..rows.len() {
            finish_row(model, source, (&group, lane), &mut bits, (&mut row, sink))?;
        }
        (0..HALVES).for_each(|half| lanes[half].bit = load(&bits[2], half));
    }
    let mut states = [0; LANES];
    (0..HALVES).for_each(|half| store(lanes[half].state, &mut states, half));
    for (lane, stream) in streams.iter_mut().enumerate() {
        *stream = Stream { bit: bits[2][lane] as usize, state: states[lane] };
    }
    Ok(())
}

/// Checks a row of a group, reads which id is the most probable one, and passes it on. `bits` has
/// where the lanes were before the row, before its levels, and where they are.
#[inline(always)]
fn finish_row<S: RowSink>(
    model: &Model,
    source: &Source,
    (group, lane): (&Group, usize),
    bits: &mut [[u32; LANES]; 3],
    (row, sink): (&mut Row, &mut S),
) -> Result<()> {
    let (number, head) = (group.rows[lane], group.heads[lane]);
    let [begun, levels_begun, bit] = bits;
    if bit[lane] as usize > 8 * source.data.len() {
        return corrupt(format!("row {number}: the document has ended"));
    }
    let all = row.take(group, lane);
    let count = usize::from(head.count);
    let (positions, levels) = (&row.positions[..count], &row.levels[..count]);
    let fits = all <= u16::MAX.into();
    let mut stream = Stream { bit: bit[lane] as usize, state: 0 };
    let top = read_top(model, source.data, &mut stream, levels, (number, fits))?;
    bit[lane] = stream.bit as u32;
    let is_far = |position: &&u32| **position as usize >= source.first.positions;
    let near = count - positions.iter().rev().take_while(is_far).count();
    let cluster = usize::from(head.cluster);
    model.far_ids(cluster, &positions[near..], &mut row.ids[near..count]);
    let bits = [
        source.head_bits[number],
        levels_begun[lane] - begun[lane],
        bit[lane] - levels_begun[lane],
    ];
    let ids = &row.ids[..count];
    sink.row(&StoredRow { row: number, head, positions, ids, levels, top, bits });
    Ok(())
}
