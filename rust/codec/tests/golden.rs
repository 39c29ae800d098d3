//! The recorded vectors of the published formats: ids and exact values bit for bit, the others to
//! the recorded decoder's roundings.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use distillkit_codec::compact::{Compact, CompactConfig};
use distillkit_codec::{Backend, Codec, Config, FloatType, QuantizedConfig, bits, f16};
use npyz::{Deserialize, npz::NpzArchive};
use serde_json::Value;

fn golden() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "..", "tests", "golden"].iter().collect()
}

struct Recorded(NpzArchive<BufReader<File>>);

impl Recorded {
    fn open(name: &str) -> Self {
        Self(
            NpzArchive::open(golden().join(format!("{name}.npz")))
                .expect("recorded vectors are in tests/golden"),
        )
    }

    /// A (rows, width) array as its values and its width.
    fn array<T: Deserialize>(&mut self, name: &str) -> (Vec<T>, usize) {
        let array = self.0.by_name(name).expect("readable").expect(name);
        let width = array.shape()[1] as usize;
        (array.into_vec().expect("of the recorded type"), width)
    }
}

#[test]
fn bit_packing() {
    let mut recorded = Recorded::open("bitpack");
    for width in 1..=64 {
        let (values, count) = recorded.array::<i64>(&format!("w{width}_values"));
        let (packed, bytes) = recorded.array::<u8>(&format!("w{width}_bytes"));
        for (values, packed) in values.chunks(count).zip(packed.chunks(bytes)) {
            let values: Vec<u64> = values.iter().map(|&value| value as u64).collect();
            let mut out = vec![0; bytes];
            bits::pack(&values, width, &mut out).expect("packs");
            assert_eq!(out, packed, "width {width}");
            let mut back = vec![0; count];
            bits::unpack(packed, width, &mut back).expect("unpacks");
            assert_eq!(back, values, "width {width}");
        }
    }
}

/// The recorded columns as rows of bytes, and the number of rows.
fn rows(recorded: &mut Recorded, config: &Config) -> (Vec<u8>, usize) {
    let columns: Vec<(Vec<u8>, usize)> = match config {
        Config::Quantized(_) => {
            vec![recorded.array("compressed_logprobs"), recorded.array("bytepacked_indices")]
        }
        Config::Legacy(config) => {
            let (exact, exact_k) = recorded.array::<f32>("exact_values");
            let (words, count) = recorded.array::<i64>("packed_indices");
            let exact =
                exact.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
            let words = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut columns = vec![(exact, 2 * exact_k)];
            if !config.terms().is_empty() {
                let (coefficients, m) = recorded.array::<f32>("coeffs");
                let stored = config.coefficient_type();
                let bytes = |c: &f32| match stored {
                    FloatType::Bfloat16 => c.to_le_bytes()[2..].to_vec(),
                    _ => c.to_le_bytes().to_vec(),
                };
                columns.push((coefficients.iter().flat_map(bytes).collect(), m * stored.size()));
            }
            columns.push((words, 8 * count));
            columns
        }
    };
    let count = columns[0].0.len() / columns[0].1;
    let row = |i: usize| {
        columns.iter().flat_map(move |(data, width)| data[i * width..(i + 1) * width].to_vec())
    };
    ((0..count).flat_map(row).collect(), count)
}

/// How far the recorded decoder's roundings can take it from the sum: for exact ranks, and for the
/// others.
fn tolerance(config: &Config, largest: f32) -> (f32, f32) {
    let half_ulp = |kind: FloatType| match kind {
        FloatType::Float16 => 2f32.powi(-11),
        FloatType::Bfloat16 => 2f32.powi(-8),
        _ => 2f32.powi(-23),
    };
    match config {
        // Sums of terms hundreds of times larger than the result.
        Config::Legacy(_) => (0.0, 2e-3),
        Config::Quantized(config) => {
            let exact = if config.delta_encoding {
                1.01 * half_ulp(config.exact_dtype) * largest + 1e-6
            } else {
                0.0
            };
            let rounded = config.delta_encoding || !config.residual_bins.is_empty();
            let mut rest =
                if rounded { 2.02 * half_ulp(config.exact_dtype) * largest } else { 0.0 };
            if config.term_dtype.size() == 2 {
                let steps = if config.delta_encoding { config.approximated() as f32 } else { 1.0 };
                rest += half_ulp(config.term_dtype) * (2.02 * largest + 0.1 * steps);
            }
            (exact, rest + 1e-5)
        }
    }
}

