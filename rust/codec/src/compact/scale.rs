//! The scale of values: levels evenly spaced in the square root of a probability where that
//! matters, in the log-probability below.

use super::config::MAX_LEVELS;

/// Where the scale ends: smaller log-probabilities are stored as this.
const LEAST: f64 = -20.0;

/// Levels at half the step: each of the two quantisers has every other one.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// Half the step, in √p.
    half: f64,
    /// √p where the linear part of the scale begins; level `tail` lies there.
    from: f64,
    /// Levels below `from`, one nat apart.
    tail: usize,
    /// Number of levels.
    count: usize,
    /// 2 ln `from`, `from` and 1 / `half`, as [`Scale::place`] uses them.
    rounded: [f32; 3],
}

impl Scale {
    /// The scale of a step in √p.
    #[must_use]
    pub fn new(step: f64) -> Self {
        let half = step / 2.0;
        // Here a step of √p is one of 2 nats.
        let from = step;
        let tail = libm::ceil(2.0 * libm::log(from) - LEAST).max(0.0) as usize;
        let above = libm::ceil((1.0 - from) / half) as usize;
        // Each quantiser must be able to reach the top.
        Self {
            half,
            from,
            tail,
            count: (tail + above + 2).min(MAX_LEVELS),
            rounded: [2.0 * libm::log(from), from, 1.0 / half].map(|x| x as f32),
        }
    }

    /// Number of levels.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// The log-probability that a level stands for, before any learning.
    #[must_use]
    pub fn nominal(&self, level: usize) -> f64 {
        if level < self.tail {
            2.0 * libm::log(self.from) - (self.tail - level) as f64
        } else {
            (2.0 * libm::log(self.from + (level - self.tail) as f64 * self.half)).min(0.0)
        }
    }

    /// [`Scale::nominal`] of every level, as float32, strictly ascending.
    #[must_use]
    pub fn nominals(&self) -> Vec<f32> {
        let mut levels: Vec<f32> =
            (0..self.count).map(|level| self.nominal(level) as f32).collect();
        // The last ones are at 0.
        for level in (1..levels.len()).rev() {
            if levels[level - 1] >= levels[level] {
                levels[level - 1] = levels[level].next_down();
            }
        }
        levels
    }

    /// Where a value lies among the levels, as a fraction; `root` is √p, `logprob` its logarithm
    /// times two.
    #[inline(always)]
    pub(super) fn place(&self, logprob: f32, root: f32) -> f32 {
        let [from_logprob, from, per_level] = self.rounded;
        let place = if root >= from {
            self.tail as f32 + (root - from) * per_level
        } else {
            self.tail as f32 + (logprob - from_logprob)
        };
        place.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_lies_at_its_place() {
        for step in [0.0005, 0.003, 0.0107, 0.25] {
            let scale = Scale::new(step);
            let levels = scale.nominals();
            assert!(levels.windows(2).all(|pair| pair[0] < pair[1]), "{step}");
            assert!(levels[levels.len() - 1] <= 0.0);
            for (level, &logprob) in levels.iter().enumerate().take(levels.len() - 3) {
                let place = scale.place(logprob, (logprob / 2.0).exp());
                assert!((place - level as f32).abs() < 0.02, "{step}: {level} at {place}");
            }
        }
    }
}
