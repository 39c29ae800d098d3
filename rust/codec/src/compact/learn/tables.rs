//! Code tables from counts: contexts that count alike share one.

use crate::compact::numbers::{Kind, SYMBOLS};
use crate::compact::tables::{SLOTS, Table};

/// A number that was met counts this much.
const ONE: u64 = SLOTS as u64;
/// Numbers that a table of its own needs.
const NUMBERS_PER_TABLE: u64 = 400;
const ROUNDS: usize = 12;
/// How much of what all contexts counted is added to a table's counts, and how much of every
/// symbol that there is.
const OF_ALL: u64 = 4 * ONE;
const OF_EACH: u64 = ONE / 32;

/// How often each symbol occurred, by context.
#[derive(Debug, Clone)]
pub(super) struct Counts {
    contexts: Vec<[u64; SYMBOLS]>,
    kind: Kind,
    /// Symbols beyond this one's are for numbers that don't occur.
    largest: u32,
}

/// Tables, and which context has which.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tables: Vec<Table>,
    pub(super) map: Vec<u16>,
}

impl Counts {
    pub(super) fn new(contexts: usize, kind: Kind, largest: u32) -> Self {
        Self { contexts: vec![[0; SYMBOLS]; contexts], kind, largest }
    }

    pub(super) fn add(&mut self, context: usize, number: u32) {
        self.contexts[context][self.kind.symbol(number)] += ONE;
    }

    /// Adds what would be expected in a context, as much as one number.
    pub(super) fn expect(&mut self, context: usize, table: &Table) {
        let slots = self.contexts[context].iter_mut().zip(table.0);
        slots.for_each(|(count, slots)| *count += u64::from(slots));
    }

    /// Tables of contexts that code their numbers in the fewest bits together: at most `most`.
    pub(super) fn share(&self, most: usize) -> Shared {
        let totals: Vec<u64> = self.contexts.iter().map(|counts| counts.iter().sum()).collect();
        let all: u64 = totals.iter().sum();
        let most = most.min((all / (NUMBERS_PER_TABLE * ONE)) as usize).max(1);
        let mut groups = self.first_groups(&totals, most);
        for _ in 0..ROUNDS {
            let costs: Vec<[f32; SYMBOLS]> =
                self.tables(&groups, most).iter().map(|table| table.costs(self.kind)).collect();
            for (context, counts) in self.contexts.iter().enumerate() {
                if totals[context] > 0 {
                    groups[context] = cheapest(counts, &costs);
                }
            }
        }
        // Contexts that were never met have the table of the nearest one that was.
        let met: Vec<usize> = (0..totals.len()).filter(|&context| totals[context] > 0).collect();
        for context in 0..groups.len() {
            if totals[context] == 0 && !met.is_empty() {
                let after = met.partition_point(|&other| other < context);
                let near = [after.checked_sub(1), (after < met.len()).then_some(after)];
                let near = near.into_iter().flatten().map(|place| met[place]);
                let nearest = near.min_by_key(|other| other.abs_diff(context));
                groups[context] = groups[nearest.unwrap_or(context)];
            }
        }
        self.without_gaps(&groups, most)
    }

    /// Contexts in the order of their mean symbol, in groups of about equally many numbers.
    fn first_groups(&self, totals: &[u64], most: usize) -> Vec<usize> {
        let mean = |context: usize| {
            let sum: u64 = (0..).zip(&self.contexts[context]).map(|(symbol, n)| symbol * n).sum();
            sum as f64 / totals[context] as f64
        };
        let mut order: Vec<(f64, usize)> = (0..totals.len())
            .filter(|&context| totals[context] > 0)
            .map(|context| (mean(context), context))
            .collect();
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let all: u64 = totals.iter().sum();
        let mut groups = vec![0; totals.len()];
        let mut before = 0;
        for (_, context) in order {
            groups[context] = ((before / (all / most as u64).max(1)) as usize).min(most - 1);
            before += totals[context];
        }
        groups
    }

    fn tables(&self, groups: &[usize], most: usize) -> Vec<Table> {
        let mut sums = vec![[0u64; SYMBOLS]; most];
        let mut all = [0u64; SYMBOLS];
        for (counts, &group) in self.contexts.iter().zip(groups) {
            for ((sum, all), &count) in sums[group].iter_mut().zip(&mut all).zip(counts) {
                *sum += count;
                *all += count;
            }
        }
        let total = all.iter().sum::<u64>().max(1);
        let last = self.kind.symbol(self.largest);
        for sums in &mut sums {
            for (symbol, sum) in sums.iter_mut().enumerate().take(last + 1) {
                *sum += (OF_ALL as f64 * (all[symbol] as f64 / total as f64)) as u64 + OF_EACH;
            }
        }
        sums.iter().map(|sums| Table::from_counts(sums, self.kind)).collect()
    }

    /// The tables of the groups that have contexts.
    fn without_gaps(&self, groups: &[usize], most: usize) -> Shared {
        let mut numbers = vec![None; most];
        for &group in groups {
            numbers[group] = Some(0u16);
        }
        numbers.iter_mut().flatten().zip(0..).for_each(|(number, next)| *number = next);
        let tables = self.tables(groups, most);
        let used = tables.into_iter().zip(&numbers).filter(|(_, number)| number.is_some());
        Shared {
            tables: used.map(|(table, _)| table).collect(),
            map: groups.iter().map(|&group| numbers[group].unwrap_or(0)).collect(),
        }
    }
}

/// The table that codes counts in the fewest bits.
fn cheapest(counts: &[u64; SYMBOLS], costs: &[[f32; SYMBOLS]]) -> usize {
    let mut best = (f32::INFINITY, 0);
    for (number, costs) in costs.iter().enumerate() {
        let bits =
            counts.iter().zip(costs).fold(0.0, |sum, (&count, cost)| sum + count as f32 * cost);
        if bits < best.0 {
            best = (bits, number);
        }
    }
    best.1
}
