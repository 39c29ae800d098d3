//! Any text as a configuration: refused as one, or it is what it says, and makes a codec.
#![no_main]

use distillkit_codec::{Codec, CodecError, Config};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for format in ["quantized", "legacy"] {
        let config = match Config::from_json(format, text) {
            Ok(config) => config,
            Err(CodecError::Config { .. }) => continue,
            Err(other) => panic!("text is refused with {other:?}"),
        };
        let (written, size) = match &config {
            Config::Quantized(fields) => {
                (serde_json::to_string(fields), fields.k * fields.terms().len())
            }
            Config::Legacy(fields) => {
                (serde_json::to_string(fields), fields.k * fields.terms().len())
            }
        };
        let again = Config::from_json(format, &written.expect("a configuration is JSON"));
        assert_eq!(again.as_ref(), Ok(&config), "every field survives");
        // Preparing a fit takes time with the size of its terms; the largest are left to the
        // others.
        if size <= 4096 {
            let codec = Codec::new(config).expect("a valid configuration makes a codec");
            let mut ids = vec![0; codec.k()];
            let mut logprobs = vec![0.0; codec.k()];
            let decoded = codec.decode(&vec![0; codec.bytes_per_row()], &mut ids, &mut logprobs);
            decoded.expect("a row of zero bytes decodes");
        }
    }
});
