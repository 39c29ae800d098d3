//! A run of rows on one thread: checked, sorted where they are not, encoded in groups; and decoded.

use std::cell::Cell;

use crate::bits::Packing;
use crate::encoder::{EncoderScratch, Group, GroupOut, Plan, encode_values};
use crate::error::{CodecError, Result, RowResult};
use crate::format::RowFormat;
use crate::simd::lanes::{LANES, Lanes, all_finite, order_and_mass, prefetch, sum_exp};
use crate::simd::multiversion;
use crate::values::DecoderScratch;

/// Log-probabilities may exceed 0, and the sum of a row's probabilities 1, by this much: the
/// rounding of a low-precision teacher.
const ROUNDING: f64 = 1e-2;
/// Ids are looked up by their low 18 bits; real vocabularies need no more.
const SEEN: usize = 1 << 18;

thread_local! {
    /// [`IdChecks::seen`] between runs.
    static KEPT: Cell<Seen> = const { Cell::new(Seen { stamps: Vec::new(), row: 0 }) };
}

/// Rows of k ids and k log-probabilities.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) ids: &'a [i64],
    pub(crate) logprobs: &'a [f32],
}

/// Room for rows of k ids and k log-probabilities.
#[derive(Debug)]
pub(crate) struct RowsMut<'a> {
    pub(crate) ids: &'a mut [i64],
    pub(crate) logprobs: &'a mut [f32],
}

impl Rows<'_> {
    /// Divides the rows into runs of `count` numbers.
    #[inline(always)]
    pub(crate) fn chunks(self, count: usize) -> impl Iterator<Item = Self> {
        let chunks = self.ids.chunks(count).zip(self.logprobs.chunks(count));
        chunks.map(|(ids, logprobs)| Self { ids, logprobs })
    }

    /// What follows the first `count` numbers.
    #[inline(always)]
    fn after(self, count: usize) -> Self {
        Self { ids: &self.ids[count..], logprobs: &self.logprobs[count..] }
    }
}

impl RowsMut<'_> {
    /// Divides the rows into runs of `count` numbers.
    #[inline(always)]
    pub(crate) fn chunks(self, count: usize) -> impl Iterator<Item = Self> {
        let chunks = self.ids.chunks_mut(count).zip(self.logprobs.chunks_mut(count));
        chunks.map(|(ids, logprobs)| Self { ids, logprobs })
    }
}

/// What rows are encoded by.
#[derive(Debug)]
pub(crate) struct RowEncoder<'a, F> {
    pub(crate) format: &'a F,
    pub(crate) plan: &'a Plan,
}

/// Buffers for encoding on one thread, kept from run to run.
#[derive(Debug, Default)]
pub(crate) struct EncodeScratch {
    sorted: SortedRows,
    group: GroupScratch,
}

/// Copies of rows, sorted.
#[derive(Debug, Default)]
struct SortedRows {
    ids: Vec<i64>,
    logprobs: Vec<f32>,
    order: Vec<usize>,
}

#[derive(Debug, Default)]
struct GroupScratch {
    values: EncoderScratch,
    checks: IdChecks,
}

/// Buffers of [`IdChecks::check`].
#[derive(Debug)]
struct IdChecks {
    sorted: Vec<usize>,
    seen: Seen,
}

/// In which row ids were last: rows are counted up to 255, then the vocabulary is cleared.
#[derive(Debug, Default)]
struct Seen {
    /// One for every value of the low bits of an id.
    stamps: Vec<u8>,
    row: u8,
}

impl Default for IdChecks {
    fn default() -> Self {
        let mut seen = KEPT.take();
        if seen.stamps.is_empty() {
            seen.stamps = vec![0; SEEN];
        }
        Self { sorted: Vec::new(), seen }
    }
}

impl Drop for IdChecks {
    fn drop(&mut self) {
        // While a thread ends, its variables may be gone already.
        let _ = KEPT.try_with(|kept| kept.set(std::mem::take(&mut self.seen)));
    }
}

multiversion! {
    /// Encodes rows; sizes fit.
    pub(crate) fn encode_rows<F: RowFormat>(
        encoder: &RowEncoder<'_, F>,
        rows: Rows<'_>,
        out: &mut [u8],
        scratch: &mut EncodeScratch,
    ) -> RowResult = encode_rows_body;
}

multiversion! {
    /// Decodes rows; sizes fit.
    pub(crate) fn decode_rows<F: RowFormat>(
        format: &F,
        data: &[u8],
        out: RowsMut<'_>,
        scratch: &mut DecoderScratch,
    ) -> RowResult = decode_rows_body;
}

