//! The four stored float types, always little-endian.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::simd::lanes::all_finite;

/// xⁿ by squaring: std's `powi` rounds differently from machine to machine.
pub(crate) fn power(x: f64, n: i32) -> f64 {
    let mut result = 1.0;
    let mut square = x;
    let mut left = n.unsigned_abs();
    loop {
        if left % 2 == 1 {
            result *= square;
        }
        left /= 2;
        if left == 0 {
            return if n < 0 { 1.0 / result } else { result };
        }
        square *= square;
    }
}

/// The float32 that rounds to every narrower type as `value` does: cut off, with the last bit set
/// where that is not exact (Boldo and Melquiond 2008). Direct conversions from float64 differ
/// between machines: some round twice, some do not see the lowest bits.
#[inline(always)]
fn to_odd(value: f64) -> f32 {
    let narrow = value as f32;
    let wide = f64::from(narrow);
    if wide == value {
        return narrow;
    }
    f32::from_bits((narrow.to_bits() - u32::from(wide.abs() > value.abs())) | 1)
}

/// The bfloat16 nearest to a value that is not NaN, ties to even: every bfloat16 and every value
/// between two of them is a float32.
///
/// Half a step is added (a bit less where the last kept bit is even), what is below the kept bits
/// is cut off.
#[inline(always)]
pub(crate) fn nearest_bfloat16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000)
}

/// A stored float type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// IEEE binary16.
    Float16,
    /// bfloat16: the upper half of a binary32.
    Bfloat16,
    /// IEEE binary32.
    Float32,
    /// IEEE binary64.
    Float64,
}

impl FloatType {
    /// Bytes of one value.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }

