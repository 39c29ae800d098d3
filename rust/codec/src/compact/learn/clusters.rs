//! Clusters of rows by their ids: k-means in code length.
//!
//! A cluster says how often each id is in its rows, smoothed with how often it is in all rows; a
//! row belongs where its ids cost the fewest bits. Ids are named by their rank in the order of
//! frequency. Costs are sums of integers and the rest is computed in a fixed order, so that threads
//! and machines don't matter.

use super::{Sample, Samples};
use crate::compact::lists::arrange;
use crate::error::Result;
use crate::tasks::run_tasks;

/// Rows a cluster needs to be one.
const ROWS_PER_CLUSTER: usize = 128;
/// Ids of a cluster's list.
const LIST: usize = 2048;
const ROUNDS: usize = 10;
/// In the last rounds nothing is split any more.
const SETTLING: usize = 3;
/// Clusters of fewer rows give way to halves of larger ones.
const FEW_ROWS: usize = 20;
/// Rows of all rows' distribution that are added to each cluster's own.
const SMOOTHING: f64 = 8.0;
/// How much an id counts for a list that is near the stored ids of a row.
const NEAR: f64 = 0.2;
/// A coarse cluster that fewer than one in so many rows are in doesn't count.
const MINORITY: usize = 20;
/// A seed is a cluster of one row and so little else.
const SEED_SMOOTHING: f64 = 2.0;
/// Units of a bit.
const UNITS: f64 = 8.0;
/// Bits that an id can cost or save at most, and ids that are summed in 16 bits.
const MOST_BITS: f64 = 31.0;
const BLOCK: usize = 128;
/// Rows of a task.
const TASK_ROWS: usize = 256;

/// Rows in clusters.
pub(super) struct Clusters {
    count: usize,
    /// Of each row of the sample.
    members: Vec<u16>,
}

/// What ids cost in clusters, against what they cost in all rows.
struct Costs {
    clusters: usize,
    /// For each rank, the cost in every cluster.
    ids: Vec<i16>,
    /// What being in a cluster costs.
    base: Vec<i32>,
}

/// How often each rank is in a row, of all rows.
struct Overall {
    shares: Vec<f64>,
    total: f64,
}

impl Overall {
    fn new(sample: &Sample, fit: &[usize]) -> Self {
        let mut counts = vec![0u32; sample.order.len()];
        for &row in fit {
            sample.ranks(row).iter().for_each(|&rank| counts[rank as usize] += 1);
        }
        // As if one more row had every id a little.
        let unseen = 1.0 / sample.order.len() as f64;
        let share = |count| (f64::from(count) + unseen) / (fit.len() as f64 + 1.0);
        let shares: Vec<f64> = counts.into_iter().map(share).collect();
        Self { total: shares.iter().sum(), shares }
    }
}

impl Clusters {
    /// Finds clusters of the rows `fit`, at most `most`, and puts all rows of the sample into them.
    pub(super) fn find(sample: &Sample, fit: &[usize], most: usize) -> Result<Self> {
        let count = (fit.len() / ROWS_PER_CLUSTER).clamp(1, most);
        let mut found = Self { count, members: vec![0; sample.rows()] };
        if count == 1 {
            return Ok(found);
        }
        let overall = Overall::new(sample, fit);
        let seeds: Vec<usize> = (0..count).map(|seed| fit[seed * fit.len() / count]).collect();
        seeds.iter().zip(0..).for_each(|(&row, seed)| found.members[row] = seed);
        let mut costs = found.costs(sample, &seeds, &overall, SEED_SMOOTHING);
        for round in 0..ROUNDS {
            found.assign(sample, &costs)?;
            if round + SETTLING < ROUNDS {
                found.split(fit);
            }
            costs = found.costs(sample, fit, &overall, SMOOTHING);
        }
        found.assign(sample, &costs)?;
        found.number_by_size();
        Ok(found)
    }

