//! Any rows with the built-in prior: what is stored of them comes back.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Unstructured;
use distillkit_codec::CodecError;
use distillkit_codec::compact::{Compact, CompactConfig};
use distillkit_fuzz::{check_compact_rows, compact_rows};
use libfuzzer_sys::{Corpus, fuzz_target};

/// Prepared once, not for every input: every choice of ids at every step.
static CODECS: LazyLock<Vec<Compact>> = LazyLock::new(|| {
    let choices = ["", r#""threshold": 0.01, "#, r#""mass": 0.9, "#];
    let choices = choices.iter().flat_map(|ids| [0.0005, 0.01, 0.25].map(|step| (ids, step)));
    choices
        .map(|(ids, step)| {
            let json = format!(r#"{{"vocab_size": 500, "k": 30, {ids}"step": {step}}}"#);
            Compact::new(CompactConfig::from_json(&json).expect("valid"), None).expect("valid")
        })
        .collect()
});

fuzz_target!(|input: &[u8]| -> Corpus {
    let mut u = Unstructured::new(input);
    let choice = u.arbitrary::<u8>().unwrap_or(0);
    let codec = &CODECS[usize::from(choice) % CODECS.len()];
    let Ok((mut ids, mut logprobs, width)) = compact_rows(&mut u, codec.config()) else {
        return Corpus::Reject;
    };
    let rows = ids.len() / width;
    let document = codec.encode_document(&ids, &logprobs, width).expect("encodes");
    assert!(check_compact_rows(codec, &document, rows));
    let sizes = codec.sizes(&document, rows).expect("sizes");
    assert_eq!(sizes.head + sizes.ids + sizes.values + sizes.framing, document.len() as f64);
    // Anything at all: encoded or refused.
    for _ in 0..4 {
        let (Ok(place), Ok(id), Ok(bits)) = (u.arbitrary::<u16>(), u.arbitrary(), u.arbitrary())
        else {
            break;
        };
        let place = usize::from(place) % ids.len();
        (ids[place], logprobs[place]) = (id, f32::from_bits(bits));
    }
    match codec.encode_document(&ids, &logprobs, width) {
        Ok(document) => assert!(check_compact_rows(codec, &document, rows)),
        Err(error) => assert!(matches!(error, CodecError::Input(_)), "{error:?}"),
    }
    Corpus::Keep
});
