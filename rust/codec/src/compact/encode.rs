//! Rows to what is stored of them: which ids, in which cluster, with which levels.
//!
//! All decisions are made by IEEE basic operations in a fixed order and by libm, so that they are
//! the same on every machine.

use std::array;

use super::config::CompactConfig;
use super::decode::{Head, StoredRow};
use super::model::{MASSES, Model, STATES};
use super::numbers::{Kind, SYMBOLS, bucket, bucket_start, float_bucket};
use super::order::ClusterOrder;
use super::prior::{Dimensions, IdCodes, Prior};
use super::scale::Scale;
use super::write::StoredRows;
use crate::error::{CodecError, Result};
use crate::simd::lanes::{exp, prefetch};
use crate::simd::{Backend, multiversion};

/// Log-probabilities may exceed 0, and the sum of a row's probabilities 1, by this much: the
/// rounding of a low-precision teacher.
const ROUNDING: f64 = 1e-2;
/// What a bit may cost in divergence, in units of the square of the step.
const BIT_WORTH: f64 = 0.16;
/// Smaller log-probabilities are stored as this.
const LEAST: f32 = -80.0;
/// At most so many ids decide the cluster, and all if there are no more than [`JUDGING`].
const DECIDING: usize = 256;
const JUDGING: usize = 64;
/// Units of a bit in costs of levels.
const LEVEL_UNITS: f32 = 1024.0;
/// Units of a bit in costs of shapes.
const UNITS: f32 = 8.0;
/// Bits of a unit of what an id costs in a cluster, and in how many parts of it clusters are
/// compared.
const ID_COST: f32 = 0.8;
const COST_UNITS: f32 = 8.0;
/// Costs of a cluster itself are at most this.
const MOST_BASE: u16 = 20_000;
/// No decision: costs of a state that cannot be reached.
const UNREACHED: f32 = 1e30;

/// Chooses what is stored of rows.
#[derive(Debug)]
pub(super) struct Encoder {
    scale: Scale,
    levels: LevelCosts,
    ranks: Vec<u32>,
    clusters: ClusterCosts,
    shapes: ShapeCosts,
    /// Half the units of costs of levels that a unit of divergence is worth.
    per_unit: f32,
    choice: Choice,
}

/// Which ids of a row are stored.
#[derive(Debug)]
struct Choice {
    k: usize,
    vocab: u32,
    threshold: Option<f32>,
    mass: Option<f64>,
}

/// Rows that are encoded side by side: what one waits for from memory comes while others go on.
const GROUP: usize = 8;

/// Buffers for the rows of a group.
#[derive(Debug, Default)]
pub(super) struct EncodeScratch {
    rows: [Picked; GROUP],
    sorted: Vec<(f32, i64)>,
    ids: Vec<i64>,
    sums: Vec<u16>,
    placing: Placing,
    trellis: Trellis,
    levels: Vec<u16>,
}

/// What is to be stored of a row.
#[derive(Debug, Default)]
struct Picked {
    /// By falling probability: log-probabilities, and the roots of the probabilities.
    values: Vec<f32>,
    roots: Vec<f32>,
    ranks: Vec<u32>,
    mass: usize,
    cluster: usize,
    shape: usize,
    /// Ascending.
    positions: Vec<u32>,
    /// How many positions are lower than that of the most probable id.
    first: usize,
    /// By position: buckets of the position + 1, log-probabilities, where these lie on the scale,
    /// and what an error of 1 costs.
    buckets: Vec<u8>,
    logprobs: Vec<f32>,
    scaled: Vec<f32>,
    weights: Vec<f32>,
}

/// Buffers of [`Picked::place`].
#[derive(Debug, Default)]
struct Placing {
    /// The position of each rank.
    found: Vec<u32>,
    /// Which positions of the cluster's list are stored, and the rank of each.
    listed: Vec<u64>,
    places: Vec<u16>,
    /// Positions after the list, and their ranks.
    far: Vec<u64>,
    /// The rank of each position.
    order: Vec<u16>,
}

/// Rows of `width` ids and log-probabilities.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) ids: &'a [i64],
    pub(super) logprobs: &'a [f32],
    pub(super) width: usize,
}

impl<'a> Rows<'a> {
    /// The rows in groups.
    fn groups(self) -> impl Iterator<Item = Self> {
        let size = GROUP * self.width;
        let groups = self.ids.chunks(size).zip(self.logprobs.chunks(size));
        groups.map(move |(ids, logprobs)| Self { ids, logprobs, ..self })
    }

    fn iter(self) -> impl Iterator<Item = (&'a [i64], &'a [f32])> {
        self.ids.chunks(self.width).zip(self.logprobs.chunks(self.width))
    }
}

