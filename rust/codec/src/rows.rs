//! A run of rows on one thread: checked, sorted where they are not, encoded in groups; and decoded.

use std::cell::Cell;

use crate::bits::Packing;
use crate::error::{CodecError, Result};
use crate::formats::RowFormat;
use crate::lanes::{LANES, Lanes, all_finite, order_and_mass, prefetch, sum_exp};
use crate::simd::multiversion;
use crate::values::{ValuesScratch, encode_values};

/// Log-probabilities may exceed 0, and the sum of a row's probabilities 1, by this much: the rounding of a low-precision teacher.
const ROUNDING: f64 = 1e-2;
/// Ids are looked up by their low 18 bits; real vocabularies have no more.
const SEEN: usize = 1 << 18;

thread_local! {
    /// [`IdChecks::seen`] between runs.
    static KEPT: Cell<Seen> = const { Cell::new(Seen { stamps: Vec::new(), row: 0 }) };
}

/// Buffers of one thread, kept from run to run.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    values: ValuesScratch,
    ids: Vec<i64>,
    logprobs: Vec<f32>,
    checks: IdChecks,
}

/// Buffers of [`check_ids`] and of sorting.
#[derive(Debug)]
struct IdChecks {
    order: Vec<usize>,
    seen: Seen,
}

/// In which row ids were last: rows are counted up to 255, then the vocabulary is cleared.
#[derive(Debug, Default)]
struct Seen {
    /// For every value of the low bits of an id.
    stamps: Vec<u8>,
    row: u8,
}

impl Default for IdChecks {
    fn default() -> Self {
        let mut seen = KEPT.take();
        if seen.stamps.is_empty() {
            seen.stamps = vec![0; SEEN];
        }
        Self { order: Vec::new(), seen }
    }
}

impl Drop for IdChecks {
    fn drop(&mut self) {
        // While a thread ends its variables may be gone already.
        let _ = KEPT.try_with(|kept| kept.set(std::mem::take(&mut self.seen)));
    }
}

/// A failed row and what is wrong with it.
pub(crate) type RowResult = std::result::Result<(), (usize, CodecError)>;

multiversion! {
    /// Encodes rows of k ids and log-probabilities; sizes fit.
    pub(crate) fn encode_rows<F: RowFormat>(format: &F, ids: &[i64], logprobs: &[f32], out: &mut [u8], scratch: &mut Scratch) -> RowResult =
        encode_rows_body;
}

multiversion! {
    /// Decodes rows; sizes fit.
    pub(crate) fn decode_rows<F: RowFormat>(format: &F, data: &[u8], ids: &mut [i64], logprobs: &mut [f32], scratch: &mut Scratch) -> RowResult =
        decode_rows_body;
}

#[inline(always)]
pub(crate) fn encode_rows_body<I: Packing, F: RowFormat>(
    isa: I,
    format: &F,
    ids: &[i64],
    logprobs: &[f32],
    out: &mut [u8],
    scratch: &mut Scratch,
) -> RowResult {
    let (k, value_bytes) = (format.k(), format.value_bytes());
    let bytes = value_bytes + format.id_bytes();
    let groups = ids.chunks(k * LANES).zip(logprobs.chunks(k * LANES)).zip(out.chunks_mut(bytes * LANES));
    let (mut next_ids, mut next_logprobs) = (ids, logprobs);
    for (group, ((ids, logprobs), out)) in groups.enumerate() {
        let at_row = |(row, error)| (group * LANES + row, error);
        (next_ids, next_logprobs) = (&next_ids[ids.len()..], &next_logprobs[ids.len()..]);
        let group = check_group(logprobs, k);
        let next = (next_ids, next_logprobs);
        if group.sorted {
            encode_group(isa, format, ids, logprobs, next, group, out, &mut scratch.values, &mut scratch.checks).map_err(at_row)?;
        } else {
            // NaN is never in order, so it is found here; a bad row is not sorted but refused below.
            sort_rows(ids, logprobs, k, scratch);
            let Scratch { values, ids, logprobs, checks } = scratch;
            let group = check_group(logprobs, k);
            encode_group(isa, format, ids, logprobs, next, group, out, values, checks).map_err(at_row)?;
        }
    }
    Ok(())
}

