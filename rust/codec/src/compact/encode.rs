//! Rows to what is stored of them: which ids, in which cluster, with which levels.
//!
//! All decisions are made by IEEE basic operations in a fixed order and by libm, so that they are
//! the same on every machine.

use super::config::CompactConfig;
use super::decode::{Head, StoredRow};
use super::model::{MASSES, Model, STATES};
use super::numbers::{Kind, SYMBOLS, bucket, bucket_start};
use super::prior::{Dimensions, IdCodes, Prior};
use super::scale::Scale;
use super::write::StoredRows;
use crate::error::{CodecError, Result};
use crate::simd::lanes::exp;
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
/// Units of a bit in costs of clusters and shapes.
const UNITS: f32 = 8.0;
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
    /// Half the bits that a unit of divergence is worth.
    per_bit: f32,
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

/// Buffers for one row after the other.
#[derive(Debug, Default)]
pub(super) struct EncodeScratch {
    sorted: Vec<(f32, i64)>,
    values: Vec<f32>,
    roots: Vec<f32>,
    /// Where the values lie on the scale.
    scaled: Vec<f32>,
    ranks: Vec<u32>,
    sums: Vec<u16>,
    keys: Vec<u64>,
    /// The position of each rank.
    found: Vec<u32>,
    /// Which positions of the cluster's list are stored, and the rank of each.
    listed: Vec<u64>,
    places: Vec<u16>,
    positions: Vec<u32>,
    /// Buckets of the positions + 1.
    buckets: Vec<u8>,
    ordered: Vec<Value>,
    /// For each value, the first of four neighbouring levels, and which way leads to each state.
    choices: Vec<(u16, u16)>,
    levels: Vec<u16>,
}

/// A value in the order of positions.
#[derive(Debug, Clone, Copy)]
struct Value {
    logprob: f32,
    /// Where it lies on the scale.
    scaled: f32,
    /// What an error of 1 costs in bits.
    weight: f32,
    /// Which rank it has.
    rank: u32,
}

/// Rows of `width` ids and log-probabilities.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) ids: &'a [i64],
    pub(super) logprobs: &'a [f32],
    pub(super) width: usize,
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
    let Rows { ids, logprobs, width } = rows;
    for (row, (ids, logprobs)) in ids.chunks(width).zip(logprobs.chunks(width)).enumerate() {
        if let Err(error) = encoder.row(model, ids, logprobs, &mut scratch, |row| out.push(row)) {
            return Err(error.at_row(row));
        }
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
            per_bit: (0.5 / (BIT_WORTH * prior.config.step * prior.config.step)) as f32,
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
        on_row: impl FnOnce(&StoredRow),
    ) -> Result<()> {
        let sorted = logprobs.windows(2).all(|pair| pair[0] >= pair[1]);
        if sorted && !logprobs[0].is_nan() {
            scratch.sorted.clear();
            scratch.sorted.extend(logprobs.iter().copied().zip(ids.iter().copied()));
        } else {
            sort(ids, logprobs, &mut scratch.sorted)?;
        }
        let (count, total) = self.choice.select(scratch)?;
        let mass = mass_number(1.0 - total);
        scratch.ranks.clear();
        for (_, id) in &scratch.sorted[..count] {
            let rank = usize::try_from(*id).ok().and_then(|id| self.ranks.get(id));
            let Some(&rank) = rank else {
                let vocab = self.choice.vocab;
                return Err(CodecError::Input(format!("id {id} of a vocabulary of {vocab}")));
            };
            scratch.ranks.push(rank);
        }
        let cluster = self.clusters.best(&scratch.ranks, &mut scratch.sums);
        let EncodeScratch { scaled, values, roots, .. } = scratch;
        scaled.clear();
        scaled.extend(
            values.iter().zip(&*roots).map(|(&value, &root)| self.scale.place(value, root)),
        );
        for root in roots.iter_mut() {
            *root = *root * *root * self.per_bit;
        }
        place(model, cluster, count, scratch)?;
        let shape = self.shapes.best(model, cluster, mass, scratch);
        self.levels.quantise(shape, scratch);
        let head = Head {
            cluster: cluster as u16,
            shape: shape as u8,
            count: count as u16,
            mass: mass as u16,
        };
        let top = top(&scratch.ordered, &scratch.levels);
        on_row(&StoredRow {
            row: 0,
            head,
            positions: &scratch.positions,
            ids: &[],
            levels: &scratch.levels,
            top,
            bits: [0; 3],
        });
        Ok(())
    }
}

