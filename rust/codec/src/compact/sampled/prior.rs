//! What is learned from rows of draws: the order of ids, clusters of them, and code tables.

use super::config::SampledConfig;
use crate::compact::builtin::{gap_context, gap_table, table, uniform};
use crate::compact::numbers::{Kind, SYMBOLS, bucket, bucket_start};
use crate::compact::prior::{
    Cluster, Dimensions, IdCodes, Input, MAX_CLASSES, Prior, check_tables, corrupt, put, put_maps,
    put_tables, table_kinds,
};
use crate::compact::tables::{SLOTS, Table};
use crate::error::Result;

/// The first bytes of a prior.
const MAGIC: &[u8; 8] = b"DKDRAWS1";
/// Buckets of positions that counts are told apart by.
const POSITIONS: usize = 16;

/// Which of [`SampledPrior::tables`] codes what.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SampledContexts {
    /// The table of clusters.
    pub cluster: u16,
    /// By `shape_class`: how many ids a row has, less 1.
    pub count: Vec<u16>,
    /// By `gap_class`, bucket of the previous position + 1, bucket of the ids left.
    pub gap: Vec<u16>,
    /// By [`Excess::context`]: how often an id was drawn, less 1.
    pub excess: Vec<u16>,
}

/// Everything that the bytes of a document of draws are read with.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledPrior {
    /// The configuration that it is for: its vocabulary and number of draws.
    pub config: SampledConfig,
    /// All ids, the most frequent first; within a bucket of positions ascending.
    pub order: Vec<u32>,
    /// At least one.
    pub clusters: Vec<Cluster>,
    /// Which table codes what.
    pub contexts: SampledContexts,
    /// The code tables.
    pub tables: Vec<Table>,
}

/// Contexts of counts: by the draws beyond one for each id that are left, the ids that are left,
/// and the position.
#[derive(Debug, Clone, Copy)]
pub(in crate::compact) struct Excess {
    draws: usize,
    left: usize,
}

impl Excess {
    pub(in crate::compact) fn new(config: &SampledConfig) -> Self {
        Self { draws: bucket(config.draws) + 1, left: bucket(config.k() as u32) + 1 }
    }

    pub(in crate::compact) const fn contexts(self) -> usize {
        self.draws * self.left * POSITIONS
    }

    #[inline(always)]
    pub(in crate::compact) fn context(self, excess: u32, left: u32, position: u32) -> usize {
        let position = bucket(position + 1).min(POSITIONS - 1);
        (bucket(excess) * self.left + bucket(left)) * POSITIONS + position
    }
}

impl SampledPrior {
    /// The built-in prior of a configuration: ids by number, tables by formulas.
    pub(in crate::compact) fn builtin(config: &SampledConfig) -> Self {
        let config = config.for_prior();
        let (k, vocab) = (config.k(), config.vocab_size);
        let sizes = Dimensions::of_ids(vocab, k, 1);
        let excess = Excess::new(&config);
        let mut tables = vec![uniform(1), uniform(k as u32)];
        let gap_tables = tables.len() as u16;
        tables.extend((0..=48).map(gap_table));
        let mut gap = Vec::new();
        for previous in 0..sizes.positions {
            for left in 0..sizes.left {
                gap.push(gap_tables + gap_context(previous, left, vocab));
            }
        }
        let excess_tables = tables.len() as u16;
        tables.extend((0..=EXCESS_TABLES).map(excess_table));
        let mut excesses = Vec::new();
        for draws in 0..excess.draws {
            for left in 0..excess.left {
                let context = excess_tables + excess_context(draws, left);
                excesses.extend([context; POSITIONS]);
            }
        }
        Self {
            order: (0..vocab).collect(),
            clusters: vec![Cluster::default()],
            contexts: SampledContexts { cluster: 0, count: vec![1], gap, excess: excesses },
            tables,
            config,
        }
    }

    /// The sizes of the maps, from the maps.
    pub(in crate::compact) fn dimensions(&self) -> Dimensions {
        let mut sizes = Dimensions::of_ids(self.config.vocab_size, self.config.k(), 1);
        sizes.gap_classes = self.contexts.gap.len() / (sizes.positions * sizes.left);
        sizes.shape_classes = self.contexts.count.len();
        sizes
    }

