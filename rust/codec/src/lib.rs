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
//! answer is close in KL divergence:
//!
//! 1. The terms are evaluated as the decoder evaluates them (in `term_dtype`), scaled and orthogonalised once per configuration, in
//!    float64 (`fit`). With differences (`delta_encoding`) the columns are summed up first, because the decoder sums: errors are then
//!    minimised where they matter, in the values and not in their steps.
//! 2. A row is fitted by weighted least squares. KL(p ‖ p̂) of log-probability errors ε is ½(Σ p ε² − (Σ p ε)²) + O(ε³), so weights p are
//!    the natural choice; p^¾ with a floor costs nothing in KL and keeps the far tail bounded (`formats`).
//! 3. Coefficients are rounded to `term_dtype`; where that is visible, one at a time with the others fitted again (`fit`).
//! 4. Residuals are taken against what the decoder really computes from the rounded coefficients, and quantised (`quantize`). With
//!    differences, or where `error_diffusion` asks for it, each error is carried into the next element.
//!
//! Exact values of a difference sequence are rounded against the running sum of what was stored, so they do not drift.

mod batch;
pub mod bits;
mod bounds;
pub mod config;
mod error;
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
