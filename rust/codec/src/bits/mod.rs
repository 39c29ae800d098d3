//! Packing of unsigned integers of 1–64 bits into bytes, most significant bit first.
//!
//! Value `i` of width `w` occupies bits `i·w … (i+1)·w − 1` of the stream; bit 0 is the most
//! significant bit of byte 0. The last byte is padded with zero bits. This is the published layout
//! of token ids and residual codes.
//!
//! Values are `u64`, or for widths up to 32 `u32`, which are half the memory to read and write; the
//! bytes are the same.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod pairs;
mod portable;

use std::slice;

use crate::error::{CodecError, Result};
use crate::simd::{Backend, Isa, Portable, multiversion};

/// Bytes that `count` values of `width` bits occupy.
#[must_use]
pub const fn packed_len(count: usize, width: u32) -> usize {
    (count * width as usize).div_ceil(8)
}

/// The integers that are packed: `u32` for widths of 1–32, `u64` for 1–64.
pub trait Value: private::Value {}

impl Value for u32 {}
impl Value for u64 {}

mod private {
    use std::fmt::Display;

    /// What the packers ask of a value, and what keeps other types out.
    pub trait Value: Copy + Default + Ord + Into<u64> + Display + 'static {
        /// The largest width.
        const BITS: u32;

        /// The low bits of `word`.
        fn low(word: u64) -> Self;

        /// For code that differs between the types.
        fn typed(values: &mut [Self]) -> ValuesMut<'_>;
    }

    /// Values of either type.
    #[derive(Debug)]
    pub enum ValuesMut<'a> {
        U32(&'a mut [u32]),
        U64(&'a mut [u64]),
    }

    impl Value for u32 {
        const BITS: u32 = u32::BITS;

        #[inline(always)]
        fn low(word: u64) -> Self {
            word as Self
        }

        #[inline(always)]
        fn typed(values: &mut [Self]) -> ValuesMut<'_> {
            ValuesMut::U32(values)
        }
    }

    impl Value for u64 {
        const BITS: u32 = u64::BITS;

        #[inline(always)]
        fn low(word: u64) -> Self {
            word
        }

        #[inline(always)]
        fn typed(values: &mut [Self]) -> ValuesMut<'_> {
            ValuesMut::U64(values)
        }
    }
}

fn check_width<V: Value>(width: u32) -> Result<()> {
    if (1..=V::BITS).contains(&width) {
        return Ok(());
    }
    Err(CodecError::Input(format!(
        "bit width {width} is not between 1 and {}, those of u{}",
        V::BITS,
        V::BITS
    )))
}

/// The largest value of `width` bits (1–64).
#[must_use]
pub const fn max_value(width: u32) -> u64 {
    u64::MAX >> (64 - width)
}

/// Packs `values` into `out`, which must be exactly [`packed_len`] bytes.
///
/// Fails with [`CodecError::Input`] when the width is not 1–64 (1–32 of `u32`), `out` has another
/// size, or a value has more than `width` bits; `out` is unspecified then.
pub fn pack<V: Value>(values: &[V], width: u32, out: &mut [u8]) -> Result<()> {
    pack_on(Backend::detect(), values, width, out)
}

/// [`pack`] with a chosen backend, which the CPU must have.
pub fn pack_on<V: Value>(backend: Backend, values: &[V], width: u32, out: &mut [u8]) -> Result<()> {
    check_width::<V>(width)?;
    let expected = packed_len(values.len(), width);
    if out.len() != expected {
        return Err(CodecError::Input(format!(
            "output of {} bytes, but {} values of {width} bits fill {expected}",
            out.len(),
            values.len()
        )));
    }
    let limit = max_value(width);
    if pack_values(backend, values, width, out) > limit {
        let i = values.iter().position(|&value| value.into() > limit).unwrap_or(0);
        return Err(CodecError::Input(format!(
            "value {} at index {i} does not fit into {width} bits",
            values[i]
        )));
    }
    Ok(())
}

/// Unpacks `out.len()` values of `width` bits from `data`.
///
/// Fails with [`CodecError::Input`] on a bad width, [`CodecError::Truncated`] when `data` is not
/// exactly [`packed_len`] bytes, and [`CodecError::Corrupt`] when a padding bit is set.
pub fn unpack<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> Result<()> {
    unpack_on(Backend::detect(), data, width, out)
}

/// [`unpack`] with a chosen backend, which the CPU must have.
pub fn unpack_on<V: Value>(backend: Backend, data: &[u8], width: u32, out: &mut [V]) -> Result<()> {
    check_width::<V>(width)?;
    let expected = packed_len(out.len(), width);
    if data.len() != expected {
        return Err(CodecError::Truncated {
            what: format!("{} packed values of {width} bits", out.len()),
            found: data.len(),
            expected,
        });
    }
    check_padding(data, out.len(), width)?;
    unpack_values(backend, data, width, out);
    Ok(())
}

