//! The sampled format: draws come back as they were, with and without a prior; and damage to
//! documents and priors is an error or harmless.

use distillkit_codec::CodecError;
use distillkit_codec::compact::{
    CompactConfig, Part, Sampled, SampledConfig, SampledPrior, checksum, learn, learn_sampled,
};
use distillkit_codec::draws::{draw, uniforms};

/// Rows of ids and log-probabilities.
type Rows = (Vec<i64>, Vec<f32>);

fn config(vocab: usize, draws: usize) -> SampledConfig {
    let json = format!("{{\"vocab_size\": {vocab}, \"draws\": {draws}}}");
    SampledConfig::from_json(&json).expect("valid")
}

/// Draws from distributions of a few topics, from nearly certain ones to flat ones.
fn rows(config: &SampledConfig, count: usize, seed: u64) -> Rows {
    let (vocab, draws) = (config.vocab_size as usize, config.draws as usize);
    let noise = uniforms(seed, 1, 0, count, vocab + 1);
    let logits: Vec<f32> = noise
        .chunks(vocab + 1)
        .enumerate()
        .flat_map(|(row, noise)| {
            let sharpness = 12.0 * noise[vocab / 2];
            // The numbers ascend: they are dealt out by a step that has no common factor.
            let step = [1, 7, 11, 13, 17][row % 5];
            (0..vocab).map(move |id| (sharpness * noise[(id * step + row % 3) % vocab]) as f32)
        })
        .collect();
    let numbers = uniforms(seed, 2, 0, count, draws);
    let (mut ids, mut logprobs) = (vec![0; count * config.k()], vec![0.0; count * config.k()]);
    draw(&logits, vocab, 1.0, &numbers, &mut ids, &mut logprobs).expect("finite");
    (ids, logprobs)
}

fn decoded(codec: &Sampled, data: &[u8], rows: usize) -> Result<Rows, CodecError> {
    let k = codec.config().k();
    let (mut ids, mut logprobs) = (vec![-1; rows * k], vec![1.0; rows * k]);
    codec.decode_document(data, &mut ids, &mut logprobs)?;
    Ok((ids, logprobs))
}

fn codec(config: &SampledConfig, prior: Option<&SampledPrior>) -> Sampled {
    Sampled::new(config.clone(), prior.map(SampledPrior::to_bytes).as_deref()).expect("fits")
}

#[test]
fn draws_come_back() {
    for (vocab, draws, count) in
        [(2, 1, 300), (2, 4096, 40), (300, 1, 100), (300, 12, 400), (300, 300, 33), (5000, 50, 60)]
    {
        let config = config(vocab, draws);
        let (ids, logprobs) = rows(&config, count, 3);
        let prior =
            learn_sampled(&config, &ids, &logprobs, config.k(), None, None).expect("learned");
        assert_eq!(SampledPrior::from_bytes(&prior.to_bytes()).expect("valid"), prior);
        let others = rows(&config, count, 4);
        for codec in [codec(&config, None), codec(&config, Some(&prior))] {
            let data = codec.encode_document(&others.0, &others.1, config.k()).expect("draws");
            assert_eq!(decoded(&codec, &data, count).expect("as written"), others);
            let sizes = codec.sizes(&data, count).expect("valid");
            assert!(
                (sizes.head + sizes.ids + sizes.values + sizes.framing - data.len() as f64).abs()
                    < 1e-6
            );
            let part = |start, stop| Part { data: &data, rows: count, start, stop };
            let joined = codec.join(&[part(2, count), part(0, 2)]).expect("rows exist");
            let turned = decoded(&codec, &joined, count).expect("as written");
            let split = (count - 2) * config.k();
            assert_eq!(turned.0[..split], others.0[2 * config.k()..]);
            assert_eq!(turned.1[split..], others.1[..2 * config.k()]);
        }
    }
    let empty = codec(&config(30, 5), None).encode_document(&[], &[], 5).expect("no rows");
    assert_eq!(decoded(&codec(&config(30, 5), None), &empty, 0), Ok((vec![], vec![])));
}

