//! Bit packing: any values round-trip, and any bytes are refused or the only packing of what they unpack to.
#![no_main]

use distillkit_codec::CodecError;
use distillkit_codec::bits::{max_value, pack, packed_len, unpack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u8, Vec<u64>, Vec<u8>)| {
    let (width, extra, mut values, data) = input;
    let width = u32::from(width) % 67;
    if !(1..=64).contains(&width) {
        assert!(matches!(pack(&values, width, &mut []), Err(CodecError::Input(_))));
        assert!(matches!(unpack(&data, width, &mut values), Err(CodecError::Input(_))));
        return;
    }

    let mut packed = vec![0xFF; packed_len(values.len(), width)];
    let fits = values.iter().all(|&value| value <= max_value(width));
    assert_eq!(pack(&values, width, &mut packed).is_ok(), fits);
    values.iter_mut().for_each(|value| *value &= max_value(width));
    pack(&values, width, &mut packed).expect("values of this width pack");
    let mut back = vec![0; values.len()];
    unpack(&packed, width, &mut back).expect("packed values unpack");
    assert_eq!(back, values);

    // One value too many now and then.
    let count = data.len() * 8 / width as usize + usize::from(extra == 0);
    let mut values = vec![0; count];
    match unpack(&data, width, &mut values) {
        Ok(()) => {
            let mut again = vec![0xFF; data.len()];
            pack(&values, width, &mut again).expect("unpacked values pack");
            assert_eq!(again, data);
        }
        Err(CodecError::Truncated { found, expected, .. }) => {
            assert_eq!((found, expected), (data.len(), packed_len(count, width)));
            assert_ne!(found, expected);
        }
        Err(CodecError::Corrupt(_)) => assert_ne!(count * width as usize % 8, 0),
        Err(other) => panic!("bytes are refused with {other:?}"),
    }
});