    /// Gives clusters numbers by falling size: numbers near each other share a symbol.
    fn number_by_size(&mut self) {
        let mut sizes = vec![0usize; self.count];
        self.members.iter().for_each(|&cluster| sizes[usize::from(cluster)] += 1);
        let mut order: Vec<usize> = (0..self.count).collect();
        order.sort_by_key(|&cluster| std::cmp::Reverse(sizes[cluster]));
        let mut numbers = vec![0; self.count];
        order.iter().zip(0..).for_each(|(&cluster, number)| numbers[cluster] = number);
        self.members.iter_mut().for_each(|cluster| *cluster = numbers[usize::from(*cluster)]);
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The cluster of a row.
    pub(super) fn of(&self, row: usize) -> usize {
        usize::from(self.members[row])
    }

    /// Puts every row where it costs least.
    fn assign(&mut self, sample: &Sample, costs: &Costs) -> Result<()> {
        let tasks: Vec<_> = self.members.chunks_mut(TASK_ROWS).enumerate().collect();
        run_tasks(TASK_ROWS, tasks, |(task, members), sums: &mut Sums| {
            for (i, member) in members.iter_mut().enumerate() {
                *member = costs.cheapest(sample.ranks(task * TASK_ROWS + i), sums);
            }
            Ok(())
        })
    }

    /// Gives clusters of few rows half of the largest cluster's.
    fn split(&mut self, fit: &[usize]) {
        let mut sizes = vec![0usize; self.count];
        for &row in fit {
            sizes[self.of(row)] += 1;
        }
        for few in 0..self.count {
            if sizes[few] >= FEW_ROWS {
                continue;
            }
            let largest =
                (0..self.count).fold(0, |best, i| if sizes[i] > sizes[best] { i } else { best });
            let rows = fit.iter().filter(|&&row| usize::from(self.members[row]) == largest);
            let half: Vec<usize> = rows.copied().step_by(2).collect();
            for row in &half {
                self.members[*row] = few as u16;
            }
            sizes[few] += half.len();
            sizes[largest] -= half.len();
        }
    }

    /// The rows of each cluster, of those given.
    fn rows(&self, rows: &[usize]) -> Vec<Vec<usize>> {
        let mut own = vec![Vec::new(); self.count];
        for &row in rows {
            own[self.of(row)].push(row);
        }
        own
    }

    fn costs(&self, sample: &Sample, fit: &[usize], overall: &Overall, smoothing: f64) -> Costs {
        let ranks = sample.order.len();
        let mut ids = vec![0i16; ranks * self.count];
        let mut base = Vec::new();
        let mut counts = Counts::new(ranks);
        for (cluster, rows) in self.rows(fit).iter().enumerate() {
            let size = rows.len() as f64;
            // An id that is in none of the rows has its share of the smoothing only.
            let others = libm::log2((size + smoothing) / smoothing);
            let others = (others.min(MOST_BITS) * UNITS).round() as i16;
            ids.iter_mut().skip(cluster).step_by(self.count).for_each(|cost| *cost = others);
            let mut own = -libm::log2((size + 1.0) / (fit.len() + self.count) as f64);
            let mut unseen = overall.total;
            counts.of(sample, rows, |rank, count| {
                let share = overall.shares[rank];
                let p = (f64::from(count) + smoothing * share) / (size + smoothing);
                let cost = libm::log2((1.0 - p) / p * share / (1.0 - share));
                let cost = cost.clamp(-MOST_BITS, MOST_BITS) * UNITS;
                ids[rank * self.count + cluster] = cost.round() as i16;
                own -= libm::log2(1.0 - p);
                unseen -= share;
            });
            own += unseen.max(0.0) * smoothing / (size + smoothing) * std::f64::consts::LOG2_E;
            base.push((own * UNITS).round() as i32);
        }
        Costs { clusters: self.count, ids, base }
    }

    /// The likeliest ids of each cluster, by the rows given, arranged. What is rare in a cluster is
    /// judged by the `coarse` clusters of its rows.
    pub(super) fn lists(&self, samples: &Samples, coarse: &Self, rows: &[usize]) -> Vec<Vec<u32>> {
        let ranks = samples.own.order.len();
        if self.count == 1 {
            // The order of all rows is the order of the only cluster.
            return vec![Vec::new()];
        }
        let mut counts = Counts::new(ranks);
        let coarse_shares = coarse.shares(samples.own, rows, &mut counts);
        let list = |rows: &Vec<usize>| {
            let mut scores = coarse.mean_shares(rows, &coarse_shares);
            for share in &mut scores {
                *share *= SMOOTHING;
            }
            for (sample, worth) in [(samples.own, 1.0 - NEAR), (samples.wide, NEAR)] {
                counts.of(sample, rows, |rank, count| scores[rank] += worth * f64::from(count));
            }
            let mut likely: Vec<u32> = (0..ranks as u32).collect();
            let order = |&a: &u32, &b: &u32| {
                scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b))
            };
            if ranks > LIST {
                likely.select_nth_unstable_by(LIST, order);
                likely.truncate(LIST);
            }
            likely.sort_unstable_by(order);
            arrange(&mut likely, |rank| rank);
            likely.into_iter().map(|rank| samples.own.order[rank as usize]).collect()
        };
        self.rows(rows).iter().map(list).collect()
    }
}

