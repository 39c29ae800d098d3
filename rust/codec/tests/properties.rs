//! What must hold for every valid configuration and every input, through the public interface
//! alone.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests: a failure panics, and exact means exact"
)]

use distillkit_codec::bits::{max_value, pack, packed_len, unpack};
use distillkit_codec::{Codec, CodecError, Config, FloatType, Logit, bf16, f16, topk};
use proptest::prelude::*;
use proptest::sample::select;
use rayon::ThreadPoolBuilder;
use serde_json::{Value, json};

/// A configuration of each format in its valid range; the few whose terms overflow their type are
/// drawn again.
fn configs() -> impl Strategy<Value = Config> {
    prop_oneof![3 => quantized(), 1 => legacy()]
}

fn float_type() -> impl Strategy<Value = &'static str> {
    select(&["float16", "bfloat16", "float32", "float64"])
}

/// Vocabulary size and k.
fn sizes() -> impl Strategy<Value = (u64, usize)> {
    let d = prop_oneof![
        select(&[2, 3, 256, 257, 65_536, 65_537, 131_072, 131_073, 1 << 20, 1 << 62, 1 << 63]),
        2u64..1 << 20
    ];
    (d, 1usize..=200).prop_map(|(d, k)| (d, k.min(d as usize)))
}

fn term() -> impl Strategy<Value = Value> {
    // Negative powers need a t that is never 0, so they are valid only where no rank is
    // approximated.
    prop_oneof![
        6 => (0..=6).prop_map(|power| json!(power)),
        2 => Just(json!("sqrt")),
        1 => Just(json!("exp")),
        1 => Just(json!(-2)),
    ]
}

fn quantized() -> impl Strategy<Value = Config> {
    let bin = (float_type(), 1u32..=64, 0.0..1.0f64);
    let lists = (prop::collection::vec(term(), 0..7), prop::collection::vec(bin, 0..5));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (sizes(), exact_share(), lists, float_type(), float_type(), flags).prop_filter_map(
        "a term is not finite, or no term and no bin",
        |((d, k), share, (terms, bins), exact_dtype, term_dtype, (delta, diffusion, normalize))| {
            let exact_k = (share * k as f64) as usize;
            let mut left = k - exact_k;
            let mut residual_bins = Vec::new();
            for (scale_dtype, element_bits, share) in bins {
                let num_elements = (share * left as f64).ceil() as usize;
                left -= num_elements;
                if num_elements > 0 {
                    residual_bins.push(json!({
                        "scale_dtype": scale_dtype,
                        "element_bits": element_bits,
                        "num_elements": num_elements,
                    }));
                }
            }
            let fields = json!({
                "d": d,
                "k": k,
                "exact_k": exact_k,
                "exact_dtype": exact_dtype,
                "polynomial_terms": terms,
                "term_dtype": term_dtype,
                "residual_bins": residual_bins,
                "delta_encoding": delta,
                "error_diffusion": diffusion,
                "normalize_t": normalize,
            });
            Config::from_json("quantized", &fields.to_string()).ok()
        },
    )
}

fn legacy() -> impl Strategy<Value = Config> {
    (sizes(), exact_share(), 0..=8, any::<bool>(), any::<bool>(), float_type()).prop_filter_map(
        "a term is not finite",
        |((d, k), share, degree, invert, sqrt, term_dtype)| {
            let fields = json!({
                "vocab_size": d,
                "k": k,
                "exact_k": (share * k as f64) as usize,
                "polynomial_degree": degree,
                "invert_polynomial": invert,
                "with_sqrt_term": sqrt,
                "term_dtype": term_dtype,
            });
            Config::from_json("legacy", &fields.to_string()).ok()
        },
    )
}

/// `exact_k` as a share of k: none and all of it as often as what is between.
fn exact_share() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1.0), 0.0..1.0]
}

