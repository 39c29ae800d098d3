//! The compact format: rows of up to k ids in a variable number of bytes, a document at a time, by
//! what was learned of the teacher ([`Prior`]). FORMAT.md §4 describes the bytes.

mod builtin;
pub mod config;
mod decode;
mod document;
mod encode;
mod learn;
mod lists;
mod model;
pub mod numbers;
mod order;
mod prior;
mod rank;
mod sampled;
mod scale;
mod tables;
#[cfg(target_arch = "x86_64")]
mod wide;
mod write;

use std::sync::OnceLock;

pub use config::CompactConfig;
pub use document::checksum;
pub use learn::{learn, learn_sampled};
pub use prior::{Cluster, Contexts, Dimensions, MAX_CLASSES, Prior};
pub use sampled::{MAX_DRAWS, Sampled, SampledConfig, SampledContexts, SampledPrior, log_share};
pub use scale::Scale;
pub use tables::{SLOTS, SLOTS_LOG, Table};

use serde::Serialize;

use crate::error::{CodecError, Result, config_error};
use crate::simd::Backend;
use decode::{OnRow, StoredRow};
use document::{Content, Frame, corrupt};
use encode::{Encoder, Rows};
use model::Model;
use rank::Ranking;
use write::{DocumentWriter, StoredRows};

/// Encodes and decodes documents of one configuration, with one prior.
///
/// What it writes and reads depends on nothing but the configuration, the prior and the rows. It
/// may be used by several threads at once; a document is encoded and decoded on the thread that
/// asks for it. A codec that only decodes never builds the encoder.
#[derive(Debug)]
pub struct Compact {
    config: CompactConfig,
    priors: Priors<Side>,
    backend: Backend,
}

/// A prior, prepared.
#[derive(Debug)]
struct Side {
    prior: Prior,
    model: Model,
    writer: OnceLock<(Encoder, DocumentWriter)>,
}

/// Bytes of a document by part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// Clusters, shapes, counts and missing masses.
    pub head: f64,
    /// Gaps.
    pub ids: f64,
    /// Levels.
    pub values: f64,
    /// Lengths, states and padding.
    pub framing: f64,
}

/// Rows of a document that become part of another.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The document.
    pub data: &'a [u8],
    /// How many rows it has.
    pub rows: usize,
    /// The first row that is taken.
    pub start: usize,
    /// One more than the last row that is taken.
    pub stop: usize,
}

impl Sizes {
    /// Those of a document of so many bytes, from the bits of head, ids and values.
    fn of(bits: [u64; 3], bytes: usize) -> Self {
        let [head, ids, values] = bits.map(|bits| bits as f64 / 8.0);
        Self { head, ids, values, framing: bytes as f64 - head - ids - values }
    }
}

impl Part<'_> {
    /// Fails where the part has rows that do not exist.
    fn check(&self, number: usize) -> Result<()> {
        let Self { rows, start, stop, .. } = *self;
        if start > stop || stop > rows {
            let message = format!("part {number}: rows {start} … {stop} of {rows}");
            return Err(CodecError::Input(message));
        }
        Ok(())
    }
}

/// Two priors of a codec, prepared: that of the configuration, if it has one, and the built-in one,
/// which is made when it is needed.
#[derive(Debug)]
struct Priors<S> {
    learned: Option<S>,
    builtin: OnceLock<S>,
}

impl<S> Priors<S> {
    const fn new(learned: Option<S>) -> Self {
        Self { learned, builtin: OnceLock::new() }
    }

    fn builtin(&self, make: impl FnOnce() -> Result<S>) -> Result<&S> {
        get_or_make(&self.builtin, make)
    }

    /// The prior that a document was written with.
    fn of(&self, builtin: bool, make: impl FnOnce() -> Result<S>) -> Result<&S> {
        match &self.learned {
            Some(learned) if !builtin => Ok(learned),
            None if !builtin => corrupt("document: needs a prior, but the configuration has none"),
            _ => self.builtin(make),
        }
    }
}

fn get_or_make<T>(cell: &OnceLock<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(made) = cell.get() {
        return Ok(made);
    }
    let fresh = make()?;
    Ok(cell.get_or_init(|| fresh))
}

/// The hash of a prior's bytes, which must be the one that a configuration names, if it names one;
/// None where neither is given.
fn prior_hash(named: Option<&str>, prior: Option<&[u8]>) -> Result<Option<String>> {
    let Some(data) = prior else {
        return match named {
            Some(hash) => {
                config_error("prior", format!("found {hash}, but no bytes of that prior"))
            }
            None => Ok(None),
        };
    };
    let found = hash(data);
    match named {
        Some(expected) if expected != found => {
            corrupt(format!("prior: its bytes have the hash {found}, expected {expected}"))
        }
        _ => Ok(Some(found)),
    }
}

