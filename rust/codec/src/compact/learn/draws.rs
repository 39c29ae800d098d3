//! Learning a [`SampledPrior`] from rows of draws.
//!
//! Clusters and lists are found as for the compact format, tables are counted in what is written.

use super::clusters::Clusters;
use super::tables::{Counts, Shared};
use super::{
    CLUSTERS, COARSENESS, GAP_CLASSES, GAP_TABLES, OTHER_TABLES, SHAPE_CLASSES, Sample, Samples,
    by_frequency, divided, gaps, listed, quantiles, spread,
};
use crate::compact::config::MAX_COSTS;
use crate::compact::numbers::{Kind, bucket};
use crate::compact::prior::Dimensions;
use crate::compact::sampled::{
    Draws, EncodeScratch, Encoder, Excess, Model, SampledConfig, SampledContexts, SampledPrior,
    Shared as SharedCodes, counted, excesses,
};
use crate::error::{CodecError, Result};
use crate::tasks::{TASK_ROWS, run_tasks};

/// How often the rows are encoded and counted.
const ROUNDS: usize = 4;

/// Rows to learn from, `width` places each.
#[derive(Debug, Clone, Copy)]
struct Rows<'a> {
    ids: &'a [i64],
    logprobs: &'a [f32],
    width: usize,
}

/// Learns a prior of a configuration from rows of draws, as [`super::super::Sampled`] encodes them.
/// `base` is a prior, in bytes, of either format and for the same vocabulary, whose clusters are
/// taken over; only the code tables are then learned.
///
/// `likely` are, if they are known, the most probable ids of each row's distribution, so many a row:
/// they tell better than draws which rows are alike. Without them, draws have to do.
///
/// Rows of a document are expected one after the other. The result depends on nothing else, neither
/// on the machine nor on threads.
///
/// Fails with [`CodecError::Input`] where there are no rows, where a row could not be encoded, or
/// where `base` is for another vocabulary, and with [`CodecError::Corrupt`] or
/// [`CodecError::Truncated`] where `base` is no prior.
pub fn learn_sampled(
    config: &SampledConfig,
    ids: &[i64],
    logprobs: &[f32],
    width: usize,
    likely: Option<(&[i64], usize)>,
    base: Option<&[u8]>,
) -> Result<SampledPrior> {
    config.validate()?;
    if width == 0 || ids.len() != logprobs.len() || !ids.len().is_multiple_of(width) {
        return Err(CodecError::Input(format!(
            "found {} ids and {} log-probabilities, expected whole rows of {width}",
            ids.len(),
            logprobs.len()
        )));
    }
    if ids.is_empty() {
        return Err(CodecError::Input("found no rows, expected at least one".to_owned()));
    }
    let rows = Rows { ids, logprobs, width };
    let mut prior = SampledPrior::builtin(config);
    if let Some(base) = base {
        take_over(&mut prior, base)?;
        let all: Vec<usize> = (0..ids.len() / width).collect();
        let which = spread(all);
        let stored = encoded(&prior, rows, &which)?;
        return with_tables(recounted(&prior, &stored), rows, &which);
    }
    let sample = sample(&prior.config, rows)?;
    let likely = likely.map(|(ids, width)| alike(&sample, ids, width)).transpose()?;
    let samples = Samples { own: &sample, wide: likely.as_ref().unwrap_or(&sample) };
    let (fit, kept) = divided(sample.rows());
    let most = CLUSTERS.min(MAX_COSTS / config.vocab_size as usize);
    let clusters = Clusters::find(samples.wide, &fit, most)?;
    let coarse = Clusters::find(samples.wide, &fit, clusters.count().div_ceil(COARSENESS))?;
    prior.order.clone_from(&sample.order);
    prior.clusters = clusters.lists(&samples, &coarse, &fit).into_iter().map(listed).collect();
    let kept = spread(kept);
    let stored = placed(&prior, rows, &clusters, &kept)?;
    first_classes(&mut prior, &stored);
    let mut prior = with_tables(recounted(&prior, &stored), rows, &kept)?;
    // Now that tables are learned, lists may know all rows.
    let all: Vec<usize> = (0..sample.rows()).collect();
    let lists = clusters.lists(&samples, &coarse, &all);
    prior.clusters.iter_mut().zip(lists).for_each(|(cluster, list)| cluster.list = list);
    Ok(prior)
}