/// Random numbers that depend on nothing but a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In 0 … end − 1.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// In \[0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A valid row of k: distinct ids up to the vocabulary's last, and log-probabilities of one of the
/// shapes that rows come in.
fn row(d: u64, k: usize, random: &mut Random) -> (Vec<i64>, Vec<f32>) {
    let stride = 1 + random.below(d / k as u64);
    let lowest = random.below(d - stride * (k as u64 - 1));
    let mut ids: Vec<i64> = (0..k as u64).map(|i| (d - 1 - lowest - i * stride) as i64).collect();
    for i in (1..k).rev() {
        ids.swap(i, random.below(i as u64 + 1) as usize);
    }

    let kind = random.below(6);
    let mut logits: Vec<f64> = (0..k)
        .map(|i| match kind {
            0 => 0.0,                           // all equal
            1 => random.below(4) as f64 * 0.5,  // ties
            2 => -80.0 * (i as f64 / k as f64), // a straight line down to e⁻⁸⁰
            3 => {
                if i == 0 {
                    0.0
                } else {
                    -15.0 - 65.0 * random.unit()
                }
            } // very confident
            4 => -1.5 * f64::ln(1.0 + i as f64) - random.unit(), // a power law
            _ => random.unit() * 20.0,
        })
        .collect();
    if random.below(4) > 0 {
        logits.sort_by(|a, b| b.total_cmp(a));
    }
    // Most of the time some of the mass is on ids that are not stored.
    let missing = if random.below(3) == 0 { 0.0 } else { -random.unit() };
    let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    (ids, logits.iter().map(|logit| (logit - log_sum + missing) as f32).collect())
}

/// `count` rows one after the other.
fn rows(codec: &Codec, count: usize, seed: u64) -> (Vec<i64>, Vec<f32>) {
    let mut random = Random(seed);
    let (ids, logprobs): (Vec<_>, Vec<_>) =
        (0..count).map(|_| row(codec.vocab_size(), codec.k(), &mut random)).unzip();
    (ids.concat(), logprobs.concat())
}

fn encode(codec: &Codec, ids: &[i64], logprobs: &[f32]) -> Result<Vec<u8>, CodecError> {
    let mut data = vec![0xAA; ids.len() / codec.k() * codec.bytes_per_row()];
    codec.encode(ids, logprobs, &mut data)?;
    Ok(data)
}

fn decode(codec: &Codec, data: &[u8]) -> Result<(Vec<i64>, Vec<f32>), CodecError> {
    let count = data.len() / codec.bytes_per_row() * codec.k();
    let mut ids = vec![-1; count];
    let mut logprobs = vec![f32::NAN; count];
    codec.decode(data, &mut ids, &mut logprobs)?;
    Ok((ids, logprobs))
}

/// A row by descending log-probability, equal ones in their order.
fn sorted(ids: &[i64], logprobs: &[f32]) -> (Vec<i64>, Vec<f32>) {
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by(|&a, &b| logprobs[b].partial_cmp(&logprobs[a]).expect("finite"));
    (order.iter().map(|&i| ids[i]).collect(), order.iter().map(|&i| logprobs[i]).collect())
}

/// `exact_k`, `exact_dtype`, and whether differences are stored.
fn exact_part(config: &Config) -> (usize, FloatType, bool) {
    match config {
        Config::Quantized(config) => (config.exact_k, config.exact_dtype, config.delta_encoding),
        Config::Legacy(config) => (config.exact_k, FloatType::Float16, false),
    }
}

/// How far rounding x ≤ `size` to the nearest of its type can take it.
fn rounding(kind: FloatType, size: f64) -> f64 {
    let (relative, absolute) = match kind {
        FloatType::Float16 => (2f64.powi(-11), 2f64.powi(-25)),
        FloatType::Bfloat16 => (2f64.powi(-8), 0.0),
        FloatType::Float32 | FloatType::Float64 => (2f64.powi(-24), 0.0),
    };
    size * relative + absolute
}

/// The exact ranks come back as a neighbour in their type (not always the nearest: the mass of the
/// row has a say); where differences are stored, errors do not add up.
fn check_exact(config: &Config, expected: &[f32], found: &[f32]) -> Result<(), TestCaseError> {
    let (exact_k, kind, delta) = exact_part(config);
    let mut before = 0.0;
    let mut worst = 0.0f64;
    for (rank, (&expected, &found)) in expected.iter().zip(found).take(exact_k).enumerate() {
        let value = f64::from(expected);
        let allowed = if delta {
            // Around the mean error of the ranks before, and all of them lowered where the mass
            // would exceed 1.
            worst = worst.max(rounding(kind, (value - before).abs() + 2.0 * worst));
            4.0 * worst + rounding(FloatType::Float32, value.abs()) + 1e-2
        } else {
            2.0 * rounding(kind, value.abs())
        };
        prop_assert!(
            (f64::from(found) - value).abs() <= allowed,
            "rank {}: {} {}, allowed {}",
            rank,
            found,
            value,
            allowed
        );
        before = value;
    }
    Ok(())
}

