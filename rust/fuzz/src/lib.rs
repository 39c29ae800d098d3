//! What the fuzz targets share: configurations from arbitrary bytes, and what must hold of anything
//! that decodes.
//!
//! Configurations go through their JSON, as they do in use, and are often not valid: fields are
//! drawn from a little more than their range. k is mostly small: an input's time and the bytes that
//! it needs for a row grow with it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use arbitrary::{Result, Unstructured};
use distillkit_codec::compact::{Compact, CompactConfig};
use distillkit_codec::{Backend, Codec, CodecError, Config};
use libfuzzer_sys::Corpus;
use serde_json::{Value, json};

/// The fields of either configuration.
#[derive(Debug)]
pub struct Fields {
    format: &'static str,
    json: Value,
}

fn float_type(u: &mut Unstructured) -> Result<&'static str> {
    u.choose(&["float16", "bfloat16", "float32", "float64"]).copied()
}

fn vocab(u: &mut Unstructured) -> Result<u64> {
    let d = *u.choose(&[
        2,
        3,
        255,
        256,
        257,
        65_536,
        65_537,
        131_072,
        131_073,
        1 << 32,
        1 << 62,
        1 << 63,
        0,
    ])?;
    if d == 0 { u.arbitrary() } else { Ok(d) }
}

fn ranks(u: &mut Unstructured) -> Result<usize> {
    let most = if u.ratio(7, 8)? { 24 } else { 200 };
    u.int_in_range(1..=most)
}

fn term(u: &mut Unstructured) -> Result<Value> {
    Ok(match u.int_in_range(0..=9u8)? {
        0 => json!("sqrt"),
        1 => json!("exp"),
        2 => json!(u.arbitrary::<i32>()?),
        _ => json!(u.int_in_range(-2..=5)?),
    })
}

impl Fields {
    /// Fields of either.
    pub fn any(u: &mut Unstructured) -> Result<Self> {
        if u.arbitrary()? { Self::quantized(u) } else { Self::legacy(u) }
    }

    /// Fields of `logprob_compressor`.
    pub fn quantized(u: &mut Unstructured) -> Result<Self> {
        let k = ranks(u)?;
        let exact_k = u.int_in_range(0..=k)?;
        let mut left = k - exact_k;
        let mut bins = Vec::new();
        while left > 0 && bins.len() < 8 && u.arbitrary()? {
            let size = u.int_in_range(1..=left)?;
            left -= size;
            bins.push(json!({
                "scale_dtype": float_type(u)?,
                "element_bits": u.int_in_range(1..=64u8)?,
                "num_elements": size,
            }));
        }
        let terms = (0..u.int_in_range(0..=6u8)?).map(|_| term(u)).collect::<Result<Vec<_>>>()?;
        let json = json!({
            "d": vocab(u)?,
            "k": k,
            "exact_k": exact_k,
            "exact_dtype": float_type(u)?,
            "polynomial_terms": terms,
            "term_dtype": float_type(u)?,
            "residual_bins": bins,
            "delta_encoding": u.arbitrary::<bool>()?,
            "error_diffusion": u.arbitrary::<bool>()?,
            "normalize_t": u.arbitrary::<bool>()?,
        });
        Ok(Self { format: "quantized", json })
    }

    /// Fields of `legacy_logit_compression`.
    pub fn legacy(u: &mut Unstructured) -> Result<Self> {
        let k = ranks(u)?;
        let json = json!({
            "vocab_size": vocab(u)?,
            "k": k,
            "exact_k": u.int_in_range(0..=k)?,
            "polynomial_degree": u.int_in_range(0..=8u8)?,
            "invert_polynomial": u.arbitrary::<bool>()?,
            "with_sqrt_term": u.arbitrary::<bool>()?,
            "term_dtype": float_type(u)?,
        });
        Ok(Self { format: "legacy", json })
    }

    /// The codec on every backend of this CPU, the portable one first, or nothing for fields that
    /// were refused as a configuration.
    pub fn codecs(&self) -> Option<Vec<Codec>> {
        let config = match Config::from_json(self.format, &self.json.to_string()) {
            Ok(config) => config,
            Err(CodecError::Config { .. }) => return None,
            Err(other) => panic!("{} is refused with {other:?}", self.json),
        };
        let codec = |backend| {
            Codec::with_backend(config.clone(), backend)
                .expect("a valid configuration makes a codec")
        };
        Some(Backend::available().into_iter().map(codec).collect())
    }
}

