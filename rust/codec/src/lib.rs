//! Top-k next-token distributions in a fixed number of bytes per token ([`Codec`], [`topk`]).
//! FORMAT.md describes the bytes, docs/encoder.md how the encoder chooses them.

pub mod bits; // packs integers of 1–64 bits
mod codec; // encodes and decodes many rows of one configuration
pub mod compact; // the compact format: documents of variable length
pub mod config; // configurations, what makes them valid, sizes
pub mod draws; // draws from dense logits
mod encoder; // chooses the bytes of a row's values
mod error; // the one error type
pub mod fidelity; // how close decoded rows are
mod float; // stored float types
mod format; // the two published formats: ids, and what their configurations say of values
pub mod retokenize; // rows over one vocabulary as rows over another
mod rows; // a run of rows on one thread: checks, sorting, groups
mod simd; // instruction sets, chosen at run time; sixteen rows at a time
mod tasks; // runs of rows on all cores
mod topk; // dense logits to their most probable ids
mod values; // decodes the values of a row

pub use codec::{Codec, Format};
pub use config::{Config, LegacyConfig, QuantizedConfig, ResidualBin, Term};
pub use error::{CodecError, Result};
pub use float::FloatType;
pub use format::{Legacy, Quantized};
pub use half::{bf16, f16, slice::HalfBitsSliceExt};
pub use simd::{BACKEND_VARIABLE, Backend};
pub use tasks::ask_whether_to_go_on;
pub use topk::{Logit, topk};