/// `count` cases, more or fewer in proportion to `PROPTEST_CASES` (256 if not set). Nothing is
/// written beside the sources: a failure prints its minimal case.
fn cases(count: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig { cases: count * default.cases / 256, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(cases(8000))]

    #[test]
    fn any_row_of_any_config_round_trips(config in configs(), count in 1usize..4, seed: u64) {
        let codec = Codec::new(config.clone()).unwrap();
        let (ids, logprobs) = rows(&codec, count, seed);
        let data = encode(&codec, &ids, &logprobs).unwrap();
        let (found_ids, found) = decode(&codec, &data).unwrap();
        prop_assert!(found.iter().all(|value| value.is_finite()), "{:?}", found);
        let k = codec.k();
        let bytes = codec.bytes_per_row();
        for (i, (ids, logprobs)) in ids.chunks(k).zip(logprobs.chunks(k)).enumerate() {
            let (sorted_ids, sorted_logprobs) = sorted(ids, logprobs);
            prop_assert_eq!(&found_ids[i * k..(i + 1) * k], &sorted_ids);
            check_exact(&config, &sorted_logprobs, &found[i * k..(i + 1) * k])?;
            // By itself, and sorted beforehand, a row has the same bytes.
            let row = &data[i * bytes..(i + 1) * bytes];
            prop_assert_eq!(&encode(&codec, ids, logprobs).unwrap(), row);
            prop_assert_eq!(&encode(&codec, &sorted_ids, &sorted_logprobs).unwrap(), row);
        }
    }

    #[test]
    fn only_whole_rows_decode(config in configs(), seed: u64) {
        let codec = Codec::new(config).unwrap();
        let (ids, logprobs) = rows(&codec, 2, seed);
        let mut data = encode(&codec, &ids, &logprobs).unwrap();
        let (ids, _) = decode(&codec, &data).unwrap();
        data.push(0);
        let bytes = codec.bytes_per_row();
        for len in 0..=data.len() {
            let mut found = vec![0; len / bytes * codec.k()];
            let mut values = vec![0.0; len / bytes * codec.k()];
            let result = codec.decode(&data[..len], &mut found, &mut values);
            if len % bytes == 0 {
                prop_assert_eq!(result, Ok(()));
                prop_assert_eq!(&found, &ids[..found.len()]);
            } else {
                let Err(CodecError::Truncated { found, expected, .. }) = result else {
                    panic!("{len}: {result:?}")
                };
                prop_assert_eq!((found, expected), (len, (len / bytes + 1) * bytes));
            }
        }
    }

    #[test]
    fn arbitrary_bytes_decode_or_are_corrupt(
        config in configs(),
        valid_ids: bool,
        kind in 0..3,
        seed: u64,
    ) {
        let codec = Codec::new(config.clone()).unwrap();
        let mut random = Random(seed);
        let mut data: Vec<u8> = (0..codec.bytes_per_row()).map(|_| match kind {
            0 => random.next() as u8,
            1 => 0xFF,
            _ => select_byte(&mut random),
        }).collect();
        if valid_ids {
            let (ids, logprobs) = row(codec.vocab_size(), codec.k(), &mut random);
            let encoded = encode(&codec, &ids, &logprobs).unwrap();
            data[codec.value_bytes()..].copy_from_slice(&encoded[codec.value_bytes()..]);
        }
        match decode(&codec, &data) {
            Ok((ids, logprobs)) => {
                let known = |&id: &i64| id >= 0 && (id as u64) < codec.vocab_size();
                prop_assert!(ids.iter().all(known), "{:?}", ids);
                prop_assert!(logprobs.iter().all(|value| value.is_finite()), "{:?}", logprobs);
                // Ids have one spelling.
                prop_assert_eq!(id_bytes(&config, &ids), &data[codec.value_bytes()..]);
            }
            Err(CodecError::Corrupt(message)) => {
                prop_assert!(message.starts_with("row 0: "), "{}", message);
                let of_values = message.contains("finite") || message.contains("padding");
                prop_assert!(!valid_ids || of_values, "{}", message);
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn bits_have_one_spelling(
        width in 1u32..=64,
        data in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut values = vec![0; data.len() * 8 / width as usize];
        match unpack(&data, width, &mut values) {
            Ok(()) => {
                let mut again = vec![0xAA; data.len()];
                pack(&values, width, &mut again).unwrap();
                prop_assert_eq!(again, data);
            }
            Err(CodecError::Corrupt(_)) => prop_assert!(data.last().is_some_and(|&last| last != 0)),
            Err(CodecError::Truncated { .. }) => {
                prop_assert_ne!(packed_len(values.len(), width), data.len());
            }
            Err(other) => panic!("{other:?}"),
        }
        values.push(u64::from(width < 64) << (width % 64));
        let mut out = vec![0; packed_len(values.len(), width)];
        let packs = pack(&values, width, &mut out).is_ok();
        prop_assert_eq!(packs, width == 64, "2^{} does not fit", width);
        prop_assert!(values[..values.len() - 1].iter().all(|&value| value <= max_value(width)));
    }
}

/// A configuration that keeps rows in order: a constant among the terms, coefficients of at least
/// float32, neither residuals nor differences.
fn ordered_configs() -> impl Strategy<Value = Config> {
    let terms = prop::collection::vec(term(), 0..6);
    let quantized = (sizes(), exact_share(), terms, float_type(), any::<[bool; 2]>());
    prop_oneof![
        4 => quantized.prop_filter_map("a term is not finite", |parts| {
            let ((d, k), share, mut terms, exact_dtype, [wide, normalize]) = parts;
            terms.push(json!(0));
            let fields = json!({
                "d": d,
                "k": k,
                "exact_k": (share * k as f64) as usize,
                "exact_dtype": exact_dtype,
                "polynomial_terms": terms,
                "term_dtype": if wide { "float64" } else { "float32" },
                "residual_bins": [],
                "delta_encoding": false,
                "normalize_t": normalize,
            });
            Config::from_json("quantized", &fields.to_string()).ok()
        }),
        1 => legacy().prop_filter("coefficients too coarse", |config| match config {
            Config::Legacy(config) =>
                matches!(config.term_dtype, FloatType::Float32 | FloatType::Float64),
            Config::Quantized(_) => false,
        }),
    ]
}

/// A row of which some of the last ids are masked: their log-probabilities are very low.
fn masked_row(d: u64, k: usize, random: &mut Random) -> (Vec<i64>, Vec<f32>) {
    let (ids, mut logprobs) = row(d, k, random);
    logprobs.sort_by(|a, b| b.total_cmp(a));
    if random.below(2) == 0 {
        let lowest = [-60.0, -1000.0, -3e4, -6e4][random.below(4) as usize];
        let first = k - random.below(k as u64) as usize;
        logprobs[first..].fill(lowest);
    }
    (ids, logprobs)
}

/// The largest rise from one decoded value to the next, and the total probability.
fn rise_and_mass(decoded: &[f32]) -> (f64, f64) {
    let rise = |pair: &[f32]| f64::from(pair[1]) - f64::from(pair[0]);
    let largest = decoded.windows(2).map(rise).fold(0.0, f64::max);
    (largest, decoded.iter().map(|&value| f64::from(value).exp()).sum())
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn rows_without_residuals_do_not_rise_and_have_at_most_probability_1(
        config in ordered_configs(),
        seed: u64,
    ) {
        let codec = Codec::new(config).unwrap();
        let mut random = Random(seed);
        let k = codec.k();
        let (ids, logprobs): (Vec<_>, Vec<_>) =
            (0..16).map(|_| masked_row(codec.vocab_size(), k, &mut random)).unzip();
        let (ids, logprobs) = (ids.concat(), logprobs.concat());
        let (_, found) = decode(&codec, &encode(&codec, &ids, &logprobs).unwrap()).unwrap();
        for (given, found) in logprobs.chunks(k).zip(found.chunks(k)) {
            let (rise, mass) = rise_and_mass(found);
            let given_mass: f64 = given.iter().map(|&y| f64::from(y).exp()).sum();
            prop_assert!(rise <= 0.501, "{} {:?} {:?}", rise, given, found);
            prop_assert!(mass <= given_mass.max(1.0) + 4e-6, "{} {:?} {:?}", mass, given, found);
        }
    }
}

/// Layouts whose fit once left a row far out of order.
#[test]
fn a_masked_id_does_not_lift_the_others() {
    for (d, k, exact_k, terms, lowest) in [
        (97, 8, 3, json!([0, 1, 2, "sqrt"]), -1e6),
        (97, 8, 3, json!([0, 1, 2, "sqrt"]), -1000.0),
        (300, 30, 2, json!([0, 1, 2, 3, 4, 5, "sqrt"]), -1000.0),
    ] {
        let fields = json!({
            "d": d, "k": k, "exact_k": exact_k, "exact_dtype": "bfloat16",
            "polynomial_terms": terms, "residual_bins": [], "delta_encoding": false,
        });
        let codec =
            Codec::new(Config::from_json("quantized", &fields.to_string()).unwrap()).unwrap();
        let mut logprobs: Vec<f32> = (0..k).map(|i| -0.5 - 0.7 * i as f32).collect();
        let total: f64 = logprobs.iter().map(|&y| f64::from(y).exp()).sum();
        for value in &mut logprobs {
            *value -= (total.ln() + 0.1) as f32;
        }
        logprobs[k - 1] = lowest;
        let ids: Vec<i64> = (0..k as i64).collect();
        let (_, found) = decode(&codec, &encode(&codec, &ids, &logprobs).unwrap()).unwrap();
        let (rise, mass) = rise_and_mass(&found);
        assert!(rise <= 0.0 && mass <= 1.0 + 1e-6, "{rise} {mass} {found:?}");
    }
}

/// Bytes of which floats are often zero, infinite, huge or tiny.
fn select_byte(random: &mut Random) -> u8 {
    [0x00, 0x7F, 0x80, 0xFF, 0x3F, 0x7B, 0xFC, 0x01][random.below(8) as usize]
}

/// Ids as FORMAT.md spells them.
fn id_bytes(config: &Config, ids: &[i64]) -> Vec<u8> {
    let words: Vec<u64> = ids.iter().map(|&id| id as u64).collect();
    match config {
        Config::Quantized(config) => {
            let mut out = vec![0; config.id_bytes()];
            pack(&words, config.id_bits(), &mut out).unwrap();
            out
        }
        Config::Legacy(config) => {
            let word = |ids: &[u64]| {
                ids.iter()
                    .enumerate()
                    .map(|(i, id)| id << (i as u32 * config.id_bits()))
                    .sum::<u64>()
            };
            words.chunks(config.ids_per_word()).flat_map(|ids| word(ids).to_le_bytes()).collect()
        }
    }
}

/// What can be wrong with a value or an id, and what its error says.
#[derive(Debug, Clone, Copy)]
enum Spoiled {
    Value(f32),
    Id(i64),
    RepeatedId,
    /// Every log-probability 0: each of them may be, but not all.
    Mass,
}

fn spoil(
    codec: &Codec,
    how: Spoiled,
    rank: usize,
    ids: &mut [i64],
    logprobs: &mut [f32],
) -> String {
    match how {
        Spoiled::Value(value) => {
            logprobs[rank] = value;
            if value.is_finite() {
                "not log-probabilities".into()
            } else {
                format!("{value} at rank {rank} is not finite")
            }
        }
        Spoiled::Id(id) => {
            ids[rank] = id;
            format!("id {id} at rank {rank} is outside the vocabulary of {}", codec.vocab_size())
        }
        Spoiled::RepeatedId => {
            ids[rank] = ids[(rank + 1) % ids.len()];
            format!("id {} is there more than once", ids[rank])
        }
        Spoiled::Mass => {
            logprobs.fill(0.0);
            "probabilities sum to".into()
        }
    }
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn bad_rows_are_refused_by_the_first_of_them(
        config in configs(),
        which in 0usize..9,
        (count, first, second) in
            (1usize..200).prop_flat_map(|count| (Just(count), 0..count, 0..count)),
        seed: u64,
    ) {
        let codec = Codec::new(config).unwrap();
        let d = codec.vocab_size();
        let k = codec.k();
        let outside = if d < 1 << 63 { d as i64 } else { i64::MIN };
        let how = [
            Spoiled::Value(f32::NAN),
            Spoiled::Value(f32::INFINITY),
            Spoiled::Value(f32::NEG_INFINITY),
            Spoiled::Value(0.02),
            Spoiled::Id(-1),
            Spoiled::Id(i64::MIN),
            Spoiled::Id(outside),
            Spoiled::RepeatedId,
            Spoiled::Mass,
        ][which];
        prop_assume!(k > 1 || !matches!(how, Spoiled::RepeatedId | Spoiled::Mass));
        let (mut ids, mut logprobs) = rows(&codec, count, seed);
        // Sorted rows, so that the rank of an id is where it was put.
        for (ids, logprobs) in ids.chunks_mut(k).zip(logprobs.chunks_mut(k)) {
            let (sorted_ids, sorted_logprobs) = sorted(ids, logprobs);
            ids.copy_from_slice(&sorted_ids);
            logprobs.copy_from_slice(&sorted_logprobs);
        }
        let rank = seed as usize % k;
        let mut expected = String::new();
        for row in [first.max(second), first.min(second)] {
            let ids = &mut ids[row * k..(row + 1) * k];
            let logprobs = &mut logprobs[row * k..(row + 1) * k];
            expected = spoil(&codec, how, rank, ids, logprobs);
        }
        let error = encode(&codec, &ids, &logprobs).unwrap_err();
        let CodecError::Input(message) = &error else { panic!("{error:?}") };
        let row = first.min(second);
        prop_assert!(message.starts_with(&format!("row {row}: ")), "{} {}", message, row);
        prop_assert!(message.contains(&expected), "{}; expected {}", message, expected);
    }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn threads_do_not_change_results(config in configs(), count in 65usize..400, seed: u64) {
        let codec = Codec::new(config).unwrap();
        let (ids, logprobs) = rows(&codec, count, seed);
        let run = |threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let data = encode(&codec, &ids, &logprobs).unwrap();
                let decoded = decode(&codec, &data).unwrap();
                (data, decoded)
            })
        };
        let one = run(1);
        prop_assert!(run(2) == one);
        prop_assert!(run(4) == one);
    }
}

