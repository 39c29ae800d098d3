//! Learning a [`Prior`] from rows of a teacher.
//!
//! Rows are clustered by their ids. Then the sample is encoded as any rows are, what was written is
//! counted, tables are made of the counts, and again, until they fit what they lead to. Some rows
//! are kept out of the clusters, and tables are learned from these: in rows that clusters were made
//! of, ids lie closer together than they will in others.

mod clusters;
mod draws;
mod tables;
#[cfg(test)]
mod tests;

use super::builtin::builtin;
use super::config::{CompactConfig, MAX_COSTS};
use super::decode::Head;
use super::encode::{EncodeScratch, Encoder};
use super::lists::arrange;
use super::model::{MASSES, Model};
use super::numbers::{Kind, bucket};
use super::order::ClusterOrder;
use super::prior::{Cluster, Contexts, Dimensions, Prior};
use super::scale::Scale;
use super::write::StoredRows;
use crate::error::{CodecError, Result};
use crate::tasks::{TASK_ROWS, run_tasks};
use clusters::Clusters;
pub use draws::learn_sampled;
use tables::{Counts, Shared};

/// Rows that stay together: those of a document are alike.
const BLOCK: usize = 512;
/// Every so many blocks, one is for tables and the others for clusters.
const BLOCKS: usize = 8;
/// Most rows that tables are learned from.
const TABLE_ROWS: usize = 40_000;
/// With fewer rows, all are for clusters and tables.
const FEW_ROWS: usize = 16;
/// Most clusters; fewer in vocabularies beyond 262,144 ids.
const CLUSTERS: usize = 512;
/// How many clusters there are for a coarse one.
const COARSENESS: usize = 16;
/// Ids of a row that tell its cluster, if that many are given, even where fewer are stored.
const CLUSTER_IDS: usize = 128;
/// How often the rows are encoded and counted.
const ROUNDS: usize = 5;
const SHAPES: usize = 32;
/// Rows a shape needs to be one.
const ROWS_PER_SHAPE: usize = 32;
const GAP_CLASSES: usize = 4;
const SHAPE_CLASSES: usize = 8;
/// Most tables for gaps, for levels, and for masses or counts.
const GAP_TABLES: usize = 64;
const LEVEL_TABLES: usize = 128;
const OTHER_TABLES: usize = 16;
/// How much probability at the nominal place of a level is added to what was met there.
const NOMINAL: f64 = 1e-3;

/// Rows of ids and log-probabilities, as they are encoded.
#[derive(Clone, Copy)]
struct Rows<'a> {
    ids: &'a [i64],
    logprobs: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    fn row(&self, row: usize) -> (&'a [i64], &'a [f32]) {
        let place = row * self.width..(row + 1) * self.width;
        (&self.ids[place.clone()], &self.logprobs[place])
    }
}

/// Which ids are stored of rows, by rank.
struct Sample {
    /// The ids by frequency, arranged.
    order: Vec<u32>,
    ranks: Vec<u32>,
    /// Where each row's ranks begin, and where the last one's end.
    starts: Vec<usize>,
}

/// Which ids are stored of rows in the prior's configuration, and in the one of [`widened`].
struct Samples<'a> {
    own: &'a Sample,
    wide: &'a Sample,
}

