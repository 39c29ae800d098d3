//! Rows of draws, and what codes them: a cluster, how many ids, gaps between their positions, and
//! how often each was drawn.

use super::config::SampledConfig;
use super::prior::{Excess, SampledPrior};
use crate::compact::decode::Stream;
use crate::compact::document::corrupt;
use crate::compact::encode::ClusterCosts;
use crate::compact::numbers::{Kind, SYMBOLS, bucket};
use crate::compact::order::ClusterOrder;
use crate::compact::prior::Dimensions;
use crate::compact::tables::SLOTS;
use crate::compact::write::Step;
use crate::error::{CodecError, Result};

/// A row as it is stored: positions ascending, and how often each was drawn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::compact) struct Draws {
    pub(in crate::compact) cluster: usize,
    pub(in crate::compact) positions: Vec<u32>,
    pub(in crate::compact) counts: Vec<u32>,
}

/// The log-probability that stands for a count of draws: that of its share.
#[must_use]
pub fn log_share(count: u32, draws: u32) -> f32 {
    libm::log(f64::from(count) / f64::from(draws)) as f32
}

/// Calls `each` with the context and the number of every count that is written.
#[inline(always)]
pub(in crate::compact) fn excesses(
    excess: Excess,
    draws: u32,
    row: &Draws,
    mut each: impl FnMut(usize, u32),
) {
    let ids = row.positions.len() as u32;
    let mut beyond = draws - ids;
    for ((&position, &count), left) in row.positions.iter().zip(&row.counts).zip((1..=ids).rev()) {
        // The last one has what is left.
        if beyond == 0 || left == 1 {
            break;
        }
        each(excess.context(beyond, left, position), count - 1);
        beyond -= count - 1;
    }
}

/// A cluster, prepared.
#[derive(Debug)]
struct PreparedCluster {
    order: ClusterOrder,
    gap_class: usize,
    shape_class: usize,
}

/// What documents are read with.
#[derive(Debug)]
pub(in crate::compact) struct Model {
    draws: u32,
    vocab: u32,
    k: usize,
    sizes: Dimensions,
    excess: Excess,
    order: Vec<u32>,
    clusters: Vec<PreparedCluster>,
    entries: Vec<u32>,
    /// Contexts, as the place of their table's first entry.
    cluster: u32,
    count: Vec<u32>,
    gap: Vec<u32>,
    excesses: Vec<u32>,
    /// The log-probability of each count.
    logs: Vec<f32>,
}

impl Model {
    /// Prepares a valid prior.
    pub(in crate::compact) fn new(prior: &SampledPrior) -> Result<Self> {
        let ranks = prior.ids().ranks();
        let prepared = prior.clusters.iter().map(|cluster| PreparedCluster {
            order: ClusterOrder::new(&cluster.list, &ranks),
            gap_class: usize::from(cluster.gap_class),
            shape_class: usize::from(cluster.shape_class),
        });
        let mut entries = Vec::with_capacity(prior.tables.len() * SLOTS);
        for (table, kind) in prior.tables.iter().zip(prior.kinds()?) {
            entries.extend(table.entries(kind.unwrap_or(Kind::Other)).map(|e| e.0));
        }
        let place = |table: &u16| u32::from(*table) * SLOTS as u32;
        let places = |tables: &[u16]| tables.iter().map(place).collect::<Vec<u32>>();
        let draws = prior.config.draws;
        Ok(Self {
            draws,
            vocab: prior.config.vocab_size,
            k: prior.config.k(),
            sizes: prior.dimensions(),
            excess: Excess::new(&prior.config),
            order: prior.order.clone(),
            clusters: prepared.collect(),
            entries,
            cluster: place(&prior.contexts.cluster),
            count: places(&prior.contexts.count),
            gap: places(&prior.contexts.gap),
            excesses: places(&prior.contexts.excess),
            logs: (0..=draws).map(|count| log_share(count, draws)).collect(),
        })
    }

    /// The place of an id, by its rank, in a cluster.
    pub(in crate::compact) fn position(&self, cluster: usize, rank: u32) -> u32 {
        self.clusters[cluster].order.position(rank)
    }

