//! Many rows in one call, on all cores: each decodes as it does alone, the first bad one is named,
//! and what decodes encodes again as its rows do alone.
#![no_main]

use arbitrary::{Result, Unstructured};
use distillkit_codec::{Codec, CodecError};
use distillkit_fuzz::{Fields, corpus, decode_on, prepared, rows};
use libfuzzer_sys::{Corpus, fuzz_target};

/// Rows of a call: three tasks, the last of which is not full.
const ROWS: usize = 300;

fn run(input: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(input);
    let Some(made) = prepared(&mut u, Fields::any)? else { return Ok(()) };
    let first = u.int_in_range(0..=ROWS - 1)?;
    let codec = made.codecs.last().expect("there is a backend");
    let bytes = codec.bytes_per_row();
    let few = rows(codec, u.take_rest());
    if few.is_empty() || few.len() % bytes != 0 || few.len() > ROWS * bytes {
        return Ok(());
    }
    // Zeros, which decode, in front of the rows, and the rows again and again.
    let mut data = vec![0; first * bytes];
    data.extend(few.iter().copied().cycle().take((ROWS - first) * bytes));
    let alone: Vec<_> = data.chunks(bytes).map(|row| decode_on(codec, row)).collect();
    let bad = alone.iter().position(std::result::Result::is_err);
    match (decode_on(codec, &data), bad) {
        (Ok((ids, logprobs)), None) => {
            let rows = ids.chunks(codec.k()).zip(logprobs.chunks(codec.k()));
            for (row, there) in rows.zip(&alone) {
                let (ids, logprobs) = there.as_ref().expect("none is bad");
                assert_eq!(row.0, ids);
                assert!(row.1.iter().zip(logprobs).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
            encode_again(codec, &ids, &logprobs);
        }
        (Err(CodecError::Corrupt(message)), Some(row)) => {
            assert!(message.starts_with(&format!("row {row}: ")), "{message}, row {row}")
        }
        (found, bad) => panic!("{:?} where row {bad:?} is bad", found.map(|_| ())),
    }
    Ok(())
}

/// Encodes rows that were decoded, which may be refused, in one call and alone.
fn encode_again(codec: &Codec, ids: &[i64], logprobs: &[f32]) {
    let mut data = vec![0xAA; ROWS * codec.bytes_per_row()];
    let all = codec.encode(ids, logprobs, &mut data);
    let rows = ids.chunks(codec.k()).zip(logprobs.chunks(codec.k()));
    for (number, ((ids, logprobs), there)) in
        rows.zip(data.chunks(codec.bytes_per_row())).enumerate()
    {
        let mut row = vec![0xAA; codec.bytes_per_row()];
        match (codec.encode(ids, logprobs, &mut row), &all) {
            (Ok(()), Ok(())) => assert_eq!(row, there, "row {number}"),
            (Ok(()), Err(_)) => {}
            (Err(_), Err(CodecError::Input(message))) => {
                assert!(message.starts_with(&format!("row {number}: ")), "{message}, row {number}");
                return;
            }
            (alone, all) => panic!("row {number}: {alone:?} alone, {all:?} together"),
        }
    }
}

fuzz_target!(|input: &[u8]| -> Corpus { corpus(run(input)) });
