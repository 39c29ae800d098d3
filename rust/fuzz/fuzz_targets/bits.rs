//! Bit packing, on every backend: any values round-trip, and any bytes are refused or the only packing of what they unpack to.
#![no_main]

use distillkit_codec::bits::{max_value, pack_on, packed_len, unpack_on};
use distillkit_codec::{Backend, CodecError};
use libfuzzer_sys::fuzz_target;

/// Packs and unpacks `values`, which may not fit into `width` bits; returns the bytes of their low bits.
fn round_trip(backend: Backend, values: &[u64], width: u32) -> Vec<u8> {
    let mut packed = vec![0xFF; packed_len(values.len(), width)];
    let fits = values.iter().all(|&value| value <= max_value(width));
    assert_eq!(pack_on(backend, values, width, &mut packed).is_ok(), fits);
    let values: Vec<u64> = values.iter().map(|value| value & max_value(width)).collect();
    pack_on(backend, &values, width, &mut packed).expect("values of this width pack");
    let mut back = vec![0; values.len()];
    unpack_on(backend, &packed, width, &mut back).expect("packed values unpack");
    assert_eq!(back, values);
    packed
}

/// Unpacks any bytes as `count` values.
fn unpack_any(backend: Backend, data: &[u8], width: u32, count: usize) -> Option<Vec<u64>> {
    let mut values = vec![0; count];
    match unpack_on(backend, data, width, &mut values) {
        Ok(()) => {
            let mut again = vec![0xFF; data.len()];
            pack_on(backend, &values, width, &mut again).expect("unpacked values pack");
            assert_eq!(again, data);
            return Some(values);
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

fuzz_target!(|input: (u8, u8, Vec<u64>, Vec<u8>)| {
    let (width, extra, mut values, data) = input;
    let width = u32::from(width) % 67;
    if !(1..=64).contains(&width) {
        assert!(matches!(pack_on(Backend::Portable, &values, width, &mut []), Err(CodecError::Input(_))));
        assert!(matches!(unpack_on(Backend::Portable, &data, width, &mut values), Err(CodecError::Input(_))));
        return;
    }
    // One value too many now and then.
    let count = data.len() * 8 / width as usize + usize::from(extra == 0);
    let results =
        Backend::available().into_iter().map(|backend| (round_trip(backend, &values, width), unpack_any(backend, &data, width, count)));
    let results: Vec<_> = results.collect();
    assert!(results.iter().all(|result| *result == results[0]), "the backends differ");
});