/// What levels cost in bits.
#[derive(Debug)]
struct LevelCosts {
    /// Levels of the quantisers, in turn.
    values: [Vec<f32>; 2],
    /// By table: the costs of all numbers of a quantiser.
    bits: Vec<f32>,
    /// Where `bits` has them for both quantisers, by shape and bucket of the position + 1.
    contexts: Vec<[u32; 2]>,
    /// Buckets of a shape.
    buckets: usize,
    /// The last level that has three more.
    last: i32,
}

impl LevelCosts {
    fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let levels = prior.levels.len();
        let numbers = levels.div_ceil(2);
        let symbols: Vec<usize> =
            (0..numbers as u32).map(|number| Kind::Other.symbol(number)).collect();
        let bits = costs.iter().flat_map(|costs| symbols.iter().map(|&symbol| costs[symbol]));
        let buckets = dimensions.positions;
        let context = |shape: usize, quantiser: usize, bucket: usize| {
            let table = prior.contexts.level[(shape * 2 + quantiser) * buckets + bucket];
            u32::from(table) * numbers as u32
        };
        let shapes = 0..dimensions.shapes;
        Self {
            values: [0, 1]
                .map(|first| prior.levels.iter().skip(first).step_by(2).copied().collect()),
            bits: bits.collect(),
            contexts: shapes
                .flat_map(|shape| {
                    (0..buckets).map(move |bucket| [0, 1].map(|half| context(shape, half, bucket)))
                })
                .collect(),
            buckets,
            last: levels as i32 - 4,
        }
    }

    /// The levels that cost least in divergence and bits together, over all ways through the
    /// states of the quantiser (the Viterbi algorithm).
    #[inline(always)]
    fn quantise(&self, shape: usize, scratch: &mut EncodeScratch) {
        let EncodeScratch { ordered, buckets, choices, levels, .. } = scratch;
        let contexts = &self.contexts[shape * self.buckets..][..self.buckets];
        choices.clear();
        choices.resize(ordered.len(), (0, 0));
        let mut paths = [0.0, UNREACHED, UNREACHED, UNREACHED];
        for ((value, &bucket), choice) in ordered.iter().zip(&*buckets).zip(&mut *choices) {
            // Four neighbours: one for each remainder by 4.
            let first = (value.scaled as i32 - 1).clamp(0, self.last) as usize;
            let costs = self.costs(contexts[usize::from(bucket)], value, first);
            // Each state is reached from two, in the order of [`back`].
            let [a, b, c, d] = paths;
            let [e, f, g, h] = costs;
            let ones = added([a, c, a, c], [e, f, g, h]);
            let others = added([b, d, b, d], [g, h, e, f]);
            let mut second = 0;
            for (state, path) in paths.iter_mut().enumerate() {
                let (one, other) = (ones[state], others[state]);
                let better = other < one;
                *path = if better { other } else { one };
                second |= u16::from(better) << state;
            }
            *choice = (first as u16, second);
        }
        let better = |best, state| if paths[state] < paths[best] { state } else { best };
        let mut state = (0..STATES).fold(0, better);
        levels.clear();
        levels.resize(ordered.len(), 0);
        for (level, &(first, second)) in levels.iter_mut().zip(choices.iter()).rev() {
            let (previous, remainder) = back(state, usize::from(second >> state & 1));
            *level = first + ((remainder as u16).wrapping_sub(first) & 3);
            state = previous;
        }
    }

    /// What the four levels from `first` on cost, each at the place of its remainder by 4.
    #[inline(always)]
    fn costs(&self, context: [u32; 2], value: &Value, first: usize) -> [f32; 4] {
        // A quantiser has the even or the odd ones.
        let even = self.two(context[0], value, 0, first.div_ceil(2));
        let odd = self.two(context[1], value, 1, first / 2);
        [even[0], odd[0], even[1], odd[1]]
    }

    /// What two numbers of a quantiser cost, the even one first.
    #[inline(always)]
    fn two(&self, context: u32, value: &Value, quantiser: usize, number: usize) -> [f32; 2] {
        let levels = &self.values[quantiser][number..number + 2];
        let at = context as usize + number;
        let bits = &self.bits[at..at + 2];
        let (low, high) = (levels[0] - value.logprob, levels[1] - value.logprob);
        let low = value.weight * low * low + bits[0];
        let high = value.weight * high * high + bits[1];
        if number.is_multiple_of(2) { [low, high] } else { [high, low] }
    }
}