#[inline(always)]
fn encode_rows_body<I: Packing, F: RowFormat>(
    isa: I,
    encoder: &RowEncoder<F>,
    rows: Rows,
    out: &mut [u8],
    scratch: &mut EncodeScratch,
) -> RowResult {
    let k = encoder.format.k();
    let outs = out.chunks_mut(encoder.format.bytes_per_row() * LANES);
    let mut next = rows;
    for (group, (rows, out)) in rows.chunks(k * LANES).zip(outs).enumerate() {
        let at_row = |(row, error)| (group * LANES + row, error);
        next = next.after(rows.ids.len());
        let EncodeScratch { sorted, group: scratch } = &mut *scratch;
        let check = check_group(rows.logprobs, k);
        if check.sorted {
            let group = CheckedGroup { rows, next, check };
            encode_group(isa, encoder, group, out, scratch).map_err(at_row)?;
        } else {
            // NaN is never in order, so it is found here; a bad row is not sorted but refused
            // below.
            let rows = sorted.sort(rows, k);
            let group = CheckedGroup { rows, next, check: check_group(rows.logprobs, k) };
            encode_group(isa, encoder, group, out, scratch).map_err(at_row)?;
        }
    }
    Ok(())
}

/// What a look at all rows of a group says.
#[derive(Debug, Clone, Copy)]
struct GroupCheck {
    /// All rows are sorted, and none has NaN.
    sorted: bool,
    /// They certainly pass [`check_logprobs`] as well.
    right: bool,
    /// Total probabilities, where they are right.
    masses: Lanes,
}

/// Up to [`LANES`] sorted rows.
#[derive(Debug, Clone, Copy)]
struct CheckedGroup<'a> {
    rows: Rows<'a>,
    /// All rows after these, sorted or not.
    next: Rows<'a>,
    check: GroupCheck,
}

#[inline(always)]
fn encode_group<I: Packing, F: RowFormat>(
    isa: I,
    encoder: &RowEncoder<F>,
    group: CheckedGroup,
    out: &mut [u8],
    scratch: &mut GroupScratch,
) -> RowResult {
    let RowEncoder { format, plan } = encoder;
    let CheckedGroup { rows, next, check } = group;
    let k = format.k();
    let value_bytes = format.value_bytes();
    let stride = format.bytes_per_row();
    for (row, (Rows { ids, logprobs }, out)) in
        rows.chunks(k).zip(out.chunks_mut(stride)).enumerate()
    {
        let ahead = row * k..(row + 1) * k;
        if let (Some(ids), Some(logprobs)) = (next.ids.get(ahead.clone()), next.logprobs.get(ahead))
        {
            prefetch(ids);
            prefetch(logprobs);
        }
        if !check.right
            && let Err(error) = check_logprobs(logprobs)
        {
            return Err((row, error));
        }
        if let Err(error) = scratch.checks.check(ids, format.vocab_size()) {
            return Err((row, error));
        }
        format.write_ids(isa, ids, &mut out[value_bytes..]);
    }
    let group = Group { logprobs: rows.logprobs, k, masses: check.masses };
    encode_values(I::BACKEND, plan, group, GroupOut { bytes: out, stride }, &mut scratch.values)
}

#[inline(always)]
fn decode_rows_body<I: Packing, F: RowFormat>(
    isa: I,
    format: &F,
    data: &[u8],
    out: RowsMut,
    scratch: &mut DecoderScratch,
) -> RowResult {
    let value_bytes = format.value_bytes();
    let rows = data.chunks(format.bytes_per_row()).zip(out.chunks(format.k()));
    for (row, (data, RowsMut { ids, logprobs })) in rows.enumerate() {
        let (values, id_bytes) = data.split_at(value_bytes);
        // This is no closure: one that is not inlined has none of the instruction set.
        let decoded = match format.read_ids(isa, id_bytes, ids) {
            Ok(()) => format.values().decode(isa, values, logprobs, scratch),
            refused => refused,
        };
        decoded.map_err(|error| (row, error))?;
    }
    Ok(())
}