/// A dense row in float32 and its top-k by definition: descending, equal ones by ascending id.
fn naive_topk(row: &[f32], k: usize) -> (Vec<i64>, Vec<f64>) {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = row.iter().map(|&logit| f64::from(logit - highest).exp()).sum::<f64>().ln()
        + f64::from(highest);
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order.truncate(k);
    (
        order.iter().map(|&id| id as i64).collect(),
        order.iter().map(|&id| f64::from(row[id]) - log_sum).collect(),
    )
}

/// [`topk`] is the definition, and [`Codec::encode_logits`] is [`Codec::encode`] of it.
fn check_logits<L: Logit>(logits: &[L], width: usize, k: usize) -> Result<(), TestCaseError> {
    let count = logits.len() / width;
    let mut ids = vec![-1; count * k];
    let mut logprobs = vec![f32::NAN; count * k];
    let mut logsumexp = vec![f32::NAN; count];
    topk(logits, width, k, &mut ids, &mut logprobs, &mut logsumexp).unwrap();
    for (i, row) in logits.chunks(width).enumerate() {
        let row: Vec<f32> = row.iter().map(|logit| logit.to_f32()).collect();
        let (expected_ids, expected) = naive_topk(&row, k);
        prop_assert_eq!(&ids[i * k..(i + 1) * k], &expected_ids);
        for (found, expected) in logprobs[i * k..].iter().zip(expected) {
            prop_assert!(
                (f64::from(*found) - expected).abs() <= 1e-5 + 1e-6 * expected.abs(),
                "{} {}",
                found,
                expected
            );
        }
    }
    let fields = json!({
        "d": width,
        "k": k,
        "exact_k": 0,
        "polynomial_terms": [0, 1],
        "normalize_t": true,
        "residual_bins": [],
    });
    let codec = Codec::new(Config::from_json("quantized", &fields.to_string()).unwrap()).unwrap();
    let mut data = vec![0xAA; count * codec.bytes_per_row()];
    codec.encode_logits(logits, width, &mut data).unwrap();
    prop_assert_eq!(data, encode(&codec, &ids, &logprobs).unwrap());
    Ok(())
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn dense_logits_are_their_top_k(
        (width, k) in (2usize..3000).prop_flat_map(|width| (Just(width), 1..=width.min(200))),
        count in 0usize..10,
        kind in 0..4,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let logits: Vec<f32> = (0..count * width).map(|i| match kind {
            0 => random.unit() as f32 * 40.0 - 20.0,
            1 => random.below(5) as f32,
            2 => (i % width) as f32 * 0.01, // every one above all before
            _ if i % width >= k && random.below(2) == 0 => f32::NEG_INFINITY, // masked
            _ => random.unit() as f32,
        }).collect();
        check_logits(&logits, width, k)?;
        let bfloat16: Vec<bf16> = logits.iter().map(|&logit| bf16::from_f32(logit)).collect();
        check_logits(&bfloat16, width, k)?;
        let float16: Vec<f16> = logits.iter().map(|&logit| f16::from_f32(logit)).collect();
        check_logits(&float16, width, k)?;
    }
}

