//! The configuration of the sampled format.

use serde::{Deserialize, Serialize};

use crate::compact::config::{MAX_VOCAB, check_hash};
use crate::error::{CodecError, Result, config_error};

/// Most draws a row.
pub const MAX_DRAWS: u32 = 4096;
/// Seeds are below this, so that every reader of JSON has them exactly.
const SEEDS: u64 = 1 << 53;

/// Configuration of the sampled format, version 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampledConfig {
    /// Vocabulary size: ids are 0 … `vocab_size` − 1.
    pub vocab_size: u32,
    /// Draws a row.
    pub draws: u32,
    /// Temperature of the distribution that was drawn from.
    #[serde(default = "one")]
    pub temperature: f64,
    /// Which draws.
    #[serde(default)]
    pub seed: u64,
    /// XXH3-128 of the prior's bytes, as 32 hexadecimal digits; none: the built-in prior.
    #[serde(default)]
    pub prior: Option<String>,
}

const fn one() -> f64 {
    1.0
}

impl SampledConfig {
    /// Reads JSON and checks it.
    ///
    /// Fails with [`CodecError::Config`], which names the field.
    pub fn from_json(json: &str) -> Result<Self> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let refused = |field: String, message: String| CodecError::Config { field, message };
        let config: Self =
            serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
                let field = match error.path().to_string() {
                    path if path == "." => "sampled".to_owned(),
                    path => path,
                };
                refused(field, error.inner().to_string())
            })?;
        deserializer.end().map_err(|error| refused("sampled".to_owned(), error.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the fields.
    pub fn validate(&self) -> Result<()> {
        let Self { vocab_size, draws, temperature, seed, prior } = self;
        if !(2..=MAX_VOCAB).contains(vocab_size) {
            let message = format!("found {vocab_size}, expected 2 … {MAX_VOCAB}");
            return config_error("vocab_size", message);
        }
        if !(1..=MAX_DRAWS).contains(draws) {
            return config_error("draws", format!("found {draws}, expected 1 … {MAX_DRAWS}"));
        }
        if !(0.01..=100.0).contains(temperature) {
            return config_error(
                "temperature",
                format!("found {temperature}, expected 0.01 … 100"),
            );
        }
        if *seed >= SEEDS {
            return config_error("seed", format!("found {seed}, expected less than {SEEDS}"));
        }
        check_hash(prior.as_deref())
    }

    /// Most ids a row.
    #[must_use]
    pub fn k(&self) -> usize {
        self.draws.min(self.vocab_size) as usize
    }

    /// What is valid but probably not wanted.
    #[must_use]
    pub const fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// The configuration that a prior is learned for: without what the bytes do not depend on.
    #[must_use]
    pub const fn for_prior(&self) -> Self {
        let &Self { vocab_size, draws, .. } = self;
        Self { vocab_size, draws, temperature: 1.0, seed: 0, prior: None }
    }
}
