//! The prior that needs no file: ids by number, tables by formulas.

use super::config::CompactConfig;
use super::numbers::{ESCAPE, Kind, SYMBOLS, bucket_start};
use super::prior::{Cluster, Contexts, Dimensions, Prior};
use super::scale::Scale;
use super::tables::Table;

/// Shapes: each is the log-probability of the least probable id of a row, this far apart.
const SHAPES: usize = 24;
const SHAPE_STEP: f64 = 0.75;
const LEAST_SHAPE: f64 = -19.0;
/// Log-probabilities above the least are spread by this.
const SPREAD: f64 = 1.3;
/// Ids up to about this number are equally likely, higher ones less and less.
const COMMON: f64 = 4096.0;

/// The built-in prior of a configuration.
pub(super) fn builtin(config: &CompactConfig) -> Prior {
    let config = config.without_prior();
    let scale = Scale::new(config.step);
    let dimensions = Dimensions::new(&config, 1, 1, SHAPES);
    let mut tables =
        vec![uniform(1), uniform(SHAPES as u32), uniform(super::model::MASSES), counts(&config)];
    let gap_tables = tables.len() as u16;
    tables.extend((0..=48).map(gap_table));
    let mut gap = Vec::new();
    for previous in 0..dimensions.positions {
        for left in 0..dimensions.left {
            gap.push(gap_tables + gap_context(previous, left, config.vocab_size));
        }
    }
    let mut level = Vec::new();
    for shape in 0..SHAPES {
        for quantiser in 0..2 {
            level.extend(vec![tables.len() as u16; dimensions.positions]);
            tables.push(level_table(shape, quantiser, &scale));
        }
    }
    Prior {
        order: (0..config.vocab_size).collect(),
        clusters: vec![Cluster::default()],
        levels: scale.nominals(),
        contexts: Contexts {
            cluster: 0,
            shape: vec![1],
            count: vec![3; SHAPES],
            mass: vec![2; SHAPES],
            gap,
            level,
        },
        tables,
        config,
    }
}

/// The table for probabilities of ranges of numbers: `beyond(x)` is that of x and more.
pub(super) fn table(kind: Kind, beyond: impl Fn(u32) -> f64) -> Table {
    let weight = |symbol: usize| {
        if symbol == ESCAPE || !kind.is_used(symbol) {
            return 0;
        }
        let base = kind.base(symbol);
        let share = beyond(base) - beyond(base + (1 << kind.extra_bits(symbol)));
        (share.max(0.0) * 1e9) as u64
    };
    let mut weights: [u64; SYMBOLS] = std::array::from_fn(weight);
    if weights.iter().all(|&weight| weight == 0) {
        weights[0] = 1;
    }
    Table::from_counts(&weights, kind)
}

/// All numbers below `count` alike.
pub(super) fn uniform(count: u32) -> Table {
    table(Kind::Other, |number| 1.0 - f64::from(number.min(count)) / f64::from(count))
}

fn counts(config: &CompactConfig) -> Table {
    if config.is_adaptive() {
        let all = libm::log(config.k as f64 + 1.0);
        table(Kind::Other, |number| 1.0 - libm::log(f64::from(number) + 1.0).min(all) / all)
    } else {
        table(Kind::Other, |number| if number == 0 { 1.0 } else { 0.01 / f64::from(number) })
    }
}

/// Gaps with a mean of 2^(half / 2), and a long tail.
pub(super) fn gap_table(half: i32) -> Table {
    let mean = libm::exp2(f64::from(half) / 2.0);
    table(Kind::Gap, |number| {
        let far = 1.0 + f64::from(number) / (2.0 * mean);
        1.0 / (far * far * far)
    })
}

/// Which of the tables of gaps fits after a position, with some ids left.
pub(super) fn gap_context(previous: usize, left: usize, vocab: u32) -> u16 {
    let position = middle(previous) + COMMON;
    let end = f64::from(vocab) + COMMON;
    let span = position * libm::log((end / position).max(1.001));
    let half = 2.0 * libm::log2((span / middle(left).max(1.0)).max(1.0));
    (half.round() as u16).min(48)
}

/// The middle of the numbers of a bucket.
fn middle(number: usize) -> f64 {
    f64::from(bucket_start(number)) * if number < 4 { 1.0 } else { 1.2 }
}

/// Log-probabilities from that of the shape upwards, few below.
fn level_table(shape: usize, quantiser: usize, scale: &Scale) -> Table {
    let least = LEAST_SHAPE + SHAPE_STEP * shape as f64;
    // Levels of a quantiser are two apart.
    let border = |number: u32| {
        let level = 2 * number as usize + quantiser;
        if number == 0 {
            f64::NEG_INFINITY
        } else if level >= scale.count() {
            f64::INFINITY
        } else {
            scale.nominal(level - 1)
        }
    };
    table(Kind::Other, |number| {
        let border = border(number);
        if border < least {
            1.0 - 0.1 * libm::exp((border - least) / 1.0)
        } else {
            0.9 * libm::exp((least - border) / SPREAD)
        }
    })
}
