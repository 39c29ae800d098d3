//! The compact format: what comes back of rows, on every instruction set, with and without a prior;
//! and that damage to documents and priors is an error or harmless.

use std::collections::HashSet;
use std::sync::OnceLock;

use distillkit_codec::compact::{Compact, CompactConfig, Part, checksum, learn};
use distillkit_codec::{Backend, CodecError};
use proptest::prelude::*;

/// A row: ids and log-probabilities.
type Row = (Vec<i64>, Vec<f32>);

fn config(json: &str) -> CompactConfig {
    CompactConfig::from_json(json).expect("valid")
}

/// Numbers without a pattern.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A row of `width` ids below `vocab`, most of them low, as a language model gives it.
    fn row(&mut self, width: usize, vocab: usize) -> Row {
        let steepness = 0.5 + 2.0 * self.next();
        let mut weights: Vec<f64> =
            (1..=vocab).map(|rank| (rank as f64).powf(-steepness) * (0.1 + self.next())).collect();
        let total: f64 = weights.iter().sum::<f64>() * (1.0 + 0.3 * self.next());
        weights.sort_by(|a, b| b.total_cmp(a));
        let mut ids: Vec<(f64, i64)> =
            (0..vocab as i64).map(|id| (self.next() * (id + 3) as f64, id)).collect();
        ids.sort_by(|a, b| a.0.total_cmp(&b.0));
        let logprobs = weights.iter().take(width).map(|weight| (weight / total).ln() as f32);
        (ids.iter().take(width).map(|pair| pair.1).collect(), logprobs.collect())
    }

    fn rows(&mut self, count: usize, width: usize, vocab: usize) -> Row {
        let rows: Vec<Row> = (0..count).map(|_| self.row(width, vocab)).collect();
        let logprobs = rows.iter().flat_map(|row| row.1.clone()).collect();
        (rows.into_iter().flat_map(|row| row.0).collect(), logprobs)
    }
}

fn decoded(codec: &Compact, data: &[u8], rows: usize) -> Result<Row, CodecError> {
    let k = codec.config().k;
    let (mut ids, mut logprobs) = (vec![-1; rows * k], vec![1.0; rows * k]);
    codec.decode_document(data, &mut ids, &mut logprobs)?;
    Ok((ids, logprobs))
}

/// Which ids of a row are stored, the most probable first: the definition.
fn stored(config: &CompactConfig, ids: &[i64], logprobs: &[f32]) -> Vec<(i64, f64)> {
    let mut row: Vec<(i64, f64)> =
        ids.iter().copied().zip(logprobs.iter().map(|&l| f64::from(l))).collect();
    row.sort_by(|a, b| b.1.total_cmp(&a.1));
    row.truncate(config.k);
    let mut before = 0.0;
    let mut kept = Vec::new();
    for (id, logprob) in row {
        let enough = config.mass.is_some_and(|mass| before >= mass);
        let small = config.threshold.is_some_and(|threshold| logprob.exp() < threshold);
        if logprob == f64::NEG_INFINITY || !kept.is_empty() && (enough || small) {
            break;
        }
        before += logprob.exp();
        kept.push((id, logprob));
    }
    kept
}

/// What any decoded row must be, and how much probability it has.
fn check_row(ids: &[i64], logprobs: &[f32], vocab: u32) -> (usize, f64) {
    let count = logprobs.iter().take_while(|&&logprob| logprob > f32::NEG_INFINITY).count();
    assert!(count > 0);
    assert!(logprobs.windows(2).all(|pair| pair[0] >= pair[1]), "{logprobs:?}");
    assert!(logprobs[..count].iter().all(|&logprob| logprob <= 0.0));
    assert!(ids.iter().all(|&id| (0..i64::from(vocab)).contains(&id)), "{ids:?}");
    assert_eq!(ids[..count].iter().collect::<HashSet<_>>().len(), count, "{ids:?}");
    assert!(ids[count..].iter().all(|&id| id == ids[0]));
    let total: f64 = logprobs[..count].iter().map(|&logprob| f64::from(logprob).exp()).sum();
    assert!(total < 1.0 + 1e-5, "{total}");
    (count, total)
}