/// Learns a prior of a configuration from rows of `width` ids and log-probabilities: at least k,
/// of which those are taken that would be encoded. `base` is a prior, in bytes, for the same
/// vocabulary, whose clusters are taken over; only the code tables are then learned.
///
/// Rows of a document are expected one after the other. The result depends on nothing else, neither
/// on the machine nor on threads. Takes about a quarter of a millisecond of one core for a row at
/// k = 128, and memory of about sixteen bytes for each of k ids of a row (128 at least) and a
/// kilobyte for each id of the vocabulary.
///
/// ```
/// use distillkit_codec::compact::{CompactConfig, learn};
/// let json = r#"{"vocab_size": 50, "k": 2, "step": 0.003}"#;
/// let (ids, logprobs) = ([7, 3, 3, 7], [-0.2_f32, -2.0, -0.4, -1.5]);
/// let prior = learn(&CompactConfig::from_json(json)?, &ids, &logprobs, 2, None)?;
/// assert_eq!(prior.order.len(), 50);
/// # Ok::<(), distillkit_codec::CodecError>(())
/// ```
///
/// Fails with [`CodecError::Input`] where there are no rows, where a row could not be encoded, or
/// where `base` is for another vocabulary, and with [`CodecError::Corrupt`] or
/// [`CodecError::Truncated`] where `base` is no prior.
pub fn learn(
    config: &CompactConfig,
    ids: &[i64],
    logprobs: &[f32],
    width: usize,
    base: Option<&[u8]>,
) -> Result<Prior> {
    config.validate()?;
    let k = config.k;
    if width < k || ids.len() != logprobs.len() || !ids.len().is_multiple_of(width) {
        return Err(CodecError::Input(format!(
            "found {} ids and {} log-probabilities in rows of {width}, expected whole rows of at least {k}",
            ids.len(),
            logprobs.len()
        )));
    }
    if ids.is_empty() {
        return Err(CodecError::Input("found no rows, expected at least one".to_owned()));
    }
    let rows = Rows { ids, logprobs, width };
    let mut prior = builtin(config);
    if let Some(base) = base {
        take_over(&mut prior, base)?;
        let all: Vec<usize> = (0..ids.len() / width).collect();
        return with_tables(prior, rows, &spread(all));
    }
    let widened = widened(config, width);
    let wide = Sample::read(&widened, rows, None)?;
    let own =
        (widened != prior.config).then(|| Sample::read(&prior.config, rows, Some(&wide.order)));
    let own = own.transpose()?;
    let samples = Samples { own: own.as_ref().unwrap_or(&wide), wide: &wide };
    let (fit, kept) = divided(wide.rows());
    let most = CLUSTERS.min(MAX_COSTS / config.vocab_size as usize);
    let clusters = Clusters::find(&wide, &fit, most)?;
    let coarse = Clusters::find(&wide, &fit, clusters.count().div_ceil(COARSENESS))?;
    prior.order.clone_from(&wide.order);
    prior.clusters = clusters.lists(&samples, &coarse, &fit).into_iter().map(listed).collect();
    let kept = spread(kept);
    first_gaps(&mut prior, samples.own, &clusters, &kept);
    let mut prior = with_tables(prior, rows, &kept)?;
    // Now that tables are learned, lists may know all rows.
    let all: Vec<usize> = (0..wide.rows()).collect();
    let lists = clusters.lists(&samples, &coarse, &all);
    prior.clusters.iter_mut().zip(lists).for_each(|(cluster, list)| cluster.list = list);
    Ok(prior)
}

/// Takes over order, clusters and, to begin with, the tables of gaps of another prior.
fn take_over(prior: &mut Prior, base: &[u8]) -> Result<()> {
    let base = Prior::from_bytes(base)?;
    if base.config.vocab_size != prior.config.vocab_size {
        return Err(CodecError::Input(format!(
            "base: found a prior for a vocabulary of {}, expected {}",
            base.config.vocab_size, prior.config.vocab_size
        )));
    }
    let (own, theirs) = (Dimensions::new(&prior.config, GAP_CLASSES, 1, 1), base.dimensions());
    let first = prior.tables.len() as u16;
    prior.contexts.gap.clear();
    for class in 0..GAP_CLASSES.min(theirs.gap_classes) {
        for position in 0..own.positions {
            for left in 0..own.left {
                let place = class * theirs.positions + position;
                let place = place * theirs.left + left.min(theirs.left - 1);
                prior.contexts.gap.push(base.contexts.gap[place] + first);
            }
        }
    }
    prior.tables.extend(base.tables);
    prior.order = base.order;
    prior.clusters = base.clusters;
    for cluster in &mut prior.clusters {
        cluster.gap_class = cluster.gap_class.min(GAP_CLASSES as u8 - 1);
        cluster.shape_class = 0;
    }
    Ok(())
}

