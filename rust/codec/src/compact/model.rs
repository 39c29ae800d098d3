//! A prior prepared for decoding.

use std::sync::OnceLock;

use super::config::CompactConfig;
use super::numbers::{Kind, bucket};
use super::order::{ClusterOrder, FirstIds};
use super::prior::{Dimensions, Prior};
use super::tables::SLOTS;
use crate::error::Result;

/// Missing mass is stored as q, which stands for sin²(π q / (2 `MASSES`)).
pub(super) const MASSES: u32 = 384;
/// Bits of the low half of a probability.
pub(super) const WEIGHT_HALF: u32 = 24;
/// Probability 1 in the fixed-point sums of decoding.
const ONE: f64 = (1u64 << 48) as f64;

/// States of the values' quantiser, two of which use each quantiser.
pub(super) const STATES: usize = 4;
/// The state after a number, by its parity.
pub(super) const NEXT: [[u8; 2]; STATES] = [[0, 2], [2, 0], [1, 3], [3, 1]];

/// What a document is read with.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) config: CompactConfig,
    pub(super) dimensions: Dimensions,
    /// The id of each rank by frequency.
    pub(super) order: Vec<u32>,
    /// Made when ids are first decoded.
    first: OnceLock<FirstIds>,
    pub(super) clusters: Vec<PreparedCluster>,
    pub(super) levels: Vec<f32>,
    /// The bits of each of `levels`.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only `wide` reads it"))]
    pub(super) level_bits: Vec<u32>,
    /// Probability of each level, in units of 2⁻⁴⁸.
    pub(super) weights: Vec<u64>,
    /// Its low 24 bits, and those above.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only `wide` reads it"))]
    pub(super) weight_halves: [Vec<u32>; 2],
    /// ln(1 − m) of each stored missing mass m, plus the logarithm of the unit of `weights`.
    pub(super) stored_logs: Vec<f64>,
    pub(super) entries: Vec<u32>,
    /// Contexts, as the place of their table's first entry.
    pub(super) cluster: u32,
    pub(super) shape: Vec<u32>,
    pub(super) count: Vec<u32>,
    pub(super) mass: Vec<u32>,
    /// By bucket of the ids left, class, bucket of the previous position + 1: what rows that are
    /// read side by side need is near.
    pub(super) gap: Vec<u32>,
    /// By shape, bucket of the position + 1: the tables of both quantisers, the first in the low half.
    pub(super) level: Vec<u32>,
    /// For every number of ids left, where `gap` has its bucket.
    pub(super) lefts: Vec<u32>,
}

/// Room for the buckets of all numbers below 2³²: no position is beyond the maps, whatever a
/// damaged document says.
pub(super) const BUCKETS: usize = 64;

/// A cluster prepared for decoding.
#[derive(Debug)]
pub(super) struct PreparedCluster {
    pub(super) order: ClusterOrder,
    pub(super) gap_class: usize,
    pub(super) shape_class: usize,
}

impl Model {
    /// Prepares a valid prior.
    pub(super) fn new(prior: &Prior) -> Result<Self> {
        let ranks = prior.ranks();
        let prepare = |cluster: &super::prior::Cluster| PreparedCluster {
            order: ClusterOrder::new(&cluster.list, &ranks),
            gap_class: usize::from(cluster.gap_class),
            shape_class: usize::from(cluster.shape_class),
        };
        let kinds = prior.kinds()?;
        let mut entries = Vec::with_capacity(prior.tables.len() * SLOTS);
        for (table, kind) in prior.tables.iter().zip(kinds) {
            entries.extend(table.entries(kind.unwrap_or(Kind::Other)).map(|e| e.0));
        }
        let places = |tables: &[u16]| tables.iter().copied().map(place).collect::<Vec<u32>>();
        let contexts = &prior.contexts;
        let stored_log = |q: u32| {
            let stored = libm::cos(std::f64::consts::FRAC_PI_2 * f64::from(q) / f64::from(MASSES));
            2.0 * libm::log(stored) + libm::log(ONE)
        };
        let clusters: Vec<_> = prior.clusters.iter().map(prepare).collect();
        let weights: Vec<u64> = prior.levels.iter().map(|&level| weight(level)).collect();
        let low = weights.iter().map(|&weight| weight as u32 % (1 << WEIGHT_HALF)).collect();
        let high = weights.iter().map(|weight| (weight >> WEIGHT_HALF) as u32).collect();
        Ok(Self {
            first: OnceLock::new(),
            config: prior.config.clone(),
            dimensions: prior.dimensions(),
            order: prior.order.clone(),
            clusters,
            weight_halves: [low, high],
            weights,
            level_bits: prior.levels.iter().map(|level| level.to_bits()).collect(),
            levels: prior.levels.clone(),
            stored_logs: (0..MASSES).map(stored_log).collect(),
            entries,
            cluster: place(contexts.cluster),
            shape: places(&contexts.shape),
            count: places(&contexts.count),
            mass: places(&contexts.mass),
            gap: gaps(prior),
            level: levels(prior),
            lefts: (0..=prior.config.k as u32)
                .map(|left| (bucket(left) * prior.dimensions().gap_classes * BUCKETS) as u32)
                .collect(),
        })
    }

