//! Encoding and decoding many rows of one configuration.

use std::sync::OnceLock;

use crate::config::Config;
use crate::encoder::Plan;
use crate::error::{CodecError, Result, config_error};
use crate::format::{Legacy, Quantized, RowFormat};
use crate::rows::{EncodeScratch, RowEncoder, Rows, RowsMut, decode_rows, encode_rows};
use crate::simd::Backend;
use crate::tasks::{TASK_ROWS, dense_task_rows, run_tasks};
use crate::topk::{Logit, TopkScratch, topk_row};
use crate::values::DecoderScratch;

/// A prepared configuration of either published format.
#[derive(Debug, Clone)]
pub enum Format {
    /// `logprob_compressor`.
    Quantized(Quantized),
    /// `legacy_logit_compression`.
    Legacy(Legacy),
}

/// Calls a method of the format, or a function with the format as an argument.
macro_rules! on_format {
    ($codec:expr, $format:ident => $call:expr) => {
        match &$codec.format {
            Format::Quantized($format) => $call,
            Format::Legacy($format) => $call,
        }
    };
}

/// Encodes and decodes rows of one configuration. What it writes and reads depends on nothing but
/// the configuration and the rows.
///
/// A codec that only decodes never builds the encoder.
#[derive(Debug, Clone)]
pub struct Codec {
    format: Format,
    backend: Backend,
    /// Prepared when the first rows are encoded.
    encoder: OnceLock<Plan>,
}

impl Codec {
    /// Prepares a configuration for the fastest instruction set, or the one that the environment
    /// variable `DISTILLKIT_SIMD` names.
    ///
    /// Fails with [`CodecError::Config`] where the configuration is not valid, or as
    /// [`Backend::from_env`] does.
    pub fn new(config: Config) -> Result<Self> {
        Self::with_backend(config, Backend::from_env()?)
    }

    /// Prepares a configuration for the given instruction set.
    ///
    /// Fails with [`CodecError::Config`] where the configuration is not valid or this CPU lacks the
    /// instruction set.
    pub fn with_backend(config: Config, backend: Backend) -> Result<Self> {
        if !backend.is_available() {
            return config_error("simd backend", format!("this CPU has no {}", backend.name()));
        }
        let format = match config {
            Config::Quantized(config) => {
                config.validate()?;
                Format::Quantized(Quantized::new(config))
            }
            Config::Legacy(config) => {
                config.validate()?;
                Format::Legacy(Legacy::new(config))
            }
        };
        Ok(Self { format, backend, encoder: OnceLock::new() })
    }

    /// The prepared configuration.
    #[must_use]
    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// The instruction set in use.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }

    /// Stored ids a row.
    #[must_use]
    pub fn k(&self) -> usize {
        on_format!(self, format => format.k())
    }

    /// Ids are below this.
    #[must_use]
    pub fn vocab_size(&self) -> u64 {
        on_format!(self, format => format.vocab_size())
    }