/// The configuration by which rows are clustered: what is left out of a row says what it is about,
/// too.
fn widened(config: &CompactConfig, width: usize) -> CompactConfig {
    let k = CLUSTER_IDS.min(width).min(config.vocab_size as usize).max(config.k);
    CompactConfig { k, threshold: None, mass: None, ..config.without_prior() }
}

fn listed(list: Vec<u32>) -> Cluster {
    Cluster { list, ..Cluster::default() }
}

/// Rows for clusters, and rows for tables.
fn divided(rows: usize) -> (Vec<usize>, Vec<usize>) {
    if rows < FEW_ROWS {
        return ((0..rows).collect(), (0..rows).collect());
    }
    let block = (rows / (2 * BLOCKS)).clamp(1, BLOCK);
    (0..rows).partition(|row| row / block % BLOCKS != BLOCKS - 1)
}

/// At most [`TABLE_ROWS`] of the rows, evenly spread.
fn spread(rows: Vec<usize>) -> Vec<usize> {
    if rows.len() <= TABLE_ROWS {
        return rows;
    }
    (0..TABLE_ROWS).map(|i| rows[i * rows.len() / TABLE_ROWS]).collect()
}

impl Sample {
    /// Reads rows; the order is given, or made of what is stored of them.
    fn read(config: &CompactConfig, rows: Rows, order: Option<&[u32]>) -> Result<Self> {
        let all: Vec<usize> = (0..rows.ids.len() / rows.width).collect();
        let vocab = config.vocab_size as usize;
        let (mut ids, mut starts) = (Vec::new(), vec![0]);
        for stored in encoded(&builtin(config), rows, &all)? {
            // In the built-in prior, positions are ids.
            for head in &stored.heads {
                starts.push(starts[starts.len() - 1] + usize::from(head.count));
            }
            ids.extend(stored.positions);
        }
        let order = order.map_or_else(|| by_frequency(&ids, vocab), <[u32]>::to_vec);
        let mut ranks = vec![0; vocab];
        order.iter().zip(0..).for_each(|(&id, rank)| ranks[id as usize] = rank);
        for id in &mut ids {
            *id = ranks[*id as usize];
        }
        Ok(Self { order, ranks: ids, starts })
    }

    fn rows(&self) -> usize {
        self.starts.len() - 1
    }

    fn ranks(&self, row: usize) -> &[u32] {
        &self.ranks[self.starts[row]..self.starts[row + 1]]
    }
}

/// All ids of a vocabulary, the most frequent first, arranged.
fn by_frequency(ids: &[u32], vocab: usize) -> Vec<u32> {
    let mut counts = vec![0u32; vocab];
    for &id in ids {
        counts[id as usize] += 1;
    }
    let mut order: Vec<u32> = (0..vocab as u32).collect();
    order.sort_by_key(|&id| std::cmp::Reverse(counts[id as usize]));
    arrange(&mut order, |id| id);
    order
}

fn cluster_orders(prior: &Prior) -> Vec<ClusterOrder> {
    let ranks = prior.ranks();
    prior.clusters.iter().map(|cluster| ClusterOrder::new(&cluster.list, &ranks)).collect()
}

/// What is stored of some rows, in pieces.
fn encoded(prior: &Prior, rows: Rows, which: &[usize]) -> Result<Vec<StoredRows>> {
    let model = Model::new(prior)?;
    let encoder = Encoder::new(prior, &model)?;
    let mut pieces = vec![StoredRows::default(); which.len().div_ceil(TASK_ROWS)];
    let tasks: Vec<_> = which.chunks(TASK_ROWS).zip(&mut pieces).enumerate().collect();
    run_tasks(TASK_ROWS, tasks, |(task, (which, piece)), scratch: &mut EncodeScratch| {
        for &row in which {
            let (ids, logprobs) = rows.row(row);
            // Named by its number among all rows, not among those encoded.
            encoder
                .row(&model, ids, logprobs, scratch, |stored| piece.push(stored))
                .map_err(|error| (row - task * TASK_ROWS, error))?;
        }
        Ok(())
    })?;
    Ok(pieces)
}