#[inline(always)]
fn check_group(logprobs: &[f32], k: usize) -> GroupCheck {
    let mut sorted = true;
    let mut right = true;
    let mut masses = Lanes::ZERO;
    for (row, total) in logprobs.chunks(k).zip(&mut masses.0) {
        let (ordered, mass) = order_and_mass(row);
        sorted &= ordered;
        // In order, the first is the largest and the last the least.
        right &= f64::from(row[0]) <= ROUNDING
            && row[k - 1] > f32::NEG_INFINITY
            && mass <= 1.0 + ROUNDING;
        *total = mass as f32;
    }
    GroupCheck { sorted, right: sorted && right, masses }
}

impl SortedRows {
    /// Copies the rows, each sorted by descending log-probability (stable).
    #[cold]
    fn sort(&mut self, rows: Rows, k: usize) -> Rows<'_> {
        let Self { ids: sorted_ids, logprobs: sorted, order } = self;
        sorted_ids.clear();
        sorted.clear();
        for Rows { ids, logprobs } in rows.chunks(k) {
            order.clear();
            order.extend(0..k);
            if logprobs.iter().all(|value| value.is_finite()) {
                order.sort_by(|&a, &b| logprobs[b].total_cmp(&logprobs[a]));
            }
            sorted.extend(order.iter().map(|&i| logprobs[i]));
            sorted_ids.extend(order.iter().map(|&i| ids[i]));
        }
        Rows { ids: &self.ids, logprobs: &self.logprobs }
    }
}

/// Refuses what cannot be log-probabilities; `logprobs` are sorted if they are finite.
#[cold]
fn check_logprobs(logprobs: &[f32]) -> Result<()> {
    if !all_finite(logprobs) {
        return Err(not_finite(logprobs));
    }
    // The first is the largest; a value that is refused anyway must not overflow.
    let too_large = f64::from(logprobs[0]) > ROUNDING;
    let mass = if too_large { f64::INFINITY } else { sum_exp(logprobs) };
    if mass > 1.0 + ROUNDING { Err(not_logprobs(logprobs)) } else { Ok(()) }
}

#[cold]
fn not_finite(logprobs: &[f32]) -> CodecError {
    let found = logprobs.iter().enumerate().find(|(_, value)| !value.is_finite());
    let (rank, value) = found.unwrap_or((0, &logprobs[0]));
    CodecError::Input(format!(
        "log-probability {value} at rank {rank} is not finite; store fewer ids or mask the row"
    ))
}

#[cold]
fn not_logprobs(logprobs: &[f32]) -> CodecError {
    let mass: f64 = logprobs.iter().map(|&value| f64::from(value).exp()).sum();
    CodecError::Input(format!(
        "these are not log-probabilities: the largest is {} and their probabilities sum to \
         {mass:.4}; apply log-softmax over the whole vocabulary first",
        logprobs[0]
    ))
}

impl IdChecks {
    /// Refuses ids outside the vocabulary and repeated ids.
    #[inline(always)]
    fn check(&mut self, ids: &[i64], vocab_size: u64) -> Result<()> {
        let Self { sorted, seen } = self;
        // A negative id is a large unsigned one.
        if ids.iter().fold(0, |largest: u64, &id| largest.max(id as u64)) >= vocab_size {
            return Err(outside(ids, vocab_size));
        }
        if seen.row == u8::MAX {
            // Beyond the vocabulary a larger one may have left stamps: a false alarm, for which
            // there is a second look.
            seen.stamps[..SEEN.min(vocab_size as usize)].fill(0);
            seen.row = 0;
        }
        seen.row += 1;
        let Some(stamps) = seen.stamps.first_chunk_mut::<SEEN>() else {
            return check_repeated(ids, sorted);
        };
        let mut repeated = false;
        for &id in ids {
            let stamp = &mut stamps[id as usize % SEEN];
            repeated |= *stamp == seen.row;
            *stamp = seen.row;
        }
        if repeated { check_repeated(ids, sorted) } else { Ok(()) }
    }
}

#[cold]
fn outside(ids: &[i64], vocab_size: u64) -> CodecError {
    let found = ids.iter().enumerate().find(|&(_, &id)| id as u64 >= vocab_size);
    let (rank, id) = found.unwrap_or((0, &ids[0]));
    CodecError::Input(format!("id {id} at rank {rank} is outside the vocabulary of {vocab_size}"))
}

/// Ids that share their low bits need not be the same.
#[cold]
fn check_repeated(ids: &[i64], sorted: &mut Vec<usize>) -> Result<()> {
    sorted.clear();
    sorted.extend(ids.iter().map(|&id| id as usize));
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(CodecError::Input(format!("id {} is there more than once", pair[0]))),
    }
}