multiversion! {
    /// Appends what is stored of rows.
    fn encode_rows(encoder: &Encoder, model: &Model, rows: Rows<'_>, out: &mut StoredRows)
        -> Result<()> = encode_rows_body;
}

#[inline(always)]
fn encode_rows_body<I>(
    _isa: I,
    encoder: &Encoder,
    model: &Model,
    rows: Rows,
    out: &mut StoredRows,
) -> Result<()> {
    let mut scratch = EncodeScratch::default();
    for (number, group) in rows.groups().enumerate() {
        encoder
            .group(model, group, &mut scratch, |row| out.push(row))
            .map_err(|(row, error)| error.at_row(number * GROUP + row))?;
    }
    Ok(())
}

impl Encoder {
    pub(super) fn new(prior: &Prior, model: &Model) -> Result<Self> {
        let dimensions = model.dimensions;
        let kinds = prior.kinds()?;
        let costs: Vec<[f32; SYMBOLS]> = prior
            .tables
            .iter()
            .zip(&kinds)
            .map(|(table, kind)| table.costs(kind.unwrap_or(Kind::Other)))
            .collect();
        let ranks = prior.ranks();
        Ok(Self {
            scale: Scale::new(prior.config.step),
            levels: LevelCosts::new(prior, &dimensions, &costs),
            clusters: ClusterCosts::new(&prior.ids(), &dimensions, &costs, &ranks),
            shapes: ShapeCosts::new(prior, &dimensions, &costs),
            per_unit: (0.5 / (BIT_WORTH * prior.config.step * prior.config.step)) as f32
                * LEVEL_UNITS,
            ranks,
            choice: Choice::new(&prior.config),
        })
    }

    /// What is stored of rows.
    pub(super) fn rows(&self, backend: Backend, model: &Model, rows: Rows) -> Result<StoredRows> {
        let mut stored = StoredRows::default();
        encode_rows(backend, self, model, rows, &mut stored)?;
        Ok(stored)
    }

    /// What is stored of one row.
    #[inline(always)]
    pub(super) fn row(
        &self,
        model: &Model,
        ids: &[i64],
        logprobs: &[f32],
        scratch: &mut EncodeScratch,
        on_row: impl FnMut(&StoredRow),
    ) -> Result<()> {
        let rows = Rows { ids, logprobs, width: ids.len() };
        self.group(model, rows, scratch, on_row).map_err(|(_, error)| error)
    }

    /// What is stored of at most [`GROUP`] rows, or the error of the first that cannot be.
    #[inline(always)]
    fn group(
        &self,
        model: &Model,
        rows: Rows,
        scratch: &mut EncodeScratch,
        mut on_row: impl FnMut(&StoredRow),
    ) -> std::result::Result<(), (usize, CodecError)> {
        let mut count = 0;
        let mut failed = Ok(());
        for (row, (ids, logprobs)) in rows.iter().enumerate() {
            if let Err(error) = self.pick(ids, logprobs, row, scratch) {
                failed = Err((row, error));
                break;
            }
            count = row + 1;
        }
        let EncodeScratch { rows, sums, placing, trellis, levels, .. } = scratch;
        for number in 0..count {
            let next = rows[..count].get(number + 1).map(|row| Deciding::new(&row.ranks));
            let ranks = &rows[number].ranks;
            let cluster = self.clusters.best(Deciding::new(ranks), next, sums);
            model.clusters[cluster].order.prefetch(ranks);
            rows[number].cluster = cluster;
        }
        for (number, row) in rows[..count].iter_mut().enumerate() {
            let cluster = &model.clusters[row.cluster];
            if let Err(position) = row.place(&cluster.order, placing) {
                let (id, ids) = (cluster.order.id(position, &model.order), row.ranks.len());
                let message = format!("id {id} occurs twice among the first {ids}");
                return Err((number, CodecError::Input(message)));
            }
            row.scale(&self.scale, self.per_unit);
            row.shape = self.shapes.best(model, row, sums);
        }
        failed?;
        let rows = &rows[..count];
        self.levels.quantise(rows, trellis);
        for (lane, row) in rows.iter().enumerate() {
            trellis.levels(lane, row.positions.len(), levels);
            on_row(&StoredRow {
                row: 0,
                head: Head {
                    cluster: row.cluster as u16,
                    shape: row.shape as u8,
                    count: row.positions.len() as u16,
                    mass: row.mass as u16,
                },
                positions: &row.positions,
                ids: &[],
                levels,
                top: top(row.first, levels),
                bits: [0; 3],
            });
        }
        Ok(())
    }

    /// Which ids are stored of a row.
    #[inline(always)]
    fn pick(
        &self,
        ids: &[i64],
        logprobs: &[f32],
        row: usize,
        scratch: &mut EncodeScratch,
    ) -> Result<()> {
        let EncodeScratch { rows, sorted, ids: sorted_ids, .. } = scratch;
        let row = &mut rows[row];
        let k = self.choice.k.min(ids.len());
        row.values.clear();
        let ids = if is_sorted(logprobs) {
            row.values.extend_from_slice(&logprobs[..k]);
            ids
        } else {
            sort(ids, logprobs, sorted)?;
            row.values.extend(sorted[..k].iter().map(|pair| pair.0));
            sorted_ids.clear();
            sorted_ids.extend(sorted[..k].iter().map(|pair| pair.1));
            sorted_ids
        };
        let (count, total) = self.choice.select(&mut row.values, &mut row.roots)?;
        row.mass = mass_number(1.0 - total);
        row.ranks.resize(count, 0);
        for (out, id) in row.ranks.iter_mut().zip(ids) {
            let rank = usize::try_from(*id).ok().and_then(|id| self.ranks.get(id));
            let Some(&rank) = rank else {
                let vocab = self.choice.vocab;
                return Err(CodecError::Input(format!("id {id} of a vocabulary of {vocab}")));
            };
            *out = rank;
        }
        Ok(())
    }
}

/// What levels cost in bits.
#[derive(Debug)]
struct LevelCosts {
    /// By the first of four neighbouring levels: their log-probabilities, in the order of a step.
    values: Vec<[f32; STATES]>,
    /// By table: the costs of each number of a quantiser and the next one, the even one first.
    bits: Vec<[u16; 2]>,
    /// Where `bits` has them for both quantisers, by shape and bucket of the position + 1.
    contexts: Vec<[u32; 2]>,
    /// Buckets of a shape.
    buckets: usize,
}

impl LevelCosts {
    fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let levels = &prior.levels;
        let numbers = levels.len().div_ceil(2) as u32;
        let quadruple = |first: usize| {
            // One for each remainder by 4.
            let value = |remainder: usize| levels[first + (remainder.wrapping_sub(first) & 3)];
            REMAINDERS.map(value)
        };
        let bits = |costs: &[f32; SYMBOLS], number: u32| {
            let cost = |number: u32| (costs[Kind::Other.symbol(number)] * LEVEL_UNITS) as u16;
            let even = number.next_multiple_of(2);
            let odd = if even == number { number + 1 } else { number };
            [cost(even), cost(odd)]
        };
        let buckets = dimensions.positions;
        let context = |shape: usize, quantiser: usize, bucket: usize| {
            let table = prior.contexts.level[(shape * 2 + quantiser) * buckets + bucket];
            u32::from(table) * numbers
        };
        let contexts = (0..dimensions.shapes)
            .flat_map(|shape| (0..buckets).map(move |bucket| (shape, bucket)))
            .map(|(shape, bucket)| [0, 1].map(|half| context(shape, half, bucket)));
        Self {
            values: (0..levels.len() - 3).map(quadruple).collect(),
            bits: costs
                .iter()
                .flat_map(|costs| (0..numbers).map(|number| bits(costs, number)))
                .collect(),
            contexts: contexts.collect(),
            buckets,
        }
    }

    /// The levels that cost least in divergence and bits together, over all ways through the
    /// states of the quantiser (the Viterbi algorithm), of rows side by side.
    #[inline(always)]
    fn quantise(&self, rows: &[Picked], trellis: &mut Trellis) {
        let length = rows.iter().map(|row| row.positions.len()).max().unwrap_or(0);
        trellis.steps.resize(length, Step::default());
        trellis.ways.resize(length, [0; GROUP]);
        trellis.levels.resize(length, [0; GROUP]);
        for (lane, row) in rows.iter().enumerate() {
            self.costs(row, lane, trellis);
        }
        trellis.run();
    }

    /// What the four levels around each value cost, each at the place of its remainder by 4. Rows
    /// end together: shorter ones stay in the first state before they begin.
    #[inline(always)]
    fn costs(&self, row: &Picked, lane: usize, trellis: &mut Trellis) {
        let contexts = &self.contexts[row.shape * self.buckets..][..self.buckets];
        let last = self.values.len() as i32 - 1;
        let waiting = trellis.steps.len() - row.positions.len();
        let (before, steps) = trellis.steps.split_at_mut(waiting);
        for Step(costs) in before {
            for (costs, remainder) in costs.iter_mut().zip(REMAINDERS) {
                costs[lane] = if remainder == 0 { 0.0 } else { UNREACHED };
            }
        }
        let firsts = &mut trellis.levels[waiting..];
        let values = row.logprobs.iter().zip(&row.weights).zip(row.scaled.iter().zip(&row.buckets));
        let steps = steps.iter_mut().zip(firsts);
        for ((Step(costs), firsts), ((&value, &weight), (&scaled, &bucket))) in steps.zip(values) {
            let first = (scaled as i32 - 1).clamp(0, last) as u32;
            firsts[lane] = first;
            // A quantiser has the even or the odd ones.
            let [even, odd] = contexts[usize::from(bucket)];
            let even = self.bits[(even + first.div_ceil(2)) as usize];
            let odd = self.bits[(odd + first / 2) as usize];
            let bits = [even[0], even[1], odd[0], odd[1]];
            let levels = &self.values[first as usize];
            let all: [f32; STATES] = array::from_fn(|i| {
                let error = levels[i] - value;
                weight * error * error + f32::from(bits[i])
            });
            for (costs, cost) in costs.iter_mut().zip(all) {
                costs[lane] = cost;
            }
        }
    }
}

