//! Any dense logits: refused as input, or their top-k is what sorting them says.
#![no_main]

use distillkit_codec::{CodecError, Logit, bf16, f16, topk};
use libfuzzer_sys::fuzz_target;

fn check<L: Logit>(logits: &[L], k: usize) {
    let width = logits.len();
    let (mut ids, mut logprobs, mut logsumexp) = (vec![-1; k], vec![f32::NAN; k], [f32::NAN]);
    let values: Vec<f32> = logits.iter().map(|logit| logit.to_f32()).collect();
    let finite = values.iter().filter(|value| value.is_finite()).count();
    let bad = values.iter().any(|value| value.is_nan() || *value == f32::INFINITY);
    match topk(logits, width, k, &mut ids, &mut logprobs, &mut logsumexp) {
        Ok(()) => {
            assert!(!bad && finite >= k);
            let mut order: Vec<i64> = (0..width as i64).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
            assert_eq!(ids, order[..k]);
            assert!(logprobs.iter().all(|value| value.is_finite() && *value <= 1e-5), "{logprobs:?}");
            assert!(logprobs.is_sorted_by(|a, b| a >= b));
        }
        Err(CodecError::Input(message)) => assert!(bad || finite < k, "{message}"),
        Err(other) => panic!("logits are refused with {other:?}"),
    }
}

fuzz_target!(|input: (u8, u8, Vec<u16>)| {
    let (kind, k, bits) = input;
    // Pairs of 16-bit values make float32 ones; repeated, the row is longer than a block and full of ties.
    let bits: Vec<u16> = bits.iter().copied().cycle().take(bits.len() * (1 + usize::from(kind / 3) % 8)).collect();
    let k = 1 + usize::from(k);
    match kind % 3 {
        0 if bits.len() / 2 >= k => {
            let logits: Vec<f32> = bits.chunks_exact(2).map(|pair| f32::from_bits(u32::from(pair[0]) << 16 | u32::from(pair[1]))).collect();
            check(&logits, k);
        }
        1 if bits.len() >= k => check(&bits.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>(), k),
        2 if bits.len() >= k => check(&bits.iter().map(|&b| f16::from_bits(b)).collect::<Vec<_>>(), k),
        _ => {}
    }
});
