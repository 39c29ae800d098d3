//! Runs of rows as tasks on all cores.
//!
//! Rows do not depend on each other, so results do not depend on the number of threads.

use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::error::{Result, RowResult};
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
