//! Any ids and log-probabilities: refused as input, or they decode to the same ids by rank and
//! finite values.
#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use distillkit_codec::CodecError;
use distillkit_fuzz::{Fields, corpus, decode, encode, prepared};
use libfuzzer_sys::{Corpus, fuzz_target};

/// A row's values: any floats, or log-probabilities of k steps, which are likely to be valid.
fn logprobs(u: &mut Unstructured, k: usize) -> Result<Vec<f32>> {
    if u.ratio(1, 8)? {
        return (0..k).map(|_| u.arbitrary()).collect();
    }
    let step = *u.choose(&[0.0, 1e-6, 0.01, 1.0])?;
    let logits = (0..k)
        .map(|_| Ok(f32::from(i16::arbitrary(u)?) * step * 1e-3))
        .collect::<Result<Vec<f32>>>()?;
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - highest).exp()).sum();
    Ok(logits.iter().map(|logit| logit - highest - sum.ln()).collect())
}

/// A row's ids: any integers, or distinct ones of the vocabulary.
fn ids(u: &mut Unstructured, k: usize, vocab_size: u64) -> Result<Vec<i64>> {
    if u.ratio(1, 8)? {
        return (0..k).map(|_| u.arbitrary()).collect();
    }
    let first = u.int_in_range(0..=vocab_size - k as u64)?;
    let down = u.arbitrary()?;
    Ok((0..k as u64).map(|i| (first + if down { k as u64 - 1 - i } else { i }) as i64).collect())
}

fn run(input: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(input);
    let Some(made) = prepared(&mut u, Fields::any)? else { return Ok(()) };
    let (fields, codecs) = (&made.fields, &made.codecs);
    let k = codecs[0].k();
    let vocab_size = codecs[0].vocab_size();
    let ids = ids(&mut u, k, vocab_size)?;
    let logprobs = logprobs(&mut u, k)?;
    match encode(codecs, &ids, &logprobs) {
        Ok(data) => {
            let mut order: Vec<usize> = (0..ids.len()).collect();
            order.sort_by(|&a, &b| {
                logprobs[b].partial_cmp(&logprobs[a]).expect("no NaN is encoded")
            });
            let sorted: Vec<i64> = order.iter().map(|&i| ids[i]).collect();
            let decoded = decode(codecs, &data).map(|(ids, _)| ids);
            assert_eq!(decoded, Ok(sorted), "log-probabilities {logprobs:?}, {fields:?}");
        }
        Err(CodecError::Input(message)) => assert!(message.starts_with("row 0: "), "{message}"),
        Err(other) => panic!("rows are refused with {other:?}"),
    }
    Ok(())
}

fuzz_target!(|input: &[u8]| -> Corpus { corpus(run(input)) });