/// Checks what comes back of a row.
fn check_back(config: &CompactConfig, given: (&[i64], &[f32]), back: (&[i64], &[f32])) {
    let expected = stored(config, given.0, given.1);
    let (count, total) = check_row(back.0, back.1, config.vocab_size);
    assert_eq!(back.0[0], expected[0].0);
    let ids: HashSet<i64> = expected.iter().map(|pair| pair.0).collect();
    assert_eq!(back.0[..count].iter().copied().collect::<HashSet<_>>(), ids);
    let kept: f64 = expected.iter().map(|pair| pair.1.exp()).sum();
    let angle = |stored: f64| (1.0 - stored).clamp(0.0, 1.0).sqrt().asin();
    // Half a step of the missing mass, as an angle; float32 sums near 0 and 1.
    let half = std::f64::consts::FRAC_PI_2 / 384.0 / 2.0;
    let edge = (1.0 - kept) > 0.999;
    assert!(edge || (angle(kept) - angle(total)).abs() < half + 2e-3, "{kept} {total}");
    for (id, logprob) in &expected {
        let place = back.0.iter().position(|other| other == id).expect("stored");
        let roots = [logprob / 2.0, f64::from(back.1[place]) / 2.0].map(f64::exp);
        let error = (roots[0] - roots[1]).abs();
        assert!(edge || error < 4.0 * config.step + 0.02, "id {id}: {roots:?}");
    }
}

/// Rows of a small vocabulary to learn from.
fn sample() -> &'static Row {
    static SAMPLE: OnceLock<Row> = OnceLock::new();
    SAMPLE.get_or_init(|| Random(1).rows(600, 24, 300))
}

/// A prior for a configuration of a vocabulary of 300 and at most 24 ids.
fn prior(config: &CompactConfig) -> Vec<u8> {
    let (ids, logprobs) = sample();
    learn(config, ids, logprobs, 24, None).expect("learns").to_bytes()
}

fn codec(config: &CompactConfig, prior: Option<&[u8]>) -> Compact {
    Compact::new(config.clone(), prior).expect("valid")
}

const CONFIGS: [&str; 5] = [
    r#"{"vocab_size": 300, "k": 24, "step": 0.003}"#,
    r#"{"vocab_size": 300, "k": 1, "step": 0.02}"#,
    r#"{"vocab_size": 300, "k": 20, "threshold": 0.004, "step": 0.01}"#,
    r#"{"vocab_size": 300, "k": 24, "mass": 0.8, "step": 0.0005}"#,
    r#"{"vocab_size": 300, "k": 7, "threshold": 0.01, "mass": 0.9, "step": 0.25}"#,
];

/// Codecs with their priors, and without.
fn codecs() -> &'static [(CompactConfig, Vec<u8>)] {
    static CODECS: OnceLock<Vec<(CompactConfig, Vec<u8>)>> = OnceLock::new();
    CODECS.get_or_init(|| CONFIGS.map(config).map(|config| (config.clone(), prior(&config))).into())
}