/// The remainders by 4 of the levels of a step: first those of one quantiser.
const REMAINDERS: [usize; STATES] = [0, 2, 1, 3];

/// What the levels of a value cost, by remainder by 4 (in the order of [`REMAINDERS`]) and row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Step([[f32; GROUP]; STATES]);

/// The ways of rows through the states of the quantiser, side by side.
#[derive(Debug, Default)]
struct Trellis {
    steps: Vec<Step>,
    /// By value and row: for each state a bit, whether it is reached from the second one before.
    ways: Vec<[u32; GROUP]>,
    /// The first of four neighbouring levels, then the one that is stored.
    levels: Vec<[u32; GROUP]>,
}

impl Trellis {
    /// Finds the levels.
    #[inline(always)]
    fn run(&mut self) {
        let mut paths = [[UNREACHED; GROUP]; STATES];
        paths[0] = [0.0; GROUP];
        for (Step(costs), ways) in self.steps.iter().zip(&mut self.ways) {
            // Each state is reached from two, in the order of [`back`].
            let [a, b, c, d] = paths;
            let [e, g, f, h] = costs;
            let ones = [added(&a, e), added(&c, f), added(&a, g), added(&c, h)];
            let others = [added(&b, g), added(&d, h), added(&b, e), added(&d, f)];
            let [e, f, g, h] =
                array::from_fn(|state| where_less(&others[state], &ones[state], 1 << state));
            *ways = array::from_fn(|lane| e[lane] | f[lane] | g[lane] | h[lane]);
            paths = array::from_fn(|state| lesser(&ones[state], &others[state]));
        }
        let mut states = [0u32; GROUP];
        for (lane, best) in states.iter_mut().enumerate() {
            let better = |best: usize, state: usize| {
                if paths[state][lane] < paths[best][lane] { state } else { best }
            };
            *best = (0..STATES).fold(0, better) as u32;
        }
        for (levels, ways) in self.levels.iter_mut().zip(&self.ways).rev() {
            let second: [u32; GROUP] =
                array::from_fn(|lane| ways[lane] >> (states[lane] % STATES as u32) & 1);
            let remainder: [u32; GROUP] = array::from_fn(|lane| back(states[lane], second[lane]).1);
            *levels = array::from_fn(|lane| {
                levels[lane] + (remainder[lane].wrapping_sub(levels[lane]) & 3)
            });
            states = array::from_fn(|lane| back(states[lane], second[lane]).0);
        }
    }

