//! Virtual positions: for a cluster, its list and then all other ids by frequency.

use crate::simd::lanes::prefetch;

/// The positions of a cluster's ids. Ids are named by their rank in the order of frequency.
#[derive(Debug, Clone)]
pub(super) struct ClusterOrder {
    list: Vec<u32>,
    /// Ranks of the list's ids, ascending, and their places in the list, with a 0 after them.
    ranks: Vec<u32>,
    places: Vec<u16>,
    /// Which of the first ranks, 64 a block, are in the list.
    blocks: Vec<Block>,
    /// For each of `ranks`, how many ids outside the list come before it: never falls.
    before: Vec<u32>,
    before_index: Index,
}

/// So many positions of each cluster are looked up in one table, in which there are at most
/// [`MOST_FIRST`] of all clusters together.
const FIRST: usize = 1 << 15;
const MOST_FIRST: usize = 1 << 24;

/// Ranks below this are looked up in blocks; there are few above, if any.
const BLOCK_RANKS: u32 = 1 << 16;

/// 64 ranks.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Those in the list.
    listed: u64,
    /// How many of the list are before them.
    before: u32,
}

/// The blocks of ascending ranks, up to the last that has any.
fn blocks(ranks: &[u32]) -> Vec<Block> {
    let near = &ranks[..ranks.partition_point(|&rank| rank < BLOCK_RANKS)];
    let mut blocks = vec![Block::default(); near.last().map_or(0, |last| *last as usize / 64 + 1)];
    for rank in near {
        blocks[*rank as usize / 64].listed |= 1 << (rank % 64);
    }
    let mut before = 0;
    for block in &mut blocks {
        block.before = before;
        before += block.listed.count_ones();
    }
    blocks
}

/// Where to look in a sorted list: the first element of every run of 2^shift numbers.
#[derive(Debug, Clone)]
struct Index {
    shift: u32,
    starts: Vec<u16>,
}

impl Index {
    fn new(sorted: &[u32]) -> Self {
        let last = sorted.last().copied().unwrap_or(0);
        let shift =
            (0..32).find(|&shift| (last >> shift) as usize <= 2 * sorted.len()).unwrap_or(31);
        let mut start = 0;
        let starts = (0..(last >> shift) + 2).map(|run| {
            let first = u64::from(run) << shift;
            start +=
                sorted[start..].iter().take_while(|&&number| u64::from(number) < first).count();
            start as u16
        });
        Self { shift, starts: starts.collect() }
    }

    /// How many elements are at most `number`.
    #[inline(always)]
    fn up_to(&self, sorted: &[u32], number: u32) -> usize {
        let run = (number >> self.shift) as usize;
        let (Some(&from), Some(&to)) = (self.starts.get(run), self.starts.get(run + 1)) else {
            return sorted.len();
        };
        let (from, to) = (usize::from(from), usize::from(to));
        // Most runs are short, and those after it are greater: always as many are compared.
        match sorted[from..].first_chunk::<8>() {
            Some(few) if to <= from + few.len() => {
                from + few.iter().map(|&each| u32::from(each <= number)).sum::<u32>() as usize
            }
            _ => from + sorted[from..to].partition_point(|&each| each <= number),
        }
    }
}

/// The ids of the first positions of all clusters, in as few bytes as they take: looking them up is
/// waiting for memory.
#[derive(Debug)]
pub(super) struct FirstIds {
    /// How many positions each cluster has.
    pub(super) positions: usize,
    pub(super) ids: Ids,
}

/// Ids in as many bytes as the vocabulary needs.
#[derive(Debug)]
pub(super) enum Ids {
    /// With one more id, so that two can be read at the place of each.
    Narrow(Vec<u16>),
    /// Of vocabularies of more than 65,536 ids.
    Wide(Vec<u32>),
}

impl FirstIds {
    /// `order` has the id of each rank.
    pub(super) fn new<'a>(
        clusters: impl ExactSizeIterator<Item = &'a ClusterOrder>,
        order: &[u32],
    ) -> Self {
        let positions = FIRST.min(order.len()).min(MOST_FIRST / clusters.len());
        let mut listed = vec![false; order.len()];
        let mut all = Vec::with_capacity(positions * clusters.len() + 1);
        for cluster in clusters {
            cluster.list.iter().for_each(|&id| listed[id as usize] = true);
            let others = order.iter().copied().filter(|&id| !listed[id as usize]);
            all.extend(cluster.list.iter().copied().chain(others).take(positions));
            cluster.list.iter().for_each(|&id| listed[id as usize] = false);
        }
        let ids = if order.len() <= 1 << 16 {
            Ids::Narrow(all.into_iter().map(|id| id as u16).chain([0]).collect())
        } else {
            Ids::Wide(all)
        };
        Self { positions, ids }
    }

    /// Looks up a cluster's ascending positions; returns how many of them are in the table.
    #[inline(always)]
    pub(super) fn look_up(&self, cluster: usize, positions: &[u32], ids: &mut [u32]) -> usize {
        let within = |&position: &u32| u16::from((position as usize) < self.positions);
        let near = usize::from(positions.iter().map(within).sum::<u16>());
        let at = cluster * self.positions..(cluster + 1) * self.positions;
        match &self.ids {
            Ids::Narrow(table) => look_up(&table[at], &positions[..near], ids),
            Ids::Wide(table) => look_up(&table[at], &positions[..near], ids),
        }
        near
    }
}

