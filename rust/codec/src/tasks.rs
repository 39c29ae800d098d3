//! Runs of rows as tasks on all cores.
//!
//! Rows do not depend on each other, so results do not depend on the number of threads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::error::{CodecError, Result, RowResult};
use crate::simd::lanes::LANES;

/// Rows of one task: enough to make its buffers and its scheduling cheap.
pub(crate) const TASK_ROWS: usize = 128;

/// Rows of dense logits of one task. They are a thousand times as long, so some tasks for every
/// thread come first, and then groups that fill the encoder's vectors.
pub(crate) fn dense_task_rows(rows: usize) -> usize {
    // Asking for the number of threads starts the pool, so it has to be one that will be used.
    let threads = if rows > 1 && pool_is_usable() { rayon::current_num_threads() } else { 1 };
    (rows / (4 * threads)).clamp(1, LANES)
}

/// Runs `body(task, scratch)` for every task of `task_rows` rows, in parallel where possible. The
/// first failing row's error is returned; `body` counts rows from the start of its task.
///
/// In a child forked after the thread pool was started, the pool's threads do not exist and waiting
/// for them would never end: there the tasks run on the calling thread.
pub(crate) fn run_tasks<T: Send, S: Default>(
    task_rows: usize,
    tasks: Vec<T>,
    body: impl Fn(T, &mut S) -> RowResult + Sync,
) -> Result<()> {
    let body = |scratch: &mut S, (i, task)| {
        body(task, scratch).map_err(|(row, error)| (i * task_rows + row, error))
    };
    let alone = tasks.len() < 2 || !pool_is_usable();
    let mut scratch = S::default();
    let mut tasks = tasks.into_iter().enumerate();
    let mut count = if alone { 1 } else { 16 * rayon::current_num_threads() };
    while tasks.len() > 0 {
        let started = Instant::now();
        let mut piece = tasks.by_ref().take(count);
        let failed = if alone {
            piece.find_map(|task| body(&mut scratch, task).err())
        } else {
            let piece: Vec<(usize, T)> = piece.collect();
            let results = piece.into_par_iter().map_init(S::default, &body);
            results.filter_map(std::result::Result::err).min_by_key(|(row, _)| *row)
        };
        if let Some((row, error)) = failed {
            return Err(error.at_row(row));
        }
        if started.elapsed() < PIECE {
            count = count.saturating_mul(2);
        } else if started.elapsed() > 4 * PIECE {
            count = (count / 2).max(1);
        }
        if tasks.len() > 0 && GOES_ON.get().is_some_and(|goes_on| !goes_on()) {
            return Err(CodecError::Interrupted);
        }
    }
    Ok(())
}

/// How long tasks run at least before somebody is asked whether to go on.
const PIECE: Duration = Duration::from_millis(50);

/// Whether to go on.
static GOES_ON: OnceLock<fn() -> bool> = OnceLock::new();

/// Has `goes_on` asked from time to time during long calls, by the calling thread; where it says
/// no, the call fails with [`CodecError::Interrupted`]. Only the first one that is given counts.
pub fn ask_whether_to_go_on(goes_on: fn() -> bool) {
    GOES_ON.get_or_init(|| goes_on);
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