    /// The levels of a row.
    #[inline(always)]
    fn levels(&self, lane: usize, count: usize, out: &mut Vec<u16>) {
        out.resize(count, 0);
        for (out, levels) in out.iter_mut().zip(&self.levels[self.levels.len() - count..]) {
            *out = levels[lane] as u16;
        }
    }
}

#[inline(always)]
fn added(a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
    array::from_fn(|lane| a[lane] + b[lane])
}

#[inline(always)]
fn lesser(a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
    array::from_fn(|lane| if b[lane] < a[lane] { b[lane] } else { a[lane] })
}

/// The bit where `a` < `b`.
#[inline(always)]
fn where_less(a: &[f32; GROUP], b: &[f32; GROUP], bit: u32) -> [u32; GROUP] {
    array::from_fn(|lane| if a[lane] < b[lane] { bit } else { 0 })
}

/// The state before, and the level's remainder by 4, on the first or second way to a state.
#[inline(always)]
const fn back(state: u32, second: u32) -> (u32, u32) {
    let quantiser = state & 1;
    let parity = second ^ (state >> 1);
    (quantiser << 1 | second, quantiser | parity << 1)
}

/// Sorts a row by falling log-probability; ties stay as they are.
fn sort(ids: &[i64], logprobs: &[f32], out: &mut Vec<(f32, i64)>) -> Result<()> {
    if logprobs.iter().any(|logprob| logprob.is_nan()) {
        return Err(CodecError::Input("a log-probability is NaN".to_owned()));
    }
    out.clear();
    out.extend(logprobs.iter().copied().zip(ids.iter().copied()));
    out.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(())
}

/// Whether log-probabilities do not rise; not where one is NaN.
#[inline(always)]
fn is_sorted(logprobs: &[f32]) -> bool {
    let pairs = logprobs.iter().zip(&logprobs[1..]);
    pairs.fold(!logprobs[0].is_nan(), |sorted, (one, next)| sorted & (one >= next))
}

/// Positions that are emitted at once: most words have no more.
const AT_ONCE: usize = 4;

