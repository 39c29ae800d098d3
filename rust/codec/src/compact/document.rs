//! The frame of a document: how many rows, which streams, and where they are.

use crate::error::{CodecError, Result};

/// The most lanes that rows are dealt to in turn.
pub(super) const LANES: usize = 16;
/// At most this many rows a byte: bounds what a document from outside can promise.
pub(super) const ROWS_PER_BYTE: usize = 64;

/// Bytes of a document's checksum.
const CHECKSUM: usize = 4;

/// The checksum of a document, which stands before its other bytes: the low half of their XXH3-64.
#[must_use]
pub fn checksum(rest: &[u8]) -> u32 {
    xxhash_rust::xxh3::xxh3_64(rest) as u32
}

/// What a document holds, which its first byte after the checksum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Rows with log-probabilities: a stream of heads, then the gaps of each lane, then the levels
    /// of each.
    Compact,
    /// Rows of draws, in one stream.
    Sampled,
}

impl Content {
    /// The first byte of documents with the configuration's prior; one more with the built-in one.
    const fn flag(self) -> u8 {
        match self {
            Self::Compact => 0,
            Self::Sampled => 2,
        }
    }

    /// Streams after the first one.
    const fn streams(self, rows: usize) -> usize {
        match self {
            Self::Compact => 2 * lanes(rows),
            Self::Sampled => 0,
        }
    }
}

/// A document's streams.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    /// Written with the built-in prior.
    pub(super) builtin: bool,
    pub(super) rows: usize,
    pub(super) head: &'a [u8],
    /// Those after it.
    pub(super) streams: Vec<&'a [u8]>,
    /// Bytes of the frame itself.
    pub(super) bytes: usize,
}

pub(super) fn corrupt<T>(message: impl Into<String>) -> Result<T> {
    Err(CodecError::Corrupt(message.into()))
}

fn truncated<T>(what: &str, found: usize, expected: usize) -> Result<T> {
    Err(CodecError::Truncated { what: format!("document: {what}"), found, expected })
}

/// Lanes of a document of so many rows: each has two streams, and costs some five bytes.
pub(super) const fn lanes(rows: usize) -> usize {
    match rows {
        0..32 => 1,
        32..128 => 4,
        _ => LANES,
    }
}

impl<'a> Frame<'a> {
    /// Reads the frame of a document of `rows` rows.
    pub(super) fn read(data: &'a [u8], rows: usize, content: Content) -> Result<Self> {
        let Some((stored, mut rest)) = data.split_first_chunk() else {
            return truncated("its checksum", data.len(), CHECKSUM);
        };
        let (stored, found) = (u32::from_le_bytes(*stored), checksum(rest));
        if stored != found {
            return corrupt(format!("document: has checksum {found:08x}, expected {stored:08x}"));
        }
        let (flag, first) = (take_byte(&mut rest, data)?, content.flag());
        if flag != first && flag != first + 1 {
            let last = first + 1;
            return corrupt(format!("document: begins with {flag}, expected {first} or {last}"));
        }
        let builtin = flag != first;
        let stored = take_varint(&mut rest, data)?;
        if stored != rows {
            return corrupt(format!("document: has {stored} rows, expected {rows}"));
        }
        if u32::try_from(rows).is_err() {
            return corrupt(format!("document: has {rows} rows, expected fewer than 2³²"));
        }
        if rows.div_ceil(ROWS_PER_BYTE) > data.len() {
            return truncated("its rows", data.len(), rows.div_ceil(ROWS_PER_BYTE));
        }
        if rows == 0 {
            if !rest.is_empty() {
                return truncated("no rows", data.len(), data.len() - rest.len());
            }
            return Ok(Self { builtin, rows, head: rest, streams: Vec::new(), bytes: data.len() });
        }
        let lengths = (0..content.streams(rows))
            .map(|_| take_varint(&mut rest, data))
            .collect::<Result<Vec<_>>>()?;
        let bytes = data.len() - rest.len();
        let total = lengths.iter().fold(bytes, |sum, &length| sum.saturating_add(length));
        if total > data.len() {
            return truncated("its streams", data.len(), total);
        }
        let mut streams = Vec::with_capacity(lengths.len() + 1);
        for length in lengths {
            let (stream, after) = rest.split_at(length);
            streams.push(stream);
            rest = after;
        }
        streams.push(rest);
        Ok(Self { builtin, rows, head: streams[0], streams: streams.split_off(1), bytes })
    }
}

/// Puts a document together; the first stream is that of the heads.
pub(super) fn write(content: Content, builtin: bool, rows: usize, streams: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(streams.iter().map(Vec::len).sum::<usize>() + 32);
    out.extend_from_slice(&[0; CHECKSUM]);
    out.push(content.flag() + u8::from(builtin));
    put_varint(&mut out, rows);
    for stream in &streams[..streams.len().saturating_sub(1)] {
        put_varint(&mut out, stream.len());
    }
    for stream in streams {
        out.extend_from_slice(stream);
    }
    let least = rows.div_ceil(ROWS_PER_BYTE);
    if out.len() < least {
        out.resize(least, 0);
    }
    let sum = checksum(&out[CHECKSUM..]);
    out[..CHECKSUM].copy_from_slice(&sum.to_le_bytes());
    out
}

fn put_varint(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_byte(rest: &mut &[u8], data: &[u8]) -> Result<u8> {
    let Some((&byte, after)) = rest.split_first() else {
        return truncated("its frame", data.len(), data.len() + 1);
    };
    *rest = after;
    Ok(byte)
}

/// A number in groups of seven bits, the lowest first, in the fewest bytes, below 2³⁵.
fn take_varint(rest: &mut &[u8], data: &[u8]) -> Result<usize> {
    let mut number = 0u64;
    for shift in (0..35).step_by(7) {
        let byte = take_byte(rest, data)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            if byte == 0 && shift > 0 {
                return corrupt("document: a number of its frame is longer than it needs to be");
            }
            return usize::try_from(number).or_else(|_| corrupt("document: too large"));
        }
    }
    corrupt("document: a number of its frame has more than 35 bits")
}
