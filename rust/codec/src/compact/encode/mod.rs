//! Rows to what is stored of them: which ids, in which cluster, with which levels.
//!
//! All decisions are made by IEEE basic operations in a fixed order and by libm, so that they are
//! the same on every machine.

mod clusters;
mod levels;
mod shapes;

use super::config::CompactConfig;
use super::decode::{Head, StoredRow};
use super::model::{MASSES, Model};
use super::numbers::{Kind, SYMBOLS, float_bucket};
use super::order::ClusterOrder;
use super::prior::Prior;
use super::scale::Scale;
use super::write::StoredRows;
use crate::error::{CodecError, Result};
use crate::simd::lanes::exp;
use crate::simd::{Backend, multiversion};
pub(super) use clusters::ClusterCosts;
use clusters::Deciding;
use levels::{LEVEL_UNITS, LevelCosts, Trellis};
use shapes::ShapeCosts;

/// Log-probabilities may exceed 0, and the sum of a row's probabilities 1, by this much: the
/// rounding of a low-precision teacher.
const ROUNDING: f64 = 1e-2;
/// What a bit may cost in divergence, in units of the square of the step.
const BIT_WORTH: f64 = 0.16;
/// At most so many ids decide cluster and shape.
const DECIDING: usize = 256;
/// Smaller log-probabilities are stored as this.
const LEAST: f32 = -80.0;

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
