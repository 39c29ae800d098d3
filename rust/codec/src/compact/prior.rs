//! What is learned from a sample of a teacher: the order of ids, clusters of them, and code tables.

use super::config::{
    CompactConfig, MAX_CLUSTERS, MAX_COSTS, MAX_LEVELS, MAX_LIST, MAX_LISTED, MAX_SHAPES,
    MAX_TABLES,
};
use super::lists::{is_arranged, pack, unpack};
use super::numbers::{Kind, SYMBOLS, bucket};
use super::scale::Scale;
use super::tables::Table;
use crate::error::{CodecError, Result};

/// The first bytes of a prior.
const MAGIC: &[u8; 8] = b"DKPRIOR1";
/// Classes of clusters share tables.
pub const MAX_CLASSES: usize = 32;

/// Ids that tend to occur together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cluster {
    /// Its likeliest ids, likeliest first; within a bucket of positions in the order of
    /// [`Prior::order`]. All others follow in that order.
    pub list: Vec<u32>,
    /// Which tables its gaps are coded with.
    pub gap_class: u8,
    /// Which table its rows' shapes are coded with.
    pub shape_class: u8,
}

/// Which of [`Prior::tables`] codes what. Every map is complete: see [`Contexts::of`] for sizes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contexts {
    /// The table of clusters ([`Kind::Other`], as all but gaps).
    pub cluster: u16,
    /// By `shape_class`.
    pub shape: Vec<u16>,
    /// By shape. The count is written as k − count in a configuration with a fixed k, as count − 1
    /// in others.
    pub count: Vec<u16>,
    /// By shape.
    pub mass: Vec<u16>,
    /// By `gap_class`, [`bucket`] of the previous position + 1 (0 before the first), [`bucket`] of
    /// the ids left ([`Kind::Gap`]).
    pub gap: Vec<u16>,
    /// By shape, quantiser (0 or 1), [`bucket`] of the position + 1.
    pub level: Vec<u16>,
}

/// Everything that the bytes of a document are read with. One prior is for one configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Prior {
    /// The configuration that it is for, its `prior` empty.
    pub config: CompactConfig,
    /// All ids, the most frequent first; within a bucket of positions ascending.
    pub order: Vec<u32>,
    /// At least one.
    pub clusters: Vec<Cluster>,
    /// Value of each level of the [`Scale`] as a log-probability, ascending, at most 0.
    pub levels: Vec<f32>,
    /// Which table codes what.
    pub contexts: Contexts,
    /// The code tables.
    pub tables: Vec<Table>,
}

/// Sizes of the maps of [`Contexts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dimensions {
    /// Classes of clusters by gaps.
    pub gap_classes: usize,
    /// Classes of clusters by shapes.
    pub shape_classes: usize,
    /// Number of shapes.
    pub shapes: usize,
    /// Buckets of positions + 1.
    pub positions: usize,
    /// Buckets of ids left.
    pub left: usize,
}

impl Dimensions {
    /// The sizes for a configuration.
    #[must_use]
    pub fn new(
        config: &CompactConfig,
        gap_classes: usize,
        shape_classes: usize,
        shapes: usize,
    ) -> Self {
        let ids = Self::of_ids(config.vocab_size, config.k, gap_classes);
        Self { shape_classes, shapes, ..ids }
    }

    /// The sizes of the maps of gaps, where rows have up to k ids.
    pub(super) fn of_ids(vocab_size: u32, k: usize, gap_classes: usize) -> Self {
        Self {
            gap_classes,
            shape_classes: 0,
            shapes: 0,
            positions: bucket(vocab_size) + 1,
            left: bucket(k as u32) + 1,
        }
    }

    /// Where [`Contexts::gap`] has a context; `previous` is the previous position + 1.
    #[must_use]
    #[inline(always)]
    pub fn gap(&self, class: usize, previous: u32, left: u32) -> usize {
        (class * self.positions + bucket(previous)) * self.left + bucket(left)
    }

    /// Where [`Contexts::level`] has a context.
    #[must_use]
    #[inline(always)]
    pub fn level(&self, shape: usize, quantiser: usize, position: u32) -> usize {
        (shape * 2 + quantiser) * self.positions + bucket(position + 1)
    }
}

