//! Rows of dense logits → their k most probable ids and log-probabilities under the full softmax,
//! in one pass over the logits.
//!
//! A row is taken in blocks that stay in the first-level cache. One pass over a block adds up its
//! share of Σ exp and finds the logits that are not below the rising threshold of the best k.
//! Exponentials are relative to a reference, the highest logit of the first block; where later
//! logits are far above it, what was summed up is scaled to a new one.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{CodecError, Result};
use crate::simd::lanes::{LANES, Lanes, exp, larger, no_unroll};
use crate::simd::{Backend, Isa, Portable, multiversion};
use crate::tasks::{dense_task_rows, run_tasks};

/// Logits of a block: 2 KB of float32.
const BLOCK: usize = 512;
/// Vectors whose exponentials are computed side by side.
const AT_A_TIME: usize = 4;
/// Logits this far (nats) above the reference are still added up relative to it.
const FARTHEST: f32 = 60.0;

/// A type that logits come in.
pub trait Logit: Copy + Sync {
    /// The value in float32, exactly.
    fn to_f32(self) -> f32;

    /// The values in float32: themselves, or converted into `buffer`, which is as long.
    #[inline(always)]
    fn widen<'a>(logits: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        for (out, logit) in buffer.iter_mut().zip(logits) {
            *out = logit.to_f32();
        }
        buffer
    }
}

impl Logit for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn widen<'a>(logits: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        logits
    }
}

impl Logit for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn widen<'a>(logits: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        logits.convert_to_f32_slice(buffer);
        buffer
    }
}

impl Logit for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Buffers of [`topk_row`], kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct TopkScratch {
    block: Vec<f32>,
    best: Vec<u64>,
}

/// A logit and its id as one number, least for the highest logit and among equal ones for the
/// lowest id: a total order, so the result does not depend on how it is found, and one that sorts
/// without branches.
#[inline(always)]
fn key(logit: f32, id: u32) -> u64 {
    // The bits of a positive float count up with it, those of a negative one down.
    let bits = logit.to_bits();
    let descending = if bits >> 31 == 0 { !(bits | 1 << 31) } else { bits };
    u64::from(descending) << 32 | u64::from(id)
}

#[inline(always)]
fn logit_of(key: u64) -> f32 {
    let descending = (key >> 32) as u32;
    f32::from_bits(if descending >> 31 == 0 { !descending & !(1 << 31) } else { descending })
}

/// The most probable ids of dense logits, rows of `width`: ids and log-probabilities under the full
/// softmax, descending (equal ones by ascending id), and each row's log Σ exp.
///
/// Fails with [`CodecError::Input`] on sizes that do not fit, NaN, +∞, and rows with fewer finite
/// logits than are asked for.
pub fn topk<L: Logit>(
    logits: &[L],
    width: usize,
    k: usize,
    ids: &mut [i64],
    logprobs: &mut [f32],
    logsumexp: &mut [f32],
) -> Result<()> {
    if k == 0 || k > width {
        return Err(CodecError::Input(format!(
            "k is {k}, must be between 1 and {width}, the number of logits in a row"
        )));
    }
    let rows = logsumexp.len();
    let fits = logits.len() == rows * width && ids.len() == rows * k && logprobs.len() == rows * k;
    if !fits {
        return Err(CodecError::Input(format!(
            "{} logits in rows of {width}, k = {k}, and outputs for {} ids, {} log-probabilities \
             and {rows} rows do not fit together",
            logits.len(),
            ids.len(),
            logprobs.len()
        )));
    }
    let backend = Backend::from_env()?;
    let task_rows = dense_task_rows(rows);
    let ids = ids.chunks_mut(k * task_rows);
    let logprobs = logprobs.chunks_mut(k * task_rows);
    let logsumexp = logsumexp.chunks_mut(task_rows);
    let logits = logits.chunks(width * task_rows);
    let tasks = logits.zip(ids.zip(logprobs).zip(logsumexp)).map(|(logits, outputs)| {
        let ((ids, logprobs), logsumexp) = outputs;
        TopkTask { logits, ids, logprobs, logsumexp }
    });
    run_tasks(task_rows, tasks.collect(), |task: TopkTask<L>, scratch: &mut TopkScratch| {
        let outputs = task.ids.chunks_mut(k).zip(task.logprobs.chunks_mut(k)).zip(task.logsumexp);
        let rows = task.logits.chunks(width).zip(outputs);
        for (i, (row, ((ids, logprobs), logsumexp))) in rows.enumerate() {
            let found = topk_row(backend, row, ids, logprobs, scratch);
            *logsumexp = found.map_err(|error| (i, error))? as f32;
        }
        Ok(())
    })
}