/// Fails where a prior was learned for another configuration than the given one.
fn check_learned_for<C: PartialEq + Serialize>(known: &C, given: &C) -> Result<()> {
    if known == given {
        return Ok(());
    }
    let json = |config| serde_json::to_string(config).unwrap_or_default();
    config_error("prior", format!("was learned for {}, expected {}", json(known), json(given)))
}

/// Fails where decoded rows have no room in the arrays, which must be whole rows of k.
fn check_room(ids: usize, logprobs: usize, k: usize) -> Result<()> {
    if ids != logprobs || !ids.is_multiple_of(k) {
        return Err(CodecError::Input(format!(
            "found room for {ids} ids and {logprobs} log-probabilities, expected whole rows of {k}"
        )));
    }
    Ok(())
}

/// XXH3-128 in hexadecimal.
fn hash(data: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(data))
}

impl Side {
    fn new(prior: Prior) -> Result<Self> {
        let model = Model::new(&prior)?;
        Ok(Self { prior, model, writer: OnceLock::new() })
    }

    fn writer(&self) -> Result<&(Encoder, DocumentWriter)> {
        get_or_make(&self.writer, || {
            Ok((Encoder::new(&self.prior, &self.model)?, DocumentWriter::new(&self.prior)?))
        })
    }

    fn encode(&self, backend: Backend, rows: Rows, builtin: bool) -> Result<Vec<u8>> {
        let (encoder, writer) = self.writer()?;
        let rows = encoder.rows(backend, &self.model, rows)?;
        Ok(writer.write(backend, &self.model, &rows, builtin))
    }
}

impl Compact {
    /// Prepares a configuration with the bytes of its prior, or with the built-in prior.
    ///
    /// The hash in the configuration may be left out; it is filled in. Fails with
    /// [`CodecError::Config`] where the configuration is not valid, names a prior that is not given,
    /// or is not the one that the prior was learned for, with [`CodecError::Corrupt`] where the
    /// prior is not the named one or is not valid, or with [`CodecError::Truncated`].
    pub fn new(config: CompactConfig, prior: Option<&[u8]>) -> Result<Self> {
        Self::with_backend(config, prior, Backend::from_env()?)
    }

    /// [`Compact::new`] for the given instruction set, on which nothing but the speed depends.
    ///
    /// Fails with [`CodecError::Config`] where this CPU lacks it, too.
    pub fn with_backend(
        mut config: CompactConfig,
        prior: Option<&[u8]>,
        backend: Backend,
    ) -> Result<Self> {
        if !backend.is_available() {
            return config_error("simd backend", format!("this CPU has no {}", backend.name()));
        }
        config.validate()?;
        let hash = prior_hash(config.prior.as_deref(), prior)?;
        let learned = prior.map(|data| {
            let prior = Prior::from_bytes(data)?;
            check_learned_for(&prior.config, &config.without_prior())?;
            Side::new(prior)
        });
        let priors = Priors::new(learned.transpose()?);
        config.prior = hash;
        Ok(Self { config, priors, backend })
    }

