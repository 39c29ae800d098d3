//! Many rows at a time, on all cores.
//!
//! Rows do not depend on each other, so results do not depend on the number of threads.

use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::config::Config;
use crate::error::{CodecError, Result, config_error};
use crate::formats::RowFormat;
use crate::formats::legacy::Legacy;
use crate::formats::quantized::Quantized;
use crate::lanes::LANES;
use crate::rows::{RowResult, Scratch, decode_rows, encode_rows};
use crate::simd::Backend;
use crate::topk::{Logit, TopkScratch, topk_row};

/// Rows of one task: enough to make its buffers and its scheduling cheap.
const TASK_ROWS: usize = 128;

/// Rows of dense logits of one task: a thousand times as long, so some tasks for every thread come first, and then groups that fill the
/// encoder's vectors.
fn dense_task_rows(rows: usize) -> usize {
    // Asking starts the pool, so it has to be one that will be used.
    let threads = if rows > 1 && pool_is_usable() { rayon::current_num_threads() } else { 1 };
    (rows / (4 * threads)).clamp(1, LANES)
}

/// Runs `body(task, scratch)` for every task of `task_rows` rows, in parallel where possible. The first failing row's error is returned;
/// `body` counts rows from the start of its task.
///
/// In a child forked after the thread pool was started, the pool's threads do not exist and waiting for them would never end: there the
/// tasks run on the calling thread.
fn run_tasks<T: Send, S: Default>(task_rows: usize, tasks: Vec<T>, body: impl Fn(T, &mut S) -> RowResult + Sync) -> Result<()> {
    let body = |scratch: &mut S, (i, task)| body(task, scratch).map_err(|(row, error)| (i * task_rows + row, error));
    let failed = if tasks.len() < 2 || !pool_is_usable() {
        let mut scratch = S::default();
        tasks.into_iter().enumerate().find_map(|task| body(&mut scratch, task).err())
    } else {
        let results = tasks.into_par_iter().enumerate().map_init(S::default, body);
        results.filter_map(std::result::Result::err).min_by_key(|(row, _)| *row)
    };
    failed.map_or(Ok(()), |(row, error)| Err(error.at_row(row)))
}

/// The process that started the thread pool, 0 before that.
static POOL_PROCESS: AtomicU32 = AtomicU32::new(0);

fn pool_is_usable() -> bool {
    let here = std::process::id();
    match POOL_PROCESS.compare_exchange(0, here, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => true,
        Err(owner) => owner == here,
    }
}

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

/// Encodes and decodes rows of one configuration. What it writes and reads depends on nothing but the configuration and the rows.
#[derive(Debug, Clone)]
pub struct Codec {
    format: Format,
    backend: Backend,
}

impl Codec {
    /// Prepares a configuration for the fastest instruction set, or the one that the environment variable `DISTILLKIT_SIMD` names.
    ///
    /// Fails with [`CodecError::Config`] where the configuration is not valid, or as [`Backend::from_env`] does.
    pub fn new(config: Config) -> Result<Self> {
        Self::with_backend(config, Backend::from_env()?)
    }