#[inline(always)]
fn look_up<T: Copy + Into<u32>>(table: &[T], positions: &[u32], ids: &mut [u32]) {
    for (id, &position) in ids.iter_mut().zip(positions) {
        *id = table[position as usize].into();
    }
}

impl ClusterOrder {
    /// `ranks` has the rank of every id.
    pub(super) fn new(list: &[u32], ranks: &[u32]) -> Self {
        let mut pairs: Vec<(u32, u16)> = list
            .iter()
            .enumerate()
            .map(|(place, &id)| (ranks[id as usize], place as u16))
            .collect();
        pairs.sort_unstable();
        let ranks: Vec<u32> = pairs.iter().map(|pair| pair.0).collect();
        let before: Vec<u32> = ranks.iter().zip(0..).map(|(rank, i)| rank - i).collect();
        Self {
            list: list.to_vec(),
            places: pairs.iter().map(|pair| pair.1).chain([0]).collect(),
            blocks: blocks(&ranks),
            before_index: Index::new(&before),
            ranks,
            before,
        }
    }

    /// The position of the id with this rank.
    pub(super) fn position(&self, rank: u32) -> u32 {
        self.position_by(rank, self.before(rank))
    }

    /// Asks for what the positions of ids are found by.
    #[inline(always)]
    pub(super) fn prefetch(&self, ranks: &[u32]) {
        for &rank in ranks {
            let block = rank as usize / 64;
            prefetch(self.blocks.get(block..=block).unwrap_or(&[]));
        }
        prefetch(&self.places);
    }

    /// The positions of ids by their ranks.
    #[inline(always)]
    pub(super) fn positions(&self, ranks: &[u32], positions: &mut Vec<u32>) {
        positions.resize(ranks.len(), 0);
        // In two loops, each of which waits for many ids at once.
        for (position, &rank) in positions.iter_mut().zip(ranks) {
            *position = self.before(rank);
        }
        for (position, &rank) in positions.iter_mut().zip(ranks) {
            *position = self.position_by(rank, *position);
        }
    }

    /// How many of the list's ids have a lower rank, and in the lowest bit, whether this one is in
    /// the list.
    #[inline(always)]
    fn before(&self, rank: u32) -> u32 {
        if let Some(block) = self.blocks.get(rank as usize / 64) {
            let rest = block.listed >> (rank % 64);
            let before = block.before + (block.listed ^ rest << (rank % 64)).count_ones();
            before << 1 | rest as u32 & 1
        } else {
            let before = self.ranks.partition_point(|&each| each < rank);
            (before as u32) << 1 | u32::from(self.ranks.get(before) == Some(&rank))
        }
    }

    #[inline(always)]
    fn position_by(&self, rank: u32, before: u32) -> u32 {
        let (before, listed) = (before >> 1, before & 1 > 0);
        // Without a branch, which would often be guessed wrong: the last place is nobody's.
        let length = self.list.len();
        let place = u32::from(self.places[if listed { before as usize } else { length }]);
        if listed { place } else { length as u32 + rank - before }
    }

    /// How many ids the list has.
    #[inline(always)]
    pub(super) fn listed(&self) -> usize {
        self.list.len()
    }

    /// The id at a position; `order` has the id of every rank.
    #[inline(always)]
    pub(super) fn id(&self, position: u32, order: &[u32]) -> u32 {
        let listed = self.list.get(position as usize);
        listed.copied().unwrap_or_else(|| self.outside(position, order))
    }

    /// The id at a position after the list; `order` has the id of every rank.
    #[inline]
    pub(super) fn outside(&self, position: u32, order: &[u32]) -> u32 {
        let place = position - self.list.len() as u32;
        let rank = place + self.before_index.up_to(&self.before, place) as u32;
        order.get(rank as usize).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_list_and_then_the_rest() {
        let count = BLOCK_RANKS + 465;
        let order: Vec<u32> = (0..count).map(|i| i * 7 % count).collect();
        let mut ranks = vec![0; count as usize];
        order.iter().zip(0..).for_each(|(&id, rank)| ranks[id as usize] = rank);
        for list in [
            vec![],
            vec![5],
            vec![999, 0, count - 7, 7, count - 70, 14],
            (100..400).rev().collect::<Vec<u32>>(),
            order[..40].to_vec(),
        ] {
            let cluster = ClusterOrder::new(&list, &ranks);
            let first = FirstIds::new([&cluster].into_iter(), &order);
            let mut ids = vec![0; order.len()];
            let near = first.look_up(0, &(0..count).collect::<Vec<u32>>(), &mut ids);
            let rest = order.iter().filter(|id| !list.contains(id));
            for (position, &id) in list.iter().chain(rest).enumerate() {
                assert_eq!(cluster.id(position as u32, &order), id);
                assert!(position >= near || ids[position] == id);
                assert_eq!(cluster.position(ranks[id as usize]), position as u32);
            }
        }
    }
}