/// Takes over order, clusters and, to begin with, the tables of gaps of another prior.
fn take_over(prior: &mut SampledPrior, base: &[u8]) -> Result<()> {
    let (vocab_size, k, base) = SampledPrior::of_any(base)?;
    if vocab_size != prior.config.vocab_size {
        return Err(CodecError::Input(format!(
            "base: found a prior for a vocabulary of {vocab_size}, expected {}",
            prior.config.vocab_size
        )));
    }
    let SharedCodes { order, clusters, gap, tables } = base;
    let own = Dimensions::of_ids(vocab_size, prior.config.k(), GAP_CLASSES);
    let mut theirs = Dimensions::of_ids(vocab_size, k, 1);
    theirs.gap_classes = gap.len() / (theirs.positions * theirs.left);
    let first = prior.tables.len() as u16;
    prior.contexts.gap.clear();
    for class in 0..GAP_CLASSES {
        for position in 0..own.positions {
            for left in 0..own.left {
                let place = class.min(theirs.gap_classes - 1) * theirs.positions + position;
                let place = place * theirs.left + left.min(theirs.left - 1);
                prior.contexts.gap.push(gap[place] + first);
            }
        }
    }
    prior.tables.extend(tables);
    // As long as nothing is known, clusters are equally likely.
    let mut even = Counts::new(1, Kind::Other, clusters.len() as u32 - 1);
    (0..clusters.len() as u32).for_each(|cluster| even.add(0, cluster));
    prior.contexts.cluster = prior.tables.len() as u16;
    prior.tables.extend(even.share(1).tables);
    (prior.order, prior.clusters) = (order, clusters);
    for cluster in &mut prior.clusters {
        cluster.gap_class = cluster.gap_class.min(GAP_CLASSES as u8 - 1);
        cluster.shape_class = 0;
    }
    Ok(())
}

/// The ids of rows by their ranks.
fn sample(config: &SampledConfig, rows: Rows) -> Result<Sample> {
    let (mut ids, mut starts, mut row) = (Vec::new(), vec![0], Vec::new());
    let all = rows.ids.chunks(rows.width).zip(rows.logprobs.chunks(rows.width));
    for (number, (row_ids, logprobs)) in all.enumerate() {
        counted(config, row_ids, logprobs, &mut row).map_err(|error| error.at_row(number))?;
        ids.extend(row.iter().map(|&(id, _)| id));
        starts.push(ids.len());
    }
    let order = by_frequency(&ids, config.vocab_size as usize);
    let mut ranks = vec![0; order.len()];
    order.iter().zip(0..).for_each(|(&id, rank)| ranks[id as usize] = rank);
    ids.iter_mut().for_each(|id| *id = ranks[*id as usize]);
    Ok(Sample { order, ranks: ids, starts })
}

/// The most probable ids of the same rows, by the same ranks.
fn alike(sample: &Sample, ids: &[i64], width: usize) -> Result<Sample> {
    if width == 0 || ids.len() != sample.rows() * width {
        return Err(CodecError::Input(format!(
            "found {} most probable ids, expected {width} for each of {} rows",
            ids.len(),
            sample.rows()
        )));
    }
    let mut places = vec![0; sample.order.len()];
    sample.order.iter().zip(0..).for_each(|(&id, rank)| places[id as usize] = rank);
    let rank = |(place, id): (usize, &i64)| {
        let known = usize::try_from(*id).ok().and_then(|id| places.get(id).copied());
        let vocab = places.len();
        known.ok_or_else(|| {
            CodecError::Input(format!("id {id} of a vocabulary of {vocab}")).at_row(place / width)
        })
    };
    let ranks = ids.iter().enumerate().map(rank).collect::<Result<Vec<u32>>>()?;
    let starts = (0..=sample.rows()).map(|row| row * width).collect();
    Ok(Sample { order: sample.order.clone(), ranks, starts })
}

/// Rows in the clusters that were found for them.
fn placed(
    prior: &SampledPrior,
    rows: Rows,
    clusters: &Clusters,
    which: &[usize],
) -> Result<Vec<Draws>> {
    let model = Model::new(prior)?;
    let ranks = prior.ids().ranks();
    let mut ids = Vec::new();
    let place = |&row: &usize| {
        let at = row * rows.width..(row + 1) * rows.width;
        counted(&prior.config, &rows.ids[at.clone()], &rows.logprobs[at], &mut ids)
            .map_err(|error| error.at_row(row))?;
        let cluster = clusters.of(row);
        let position = |id: u32| model.position(cluster, ranks[id as usize]);
        let mut pairs: Vec<_> = ids.iter().map(|&(id, count)| (position(id), count)).collect();
        pairs.sort_unstable();
        let (positions, counts) = pairs.into_iter().unzip();
        Ok(Draws { cluster, positions, counts })
    };
    which.iter().map(place).collect()
}

/// Rows as they are written.
fn encoded(prior: &SampledPrior, rows: Rows, which: &[usize]) -> Result<Vec<Draws>> {
    let model = Model::new(prior)?;
    let encoder = Encoder::new(prior)?;
    let mut stored = vec![Draws::default(); which.len()];
    let tasks: Vec<_> =
        which.chunks(TASK_ROWS).zip(stored.chunks_mut(TASK_ROWS)).enumerate().collect();
    run_tasks(TASK_ROWS, tasks, |(task, (which, stored)), scratch: &mut EncodeScratch| {
        for (&row, out) in which.iter().zip(stored) {
            let at = row * rows.width..(row + 1) * rows.width;
            let (ids, logprobs) = (&rows.ids[at.clone()], &rows.logprobs[at]);
            // Named by its number among all rows, not among those encoded.
            let found = encoder.row(&model, ids, logprobs, scratch);
            out.clone_from(found.map_err(|error| (row - task * TASK_ROWS, error))?);
        }
        Ok(())
    })?;
    Ok(stored)
}