    /// What codes ids.
    pub(in crate::compact) fn ids(&self) -> IdCodes<'_> {
        IdCodes {
            vocab_size: self.config.vocab_size,
            expected: self.expected_ids(),
            order: &self.order,
            clusters: &self.clusters,
            cluster: self.contexts.cluster,
            gap: &self.contexts.gap,
            tables: &self.tables,
        }
    }

    /// How many ids rows have on average, by what their tables say.
    fn expected_ids(&self) -> f64 {
        let mean = |&table: &u16| {
            let Table(slots) = &self.tables[usize::from(table)];
            let middle = |symbol| {
                f64::from(Kind::Other.base(symbol))
                    + f64::from((1u32 << Kind::Other.extra_bits(symbol)) - 1) / 2.0
            };
            let sum: f64 =
                (0..SYMBOLS - 1).map(|symbol| f64::from(slots[symbol]) * middle(symbol)).sum();
            1.0 + sum / SLOTS as f64
        };
        let means = self.contexts.count.iter().map(mean);
        (means.sum::<f64>() / self.contexts.count.len() as f64).clamp(1.0, self.config.k() as f64)
    }

    /// Checks everything that decoding relies on.
    ///
    /// Fails with [`crate::CodecError::Corrupt`].
    pub fn validate(&self) -> Result<()> {
        self.config.validate()?;
        let sizes = self.dimensions();
        let fits = (1..=MAX_CLASSES).contains(&sizes.gap_classes)
            && (1..=MAX_CLASSES).contains(&sizes.shape_classes)
            && self.contexts.gap.len() == sizes.gap_classes * sizes.positions * sizes.left
            && self.contexts.excess.len() == Excess::new(&self.config).contexts();
        if !fits {
            return corrupt("the sizes of its maps do not agree, or are beyond the limits");
        }
        if self.tables.is_empty() {
            return corrupt("has no tables");
        }
        let kinds = self.kinds()?;
        self.ids().check()?;
        for (number, cluster) in self.clusters.iter().enumerate() {
            if usize::from(cluster.gap_class) >= sizes.gap_classes
                || usize::from(cluster.shape_class) >= sizes.shape_classes
            {
                return corrupt(format!("cluster {number} is of a class without tables"));
            }
        }
        check_tables(&self.tables, &kinds)
    }

    /// What each table codes; none for a table that is not used.
    pub(in crate::compact) fn kinds(&self) -> Result<Vec<Option<Kind>>> {
        let SampledContexts { cluster, count, gap, excess } = &self.contexts;
        table_kinds(&self.tables, count.iter().chain(excess).chain([cluster]), gap)
    }

    /// The prior as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        let config = serde_json::to_vec(&self.config.for_prior()).unwrap_or_default();
        put(&mut out, 4, config.len());
        out.extend_from_slice(&config);
        self.ids().put(&mut out);
        let SampledContexts { cluster, count, gap, excess } = &self.contexts;
        put_maps(&mut out, &[&[*cluster], count, gap, excess]);
        put_tables(&mut out, &self.tables);
        out
    }

    /// Reads and validates a prior.
    ///
    /// Fails with [`crate::CodecError::Corrupt`] or [`crate::CodecError::Truncated`].
    pub fn from_bytes(data: &[u8]) -> Result<Self> {
        let mut input = Input::new(data);
        let config = input.config(MAGIC, SampledConfig::from_json)?;
        if config != config.for_prior() {
            return corrupt("its configuration has more than a vocabulary and a number of draws");
        }
        let (order, clusters) = input.ids(config.vocab_size)?;
        let contexts = SampledContexts {
            cluster: input.single("clusters")?,
            count: input.map("tables of counts")?,
            gap: input.map("tables of gaps")?,
            excess: input.map("tables of draws")?,
        };
        let tables = input.tables()?;
        input.end()?;
        let prior = Self { config, order, clusters, contexts, tables };
        prior.validate()?;
        Ok(prior)
    }

    /// Order, clusters and codes of gaps of another prior, of either format: what is shared between
    /// configurations.
    pub(in crate::compact) fn of_any(data: &[u8]) -> Result<(u32, usize, Shared)> {
        if data.starts_with(MAGIC) {
            let Self { config, order, clusters, contexts, tables } = Self::from_bytes(data)?;
            let shared = Shared { order, clusters, gap: contexts.gap, tables };
            return Ok((config.vocab_size, config.k(), shared));
        }
        let Prior { config, order, clusters, contexts, tables, .. } = Prior::from_bytes(data)?;
        Ok((config.vocab_size, config.k, Shared { order, clusters, gap: contexts.gap, tables }))
    }
}

/// What priors of different configurations may share.
pub(in crate::compact) struct Shared {
    pub(in crate::compact) order: Vec<u32>,
    pub(in crate::compact) clusters: Vec<Cluster>,
    pub(in crate::compact) gap: Vec<u16>,
    pub(in crate::compact) tables: Vec<Table>,
}

/// Tables of counts have means of 2^(number / 2 − 3).
const EXCESS_TABLES: i32 = 30;

/// How often an id is drawn beyond once: a heavy tail around a mean.
fn excess_table(half: i32) -> Table {
    let mean = libm::exp2(f64::from(half) / 2.0 - 3.0);
    table(Kind::Other, |number| {
        let far = 1.0 + f64::from(number) / mean;
        1.0 / far
    })
}

/// Which of the tables of counts fits, with so many draws and ids left (as buckets).
fn excess_context(draws: usize, left: usize) -> u16 {
    let mean = f64::from(bucket_start(draws)) / f64::from(bucket_start(left).max(1));
    let half = 2.0 * (libm::log2(mean.max(0.01)) + 3.0);
    half.round().clamp(0.0, f64::from(EXCESS_TABLES)) as u16
}