impl Picked {
    /// Puts positions and values in the order of positions; fails with a position that two ids
    /// have.
    #[inline(always)]
    fn place(
        &mut self,
        order: &ClusterOrder,
        placing: &mut Placing,
    ) -> std::result::Result<(), u32> {
        let Placing { found, listed, places, far, order: ranks } = placing;
        order.positions(&self.ranks, found);
        let (count, size) = (found.len(), order.listed());
        // Positions of the list are sorted by a bit each, the others by comparison; these share the
        // place after the list's.
        let words = size.div_ceil(64);
        let beyond = words * 64;
        listed.clear();
        listed.resize(words + 1, 0);
        places.resize((beyond + 1).max(places.len()), 0);
        far.resize((count + 1).max(far.len()), 0);
        let mut outside = 0;
        for (place, &position) in found.iter().enumerate() {
            let is_listed = (position as usize) < size;
            let at = if is_listed { position as usize } else { beyond };
            listed[at / 64] |= 1 << (at % 64);
            places[at] = place as u16;
            far[outside] = u64::from(position) << 32 | place as u64;
            outside += usize::from(!is_listed);
        }
        self.positions.clear();
        self.positions.resize(count + AT_ONCE, 0);
        ranks.resize((count + AT_ONCE).max(ranks.len()), 0);
        let mut near = 0;
        for (word, &bits) in listed[..words].iter().enumerate() {
            let (mut bits, mut at) = (bits, near);
            near += bits.count_ones() as usize;
            while at < near {
                let positions = &mut self.positions[at..at + AT_ONCE];
                for (out, rank) in positions.iter_mut().zip(&mut ranks[at..at + AT_ONCE]) {
                    let position = word * 64 + bits.trailing_zeros() as usize;
                    *out = position as u32;
                    *rank = places[position];
                    bits &= bits.wrapping_sub(1);
                }
                at += AT_ONCE;
            }
        }
        let far = &mut far[..outside];
        far.sort_unstable();
        for (i, &key) in far.iter().enumerate() {
            self.positions[near + i] = (key >> 32) as u32;
            ranks[near + i] = key as u16;
        }
        let is_twice =
            far.windows(2).fold(false, |any, pair| any | (pair[0] >> 32 == pair[1] >> 32));
        if near + outside < count || is_twice {
            found.sort_unstable();
            let twice = found.windows(2).find(|pair| pair[0] == pair[1]);
            return Err(twice.map_or(0, |pair| pair[0]));
        }
        self.positions.truncate(count);
        let own = found[0];
        self.first =
            self.positions.iter().map(|&position| u32::from(position < own)).sum::<u32>() as usize;
        self.logprobs.resize(count, 0.0);
        self.weights.resize(count, 0.0);
        let out = self.logprobs.iter_mut().zip(&mut self.weights);
        for ((logprob, root), &rank) in out.zip(&ranks[..count]) {
            *logprob = self.values[usize::from(rank)];
            *root = self.roots[usize::from(rank)];
        }
        Ok(())
    }

    /// Where values lie on the scale, and what errors cost.
    #[inline(always)]
    fn scale(&mut self, scale: &Scale, per_unit: f32) {
        self.scaled.resize(self.logprobs.len(), 0.0);
        let values = self.logprobs.iter().zip(&mut self.weights);
        for (scaled, (&logprob, root)) in self.scaled.iter_mut().zip(values) {
            *scaled = scale.place(logprob, *root);
            *root = *root * *root * per_unit;
        }
        self.buckets.resize(self.positions.len(), 0);
        for (bucket, &position) in self.buckets.iter_mut().zip(&self.positions) {
            *bucket = float_bucket(position + 1);
        }
    }
}

/// The place of the most probable id, which is at `first`, among all by falling level.
#[inline(always)]
fn top(first: usize, levels: &[u16]) -> usize {
    let level = levels[first];
    let (before, after) = levels.split_at(first);
    let before = before.iter().map(|&other| u16::from(other >= level)).sum::<u16>();
    let after = after.iter().map(|&other| u16::from(other > level)).sum::<u16>();
    usize::from(before + after)
}

impl Choice {
    fn new(config: &CompactConfig) -> Self {
        Self {
            k: config.k,
            vocab: config.vocab_size,
            threshold: config.threshold.map(|threshold| libm::log(threshold) as f32),
            mass: config.mass,
        }
    }

    /// How many of the sorted values are stored, and the sum of their probabilities; leaves those
    /// values and the roots of their probabilities.
    #[inline(always)]
    fn select(&self, values: &mut Vec<f32>, roots: &mut Vec<f32>) -> Result<(usize, f64)> {
        let highest = values[0];
        if highest == f32::NEG_INFINITY {
            return Err(CodecError::Input(
                "found no id with a finite log-probability, expected at least one".to_owned(),
            ));
        }
        if highest.is_nan() || f64::from(highest) > ROUNDING {
            return Err(CodecError::Input(format!(
                "found log-probability {highest}, expected at most 0"
            )));
        }
        let least = self.threshold.unwrap_or(f32::MIN);
        let count = values.iter().map(|&logprob| u32::from(logprob >= least)).sum::<u32>();
        values.truncate((count as usize).max(1));
        for value in values.iter_mut() {
            *value = value.clamp(LEAST, 0.0);
        }
        roots.resize(values.len(), 0.0);
        for (root, &logprob) in roots.iter_mut().zip(&*values) {
            *root = exp(0.5 * logprob);
        }
        let (mut count, mut total) = (values.len(), 0.0);
        if let Some(mass) = self.mass {
            for (i, &root) in roots.iter().enumerate() {
                total += f64::from(root) * f64::from(root);
                if total >= mass {
                    count = i + 1;
                    break;
                }
            }
        } else {
            total = sum_of_squares(roots);
        }
        if total > 1.0 + ROUNDING {
            return Err(CodecError::Input(format!(
                "found probabilities that sum to {total:.4}, expected at most 1"
            )));
        }
        values.truncate(count);
        roots.truncate(count);
        Ok((count, total))
    }
}