    /// The configuration that a prior was learned for; its `prior` is empty.
    ///
    /// Fails with [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn prior_config(prior: &[u8]) -> Result<CompactConfig> {
        Prior::from_bytes(prior).map(|prior| prior.config)
    }

    /// The instruction set in use.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }

    /// The configuration, the prior's hash included.
    #[must_use]
    pub const fn config(&self) -> &CompactConfig {
        &self.config
    }

    fn builtin(&self) -> Result<&Side> {
        self.priors.builtin(|| Side::new(builtin::builtin(&self.config)))
    }

    /// The prior that a document was written with.
    fn side(&self, builtin: bool) -> Result<&Side> {
        self.priors.of(builtin, || Side::new(builtin::builtin(&self.config)))
    }

    /// Encodes the rows of a document: `width` ids and log-probabilities each, at least k. The k
    /// most probable are stored, or as many of them as the configuration says; rows may end with
    /// ids of log-probability −∞, which are absent.
    ///
    /// Fails with [`CodecError::Input`], which names the row.
    pub fn encode_document(&self, ids: &[i64], logprobs: &[f32], width: usize) -> Result<Vec<u8>> {
        let k = self.config.k;
        if width < k || ids.len() != logprobs.len() || !ids.len().is_multiple_of(width) {
            return Err(CodecError::Input(format!(
                "found {} ids and {} log-probabilities in rows of {width}, expected whole rows of at least {k}",
                ids.len(),
                logprobs.len()
            )));
        }
        let rows = Rows { ids, logprobs, width };
        let Some(learned) = &self.priors.learned else {
            return self.builtin()?.encode(self.backend, rows, true);
        };
        let data = learned.encode(self.backend, rows, false)?;
        // A document that the prior does not fit is better off without.
        if data.len() < ids.len() / width * self.unusual_bytes() {
            return Ok(data);
        }
        let other = self.builtin()?.encode(self.backend, rows, true)?;
        Ok(if other.len() < data.len() { other } else { data })
    }

    /// Bytes of a row that say that the built-in prior may be better: those of ids without any
    /// order, nearly.
    fn unusual_bytes(&self) -> usize {
        let per_id = (f64::from(self.config.vocab_size) / self.config.k as f64).log2() + 1.4;
        (self.config.k as f64 * per_id / 8.0) as usize
    }

    fn open<'a>(&self, data: &'a [u8], rows: usize) -> Result<(Frame<'a>, &Side)> {
        let frame = Frame::read(data, rows, Content::Compact)?;
        let side = self.side(frame.builtin)?;
        Ok((frame, side))
    }

    /// Checks what can be checked of a document without decoding it: its checksum, and that it has
    /// so many rows and enough bytes for them.
    ///
    /// Fails with [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn check(&self, data: &[u8], rows: usize) -> Result<()> {
        self.open(data, rows).map(|_| ())
    }

    /// Decodes a document into rows of k ids and log-probabilities, by falling probability. Places
    /// without an id have the first id of the row and a log-probability of −∞.
    ///
    /// Fails with [`CodecError::Input`] where the arrays are no whole rows, with
    /// [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn decode_document(
        &self,
        data: &[u8],
        ids: &mut [i64],
        logprobs: &mut [f32],
    ) -> Result<()> {
        let k = self.config.k;
        check_room(ids.len(), logprobs.len(), k)?;
        let (frame, side) = self.open(data, ids.len() / k)?;
        let mut ranking = Ranking::new(&side.model, ids, logprobs);
        side.model.read(self.backend, data, &frame, &mut ranking)
    }

    /// Reads the rows of a document as they are stored.
    fn stored(&self, data: &[u8], rows: usize, on_row: &mut dyn FnMut(&StoredRow)) -> Result<bool> {
        let (frame, side) = self.open(data, rows)?;
        side.model.read(self.backend, data, &frame, &mut OnRow(on_row))?;
        Ok(frame.builtin)
    }

    /// Bytes of a document by part.
    ///
    /// Fails as [`Compact::decode_document`] does.
    pub fn sizes(&self, data: &[u8], rows: usize) -> Result<Sizes> {
        let mut total = [0u64; 3];
        self.stored(data, rows, &mut |row| {
            total.iter_mut().zip(row.bits).for_each(|(total, bits)| *total += u64::from(bits));
        })?;
        Ok(Sizes::of(total, data.len()))
    }

    /// Bits of each row, without the framing of the document.
    ///
    /// Fails as [`Compact::decode_document`] does.
    pub fn row_bits(&self, data: &[u8], rows: usize) -> Result<Vec<f32>> {
        self.check(data, rows)?;
        let mut bits = vec![0.0; rows];
        let mut set = |row: &StoredRow| bits[row.row] = row.bits.iter().sum::<u32>() as f32;
        self.stored(data, rows, &mut set)?;
        Ok(bits)
    }

    /// Puts rows of documents together to one document; they decode to the same as before.
    ///
    /// Fails with [`CodecError::Input`] where rows do not exist, or where some documents were written
    /// with the prior and others without, or as [`Compact::decode_document`] does.
    pub fn join(&self, parts: &[Part]) -> Result<Vec<u8>> {
        let mut joined = StoredRows::default();
        let mut builtin = self.priors.learned.is_none();
        for (number, part) in parts.iter().enumerate() {
            part.check(number)?;
            self.check(part.data, part.rows)?;
            let mut rows = vec![StoredRows::default(); part.rows];
            let own = self.stored(part.data, part.rows, &mut |row| rows[row.row].push(row))?;
            if number > 0 && own != builtin {
                return Err(CodecError::Input(format!(
                    "part {number}: was written with another prior than the parts before it"
                )));
            }
            builtin = own;
            rows[part.start..part.stop].iter().for_each(|row| joined.append(row));
        }
        let side = self.side(builtin)?;
        Ok(side.writer()?.1.write(self.backend, &side.model, &joined, builtin))
    }
}
