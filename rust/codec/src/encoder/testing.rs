//! What the unit tests of several modules share.

/// Numbers in 0 … 1 from a linear congruential generator.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// x of a·x = b by Gaussian elimination with the largest pivot; `None` where a is singular.
pub(crate) fn solved(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Option<Vec<f64>> {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&x, &y| a[x][i].abs().total_cmp(&a[y][i].abs()))?;
        if a[pivot][i].abs() < 1e-12 {
            return None;
        }
        a.swap(i, pivot);
        b.swap(i, pivot);
        let (above, below) = a.split_at_mut(i + 1);
        for (j, row) in below.iter_mut().enumerate() {
            let factor = row[i] / above[i][i];
            row.iter_mut().zip(&above[i]).for_each(|(x, y)| *x -= factor * y);
            b[i + 1 + j] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| a[i][j] * b[j]).sum();
        b[i] = (b[i] - known) / a[i][i];
    }
    Some(b)
}

/// The terms 1, t and √t at n ranks.
pub(crate) fn columns(n: usize) -> Vec<Vec<f64>> {
    let column = |f: fn(f64) -> f64| (0..n).map(|t| f(t as f64)).collect();
    vec![column(|_| 1.0), column(|t| t), column(f64::sqrt)]
}

/// Log-probabilities as real rows have them: steep first, then flat, in order.
pub(crate) fn row(n: usize, numbers: &mut Numbers) -> Vec<f32> {
    let steep = 0.3 + numbers.next();
    let mut value = -0.5 - 2.0 * numbers.next();
    let mut next = |t: usize| {
        value -= steep * numbers.next() / (1.0 + 0.3 * t as f64);
        value as f32
    };
    (0..n).map(&mut next).collect()
}
