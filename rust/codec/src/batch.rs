//! Many rows at a time, on all cores.
//!
//! Rows do not depend on each other, so results do not depend on the number of threads.

use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::config::Config;
use crate::error::{CodecError, Result};
use crate::formats::legacy::Legacy;
use crate::formats::quantized::Quantized;
use crate::formats::{RowFormat, Scratch};
use crate::topk::{Logit, TopkScratch, topk_row};

/// Log-probabilities may exceed 0, and the sum of a row's probabilities 1, by this much: the rounding of a low-precision teacher.
const ROUNDING: f64 = 1e-2;
/// Rows of one task: enough to make its buffers and its scheduling cheap.
const TASK_ROWS: usize = 64;

/// Rows of dense logits are a thousand times longer.
const DENSE_TASK_ROWS: usize = 4;

/// Runs `body(first row, task)` for every task of `task_rows` rows, in parallel where possible. The first failing row's error is returned.
///
/// In a child forked after the thread pool was started, the pool's threads do not exist and waiting for them would never end: there the
/// tasks run on the calling thread.
fn run_tasks<T: Send>(task_rows: usize, tasks: Vec<T>, body: impl Fn(usize, T) -> Result<()> + Sync) -> Result<()> {
    if tasks.len() < 2 || !pool_is_usable() {
        return tasks.into_iter().enumerate().try_for_each(|(i, task)| body(i * task_rows, task));
    }
    let results = tasks.into_par_iter().enumerate().map(|(i, task)| (i, body(i * task_rows, task)));
    match results.filter(|(_, result)| result.is_err()).min_by_key(|(i, _)| *i) {
        Some((_, error)) => error,
        None => Ok(()),
    }
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

/// Encodes and decodes rows of one configuration.
#[derive(Debug, Clone)]
pub enum Codec {
    /// `logprob_compressor`.
    Quantized(Quantized),
    /// `legacy_logit_compression`.
    Legacy(Legacy),
}

impl Codec {
    /// Prepares a configuration; [`Config::from_json`] has validated it.
    pub fn new(config: Config) -> Result<Self> {
        Ok(match config {
            Config::Quantized(config) => {
                config.validate()?;
                Self::Quantized(Quantized::new(config))
            }
            Config::Legacy(config) => {
                config.validate()?;
                Self::Legacy(Legacy::new(config))
            }
        })
    }

    fn format(&self) -> &dyn RowFormat {
        match self {
            Self::Quantized(format) => format,
            Self::Legacy(format) => format,
        }
    }

    /// Stored ids a row.
    #[must_use]
    pub fn k(&self) -> usize {
        self.format().k()
    }

    /// Ids are below this.
    #[must_use]
    pub fn vocab_size(&self) -> u64 {
        self.format().vocab_size()
    }

    /// Bytes of a row's values (`compressed_logprobs`), which come first.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        self.format().value_bytes()
    }

    /// Bytes of a row's ids (`bytepacked_indices`), which come last.
    #[must_use]
    pub fn id_bytes(&self) -> usize {
        self.format().id_bytes()
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
        let rows = self.rows_of("ids", ids.len(), k)?;
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
        run_tasks(TASK_ROWS, tasks, |first, (out, (ids, logprobs))| {
            let mut scratch = Scratch::default();
            let rows = out.chunks_mut(bytes).zip(ids.chunks(k).zip(logprobs.chunks(k)));
            for (i, (out, (ids, logprobs))) in rows.enumerate() {
                self.encode_row(ids, logprobs, out, &mut scratch).map_err(|error| error.at_row(first + i))?;
            }
            Ok(())
        })
    }

    fn encode_row(&self, ids: &[i64], logprobs: &[f32], out: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        sort_and_check(ids, logprobs, self.vocab_size(), scratch)?;
        self.format().encode_row(scratch, out)
    }

    /// Decodes `data.len() / bytes_per_row` rows, by rank.
    ///
    /// Fails with [`CodecError::Truncated`] on a length that is no multiple of a row, [`CodecError::Input`] on output sizes that do not fit,
    /// and [`CodecError::Corrupt`] on ids outside the vocabulary, values that are not finite and unused bits that are set.
    pub fn decode(&self, data: &[u8], ids: &mut [i64], logprobs: &mut [f32]) -> Result<()> {
        let (k, bytes) = (self.k(), self.bytes_per_row());
        if data.len() % bytes != 0 {
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
        run_tasks(TASK_ROWS, data.chunks(bytes * TASK_ROWS).zip(outputs).collect(), |first, (data, (ids, logprobs))| {
            let mut scratch = Scratch::default();
            let rows = data.chunks(bytes).zip(ids.chunks_mut(k).zip(logprobs.chunks_mut(k)));
            for (i, (row, (ids, logprobs))) in rows.enumerate() {
                let decoded = self.format().decode_row(row, ids, logprobs, &mut scratch);
                decoded.map_err(|error| error.at_row(first + i))?;
            }
            Ok(())
        })
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
        let rows = self.rows_of("logits", logits.len(), width)?;
        if out.len() != rows * bytes {
            return Err(CodecError::Input(format!("output of {} bytes, but {rows} rows need {}", out.len(), rows * bytes)));
        }
        let tasks = out.chunks_mut(bytes * DENSE_TASK_ROWS).zip(logits.chunks(width * DENSE_TASK_ROWS)).collect();
        run_tasks(DENSE_TASK_ROWS, tasks, |first, (out, logits)| {
            let (mut scratch, mut topk) = (Scratch::default(), TopkScratch::default());
            let (mut ids, mut logprobs) = (vec![0; k], vec![0.0; k]);
            for (i, (out, row)) in out.chunks_mut(bytes).zip(logits.chunks(width)).enumerate() {
                topk_row(row, &mut ids, &mut logprobs, &mut topk)
                    .and_then(|_| self.encode_row(&ids, &logprobs, out, &mut scratch))
                    .map_err(|error| error.at_row(first + i))?;
            }
            Ok(())
        })
    }

    #[expect(clippy::unused_self, reason = "reads as a question about this codec's rows")]
    fn rows_of(&self, name: &str, len: usize, row: usize) -> Result<usize> {
        if len % row == 0 {
            return Ok(len / row);
        }
        Err(CodecError::Input(format!("{len} {name} are no whole number of rows of {row}")))
    }
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
    let outputs =
        ids.chunks_mut(k * DENSE_TASK_ROWS).zip(logprobs.chunks_mut(k * DENSE_TASK_ROWS)).zip(logsumexp.chunks_mut(DENSE_TASK_ROWS));
    run_tasks(
        DENSE_TASK_ROWS,
        logits.chunks(width * DENSE_TASK_ROWS).zip(outputs).collect(),
        |first, (logits, ((ids, logprobs), logsumexp))| {
            let mut scratch = TopkScratch::default();
            let outputs = ids.chunks_mut(k).zip(logprobs.chunks_mut(k)).zip(logsumexp);
            for (i, (row, ((ids, logprobs), logsumexp))) in logits.chunks(width).zip(outputs).enumerate() {
                *logsumexp = topk_row(row, ids, logprobs, &mut scratch).map_err(|error| error.at_row(first + i))? as f32;
            }
            Ok(())
        },
    )
}

/// Leaves the row in `scratch`, sorted by descending log-probability, or says what is wrong with it.
fn sort_and_check(ids: &[i64], logprobs: &[f32], vocab_size: u64, scratch: &mut Scratch) -> Result<()> {
    if let Some(rank) = logprobs.iter().position(|value| !value.is_finite()) {
        let message = format!("log-probability {} at rank {rank} is not finite; store fewer ids or mask the row", logprobs[rank]);
        return Err(CodecError::Input(message));
    }
    let Scratch { y, ids: sorted, order, .. } = scratch;
    y.clear();
    sorted.clear();
    if logprobs.is_sorted_by(|a, b| a >= b) {
        y.extend(logprobs.iter().map(|&value| f64::from(value)));
        sorted.extend_from_slice(ids);
    } else {
        order.clear();
        order.extend(0..ids.len());
        order.sort_by(|&a, &b| logprobs[b].total_cmp(&logprobs[a]));
        y.extend(order.iter().map(|&i| f64::from(logprobs[i])));
        sorted.extend(order.iter().map(|&i| ids[i]));
    }
    let mass: f64 = y.iter().map(|value| value.exp()).sum();
    if y[0] > ROUNDING || mass > 1.0 + ROUNDING {
        return Err(CodecError::Input(format!(
            "these are not log-probabilities: the largest is {} and their probabilities sum to {mass:.4}; apply log-softmax \
             over the whole vocabulary first",
            y[0]
        )));
    }
    check_ids(sorted, vocab_size, order)
}

fn check_ids(ids: &[i64], vocab_size: u64, order: &mut Vec<usize>) -> Result<()> {
    if let Some(rank) = ids.iter().position(|&id| id < 0 || id as u64 >= vocab_size) {
        return Err(CodecError::Input(format!("id {} at rank {rank} is outside the vocabulary of {vocab_size}", ids[rank])));
    }
    order.clear();
    order.extend(ids.iter().map(|&id| id as usize));
    order.sort_unstable();
    match order.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(CodecError::Input(format!("id {} is there more than once", pair[0]))),
    }
}