    /// The ids of the first positions.
    pub(super) fn first(&self) -> &FirstIds {
        let orders = || self.clusters.iter().map(|cluster| &cluster.order);
        self.first.get_or_init(|| FirstIds::new(orders(), &self.order))
    }

    /// The ids at ascending positions of a cluster.
    #[inline(always)]
    pub(super) fn ids(&self, first: &FirstIds, cluster: usize, positions: &[u32], ids: &mut [u32]) {
        let near = first.look_up(cluster, positions, ids);
        for (id, &position) in ids[near..].iter_mut().zip(&positions[near..]) {
            *id = self.far_id(cluster, position);
        }
    }

    /// The id at a position that is not in the table.
    #[inline(always)]
    pub(super) fn far_id(&self, cluster: usize, position: u32) -> u32 {
        self.clusters[cluster].order.outside(position, &self.order)
    }

    /// Where [`Model::gap`] has the contexts of a cluster: to be added to one of `lefts` and the
    /// bucket of the previous position + 1.
    #[inline(always)]
    pub(super) fn gap_place(&self, cluster: u16) -> u32 {
        (self.clusters[usize::from(cluster)].gap_class * BUCKETS) as u32
    }

    /// The contexts of a shape's levels: at the bucket of the position + 1, for [`level_place`].
    #[inline(always)]
    pub(super) fn level(&self, shape: usize) -> &[u32; BUCKETS] {
        &self.level.as_chunks().0[shape]
    }

    /// What is added to the levels of a row so that it sums to 1 − m.
    #[inline(always)]
    pub(super) fn shift(&self, mass: usize, total: u64) -> f32 {
        (self.stored_logs[mass] - libm::log(total as f64)) as f32
    }

    /// The count that a number stands for, if there is one.
    pub(super) fn count(&self, number: u32) -> Option<usize> {
        let k = self.config.k;
        let number = number as usize;
        if self.config.is_adaptive() {
            (number < k).then_some(number + 1)
        } else {
            (number < k).then(|| k - number)
        }
    }

    /// The number that stands for a count.
    pub(super) fn count_number(&self, count: usize) -> u32 {
        let k = self.config.k;
        (if self.config.is_adaptive() { count - 1 } else { k - count }) as u32
    }
}

/// The place of a quantiser's table, of the two of a context.
#[inline(always)]
pub(super) fn level_place(tables: u32, quantiser: u32) -> u32 {
    place((tables >> (16 * quantiser)) as u16)
}

/// The place of a table's first entry.
#[inline(always)]
fn place(table: u16) -> u32 {
    u32::from(table) * SLOTS as u32
}

fn gaps(prior: &Prior) -> Vec<u32> {
    let dimensions = prior.dimensions();
    let mut places = vec![0; dimensions.left * dimensions.gap_classes * BUCKETS];
    let contexts = prior.contexts.gap.chunks(dimensions.left).enumerate();
    for (row, tables) in contexts {
        let (class, bucket) = (row / dimensions.positions, row % dimensions.positions);
        for (left, &table) in tables.iter().enumerate() {
            places[(left * dimensions.gap_classes + class) * BUCKETS + bucket] = place(table);
        }
    }
    places
}

fn levels(prior: &Prior) -> Vec<u32> {
    let dimensions = prior.dimensions();
    let mut both = vec![0; dimensions.shapes * BUCKETS];
    let contexts = prior.contexts.level.chunks(dimensions.positions).enumerate();
    for (row, tables) in contexts {
        let (shape, quantiser) = (row / 2, row % 2);
        for (bucket, &table) in tables.iter().enumerate() {
            both[shape * BUCKETS + bucket] |= u32::from(table) << (16 * quantiser);
        }
    }
    both
}

fn weight(level: f32) -> u64 {
    ((libm::exp(f64::from(level)) * ONE).round() as u64).max(1)
}
