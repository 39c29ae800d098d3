//! The sampled format: rows of draws from a teacher's distribution, as ids and how often each was
//! drawn, coded like the ids of the compact format. FORMAT.md §5 describes the bytes.

mod config;
mod prior;
mod rows;

use std::sync::OnceLock;

pub use config::{MAX_DRAWS, SampledConfig};
pub use prior::{SampledContexts, SampledPrior};
pub use rows::log_share;

pub(super) use prior::{Excess, Shared};
pub(super) use rows::{Draws, EncodeScratch, Encoder, Model, counted, excesses};

use super::decode::{Stream, WORD};
use super::document::{self, Content, Frame, ROWS_PER_BYTE, corrupt};
use super::write::{DocumentWriter, Step};
use super::{Part, Priors, Sizes, check_learned_for, check_room, get_or_make, prior_hash};
use crate::error::{CodecError, Result};
use crate::simd::{Backend, multiversion};

/// Encodes and decodes documents of draws, of one configuration and with one prior.
///
/// What it writes and reads depends on nothing but the configuration, the prior and the rows.
///
/// ```
/// use distillkit_codec::compact::{Sampled, SampledConfig};
/// let config = SampledConfig::from_json(r#"{"vocab_size": 50, "draws": 4}"#)?;
/// let codec = Sampled::new(config, None)?;
/// // Id 7 was drawn three times, id 3 once.
/// let (ids, logprobs) = ([7, 3], [0.75f32.ln(), 0.25f32.ln()]);
/// let data = codec.encode_document(&ids, &logprobs, 2)?;
/// let (mut found, mut values) = ([0; 4], [0.0; 4]);
/// codec.decode_document(&data, &mut found, &mut values)?;
/// assert_eq!((found, values[1], values[2]), ([7, 3, 7, 7], 0.25f32.ln(), f32::NEG_INFINITY));
/// # Ok::<(), distillkit_codec::CodecError>(())
/// ```
#[derive(Debug)]
pub struct Sampled {
    config: SampledConfig,
    priors: Priors<Side>,
    backend: Backend,
}

/// A prior, prepared.
#[derive(Debug)]
struct Side {
    prior: SampledPrior,
    model: Model,
    writer: OnceLock<(Encoder, DocumentWriter)>,
}

multiversion! {
    /// Appends what rows are written with.
    fn encode_rows(side: &Side, encoder: &Encoder, rows: Rows<'_>, out: &mut Vec<Step>)
        -> Result<()> = encode_rows_body;
}

/// Rows of `width` ids and log-probabilities.
#[derive(Debug, Clone, Copy)]
struct Rows<'a> {
    ids: &'a [i64],
    logprobs: &'a [f32],
    width: usize,
}

#[inline(always)]
fn encode_rows_body<I>(
    _isa: I,
    side: &Side,
    encoder: &Encoder,
    rows: Rows,
    out: &mut Vec<Step>,
) -> Result<()> {
    let Rows { ids, logprobs, width } = rows;
    let mut scratch = EncodeScratch::default();
    for (row, (ids, logprobs)) in ids.chunks(width).zip(logprobs.chunks(width)).enumerate() {
        let stored = encoder
            .row(&side.model, ids, logprobs, &mut scratch)
            .map_err(|error| error.at_row(row))?;
        rows::steps(&side.prior, stored, out);
    }
    Ok(())
}

impl Side {
    fn new(prior: SampledPrior) -> Result<Self> {
        let model = Model::new(&prior)?;
        Ok(Self { prior, model, writer: OnceLock::new() })
    }

    fn writer(&self) -> Result<&(Encoder, DocumentWriter)> {
        get_or_make(&self.writer, || {
            let tables = DocumentWriter::of(&self.prior.tables, &self.prior.kinds()?);
            Ok((Encoder::new(&self.prior)?, tables))
        })
    }

    fn encode(&self, backend: Backend, rows: Rows, builtin: bool) -> Result<Vec<u8>> {
        let count = rows.ids.len() / rows.width;
        if count == 0 {
            return Ok(document::write(Content::Sampled, builtin, 0, &[]));
        }
        let (encoder, writer) = self.writer()?;
        let mut steps = Vec::new();
        encode_rows(backend, self, encoder, rows, &mut steps)?;
        Ok(document::write(Content::Sampled, builtin, count, &[writer.stream(&steps)]))
    }
}

impl Sampled {
    /// Prepares a configuration with the bytes of its prior, or with the built-in prior.
    ///
    /// The hash in the configuration may be left out; it is filled in. Fails with
    /// [`CodecError::Config`] where the configuration is not valid, names a prior that is not given,
    /// or is not the one that the prior was learned for, with [`CodecError::Corrupt`] where the
    /// prior is not the named one or is not valid, or with [`CodecError::Truncated`].
    pub fn new(mut config: SampledConfig, prior: Option<&[u8]>) -> Result<Self> {
        config.validate()?;
        let backend = Backend::from_env()?;
        let hash = prior_hash(config.prior.as_deref(), prior)?;
        let learned = prior.map(|data| {
            let prior = SampledPrior::from_bytes(data)?;
            check_learned_for(&prior.config, &config.for_prior())?;
            Side::new(prior)
        });
        let priors = Priors::new(learned.transpose()?);
        config.prior = hash;
        Ok(Self { config, priors, backend })
    }