pub(super) fn corrupt<T>(message: impl Into<String>) -> Result<T> {
    Err(CodecError::Corrupt(format!("prior: {}", message.into())))
}

/// What every prior codes the ids of a row with: a cluster, and gaps between its positions.
#[derive(Debug, Clone, Copy)]
pub(super) struct IdCodes<'a> {
    pub(super) vocab_size: u32,
    /// About how many ids rows have.
    pub(super) expected: f64,
    pub(super) order: &'a [u32],
    pub(super) clusters: &'a [Cluster],
    /// The table of clusters.
    pub(super) cluster: u16,
    /// Tables of gaps, as [`Contexts::gap`] has them.
    pub(super) gap: &'a [u16],
    pub(super) tables: &'a [Table],
}

impl IdCodes<'_> {
    /// The place of each id in the order.
    pub(super) fn ranks(&self) -> Vec<u32> {
        let mut ranks = vec![0; self.order.len()];
        self.order.iter().zip(0..).for_each(|(&id, rank)| ranks[id as usize] = rank);
        ranks
    }

    /// Checks the order and the clusters' lists.
    pub(super) fn check(&self) -> Result<()> {
        let vocab = self.vocab_size as usize;
        if self.order.len() != vocab {
            return corrupt(format!("{} ids in order, expected {vocab}", self.order.len()));
        }
        let mut seen = vec![u32::MAX; vocab];
        check_distinct(self.order, 0, &mut seen)
            .or_else(|fault| corrupt(format!("order: {fault}")))?;
        if !is_arranged(self.order, |id| id) {
            return corrupt("the ids of a bucket of its order do not ascend");
        }
        let ranks = self.ranks();
        if !(1..=MAX_CLUSTERS).contains(&self.clusters.len()) {
            let found = self.clusters.len();
            return corrupt(format!("{found} clusters, expected 1 … {MAX_CLUSTERS}"));
        }
        for (number, cluster) in self.clusters.iter().enumerate() {
            if cluster.list.len() > MAX_LIST {
                let found = cluster.list.len();
                return corrupt(format!(
                    "cluster {number} has {found} ids, expected at most {MAX_LIST}"
                ));
            }
            check_distinct(&cluster.list, number as u32 + 1, &mut seen)
                .or_else(|fault| corrupt(format!("cluster {number}: {fault}")))?;
            if !is_arranged(&cluster.list, |id| ranks[id as usize]) {
                return corrupt(format!(
                    "cluster {number}: the ids of a bucket are not in the order of all ids"
                ));
            }
        }
        self.check_sizes()
    }

    /// Checks what bounds the memory that an encoder takes.
    fn check_sizes(&self) -> Result<()> {
        let listed: usize = self.clusters.iter().map(|cluster| cluster.list.len()).sum();
        if listed > MAX_LISTED {
            return corrupt(format!("{listed} ids in its lists, expected at most {MAX_LISTED}"));
        }
        let mut seen = vec![false; self.order.len()];
        let ids = self.clusters.iter().flat_map(|cluster| &cluster.list);
        ids.for_each(|&id| seen[id as usize] = true);
        let costs = seen.iter().filter(|&&seen| seen).count() * self.clusters.len();
        if costs > MAX_COSTS {
            return corrupt(format!(
                "its clusters times the ids in their lists are {costs}, expected at most {MAX_COSTS}"
            ));
        }
        Ok(())
    }

    /// Appends order and clusters.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        // The ascending rest is not stored.
        let rest = self.order.windows(2).rev().take_while(|pair| pair[0] < pair[1]).count() + 1;
        let first = self.order.len().saturating_sub(rest);
        put(out, 4, first);
        pack(&self.order[..first], |id| id, out);
        let ranks = self.ranks();
        put(out, 2, self.clusters.len());
        for cluster in self.clusters {
            put(out, 1, usize::from(cluster.gap_class));
            put(out, 1, usize::from(cluster.shape_class));
            put(out, 2, cluster.list.len());
            pack(&cluster.list, |id| ranks[id as usize], out);
        }
    }
}