/// A configuration and its codecs.
#[derive(Debug)]
pub struct Prepared {
    pub fields: Fields,
    pub codecs: Vec<Codec>,
}

/// Draws a configuration that is valid, or nothing: an arbitrary one, or one of 256 whose codecs
/// are kept between inputs, since to prepare them takes longer than a row.
pub fn prepared(
    u: &mut Unstructured,
    draw: impl Fn(&mut Unstructured) -> Result<Fields>,
) -> Result<Option<Rc<Prepared>>> {
    let prepare = |u: &mut Unstructured| {
        let fields = draw(u)?;
        Ok(fields.codecs().map(|codecs| Rc::new(Prepared { fields, codecs })))
    };
    if u.ratio(1, 4)? { prepare(u) } else { kept(u.arbitrary()?, prepare) }
}

thread_local! {
    static KEPT: RefCell<HashMap<u8, Option<Rc<Prepared>>>> = RefCell::default();
}

fn kept(
    number: u8,
    prepare: impl FnOnce(&mut Unstructured) -> Result<Option<Rc<Prepared>>>,
) -> Result<Option<Rc<Prepared>>> {
    if let Some(found) = KEPT.with_borrow(|kept| kept.get(&number).cloned()) {
        return Ok(found);
    }
    // Bytes that depend on the number alone, by xorshift.
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ u64::from(number) << 17;
    let bytes: Vec<u8> = (0..256)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    let made = prepare(&mut Unstructured::new(&bytes))?;
    KEPT.with_borrow_mut(|kept| kept.insert(number, made.clone()));
    Ok(made)
}