/// Learns everything but order and lists.
fn with_tables(mut prior: SampledPrior, rows: Rows, which: &[usize]) -> Result<SampledPrior> {
    for _ in 0..ROUNDS {
        let stored = encoded(&prior, rows, which)?;
        gap_classes(&mut prior, &stored);
        prior = recounted(&prior, &stored);
    }
    Ok(prior)
}

/// Classes of clusters by the mean bucket of their positions.
fn first_classes(prior: &mut SampledPrior, stored: &[Draws]) {
    let mut means = vec![(0.0, 0u64); prior.clusters.len()];
    for row in stored {
        let buckets = row.positions.iter().map(|&position| bucket(position + 1) as f64);
        means[row.cluster].0 += buckets.sum::<f64>();
        means[row.cluster].1 += row.positions.len() as u64;
    }
    for (sum, count) in &mut means {
        *sum /= (*count).max(1) as f64;
    }
    let classes = quantiles(&means, GAP_CLASSES);
    prior.clusters.iter_mut().zip(classes).for_each(|(own, class)| own.gap_class = class as u8);
}

/// Puts clusters into the class whose tables code their gaps in the fewest bits.
fn gap_classes(prior: &mut SampledPrior, stored: &[Draws]) {
    let sizes = prior.dimensions();
    let classes = sizes.gap_classes;
    let costs: Vec<_> = prior.tables.iter().map(|table| table.costs(Kind::Gap)).collect();
    let mut bits = vec![vec![0.0f64; classes]; prior.clusters.len()];
    for row in stored {
        let bits = &mut bits[row.cluster];
        gaps(&row.positions, |previous, left, gap| {
            let symbol = Kind::Gap.symbol(gap);
            for (class, bits) in bits.iter_mut().enumerate() {
                let table = prior.contexts.gap[sizes.gap(class, previous, left)];
                *bits += f64::from(costs[usize::from(table)][symbol]);
            }
        });
    }
    for (cluster, bits) in prior.clusters.iter_mut().zip(bits) {
        let best = (0..classes).fold(0, |best, i| if bits[i] < bits[best] { i } else { best });
        cluster.gap_class = best as u8;
    }
}

/// The prior with the tables that rows call for.
fn recounted(prior: &SampledPrior, stored: &[Draws]) -> SampledPrior {
    let config = &prior.config;
    let clusters = prior.clusters.len();
    let sizes = Dimensions::of_ids(config.vocab_size, config.k(), GAP_CLASSES);
    let excess = Excess::new(config);
    let mut cluster = Counts::new(1, Kind::Other, clusters as u32 - 1);
    let mut count = Counts::new(clusters, Kind::Other, config.k() as u32 - 1);
    // As expected without any rows: contexts that the sample never meets must not seem cheap.
    let expected = SampledPrior::builtin(config);
    let each = sizes.positions * sizes.left;
    let mut gap = Counts::new(GAP_CLASSES * each, Kind::Gap, config.vocab_size - 1);
    for context in 0..GAP_CLASSES * each {
        let table = expected.contexts.gap[context % each];
        gap.expect(context, &expected.tables[usize::from(table)]);
    }
    let mut counts = Counts::new(excess.contexts(), Kind::Other, config.draws - 1);
    for (context, &table) in expected.contexts.excess.iter().enumerate() {
        counts.expect(context, &expected.tables[usize::from(table)]);
    }
    for row in stored {
        cluster.add(0, row.cluster as u32);
        count.add(row.cluster, row.positions.len() as u32 - 1);
        let class = usize::from(prior.clusters[row.cluster].gap_class);
        gaps(&row.positions, |previous, left, number| {
            gap.add(sizes.gap(class, previous, left), number);
        });
        excesses(excess, config.draws, row, |context, number| counts.add(context, number));
    }
    let mut tables = Vec::new();
    let mut put = |shared: Shared| {
        let first = tables.len() as u16;
        tables.extend(shared.tables);
        shared.map.into_iter().map(|table| table + first).collect::<Vec<u16>>()
    };
    let cluster = put(cluster.share(1))[0];
    let classes = count.share(SHAPE_CLASSES.max(OTHER_TABLES));
    let mut clusters = prior.clusters.clone();
    clusters.iter_mut().zip(&classes.map).for_each(|(own, &class)| own.shape_class = class as u8);
    let every = (0..classes.tables.len() as u16).collect();
    let contexts = SampledContexts {
        cluster,
        count: put(Shared { tables: classes.tables, map: every }),
        gap: put(gap.share(GAP_TABLES)),
        excess: put(counts.share(EXCESS_TABLES)),
    };
    SampledPrior { config: config.clone(), order: prior.order.clone(), clusters, contexts, tables }
}

/// Most tables for counts.
const EXCESS_TABLES: usize = 64;
