//! Sixteen float32 numbers at a time, each of another row.
//!
//! Plain arithmetic on arrays, which the compiler turns into the vectors of the instruction set
//! that the caller was compiled for. A lane never sees another lane, every operation is rounded by
//! itself (no fused multiply-add), and so a row's result depends neither on the machine nor on the
//! rows beside it.

use std::ops::{Add, AddAssign, Div, Mul, Sub, SubAssign};

/// Rows of a group.
pub(crate) const LANES: usize = 16;

/// One number for each row of a group.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Default for Lanes {
    fn default() -> Self {
        Self::ZERO
    }
}

impl Lanes {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);

    #[inline(always)]
    pub(crate) const fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self;
        for lane in 0..LANES {
            out.0[lane] = f(self.0[lane], other.0[lane]);
        }
        out
    }

    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        self.zip(self, |a, _| f(a))
    }

    #[inline(always)]
    pub(crate) fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    pub(crate) fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    pub(crate) fn abs(self) -> Self {
        self.map(f32::abs)
    }

    #[inline(always)]
    pub(crate) fn sqrt(self) -> Self {
        self.map(f32::sqrt)
    }

    /// `yes` where `self` ≥ `other`, else (and where one is NaN) `no`.
    #[inline(always)]
    pub(crate) fn where_not_less(self, other: Self, yes: Self, no: Self) -> Self {
        let mut out = no;
        for lane in 0..LANES {
            out.0[lane] = if self.0[lane] >= other.0[lane] { yes.0[lane] } else { no.0[lane] };
        }
        out
    }

    /// The sum of the numbers, halves first.
    #[inline(always)]
    pub(crate) fn total(self) -> f32 {
        let mut lanes = self;
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes.0[lane] += lanes.0[lane + width];
            }
            width /= 2;
        }
        lanes.0[0]
    }

    /// The largest of the numbers, none of which is NaN.
    #[inline(always)]
    pub(crate) fn largest(self) -> f32 {
        let mut lanes = self;
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes.0[lane] = larger(lanes.0[lane], lanes.0[lane + width]);
            }
            width /= 2;
        }
        lanes.0[0]
    }

    /// `yes` where `self` > `other`, else `no`.
    #[inline(always)]
    pub(crate) fn where_greater(self, other: Self, yes: Self, no: Self) -> Self {
        let mut out = no;
        for lane in 0..LANES {
            out.0[lane] = if self.0[lane] > other.0[lane] { yes.0[lane] } else { no.0[lane] };
        }
        out
    }

    /// eˣ by [`exp`].
    #[inline(always)]
    pub(crate) fn exp(self) -> Self {
        self.map(exp)
    }
}

/// Marks the body of a loop whose steps are vectors already ([`Lanes`] of a rank, a chunk): keeps
/// the compiler from making vectors across steps, which it would have to shuffle into. No
/// instruction; Miri and other targets go without.
#[inline(always)]
pub(crate) fn no_unroll() {
    #[cfg(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
    // SAFETY: there is no code in it, and it touches neither memory, nor the stack, nor flags.
    unsafe {
        std::arch::asm!("", options(nomem, nostack, preserves_flags));
    }
}

macro_rules! operator {
    ($($trait:ident $method:ident $op:tt),*) => {$(
        impl $trait for Lanes {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, |a, b| a $op b)
            }
        }
    )*};
}
operator!(Add add +, Sub sub -, Mul mul *, Div div /);