/// Σ x², of every eighth number first.
#[inline(always)]
fn sum_of_squares(numbers: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let (vectors, rest) = numbers.as_chunks::<8>();
    let square = |x: f32| f64::from(x) * f64::from(x);
    for vector in vectors {
        sums.iter_mut().zip(vector).for_each(|(sum, &x)| *sum += square(x));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &x)| *sum += square(x));
    sums.into_iter().fold(0.0, |total, sum| total + sum)
}

/// The number that stands for a missing mass.
fn mass_number(missing: f64) -> usize {
    let root = missing.clamp(0.0, 1.0).sqrt();
    let number = libm::asin(root) * std::f64::consts::FRAC_2_PI * f64::from(MASSES);
    (number.round() as usize).min(MASSES as usize - 1)
}

/// What each id costs in each cluster, about.
#[derive(Debug)]
pub(super) struct ClusterCosts {
    clusters: usize,
    /// By rank, what an id costs in every cluster, beyond the cluster where it costs least; the last
    /// column is that of all further ranks.
    costs: Vec<Nibbles>,
    /// Lines of a column, and the number of the last one.
    lines: usize,
    last: usize,
    /// Costs of a cluster itself; the last line may have places without a cluster.
    base: Vec<u16>,
}

/// Costs in a line of clusters, in units of [`ID_COST`]: the first half of them is in the lower
/// halves of the bytes.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Nibbles([u8; 64]);

/// Clusters of a line.
const LINE: usize = 2 * size_of::<Nibbles>();
/// Ranks that may have a column of their own.
const COLUMNS: usize = 1 << 18;
/// So many costs are below 256 together.
const NIBBLES: usize = 16;
/// What no cost of an id exceeds.
const MOST: u8 = 15;

impl Nibbles {
    fn new(costs: &[u8]) -> Self {
        let at = |place: usize| costs.get(place).copied().unwrap_or(0);
        Self(array::from_fn(|i| at(i) | at(LINE / 2 + i) << 4))
    }
}

impl ClusterCosts {
    pub(super) fn new(
        prior: &IdCodes,
        dimensions: &Dimensions,
        costs: &[[f32; SYMBOLS]],
        ranks: &[u32],
    ) -> Self {
        let clusters = prior.clusters.len();
        let profiles: Vec<Profile> = (0..dimensions.gap_classes)
            .map(|class| Profile::new(prior, dimensions, class))
            .collect();
        let profile = |cluster: &super::prior::Cluster| &profiles[usize::from(cluster.gap_class)];
        // By rank: the clusters in which the id is listed, and its position there.
        let mut listed: Vec<Vec<(u32, u32)>> = Vec::new();
        for (number, cluster) in (0..).zip(prior.clusters) {
            for (&id, position) in cluster.list.iter().zip(0..) {
                let rank = ranks[id as usize] as usize;
                if rank < COLUMNS {
                    listed.resize(listed.len().max(rank + 1), Vec::new());
                    listed[rank].push((number, position));
                }
            }
        }
        let last = listed.len();
        listed.push(Vec::new());
        let outside = |cluster: &super::prior::Cluster| {
            profile(cluster).cost(cluster.list.len() as u32 * 2 + 64)
        };
        let outside: Vec<f32> = prior.clusters.iter().map(outside).collect();
        let mut own = Vec::new();
        let mut table = Vec::new();
        for listed in listed {
            own.clone_from(&outside);
            for (number, position) in listed {
                let cluster = &prior.clusters[number as usize];
                own[number as usize] = profile(cluster).cost(position);
            }
            let least = own.iter().copied().fold(f32::INFINITY, f32::min);
            let units = |&cost: &f32| (((cost - least) / ID_COST + 0.5) as u8).min(MOST);
            let units: Vec<u8> = own.iter().map(units).collect();
            table.extend(units.chunks(LINE).map(Nibbles::new));
        }
        let own = &costs[usize::from(prior.cluster)];
        let base = |(number, cluster): (u32, &super::prior::Cluster)| {
            let bits = own[Kind::Other.symbol(number)] + profile(cluster).base;
            (bits / ID_COST * COST_UNITS).clamp(0.0, f32::from(MOST_BASE)) as u16
        };
        let lines = clusters.div_ceil(LINE);
        let mut base: Vec<u16> = (0..).zip(prior.clusters).map(base).collect();
        base.resize(lines * LINE, u16::MAX);
        Self { clusters, costs: table, lines, last, base }
    }

    #[inline(always)]
    fn column(&self, rank: u32) -> &[Nibbles] {
        let at = (rank as usize).min(self.last) * self.lines;
        &self.costs[at..at + self.lines]
    }

    /// The cluster in which some of the ids cost least. Asks for what those of the next row cost.
    #[inline(always)]
    fn best(&self, ids: Deciding, next: Option<Deciding>, sums: &mut Vec<u16>) -> usize {
        if self.clusters == 1 {
            return 0;
        }
        self.sum(ids, next, sums);
        least(sums)
    }

