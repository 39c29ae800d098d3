//! One module a published format: how it stores token ids, and what its configuration says of the values.

pub(crate) mod legacy;
pub(crate) mod quantized;

use crate::bits::Packing;
use crate::error::{CodecError, Result};
use crate::values::Values;

/// A format with a fixed number of bytes a row: values first, then ids. Rows and buffers have the right sizes when these are called.
pub(crate) trait RowFormat: Sync {
    fn k(&self) -> usize;
    fn vocab_size(&self) -> u64;
    fn value_bytes(&self) -> usize;
    fn id_bytes(&self) -> usize;
    fn values(&self) -> &Values;
    /// Writes a row's ids, which are below the vocabulary size.
    fn write_ids<I: Packing>(&self, isa: I, ids: &[i64], out: &mut [u8]);
    /// Reads a row's ids; they are below the vocabulary size, or it fails.
    fn read_ids<I: Packing>(&self, isa: I, data: &[u8], ids: &mut [i64]) -> Result<()>;
}

/// The error for ids that were read, of which one is outside the vocabulary.
#[cold]
pub(crate) fn outside_vocabulary(ids: &[i64], vocab_size: u64) -> CodecError {
    let (rank, id) = ids.iter().enumerate().find(|&(_, &id)| id as u64 >= vocab_size).map_or((0, 0), |(rank, id)| (rank, *id as u64));
    CodecError::Corrupt(format!("id {id} at rank {rank} is outside the vocabulary of {vocab_size}"))
}