    /// Prepares a configuration for the given instruction set.
    ///
    /// Fails with [`CodecError::Config`] where the configuration is not valid or this CPU lacks the instruction set.
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
        Ok(Self { format, backend })
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
        self.value_bytes() + self.id_bytes()
    }

    /// Encodes `ids.len() / k` rows into `out`.
    ///
    /// Rows are sorted by descending log-probability (stable) where they are not sorted. Fails with [`CodecError::Input`] on sizes that do
    /// not fit, log-probabilities that are not finite or not log-probabilities, ids outside the vocabulary, and repeated ids.
    pub fn encode(&self, ids: &[i64], logprobs: &[f32], out: &mut [u8]) -> Result<()> {
        let (k, bytes) = (self.k(), self.bytes_per_row());
        let rows = rows_of("ids", ids.len(), k)?;
        if logprobs.len() != ids.len() || out.len() != rows * bytes {
            return Err(CodecError::Input(format!(
                "{} ids, {} log-probabilities and {} output bytes do not fit together: {rows} rows of k = {k} need {} bytes",
                ids.len(),
                logprobs.len(),
                out.len(),
                rows * bytes
            )));
        }
        let task = k * TASK_ROWS;
        let tasks = out.chunks_mut(bytes * TASK_ROWS).zip(ids.chunks(task).zip(logprobs.chunks(task))).collect();
        run_tasks(
            TASK_ROWS,
            tasks,
            |(out, (ids, logprobs)): (&mut [u8], (&[i64], &[f32])), scratch| on_format!(self, format => encode_rows(self.backend, format, ids, logprobs, out, scratch)),
        )
    }

    /// Decodes `data.len() / bytes_per_row` rows, by rank.
    ///
    /// Fails with [`CodecError::Truncated`] on a length that is no multiple of a row, [`CodecError::Input`] on output sizes that do not fit,
    /// and [`CodecError::Corrupt`] on ids outside the vocabulary, values that are not finite and unused bits that are set.
    pub fn decode(&self, data: &[u8], ids: &mut [i64], logprobs: &mut [f32]) -> Result<()> {
        let (k, bytes) = (self.k(), self.bytes_per_row());
        if !data.len().is_multiple_of(bytes) {
            let expected = data.len().div_ceil(bytes) * bytes;
            return Err(CodecError::Truncated { what: format!("rows of {bytes} bytes"), found: data.len(), expected });
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
        let task = k * TASK_ROWS;
        let outputs = ids.chunks_mut(task).zip(logprobs.chunks_mut(task));
        let tasks = data.chunks(bytes * TASK_ROWS).zip(outputs).collect();
        run_tasks(
            TASK_ROWS,
            tasks,
            |(data, (ids, logprobs)): (&[u8], (&mut [i64], &mut [f32])), scratch| on_format!(self, format => decode_rows(self.backend, format, data, ids, logprobs, scratch)),
        )
    }

    /// Encodes the k most probable ids of dense logits, rows of `width`, under the full softmax.
    ///
    /// Fails with [`CodecError::Input`] as [`topk`] and [`Codec::encode`] do, and where `width` is not the vocabulary size.
    pub fn encode_logits<L: Logit>(&self, logits: &[L], width: usize, out: &mut [u8]) -> Result<()> {
        let (k, bytes) = (self.k(), self.bytes_per_row());
        if width as u64 != self.vocab_size() {
            return Err(CodecError::Input(format!(
                "logits have {width} columns, but the codec's vocabulary size is {}",
                self.vocab_size()
            )));
        }
        let rows = rows_of("logits", logits.len(), width)?;
        if out.len() != rows * bytes {
            return Err(CodecError::Input(format!("output of {} bytes, but {rows} rows need {}", out.len(), rows * bytes)));
        }
        let task_rows = dense_task_rows(rows);
        let tasks = out.chunks_mut(bytes * task_rows).zip(logits.chunks(width * task_rows)).collect();
        run_tasks(task_rows, tasks, |(out, logits): (&mut [u8], &[L]), scratch: &mut DenseScratch| {
            let DenseScratch { rows, topk, ids, logprobs } = scratch;
            let count = logits.len() / width;
            ids.resize(count * k, 0);
            logprobs.resize(count * k, 0.0);
            let outputs = ids.chunks_mut(k).zip(logprobs.chunks_mut(k));
            for (i, (logits, (ids, logprobs))) in logits.chunks(width).zip(outputs).enumerate() {
                topk_row(self.backend, logits, ids, logprobs, topk).map_err(|error| (i, error))?;
            }
            on_format!(self, format => encode_rows(self.backend, format, ids, logprobs, out, rows))
        })
    }
}

/// Buffers for dense logits.
#[derive(Debug, Default)]
struct DenseScratch {
    rows: Scratch,
    topk: TopkScratch,
    ids: Vec<i64>,
    logprobs: Vec<f32>,
}

fn rows_of(name: &str, len: usize, row: usize) -> Result<usize> {
    if len.is_multiple_of(row) {
        return Ok(len / row);
    }
    Err(CodecError::Input(format!("{len} {name} are no whole number of rows of {row}")))
}

/// The most probable ids of dense logits, rows of `width`: ids and log-probabilities under the full softmax, descending (equal ones by
/// ascending id), and each row's log Σ exp.
///
/// Fails with [`CodecError::Input`] on sizes that do not fit, NaN, +∞, and rows with fewer finite logits than are asked for.
pub fn topk<L: Logit>(logits: &[L], width: usize, k: usize, ids: &mut [i64], logprobs: &mut [f32], logsumexp: &mut [f32]) -> Result<()> {
    let rows = logsumexp.len();
    if k == 0 || k > width || logits.len() != rows * width || ids.len() != rows * k || logprobs.len() != rows * k {
        return Err(CodecError::Input(format!(
            "{} logits in rows of {width}, k = {k}, and outputs for {} ids, {} log-probabilities and {rows} rows do not fit together",
            logits.len(),
            ids.len(),
            logprobs.len()
        )));
    }
    let task_rows = dense_task_rows(rows);
    let outputs = ids.chunks_mut(k * task_rows).zip(logprobs.chunks_mut(k * task_rows)).zip(logsumexp.chunks_mut(task_rows));
    let backend = Backend::from_env()?;
    let tasks = logits.chunks(width * task_rows).zip(outputs).collect();
    run_tasks(task_rows, tasks, |(logits, ((ids, logprobs), logsumexp)): (&[L], _), scratch: &mut TopkScratch| {
        let (ids, logprobs): (&mut [i64], &mut [f32]) = (ids, logprobs);
        let logsumexp: &mut [f32] = logsumexp;
        let outputs = ids.chunks_mut(k).zip(logprobs.chunks_mut(k)).zip(logsumexp);
        for (i, (row, ((ids, logprobs), logsumexp))) in logits.chunks(width).zip(outputs).enumerate() {
            *logsumexp = topk_row(backend, row, ids, logprobs, scratch).map_err(|error| (i, error))? as f32;
        }
        Ok(())
    })
}