/// Some rows of dense logits, and the outputs of each.
struct TopkTask<'a, L> {
    logits: &'a [L],
    ids: &'a mut [i64],
    logprobs: &'a mut [f32],
    logsumexp: &'a mut [f32],
}

multiversion! {
    /// Fills `ids` and `logprobs` (both k long) and returns log Σ exp.
    pub(crate) fn topk_row<L: Logit>(
        logits: &[L],
        ids: &mut [i64],
        logprobs: &mut [f32],
        scratch: &mut TopkScratch,
    ) -> Result<f64> = topk_row_body;
}

#[inline(always)]
fn topk_row_body<I: DenseIsa, L: Logit>(
    isa: I,
    logits: &[L],
    ids: &mut [i64],
    logprobs: &mut [f32],
    scratch: &mut TopkScratch,
) -> Result<f64> {
    let TopkScratch { block: buffer, best } = scratch;
    buffer.resize(BLOCK, 0.0);
    best.clear();
    // Candidates are thinned out to k whenever there are this many.
    let room = (3 * ids.len()).max(256);
    let mut reference = f32::NEG_INFINITY;
    let mut threshold = f32::NEG_INFINITY;
    let mut sums = [0.0f64; LANES];
    let mut passing = [0; BLOCK / LANES];
    for (first, block) in logits.chunks(BLOCK).enumerate() {
        let block = L::widen(block, &mut buffer[..block.len()]);
        if reference == f32::NEG_INFINITY {
            reference = maximum(block);
            if reference == f32::NEG_INFINITY && !block.iter().any(|logit| logit.is_nan()) {
                continue;
            }
        }
        let mut parts = sums_and_passing(isa, block, reference, threshold, &mut passing);
        // The threshold is one of the logits so far, and none of these is so far above the
        // reference. So if a logit of this block is, it passes the threshold.
        let highest = select(block, &passing, first * BLOCK, best);
        if highest > reference + FARTHEST {
            let factor = f64::from(exp(reference - highest));
            for sum in &mut sums {
                *sum *= factor;
            }
            reference = highest;
            parts = sums_and_passing(isa, block, reference, threshold, &mut passing);
        }
        if !reference.is_finite() {
            return Err(CodecError::Input("the row has logits that are NaN or infinite".into()));
        }
        for (sum, part) in sums.iter_mut().zip(parts.0) {
            *sum += f64::from(part);
        }
        if best.len() >= room {
            thin_out(best, ids.len());
            threshold = logit_of(best[ids.len() - 1]);
        }
    }
    thin_out(best, ids.len());
    best.sort_unstable();
    write_best(best, reference, sums.iter().sum(), ids, logprobs)
}

/// Fills `ids` and `logprobs` with the best logits, where `sum` is Σ exp relative to the reference,
/// and returns log Σ exp.
#[inline(always)]
fn write_best(
    best: &[u64],
    reference: f32,
    sum: f64,
    ids: &mut [i64],
    logprobs: &mut [f32],
) -> Result<f64> {
    if !reference.is_finite() || !sum.is_finite() {
        let what = if sum.is_nan() { "logits that are NaN or infinite" } else { "no finite logit" };
        return Err(CodecError::Input(format!("the row has {what}")));
    }
    let finite = best.iter().filter(|&&key| logit_of(key).is_finite()).count();
    if finite < ids.len() {
        return Err(CodecError::Input(format!(
            "only {finite} logits are finite, fewer than k = {}",
            ids.len()
        )));
    }
    let reference = f64::from(reference);
    let log_sum = libm::log(sum);
    for ((id, logprob), &key) in ids.iter_mut().zip(logprobs).zip(best) {
        let logit = f64::from(logit_of(key));
        *id = i64::from(key as u32);
        // Finite logits have finite log-probabilities, however far apart they are.
        *logprob = ((logit - reference - log_sum) as f32).max(f32::MIN);
    }
    Ok(reference + log_sum)
}

/// The largest logit; NaN is passed over.
fn maximum(block: &[f32]) -> f32 {
    block.iter().copied().fold(f32::NEG_INFINITY, larger)
}

