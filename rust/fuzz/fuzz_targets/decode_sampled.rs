//! Any bytes as a document of draws and its prior: refused, or rows of so many draws, which encode
//! and decode to the same.
#![no_main]

use std::sync::LazyLock;

use distillkit_codec::CodecError;
use distillkit_codec::compact::{Sampled, SampledConfig, SampledPrior, checksum, learn_sampled};
use libfuzzer_sys::{Corpus, fuzz_target};

const DRAWS: u32 = 12;

/// Prepared once, not for every input: the built-in prior, and one that was learned.
static CODECS: LazyLock<[Sampled; 2]> = LazyLock::new(|| {
    let json = format!(r#"{{"vocab_size": 3000, "draws": {DRAWS}}}"#);
    let config = SampledConfig::from_json(&json).expect("valid");
    // Each row has an id twice and ten once.
    let ids: Vec<i64> =
        (0..200 * 11).map(|i| (i / 11 % 5 * 40 + i % 11 * (i / 11 % 7 + 1)) % 3000).collect();
    let share = |i| if i % 11 == 0 { 2.0f32 / 12.0 } else { 1.0 / 12.0 };
    let logprobs: Vec<f32> = (0..200 * 11).map(|i| share(i).ln()).collect();
    let prior = learn_sampled(&config, &ids, &logprobs, 11, None, None).expect("learns").to_bytes();
    let learned = Sampled::new(config.clone(), Some(&prior)).expect("valid");
    [Sampled::new(config, None).expect("valid"), learned]
});

fn check(codec: &Sampled, data: &[u8], rows: usize) {
    let (k, draws) = (codec.config().k(), f64::from(codec.config().draws));
    let (mut ids, mut logprobs) = (vec![-1; rows * k], vec![1.0f32; rows * k]);
    if let Err(error) = codec.decode_document(data, &mut ids, &mut logprobs) {
        let damage = matches!(error, CodecError::Corrupt(_) | CodecError::Truncated { .. });
        assert!(damage, "{error:?}");
        return;
    }
    for (ids, logprobs) in ids.chunks(k).zip(logprobs.chunks(k)) {
        let count = logprobs.iter().take_while(|&&value| value > f32::NEG_INFINITY).count();
        let total: f64 =
            logprobs[..count].iter().map(|&value| (f64::from(value).exp() * draws).round()).sum();
        assert!(count > 0 && total == draws, "{total} draws");
        assert!(logprobs.windows(2).all(|pair| pair[0] >= pair[1]));
        let mut sorted = ids[..count].to_vec();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(sorted[0] >= 0 && sorted[count - 1] < i64::from(codec.config().vocab_size));
        assert!(ids[count..].iter().all(|&id| id == ids[0]));
    }
    let again = codec.encode_document(&ids, &logprobs, k).expect("are draws");
    let (mut same_ids, mut same) = (vec![-1; rows * k], vec![1.0f32; rows * k]);
    codec.decode_document(&again, &mut same_ids, &mut same).expect("as written");
    assert!(same_ids == ids && same == logprobs);
}

fn check_both(codec: &Sampled, data: &[u8], rows: usize) {
    check(codec, data, rows);
    let mut document = checksum(data).to_le_bytes().to_vec();
    document.extend_from_slice(data);
    check(codec, &document, rows);
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&[rows, kind, split], rest)) = input.split_first_chunk() else {
        return Corpus::Reject;
    };
    let rows = usize::from(rows);
    if kind & 1 == 0 {
        // All bytes are the document's.
        check_both(&CODECS[usize::from(kind >> 1) % CODECS.len()], rest, rows);
        return Corpus::Keep;
    }
    let (document, prior) = rest.split_at(rest.len().min(usize::from(split)));
    let Ok(known) = SampledPrior::from_bytes(prior) else {
        return if prior.starts_with(b"DKDRAWS1") { Corpus::Keep } else { Corpus::Reject };
    };
    if known.config.vocab_size > 1 << 16 || known.config.draws > 256 {
        return Corpus::Reject;
    }
    assert_eq!(SampledPrior::from_bytes(&known.to_bytes()).expect("valid"), known);
    let codec = Sampled::new(known.config, Some(prior)).expect("valid");
    check_both(&codec, document, rows);
    Corpus::Keep
});