/// Decodes any bytes: they are refused as truncated or corrupt, or the answer is one, and the same
/// on every backend.
pub fn decode(codecs: &[Codec], data: &[u8]) -> distillkit_codec::Result<(Vec<i64>, Vec<f32>)> {
    let decoded = decode_on(&codecs[0], data);
    for codec in &codecs[1..] {
        let here = decode_on(codec, data);
        let first = codecs[0].backend();
        // Bits, as 0 and −0 are not the same.
        let bits = |(ids, logprobs): &(Vec<i64>, Vec<f32>)| {
            (ids.clone(), logprobs.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(
            here.as_ref().map(bits),
            decoded.as_ref().map(bits),
            "{:?}, {first:?}",
            codec.backend()
        );
    }
    decoded
}

/// Decodes any bytes on one backend.
pub fn decode_on(codec: &Codec, data: &[u8]) -> distillkit_codec::Result<(Vec<i64>, Vec<f32>)> {
    let rows = data.len() / codec.bytes_per_row();
    let mut ids = vec![-1; rows * codec.k()];
    let mut logprobs = vec![f32::NAN; rows * codec.k()];
    let whole = data.len() == rows * codec.bytes_per_row();
    match codec.decode(data, &mut ids, &mut logprobs) {
        Ok(()) => {
            assert!(whole);
            assert!(ids.iter().all(|&id| id >= 0 && (id as u64) < codec.vocab_size()), "{ids:?}");
            assert!(logprobs.iter().all(|value| value.is_finite()), "{logprobs:?}");
            Ok((ids, logprobs))
        }
        Err(error) => {
            match &error {
                CodecError::Truncated { .. } => assert!(!whole),
                CodecError::Corrupt(message) => {
                    assert!(whole && message.starts_with("row "), "{message}")
                }
                other => panic!("bytes are refused with {other:?}"),
            }
            Err(error)
        }
    }
}

/// Encodes a row: the bytes, or why it is refused, and the same on every backend.
pub fn encode(
    codecs: &[Codec],
    ids: &[i64],
    logprobs: &[f32],
) -> distillkit_codec::Result<Vec<u8>> {
    let encode_on = |codec: &Codec| {
        let mut data = vec![0xAA; codec.bytes_per_row()];
        codec.encode(ids, logprobs, &mut data).map(|()| data)
    };
    let encoded = encode_on(&codecs[0]);
    for codec in &codecs[1..] {
        assert_eq!(encode_on(codec), encoded, "{:?}, {:?}", codec.backend(), codecs[0].backend());
    }
    encoded
}

/// What a target makes of an input: kept, unless it had too few bytes for the fields.
pub fn corpus(result: Result<()>) -> Corpus {
    if result.is_ok() { Corpus::Keep } else { Corpus::Reject }
}

/// Takes the fields of a configuration, and decodes what is left of the input as its rows.
pub fn decode_any(
    input: &[u8],
    fields: impl Fn(&mut Unstructured) -> Result<Fields>,
) -> Result<()> {
    let mut u = Unstructured::new(input);
    if let Some(made) = prepared(&mut u, fields)? {
        let _ = decode(&made.codecs, &rows(&made.codecs[0], u.take_rest()));
    }
    Ok(())
}

/// Arbitrary bytes, cut or repeated to a whole number of rows unless the first of them says
/// otherwise.
pub fn rows(codec: &Codec, raw: &[u8]) -> Vec<u8> {
    let bytes = codec.bytes_per_row();
    match raw.split_first() {
        None => Vec::new(),
        Some((0, rest)) => rest.to_vec(),
        Some((_, [])) => vec![0; bytes],
        Some((_, rest)) => {
            rest.iter().copied().cycle().take(rest.len().div_ceil(bytes) * bytes).collect()
        }
    }
}

/// Decodes a document of the compact format: it is refused as damaged, or its rows are ones.
/// Returns whether it decoded.
pub fn check_compact_rows(codec: &Compact, data: &[u8], rows: usize) -> bool {
    let k = codec.config().k;
    let (mut ids, mut logprobs) = (vec![-1; rows * k], vec![1.0f32; rows * k]);
    if let Err(error) = codec.decode_document(data, &mut ids, &mut logprobs) {
        let damage = matches!(error, CodecError::Corrupt(_) | CodecError::Truncated { .. });
        assert!(damage, "{error:?}");
        return false;
    }
    for (ids, logprobs) in ids.chunks(k).zip(logprobs.chunks(k)) {
        let count = logprobs.iter().take_while(|&&value| value > f32::NEG_INFINITY).count();
        assert!(count > 0);
        assert!(logprobs.windows(2).all(|pair| pair[0] >= pair[1]) && logprobs[0] <= 0.0);
        let total: f64 = logprobs[..count].iter().map(|&value| f64::from(value).exp()).sum();
        assert!(total < 1.0 + 1e-4, "{total}");
        let vocab = i64::from(codec.config().vocab_size);
        let mut sorted = ids[..count].to_vec();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(sorted[0] >= 0 && sorted[count - 1] < vocab);
        assert!(ids[count..].iter().all(|&id| id == ids[0]));
    }
    true
}

/// Rows that can be stored: ids, log-probabilities, and how many a row has.
pub fn compact_rows(
    u: &mut Unstructured,
    config: &CompactConfig,
) -> Result<(Vec<i64>, Vec<f32>, usize)> {
    let width = config.k + u.int_in_range(0..=(config.vocab_size as usize - config.k).min(3))?;
    let rows = if u.ratio(1, 8)? { u.int_in_range(30..=70)? } else { u.int_in_range(1..=4usize)? };
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        let first = u.int_in_range(0..=config.vocab_size - 1)?;
        ids.extend((0..width as u32).map(|i| i64::from((first + i) % config.vocab_size)));
        let weights = (0..width).map(|_| u.arbitrary::<u8>()).collect::<Result<Vec<_>>>()?;
        let weights: Vec<f64> =
            weights.into_iter().map(|w| (f64::from(w) / 8.0).exp2() - 1.0).collect();
        let total = weights.iter().sum::<f64>();
        let share = f64::from(u.int_in_range(1..=100u8)?) / 100.0;
        let logprob = |&weight: &f64| {
            if total == 0.0 { -(width as f64).ln() } else { (weight / total * share).ln() }
        };
        logprobs.extend(weights.iter().map(|weight| logprob(weight).min(0.0) as f32));
    }
    Ok((ids, logprobs, width))
}