/// Checks tables, and that maps of [`Kind::Other`] and [`Kind::Gap`] use those that there are, each
/// for one kind. Returns the kinds, none for a table that is not used.
pub(super) fn table_kinds<'a>(
    tables: &[Table],
    others: impl Iterator<Item = &'a u16>,
    gaps: &'a [u16],
) -> Result<Vec<Option<Kind>>> {
    let mut kinds = vec![None; tables.len()];
    let others = others.map(|&table| (table, Kind::Other));
    for (table, kind) in others.chain(gaps.iter().map(|&table| (table, Kind::Gap))) {
        match kinds.get_mut(usize::from(table)) {
            None => return corrupt(format!("table {table} of {} is used", tables.len())),
            Some(known) if known.is_some_and(|known| known != kind) => {
                return corrupt(format!("table {table} is used for gaps and for other numbers"));
            }
            Some(known) => *known = Some(kind),
        }
    }
    Ok(kinds)
}

/// Checks the tables themselves.
pub(super) fn check_tables(tables: &[Table], kinds: &[Option<Kind>]) -> Result<()> {
    for (number, (table, kind)) in tables.iter().zip(kinds).enumerate() {
        if let Some(fault) = table.fault(*kind) {
            return corrupt(format!("table {number}: {fault}"));
        }
    }
    Ok(())
}

impl Prior {
    /// The sizes of the maps, from the maps.
    #[must_use]
    pub fn dimensions(&self) -> Dimensions {
        let Contexts { shape, count, gap, .. } = &self.contexts;
        let mut dimensions = Dimensions::new(&self.config, 1, shape.len(), count.len());
        dimensions.gap_classes = gap.len() / (dimensions.positions * dimensions.left);
        dimensions
    }

    /// Checks everything that decoding relies on.
    ///
    /// Fails with [`CodecError::Corrupt`].
    pub fn validate(&self) -> Result<()> {
        self.config.validate()?;
        self.ids().check()?;
        self.check_levels()?;
        self.check_contexts()
    }

    /// What codes ids.
    pub(super) fn ids(&self) -> IdCodes<'_> {
        IdCodes {
            vocab_size: self.config.vocab_size,
            expected: self.config.k as f64,
            order: &self.order,
            clusters: &self.clusters,
            cluster: self.contexts.cluster,
            gap: &self.contexts.gap,
            tables: &self.tables,
        }
    }

    /// The place of each id in the order.
    pub(super) fn ranks(&self) -> Vec<u32> {
        self.ids().ranks()
    }

    fn check_levels(&self) -> Result<()> {
        let expected = Scale::new(self.config.step).count();
        if self.levels.len() != expected {
            return corrupt(format!("{} levels, expected {expected}", self.levels.len()));
        }
        let ascending = self.levels.windows(2).all(|pair| pair[0] < pair[1]);
        let ends = [self.levels[0], self.levels[expected - 1]];
        if !ascending || !(-40.0..=0.0).contains(&ends[0]) || !(-40.0..=0.0).contains(&ends[1]) {
            return corrupt("levels do not ascend within −40 … 0");
        }
        Ok(())
    }

    fn check_contexts(&self) -> Result<()> {
        let Contexts { mass, gap, level, .. } = &self.contexts;
        let sizes = self.dimensions();
        let whole = sizes.gap_classes * sizes.positions * sizes.left;
        let fits = (1..=MAX_CLASSES).contains(&sizes.gap_classes)
            && (1..=MAX_CLASSES).contains(&sizes.shape_classes)
            && (1..=MAX_SHAPES).contains(&sizes.shapes)
            && mass.len() == sizes.shapes
            && gap.len() == whole
            && level.len() == sizes.shapes * 2 * sizes.positions;
        if !fits {
            return corrupt("the sizes of its maps do not agree, or are beyond the limits");
        }
        if !(1..=MAX_TABLES).contains(&self.tables.len()) {
            let found = self.tables.len();
            return corrupt(format!("{found} tables, expected 1 … {MAX_TABLES}"));
        }
        for (number, cluster) in self.clusters.iter().enumerate() {
            if usize::from(cluster.gap_class) >= sizes.gap_classes
                || usize::from(cluster.shape_class) >= sizes.shape_classes
            {
                return corrupt(format!("cluster {number} is of a class without tables"));
            }
        }
        check_tables(&self.tables, &self.kinds()?)
    }

    /// What each table codes; none for a table that is not used.
    pub(super) fn kinds(&self) -> Result<Vec<Option<Kind>>> {
        let Contexts { cluster, shape, count, mass, gap, level } = &self.contexts;
        let others = [shape, count, mass, level].into_iter().flatten().chain([cluster]);
        table_kinds(&self.tables, others, gap)
    }
}