    /// The nearest representable value, ties to even; too large becomes infinite.
    #[inline(always)]
    #[must_use]
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::Float16 => f16::from_f32(to_odd(value)).to_f64(),
            Self::Bfloat16 => {
                let narrow = to_odd(value);
                if narrow.is_nan() {
                    return value;
                }
                f64::from(nearest_bfloat16(narrow))
            }
            Self::Float32 => f64::from(value as f32),
            Self::Float64 => value,
        }
    }

    /// The largest finite value.
    #[must_use]
    pub fn max(self) -> f64 {
        match self {
            Self::Float16 => f16::MAX.to_f64(),
            Self::Bfloat16 => bf16::MAX.to_f64(),
            Self::Float32 => f64::from(f32::MAX),
            Self::Float64 => f64::MAX,
        }
    }

    /// The smallest positive value, subnormals included.
    #[must_use]
    pub fn smallest_positive(self) -> f64 {
        match self {
            Self::Float16 => f16::from_bits(1).to_f64(),
            Self::Bfloat16 => bf16::from_bits(1).to_f64(),
            Self::Float32 => f64::from(f32::from_bits(1)),
            Self::Float64 => f64::from_bits(1),
        }
    }

    /// The next representable value below a finite `value` that is of this type already.
    #[inline(always)]
    pub(crate) fn next_down(self, value: f64) -> f64 {
        // The bits of a positive float count up with it, those of a negative one down.
        let down = |bits: u16| {
            if bits == 0 {
                0x8001
            } else if bits & 0x8000 == 0 {
                bits - 1
            } else {
                bits + 1
            }
        };
        match self {
            Self::Float16 => f16::from_bits(down(f16::from_f64(value).to_bits())).to_f64(),
            Self::Bfloat16 => f64::from(f32::from_bits(
                u32::from(down(((value as f32).to_bits() >> 16) as u16)) << 16,
            )),
            Self::Float32 => f64::from((value as f32).next_down()),
            Self::Float64 => value.next_down(),
        }
    }

    /// The next representable value above a finite `value` that is of this type already.
    #[inline(always)]
    pub(crate) fn next_up(self, value: f64) -> f64 {
        -self.next_down(-value)
    }

    /// Stores a `value` of this type at the start of `out`, returning the rest; other values are
    /// rounded, to bfloat16 towards 0.
    ///
    /// `out` holds at least [`FloatType::size`] bytes: layouts are computed before anything is
    /// written.
    #[inline(always)]
    pub(crate) fn write(self, value: f64, out: &mut [u8]) -> &mut [u8] {
        let (here, rest) = out.split_at_mut(self.size());
        match self {
            Self::Float16 => here.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
            Self::Bfloat16 => {
                here.copy_from_slice(&(((value as f32).to_bits() >> 16) as u16).to_le_bytes());
            }
            Self::Float32 => here.copy_from_slice(&(value as f32).to_le_bytes()),
            Self::Float64 => here.copy_from_slice(&value.to_le_bytes()),
        }
        rest
    }

    /// Appends [`FloatType::round`] of each value.
    #[inline(always)]
    pub(crate) fn round_all(self, values: &[f32], out: &mut Vec<f64>) {
        match self {
            Self::Bfloat16 if all_finite(values) => {
                out.extend(values.iter().map(|&value| f64::from(nearest_bfloat16(value))));
            }
            Self::Bfloat16 | Self::Float16 => {
                out.extend(values.iter().map(|&value| self.round(f64::from(value))));
            }
            Self::Float32 | Self::Float64 => {
                out.extend(values.iter().map(|&value| f64::from(value)));
            }
        }
    }

    /// [`FloatType::write`] of each value.
    #[inline(always)]
    pub(crate) fn write_all<'a>(self, values: &[f64], out: &'a mut [u8]) -> &'a mut [u8] {
        let (here, rest) = out.split_at_mut(values.len() * self.size());
        match self {
            Self::Bfloat16 => {
                for (out, &value) in here.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *out = (((value as f32).to_bits() >> 16) as u16).to_le_bytes();
                }
            }
            Self::Float32 => {
                for (out, &value) in here.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *out = (value as f32).to_le_bytes();
                }
            }
            Self::Float16 | Self::Float64 => {
                for (out, &value) in here.chunks_exact_mut(self.size()).zip(values) {
                    self.write(value, out);
                }
            }
        }
        rest
    }

    /// Reads a run of values of this type as float32, one for each of `out`.
    #[inline(always)]
    pub(crate) fn read_all(self, data: &[u8], out: &mut [f32]) {
        if self == Self::Bfloat16 {
            for (out, bytes) in out.iter_mut().zip(data.chunks_exact(2)) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
            }
            return;
        }
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.read(data, i) as f32;
        }
    }

    /// Reads the value at index `i` of a run of values of this type.
    #[inline(always)]
    pub(crate) fn read(self, data: &[u8], i: usize) -> f64 {
        match self {
            Self::Float16 => f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f64(),
            Self::Bfloat16 => bf16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f64(),
            Self::Float32 => {
                let mut bytes = [0; 4];
                bytes.copy_from_slice(&data[4 * i..4 * i + 4]);
                f64::from(f32::from_le_bytes(bytes))
            }
            Self::Float64 => {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&data[8 * i..8 * i + 8]);
                f64::from_le_bytes(bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_once() {
        for (dtype, half_step) in
            [(FloatType::Float16, 2f64.powi(-11)), (FloatType::Bfloat16, 2f64.powi(-8))]
        {
            let tie = 1.0 + half_step;
            for sign in [1.0, -1.0] {
                assert_eq!(dtype.round(sign * tie), sign, "ties to even");
                // Below the last bit of a float32, and below that of the 32 upper bits of a
                // float64.
                for little in [2f64.powi(-30), 2f64.powi(-50)] {
                    assert_eq!(dtype.round(sign * (tie - little)), sign);
                    assert_eq!(dtype.round(sign * (tie + little)), sign * (1.0 + 2.0 * half_step));
                }
            }
            assert_eq!(dtype.round(f64::MAX), f64::INFINITY);
            assert_eq!(dtype.round(1e-300), 0.0);
            assert!(dtype.round(f64::NAN).is_nan());
        }
    }

    #[test]
    fn powers() {
        assert_eq!((power(3.0, 5), power(2.0, -2), power(0.0, 0)), (243.0, 0.25, 1.0));
    }
}
