//! Which shape a row is coded in.

use std::array;

use super::{DECIDING, Picked, least};
use crate::compact::model::Model;
use crate::compact::numbers::{Kind, SYMBOLS};
use crate::compact::prior::{Dimensions, Prior};

/// Units of a bit in costs of shapes.
const UNITS: f32 = 8.0;

/// Costs in shapes next to each other.
type Shapes<T> = [T; 32];

/// What each value costs in each shape, about.
#[derive(Debug)]
pub(super) struct ShapeCosts {
    parts: Vec<PartCosts>,
}

/// Costs in some shapes; those that do not exist are too expensive.
#[derive(Debug)]
struct PartCosts {
    /// By bucket of the position + 1 and symbol, beyond the shape where it costs least.
    values: Vec<Shapes<u8>>,
    /// By class of the cluster, by symbol of the mass, by symbol of the count.
    shape: Vec<Shapes<u16>>,
    mass: Vec<Shapes<u16>>,
    count: Vec<Shapes<u16>>,
}

impl ShapeCosts {
    pub(super) fn new(prior: &Prior, dimensions: &Dimensions, costs: &[[f32; SYMBOLS]]) -> Self {
        let bits = |table: u16, symbol: usize| costs[usize::from(table)][symbol];
        let shapes = dimensions.shapes;
        // What a value costs in a shape.
        let value = |shape: usize, position: usize, symbol: usize| {
            let [even, odd] = [0, 1].map(|quantiser| {
                let context = (shape * 2 + quantiser) * dimensions.positions + position;
                bits(prior.contexts.level[context], symbol)
            });
            (f32::midpoint(even, odd) * UNITS) as u16
        };
        let contexts: Vec<(usize, usize)> = (0..dimensions.positions)
            .flat_map(|position| (0..SYMBOLS).map(move |symbol| (position, symbol)))
            .collect();
        let least: Vec<u16> = contexts
            .iter()
            .map(|&(position, symbol)| {
                (0..shapes).map(|shape| value(shape, position, symbol)).min().unwrap_or(0)
            })
            .collect();
        let part = |first: usize| {
            let line = |cost: &dyn Fn(usize) -> u16| -> Shapes<u16> {
                array::from_fn(|i| if first + i < shapes { cost(first + i) } else { u16::MAX })
            };
            let values = contexts.iter().zip(&least).map(|(&(position, symbol), least)| {
                line(&|shape| value(shape, position, symbol) - least)
                    .map(|cost| cost.min(255) as u8)
            });
            let units = |table: u16, symbol: usize| (bits(table, symbol) * UNITS) as u16;
            let shape =
                |&table: &u16| line(&|shape| units(table, Kind::Other.symbol(shape as u32)));
            let by_symbol = |tables: &[u16]| {
                (0..SYMBOLS).map(|symbol| line(&|shape| units(tables[shape], symbol))).collect()
            };
            PartCosts {
                values: values.collect(),
                shape: prior.contexts.shape.iter().map(shape).collect(),
                mass: by_symbol(&prior.contexts.mass),
                count: by_symbol(&prior.contexts.count),
            }
        };
        Self { parts: (0..shapes).step_by(size_of::<Shapes<u8>>()).map(part).collect() }
    }

    /// The shape in which the values cost least.
    #[inline(always)]
    pub(super) fn best(&self, model: &Model, row: &Picked, sums: &mut Vec<u16>) -> usize {
        let class = model.clusters[row.cluster].shape_class;
        let count = model.count_number(row.positions.len());
        let [mass, count] = [row.mass as u32, count].map(|number| Kind::Other.symbol(number));
        sums.clear();
        for part in &self.parts {
            let mut values: Shapes<u16> = [0; 32];
            let deciding = row.buckets.iter().zip(&row.scaled).take(DECIDING);
            for (&bucket, &scaled) in deciding {
                let symbol = Kind::Other.symbol((scaled * 0.5 + 0.25) as u32);
                let costs = &part.values[usize::from(bucket) * SYMBOLS + symbol];
                values = array::from_fn(|i| values[i] + u16::from(costs[i]));
            }
            let head = [&part.shape[class], &part.mass[mass], &part.count[count]];
            for costs in head {
                values = array::from_fn(|i| values[i].saturating_add(costs[i]));
            }
            sums.extend_from_slice(&values);
        }
        least(sums)
    }
}