/// Learns everything but order and lists.
fn with_tables(mut prior: Prior, rows: Rows, which: &[usize]) -> Result<Prior> {
    let clusters = prior.clusters.len();
    // As long as nothing is known, clusters are equally likely.
    let mut even = Counts::new(1, Kind::Other, clusters as u32 - 1);
    (0..clusters).for_each(|cluster| even.add(0, cluster as u32));
    prior.contexts.cluster = prior.tables.len() as u16;
    prior.tables.extend(even.share(1).tables);
    for round in 0..ROUNDS {
        let mut stored = StoredRows::default();
        encoded(&prior, rows, which)?.iter().for_each(|piece| stored.append(piece));
        if round == 0 {
            first_shapes(&mut prior, &mut stored);
        } else {
            prior.levels = levels(&prior, rows, which, &stored);
        }
        prior = recounted(&prior, &stored);
        gap_classes(&mut prior, &stored);
    }
    Ok(prior)
}

/// The rows of stored ones: head, positions, levels.
fn each_row(stored: &StoredRows) -> impl Iterator<Item = (&Head, &[u32], &[u16])> {
    let mut start = 0;
    stored.heads.iter().map(move |head| {
        let place = start..start + usize::from(head.count);
        start = place.end;
        (head, &stored.positions[place.clone()], &stored.levels[place])
    })
}

/// Divides things into classes of about equal weight by a number.
fn quantiles(weights: &[(f64, u64)], classes: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[a].0.total_cmp(&weights[b].0));
    let all = weights.iter().map(|weight| weight.1).sum::<u64>().max(1);
    let mut found = vec![0; weights.len()];
    let mut before = 0;
    for i in order {
        found[i] = ((before * classes as u64 / all) as usize).min(classes - 1);
        before += weights[i].1;
    }
    found
}

/// Classes of clusters by their mean position, and tables of gaps, by the clusters that rows are in.
fn first_gaps(prior: &mut Prior, sample: &Sample, clusters: &Clusters, which: &[usize]) {
    let orders = cluster_orders(prior);
    let mut positions = Vec::new();
    let mut each = |row: usize, each: &mut dyn FnMut(usize, &[u32])| {
        let cluster = clusters.of(row);
        positions.clear();
        positions.extend(sample.ranks(row).iter().map(|&rank| orders[cluster].position(rank)));
        positions.sort_unstable();
        each(cluster, &positions);
    };
    let mut means = vec![(0.0, 0u64); orders.len()];
    for &row in which {
        each(row, &mut |cluster, positions| {
            let buckets = positions.iter().map(|&position| bucket(position + 1) as f64);
            means[cluster].0 += buckets.sum::<f64>();
            means[cluster].1 += positions.len() as u64;
        });
    }
    for (sum, count) in &mut means {
        *sum /= (*count).max(1) as f64;
    }
    let classes = quantiles(&means, GAP_CLASSES);
    prior.clusters.iter_mut().zip(&classes).for_each(|(own, &class)| own.gap_class = class as u8);
    let sizes = Dimensions::new(&prior.config, GAP_CLASSES, 1, 1);
    let mut counts = gap_counts(&prior.config, &sizes);
    for &row in which {
        each(row, &mut |cluster, positions| {
            gaps(positions, |previous, left, gap| {
                counts.add(sizes.gap(classes[cluster], previous, left), gap);
            });
        });
    }
    let shared = counts.share(GAP_TABLES);
    let first = prior.tables.len() as u16;
    prior.contexts.gap = shared.map.into_iter().map(|table| table + first).collect();
    prior.tables.extend(shared.tables);
}

/// No counts of gaps yet, but what the built-in prior expects: contexts that the sample never meets
/// must not seem cheap.
fn gap_counts(config: &CompactConfig, sizes: &Dimensions) -> Counts {
    let expected = builtin(config);
    let each = sizes.positions * sizes.left;
    let mut counts = Counts::new(sizes.gap_classes * each, Kind::Gap, config.vocab_size - 1);
    for context in 0..sizes.gap_classes * each {
        let table = expected.contexts.gap[context % each];
        counts.expect(context, &expected.tables[usize::from(table)]);
    }
    counts
}

