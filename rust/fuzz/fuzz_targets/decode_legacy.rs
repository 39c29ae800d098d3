//! Any bytes as rows of any legacy configuration: refused, or ids and values that are ones.
#![no_main]

use arbitrary::{Result, Unstructured};
use distillkit_fuzz::{Fields, decode, rows};
use libfuzzer_sys::{Corpus, fuzz_target};

fn run(input: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(input);
    let fields = Fields::legacy(&mut u)?;
    if let Some(codec) = fields.codec() {
        let _ = decode(&codec, &rows(&codec, u.take_rest()));
    }
    Ok(())
}

fuzz_target!(|input: &[u8]| -> Corpus {
    match run(input) {
        Ok(()) => Corpus::Keep,
        // Too few bytes for the fields.
        Err(_) => Corpus::Reject,
    }
});