    /// Reads the next row of a document with zeros after it. Returns the bits of its head, its ids and its counts.
    #[inline(always)]
    pub(super) fn read(
        &self,
        stream: &mut Stream,
        data: &[u8],
        row: &mut Draws,
    ) -> Result<[u32; 3]> {
        let start = stream.bit;
        let cluster = stream.number(data, &self.entries, self.cluster) as usize;
        let Some(prepared) = self.clusters.get(cluster) else {
            return corrupt(format!("cluster {cluster} of {}", self.clusters.len()));
        };
        let ids = stream.number(data, &self.entries, self.count[prepared.shape_class]) + 1;
        if ids as usize > self.k {
            return corrupt(format!("{ids} ids, expected at most {}", self.k));
        }
        let middle = stream.bit;
        row.cluster = cluster;
        row.positions.clear();
        let contexts = &self.gap[self.sizes.gap(prepared.gap_class, 0, 0)..];
        let mut previous = 0;
        for left in (1..=ids).rev() {
            let context = bucket(previous) * self.sizes.left + bucket(left);
            let position = previous + stream.number(data, &self.entries, contexts[context]);
            if position >= self.vocab {
                return corrupt("an id beyond the vocabulary");
            }
            row.positions.push(position);
            previous = position + 1;
        }
        let end = stream.bit;
        self.read_counts(stream, data, row)?;
        Ok([(middle - start) as u32, (end - middle) as u32, (stream.bit - end) as u32])
    }

    #[inline(always)]
    fn read_counts(&self, stream: &mut Stream, data: &[u8], row: &mut Draws) -> Result<()> {
        let ids = row.positions.len() as u32;
        let mut beyond = self.draws - ids;
        row.counts.clear();
        for (&position, left) in row.positions.iter().zip((1..=ids).rev()) {
            let more = if beyond == 0 || left == 1 {
                beyond
            } else {
                let context = self.excess.context(beyond, left, position);
                stream.number(data, &self.entries, self.excesses[context])
            };
            if more > beyond {
                return corrupt(format!("more than {} draws", self.draws));
            }
            row.counts.push(1 + more);
            beyond -= more;
        }
        Ok(())
    }

    /// Ids and log-probabilities of a row: by falling count, ids of a count ascending; then the
    /// first id with −∞.
    #[inline(always)]
    pub(super) fn ranked(
        &self,
        row: &Draws,
        keys: &mut Vec<u64>,
        ids: &mut [i64],
        logprobs: &mut [f32],
    ) {
        let order = &self.clusters[row.cluster].order;
        keys.clear();
        keys.extend(row.positions.iter().zip(&row.counts).map(|(&position, &count)| {
            u64::from(self.draws - count) << 32 | u64::from(order.id(position, &self.order))
        }));
        keys.sort_unstable();
        for ((&key, id), logprob) in keys.iter().zip(&mut *ids).zip(&mut *logprobs) {
            *id = i64::from(key as u32);
            *logprob = self.logs[self.draws as usize - (key >> 32) as usize];
        }
        let first = ids[0];
        ids[keys.len()..].fill(first);
        logprobs[keys.len()..].fill(f32::NEG_INFINITY);
    }
}

/// Chooses the cluster of rows.
#[derive(Debug)]
pub(in crate::compact) struct Encoder {
    config: SampledConfig,
    ranks: Vec<u32>,
    clusters: ClusterCosts,
    costs: Costs,
}

/// What numbers cost exactly, in bits.
#[derive(Debug)]
struct Costs {
    tables: Vec<[f32; SYMBOLS]>,
    cluster: u16,
    count: Vec<u16>,
    gap: Vec<u16>,
}

/// Buffers for one row after the other.
#[derive(Debug, Default)]
pub(in crate::compact) struct EncodeScratch {
    ids: Vec<(u32, u32)>,
    ranks: Vec<u32>,
    sums: Vec<u16>,
    keys: Vec<u64>,
    positions: Vec<u32>,
    best: Vec<u16>,
    row: Draws,
}

/// Clusters whose exact costs are compared.
const COMPARED: usize = 8;

impl Encoder {
    pub(in crate::compact) fn new(prior: &SampledPrior) -> Result<Self> {
        let kinds = prior.kinds()?;
        let tables: Vec<[f32; SYMBOLS]> = prior
            .tables
            .iter()
            .zip(kinds)
            .map(|(table, kind)| table.costs(kind.unwrap_or(Kind::Other)))
            .collect();
        let ids = prior.ids();
        let ranks = ids.ranks();
        Ok(Self {
            config: prior.config.clone(),
            clusters: ClusterCosts::new(&ids, &prior.dimensions(), &tables, &ranks),
            ranks,
            costs: Costs {
                tables,
                cluster: prior.contexts.cluster,
                count: prior.contexts.count.clone(),
                gap: prior.contexts.gap.clone(),
            },
        })
    }

