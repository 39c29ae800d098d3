//! Which cluster a row is coded in.

use std::array;

use super::{DECIDING, least};
use crate::compact::numbers::{Kind, SYMBOLS, bucket, bucket_start};
use crate::compact::prior::{Cluster, Dimensions, IdCodes};
use crate::simd::lanes::prefetch;

/// If a row has no more ids than this, all of them decide.
const JUDGING: usize = 64;
/// Bits of a unit of what an id costs in a cluster, and in how many parts of it clusters are
/// compared.
const ID_COST: f32 = 0.8;
const COST_UNITS: f32 = 8.0;
/// Costs of a cluster itself are at most this.
const MOST_BASE: u16 = 20_000;

/// What each id costs in each cluster, about.
#[derive(Debug)]
pub(in crate::compact) struct ClusterCosts {
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
    pub(in crate::compact) fn new(
        prior: &IdCodes,
        dimensions: &Dimensions,
        costs: &[[f32; SYMBOLS]],
        ranks: &[u32],
    ) -> Self {
        let clusters = prior.clusters.len();
        let profiles: Vec<Profile> = (0..dimensions.gap_classes)
            .map(|class| Profile::new(prior, dimensions, class))
            .collect();
        let profile = |cluster: &Cluster| &profiles[usize::from(cluster.gap_class)];
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
        let outside = |cluster: &Cluster| profile(cluster).cost(cluster.list.len() as u32 * 2 + 64);
        let outside: Vec<f32> = prior.clusters.iter().map(outside).collect();
        let mut own = Vec::new();
        let mut table = Vec::new();
        for listed in listed {
            own.clone_from(&outside);
            for (number, position) in listed {
                let cluster = &prior.clusters[number as usize];
                own[number as usize] = profile(cluster).cost(position);
            }
            let cheapest = own.iter().copied().fold(f32::INFINITY, f32::min);
            let units = |&cost: &f32| (((cost - cheapest) / ID_COST + 0.5) as u8).min(MOST);
            let units: Vec<u8> = own.iter().map(units).collect();
            table.extend(units.chunks(LINE).map(Nibbles::new));
        }
        let own = &costs[usize::from(prior.cluster)];
        let base = |(number, cluster): (u32, &Cluster)| {
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
    pub(super) fn best(&self, ids: Deciding, next: Option<Deciding>, sums: &mut Vec<u16>) -> usize {
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
    pub(in crate::compact) fn candidates(
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
pub(super) struct Deciding<'a> {
    ranks: &'a [u32],
    count: usize,
    /// From one to the next, as a fraction of 2¹⁶.
    step: usize,
}

impl<'a> Deciding<'a> {
    #[inline(always)]
    pub(super) fn new(ranks: &'a [u32]) -> Self {
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
