//! What decoding allocates: a document from outside cannot make it take more than its rows do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use distillkit_codec::compact::{Compact, CompactConfig, checksum};

/// The system's allocator, which counts what the thread that asks has in use, and the most it had.
struct Counting;

thread_local! {
    static USED: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

fn count(taken: usize, given: usize) {
    let used = (USED.get() + taken).saturating_sub(given);
    USED.set(used);
    MOST.set(MOST.get().max(used));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes in use at once while `work` runs, beyond those before.
fn most<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = USED.get();
    MOST.set(before);
    let result = work();
    (MOST.get() - before, result)
}

/// Bytes that do not depend on the rows: buffers for k ids of sixteen lanes, an error's text.
const FIXED: usize = 64 << 10;

fn codec(k: usize) -> Compact {
    let json = format!(r#"{{"vocab_size": 3000, "k": {k}, "step": 0.02}}"#);
    let codec = Compact::new(CompactConfig::from_json(&json).expect("valid"), None).expect("valid");
    // The built-in prior is prepared when it is first needed.
    codec.check(&document(1, &[0; 8]), 1).expect("may have a row");
    codec
}

/// A document that says it has so many rows, and then has the given bytes.
fn document(rows: usize, rest: &[u8]) -> Vec<u8> {
    let mut data = vec![0, 0, 0, 0, 1];
    let mut left = rows;
    while left >= 0x80 {
        data.push(left as u8 | 0x80);
        left >>= 7;
    }
    data.push(left as u8);
    data.extend_from_slice(rest);
    let sum = checksum(&data[4..]);
    data[..4].copy_from_slice(&sum.to_le_bytes());
    data
}

#[test]
fn decoding_takes_four_bytes_an_id_beside_its_results() {
    for k in [8, 50, 128] {
        let codec = codec(k);
        for rows in [1, 500, 20_000] {
            let ids: Vec<i64> = (0..rows * k).map(|i| ((i % k) * 7 + i / k % 5) as i64).collect();
            let logprobs: Vec<f32> = (0..rows * k).map(|i| -3.0 - (i % k) as f32 * 0.2).collect();
            let data = codec.encode_document(&ids, &logprobs, k).expect("encodes");
            let (mut back, mut values) = (vec![0; rows * k], vec![0.0; rows * k]);
            let (most, result) = most(|| codec.decode_document(&data, &mut back, &mut values));
            result.expect("decodes");
            let bound = 4 * rows * k + data.len() + FIXED;
            assert!(most <= bound, "{rows} rows of {k}: {most} bytes, at most {bound}");
        }
    }
}

#[test]
fn rows_that_are_not_there_take_nothing() {
    let codec = codec(8);
    // The largest number, and as many rows as so many bytes may hold.
    for (rows, length) in [((1 << 35) - 1, 40), (1 << 30, 40), (64 * 1000, 1000)] {
        let data = document(rows, &vec![0; length]);
        let (most, result) = most(|| codec.check(&data, rows));
        assert!(most <= 1200, "{rows} rows of {length} bytes: {most} bytes");
        assert_eq!(result.is_ok(), rows <= 64 * length, "{rows} rows of {length} bytes");
    }
    // A reader makes room for the rows only after that; what it decodes takes no more than them.
    let rows = 64 * 1000;
    for byte in [0x00, 0x55, 0xff] {
        let mut rest = vec![byte; 1000];
        // Lengths of the streams but the last: 200 bytes of heads, and 20 of each other one.
        rest[..2].copy_from_slice(&[0xc8, 1]);
        rest[2..33].fill(20);
        let data = document(rows, &rest);
        let (mut back, mut values) = (vec![0; rows * 8], vec![0.0; rows * 8]);
        let (most, result) = most(|| codec.decode_document(&data, &mut back, &mut values));
        let bound = 4 * rows * 8 + data.len() + FIXED;
        assert!(most <= bound, "{byte}: {most} bytes, at most {bound}; {result:?}");
    }
}