impl AddAssign for Lanes {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for Lanes {
    #[inline(always)]
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

/// Exponents below this count as this.
pub(crate) const LEAST_EXPONENT: f32 = -87.0;
/// 2ᶠ ≈ ((a·f + b)·f² + (c·f + d))·f² + (e·f + 1) as ((a, b), (c, d), (e, 1)).
pub(crate) const POLYNOMIAL: [(f32, f32); 3] =
    [(1.326_696_8e-3, 9.675_462e-3), (5.550_742_6e-2, 0.240_221_22), (0.693_146_95, 1.0)];

/// eˣ for x ≤ 88 with a relative error below 1e-7·(3 + |x|); e⁻⁸⁷ = 1.6e-38 for less, NaN for NaN.
///
/// eˣ = 2ⁿ·2ᶠ with n the integer nearest to x·log₂ e and |f| ≤ ½, and a polynomial of degree 5 for
/// 2ᶠ (least relative error on that interval, but 1 at 0). Plain arithmetic without branches: it
/// vectorises, and gives the same bits on every machine.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting this rounds to an integer, which is then in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let t = (if x < LEAST_EXPONENT { LEAST_EXPONENT } else { x }) * std::f32::consts::LOG2_E;
    let shifted = t + ROUND;
    let f = t - (shifted - ROUND);
    // Pairs first (Estrin): the parts of a vector wait for each other less.
    let square = f * f;
    let [fifth, third, first] = POLYNOMIAL.map(|(high, low)| high * f + low);
    let sum = (fifth * square + third) * square + first;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127).wrapping_shl(23));
    sum * power
}

/// The larger one; `a` where `b` is NaN.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Whether no value is infinite or NaN.
#[inline(always)]
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values
        .iter()
        .fold(true, |finite, value| finite & (value.to_bits() << 1 < f32::INFINITY.to_bits() << 1))
}

/// Σ eˣ over the values, each at most 88.
#[inline(always)]
pub(crate) fn sum_exp(values: &[f32]) -> f64 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let mut sums = Lanes::ZERO;
    for vector in vectors {
        no_unroll();
        sums += Lanes(*vector).exp();
    }
    if let (Some(last), false) = (values.last_chunk::<LANES>(), rest.is_empty()) {
        sums += last_of(last, rest.len()).exp();
        return f64::from(sums.total());
    }
    let mut sum = sums.total();
    for &value in rest {
        no_unroll();
        sum += exp(value);
    }
    f64::from(sum)
}

/// Whether the values do not increase (false where one is NaN), and Σ eˣ over them, which is
/// meaningless where one is above 88.
#[inline(always)]
pub(crate) fn order_and_mass(values: &[f32]) -> (bool, f64) {
    let mut unordered = [0u32; LANES];
    let pairs = values.len().saturating_sub(1);
    let mut at = 0;
    while at + LANES <= pairs {
        no_unroll();
        mark_increasing(&values[at..], &mut unordered);
        at += LANES;
    }
    let mut ordered = true;
    if at < pairs && pairs >= LANES {
        mark_increasing(&values[pairs - LANES..], &mut unordered);
    } else {
        for t in at..pairs {
            no_unroll();
            ordered &= values[t] >= values[t + 1];
        }
    }
    let known = values.first().is_none_or(|first| !first.is_nan());
    (known && ordered && unordered.iter().fold(0, |any, lane| any | lane) == 0, sum_exp(values))
}

/// Sets where a value is not at least the one after it.
#[inline(always)]
fn mark_increasing(values: &[f32], marks: &mut [u32; LANES]) {
    let after = &values[1..=LANES];
    for lane in 0..LANES {
        // NaN is in no order.
        let ordered = values[lane] >= after[lane];
        marks[lane] |= u32::from(!ordered);
    }
}

/// The last `count` of the values, and −∞ in place of those before.
#[inline(always)]
fn last_of(values: &[f32; LANES], count: usize) -> Lanes {
    let mut lanes = Lanes(*values);
    for (lane, value) in lanes.0.iter_mut().enumerate() {
        *value = if lane + count >= LANES { *value } else { f32::NEG_INFINITY };
    }
    lanes
}

/// Asks for what will be read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(all(not(miri), target_arch = "x86_64"))]
    for line in values.chunks((64 / size_of::<T>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint; it reads nothing, and every x86-64 CPU has it.
        unsafe { _mm_prefetch::<{ _MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(all(not(miri), target_arch = "x86_64")))]
    let _ = values;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in 0..300_000 {
            let x = 40.0 - 127.0 * (i as f32 / 300_000.0);
            let exact = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) / exact - 1.0).abs() < 1e-7 * (3.0 + f64::from(x.abs())),
                "{x}"
            );
        }
        assert!(exp(-1e30) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
    }
}