/// Finite log-probabilities of any size, such as those of logits masked with the lowest float.
fn extreme_rows(codec: &Codec, seed: u64) -> (Vec<i64>, Vec<f32>) {
    let mut random = Random(seed);
    let (ids, mut logprobs) = row(codec.vocab_size(), codec.k(), &mut random);
    let lowest = [-1e3, -1e5, -1e10, -1e30, -1e38, f32::MIN][random.below(6) as usize];
    let spread = random.below(2) == 0;
    for logprob in &mut logprobs {
        if random.below(3) == 0 {
            *logprob = lowest * if spread { 0.5 + 0.5 * random.unit() as f32 } else { 1.0 };
        }
    }
    (ids, logprobs)
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn extreme_rows_are_encoded_or_refused(config in configs(), seed: u64) {
        let codec = Codec::new(config).unwrap();
        let (ids, logprobs) = extreme_rows(&codec, seed);
        match encode(&codec, &ids, &logprobs) {
            Ok(data) => {
                let decoded = decode(&codec, &data);
                let Ok((found, values)) = decoded else { panic!("{decoded:?} from {logprobs:?}") };
                prop_assert_eq!(found, sorted(&ids, &logprobs).0);
                prop_assert!(values.iter().all(|value| value.is_finite()), "{:?}", values);
            }
            Err(CodecError::Input(message)) => {
                let named = message.starts_with("row 0: ") && message.contains("at rank ");
                prop_assert!(named, "{}", message);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// No likely id is approximated, and the best float16 coefficients, −65504 and 65504, have too much
/// probability: to lower the constant further made it infinite.
#[test]
fn a_row_whose_constant_cannot_be_lowered_is_encoded() {
    let fields = json!({
        "vocab_size": 256,
        "k": 200,
        "exact_k": 40,
        "polynomial_degree": 1,
        "invert_polynomial": true,
        "with_sqrt_term": false,
        "term_dtype": "float16",
    });
    let codec = Codec::new(Config::from_json("legacy", &fields.to_string()).unwrap()).unwrap();
    let (ids, logprobs) = extreme_rows(&codec, 8_577_224_831_887_481_801);
    let (_, found) = decode(&codec, &encode(&codec, &ids, &logprobs).unwrap()).unwrap();
    let mass: f64 = found.iter().map(|&value| f64::from(value).exp()).sum();
    assert!(found.is_sorted_by(|a, b| a >= b) && mass < 1.0 + 1e-5, "{mass} {found:?}");
}

/// Each stored value is finite, but not the decoder's sum of them.
#[test]
fn a_row_whose_decoded_values_are_too_large_is_refused() {
    let fields = json!({
        "d": 100,
        "k": 3,
        "exact_k": 3,
        "exact_dtype": "float16",
        "delta_encoding": true,
        "residual_bins": [],
    });
    let mut config = Config::from_json("quantized", &fields.to_string()).unwrap();
    let logprobs = [-0.1, -50_000.0, -100_000.0];
    let codec = Codec::new(config.clone()).unwrap();
    decode(&codec, &encode(&codec, &[0, 1, 2], &logprobs).unwrap()).unwrap();
    let Config::Quantized(quantized) = &mut config else { panic!("{config:?}") };
    quantized.published_rounding = true;
    let error = encode(&Codec::new(config).unwrap(), &[0, 1, 2], &logprobs).unwrap_err();
    let CodecError::Input(message) = &error else { panic!("{error:?}") };
    assert!(
        message.starts_with("row 0: log-probability -100000 at rank 2 does not fit"),
        "{message}"
    );
}

#[test]
fn logits_as_far_apart_as_floats_go_have_finite_log_probabilities_or_are_refused() {
    let mut ids = [0; 2];
    let mut logprobs = [0.0f32; 2];
    let mut logsumexp = [0.0f32];
    match topk(&[f32::MIN, f32::MAX], 2, 2, &mut ids, &mut logprobs, &mut logsumexp) {
        Ok(()) => {
            assert!(
                ids == [1, 0] && logprobs.iter().all(|value| value.is_finite()),
                "{logprobs:?}"
            );
        }
        Err(error) => assert!(matches!(error, CodecError::Input(_)), "{error:?}"),
    }
}

/// Rows of one value, with hardly any probability missing: raising exact values to make room for
/// the others would cost their total.
#[test]
fn tied_rows_stay_close() {
    let fields = json!({
        "d": 100,
        "k": 30,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0],
        "delta_encoding": false,
        "residual_bins": [],
    });
    let codec = Codec::new(Config::from_json("quantized", &fields.to_string()).unwrap()).unwrap();
    let ids: Vec<i64> = (0..30).collect();
    for value in [-3.4f32, -3.402, -3.41, -3.5, -4.0] {
        let (_, found) = decode(&codec, &encode(&codec, &ids, &[value; 30]).unwrap()).unwrap();
        let p: Vec<f64> = found.iter().map(|&found| f64::from(found).exp()).collect();
        let total: f64 = p.iter().sum();
        let kl: f64 = p.iter().map(|p| (total / (30.0 * p)).ln() / 30.0).sum();
        // Hardly anything is missing, so what exact values have too much the others have too little;
        // leaving it to the missing outcome would cost 2.6e-3.
        assert!(found.is_sorted_by(|a, b| a >= b) && kl < 8e-5, "{value}: {kl} {found:?}");
    }
}

#[test]
fn the_largest_configurations_round_trip() {
    let bins = json!([{"scale_dtype": "float32", "element_bits": 64, "num_elements": 60_000}]);
    for (d, terms, residual_bins) in [
        (65_536, json!([0, 1, "sqrt"]), json!([])),
        (1u64 << 63, json!([]), bins.clone()),
        (65_537, json!([0]), bins),
    ] {
        let fields = json!({
            "d": d,
            "k": 65_536,
            "exact_k": 5_536,
            "polynomial_terms": terms,
            "normalize_t": true,
            "residual_bins": residual_bins,
        });
        let codec =
            Codec::new(Config::from_json("quantized", &fields.to_string()).unwrap()).unwrap();
        let (ids, logprobs) = rows(&codec, 1, d);
        let (found, values) = decode(&codec, &encode(&codec, &ids, &logprobs).unwrap()).unwrap();
        assert_eq!(found, sorted(&ids, &logprobs).0);
        assert!(values.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let config = json!({"d": 100, "k": 4, "exact_k": 4, "residual_bins": []});
    let codec = Codec::new(Config::from_json("quantized", &config.to_string()).unwrap()).unwrap();
    let bytes = codec.bytes_per_row();
    let refused = |result: Result<(), CodecError>, parts: &[&str]| match result {
        Err(CodecError::Input(message)) => {
            assert!(parts.iter().all(|part| message.contains(part)), "{message}: {parts:?}");
        }
        other => panic!("{other:?}"),
    };
    let ids = [0, 1, 2, 3, 4, 5, 6, 7];
    let logprobs = [-2.0f32; 8];
    let mut out = vec![0; 2 * bytes + 1];
    refused(
        codec.encode(&ids[..7], &logprobs[..7], &mut out[..2 * bytes]),
        &["7 ids", "rows of 4"],
    );
    refused(
        codec.encode(&ids, &logprobs[..7], &mut out[..2 * bytes]),
        &["8 ids", "7 log-probabilities"],
    );
    for len in [0, bytes, 2 * bytes - 1, 2 * bytes + 1] {
        refused(
            codec.encode(&ids, &logprobs, &mut out[..len]),
            &[&format!("{len} output bytes"), &format!("need {} bytes", 2 * bytes)],
        );
    }
    codec.encode(&ids, &logprobs, &mut out[..2 * bytes]).unwrap();

    let mut ids = [0; 9];
    let mut values = [0.0; 9];
    for (id_len, value_len) in [(7, 8), (8, 7), (9, 9), (4, 4), (0, 0)] {
        let found = format!("outputs of {id_len} and {value_len} values");
        refused(
            codec.decode(&out[..2 * bytes], &mut ids[..id_len], &mut values[..value_len]),
            &[&found, "need 8"],
        );
    }

    let logits = [0.0f32; 200];
    refused(
        codec.encode_logits(&logits[..198], 99, &mut out[..2 * bytes]),
        &["99 columns", "vocabulary size is 100"],
    );
    refused(
        codec.encode_logits(&logits[..199], 100, &mut out[..2 * bytes]),
        &["199 logits", "rows of 100"],
    );
    refused(
        codec.encode_logits(&logits, 100, &mut out[..bytes]),
        &[&format!("output of {bytes} bytes"), &format!("need {}", 2 * bytes)],
    );
    refused(
        topk(&logits, 100, 0, &mut [], &mut [], &mut [0.0; 2]),
        &["k is 0", "between 1 and 100"],
    );
    refused(
        topk(&logits, 100, 101, &mut [0; 202], &mut [0.0; 202], &mut [0.0; 2]),
        &["k is 101", "between 1 and 100"],
    );
    refused(
        topk(&logits, 100, 4, &mut ids[..7], &mut values[..8], &mut [0.0; 2]),
        &["7 ids", "8 log-probabilities"],
    );
}