#[test]
fn decoding() {
    let cases: Value =
        serde_json::from_reader(File::open(golden().join("cases.json")).expect("cases.json"))
            .expect("JSON");
    let cases = cases.as_object().expect("an object of cases");
    assert_eq!(cases.len(), 37);
    for (name, case) in cases {
        let format = if case["format"] == "legacy" { "legacy" } else { "quantized" };
        let config =
            Config::from_json(format, &case["config"].to_string()).expect("a valid configuration");
        let codec = Codec::new(config.clone()).expect("a valid configuration");
        let mut recorded = Recorded::open(name);
        let (data, count) = rows(&mut recorded, &config);
        assert_eq!(data.len(), count * codec.bytes_per_row(), "{name}");

        let k = codec.k();
        let mut ids = vec![0; count * k];
        let mut logprobs = vec![0.0; count * k];
        codec.decode(&data, &mut ids, &mut logprobs).expect("decodes");
        let expected_ids: Vec<i64> =
            recorded.array::<i32>("out_ids").0.into_iter().map(i64::from).collect();
        assert_eq!(ids, expected_ids, "{name}");

        let (expected, _) = recorded.array::<f32>("out_logprobs");
        let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let (exact, rest) = tolerance(&config, largest);
        let exact_k = case["config"]["exact_k"].as_u64().expect("a number") as usize;
        for (i, (found, expected)) in logprobs.iter().zip(&expected).enumerate() {
            let allowed = if i % k < exact_k { exact } else { rest };
            assert!(
                (found - expected).abs() <= allowed,
                "{name}, row {}, rank {}: {found} {expected}",
                i / k,
                i % k
            );
        }
    }
}

/// FNV-1a.
fn hash(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The bytes that the recorded rows encode to, on every instruction set of this machine, are those
/// recorded here: they depend on no machine. What is encoded is in order and has a total
/// probability of at most 1 wherever coefficients are float32 and alone.
#[test]
fn encoding() {
    const RECORDED: u64 = 0x63ba_9861_a79d_d6da;
    let cases: Value =
        serde_json::from_reader(File::open(golden().join("cases.json")).expect("cases.json"))
            .expect("JSON");
    let mut all = Vec::new();
    for (name, case) in cases.as_object().expect("an object of cases") {
        let format = if case["format"] == "legacy" { "legacy" } else { "quantized" };
        let config =
            Config::from_json(format, &case["config"].to_string()).expect("a valid configuration");
        let mut recorded = Recorded::open(name);
        let ids: Vec<i64> = recorded.array::<i32>("in_ids").0.into_iter().map(i64::from).collect();
        let (logprobs, k) = recorded.array::<f32>("in_logprobs");
        let encoded = |backend| {
            let codec =
                Codec::with_backend(config.clone(), backend).expect("a valid configuration");
            let mut data = vec![0; ids.len() / k * codec.bytes_per_row()];
            codec.encode(&ids, &logprobs, &mut data).expect("encodes");
            (codec, data)
        };
        let (codec, data) = encoded(Backend::Portable);
        for backend in Backend::available() {
            assert!(
                encoded(backend).1 == data,
                "{name}: {} writes other bytes than portable",
                backend.name()
            );
        }
        let is_plain = |config: &QuantizedConfig| {
            config.residual_bins.is_empty() && config.term_dtype == FloatType::Float32
        };
        if matches!(&config, Config::Quantized(config) if is_plain(config)) {
            let mut back_ids = vec![0; ids.len()];
            let mut back = vec![0.0f32; ids.len()];
            codec.decode(&data, &mut back_ids, &mut back).expect("decodes");
            for (row, values) in back.chunks(k).enumerate() {
                assert!(values.is_sorted_by(|a, b| a >= b), "{name}, row {row}: {values:?}");
                assert!(
                    values.iter().map(|&value| f64::from(value).exp()).sum::<f64>() < 1.0 + 1e-5,
                    "{name}, row {row}"
                );
            }
        }
        all.extend(data);
    }
    assert_eq!(
        hash(&all),
        RECORDED,
        "the encoder writes other bytes than it did: if that was meant, record {:#018x}",
        hash(&all)
    );
}

/// The bytes of hexadecimal digits.
fn from_hex(text: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}

#[test]
fn compact() {
    let text = std::fs::read_to_string(golden().join("compact.json")).expect("recorded");
    let recorded: Value = serde_json::from_str(&text).expect("JSON");
    let mut prior = Vec::new();
    for case in recorded["cases"].as_array().expect("cases") {
        let config = CompactConfig::from_json(&case["config"].to_string()).expect("valid");
        if let Some(text) = case["prior"].as_str() {
            prior = from_hex(text);
        }
        let numbers = |name: &str| -> Vec<i64> {
            let all = case[name].as_array().expect(name).iter();
            all.map(|number| number.as_i64().expect("an integer")).collect()
        };
        let (ids, bits) = (numbers("ids"), numbers("logprob_bits"));
        let document = from_hex(case["document"].as_str().expect("a document"));
        for backend in Backend::available() {
            let own = config.prior.is_some().then_some(&prior[..]);
            let codec = Compact::with_backend(config.clone(), own, backend).expect("valid");
            let mut back = (vec![0; ids.len()], vec![0.0f32; ids.len()]);
            codec.decode_document(&document, &mut back.0, &mut back.1).expect("decodes");
            assert_eq!(back.0, ids, "{}", case["name"]);
            let back: Vec<i64> = back.1.iter().map(|value| i64::from(value.to_bits())).collect();
            assert_eq!(back, bits, "{}", case["name"]);
        }
    }
}