/// Checks that ids exist and none is there twice; `seen` has the number of the last list of each.
fn check_distinct(ids: &[u32], list: u32, seen: &mut [u32]) -> std::result::Result<(), String> {
    for &id in ids {
        let Some(seen) = seen.get_mut(id as usize) else {
            return Err(format!("id {id} of a vocabulary of {}", seen.len()));
        };
        if *seen == list {
            return Err(format!("id {id} is there twice"));
        }
        *seen = list;
    }
    Ok(())
}

/// The ids that are not in `first`, ascending, after it.
fn completed(mut first: Vec<u32>, vocab: u32) -> Vec<u32> {
    let mut known = vec![false; vocab as usize];
    for &id in &first {
        if let Some(known) = known.get_mut(id as usize) {
            *known = true;
        }
    }
    first.extend((0..vocab).filter(|&id| !known[id as usize]));
    first
}

/// Serialisation: all integers little-endian, ids as in [`pack`].
impl Prior {
    /// The prior as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        let config = serde_json::to_vec(&self.config.without_prior()).unwrap_or_default();
        put(&mut out, 4, config.len());
        out.extend_from_slice(&config);
        self.ids().put(&mut out);
        put(&mut out, 2, self.levels.len());
        self.levels.iter().for_each(|level| out.extend_from_slice(&level.to_le_bytes()));
        let Contexts { cluster, shape, count, mass, gap, level } = &self.contexts;
        put_maps(&mut out, &[&[*cluster], shape, count, mass, gap, level]);
        put_tables(&mut out, &self.tables);
        out
    }

    /// Reads and validates a prior.
    ///
    /// Fails with [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn from_bytes(data: &[u8]) -> Result<Self> {
        let mut input = Input::new(data);
        let config = input.config(MAGIC, CompactConfig::from_json)?;
        if config.prior.is_some() {
            return corrupt("its configuration names a prior");
        }
        let (order, clusters) = input.ids(config.vocab_size)?;
        let count = input.counted(2, MAX_LEVELS, "levels")?;
        let levels = input.numbers(count, 4, "levels")?.into_iter().map(f32::from_bits).collect();
        let contexts = Contexts {
            cluster: input.single("clusters")?,
            shape: input.map("tables of shapes")?,
            count: input.map("tables of counts")?,
            mass: input.map("tables of masses")?,
            gap: input.map("tables of gaps")?,
            level: input.map("tables of levels")?,
        };
        let tables = input.tables()?;
        input.end()?;
        let prior = Self { config, order, clusters, levels, contexts, tables };
        prior.validate()?;
        Ok(prior)
    }
}

pub(super) fn put(out: &mut Vec<u8>, size: usize, number: usize) {
    out.extend_from_slice(&(number as u64).to_le_bytes()[..size]);
}

pub(super) fn put_maps(out: &mut Vec<u8>, maps: &[&[u16]]) {
    for map in maps {
        put(out, 4, map.len());
        map.iter().for_each(|&table| put(out, 2, usize::from(table)));
    }
}

pub(super) fn put_tables(out: &mut Vec<u8>, tables: &[Table]) {
    put(out, 2, tables.len());
    for Table(slots) in tables {
        // The escape is what is left of the sum.
        let used =
            slots[..SYMBOLS - 1].iter().rposition(|&slots| slots > 0).map_or(0, |last| last + 1);
        put(out, 1, used);
        slots[..used].iter().for_each(|&slots| put(out, 2, usize::from(slots)));
    }
}

/// Bytes that are being read.
pub(super) struct Input<'a> {
    data: &'a [u8],
    read: usize,
}

impl<'a> Input<'a> {
    pub(super) const fn new(data: &'a [u8]) -> Self {
        Self { data, read: 0 }
    }