/// Shapes of rows by their mean level.
fn first_shapes(prior: &mut Prior, stored: &mut StoredRows) {
    let mean = |levels: &[u16]| {
        let sum: u64 = levels.iter().map(|&level| u64::from(level)).sum();
        (sum as f64 / levels.len() as f64, 1)
    };
    let means: Vec<_> = each_row(stored).map(|(_, _, levels)| mean(levels)).collect();
    let shapes = (means.len() / ROWS_PER_SHAPE).clamp(1, SHAPES);
    let found = quantiles(&means, shapes);
    stored.heads.iter_mut().zip(found).for_each(|(head, shape)| head.shape = shape as u8);
    // The maps say how many there are.
    prior.contexts.count = vec![0; shapes];
}

/// The mean log-probability of what is stored as each level, by probability.
fn levels(prior: &Prior, rows: Rows, which: &[usize], stored: &StoredRows) -> Vec<f32> {
    let orders = cluster_orders(prior);
    let ranks = prior.ranks();
    let nominal = Scale::new(prior.config.step).nominals();
    let start = |&level: &f32| (NOMINAL * f64::from(level), NOMINAL);
    let mut sums: Vec<(f64, f64)> = nominal.iter().map(start).collect();
    for ((head, positions, levels), &row) in each_row(stored).zip(which) {
        let order = &orders[usize::from(head.cluster)];
        let (ids, logprobs) = rows.row(row);
        for (&id, &logprob) in ids.iter().zip(logprobs) {
            let Some(&rank) = usize::try_from(id).ok().and_then(|id| ranks.get(id)) else {
                continue;
            };
            if let Ok(place) = positions.binary_search(&order.position(rank)) {
                let logprob = f64::from(logprob).min(0.0);
                let p = libm::exp(logprob);
                let sum = &mut sums[usize::from(levels[place])];
                sum.0 += p * logprob.max(f64::from(nominal[0]));
                sum.1 += p;
            }
        }
    }
    let mut means: Vec<f32> = sums.iter().map(|(sum, p)| (sum / p) as f32).collect();
    // Levels ascend; there is room for each between its neighbours' nominal places.
    let nearest = |mean: f32, level: usize| {
        let low =
            if level == 0 { nominal[0] - 1.0 } else { 0.5 * (nominal[level - 1] + nominal[level]) };
        let high = nominal.get(level + 1).map_or(0.0, |next| 0.5 * (nominal[level] + next));
        mean.clamp(low.min(nominal[level]), high.max(nominal[level]).min(0.0))
    };
    for level in 0..means.len() {
        means[level] = nearest(means[level], level);
        if level > 0 && means[level] <= means[level - 1] {
            means[level] = means[level - 1].next_up();
        }
    }
    if means.last().is_some_and(|&last| last <= 0.0) { means } else { nominal }
}

/// Everything that is counted of rows.
struct Counted {
    cluster: Counts,
    shape: Counts,
    count: Counts,
    mass: Counts,
    gap: Counts,
    level: Counts,
}

/// The prior with the tables that rows call for.
fn recounted(prior: &Prior, stored: &StoredRows) -> Prior {
    let config = &prior.config;
    let (clusters, shapes) = (prior.clusters.len(), prior.contexts.count.len());
    let sizes = Dimensions::new(config, GAP_CLASSES, 1, shapes);
    let level = sizes.shapes * 2 * sizes.positions;
    let mut counted = Counted {
        cluster: Counts::new(1, Kind::Other, clusters as u32 - 1),
        shape: Counts::new(clusters, Kind::Other, shapes as u32 - 1),
        count: Counts::new(shapes, Kind::Other, config.k as u32 - 1),
        mass: Counts::new(shapes, Kind::Other, MASSES - 1),
        gap: gap_counts(config, &sizes),
        level: Counts::new(level, Kind::Other, prior.levels.len() as u32 / 2),
    };
    for (head, positions, levels) in each_row(stored) {
        counted.head(config, *head);
        let class = usize::from(prior.clusters[usize::from(head.cluster)].gap_class);
        gaps(positions, |previous, left, gap| {
            counted.gap.add(sizes.gap(class, previous, left), gap);
        });
        quantisers(levels, |i, quantiser, number| {
            let shape = usize::from(head.shape);
            counted.level.add(sizes.level(shape, quantiser, positions[i]), number);
        });
    }
    counted.prior(prior)
}

