//! Any dense logits: refused as input, or their top-k is what sorting them says, on every backend.
#![no_main]

use distillkit_codec::{Backend, Codec, CodecError, Config, Logit, bf16, f16, topk};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fn check<L: Logit>(logits: &[L], k: usize) {
    let width = logits.len();
    let mut ids = vec![-1; k];
    let mut logprobs = vec![f32::NAN; k];
    let mut logsumexp = [f32::NAN];
    let values: Vec<f32> = logits.iter().map(|logit| logit.to_f32()).collect();
    let finite = values.iter().filter(|value| value.is_finite()).count();
    let bad = values.iter().any(|value| value.is_nan() || *value == f32::INFINITY);
    match topk(logits, width, k, &mut ids, &mut logprobs, &mut logsumexp) {
        Ok(()) => {
            assert!(!bad && finite >= k);
            let mut order: Vec<i64> = (0..width as i64).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
            assert_eq!(ids, order[..k]);
            assert!(
                logprobs.iter().all(|value| value.is_finite() && *value <= 1e-5),
                "{logprobs:?}"
            );
            assert!(logprobs.is_sorted_by(|a, b| a >= b));
            same_on_every_backend(logits, &ids, &logprobs);
        }
        Err(CodecError::Input(message)) => assert!(bad || finite < k, "{message}"),
        Err(other) => panic!("logits are refused with {other:?}"),
    }
}

/// Stores the whole top-k as it is, on every backend: a row of as many bytes as one has, and the
/// same.
fn same_on_every_backend<L: Logit>(logits: &[L], ids: &[i64], logprobs: &[f32]) {
    let width = logits.len();
    let k = ids.len();
    if width < 2 {
        return;
    }
    let config = json!({
        "d": width,
        "k": k,
        "exact_k": k,
        "exact_dtype": "float32",
        "polynomial_terms": [0],
        "residual_bins": [],
        "delta_encoding": false,
    });
    let config =
        Config::from_json("quantized", &config.to_string()).expect("a valid configuration");
    for backend in Backend::available() {
        let codec = Codec::with_backend(config.clone(), backend)
            .expect("a valid configuration makes a codec");
        let mut data = vec![0; codec.bytes_per_row()];
        codec.encode_logits(logits, width, &mut data).expect("log-probabilities of logits encode");
        let mut back = vec![-1; k];
        let mut values = vec![f32::NAN; k];
        codec.decode(&data, &mut back, &mut values).expect("encoded rows decode");
        assert_eq!(back, ids, "{backend:?}");
        let apart =
            values.iter().zip(logprobs).any(|(value, logprob)| (value - logprob).abs() > 1e-3);
        assert!(!apart, "{backend:?}: {values:?}, {logprobs:?}");
    }
}

fuzz_target!(|input: (u8, u8, Vec<u16>)| {
    let (kind, k, bits) = input;
    // Pairs of 16-bit values make float32 ones; repeated, the row is longer than a block and full
    // of ties.
    let bits: Vec<u16> =
        bits.iter().copied().cycle().take(bits.len() * (1 + usize::from(kind / 3) % 8)).collect();
    let k = 1 + usize::from(k);
    match kind % 3 {
        0 if bits.len() / 2 >= k => {
            let logits: Vec<f32> = bits
                .chunks_exact(2)
                .map(|pair| f32::from_bits(u32::from(pair[0]) << 16 | u32::from(pair[1])))
                .collect();
            check(&logits, k);
        }
        1 if bits.len() >= k => {
            check(&bits.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>(), k)
        }
        2 if bits.len() >= k => {
            check(&bits.iter().map(|&b| f16::from_bits(b)).collect::<Vec<_>>(), k)
        }
        _ => {}
    }
});
