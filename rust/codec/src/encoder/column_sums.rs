//! Sums over the ranks of a group's rows: Σ w·column for tables of columns, and combinations of
//! columns at one rank.

use super::linalg::{dot, lower_triangle};
use crate::simd::lanes::{Lanes, no_unroll};

/// The number of sums that are built at a time: few enough for the registers of every instruction
/// set.
const TILE: usize = 4;

/// Tables of n float32 columns.
#[derive(Debug, Clone)]
pub(crate) struct Columns {
    /// Blocks of up to [`TILE`] columns, of nearly the same size, each rank by rank.
    tiles: Vec<(usize, Vec<f32>)>,
}

impl Columns {
    pub(crate) fn new(columns: &[Vec<f64>], n: usize) -> Self {
        let mut tiles = Vec::new();
        let mut left = columns;
        while !left.is_empty() {
            let (block, rest) = left.split_at(left.len().div_ceil(left.len().div_ceil(TILE)));
            let ranks = (0..n).flat_map(|t| block.iter().map(move |column| column[t] as f32));
            tiles.push((block.len(), ranks.collect()));
            left = rest;
        }
        Self { tiles }
    }

    /// Σ w·column for each column and row.
    #[inline(always)]
    pub(crate) fn sums(&self, w: &[Lanes], mut out: &mut [Lanes]) {
        for (width, tile) in &self.tiles {
            let (here, rest) = out.split_at_mut(*width);
            match width {
                4 => Self::tile_sums::<4>(w, tile, here),
                3 => Self::tile_sums::<3>(w, tile, here),
                2 => Self::tile_sums::<2>(w, tile, here),
                _ => Self::tile_sums::<1>(w, tile, here),
            }
            out = rest;
        }
    }

    #[inline(always)]
    fn tile_sums<const WIDTH: usize>(w: &[Lanes], tile: &[f32], out: &mut [Lanes]) {
        let mut sums = [Lanes::ZERO; WIDTH];
        for (w, columns) in w.iter().zip(tile.as_chunks::<WIDTH>().0) {
            for i in 0..WIDTH {
                no_unroll();
                sums[i] += *w * Lanes::splat(columns[i]);
            }
        }
        out.copy_from_slice(&sums);
    }
}

/// Σ w·product for the products of two orthonormal columns, and Σ w·column for the columns.
///
/// Products of powers are powers again, so the r(r + 3)/2 products and columns span far fewer
/// dimensions (13 for the 27 of six terms, 5 for the 9 of three). Sums over the ranks are built for
/// a basis of that span only, and combined to all of them afterwards.
#[derive(Debug, Clone)]
pub(crate) struct Products {
    basis: Columns,
    rank: usize,
    /// Each product, then each column, as a combination of the basis.
    parts: Vec<f32>,
}

impl Products {
    /// The part of a product that float32 does not see, relative to the product's length.
    const UNSEEN: f64 = 3e-7;

    pub(crate) fn new(q: &[Vec<f64>], n: usize) -> Self {
        let product = |(i, j): (usize, usize)| {
            q[i].iter().zip(&q[j]).map(|(a, b)| a * b).collect::<Vec<f64>>()
        };
        let products = lower_triangle(q.len()).map(product);
        let all: Vec<Vec<f64>> = products.chain(q.iter().cloned()).collect();
        let basis = Self::spanning(&all);
        let part = |column: &[f64], known: Option<&Vec<f64>>| {
            known.map_or(0.0, |known| dot(known, column) as f32)
        };
        let combine =
            |column| (0..padded(basis.len())).map(|i| part(column, basis.get(i))).collect();
        let parts: Vec<Vec<f32>> = all.iter().map(|column| combine(column)).collect();
        Self { rank: basis.len(), basis: Columns::new(&basis, n), parts: parts.concat() }
    }