    #[inline(always)]
    fn sum(&self, ids: Deciding, next: Option<Deciding>, sums: &mut Vec<u16>) {
        // A fraction of 2¹⁶: divisions are slow.
        let share = ((ids.count << 16) / ids.ranks.len()) as u32;
        sums.resize(self.base.len(), 0);
        for (sum, &base) in sums.iter_mut().zip(&self.base) {
            let scaled = ((u32::from(base) * share) >> 16) as u16;
            *sum = if base == u16::MAX { base } else { scaled };
        }
        let whole = ids.count - ids.count % NIBBLES;
        for i in (0..whole).step_by(NIBBLES) {
            self.prefetch(next, i);
            add_nibbles(
                sums,
                array::from_fn::<_, NIBBLES, _>(|part| self.column(ids.rank(i + part))),
            );
        }
        self.prefetch(next, whole);
        for i in whole..ids.count {
            add_nibbles(sums, [self.column(ids.rank(i))]);
        }
    }

    /// Asks for some of the columns of ids.
    #[inline(always)]
    fn prefetch(&self, ids: Option<Deciding>, first: usize) {
        if let Some(ids) = ids {
            for i in first..(first + NIBBLES).min(ids.count) {
                prefetch(self.column(ids.rank(i)));
            }
        }
    }

    /// The clusters in which the ids cost least, about: at most `most`, the cheapest first.
    #[inline(always)]
    pub(super) fn candidates(
        &self,
        ranks: &[u32],
        sums: &mut Vec<u16>,
        most: usize,
        out: &mut Vec<u16>,
    ) {
        out.clear();
        self.sum(Deciding::new(ranks), None, sums);
        for _ in 0..most.min(self.clusters) {
            let cluster = least(sums);
            sums[cluster] = u16::MAX;
            out.push(cluster as u16);
        }
    }
}

/// The ids of a row that decide its cluster, spread over all of them: to read the costs of all
/// would take longer, and save 0.2% of the bytes.
#[derive(Debug, Clone, Copy)]
struct Deciding<'a> {
    ranks: &'a [u32],
    count: usize,
    /// From one to the next, as a fraction of 2¹⁶.
    step: usize,
}

impl<'a> Deciding<'a> {
    #[inline(always)]
    fn new(ranks: &'a [u32]) -> Self {
        let count = (ranks.len() * 5 / 8).max(JUDGING).min(ranks.len()).min(DECIDING);
        Self { ranks, count, step: (ranks.len() << 16) / count }
    }

    #[inline(always)]
    fn rank(self, i: usize) -> u32 {
        self.ranks[(i * self.step) >> 16]
    }
}

/// Adds columns of costs to their sums.
#[inline(always)]
fn add_nibbles<const N: usize>(sums: &mut [u16], columns: [&[Nibbles]; N]) {
    for (line, sums) in sums.as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
        let (mut low, mut high) = ([0u8; LINE / 2], [0u8; LINE / 2]);
        for column in &columns {
            let Nibbles(costs) = &column[line];
            for (i, &cost) in costs.iter().enumerate() {
                low[i] += cost & 15;
                high[i] += cost >> 4;
            }
        }
        let (first, second) = sums.split_at_mut(LINE / 2);
        add_units(first, &low);
        add_units(second, &high);
    }
}

#[inline(always)]
fn add_units(sums: &mut [u16], units: &[u8; LINE / 2]) {
    for (sum, &units) in sums.iter_mut().zip(units) {
        *sum = sum.saturating_add(u16::from(units) * COST_UNITS as u16);
    }
}

/// The place of the first least number.
#[inline(always)]
fn least(numbers: &[u16]) -> usize {
    const LANES: usize = 16;
    let mut best = [u32::MAX; LANES];
    let (vectors, rest) = numbers.as_chunks::<LANES>();
    let key = |number: u16, place: usize| u32::from(number) << 16 | place as u32;
    for (vector, numbers) in vectors.iter().enumerate() {
        for (lane, (best, &number)) in best.iter_mut().zip(numbers).enumerate() {
            *best = key(number, vector * LANES + lane).min(*best);
        }
    }
    let rest = (vectors.len() * LANES..).zip(rest).map(|(place, &number)| key(number, place));
    let least = best.into_iter().chain(rest).min();
    least.map_or(0, |least| usize::from(least as u16))
}

/// How likely an id is stored at each position, by what the tables of gaps say.
struct Profile {
    /// By bucket of the position: −log₂ of the odds.
    costs: Vec<f32>,
    /// −Σ log₂ of the probabilities that an id is not stored.
    base: f32,
}

impl Profile {
    fn new(prior: &IdCodes, dimensions: &Dimensions, class: usize) -> Self {
        let vocab = prior.vocab_size;
        let mut left = prior.expected;
        let mut costs = Vec::new();
        let mut base = 0.0;
        for number in 0..dimensions.positions {
            let first = bucket_start(number);
            let count = bucket_start(number + 1).min(vocab + 1) - first;
            let table = prior.gap[dimensions.gap(class, first, left.max(1.0) as u32)];
            let slots = &prior.tables[usize::from(table)].0;
            let mut mean = 0.0;
            let mut total = 0.0;
            for (symbol, &slots) in slots[..SYMBOLS - 1].iter().enumerate() {
                let middle = f64::from(Kind::Gap.base(symbol))
                    + f64::from((1u32 << Kind::Gap.extra_bits(symbol)) - 1) / 2.0;
                mean += f64::from(slots) * middle;
                total += f64::from(slots);
            }
            let density = (1.0 / (mean / f64::max(total, 1.0) + 1.0)).clamp(1e-7, 0.98);
            costs.push((libm::log2(1.0 - density) - libm::log2(density)) as f32);
            base -= f64::from(count) * libm::log2(1.0 - density);
            left -= f64::from(count) * density;
        }
        Self { costs, base: base as f32 }
    }

