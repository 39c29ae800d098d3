//! The values of a row in both published formats: exact ones, coefficients, and residuals.
//!
//! The formats differ in their ids and in how a configuration describes its terms. What is here
//! takes the terms as they are evaluated; the bytes are described in FORMAT.md §2 and §3. Nothing
//! here knows the encoder.

mod decode;
mod layout;
mod residuals;

pub(crate) use decode::{DecoderScratch, Evaluated, ValueDecoder};
pub(crate) use layout::{Layout, Terms};
#[cfg(test)]
pub(crate) use residuals::decode_bin;
pub(crate) use residuals::dequantize;