multiversion! {
    /// Unpacks `out.len()` values of `width` bits (1 to those of `V`) from `data`, which has
    /// exactly [`packed_len`] bytes; padding bits are not looked at. Returns the largest value, 0
    /// if there is none.
    pub(crate) fn unpack_values<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> u64 =
        unpack_values_body;
}

multiversion! {
    /// [`unpack_ids_body`] by itself.
    #[cfg(test)]
    pub(crate) fn unpack_ids(data: &[u8], width: u32, out: &mut [i64]) -> u64 = unpack_ids_body;
}

multiversion! {
    /// Packs `values`, each of which fits into `width` bits (1 to those of `V`), into `out`, which
    /// has exactly [`packed_len`] bytes. Returns the OR of all values; with values that do not fit
    /// the bytes are unspecified.
    pub(crate) fn pack_values<V: Value>(values: &[V], width: u32, out: &mut [u8]) -> u64 =
        pack_values_body;
}

multiversion! {
    /// [`pack_ids_body`] by itself.
    #[cfg(test)]
    pub(crate) fn pack_ids(ids: &[i64], width: u32, out: &mut [u8]) -> u64 = pack_ids_body;
}

/// The packer of one instruction set. Widths are 1 to those of `V` and the bytes exactly
/// [`packed_len`]; both are checked before.
pub(crate) trait Packing: Isa {
    /// See [`unpack_values`].
    fn unpack<V: Value>(self, data: &[u8], width: u32, out: &mut [V]) -> u64;
    /// See [`pack_values`].
    fn pack<V: Value>(self, values: &[V], width: u32, out: &mut [u8]) -> u64;
}

impl Packing for Portable {
    #[inline(always)]
    fn unpack<V: Value>(self, data: &[u8], width: u32, out: &mut [V]) -> u64 {
        portable::unpack(data, width, out)
    }

