//! Exponentials, logarithms and sums of float64 numbers.
//!
//! Plain arithmetic without branches, which the compiler turns into vectors of the instruction set
//! that the caller was compiled for. As in [`lanes`](super::lanes), every operation is rounded by
//! itself and sums have a fixed order, so results are the same bits on every machine, which those
//! of the system's `exp` and `ln` are not.

/// Numbers that are added up side by side.
pub(crate) const LANES: usize = 8;
/// Adding and subtracting this rounds to an integer, which is then in the low bits of the sum.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 = `LN_2_HIGH` + `LN_2_LOW`; the first has 20 zeros at its end, so that its products with the
/// exponents of numbers are exact.
const LN_2_HIGH: f64 = f64::from_bits(std::f64::consts::LN_2.to_bits() & !0xf_ffff);
const LN_2_LOW: f64 = 7.440_617_110_012_397e-11;

/// eˣ with a relative error below 1e-15 for −708 ≤ x ≤ 709; 0 below, e⁷⁰⁹ above, NaN for NaN.
///
/// eˣ = 2ⁿ·eʳ with n the integer nearest to x / ln 2, and the series Σ rⁱ / i! for |r| ≤ ½ ln 2.
#[inline(always)]
pub(crate) fn exp(x: f64) -> f64 {
    /// 1 / i! from i = 13 down to 2.
    const SERIES: [f64; 12] = {
        let mut terms = [0.0; 12];
        let (mut i, mut factorial) = (0, 1.0);
        while i < 12 {
            factorial *= (i + 2) as f64;
            terms[11 - i] = 1.0 / factorial;
            i += 1;
        }
        terms
    };
    let bounded = if x > 709.0 { 709.0 } else { x };
    let shifted = bounded * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (bounded - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut sum = 0.0;
    for term in SERIES {
        sum = sum * r + term;
    }
    let sum = (sum * r + 1.0) * r + 1.0;
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x < -708.0 { 0.0 } else { sum * power }
}

/// ln x with a relative error below 1e-15; x must be positive and normal.
///
/// ln x = n ln 2 + ln m with √½ ≤ m < √2, and ln m = 2 artanh s = 2 Σ s²ⁱ⁺¹ / (2i + 1) for
/// s = (m − 1) / (m + 1), |s| < 0.172.
#[inline(always)]
pub(crate) fn ln(x: f64) -> f64 {
    const ONE: u64 = 1.0_f64.to_bits();
    /// 2⁵²: integers from there on are this and their low bits.
    const BASE: f64 = 4_503_599_627_370_496.0;
    /// From the last term down to that of s³.
    const SERIES: [f64; 10] = {
        let mut terms = [0.0; 10];
        let mut i = 0;
        while i < 10 {
            terms[i] = 2.0 / (21 - 2 * i) as f64;
            i += 1;
        }
        terms
    };
    // n and 1023, as AVX2 has no shift that keeps the sign.
    let biased = (x.to_bits() + (ONE - std::f64::consts::FRAC_1_SQRT_2.to_bits())) >> 52;
    let n = f64::from_bits(BASE.to_bits() | biased) - (BASE + 1023.0);
    let m = f64::from_bits(x.to_bits().wrapping_sub(biased << 52).wrapping_add(ONE));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut sum = 0.0;
    for term in SERIES {
        sum = sum * square + term;
    }
    n * LN_2_HIGH + (2.0 * s + (s * square * sum + n * LN_2_LOW))
}

/// The sum of the numbers.
#[inline(always)]
pub(crate) fn sum(values: &[f64]) -> f64 {
    sum_of(values, |&value| value)
}

/// The sum of what is found of each item.
#[inline(always)]
pub(crate) fn sum_of<T>(items: &[T], find: impl Fn(&T) -> f64) -> f64 {
    let (vectors, rest) = items.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for vector in vectors {
        for lane in 0..LANES {
            sums[lane] += find(&vector[lane]);
        }
    }
    total(sums) + rest.iter().map(find).sum::<f64>()
}

/// The sum of the lanes, halves first.
#[inline(always)]
pub(crate) fn total<const N: usize>(mut lanes: [f64; N]) -> f64 {
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Backend, multiversion};

    #[inline(always)]
    fn both_body<I>(_isa: I, values: &[f64], exps: &mut [f64], lns: &mut [f64]) -> f64 {
        for ((&value, exp_of), ln_of) in values.iter().zip(&mut *exps).zip(lns) {
            *exp_of = exp(value);
            *ln_of = ln(value.abs());
        }
        sum(exps)
    }

    multiversion! {
        fn both(values: &[f64], exps: &mut [f64], lns: &mut [f64]) -> f64 = both_body;
    }

    /// Numbers over all that either takes, and densely where most are.
    fn values() -> Vec<f64> {
        let spread = (0..=100_000).map(|i| -708.0 + 1417.0 * f64::from(i) / 100_000.0);
        let usual = (0..100_000).map(|i| -20.0 * (f64::from(i) + 0.3) / 100_000.0);
        let tiny = (1..300).map(|i| -f64::exp2(f64::from(-i)));
        let near_one =
            (1..60).flat_map(|i| [1.0 - f64::exp2(-f64::from(i)), 1.0 + f64::exp2(-f64::from(i))]);
        spread.chain(usual).chain(tiny).chain(near_one).filter(|x| x.abs() > 1e-300).collect()
    }

    #[test]
    fn exp_and_ln_are_close_and_the_same_on_every_backend() {
        let values = values();
        let (mut exps, mut lns) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        let added = both(Backend::Portable, &values, &mut exps, &mut lns);
        for ((&x, exp), ln) in values.iter().zip(&exps).zip(&lns) {
            assert!((exp / x.exp() - 1.0).abs() < 1e-15, "exp {x}: {exp}");
            let exact = x.abs().ln();
            assert!((ln - exact).abs() <= 1e-15 * exact.abs(), "ln {x}: {ln}");
        }
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = (added.to_bits(), bits(&exps), bits(&lns));
        for backend in Backend::available() {
            let added = both(backend, &values, &mut exps, &mut lns);
            assert_eq!((added.to_bits(), bits(&exps), bits(&lns)), expected, "{}", backend.name());
        }
    }

    #[test]
    fn ends() {
        assert_eq!((exp(0.0), exp(f64::NEG_INFINITY), exp(-709.0), ln(1.0)), (1.0, 0.0, 0.0, 0.0));
        assert!(exp(f64::NAN).is_nan() && exp(f64::INFINITY) > 8e307);
        assert!((ln(f64::MIN_POSITIVE) / f64::MIN_POSITIVE.ln() - 1.0).abs() < 1e-15);
        assert!((ln(f64::MAX) / f64::MAX.ln() - 1.0).abs() < 1e-15);
        assert_eq!(LN_2_HIGH + LN_2_LOW, std::f64::consts::LN_2);
        assert_eq!(sum(&[1.0; 37]), 37.0);
    }
}
