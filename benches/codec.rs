//! Speed of the codec's parts on one and on all cores. Every benchmark first checks that what it
//! times is right.

#![expect(missing_docs, reason = "criterion_group makes a public function")]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use distillkit_codec::compact::{Compact, CompactConfig, learn};
use distillkit_codec::{Codec, Config, bits, topk};

const RECOMMENDED: &str = r#"{"d": 49152, "k": 128, "exact_k": 16, "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], "residual_bins": [], "delta_encoding": false}"#;
const BUDGET: &str = r#"{"d": 49152, "k": 50, "exact_k": 1, "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"], "residual_bins": [], "delta_encoding": false}"#;
const ROWS: usize = 4096;

/// Rows like a language model's: log-probabilities that fall with the logarithm of the rank,
/// steeper or flatter, with some noise.
fn rows(k: usize) -> (Vec<i64>, Vec<f32>) {
    let mut state = 1u64;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    let mut ids = Vec::new();
    let mut logprobs = Vec::new();
    for row in 0..ROWS {
        let slope = 1.0 + random();
        let mut values: Vec<f64> =
            (1..=k).map(|rank| -slope * (rank as f64).ln() + 0.3 * random()).collect();
        values.sort_by(|a, b| b.total_cmp(a));
        let total = values.iter().map(|value| value.exp()).sum::<f64>().ln() + 0.1;
        logprobs.extend(values.iter().map(|value| (value - total) as f32));
        ids.extend((0..k).map(|i| ((i * 383 + row * 31) % 49152) as i64));
    }
    (ids, logprobs)
}

fn codec(c: &mut Criterion) {
    for (name, json) in [("recommended", RECOMMENDED), ("budget", BUDGET)] {
        let codec =
            Codec::new(Config::from_json("quantized", json).expect("valid")).expect("valid");
        let (ids, logprobs) = rows(codec.k());
        let mut data = vec![0; ROWS * codec.bytes_per_row()];
        codec.encode(&ids, &logprobs, &mut data).expect("encodes");
        let mut back_ids = vec![0; ids.len()];
        let mut back = vec![0.0; ids.len()];
        codec.decode(&data, &mut back_ids, &mut back).expect("decodes");
        assert_eq!(back_ids, ids);
        assert!(back.iter().zip(&logprobs).all(|(a, b)| (a - b).abs() < 2.0));

        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(ROWS as u64));
        group.bench_function("encode", |b| b.iter(|| codec.encode(&ids, &logprobs, &mut data)));
        group
            .bench_function("decode", |b| b.iter(|| codec.decode(&data, &mut back_ids, &mut back)));
        group.finish();
    }
}

/// Rows whose ids are likelier the lower they are, in one of 64 orders of the vocabulary each.
fn clustered_rows(count: usize, k: usize) -> (Vec<i64>, Vec<f32>) {
    let (_, logprobs) = rows(k);
    let mut state = 3u64;
    let mut ids = Vec::new();
    for row in 0..count {
        let order = 2 * (row as u64 * 7919 % 64) + 1;
        let mut seen = std::collections::HashSet::new();
        while seen.len() < k {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let share = (state >> 11) as f64 / (1u64 << 53) as f64;
            let place = 49_152f64.powf(share) as u64;
            let id = (place * order * 12_289 % 49_152) as i64;
            if seen.insert(id) {
                ids.push(id);
            }
        }
    }
    let logprobs = logprobs.iter().copied().cycle().take(count * k).collect();
    (ids, logprobs)
}

/// The compact format beside the fixed layouts of the same k.
fn compact(c: &mut Criterion) {
    for (name, k, step) in [("compact-128", 128, 0.00338), ("compact-50", 50, 0.0054)] {
        let json = format!(r#"{{"vocab_size": 49152, "k": {k}, "step": {step}}}"#);
        let config = CompactConfig::from_json(&json).expect("valid");
        let (ids, logprobs) = clustered_rows(8192, k);
        let prior = learn(&config, &ids, &logprobs, k, None).expect("learns").to_bytes();
        let codec = Compact::new(config, Some(&prior)).expect("valid");
        let (ids, logprobs) = (&ids[..512 * k], &logprobs[..512 * k]);
        let document = codec.encode_document(ids, logprobs, k).expect("encodes");
        let (mut back, mut values) = (vec![0; ids.len()], vec![0.0; ids.len()]);
        codec.decode_document(&document, &mut back, &mut values).expect("decodes");
        for (given, back) in ids.chunks(k).zip(back.chunks(k)) {
            let sorted = |row: &[i64]| {
                let mut row = row.to_vec();
                row.sort_unstable();
                row
            };
            assert_eq!(sorted(given), sorted(back));
        }
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(512));
        group.bench_function("encode", |b| b.iter(|| codec.encode_document(ids, logprobs, k)));
        group.bench_function("decode", |b| {
            b.iter(|| codec.decode_document(&document, &mut back, &mut values));
        });
        group.finish();
    }
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("bits");
    for width in [7, 16, 17, 18, 33, 64] {
        let values: Vec<u64> =
            (0..16_384u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - width)).collect();
        let mut packed = vec![0; bits::packed_len(values.len(), width)];
        bits::pack(&values, width, &mut packed).expect("packs");
        let mut back = vec![0u64; values.len()];
        bits::unpack(&packed, width, &mut back).expect("unpacks");
        assert_eq!(back, values);
        group.throughput(Throughput::Elements(values.len() as u64));
        group.bench_function(format!("pack {width}"), |b| {
            b.iter(|| bits::pack(&values, width, &mut packed));
        });
        group.bench_function(format!("unpack {width}"), |b| {
            b.iter(|| bits::unpack(&packed, width, &mut back));
        });
    }
    group.finish();
}

fn dense(c: &mut Criterion) {
    let width = 151_936;
    let rows = 16;
    let k = 128;
    let logits: Vec<f32> = (0..width * rows)
        .map(|i| ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 * 1e-6)
        .collect();
    let mut ids = vec![0; rows * k];
    let mut logprobs = vec![0.0; rows * k];
    let mut log_sums = vec![0.0; rows];
    topk(&logits, width, k, &mut ids, &mut logprobs, &mut log_sums).expect("finite");
    let best = logits[..width].iter().copied().fold(f32::MIN, f32::max);
    assert!((logprobs[0] - (best - log_sums[0])).abs() < 1e-5);
    let mut group = c.benchmark_group("dense logits");
    group.sample_size(10).throughput(Throughput::Elements(rows as u64));
    group.bench_function("top-128 of 151,936", |b| {
        b.iter_batched(
            || (),
            |()| topk(&logits, width, k, &mut ids, &mut logprobs, &mut log_sums),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, codec, compact, packing, dense);
criterion_main!(benches);
