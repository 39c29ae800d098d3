//! The four stored float types, always little-endian.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

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
    #[must_use]
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::Float16 => f16::from_f64(value).to_f64(),
            Self::Bfloat16 => bf16::from_f64(value).to_f64(),
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

    /// Rounds `value` and stores it at the start of `out`, returning the rest.
    ///
    /// `out` holds at least [`FloatType::size`] bytes: layouts are computed before anything is written.
    pub(crate) fn write(self, value: f64, out: &mut [u8]) -> &mut [u8] {
        let (here, rest) = out.split_at_mut(self.size());
        match self {
            Self::Float16 => here.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
            Self::Bfloat16 => here.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
            Self::Float32 => here.copy_from_slice(&(value as f32).to_le_bytes()),
            Self::Float64 => here.copy_from_slice(&value.to_le_bytes()),
        }
        rest
    }

    /// Reads the value at index `i` of a run of values of this type.
    #[inline]
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
