//! Any bytes as a document and a prior: refused, or rows that are ones.
#![no_main]

use distillkit_codec::compact::{Compact, CompactConfig, Prior};
use distillkit_fuzz::check_compact_rows;
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&[rows, kind, split], rest)) = input.split_first_chunk() else {
        return Corpus::Reject;
    };
    let rows = usize::from(rows);
    if kind & 1 == 0 {
        // The built-in prior: all bytes are the document's.
        let adaptive = if kind & 2 == 0 { "" } else { r#""threshold": 0.01, "# };
        let json = format!(r#"{{"vocab_size": 3000, "k": 9, {adaptive}"step": 0.02}}"#);
        let config = CompactConfig::from_json(&json).expect("valid");
        let codec = Compact::new(config, None).expect("valid");
        check_compact_rows(&codec, rest, rows);
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
    check_compact_rows(&codec, document, rows);
    Corpus::Keep
});