    #[inline(always)]
    fn pack<V: Value>(self, values: &[V], width: u32, out: &mut [u8]) -> u64 {
        portable::pack(values, width, out)
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! packing {
    ($token:ident, $unpack:path, $pack:path) => {
        impl Packing for crate::simd::$token {
            #[inline(always)]
            fn unpack<V: Value>(self, data: &[u8], width: u32, out: &mut [V]) -> u64 {
                // SAFETY: the token proves that the CPU has the instructions.
                unsafe { $unpack(data, width, out) }
            }

            #[inline(always)]
            fn pack<V: Value>(self, values: &[V], width: u32, out: &mut [u8]) -> u64 {
                // SAFETY: as above. The packer of some instruction sets needs none of its
                // instructions.
                #[allow(unused_unsafe)]
                unsafe {
                    $pack(values, width, out)
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
packing!(Avx2, avx2::unpack, avx2::pack);
#[cfg(target_arch = "x86_64")]
packing!(Avx512, avx512::unpack, avx512::pack);
#[cfg(target_arch = "aarch64")]
packing!(Neon, neon::unpack, neon::pack);

/// The body of [`unpack_values`], for use in other bodies.
#[inline(always)]
pub(crate) fn unpack_values_body<I: Packing, V: Value>(
    isa: I,
    data: &[u8],
    width: u32,
    out: &mut [V],
) -> u64 {
    assert!(
        (1..=V::BITS).contains(&width) && data.len() == packed_len(out.len(), width),
        "width and size are checked before"
    );
    isa.unpack(data, width, out)
}

/// [`unpack_values_body`] for token ids, which the caller checks by the returned maximum.
#[inline(always)]
pub(crate) fn unpack_ids_body<I: Packing>(isa: I, data: &[u8], width: u32, out: &mut [i64]) -> u64 {
    // SAFETY: i64 and u64 have the same size and alignment, and every bit pattern is valid for
    // both.
    let out = unsafe { slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u64>(), out.len()) };
    unpack_values_body(isa, data, width, out)
}

/// The body of [`pack_values`], for use in other bodies.
#[inline(always)]
pub(crate) fn pack_values_body<I: Packing, V: Value>(
    isa: I,
    values: &[V],
    width: u32,
    out: &mut [u8],
) -> u64 {
    assert!(
        (1..=V::BITS).contains(&width) && out.len() == packed_len(values.len(), width),
        "width and size are checked before"
    );
    isa.pack(values, width, out)
}

/// [`pack_values_body`] for token ids that are already checked.
#[inline(always)]
pub(crate) fn pack_ids_body<I: Packing>(isa: I, ids: &[i64], width: u32, out: &mut [u8]) -> u64 {
    // SAFETY: i64 and u64 have the same size and alignment, and every bit pattern is valid for
    // both.
    let values = unsafe { slice::from_raw_parts(ids.as_ptr().cast::<u64>(), ids.len()) };
    pack_values_body(isa, values, width, out)
}

/// Whether a value of `width` bits may touch nine bytes. Values of 58 and 60 bits begin at even
/// bits, so those do not.
const fn nine_bytes(width: usize) -> bool {
    matches!(width, 59 | 61 | 62 | 63)
}

/// Whether a value of `width` ≤ 32 bits may touch five bytes. Values of 28 and 32 bits begin at
/// every fourth and eighth bit, so those do not.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn five_bytes(width: u32) -> bool {
    matches!(width, 27 | 29 | 30 | 31)
}

/// Refuses set padding bits after the last value; `data` is exactly [`packed_len`] bytes.
pub(crate) fn check_padding(data: &[u8], count: usize, width: u32) -> Result<()> {
    let used = (count * width as usize) % 8;
    match data.last() {
        Some(&last) if used > 0 && last << used != 0 => {
            Err(CodecError::Corrupt("padding bits after the last packed value are not zero".into()))
        }
        _ => Ok(()),
    }
}

/// Packs `value(0) … value(count − 1)`; widths and sizes are already checked, and every value fits.
#[inline]
pub(crate) fn pack_with(
    count: usize,
    width: u32,
    out: &mut [u8],
    mut value: impl FnMut(usize) -> u64,
) {
    // Its low `bits` bits are not written yet. There are at most 63 of them before a value is
    // added, so 127 are always enough.
    let mut pending: u128 = 0;
    let mut bits = 0;
    let mut at = 0;
    for i in 0..count {
        pending = (pending << width) | u128::from(value(i));
        bits += width;
        if bits >= 64 {
            bits -= 64;
            out[at..at + 8].copy_from_slice(&((pending >> bits) as u64).to_be_bytes());
            at += 8;
        }
    }
    if bits > 0 {
        let last = ((pending << (64 - bits)) as u64).to_be_bytes();
        let rest = bits.div_ceil(8) as usize;
        out[at..at + rest].copy_from_slice(&last[..rest]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Debug;

    /// The definition, bit by bit.
    fn naive_pack<V: Value>(values: &[V], width: u32) -> Vec<u8> {
        let mut out = vec![0; packed_len(values.len(), width)];
        for (i, &value) in values.iter().enumerate() {
            let value: u64 = value.into();
            for b in 0..width as usize {
                let bit = i * width as usize + b;
                out[bit / 8] |= (((value >> (width as usize - 1 - b)) & 1) as u8) << (7 - bit % 8);
            }
        }
        out
    }

    fn values<V: Value>(count: usize, width: u32) -> Vec<V> {
        let mixed =
            (1..=count as u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(i as u32));
        // The extremes show a neighbour's bits where they do not belong.
        mixed
            .enumerate()
            .map(|(i, value)| V::low([value, u64::MAX, 0, value][i % 7 % 4] & max_value(width)))
            .collect()
    }

    #[test]
    fn every_backend_width_and_count_equals_the_definition() {
        equals_the_definition::<u32>();
        equals_the_definition::<u64>();
    }

    fn equals_the_definition<V: Value + Debug>() {
        let counts = if cfg!(miri) {
            vec![0, 1, 7, 8, 17]
        } else {
            (0..70).chain([127, 128, 1000, 1024, 3001]).collect()
        };
        for (width, &count) in
            (1..=V::BITS).flat_map(|width| counts.iter().map(move |count| (width, count)))
        {
            let values = values::<V>(count, width);
            let expected = naive_pack(&values, width);
            let largest = values.iter().map(|&value| value.into()).max().unwrap_or(0);
            let any = values.iter().fold(0, |any, &value| any | value.into());
            for backend in Backend::available() {
                let case =
                    format!("{}, width {width} of u{}, count {count}", backend.name(), V::BITS);
                // One byte and value more than is used, to see that it stays.
                let mut packed = vec![0xA5; expected.len() + 1];
                assert_eq!(
                    pack_values(backend, &values, width, &mut packed[..expected.len()]),
                    any,
                    "{case}"
                );
                assert_eq!(
                    (&packed[..expected.len()], packed[expected.len()]),
                    (&expected[..], 0xA5),
                    "{case}"
                );
                let mut back = vec![V::low(7); count + 1];
                assert_eq!(
                    unpack_values(backend, &expected, width, &mut back[..count]),
                    largest,
                    "{case}"
                );
                assert_eq!((&back[..count], back[count]), (&values[..], V::low(7)), "{case}");
            }
        }
    }

    #[test]
    fn ids_are_the_same_bits() {
        for backend in Backend::available() {
            let ids = [131_071, 0, 65_536, 5, 99_999];
            let mut packed = [0; 11];
            let mut back = [0; 5];
            pack_ids(backend, &ids, 17, &mut packed);
            assert_eq!(packed.to_vec(), naive_pack(&ids.map(|id| id as u64), 17));
            assert_eq!(unpack_ids(backend, &packed, 17, &mut back), 131_071);
            assert_eq!(back, ids);
        }
    }

    #[test]
    fn every_prefix_is_truncated() {
        prefixes_are_truncated::<u32>();
        prefixes_are_truncated::<u64>();
    }

    fn prefixes_are_truncated<V: Value>() {
        for width in (1..=V::BITS).step_by(if cfg!(miri) { 9 } else { 1 }) {
            let packed = naive_pack(&values::<V>(21, width), width);
            for backend in Backend::available() {
                for end in 0..packed.len() {
                    let result = unpack_on(backend, &packed[..end], width, &mut [V::default(); 21]);
                    let what = format!("21 packed values of {width} bits");
                    let expected = packed.len();
                    assert_eq!(result, Err(CodecError::Truncated { what, found: end, expected }));
                }
            }
        }
    }

    #[test]
    fn refusals() {
        refuses::<u32>();
        refuses::<u64>();
        let message = unpack(&[0; 5], 33, &mut [0u32]).unwrap_err().to_string();
        assert_eq!(message, "bit width 33 is not between 1 and 32, those of u32");
    }

    fn refuses<V: Value>() {
        let zero = V::default();
        let one = V::low(1);
        assert!(matches!(pack(&[V::low(4)], 2, &mut [0]), Err(CodecError::Input(_))));
        for width in [0, V::BITS + 1] {
            assert!(matches!(pack(&[one], width, &mut [0]), Err(CodecError::Input(_))));
            assert!(matches!(unpack(&[0], width, &mut [one]), Err(CodecError::Input(_))));
        }
        assert!(matches!(pack(&[one], 2, &mut [0, 0]), Err(CodecError::Input(_))));
        assert!(matches!(unpack(&[0, 0], 2, &mut [zero]), Err(CodecError::Truncated { .. })));
        assert!(matches!(unpack(&[1], 2, &mut [zero]), Err(CodecError::Corrupt(_))));
    }

    #[test]
    fn a_value_that_does_not_fit_is_named() {
        names_what_does_not_fit::<u32>();
        names_what_does_not_fit::<u64>();
    }

    fn names_what_does_not_fit<V: Value>() {
        for (width, backend) in (1..V::BITS)
            .flat_map(|width| Backend::available().into_iter().map(move |backend| (width, backend)))
        {
            for (at, large) in [0, 8, 70, 99]
                .into_iter()
                .flat_map(|at| [(at, u64::MAX >> (64 - V::BITS)), (at, 1 << width)])
            {
                let mut values = values::<V>(100, width);
                values[at] = V::low(large);
                let message =
                    pack_on(backend, &values, width, &mut vec![0; packed_len(100, width)])
                        .unwrap_err()
                        .to_string();
                assert_eq!(
                    message,
                    format!("value {large} at index {at} does not fit into {width} bits")
                );
            }
        }
    }

    /// What all backends unpack `data` to, if it is the only packing of that, or refuse it with.
    fn unpacked_by_all<V: Value + Debug>(
        data: &[u8],
        width: u32,
        count: usize,
    ) -> Result<Vec<u64>> {
        let mut portable = vec![V::default(); count];
        let expected = unpack_on(Backend::Portable, data, width, &mut portable);
        for backend in Backend::available() {
            let mut back = vec![V::default(); count];
            assert_eq!(unpack_on(backend, data, width, &mut back), expected);
            assert_eq!(back, portable);
        }
        expected?;
        assert_eq!(naive_pack(&portable, width), data);
        Ok(portable.into_iter().map(Into::into).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn arbitrary_bytes(
            width in 1u32..=64,
            data in proptest::collection::vec(any::<u8>(), 0..200),
            spare in 0usize..8,
        ) {
            // As many values as the bytes hold, and sometimes fewer: then padding bits or bytes are
            // left.
            let count = (data.len() * 8 / width as usize).saturating_sub(spare);
            let unpacked = unpacked_by_all::<u64>(&data, width, count);
            if width <= 32 {
                prop_assert_eq!(unpacked_by_all::<u32>(&data, width, count), unpacked);
            }
        }
    }
}