/// Σ exp(logit − reference) in parts, of which one is NaN if a logit is; and into `passing`, a bit
/// for each logit of a block, which logits are not below the threshold.
#[inline(always)]
fn sums_and_passing<I: DenseIsa>(
    isa: I,
    block: &[f32],
    reference: f32,
    threshold: f32,
    passing: &mut [u16; BLOCK / LANES],
) -> Lanes {
    let reference = Lanes::splat(reference);
    let mut sums = Lanes::ZERO;
    let (vectors, rest) = block.as_chunks::<LANES>();
    let (several, single) = vectors.as_chunks::<AT_A_TIME>();
    let (passing_several, passing_single) = passing.split_at_mut(vectors.len() - single.len());
    for (logits, passing) in several.iter().zip(passing_several.as_chunks_mut().0) {
        no_unroll();
        *passing = logits.each_ref().map(|logits| isa.passing(logits, threshold));
        isa.add_exps(&mut sums, logits, reference);
    }
    for (logits, passing) in single.iter().zip(passing_single) {
        no_unroll();
        *passing = isa.passing(logits, threshold);
        sums += (Lanes(*logits) - reference).exp();
    }
    if block.len() < BLOCK {
        let mut logits = [f32::NEG_INFINITY; LANES];
        logits[..rest.len()].copy_from_slice(rest);
        passing[vectors.len()] = isa.passing(&logits, threshold) & ((1 << rest.len()) - 1);
        passing[vectors.len() + 1..].fill(0);
        if !rest.is_empty() {
            sums += (Lanes(logits) - reference).exp();
        }
    }
    no_unroll();
    sums
}

/// What an instruction set does better by instructions of its own than compilers do from the
/// definition.
trait DenseIsa: Isa {
    /// Bit i is set where logit i is at least `threshold`.
    #[inline(always)]
    fn passing(self, logits: &[f32; LANES], threshold: f32) -> u16 {
        // Mostly none does.
        if !logits.iter().fold(false, |any, &logit| any | (logit >= threshold)) {
            return 0;
        }
        logits
            .iter()
            .enumerate()
            .fold(0, |bits, (i, &logit)| bits | (u16::from(logit >= threshold) << i))
    }

    /// Adds exp(logit − reference) of one vector after the other to the sums; any number where that
    /// is above e⁸⁸.
    #[inline(always)]
    fn add_exps(self, sums: &mut Lanes, logits: &[[f32; LANES]; AT_A_TIME], reference: Lanes) {
        for logits in logits {
            no_unroll();
            *sums += (Lanes(*logits) - reference).exp();
        }
    }
}

impl DenseIsa for Portable {}

#[cfg(target_arch = "aarch64")]
impl DenseIsa for crate::simd::Neon {}

