//! The compact format: rows of up to k ids in a variable number of bytes, a document at a time, by
//! what was learned of the teacher ([`Prior`]). FORMAT.md §4 describes the bytes.

pub mod config;
pub mod numbers;
mod prior;
mod scale;
mod tables;

pub use config::CompactConfig;
pub use prior::{Cluster, Contexts, Dimensions, MAX_CLASSES, Prior};
pub use scale::Scale;
pub use tables::{SLOTS, SLOTS_LOG, Table};
