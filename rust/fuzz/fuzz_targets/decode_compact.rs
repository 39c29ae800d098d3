//! Any bytes as a document and a prior: refused, or rows that are ones.
#![no_main]

use std::sync::LazyLock;

use distillkit_codec::compact::{Compact, CompactConfig, Prior, learn};
use distillkit_fuzz::check_compact_bytes;
use libfuzzer_sys::{Corpus, fuzz_target};

/// Prepared once, not for every input: the built-in priors, and one that was learned.
static CODECS: LazyLock<[Compact; 3]> = LazyLock::new(|| {
    let config = |adaptive: &str| {
        let json = format!(r#"{{"vocab_size": 3000, "k": 9, {adaptive}"step": 0.02}}"#);
        CompactConfig::from_json(&json).expect("valid")
    };
    let builtin = |config| Compact::new(config, None).expect("valid");
    let fixed = config("");
    let ids: Vec<i64> =
        (0..200 * 9).map(|i| (i / 9 % 5 * 40 + i % 9 * (i / 9 % 7 + 1)) % 3000).collect();
    let logprobs: Vec<f32> = (0..200 * 9).map(|i| -0.7 - (i % 9) as f32 * 0.9).collect();
    let prior = learn(&fixed, &ids, &logprobs, 9, None).expect("learns").to_bytes();
    let learned = Compact::new(fixed.clone(), Some(&prior)).expect("valid");
    [builtin(fixed), builtin(config(r#""threshold": 0.01, "#)), learned]
});

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&[rows, kind, split], rest)) = input.split_first_chunk() else {
        return Corpus::Reject;
    };
    let rows = usize::from(rows);
    if kind & 1 == 0 {
        // All bytes are the document's.
        check_compact_bytes(&CODECS[usize::from(kind >> 1) % CODECS.len()], rest, rows);
        return Corpus::Keep;
    }
    let (document, prior) = rest.split_at(rest.len().min(usize::from(split)));
    let Ok(known) = Prior::from_bytes(prior) else {
        return if prior.starts_with(b"DKPRIOR1") { Corpus::Keep } else { Corpus::Reject };
    };
    if known.config.vocab_size > 1 << 16 || known.config.k > 256 {
        return Corpus::Reject;
    }
    assert_eq!(Prior::from_bytes(&known.to_bytes()).expect("valid"), known);
    let codec = Compact::new(known.config, Some(prior)).expect("valid");
    check_compact_bytes(&codec, document, rows);
    Corpus::Keep
});
