//! Virtual positions: for a cluster, its list and then all other ids by frequency.

/// The positions of a cluster's ids. Ids are named by their rank in the order of frequency.
#[derive(Debug, Clone)]
pub(super) struct ClusterOrder {
    /// Ids of the list, in its order.
    list: Vec<u32>,
    /// Ranks of the list's ids, ascending, and their places in the list.
    ranks: Vec<u32>,
    places: Vec<u16>,
    /// For each of `ranks`, how many ids outside the list come before it: never falls.
    before: Vec<u32>,
    rank_index: Index,
    before_index: Index,
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
        let count = (last >> shift) + 2;
        let start = |run: u32| {
            sorted.partition_point(|&number| u64::from(number) < u64::from(run) << shift) as u16
        };
        Self { shift, starts: (0..count).map(start).collect() }
    }

    /// How many elements are at most `number`.
    #[inline(always)]
    fn up_to(&self, sorted: &[u32], number: u32) -> usize {
        let run = (number >> self.shift) as usize;
        let (Some(&from), Some(&to)) = (self.starts.get(run), self.starts.get(run + 1)) else {
            return sorted.len();
        };
        let (from, to) = (usize::from(from), usize::from(to));
        match sorted.get(from..to) {
            Some(few) if few.len() <= 8 => {
                from + few.iter().map(|&each| usize::from(each <= number)).sum::<usize>()
            }
            Some(many) => from + many.partition_point(|&each| each <= number),
            None => sorted.len(),
        }
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
            places: pairs.iter().map(|pair| pair.1).collect(),
            rank_index: Index::new(&ranks),
            before_index: Index::new(&before),
            ranks,
            before,
        }
    }

    /// The position of the id with this rank.
    #[inline(always)]
    pub(super) fn position(&self, rank: u32) -> u32 {
        let count = self.rank_index.up_to(&self.ranks, rank);
        match count.checked_sub(1) {
            Some(last) if self.ranks[last] == rank => u32::from(self.places[last]),
            _ => self.list.len() as u32 + rank - count as u32,
        }
    }

    /// The id at a position; `order` has the id of every rank.
    #[inline(always)]
    pub(super) fn id(&self, position: u32, order: &[u32]) -> u32 {
        match self.list.get(position as usize) {
            Some(&id) => id,
            None => self.outside(position, order),
        }
    }

    #[inline(never)]
    fn outside(&self, position: u32, order: &[u32]) -> u32 {
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
        let order: Vec<u32> = (0..1000).map(|i| i * 7 % 1000).collect();
        let mut ranks = vec![0; 1000];
        order.iter().zip(0..).for_each(|(&id, rank)| ranks[id as usize] = rank);
        for list in [
            vec![],
            vec![5],
            vec![999, 0, 7, 14],
            (100..400).rev().collect::<Vec<u32>>(),
            order[..40].to_vec(),
        ] {
            let cluster = ClusterOrder::new(&list, &ranks);
            let rest = order.iter().filter(|id| !list.contains(id));
            for (position, &id) in list.iter().chain(rest).enumerate() {
                assert_eq!(cluster.id(position as u32, &order), id);
                assert_eq!(cluster.position(ranks[id as usize]), position as u32);
            }
        }
    }
}