/// What a look at all rows of a group tells.
#[derive(Debug, Clone, Copy)]
struct Group {
    /// All rows are sorted, none having NaN.
    sorted: bool,
    /// They certainly pass [`check_logprobs`] as well.
    right: bool,
    /// Total probabilities, where they are right.
    masses: Lanes,
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the parts of a group and of one scratch")]
fn encode_group<I: Packing, F: RowFormat>(
    isa: I,
    format: &F,
    ids: &[i64],
    logprobs: &[f32],
    next: (&[i64], &[f32]),
    group: Group,
    out: &mut [u8],
    values: &mut ValuesScratch,
    checks: &mut IdChecks,
) -> RowResult {
    let (k, value_bytes) = (format.k(), format.value_bytes());
    let bytes = value_bytes + format.id_bytes();
    for (row, ((ids, logprobs), out)) in ids.chunks(k).zip(logprobs.chunks(k)).zip(out.chunks_mut(bytes)).enumerate() {
        let ahead = row * k..(row + 1) * k;
        if let (Some(ids), Some(logprobs)) = (next.0.get(ahead.clone()), next.1.get(ahead)) {
            prefetch(ids);
            prefetch(logprobs);
        }
        if !group.right
            && let Err(error) = check_logprobs(logprobs)
        {
            return Err((row, error));
        }
        if let Err(error) = check_ids(ids, format.vocab_size(), checks) {
            return Err((row, error));
        }
        format.write_ids(isa, ids, &mut out[value_bytes..]);
    }
    encode_values(I::BACKEND, format.values(), logprobs, group.masses, out, bytes, values)
}

#[inline(always)]
pub(crate) fn decode_rows_body<I: Packing, F: RowFormat>(
    isa: I,
    format: &F,
    data: &[u8],
    ids: &mut [i64],
    logprobs: &mut [f32],
    scratch: &mut Scratch,
) -> RowResult {
    let (k, value_bytes) = (format.k(), format.value_bytes());
    let rows = data.chunks(value_bytes + format.id_bytes()).zip(ids.chunks_mut(k).zip(logprobs.chunks_mut(k)));
    for (row, (data, (ids, logprobs))) in rows.enumerate() {
        let (values, id_bytes) = data.split_at(value_bytes);
        // No closure: one that is not inlined has none of the instruction set.
        let decoded = match format.read_ids(isa, id_bytes, ids) {
            Ok(()) => format.values().decode(isa, values, logprobs, &mut scratch.values),
            refused => refused,
        };
        decoded.map_err(|error| (row, error))?;
    }
    Ok(())
}

#[inline(always)]
fn check_group(logprobs: &[f32], k: usize) -> Group {
    let (mut sorted, mut right, mut masses) = (true, true, Lanes::ZERO);
    for (row, total) in logprobs.chunks(k).zip(&mut masses.0) {
        let (ordered, mass) = order_and_mass(row);
        sorted &= ordered;
        // In order, the first is the largest and the last the least.
        right &= f64::from(row[0]) <= ROUNDING && row[k - 1] > f32::NEG_INFINITY && mass <= 1.0 + ROUNDING;
        *total = mass as f32;
    }
    Group { sorted, right: sorted && right, masses }
}

/// Copies the rows into the scratch, each sorted by descending log-probability (stable).
#[cold]
fn sort_rows(ids: &[i64], logprobs: &[f32], k: usize, scratch: &mut Scratch) {
    let Scratch { ids: sorted_ids, logprobs: sorted, checks: IdChecks { order, .. }, .. } = scratch;
    sorted_ids.clear();
    sorted.clear();
    for (ids, logprobs) in ids.chunks(k).zip(logprobs.chunks(k)) {
        order.clear();
        order.extend(0..k);
        if logprobs.iter().all(|value| value.is_finite()) {
            order.sort_by(|&a, &b| logprobs[b].total_cmp(&logprobs[a]));
        }
        sorted.extend(order.iter().map(|&i| logprobs[i]));
        sorted_ids.extend(order.iter().map(|&i| ids[i]));
    }
}

/// Refuses what can not be log-probabilities; `logprobs` are sorted if they are finite.
#[cold]
fn check_logprobs(logprobs: &[f32]) -> Result<()> {
    if !all_finite(logprobs) {
        return Err(not_finite(logprobs));
    }
    // The first is the largest; a value that is refused anyway must not overflow.
    let mass = if f64::from(logprobs[0]) > ROUNDING { f64::INFINITY } else { sum_exp(logprobs) };
    if mass > 1.0 + ROUNDING { Err(not_logprobs(logprobs)) } else { Ok(()) }
}

#[cold]
fn not_finite(logprobs: &[f32]) -> CodecError {
    let (rank, value) = logprobs.iter().enumerate().find(|(_, value)| !value.is_finite()).unwrap_or((0, &logprobs[0]));
    CodecError::Input(format!("log-probability {value} at rank {rank} is not finite; store fewer ids or mask the row"))
}

#[cold]
fn not_logprobs(logprobs: &[f32]) -> CodecError {
    let mass: f64 = logprobs.iter().map(|&value| f64::from(value).exp()).sum();
    CodecError::Input(format!(
        "these are not log-probabilities: the largest is {} and their probabilities sum to {mass:.4}; apply log-softmax over the whole \
         vocabulary first",
        logprobs[0]
    ))
}

/// Refuses ids outside the vocabulary and repeated ids.
#[inline(always)]
fn check_ids(ids: &[i64], vocab_size: u64, IdChecks { order, seen }: &mut IdChecks) -> Result<()> {
    // A negative id is a large unsigned one.
    if ids.iter().fold(0, |largest: u64, &id| largest.max(id as u64)) >= vocab_size {
        return Err(outside(ids, vocab_size));
    }
    if seen.row == u8::MAX {
        // Beyond the vocabulary a larger one may have left stamps: a false alarm, for which there is a second look.
        seen.stamps[..SEEN.min(vocab_size as usize)].fill(0);
        seen.row = 0;
    }
    seen.row += 1;
    let Some(stamps) = seen.stamps.first_chunk_mut::<SEEN>() else { return check_repeated(ids, order) };
    let mut repeated = false;
    for &id in ids {
        let stamp = &mut stamps[id as usize % SEEN];
        repeated |= *stamp == seen.row;
        *stamp = seen.row;
    }
    if repeated { check_repeated(ids, order) } else { Ok(()) }
}

#[cold]
fn outside(ids: &[i64], vocab_size: u64) -> CodecError {
    let (rank, id) = ids.iter().enumerate().find(|&(_, &id)| id as u64 >= vocab_size).unwrap_or((0, &ids[0]));
    CodecError::Input(format!("id {id} at rank {rank} is outside the vocabulary of {vocab_size}"))
}

/// Ids that share their low bits need not be the same.
#[cold]
fn check_repeated(ids: &[i64], order: &mut Vec<usize>) -> Result<()> {
    order.clear();
    order.extend(ids.iter().map(|&id| id as usize));
    order.sort_unstable();
    match order.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(CodecError::Input(format!("id {} is there more than once", pair[0]))),
    }
}