/// Rows of 24 to 30 ids: ties, absent ids, ids in any order, distributions of all kinds.
fn rows() -> impl Strategy<Value = (usize, Vec<Row>)> {
    let value = prop_oneof![
        4 => 0.0f32..12.0,
        1 => Just(3.0f32),
        1 => Just(f32::INFINITY),
        1 => 12.0f32..200.0
    ];
    (24usize..30).prop_flat_map(move |width| {
        let ids = Just((0..300).collect::<Vec<i64>>()).prop_shuffle();
        let values = prop::collection::vec(value.clone(), width);
        let mass = prop_oneof![Just(1.0f64), 1e-4f64..1.0, Just(1.0 - 1e-6)];
        let row = (ids, values, mass).prop_map(move |(ids, values, mass)| {
            let mut values = values;
            if values.iter().all(|value| value.is_infinite()) {
                values[width / 2] = 1.0;
            }
            let total: f64 = values.iter().map(|&value| (-f64::from(value)).exp()).sum();
            let logprobs =
                values.iter().map(|&value| (mass.ln() - f64::from(value) - total.ln()) as f32);
            (ids[..width].to_vec(), logprobs.map(|logprob| logprob.min(0.0)).collect())
        });
        // Repeated, for as many streams as there may be.
        let rows = (prop::collection::vec(row, 1..70), 1usize..4);
        (Just(width), rows.prop_map(|(rows, times)| vec![rows; times].concat()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn rows_come_back(case in rows(), which in 0..CONFIGS.len(), learned: bool) {
        let (width, rows) = case;
        let (config, prior) = &codecs()[which];
        let codec = codec(config, learned.then_some(&prior[..]));
        let (ids, logprobs): (Vec<_>, Vec<_>) = rows.iter().cloned().unzip();
        let (ids, logprobs) = (ids.concat(), logprobs.concat());
        let data = codec.encode_document(&ids, &logprobs, width).expect("encodes");
        codec.check(&data, rows.len()).expect("fits");
        let back = decoded(&codec, &data, rows.len()).expect("decodes");
        for backend in Backend::available() {
            let other = Compact::with_backend(config.clone(), learned.then_some(&prior[..]), backend)
                .expect("valid");
            prop_assert_eq!(&other.encode_document(&ids, &logprobs, width).expect("encodes"), &data);
            let same = decoded(&other, &data, rows.len()).expect("decodes");
            prop_assert_eq!(&same.0, &back.0);
            prop_assert!(same.1.iter().zip(&back.1).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        for (row, (ids, logprobs)) in rows.iter().enumerate() {
            let at = row * config.k..(row + 1) * config.k;
            check_back(config, (ids, logprobs), (&back.0[at.clone()], &back.1[at]));
        }
        let sizes = codec.sizes(&data, rows.len()).expect("sizes");
        let bits = codec.row_bits(&data, rows.len()).expect("bits");
        let parts = sizes.head + sizes.ids + sizes.values;
        prop_assert!((parts + sizes.framing - data.len() as f64).abs() < 1e-6);
        prop_assert!((parts - f64::from(bits.iter().sum::<f32>()) / 8.0).abs() < 1e-6);
    }
}

#[test]
fn many_ids_of_many_rows_are_the_same_on_every_instruction_set() {
    for (k, vocab, more) in
        [(200, 1500, ""), (97, 70_000, ""), (300, 1500, ", \"threshold\": 1e-4")]
    {
        let config =
            config(&format!("{{\"vocab_size\": {vocab}, \"k\": {k}, \"step\": 0.004{more}}}"));
        let rows = 145;
        let (mut ids, logprobs) = Random(k as u64).rows(rows, k, 1500);
        // Also ids that are far apart.
        for id in &mut ids {
            *id = *id * (vocab - 1) / 1499;
        }
        let learned = learn(&config, &ids[..40 * k], &logprobs[..40 * k], k, None).expect("learns");
        let prior = learned.to_bytes();
        let back = Backend::available().into_iter().map(|backend| {
            let codec =
                Compact::with_backend(config.clone(), Some(&prior), backend).expect("valid");
            let data = codec.encode_document(&ids, &logprobs, k).expect("encodes");
            let (ids, logprobs) = decoded(&codec, &data, rows).expect("decodes");
            (data, ids, logprobs.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
        });
        let back: Vec<_> = back.collect();
        assert!(back.windows(2).all(|pair| pair[0] == pair[1]), "k = {k}");
        for row in 0..rows {
            let at = row * k..(row + 1) * k;
            let values: Vec<f32> =
                back[0].2[at.clone()].iter().map(|&v| f32::from_bits(v)).collect();
            check_back(
                &config,
                (&ids[at.clone()], &logprobs[at.clone()]),
                (&back[0].1[at], &values),
            );
        }
    }
}

#[test]
fn parts_of_documents_are_joined_without_a_change() {
    let (config, prior) = &codecs()[2];
    let codec = codec(config, Some(prior));
    let mut random = Random(5);
    let documents: Vec<(usize, Vec<u8>, Row)> = [100, 3, 40]
        .map(|rows| {
            let (ids, logprobs) = random.rows(rows, 24, 300);
            let data = codec.encode_document(&ids, &logprobs, 24).expect("encodes");
            let back = decoded(&codec, &data, rows).expect("decodes");
            (rows, data, back)
        })
        .into();
    let spans = [(0, 10, 73), (2, 0, 40), (1, 1, 1), (0, 99, 100)];
    let parts = spans.map(|(document, start, stop)| {
        let (rows, data, _) = &documents[document];
        Part { data, rows: *rows, start, stop }
    });
    let joined = codec.join(&parts).expect("joins");
    let expected = |ids: bool| -> Vec<String> {
        let part = |&(document, start, stop): &(usize, usize, usize)| {
            let at = start * config.k..stop * config.k;
            let (own_ids, logprobs) = &documents[document].2;
            let ids_of = own_ids[at.clone()].iter().map(ToString::to_string);
            let values = logprobs[at].iter().map(|logprob| logprob.to_bits().to_string());
            if ids { ids_of.collect::<Vec<_>>() } else { values.collect() }
        };
        spans.iter().flat_map(part).collect()
    };
    let back = decoded(&codec, &joined, 104).expect("decodes");
    assert_eq!(back.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expected(true));
    assert_eq!(
        back.1.iter().map(|value| value.to_bits().to_string()).collect::<Vec<_>>(),
        expected(false)
    );
    let beyond = Part { data: &documents[1].1, rows: 3, start: 2, stop: 4 };
    assert!(matches!(codec.join(&[beyond]), Err(CodecError::Input(_))));
    let none = codec.join(&[]).expect("joins");
    assert_eq!(decoded(&codec, &none, 0), Ok((vec![], vec![])));
}

/// Whether an error says that bytes are damaged.
fn is_damage(error: &CodecError) -> bool {
    matches!(error, CodecError::Corrupt(_) | CodecError::Truncated { .. })
}

/// Whatever decodes is rows, which are the same with every instruction set; what does not is damage.
fn check_document(codecs: &[Compact], data: &[u8], rows: usize) -> bool {
    let (codec, others) = codecs.split_first().expect("one at least");
    let k = codec.config().k;
    let found = decoded(codec, data, rows);
    for other in others {
        let same = decoded(other, data, rows);
        assert_eq!(found.as_ref().ok(), same.as_ref().ok());
        assert!(same.as_ref().err().is_none_or(is_damage), "{same:?}");
    }
    match found {
        Ok((ids, logprobs)) => {
            for (ids, logprobs) in ids.chunks(k).zip(logprobs.chunks(k)) {
                check_row(ids, logprobs, codec.config().vocab_size);
            }
            true
        }
        Err(error) => {
            assert!(is_damage(&error), "{error:?}");
            false
        }
    }
}

#[test]
fn damaged_documents_are_refused_or_rows() {
    for (config, prior) in codecs() {
        // Of 130 rows with few ids only, which take long enough.
        let many = if config.k < 10 { 130 } else { 33 };
        for (prior, rows) in [(Some(&prior[..]), 3), (None, 3), (Some(&prior[..]), many)] {
            let with = |backend| Compact::with_backend(config.clone(), prior, backend);
            let codecs =
                [Backend::detect(), Backend::Portable].map(|isa| with(isa).expect("valid"));
            let codec = &codecs[0];
            let (ids, logprobs) = Random(9).rows(rows, 24, 300);
            let data = codec.encode_document(&ids, &logprobs, 24).expect("encodes");
            for end in 0..data.len() {
                assert!(
                    !check_document(&codecs, &data[..end], rows),
                    "{end} bytes of {}",
                    data.len()
                );
            }
            for wrong in [rows - 1, rows + 1] {
                assert!(codec.check(&data, wrong).is_err_and(|error| is_damage(&error)));
            }
            let mut longer = data.clone();
            longer.push(0);
            assert!(!check_document(&codecs, &longer, rows));
            for bit in 0..8 * data.len() {
                let mut damaged = data.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(!check_document(&codecs, &damaged, rows), "bit {bit}");
                // Whoever crafts a document gives it a checksum, too.
                let sum = checksum(&damaged[4..]).to_le_bytes();
                damaged[..4].copy_from_slice(&sum);
                check_document(&codecs, &damaged, rows);
            }
            for end in 4..data.len() {
                let mut damaged = data[..end].to_vec();
                let sum = checksum(&damaged[4..]).to_le_bytes();
                damaged[..4].copy_from_slice(&sum);
                assert!(!check_document(&codecs, &damaged, rows), "{end} bytes");
            }
        }
    }
}

#[test]
fn damaged_priors_are_refused_or_priors() {
    let config = config(r#"{"vocab_size": 30, "k": 5, "threshold": 0.01, "step": 0.2}"#);
    let mut random = Random(3);
    // As many rows as are read side by side.
    let (ids, logprobs) = random.rows(132, 5, 30);
    let whole = learn(&config, &ids, &logprobs, 5, None).expect("learns").to_bytes();
    let document = codec(&config, Some(&whole))
        .encode_document(&ids[..650], &logprobs[..650], 5)
        .expect("encodes");
    let damage = |data: &[u8]| match Compact::new(config.clone(), Some(data)) {
        Ok(codec) => {
            let portable = Compact::with_backend(config.clone(), Some(data), Backend::Portable);
            let codecs = [codec, portable.expect("valid")];
            check_document(&codecs, &document, 130);
            // With any valid prior, rows come back.
            let own = codecs[0].encode_document(&ids, &logprobs, 5).expect("encodes");
            assert!(check_document(&codecs, &own, 132));
            true
        }
        // A configuration is part of a prior.
        Err(CodecError::Config { .. }) => false,
        Err(error) => {
            assert!(is_damage(&error), "{error:?}");
            false
        }
    };
    for end in 0..whole.len() {
        assert!(!damage(&whole[..end]), "{end} bytes of {}", whole.len());
    }
    let mut accepted = 0;
    for bit in (0..8 * whole.len()).filter(|bit| bit / 8 < 600 || bit % 7 == 0) {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        accepted += usize::from(damage(&damaged));
    }
    assert!(accepted > 0, "some bits only change what is likely");
}

#[test]
fn rows_that_cannot_be_stored_are_refused_by_number() {
    let codec = codec(&config(r#"{"vocab_size": 10, "k": 2, "step": 0.01}"#), None);
    let fine = ([1, 2, 3, 4], [-0.5f32, -1.0, -0.1, -3.0]);
    let encode = |ids: &[i64], logprobs: &[f32]| codec.encode_document(ids, logprobs, 2);
    let twice = encode(&fine.0, &fine.1).expect("encodes");
    assert_eq!(decoded(&codec, &twice, 2).expect("decodes").0, fine.0);
    for (ids, logprobs, fact) in [
        ([1, 2, 3, 3], fine.1, "id 3"),
        ([1, 2, 10, 3], fine.1, "id 10"),
        ([1, 2, -1, 3], fine.1, "id -1"),
        (fine.0, [-0.5, -1.0, f32::NAN, -3.0], "NaN"),
        (fine.0, [-0.5, -1.0, -3.0, f32::NAN], "NaN"),
        (fine.0, [-0.5, -1.0, 0.5, -3.0], "0.5"),
        (fine.0, [-0.5, -1.0, -0.1, -0.2], "1.72"),
        (fine.0, [-0.5, -1.0, f32::NEG_INFINITY, f32::NEG_INFINITY], "no id"),
    ] {
        let message = match encode(&ids, &logprobs) {
            Err(CodecError::Input(message)) => message,
            other => format!("{ids:?} {logprobs:?} give {other:?}"),
        };
        assert!(message.contains("row 1") && message.contains(fact), "{message}");
    }
    assert!(matches!(codec.encode_document(&[1], &[-1.0], 1), Err(CodecError::Input(_))));
    assert!(matches!(codec.encode_document(&[1, 2, 3], &[-1.0; 3], 2), Err(CodecError::Input(_))));
    let rounded = [(0.6f32).ln(), (0.4009f32).ln()];
    let data = encode(&[5, 6], &rounded).expect("sums may exceed 1 by rounding");
    let back = decoded(&codec, &data, 1).expect("decodes");
    assert!((back.1.iter().map(|logprob| logprob.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
}

#[test]
fn a_prior_is_for_its_configuration() {
    let (config, prior) = &codecs()[0];
    let known = codec(config, Some(prior));
    assert_eq!(&Compact::prior_config(prior).expect("a prior"), config);
    let named = known.config();
    assert_eq!(codec(named, Some(prior)).config(), named);
    let refused = |config: &CompactConfig, prior: Option<&[u8]>| {
        Compact::new(config.clone(), prior).expect_err("refused")
    };
    let other = CompactConfig { k: 23, ..config.clone() };
    assert!(matches!(refused(&other, Some(prior)), CodecError::Config { .. }));
    assert!(matches!(refused(named, None), CodecError::Config { .. }));
    let wrong = CompactConfig { prior: Some("0".repeat(32)), ..config.clone() };
    assert!(matches!(refused(&wrong, Some(prior)), CodecError::Corrupt(_)));
    // A document that was written with a prior does not open without it.
    let (ids, logprobs) = Random(4).rows(5, 24, 300);
    let data = known.encode_document(&ids, &logprobs, 24).expect("encodes");
    assert!(is_damage(&codec(config, None).check(&data, 5).expect_err("refused")));
}

#[test]
fn a_prior_saves_and_never_costs_much() {
    let (config, prior) = &codecs()[0];
    let (with, without) = (codec(config, Some(prior)), codec(config, None));
    let bytes = |codec: &Compact, (ids, logprobs): &Row| {
        codec.encode_document(ids, logprobs, 24).expect("encodes").len()
    };
    let like = Random(77).rows(200, 24, 300);
    assert!(bytes(&with, &like) < bytes(&without, &like));
    // Ids that the prior takes for rare, and other distributions.
    let (ids, _) = Random(78).rows(200, 24, 300);
    let unlike: Row =
        (ids.iter().map(|id| 299 - id).collect(), vec![-(24f32.ln()) - 0.5; ids.len()]);
    assert!(100 * bytes(&with, &unlike) <= 101 * bytes(&without, &unlike));
    // At most the fixed layout's bytes: nine bits an id, and the values of the preset `budget`.
    assert!(bytes(&without, &unlike) < 200 * (27 + 24));
}