#[cfg(target_arch = "x86_64")]
impl DenseIsa for crate::simd::Avx2 {
    #[inline(always)]
    fn passing(self, logits: &[f32; LANES], threshold: f32) -> u16 {
        use std::arch::x86_64::{
            _CMP_GE_OQ, _mm256_cmp_ps, _mm256_loadu_ps, _mm256_movemask_ps, _mm256_set1_ps,
        };
        let (first, second) = logits.split_at(LANES / 2);
        // SAFETY: the token proves AVX2; each half has the eight floats that are read.
        unsafe {
            let threshold = _mm256_set1_ps(threshold);
            let first = _mm256_cmp_ps::<_CMP_GE_OQ>(_mm256_loadu_ps(first.as_ptr()), threshold);
            let second = _mm256_cmp_ps::<_CMP_GE_OQ>(_mm256_loadu_ps(second.as_ptr()), threshold);
            _mm256_movemask_ps(first) as u16 | (_mm256_movemask_ps(second) as u16) << (LANES / 2)
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl DenseIsa for crate::simd::Avx512 {
    #[inline(always)]
    fn passing(self, logits: &[f32; LANES], threshold: f32) -> u16 {
        use std::arch::x86_64::{_CMP_GE_OQ, _mm512_cmp_ps_mask, _mm512_loadu_ps, _mm512_set1_ps};
        // SAFETY: the token proves AVX-512; there are the sixteen floats that are read.
        unsafe {
            _mm512_cmp_ps_mask::<_CMP_GE_OQ>(
                _mm512_loadu_ps(logits.as_ptr()),
                _mm512_set1_ps(threshold),
            )
        }
    }

    /// By the steps of [`exp`], each for all vectors before the next, so that none waits for the
    /// one before; the rounding to an integer and the product with a power of 2 are one instruction
    /// each, with the same result.
    #[inline(always)]
    fn add_exps(self, sums: &mut Lanes, logits: &[[f32; LANES]; AT_A_TIME], reference: Lanes) {
        use crate::simd::lanes::{LEAST_EXPONENT, POLYNOMIAL};
        use std::arch::x86_64::{
            _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm512_add_ps, _mm512_loadu_ps,
            _mm512_max_ps, _mm512_mul_ps, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_ps,
            _mm512_setzero_ps, _mm512_storeu_ps, _mm512_sub_ps,
        };
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        macro_rules! each {
            ($i:ident => $value:expr) => {{
                let mut all = [_mm512_setzero_ps(); AT_A_TIME];
                for $i in 0..AT_A_TIME {
                    all[$i] = $value;
                }
                all
            }};
        }
        // One pair of the polynomial's coefficients: high·f + low.
        macro_rules! linear {
            ($f:expr, $coefficients:expr) => {{
                let (high, low) = $coefficients;
                _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(high), $f), _mm512_set1_ps(low))
            }};
        }
        // SAFETY: the token proves AVX-512; every array that is read or written has sixteen floats.
        unsafe {
            let reference = _mm512_loadu_ps(reference.0.as_ptr());
            let x = each!(i => _mm512_sub_ps(_mm512_loadu_ps(logits[i].as_ptr()), reference));
            // The second operand is taken where one is NaN.
            let x = each!(i => _mm512_max_ps(_mm512_set1_ps(LEAST_EXPONENT), x[i]));
            let t = each!(i => _mm512_mul_ps(x[i], _mm512_set1_ps(std::f32::consts::LOG2_E)));
            let n = each!(i => _mm512_roundscale_ps::<NEAREST>(t[i]));
            let f = each!(i => _mm512_sub_ps(t[i], n[i]));
            let square = each!(i => _mm512_mul_ps(f[i], f[i]));
            let fifth = each!(i => linear!(f[i], POLYNOMIAL[0]));
            let third = each!(i => linear!(f[i], POLYNOMIAL[1]));
            let first = each!(i => linear!(f[i], POLYNOMIAL[2]));
            let sum = each!(i => _mm512_add_ps(_mm512_mul_ps(fifth[i], square[i]), third[i]));
            let sum = each!(i => _mm512_add_ps(_mm512_mul_ps(sum[i], square[i]), first[i]));
            let e = each!(i => _mm512_scalef_ps(sum[i], n[i]));
            let mut all = _mm512_loadu_ps(sums.0.as_ptr());
            for e in e {
                all = _mm512_add_ps(all, e);
            }
            _mm512_storeu_ps(sums.0.as_mut_ptr(), all);
        }
    }
}

/// Appends the logits that passed to `best` and returns the highest of them.
#[inline(always)]
fn select(block: &[f32], passing: &[u16; BLOCK / LANES], first: usize, best: &mut Vec<u64>) -> f32 {
    let mut highest = f32::NEG_INFINITY;
    for (word, parts) in passing.as_chunks::<4>().0.iter().enumerate() {
        let mut bits =
            parts.iter().rev().fold(0, |bits: u64, &part| bits << LANES | u64::from(part));
        while bits != 0 {
            let i = word * 4 * LANES + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            highest = larger(highest, block[i]);
            best.push(key(block[i], (first + i) as u32));
        }
    }
    highest
}

/// Leaves the first k in the order of [`key`], the k-th in its place.
fn thin_out(best: &mut Vec<u64>, k: usize) {
    if best.len() > k {
        best.select_nth_unstable(k - 1);
        best.truncate(k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run_on<L: Logit>(
        backend: Backend,
        logits: &[L],
        k: usize,
    ) -> Result<(Vec<i64>, Vec<f32>, f64)> {
        let mut ids = vec![0; k];
        let mut logprobs = vec![0.0; k];
        let log_sum =
            topk_row(backend, logits, &mut ids, &mut logprobs, &mut TopkScratch::default())?;
        Ok((ids, logprobs, log_sum))
    }

    /// On every backend, which all have to answer the same, bit for bit.
    fn run<L: Logit>(logits: &[L], k: usize) -> Result<(Vec<i64>, Vec<f32>, f64)> {
        let portable = run_on(Backend::Portable, logits, k);
        for backend in Backend::available() {
            assert_eq!(run_on(backend, logits, k), portable, "{}", backend.name());
        }
        portable
    }

    multiversion! {
        fn passing(logits: &[f32; LANES], threshold: f32) -> u16 = passing_body;
    }

    #[inline(always)]
    fn passing_body<I: DenseIsa>(isa: I, logits: &[f32; LANES], threshold: f32) -> u16 {
        isa.passing(logits, threshold)
    }

    #[test]
    fn what_passes() {
        let special =
            [0.0, -0.0, 1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN, f32::MAX];
        for shift in 0..LANES {
            let logits: [f32; LANES] =
                std::array::from_fn(|i| special[(i * (shift + 1) + shift) % special.len()]);
            for threshold in special {
                let bits =
                    (0..LANES).filter(|&i| logits[i] >= threshold).map(|i| 1 << i).sum::<u16>();
                for backend in Backend::available() {
                    assert_eq!(
                        passing(backend, &logits, threshold),
                        bits,
                        "{}: {logits:?} {threshold}",
                        backend.name()
                    );
                }
            }
        }
    }

    multiversion! {
        fn add_exps(
            sums: &mut Lanes,
            logits: &[[f32; LANES]; AT_A_TIME],
            reference: Lanes,
        ) = add_exps_body;
    }

    #[inline(always)]
    fn add_exps_body<I: DenseIsa>(
        isa: I,
        sums: &mut Lanes,
        logits: &[[f32; LANES]; AT_A_TIME],
        reference: Lanes,
    ) {
        isa.add_exps(sums, logits, reference);
    }

    #[test]
    fn exponentials_have_the_same_bits() {
        let special =
            [f32::NEG_INFINITY, f32::MIN, -0.0, f32::NAN, 87.9, -87.0, -87.000_01, -86.999_99];
        for start in 0..3900 {
            // From far below what has a probability to as far above the reference as is used, in
            // steps of no power of 2; and each special value once.
            let value = |i: usize| {
                if start < special.len() && i == start {
                    special[start]
                } else {
                    -120.0 + (start + i) as f32 * 0.0519
                }
            };
            let logits: [[f32; LANES]; AT_A_TIME] =
                std::array::from_fn(|j| std::array::from_fn(|lane| value(j * LANES + lane)));
            let run = |backend| {
                let mut sums = Lanes::splat(0.5);
                add_exps(backend, &mut sums, &logits, Lanes::splat(1.25));
                // NaN has several spellings.
                sums.0.map(|sum| if sum.is_nan() { u32::MAX } else { sum.to_bits() })
            };
            let expected = run(Backend::Portable);
            for backend in Backend::available() {
                assert_eq!(run(backend), expected, "{}: {logits:?}", backend.name());
            }
        }
    }

    #[test]
    fn refusals() {
        let in_two_blocks = |first, second| [vec![first; BLOCK], vec![second]].concat();
        let nan = f32::NAN;
        let infinite = f32::INFINITY;
        let wrong = [
            vec![0.0, nan, 1.0],
            vec![0.0, infinite],
            in_two_blocks(nan, 1.0),
            in_two_blocks(1.0, infinite),
            in_two_blocks(-infinite, nan),
        ];
        for logits in wrong {
            let message = run(&logits, 1).unwrap_err().to_string();
            assert!(message.contains("NaN or infinite"), "{message}");
        }
        assert!(run(&[f32::NEG_INFINITY; 3], 1).is_err());
        assert!(run(&[f32::NEG_INFINITY, 0.0, 1.0], 3).is_err());
        assert_eq!(run(&[f32::NEG_INFINITY, 0.0, 1.0], 2).unwrap().0, [2, 1]);
        // Blocks without a finite logit.
        let late = [[f32::NEG_INFINITY; BLOCK], [1.0; BLOCK]].concat();
        assert_eq!(run(&late, 2).unwrap().0, [BLOCK as i64, BLOCK as i64 + 1]);
        assert!(run(&late, BLOCK + 1).is_err());
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            steps in proptest::collection::vec(-40i32..40, 1..1500),
            k in 1usize..200,
        ) {
            // Coarse steps make ties.
            let logits: Vec<f32> = steps.iter().map(|&s| s as f32 * 0.25).collect();
            let k = k.min(logits.len());
            let (ids, logprobs, log_sum) = run(&logits, k).unwrap();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let exact = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            prop_assert!((log_sum - exact).abs() < 1e-5);
            for rank in 0..k {
                prop_assert_eq!(ids[rank], order[rank] as i64);
                let logprob = f64::from(logits[order[rank]]) - exact;
                prop_assert!((f64::from(logprobs[rank]) - logprob).abs() < 1e-5);
            }
            // They are numbers of every type.
            let bfloat16: Vec<bf16> = logits.iter().map(|&l| bf16::from_f32(l)).collect();
            let float16: Vec<f16> = logits.iter().map(|&l| f16::from_f32(l)).collect();
            let expected = (ids, logprobs, log_sum);
            prop_assert_eq!(&run(&bfloat16, k).unwrap(), &expected);
            prop_assert_eq!(&run(&float16, k).unwrap(), &expected);
        }
    }
}