    /// What is stored of a row.
    #[inline(always)]
    pub(in crate::compact) fn row<'a>(
        &self,
        model: &Model,
        ids: &[i64],
        logprobs: &[f32],
        scratch: &'a mut EncodeScratch,
    ) -> Result<&'a Draws> {
        counted(&self.config, ids, logprobs, &mut scratch.ids)?;
        let EncodeScratch { ids, ranks, sums, keys, positions, best, row } = scratch;
        ranks.clear();
        ranks.extend(ids.iter().map(|&(id, _)| self.ranks[id as usize]));
        self.clusters.candidates(ranks, sums, COMPARED, best);
        let mut least = f32::INFINITY;
        for &cluster in best.iter() {
            let cluster = usize::from(cluster);
            keys.clear();
            keys.extend(ranks.iter().zip(&*ids).map(|(&rank, &(_, count))| {
                u64::from(model.position(cluster, rank)) << 32 | u64::from(count)
            }));
            keys.sort_unstable();
            positions.clear();
            positions.extend(keys.iter().map(|key| (key >> 32) as u32));
            let bits = self.costs.of(model, cluster, positions);
            if bits < least {
                least = bits;
                row.cluster = cluster;
                std::mem::swap(&mut row.positions, positions);
                row.counts.clear();
                row.counts.extend(keys.iter().map(|key| *key as u32));
            }
        }
        if let Some(twice) = row.positions.windows(2).position(|pair| pair[0] == pair[1]) {
            let id = model.clusters[row.cluster].order.id(row.positions[twice], &model.order);
            return Err(CodecError::Input(format!("id {id} occurs twice")));
        }
        Ok(row)
    }
}

impl Costs {
    /// Bits of a row's head and ids.
    #[inline(always)]
    fn of(&self, model: &Model, cluster: usize, positions: &[u32]) -> f32 {
        let PreparedCluster { gap_class, shape_class, .. } = model.clusters[cluster];
        let bits = |table: u16, symbol: usize| self.tables[usize::from(table)][symbol];
        let count = positions.len() as u32 - 1;
        let mut total = bits(self.cluster, Kind::Other.symbol(cluster as u32))
            + bits(self.count[shape_class], Kind::Other.symbol(count));
        let mut previous = 0;
        for (&position, left) in positions.iter().zip((1..=positions.len() as u32).rev()) {
            let table = self.gap[model.sizes.gap(gap_class, previous, left)];
            // Ids that are there twice are refused later.
            total += bits(table, Kind::Gap.symbol(position.saturating_sub(previous)));
            previous = position + 1;
        }
        total
    }
}

/// The ids of a row that were drawn, and how often: log-probabilities are those of shares of the
/// draws, −∞ for places without an id.
pub(in crate::compact) fn counted(
    config: &SampledConfig,
    ids: &[i64],
    logprobs: &[f32],
    out: &mut Vec<(u32, u32)>,
) -> Result<()> {
    let draws = f64::from(config.draws);
    out.clear();
    let mut total = 0;
    for (&id, &logprob) in ids.iter().zip(logprobs) {
        if logprob == f32::NEG_INFINITY {
            continue;
        }
        let share = libm::exp(f64::from(logprob)) * draws;
        let count = libm::round(share);
        // The logarithm is a float32.
        if !(count >= 1.0 && count <= draws && libm::fabs(share - count) < 0.01) {
            return Err(CodecError::Input(format!(
                "found log-probability {logprob}, expected that of a number of {draws} draws"
            )));
        }
        let known = u32::try_from(id).ok().filter(|&id| id < config.vocab_size);
        let Some(id) = known else {
            let vocab = config.vocab_size;
            return Err(CodecError::Input(format!("id {id} of a vocabulary of {vocab}")));
        };
        total += count as u32;
        out.push((id, count as u32));
        if total > config.draws {
            break;
        }
    }
    if total != config.draws {
        return Err(CodecError::Input(format!("found {total} draws, expected {draws}")));
    }
    Ok(())
}

/// What a row is written with.
pub(super) fn steps(prior: &SampledPrior, row: &Draws, out: &mut Vec<Step>) {
    let (cluster, contexts) = (&prior.clusters[row.cluster], &prior.contexts);
    let (gap, shape) = (usize::from(cluster.gap_class), usize::from(cluster.shape_class));
    let sizes = prior.dimensions();
    let start = |table: u16| u32::from(table) * SLOTS as u32;
    let other = |table: u16, number| Step { table: start(table), number, kind: Kind::Other };
    let count = row.positions.len() as u32;
    out.push(other(contexts.cluster, row.cluster as u32));
    out.push(other(contexts.count[shape], count - 1));
    let mut previous = 0;
    for (&position, left) in row.positions.iter().zip((1..=count).rev()) {
        let table = start(contexts.gap[sizes.gap(gap, previous, left)]);
        out.push(Step { table, number: position - previous, kind: Kind::Gap });
        previous = position + 1;
    }
    let excess = Excess::new(&prior.config);
    excesses(excess, prior.config.draws, row, |context, number| {
        out.push(other(contexts.excess[context], number));
    });
}