#[inline(always)]
fn added(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
}

/// The state before, and the level's remainder by 4, on the first or second way to a state.
const fn back(state: usize, second: usize) -> (usize, usize) {
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

/// The order of positions, and values in it.
#[inline(always)]
fn place(model: &Model, cluster: usize, count: usize, scratch: &mut EncodeScratch) -> Result<()> {
    let order = &model.clusters[cluster].order;
    let size = order.listed();
    let EncodeScratch { ranks, keys, positions, ordered, values, roots: weights, .. } = scratch;
    let EncodeScratch { sorted, listed, places, scaled, buckets, found, .. } = scratch;
    listed.clear();
    listed.resize(size.div_ceil(64), 0);
    places.resize(size.max(places.len()), 0);
    keys.clear();
    // Positions of the list are sorted by a bit for each, the others by comparison.
    order.positions(ranks, found);
    for (place, &position) in found.iter().enumerate() {
        let at = position as usize;
        match listed.get_mut(at / 64) {
            Some(word) if at < size && *word >> (at % 64) & 1 == 0 => {
                *word |= 1 << (at % 64);
                places[at] = place as u16;
            }
            _ => keys.push(u64::from(position) << 32 | place as u64),
        }
    }
    keys.sort_unstable();
    positions.clear();
    buckets.clear();
    ordered.clear();
    let mut push = |position: u32, place: usize| {
        positions.push(position);
        buckets.push(bucket(position + 1) as u8);
        let (logprob, scaled, weight) = (values[place], scaled[place], weights[place]);
        ordered.push(Value { logprob, scaled, weight, rank: place as u32 });
    };
    for (word, bits) in listed.iter_mut().enumerate() {
        while *bits > 0 {
            let position = word * 64 + bits.trailing_zeros() as usize;
            *bits &= *bits - 1;
            push(position as u32, usize::from(places[position]));
        }
    }
    for &key in keys.iter() {
        push((key >> 32) as u32, key as u32 as usize);
    }
    if let Some(twice) = (1..ordered.len()).find(|&i| positions[i - 1] >= positions[i]) {
        let id = sorted[ordered[twice].rank as usize].1;
        return Err(CodecError::Input(format!("id {id} occurs twice among the first {count}")));
    }
    Ok(())
}

/// The place of the most probable id among all by falling level.
#[inline(always)]
fn top(ordered: &[Value], levels: &[u16]) -> usize {
    let Some(own) = ordered.iter().position(|value| value.rank == 0) else {
        return 0;
    };
    let level = levels[own];
    let before = levels.iter().enumerate();
    before.filter(|&(place, &other)| other > level || other == level && place < own).count()
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

    /// How many of the sorted ids are stored, and the sum of their probabilities; computes their
    /// values, and the roots of their probabilities.
    #[inline(always)]
    fn select(&self, scratch: &mut EncodeScratch) -> Result<(usize, f64)> {
        let EncodeScratch { sorted, values, roots, .. } = scratch;
        values.clear();
        values.extend(
            sorted
                .iter()
                .take(self.k)
                .map(|pair| pair.0)
                .take_while(|&logprob| logprob > f32::NEG_INFINITY),
        );
        let Some(&highest) = values.first() else {
            return Err(CodecError::Input(
                "found no id with a finite log-probability, expected at least one".to_owned(),
            ));
        };
        if highest.is_nan() || f64::from(highest) > ROUNDING {
            return Err(CodecError::Input(format!(
                "found log-probability {highest}, expected at most 0"
            )));
        }
        if let Some(threshold) = self.threshold {
            let count = values.iter().take_while(|&&logprob| logprob >= threshold).count();
            values.truncate(count.max(1));
        }
        for value in values.iter_mut() {
            *value = value.clamp(LEAST, 0.0);
        }
        roots.clear();
        roots.extend(values.iter().map(|&logprob| exp(0.5 * logprob)));
        let mut total = 0.0;
        let mut count = values.len();
        for (i, &root) in roots.iter().enumerate() {
            total += f64::from(root) * f64::from(root);
            if self.mass.is_some_and(|mass| total >= mass) {
                count = i + 1;
                break;
            }
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
    /// For the rank of an id, its column, which is 0 if it is in no list.
    columns: Vec<u32>,
    /// Costs of a column in every cluster.
    costs: Vec<u8>,
    /// Costs of a cluster itself.
    base: Vec<u16>,
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
        let mut columns = vec![0; ranks.len()];
        let mut next = 1;
        for &id in prior.clusters.iter().flat_map(|cluster| &cluster.list) {
            let column = &mut columns[ranks[id as usize] as usize];
            if *column == 0 {
                *column = next;
                next += 1;
            }
        }
        let outside = |cluster: &super::prior::Cluster| {
            profiles[usize::from(cluster.gap_class)].cost(cluster.list.len() as u32 * 2 + 64)
        };
        let row: Vec<u8> = prior.clusters.iter().map(outside).collect();
        let mut table = row.repeat(next as usize);
        for (number, cluster) in prior.clusters.iter().enumerate() {
            for (&id, position) in cluster.list.iter().zip(0..) {
                let column = columns[ranks[id as usize] as usize] as usize;
                table[column * clusters + number] =
                    profiles[usize::from(cluster.gap_class)].cost(position);
            }
        }
        let own = &costs[usize::from(prior.cluster)];
        let base = |(number, cluster): (u32, &super::prior::Cluster)| {
            let bits =
                own[Kind::Other.symbol(number)] + profiles[usize::from(cluster.gap_class)].base;
            (bits * UNITS).clamp(0.0, 2000.0 * UNITS) as u16
        };
        let base = (0..).zip(prior.clusters).map(base).collect();
        Self { clusters, columns, costs: table, base }
    }

    /// The cluster in which some of the ids cost least, which are spread over all of them: to read
    /// the costs of every id would take a third of the time, and save 0.2% of the bytes.
    #[inline(always)]
    pub(super) fn best(&self, ranks: &[u32], sums: &mut Vec<u16>) -> usize {
        let judging = (ranks.len() * 5 / 8).max(JUDGING).min(ranks.len()).min(DECIDING);
        // Both as fractions of 2¹⁶: there are thousands of them, and divisions are slow.
        let (share, step) = ((judging << 16) / ranks.len(), (ranks.len() << 16) / judging);
        sums.clear();
        sums.extend(self.base.iter().map(|&base| ((u32::from(base) * share as u32) >> 16) as u16));
        if self.clusters == 1 {
            return 0;
        }
        let judge = |i: usize| {
            let rank = ranks[(i * step) >> 16];
            let column = self.columns[rank as usize] as usize * self.clusters;
            &self.costs[column..column + self.clusters]
        };
        let whole = judging - judging % 8;
        for i in (0..whole).step_by(8) {
            let [a, b, c, d] = [judge(i), judge(i + 1), judge(i + 2), judge(i + 3)];
            let [e, f, g, h] = [judge(i + 4), judge(i + 5), judge(i + 6), judge(i + 7)];
            add_columns(sums, [a, b, c, d, e, f, g, h]);
        }
        for i in whole..judging {
            add_columns(sums, [judge(i)]);
        }
        least(sums)
    }
}

impl ClusterCosts {
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
        self.best(ranks, sums);
        for _ in 0..most.min(sums.len()) {
            let cluster = least(sums);
            sums[cluster] = u16::MAX;
            out.push(cluster as u16);
        }
    }
}

/// Adds columns of costs to their sums: few of them cannot exceed 16 bits.
#[inline(always)]
fn add_columns<const N: usize, T: Copy + Into<u16>>(sums: &mut [u16], columns: [&[T]; N]) {
    let columns = columns.map(|column| &column[..sums.len()]);
    for (cluster, sum) in sums.iter_mut().enumerate() {
        let mut cost = 0u16;
        for column in &columns {
            cost += column[cluster].into();
        }
        *sum = sum.saturating_add(cost);
    }
}

/// The place of the first least number.
#[inline(always)]
fn least(numbers: &[u16]) -> usize {
    let best = numbers.iter().min().copied().unwrap_or(0);
    numbers.iter().position(|&number| number == best).unwrap_or(0)
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

    fn cost(&self, position: u32) -> u8 {
        let cost =
            self.costs.get(bucket(position + 1)).or(self.costs.last()).copied().unwrap_or(0.0);
        ((cost + 4.0) * UNITS).clamp(0.0, 255.0) as u8
    }
}

/// What each value costs in each shape, about.
#[derive(Debug)]
struct ShapeCosts {
    shapes: usize,
    /// By bucket of the position + 1, symbol, shape.
    costs: Vec<u16>,
    /// By class of the cluster, shape.
    shape: Vec<u16>,
    /// By symbol of the mass, shape.
    mass: Vec<u16>,
    /// By symbol of the count, shape.
    count: Vec<u16>,
}

impl ShapeCosts {
    fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let shapes = dimensions.shapes;
        let units = |bits: f32| (bits * UNITS) as u16;
        let bits = |table: u16, symbol: usize| costs[usize::from(table)][symbol];
        let mut own = Self {
            shapes,
            costs: Vec::new(),
            shape: Vec::new(),
            mass: Vec::new(),
            count: Vec::new(),
        };
        for position in 0..dimensions.positions {
            for symbol in 0..SYMBOLS {
                own.costs.extend((0..shapes).map(|shape| {
                    let [even, odd] = [0, 1].map(|quantiser| {
                        let context = (shape * 2 + quantiser) * dimensions.positions + position;
                        bits(prior.contexts.level[context], symbol)
                    });
                    units(f32::midpoint(even, odd))
                }));
            }
        }
        for &table in &prior.contexts.shape {
            let symbol = |shape| Kind::Other.symbol(shape);
            own.shape.extend((0..shapes as u32).map(|shape| units(bits(table, symbol(shape)))));
        }
        for symbol in 0..SYMBOLS {
            let cost = |&table: &u16| units(bits(table, symbol));
            own.mass.extend(prior.contexts.mass.iter().map(cost));
            own.count.extend(prior.contexts.count.iter().map(cost));
        }
        own
    }

    /// The shape in which the values cost least.
    #[inline(always)]
    fn best(
        &self,
        model: &Model,
        cluster: usize,
        mass: usize,
        scratch: &mut EncodeScratch,
    ) -> usize {
        let EncodeScratch { sums, ordered, buckets, .. } = scratch;
        let shapes = self.shapes;
        let class = model.clusters[cluster].shape_class;
        sums.clear();
        sums.extend_from_slice(&self.shape[class * shapes..(class + 1) * shapes]);
        let count = model.count_number(ordered.len());
        for (costs, number) in [(&self.mass, mass as u32), (&self.count, count)] {
            let symbol = Kind::Other.symbol(number);
            sums.iter_mut().zip(&costs[symbol * shapes..]).for_each(|(sum, cost)| *sum += cost);
        }
        let column = |(value, &bucket): (&Value, &u8)| {
            let number = (value.scaled * 0.5 + 0.25) as u32;
            let place = (usize::from(bucket) * SYMBOLS + Kind::Other.symbol(number)) * shapes;
            &self.costs[place..place + shapes]
        };
        let deciding = ordered.len().min(DECIDING);
        let (eights, rest) = ordered[..deciding].as_chunks::<8>();
        let (bucket_eights, rest_buckets) = buckets[..deciding].as_chunks::<8>();
        for (eight, buckets) in eights.iter().zip(bucket_eights) {
            let column = |i: usize| column((&eight[i], &buckets[i]));
            let [a, b, c, d] = [column(0), column(1), column(2), column(3)];
            let [e, f, g, h] = [column(4), column(5), column(6), column(7)];
            add_columns(sums, [a, b, c, d, e, f, g, h]);
        }
        for each in rest.iter().zip(rest_buckets) {
            add_columns(sums, [column(each)]);
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
        for state in 0..STATES {
            for second in 0..2 {
                let (previous, remainder) = back(state, second);
                assert_eq!(previous >> 1, remainder & 1);
                assert_eq!(usize::from(NEXT[previous][remainder >> 1]), state);
                ways |= 1 << (previous * 4 + remainder);
            }
        }
        assert_eq!(ways, 0b1010_1010_0101_0101);
    }
}