    fn cost(&self, position: u32) -> f32 {
        self.costs.get(bucket(position + 1)).or(self.costs.last()).copied().unwrap_or(0.0)
    }
}

/// Costs in shapes next to each other.
type Shapes<T> = [T; 32];

/// What each value costs in each shape, about.
#[derive(Debug)]
struct ShapeCosts {
    parts: Vec<PartCosts>,
}

/// Costs in some shapes; those that do not exist are too expensive.
#[derive(Debug)]
struct PartCosts {
    /// By bucket of the position + 1 and symbol, beyond the shape where it costs least.
    values: Vec<Shapes<u8>>,
    /// By class of the cluster, by symbol of the mass, by symbol of the count.
    shape: Vec<Shapes<u16>>,
    mass: Vec<Shapes<u16>>,
    count: Vec<Shapes<u16>>,
}

impl ShapeCosts {
    fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let bits = |table: u16, symbol: usize| costs[usize::from(table)][symbol];
        let shapes = dimensions.shapes;
        // What a value costs in a shape.
        let value = |shape: usize, position: usize, symbol: usize| {
            let [even, odd] = [0, 1].map(|quantiser| {
                let context = (shape * 2 + quantiser) * dimensions.positions + position;
                bits(prior.contexts.level[context], symbol)
            });
            (f32::midpoint(even, odd) * UNITS) as u16
        };
        let contexts: Vec<(usize, usize)> = (0..dimensions.positions)
            .flat_map(|position| (0..SYMBOLS).map(move |symbol| (position, symbol)))
            .collect();
        let least: Vec<u16> = contexts
            .iter()
            .map(|&(position, symbol)| {
                (0..shapes).map(|shape| value(shape, position, symbol)).min().unwrap_or(0)
            })
            .collect();
        let part = |first: usize| {
            let line = |cost: &dyn Fn(usize) -> u16| -> Shapes<u16> {
                array::from_fn(|i| if first + i < shapes { cost(first + i) } else { u16::MAX })
            };
            let values = contexts.iter().zip(&least).map(|(&(position, symbol), least)| {
                line(&|shape| value(shape, position, symbol) - least)
                    .map(|cost| cost.min(255) as u8)
            });
            let units = |table: u16, symbol: usize| (bits(table, symbol) * UNITS) as u16;
            let shape =
                |&table: &u16| line(&|shape| units(table, Kind::Other.symbol(shape as u32)));
            let by_symbol = |tables: &[u16]| {
                (0..SYMBOLS).map(|symbol| line(&|shape| units(tables[shape], symbol))).collect()
            };
            PartCosts {
                values: values.collect(),
                shape: prior.contexts.shape.iter().map(shape).collect(),
                mass: by_symbol(&prior.contexts.mass),
                count: by_symbol(&prior.contexts.count),
            }
        };
        Self { parts: (0..shapes).step_by(size_of::<Shapes<u8>>()).map(part).collect() }
    }

    /// The shape in which the values cost least.
    #[inline(always)]
    fn best(&self, model: &Model, row: &Picked, sums: &mut Vec<u16>) -> usize {
        let class = model.clusters[row.cluster].shape_class;
        let count = model.count_number(row.positions.len());
        let [mass, count] = [row.mass as u32, count].map(|number| Kind::Other.symbol(number));
        sums.clear();
        for part in &self.parts {
            let mut values: Shapes<u16> = [0; 32];
            let deciding = row.buckets.iter().zip(&row.scaled).take(DECIDING);
            for (&bucket, &scaled) in deciding {
                let symbol = Kind::Other.symbol((scaled * 0.5 + 0.25) as u32);
                let costs = &part.values[usize::from(bucket) * SYMBOLS + symbol];
                values = array::from_fn(|i| values[i] + u16::from(costs[i]));
            }
            let head = [&part.shape[class], &part.mass[mass], &part.count[count]];
            for costs in head {
                values = array::from_fn(|i| values[i].saturating_add(costs[i]));
            }
            sums.extend_from_slice(&values);
        }
        least(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::NEXT;
    use super::*;

    #[test]
    fn ways_back_are_the_ways_forward() {
        let mut ways = 0;
        for state in 0..STATES as u32 {
            for second in 0..2 {
                let (previous, remainder) = back(state, second);
                assert_eq!(previous >> 1, remainder & 1);
                let next = NEXT[previous as usize][remainder as usize >> 1];
                assert_eq!(u32::from(next), state);
                ways |= 1 << (previous * 4 + remainder);
            }
        }
        assert_eq!(ways, 0b1010_1010_0101_0101);
    }
}