    /// The configuration that a prior was learned for; its `prior` is empty.
    ///
    /// Fails with [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn prior_config(prior: &[u8]) -> Result<SampledConfig> {
        SampledPrior::from_bytes(prior).map(|prior| prior.config)
    }

    /// The configuration, the prior's hash included.
    #[must_use]
    pub const fn config(&self) -> &SampledConfig {
        &self.config
    }

    /// The instruction set in use.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }

    fn builtin(&self) -> Result<&Side> {
        self.priors.builtin(|| Side::new(SampledPrior::builtin(&self.config)))
    }

    /// The prior that a document was written with.
    fn side(&self, builtin: bool) -> Result<&Side> {
        self.priors.of(builtin, || Side::new(SampledPrior::builtin(&self.config)))
    }

    /// Encodes the rows of a document: `width` ids and log-probabilities each, which are the
    /// logarithms of shares of the draws; −∞ marks a place without an id.
    ///
    /// Fails with [`CodecError::Input`], which names the row.
    pub fn encode_document(&self, ids: &[i64], logprobs: &[f32], width: usize) -> Result<Vec<u8>> {
        if width == 0 || ids.len() != logprobs.len() || !ids.len().is_multiple_of(width) {
            return Err(CodecError::Input(format!(
                "found {} ids and {} log-probabilities, expected whole rows of {width}",
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
        let stored = logprobs.iter().filter(|&&logprob| logprob > f32::NEG_INFINITY).count();
        if data.len() < stored * self.config.vocab_size.ilog2() as usize / 8 {
            return Ok(data);
        }
        let other = self.builtin()?.encode(self.backend, rows, true)?;
        Ok(if other.len() < data.len() { other } else { data })
    }

    /// Checks what can be checked of a document without decoding it: its checksum, and that it has
    /// so many rows and enough bytes for them.
    ///
    /// Fails with [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn check(&self, data: &[u8], rows: usize) -> Result<()> {
        self.side(Frame::read(data, rows, Content::Sampled)?.builtin).map(|_| ())
    }

    /// Reads the rows of a document.
    fn read(
        &self,
        data: &[u8],
        rows: usize,
        mut each: impl FnMut(&Side, usize, &Draws, [u32; 3]),
    ) -> Result<()> {
        let frame = Frame::read(data, rows, Content::Sampled)?;
        let side = self.side(frame.builtin)?;
        if rows == 0 {
            return Ok(());
        }
        let mut padded = Vec::with_capacity(data.len() + WORD);
        padded.extend_from_slice(data);
        padded.resize(data.len() + WORD, 0);
        let mut stream = Stream::new(&padded, frame.bytes);
        let mut draws = Draws::default();
        for row in 0..rows {
            let bits = side
                .model
                .read(&mut stream, &padded, &mut draws)
                .map_err(|error| error.at_row(row))?;
            // Rows of a damaged document may take no bits; what is read lies within the document.
            if stream.bit > 8 * data.len() {
                return corrupt(format!("row {row}: the document has ended"));
            }
            each(side, row, &draws, bits);
        }
        let least = rows.div_ceil(ROWS_PER_BYTE).saturating_sub(frame.bytes);
        stream.finish("its stream", frame.bytes, frame.head, least)
    }

    /// Decodes a document into rows of k ids and log-probabilities ([`SampledConfig::k`]), by
    /// falling count, ids of a count ascending. Places without an id have the first id of the row
    /// and a log-probability of −∞.
    ///
    /// Fails with [`CodecError::Input`] where the arrays are no whole rows, with
    /// [`CodecError::Corrupt`] or [`CodecError::Truncated`].
    pub fn decode_document(
        &self,
        data: &[u8],
        ids: &mut [i64],
        logprobs: &mut [f32],
    ) -> Result<()> {
        let k = self.config.k();
        check_room(ids.len(), logprobs.len(), k)?;
        let mut keys = Vec::new();
        self.read(data, ids.len() / k, |side, row, draws, _| {
            let at = row * k..(row + 1) * k;
            side.model.ranked(draws, &mut keys, &mut ids[at.clone()], &mut logprobs[at]);
        })
    }

    /// Bytes of a document by part; `values` are the counts.
    ///
    /// Fails as [`Sampled::decode_document`] does.
    pub fn sizes(&self, data: &[u8], rows: usize) -> Result<Sizes> {
        let mut total = [0u64; 3];
        self.read(data, rows, |_, _, _, bits| {
            total.iter_mut().zip(bits).for_each(|(total, bits)| *total += u64::from(bits));
        })?;
        Ok(Sizes::of(total, data.len()))
    }

    /// Bits of each row, without the framing of the document.
    ///
    /// Fails as [`Sampled::decode_document`] does.
    pub fn row_bits(&self, data: &[u8], rows: usize) -> Result<Vec<f32>> {
        self.check(data, rows)?;
        let mut found = vec![0.0; rows];
        self.read(data, rows, |_, row, _, bits| found[row] = bits.iter().sum::<u32>() as f32)?;
        Ok(found)
    }

    /// Puts rows of documents together to one document; they decode to the same as before.
    ///
    /// Fails with [`CodecError::Input`] where rows do not exist, or as [`Sampled::decode_document`]
    /// does.
    pub fn join(&self, parts: &[Part]) -> Result<Vec<u8>> {
        let k = self.config.k();
        let (mut all_ids, mut all_logprobs) = (Vec::new(), Vec::new());
        for (number, part) in parts.iter().enumerate() {
            part.check(number)?;
            let Part { data, rows, start, stop } = *part;
            self.check(data, rows)?;
            let (mut ids, mut logprobs) = (vec![0; rows * k], vec![0.0; rows * k]);
            self.decode_document(data, &mut ids, &mut logprobs)?;
            all_ids.extend_from_slice(&ids[start * k..stop * k]);
            all_logprobs.extend_from_slice(&logprobs[start * k..stop * k]);
        }
        self.encode_document(&all_ids, &all_logprobs, k)
    }
}