    /// An orthonormal basis of the columns, by Gram–Schmidt that always takes the column of which
    /// most is left.
    fn spanning(columns: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let lengths: Vec<f64> = columns.iter().map(|column| dot(column, column).sqrt()).collect();
        let mut left = columns.to_vec();
        let mut basis: Vec<Vec<f64>> = Vec::new();
        loop {
            let share = |i: &usize| dot(&left[*i], &left[*i]).sqrt() / lengths[*i];
            let largest = (0..left.len()).max_by(|a, b| share(a).total_cmp(&share(b)));
            let Some(largest) = largest else { break };
            if basis.len() == left.len() || share(&largest) < Self::UNSEEN {
                break;
            }
            let mut next = left[largest].clone();
            for known in &basis {
                let along = dot(known, &next);
                next.iter_mut().zip(known).for_each(|(x, y)| *x -= along * y);
            }
            let length = dot(&next, &next).sqrt();
            for x in &mut next {
                *x /= length;
            }
            for column in &mut left {
                let along = dot(&next, column);
                column.iter_mut().zip(&next).for_each(|(x, y)| *x -= along * y);
            }
            basis.push(next);
        }
        basis
    }

    /// The number of sums over the ranks that all others are combined from.
    #[inline(always)]
    pub(crate) const fn rank(&self) -> usize {
        self.rank
    }

    /// Leaves the products' sums in `gram` and the columns' in `sums`; `of_basis` has room for
    /// [`padded`] [`Products::rank`] sums, zero beyond the rank.
    #[inline(always)]
    pub(crate) fn sums(
        &self,
        w: &[Lanes],
        of_basis: &mut [Lanes],
        gram: &mut [Lanes],
        sums: &mut [Lanes],
    ) {
        self.basis.sums(w, of_basis);
        let parts = self.parts.chunks_exact(of_basis.len());
        for (out, parts) in gram.iter_mut().chain(sums).zip(parts) {
            no_unroll();
            *out = dot_terms(parts, of_basis);
        }
    }
}

/// The number of terms that [`dot_terms`] takes at a time; vectors and tables for it are filled up
/// with zeros to a multiple of this.
const STRIDE: usize = 3;

/// Σ q·c over terms: numbers q that all rows share, and a number c of each row.
#[inline(always)]
pub(crate) fn dot_terms(q: &[f32], c: &[Lanes]) -> Lanes {
    let mut sum = Lanes::ZERO;
    for (q, c) in q.as_chunks::<STRIDE>().0.iter().zip(c.as_chunks::<STRIDE>().0) {
        no_unroll();
        for i in 0..STRIDE {
            sum += c[i] * Lanes::splat(q[i]);
        }
    }
    sum
}

/// How many numbers [`dot_terms`] needs for `count` terms.
#[inline(always)]
pub(crate) const fn padded(count: usize) -> usize {
    count.next_multiple_of(STRIDE)
}

/// A table with [`padded`] numbers for each rank.
pub(crate) fn rank_table(columns: &[Vec<f64>], n: usize) -> Vec<f32> {
    let at = |column: Option<&Vec<f64>>, t: usize| column.map_or(0.0, |column| column[t] as f32);
    let rank = |t: usize| (0..padded(columns.len())).map(move |i| at(columns.get(i), t));
    (0..n).flat_map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::linalg::Basis;
    use crate::encoder::testing::{Numbers, columns};
    use crate::simd::lanes::LANES;

    #[test]
    fn products_are_combinations_of_few_sums() {
        let n = 49;
        let mut numbers = Numbers(2);
        let basis = Basis::new(&columns(n).iter().map(Vec::as_slice).collect::<Vec<_>>());
        let products = Products::new(&basis.q, n);
        assert_eq!(products.rank, 5);
        let mut random = || Lanes(std::array::from_fn(|_| numbers.next() as f32));
        let w: Vec<Lanes> = (0..n).map(|_| random()).collect();
        let mut of_basis = vec![Lanes::ZERO; padded(5)];
        let mut gram = vec![Lanes::ZERO; 6];
        let mut sums = vec![Lanes::ZERO; 3];
        products.sums(&w, &mut of_basis, &mut gram, &mut sums);
        for lane in 0..LANES {
            let sum = |column: &dyn Fn(usize) -> f64| {
                (0..n).map(|t| f64::from(w[t].0[lane]) * column(t)).sum::<f64>()
            };
            for ((i, j), found) in lower_triangle(3).zip(&gram) {
                let expected = sum(&|t| basis.q[i][t] * basis.q[j][t]);
                assert!((f64::from(found.0[lane]) - expected).abs() < 1e-6);
            }
            for (q, found) in basis.q.iter().zip(&sums) {
                assert!((f64::from(found.0[lane]) - sum(&|t| q[t])).abs() < 3e-6);
            }
        }
    }
}
