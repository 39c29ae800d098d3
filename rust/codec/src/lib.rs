//! The codec of distillkit: top-k next-token distributions in a fixed number of bytes a token.
//!
//! A row is the k most probable token ids of one position and their log-probabilities under the full softmax. [`Codec`] turns rows into
//! bytes and back in one of the two published formats, chosen by its [`Config`]; FORMAT.md beside this crate's manifest is the normative
//! description of the bytes. [`topk`] makes rows from dense logits, and [`bits`] is the bit packer by itself.
//!
//! # How a row is encoded
//!
//! A *quantized* row stores the first `exact_k` values as they are, and the other n values as coefficients of a few functions of the rank,
//! with optional quantised residuals. The decoder is given; the encoder is free to choose the bytes, and chooses them so that the decoder's
//! answer is close in KL divergence, row by row, independently of the rows around it, of the thread count and of the machine:
//!
//! 1. The terms are evaluated as the decoder evaluates them (in `term_dtype`), scaled and orthogonalised once per configuration, in
//!    float64 (`fit`). With differences (`delta_encoding`) the columns are summed up first, because the decoder sums: errors are then
//!    minimised where they matter, in the values and not in their steps.
//! 2. *Start*: least squares with the probabilities as weights. KL(p ‖ p̂) of log-probability errors ε is ½(Σ p ε² − (Σ p ε)²) + O(ε³).
//! 3. *Newton's method* on what the coefficients change of KL, Σ (e^F − p·F): convex, with gradient Σ (e^F − p) q and Hessian Σ e^F q qᵀ.
//!    With a constant among the terms its minimum gives the approximated ranks their true total probability, and is also the minimum of the
//!    KL of renormalised distributions, the exact values being held. One step does for most rows, none needs more than four. The products
//!    q qᵀ of powers are powers again: sums over the ranks are built for a basis of their span (13 columns instead of 27 for six terms), and
//!    give the gradient as well.
//! 4. *Bounds* (`bounds`): values that do not increase, and errors of ids with p > 1e-6 not above the unweighted fit's largest in that row or
//!    a slack, whichever is more. They are linear in the coefficients, and KL near its minimum is a parabola: a quadratic programme, solved
//!    by the dual active-set method of Goldfarb and Idnani. The minimum itself has errors of up to 177 nats in the far tail. Where order and
//!    errors exclude each other, order comes first. With m terms and f = `exact_k` + the ranks with a residual (1 if there are none), the
//!    slack in nats is the least of 16 / 2^(m−1) (m ≤ 6), 6.4 / (m + 1) · ln(k / f) and 100 / f² · ln(k / f): the more coefficients, the
//!    fewer e-folds of ranks and the later their first, the less an unweighted fit of real rows gets wrong at worst. Slack below that leaves
//!    the worst likely error of a configuration about where the unweighted fit's is, at a fifth or less of the KL that bounds without slack
//!    would cost.
//! 5. Coefficients are rounded to `term_dtype`; where that is visible, one at a time with the others fitted again. What they decode to is
//!    then computed as the decoder computes it, and checked: finite, in order, total probability at most 1. A row that fails is moved into
//!    its bounds again with a larger margin, or lowered. Where the coefficients' type is too coarse for order, bounds on errors are kept by
//!    themselves.
//! 6. Residuals are taken against what the decoder really computes from the rounded coefficients (`quantize`), with the scale of least
//!    weighted squared error among those that make no likely error larger than the ranks without a residual may have, or than the scale that
//!    reaches every residual does; one-bit codes by sign. With differences, or where `error_diffusion` asks for it, each error is carried
//!    into the next element. Order is not kept with residuals: their steps are what they are. The ranks after the last residual are fitted
//!    by least squares with weights p^¾ and held to the bounds; with differences they are fitted to what the values fall below the last
//!    rank with a residual, since that is where the decoder's sum stands then.
//!
//! Exact values are rounded before step 1, each to one of its two neighbours. In bfloat16, beside approximated ones, they are rounded
//! together (`exact`): KL is blind to an error that all values share and the missing probability is not, so the values err in one direction
//! as far as that allows, or cancel, and the approximated ones follow. Where the last exact value keeps those from rising, both its neighbours
//! are tried; and values are lowered where the total probability would exceed 1. The exact values of a difference sequence are rounded
//! against the running sum of what was stored, moved by the mean error so far, so they do not drift.
//!
//! On 21,973 real positions (of a 135M model), least possible KL without roundings and bounds = 1: `recommended` 1.060, in order and with
//! bounds on errors, which cost it nothing. Exact values rounded to nearest would cost 3.6% and order then 2.8% at least
//! (`benches/order.py`, by an interior-point method in float64). `budget` 1.000 after rounding, 1.031 in order (at errors of up to 11.8 nats
//! of likely ids; the unweighted fit's reach 5.63), 1.047 with bounds on errors (5.63). Without slack bounds on errors would cost `budget`
//! 12.5% instead of 4.7, `recommended` 6.9% instead of 6.0.
//!
//! The figures are of rows renormalised over their k ids, as a loss without missing probability sees them. A loss that counts the missing
//! probability, too, also sees the KL of the two outcomes "stored" and "missing". How much that counts when values are rounded
//! together is a choice; on `recommended`:
//!
//! | it counts | KL of the renormalised row | mean error of the total probability | KL of the missing probability |
//! |---|---|---|---|
//! | rounded to nearest | 1.065 | 6.0e-4 | 2.5e-5 |
//! | 0.01 (chosen) | 1.060 | 1.5e-3 | 4.0e-5 |
//! | 0.1 | 1.067 | 4.5e-4 | 4.9e-6 |
//! | 1 | 1.072 | 9.1e-5 | 1.9e-6 |
//!
//! Tried, and of no use: weights p^½ and p^¾ as the start (the same minimum, more steps); a second parabola at the bounded point
//! (`recommended` 0.0%, `budget` 0.1%, four terms with few exact values 0.9%, at a third of the speed); a ridge strong enough to bound errors
//! by itself (3% and more); raising a last exact value that was rounded up already (0.05%); Newton's method stopped earlier still (2% faster,
//! the mass error of `budget` 4% larger); one slack for all configurations (those with few terms had likely errors of twice the unweighted fit's); the least
//! KL instead of least squares for the ranks after residuals (`faithful` 6% worse: the polynomial serves the others less).
//!
//! # Speed
//!
//! Sixteen rows are fitted at a time, a row in each lane of a vector (`lanes`), by code that is written once and compiled for every
//! instruction set ([`Backend`]), chosen at run time. No operation is fused, so the bytes are the same everywhere. Which limit a group's rows
//! exceed most, and what rounded coefficients decode to, is found across lanes as well; only rows with something left to do are taken one by
//! one. Dense logits are summed up and compared with the threshold of the best k in one pass (`topk`).

mod batch;
pub mod bits;
mod bounds;
pub mod config;
mod error;
mod exact;
mod fit;
mod float;
mod formats;
mod lanes;
mod quantize;
mod rows;
mod simd;
mod topk;
mod values;

pub use batch::{Codec, Format, topk};
pub use config::{Config, LegacyConfig, QuantizedConfig, ResidualBin, Term};
pub use error::{CodecError, Result};
pub use float::FloatType;
pub use formats::legacy::Legacy;
pub use formats::quantized::Quantized;
pub use half::slice::HalfBitsSliceExt;
pub use half::{bf16, f16};
pub use simd::{BACKEND_VARIABLE, Backend};
pub use topk::Logit;