/// Gaps, with the previous position + 1 and how many ids are left.
fn gaps(positions: &[u32], mut each: impl FnMut(u32, u32, u32)) {
    let mut previous = 0;
    for (&position, left) in positions.iter().zip((1..=positions.len() as u32).rev()) {
        each(previous, left, position - previous);
        previous = position + 1;
    }
}

/// The number of each level in its quantiser.
fn quantisers(levels: &[u16], mut each: impl FnMut(usize, usize, u32)) {
    // A quantiser's levels are even or odd.
    for (i, &level) in levels.iter().enumerate() {
        each(i, usize::from(level & 1), u32::from(level >> 1));
    }
}

impl Counted {
    fn head(&mut self, config: &CompactConfig, head: Head) {
        let shape = usize::from(head.shape);
        let count = usize::from(head.count);
        let number = if config.is_adaptive() { count - 1 } else { config.k - count };
        self.cluster.add(0, u32::from(head.cluster));
        self.shape.add(usize::from(head.cluster), u32::from(head.shape));
        self.count.add(shape, number as u32);
        self.mass.add(shape, u32::from(head.mass));
    }

    fn prior(&self, prior: &Prior) -> Prior {
        let mut tables = Vec::new();
        let mut put = |shared: Shared| {
            let first = tables.len() as u16;
            tables.extend(shared.tables);
            shared.map.into_iter().map(|table| table + first).collect::<Vec<u16>>()
        };
        let cluster = put(self.cluster.share(1))[0];
        let classes = self.shape.share(SHAPE_CLASSES);
        let mut clusters = prior.clusters.clone();
        clusters
            .iter_mut()
            .zip(&classes.map)
            .for_each(|(own, &class)| own.shape_class = class as u8);
        let every = (0..classes.tables.len() as u16).collect();
        let shape = put(Shared { tables: classes.tables, map: every });
        let contexts = Contexts {
            cluster,
            shape,
            count: put(self.count.share(OTHER_TABLES)),
            mass: put(self.mass.share(OTHER_TABLES)),
            gap: put(self.gap.share(GAP_TABLES)),
            level: put(self.level.share(LEVEL_TABLES)),
        };
        Prior {
            config: prior.config.clone(),
            order: prior.order.clone(),
            clusters,
            levels: prior.levels.clone(),
            contexts,
            tables,
        }
    }
}

/// Puts clusters into the class whose tables code their gaps in the fewest bits.
fn gap_classes(prior: &mut Prior, stored: &StoredRows) {
    let sizes = prior.dimensions();
    let costs: Vec<_> = prior.tables.iter().map(|table| table.costs(Kind::Gap)).collect();
    let mut bits = vec![[0.0f64; GAP_CLASSES]; prior.clusters.len()];
    for (head, positions, _) in each_row(stored) {
        let bits = &mut bits[usize::from(head.cluster)];
        gaps(positions, |previous, left, gap| {
            let symbol = Kind::Gap.symbol(gap);
            for (class, bits) in bits.iter_mut().enumerate() {
                let table = prior.contexts.gap[sizes.gap(class, previous, left)];
                *bits += f64::from(costs[usize::from(table)][symbol]);
            }
        });
    }
    for (cluster, bits) in prior.clusters.iter_mut().zip(bits) {
        let best = (0..GAP_CLASSES).fold(0, |best, i| if bits[i] < bits[best] { i } else { best });
        cluster.gap_class = best as u8;
    }
}
