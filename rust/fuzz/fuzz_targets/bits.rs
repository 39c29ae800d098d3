//! Bit packing, on every backend: any values round-trip, and any bytes are refused or the only
//! packing of what they unpack to.
#![no_main]

use std::fmt::Debug;

use distillkit_codec::bits::{Value, max_value, pack_on, packed_len, unpack_on};
use distillkit_codec::{Backend, CodecError};
use libfuzzer_sys::fuzz_target;

/// Integers of either type.
trait Integer: Value + Copy + Default + Debug + PartialEq + Into<u64> + TryFrom<u64> {}
impl<T: Value + Copy + Default + Debug + PartialEq + Into<u64> + TryFrom<u64>> Integer for T {}

/// `value`, if it is one of the type's.
fn integer<T: Integer>(value: u64) -> Option<T> {
    value.try_into().ok()
}

/// Packs and unpacks `values`, which may not fit into `width` bits; returns the bytes of their low
/// bits.
fn round_trip<T: Integer>(backend: Backend, values: &[T], width: u32) -> Vec<u8> {
    let mut packed = vec![0xFF; packed_len(values.len(), width)];
    let fits = values.iter().all(|&value| value.into() <= max_value(width));
    assert_eq!(pack_on(backend, values, width, &mut packed).is_ok(), fits);
    let values: Vec<T> =
        values.iter().filter_map(|&value| integer(value.into() & max_value(width))).collect();
    pack_on(backend, &values, width, &mut packed).expect("values of this width pack");
    let mut back = vec![T::default(); values.len()];
    unpack_on(backend, &packed, width, &mut back).expect("packed values unpack");
    assert_eq!(back, values);
    packed
}

/// Unpacks any bytes as `count` values.
fn unpack_any<T: Integer>(
    backend: Backend,
    data: &[u8],
    width: u32,
    count: usize,
) -> Option<Vec<u64>> {
    let mut values = vec![T::default(); count];
    match unpack_on(backend, data, width, &mut values) {
        Ok(()) => {
            let mut again = vec![0xFF; data.len()];
            pack_on(backend, &values, width, &mut again).expect("unpacked values pack");
            assert_eq!(again, data);
            return Some(values.into_iter().map(Into::into).collect());
        }
        Err(CodecError::Truncated { found, expected, .. }) => {
            assert_eq!((found, expected), (data.len(), packed_len(count, width)));
            assert_ne!(found, expected);
        }
        Err(CodecError::Corrupt(_)) => assert_ne!(count * width as usize % 8, 0),
        Err(other) => panic!("bytes are refused with {other:?}"),
    }
    None
}

/// What every backend packs `values` to and unpacks `count` values of `data` to: all the same.
fn on_all<T: Integer>(
    values: &[T],
    data: &[u8],
    width: u32,
    count: usize,
) -> (Vec<u8>, Option<Vec<u64>>) {
    let on = |backend| {
        (round_trip(backend, values, width), unpack_any::<T>(backend, data, width, count))
    };
    let portable = on(Backend::Portable);
    assert!(
        Backend::available().into_iter().all(|backend| on(backend) == portable),
        "the backends differ"
    );
    portable
}

fuzz_target!(|input: (u8, u8, Vec<u64>, Vec<u8>)| {
    let (width, extra, values, data) = input;
    let width = u32::from(width) % 67;
    let narrow: Vec<u32> = values.iter().map(|&value| value as u32).collect();
    if !(1..=32).contains(&width) {
        assert!(matches!(
            pack_on(Backend::Portable, &narrow, width, &mut []),
            Err(CodecError::Input(_))
        ));
        assert!(matches!(
            unpack_on(Backend::Portable, &data, width, &mut narrow.clone()),
            Err(CodecError::Input(_))
        ));
    }
    if !(1..=64).contains(&width) {
        assert!(matches!(
            pack_on(Backend::Portable, &values, width, &mut []),
            Err(CodecError::Input(_))
        ));
        assert!(matches!(
            unpack_on(Backend::Portable, &data, width, &mut values.clone()),
            Err(CodecError::Input(_))
        ));
        return;
    }
    // One value too many now and then.
    let count = data.len() * 8 / width as usize + usize::from(extra == 0);
    let results = on_all(&values, &data, width, count);
    if width <= 32 {
        assert_eq!(on_all(&narrow, &data, width, count), results, "u32 and u64 differ");
    }
});