    /// The configuration, after the first bytes.
    pub(super) fn config<T>(
        &mut self,
        magic: &[u8; 8],
        parse: impl FnOnce(&str) -> Result<T>,
    ) -> Result<T> {
        if self.take(magic.len(), "its first bytes")? != magic {
            return corrupt(format!("does not begin with {:?}", magic.escape_ascii().to_string()));
        }
        let length = self.number(4, "the length of its configuration")?;
        if length > 4096 {
            return corrupt(format!("a configuration of {length} bytes"));
        }
        let refused = |error: &dyn std::fmt::Display| {
            CodecError::Corrupt(format!("prior: its configuration: {error}"))
        };
        let config = std::str::from_utf8(self.take(length, "its configuration")?)
            .map_err(|error| refused(&error))?;
        parse(config).map_err(|error| refused(&error))
    }

    /// Order and clusters.
    pub(super) fn ids(&mut self, vocab: u32) -> Result<(Vec<u32>, Vec<Cluster>)> {
        let first = self.counted(4, vocab as usize, "ids in order")?;
        let first = self.list(first, |id| (id < vocab).then_some(id))?;
        let order = completed(first, vocab);
        let count = self.counted(2, MAX_CLUSTERS, "clusters")?;
        let mut clusters = Vec::new();
        for _ in 0..count {
            let gap_class = self.number(1, "a cluster")? as u8;
            let shape_class = self.number(1, "a cluster")? as u8;
            let length = self.counted(2, MAX_LIST, "ids of a cluster")?;
            let list = self.list(length, |rank| order.get(rank as usize).copied())?;
            clusters.push(Cluster { list, gap_class, shape_class });
        }
        Ok((order, clusters))
    }

    pub(super) fn map(&mut self, what: &str) -> Result<Vec<u16>> {
        let count = self.counted(4, MAX_CLASSES * 64 * 64, what)?;
        Ok(self.numbers(count, 2, what)?.into_iter().map(|table| table as u16).collect())
    }

    /// A map of one table.
    pub(super) fn single(&mut self, what: &str) -> Result<u16> {
        let map = self.map(what)?;
        let [table] = map[..] else {
            return corrupt(format!("{} tables of {what}, expected 1", map.len()));
        };
        Ok(table)
    }

    pub(super) fn tables(&mut self) -> Result<Vec<Table>> {
        let count = self.counted(2, MAX_TABLES, "tables")?;
        (0..count).map(|_| self.table()).collect()
    }

    /// Checks that everything was read.
    pub(super) fn end(&self) -> Result<()> {
        if self.read == self.data.len() {
            return Ok(());
        }
        let (expected, found) = (self.read, self.data.len());
        Err(CodecError::Truncated { what: "prior".to_owned(), found, expected })
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let Some(bytes) = self.data[self.read..].get(..count) else {
            return Err(CodecError::Truncated {
                what: format!("prior: {what}"),
                found: self.data.len() - self.read,
                expected: count,
            });
        };
        self.read += count;
        Ok(bytes)
    }

    fn number(&mut self, size: usize, what: &str) -> Result<usize> {
        Ok(little_endian(self.take(size, what)?) as usize)
    }

    /// A count, which has a limit.
    fn counted(&mut self, size: usize, most: usize, what: &str) -> Result<usize> {
        let count = self.number(size, what)?;
        if count > most {
            corrupt(format!("{count} {what}, expected at most {most}"))
        } else {
            Ok(count)
        }
    }

    fn numbers(&mut self, count: usize, size: usize, what: &str) -> Result<Vec<u32>> {
        Ok(self.take(count * size, what)?.chunks(size).map(little_endian).collect())
    }

    fn list(&mut self, length: usize, order: impl Fn(u32) -> Option<u32>) -> Result<Vec<u32>> {
        let mut rest = &self.data[self.read..];
        let list = unpack(&mut rest, length, order)?;
        self.read = self.data.len() - rest.len();
        Ok(list)
    }

    fn table(&mut self) -> Result<Table> {
        let used = self.counted(1, SYMBOLS - 1, "symbols of a table")?;
        let mut slots = [0; SYMBOLS];
        let mut left = super::tables::SLOTS as u32;
        for (slots, number) in slots.iter_mut().zip(self.numbers(used, 2, "a table")?) {
            *slots = number as u16;
            left = left.saturating_sub(number);
        }
        if used > 0 && slots[used - 1] == 0 {
            return corrupt("a table ends with a symbol without a slot");
        }
        slots[SYMBOLS - 1] = left as u16;
        Ok(Table(slots))
    }
}

fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte))
}