#[test]
fn a_prior_saves_bytes_and_takes_over_lists_of_either_format() {
    let config = config(2000, 20);
    let k = config.k();
    let (ids, logprobs) = rows(&config, 3000, 1);
    let own = learn_sampled(&config, &ids, &logprobs, k, None, None).expect("learned");
    let compact = r#"{"vocab_size": 2000, "k": 8, "step": 0.01}"#;
    let compact = CompactConfig::from_json(compact).expect("valid");
    // Any rows of the same ids do for the lists.
    let plain: Vec<f32> = (0..ids.len()).map(|i| -1.5 - (i % k) as f32 * 0.3).collect();
    let distinct: Vec<i64> = ids
        .chunks(k)
        .flat_map(|row| {
            let mut seen = Vec::new();
            row.iter().copied().chain(0..).for_each_while_new(k, &mut seen);
            seen
        })
        .collect();
    let base = learn(&compact, &distinct, &plain, k, None).expect("learned").to_bytes();
    let others = rows(&config, 300, 2);
    let size = |prior: Option<&SampledPrior>| {
        codec(&config, prior).encode_document(&others.0, &others.1, k).expect("draws").len()
    };
    let builtin = size(None);
    for base in [base, own.to_bytes()] {
        let taken = learn_sampled(&config, &ids, &logprobs, k, None, Some(&base)).expect("learned");
        let (size, own) = (size(Some(&taken)), size(Some(&own)));
        assert!(size < builtin && own < builtin && size * 10 < own * 13, "{size} {own} {builtin}");
    }
}

/// Takes elements that were not there before, up to a number of them.
trait TakeNew {
    fn for_each_while_new(self, most: usize, out: &mut Vec<i64>);
}

impl<I: Iterator<Item = i64>> TakeNew for I {
    fn for_each_while_new(self, most: usize, out: &mut Vec<i64>) {
        for id in self {
            if out.len() == most {
                break;
            }
            if !out.contains(&id) {
                out.push(id);
            }
        }
    }
}

#[test]
fn damaged_documents_and_priors_are_refused_or_sound() {
    let config = config(300, 12);
    let (ids, logprobs) = rows(&config, 200, 5);
    let prior = learn_sampled(&config, &ids, &logprobs, config.k(), None, None).expect("learned");
    let codec = codec(&config, Some(&prior));
    let (ids, logprobs) = rows(&config, 7, 6);
    let data = codec.encode_document(&ids, &logprobs, config.k()).expect("draws");
    let sound = |(ids, logprobs): Rows| {
        for (ids, logprobs) in ids.chunks(config.k()).zip(logprobs.chunks(config.k())) {
            let count = logprobs.iter().take_while(|value| value.is_finite()).count();
            let total: f32 =
                logprobs[..count].iter().map(|value| (value.exp() * 12.0).round()).sum();
            let mut sorted = ids[..count].to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert!(total == 12.0 && sorted.len() == count);
            assert!(ids.iter().all(|&id| (0..300).contains(&id)));
        }
    };
    for end in 0..data.len() {
        assert!(decoded(&codec, &data[..end], 7).is_err());
    }
    for bit in 0..8 * data.len() {
        let mut damaged = data.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decoded(&codec, &damaged, 7).is_err());
        let sum = checksum(&damaged[4..]).to_le_bytes();
        damaged[..4].copy_from_slice(&sum);
        if let Ok(rows) = decoded(&codec, &damaged, 7) {
            sound(rows);
        }
    }
    let bytes = prior.to_bytes();
    for end in 0..bytes.len() {
        assert!(SampledPrior::from_bytes(&bytes[..end]).is_err());
    }
    for bit in (0..8 * bytes.len()).step_by(5) {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        if SampledPrior::from_bytes(&damaged).is_ok_and(|prior| prior.config == config)
            && let Ok(codec) = Sampled::new(config.clone(), Some(&damaged))
            && let Ok(rows) = decoded(&codec, &data, 7)
        {
            sound(rows);
        }
    }
}
