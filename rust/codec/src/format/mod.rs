//! One module for each published format: how it stores token ids, and what its configuration says
//! about the values.

mod legacy;
mod quantized;

use std::sync::Arc;

pub use legacy::Legacy;
pub use quantized::Quantized;

use crate::bits::Packing;
use crate::error::{CodecError, Result};
use crate::values::ValueDecoder;

/// A format with a fixed number of bytes a row: values first, then ids. Rows and buffers have the
/// right sizes when these methods are called.
pub(crate) trait RowFormat: Sync {
    fn k(&self) -> usize;
    fn vocab_size(&self) -> u64;
    fn value_bytes(&self) -> usize;
    fn id_bytes(&self) -> usize;
    fn values(&self) -> &Arc<ValueDecoder>;
    /// Writes a row's ids, which are below the vocabulary size.
    fn write_ids<I: Packing>(&self, isa: I, ids: &[i64], out: &mut [u8]);
    /// Reads a row's ids, and fails unless all of them are below the vocabulary size.
    fn read_ids<I: Packing>(&self, isa: I, data: &[u8], ids: &mut [i64]) -> Result<()>;

    /// Bytes of a row.
    #[inline(always)]
    fn bytes_per_row(&self) -> usize {
        self.value_bytes() + self.id_bytes()
    }
}

/// The error for stored ids of which one is outside the vocabulary.
#[cold]
fn outside_vocabulary(ids: &[i64], vocab_size: u64) -> CodecError {
    let found = ids.iter().enumerate().find(|&(_, &id)| id as u64 >= vocab_size);
    let (rank, id) = found.map_or((0, 0), |(rank, id)| (rank, *id as u64));
    CodecError::Corrupt(format!("id {id} at rank {rank} is outside the vocabulary of {vocab_size}"))
}