    /// Bytes of a row's values (`compressed_logprobs`), which come first.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        on_format!(self, format => format.value_bytes())
    }

    /// Bytes of a row's ids (`bytepacked_indices`), which come last.
    #[must_use]
    pub fn id_bytes(&self) -> usize {
        on_format!(self, format => format.id_bytes())
    }

    /// Bytes of a row.
    #[must_use]
    pub fn bytes_per_row(&self) -> usize {
        on_format!(self, format => format.bytes_per_row())
    }

    /// Encodes `ids.len() / k` rows into `out`.
    ///
    /// Rows are sorted by descending log-probability (stable) where they are not sorted. Fails with
    /// [`CodecError::Input`] on sizes that do not fit, log-probabilities that are not finite or not
    /// log-probabilities or beyond what the configuration can store, ids outside the vocabulary, and
    /// repeated ids.
    pub fn encode(&self, ids: &[i64], logprobs: &[f32], out: &mut [u8]) -> Result<()> {
        let k = self.k();
        let bytes = self.bytes_per_row();
        let rows = whole_rows("ids", ids.len(), k)?;
        if logprobs.len() != ids.len() || out.len() != rows * bytes {
            return Err(CodecError::Input(format!(
                "{} ids, {} log-probabilities and {} output bytes do not fit together: \
                 {rows} rows of k = {k} need {} bytes",
                ids.len(),
                logprobs.len(),
                out.len(),
                rows * bytes
            )));
        }
        let plan = self.plan();
        let rows = Rows { ids, logprobs };
        let tasks = out.chunks_mut(bytes * TASK_ROWS).zip(rows.chunks(k * TASK_ROWS)).collect();
        run_tasks(TASK_ROWS, tasks, |(out, rows): (&mut [u8], _), scratch: &mut EncodeScratch| {
            on_format!(self, format => {
                encode_rows(self.backend, &RowEncoder { format, plan }, rows, out, scratch)
            })
        })
    }

    /// Decodes `data.len() / bytes_per_row` rows, by rank.
    ///
    /// Fails with [`CodecError::Truncated`] on a length that is no multiple of a row,
    /// [`CodecError::Input`] on output sizes that do not fit, and [`CodecError::Corrupt`] on ids
    /// outside the vocabulary, values that are not finite and unused bits that are set.
    pub fn decode(&self, data: &[u8], ids: &mut [i64], logprobs: &mut [f32]) -> Result<()> {
        let k = self.k();
        let bytes = self.bytes_per_row();
        if !data.len().is_multiple_of(bytes) {
            return Err(CodecError::Truncated {
                what: format!("rows of {bytes} bytes"),
                found: data.len(),
                expected: data.len().div_ceil(bytes) * bytes,
            });
        }
        let rows = data.len() / bytes;
        if ids.len() != rows * k || logprobs.len() != rows * k {
            return Err(CodecError::Input(format!(
                "outputs of {} and {} values, but {rows} rows of k = {k} need {}",
                ids.len(),
                logprobs.len(),
                rows * k
            )));
        }
        let out = RowsMut { ids, logprobs };
        let tasks = data.chunks(bytes * TASK_ROWS).zip(out.chunks(k * TASK_ROWS)).collect();
        run_tasks(TASK_ROWS, tasks, |(data, out): (&[u8], _), scratch: &mut DecoderScratch| {
            on_format!(self, format => {
                decode_rows(self.backend, format, data, out, scratch)
            })
        })
    }

    /// Encodes the k most probable ids of dense logits, rows of `width`, under the full softmax.
    ///
    /// Fails with [`CodecError::Input`] as [`topk`](crate::topk()) and [`Codec::encode`] do, and
    /// where `width` is not the vocabulary size.
    pub fn encode_logits<L: Logit>(
        &self,
        logits: &[L],
        width: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let k = self.k();
        let bytes = self.bytes_per_row();
        if width as u64 != self.vocab_size() {
            return Err(CodecError::Input(format!(
                "logits have {width} columns, but the codec's vocabulary size is {}",
                self.vocab_size()
            )));
        }
        let rows = whole_rows("logits", logits.len(), width)?;
        if out.len() != rows * bytes {
            return Err(CodecError::Input(format!(
                "output of {} bytes, but {rows} rows need {}",
                out.len(),
                rows * bytes
            )));
        }
        let plan = self.plan();
        let task_rows = dense_task_rows(rows);
        let tasks = out.chunks_mut(bytes * task_rows).zip(logits.chunks(width * task_rows));
        let encode = |(out, logits): (&mut [u8], &[L]), scratch: &mut DenseScratch| {
            let DenseScratch { rows: row_scratch, topk, ids, logprobs } = scratch;
            let count = logits.len() / width;
            ids.resize(count * k, 0);
            logprobs.resize(count * k, 0.0);
            let outputs = RowsMut { ids, logprobs }.chunks(k);
            for (i, (logits, RowsMut { ids, logprobs })) in
                logits.chunks(width).zip(outputs).enumerate()
            {
                topk_row(self.backend, logits, ids, logprobs, topk).map_err(|error| (i, error))?;
            }
            let rows = Rows { ids, logprobs };
            on_format!(self, format => {
                encode_rows(self.backend, &RowEncoder { format, plan }, rows, out, row_scratch)
            })
        };
        run_tasks(task_rows, tasks.collect(), encode)
    }

    /// The prepared encoder.
    fn plan(&self) -> &Plan {
        if let Some(plan) = self.encoder.get() {
            return plan;
        }
        // It is built outside the lock: a child forked while another thread holds the lock would
        // wait for it forever.
        let plan = match &self.format {
            Format::Quantized(format) => {
                Plan::new(format.values().clone(), format.config().error_diffusion)
            }
            Format::Legacy(format) => Plan::new(format.values().clone(), false),
        };
        self.encoder.get_or_init(|| plan)
    }
}

/// Buffers for dense logits.
#[derive(Debug, Default)]
struct DenseScratch {
    rows: EncodeScratch,
    topk: TopkScratch,
    ids: Vec<i64>,
    logprobs: Vec<f32>,
}

fn whole_rows(name: &str, len: usize, row: usize) -> Result<usize> {
    if len.is_multiple_of(row) {
        return Ok(len / row);
    }
    Err(CodecError::Input(format!("{len} {name} cannot be divided into rows of {row}")))
}
