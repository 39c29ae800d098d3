//! A prior prepared for decoding.

use super::config::CompactConfig;
use super::numbers::{Kind, bucket};
use super::order::ClusterOrder;
use super::prior::{Dimensions, Prior};
use super::tables::{Entry, SLOTS};
use crate::error::Result;

/// Missing mass is stored as q, which stands for sin²(π q / (2 `MASSES`)).
pub(super) const MASSES: u32 = 384;
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
    pub(super) clusters: Vec<PreparedCluster>,
    pub(super) levels: Vec<f32>,
    /// Probability of each level, in units of 2⁻⁴⁸.
    pub(super) weights: Vec<u64>,
    /// ln(1 − m) of each stored missing mass m, plus the logarithm of the unit of `weights`.
    pub(super) stored_logs: Vec<f64>,
    pub(super) entries: Vec<Entry>,
    /// Contexts, as the place of their table's first entry.
    pub(super) cluster: u32,
    pub(super) shape: Vec<u32>,
    pub(super) count: Vec<u32>,
    pub(super) mass: Vec<u32>,
    pub(super) gap: Vec<u32>,
    pub(super) level: Vec<u32>,
    /// The bucket of every number of ids left.
    pub(super) left_buckets: Vec<u8>,
}

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
            entries.extend(table.entries(kind.unwrap_or(Kind::Other)));
        }
        let place = |table: &u16| u32::from(*table) * SLOTS as u32;
        let places = |tables: &[u16]| tables.iter().map(place).collect::<Vec<u32>>();
        let contexts = &prior.contexts;
        let stored_log = |q: u32| {
            let stored = libm::cos(std::f64::consts::FRAC_PI_2 * f64::from(q) / f64::from(MASSES));
            2.0 * libm::log(stored) + libm::log(ONE)
        };
        Ok(Self {
            config: prior.config.clone(),
            dimensions: prior.dimensions(),
            order: prior.order.clone(),
            clusters: prior.clusters.iter().map(prepare).collect(),
            weights: prior.levels.iter().map(|&level| weight(level)).collect(),
            levels: prior.levels.clone(),
            stored_logs: (0..MASSES).map(stored_log).collect(),
            entries,
            cluster: place(&contexts.cluster),
            shape: places(&contexts.shape),
            count: places(&contexts.count),
            mass: places(&contexts.mass),
            gap: places(&contexts.gap),
            level: places(&contexts.level),
            left_buckets: (0..=prior.config.k as u32).map(|left| bucket(left) as u8).collect(),
        })
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

fn weight(level: f32) -> u64 {
    ((libm::exp(f64::from(level)) * ONE).round() as u64).max(1)
}
