//! Any bytes as rows of any legacy configuration: refused, or ids and values that are ones.
#![no_main]

use distillkit_fuzz::{Fields, corpus, decode_any};
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|input: &[u8]| -> Corpus { corpus(decode_any(input, Fields::legacy)) });