impl Clusters {
    /// How often each rank is in a row, by cluster.
    fn shares(&self, sample: &Sample, rows: &[usize], counts: &mut Counts) -> Vec<Vec<f64>> {
        let overall = Overall::new(sample, rows);
        let of = |rows: &Vec<usize>| {
            let total = rows.len() as f64 + SMOOTHING;
            let mut shares: Vec<f64> =
                overall.shares.iter().map(|share| SMOOTHING * share / total).collect();
            counts.of(sample, rows, |rank, count| shares[rank] += f64::from(count) / total);
            shares
        };
        self.rows(rows).iter().map(of).collect()
    }

    /// The mean of shares over rows, but for clusters that few of the rows are in.
    fn mean_shares(&self, rows: &[usize], shares: &[Vec<f64>]) -> Vec<f64> {
        let mut sizes = vec![0usize; self.count];
        for &row in rows {
            sizes[self.of(row)] += 1;
        }
        let mut means = vec![0.0; shares[0].len()];
        for (&size, shares) in sizes.iter().zip(shares) {
            if size * MINORITY > rows.len() || rows.is_empty() {
                let worth = if rows.is_empty() { 1.0 } else { size as f64 / rows.len() as f64 };
                means.iter_mut().zip(shares).for_each(|(mean, share)| *mean += worth * share);
            }
        }
        means
    }
}

/// Buffers of [`Costs::cheapest`].
#[derive(Default)]
struct Sums {
    block: Vec<i16>,
    whole: Vec<i32>,
}

impl Costs {
    /// The cluster in which ids cost least.
    fn cheapest(&self, ranks: &[u32], sums: &mut Sums) -> u16 {
        let Sums { block, whole } = sums;
        whole.clear();
        whole.extend_from_slice(&self.base);
        for ranks in ranks.chunks(BLOCK) {
            block.clear();
            block.resize(self.clusters, 0);
            for &rank in ranks {
                let place = rank as usize * self.clusters;
                let costs = &self.ids[place..place + self.clusters];
                block.iter_mut().zip(costs).for_each(|(sum, cost)| *sum += cost);
            }
            whole.iter_mut().zip(&*block).for_each(|(sum, &part)| *sum += i32::from(part));
        }
        let least = whole.iter().min().copied().unwrap_or(0);
        whole.iter().position(|&sum| sum == least).unwrap_or(0) as u16
    }
}

/// Counts of ids in some rows.
struct Counts {
    counts: Vec<u32>,
    seen: Vec<u32>,
}

impl Counts {
    fn new(ranks: usize) -> Self {
        Self { counts: vec![0; ranks], seen: Vec::new() }
    }

    /// Calls `each` with every rank that is in the rows and its count, in the order in which they
    /// occur first.
    fn of(&mut self, sample: &Sample, rows: &[usize], mut each: impl FnMut(usize, u32)) {
        for &row in rows {
            for &rank in sample.ranks(row) {
                let count = &mut self.counts[rank as usize];
                if *count == 0 {
                    self.seen.push(rank);
                }
                *count += 1;
            }
        }
        for rank in self.seen.drain(..) {
            each(rank as usize, std::mem::take(&mut self.counts[rank as usize]));
        }
    }
}
