//! The configuration of the compact format, and the limits of everything that comes from outside.

use serde::{Deserialize, Serialize};

use crate::error::{CodecError, Result, config_error};

/// Largest k.
pub const MAX_K: usize = 4096;
/// Largest vocabulary.
pub const MAX_VOCAB: u32 = 1 << 24;
/// Most clusters of a prior.
pub const MAX_CLUSTERS: usize = 1024;
/// Longest list of a cluster.
pub const MAX_LIST: usize = 8192;
/// Most ids in all lists of a prior.
pub const MAX_LISTED: usize = 1 << 20;
/// Most products of clusters and distinct ids in their lists: the bytes of an encoder's costs.
pub const MAX_COSTS: usize = 1 << 27;
/// Most shapes of a prior.
pub const MAX_SHAPES: usize = 64;
/// Most levels of the scale.
pub const MAX_LEVELS: usize = 4096;
/// Most code tables of a prior: 4 MiB prepared for decoding.
pub const MAX_TABLES: usize = 1024;
/// Least and largest step.
pub const STEPS: [f64; 2] = [0.0005, 0.25];

/// Configuration of the compact format, version 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompactConfig {
    /// Vocabulary size: ids are 0 … `vocab_size` − 1.
    pub vocab_size: u32,
    /// Most ids a row.
    pub k: usize,
    /// Only ids with at least this probability are stored, and always the most probable one.
    #[serde(default)]
    pub threshold: Option<f64>,
    /// Ids are stored only until their total probability reaches this.
    #[serde(default)]
    pub mass: Option<f64>,
    /// Resolution of the square root of a probability.
    pub step: f64,
    /// XXH3-128 of the prior's bytes, as 32 hexadecimal digits; none: the built-in prior.
    #[serde(default)]
    pub prior: Option<String>,
}

impl CompactConfig {
    /// Reads JSON and checks it.
    ///
    /// Fails with [`CodecError::Config`], which names the field.
    pub fn from_json(json: &str) -> Result<Self> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let config: Self =
            serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
                let field = match error.path().to_string() {
                    path if path == "." => "compact".to_owned(),
                    path => path,
                };
                CodecError::Config { field, message: error.inner().to_string() }
            })?;
        deserializer.end().map_err(|error| CodecError::Config {
            field: "compact".to_owned(),
            message: error.to_string(),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the fields.
    pub fn validate(&self) -> Result<()> {
        if !(2..=MAX_VOCAB).contains(&self.vocab_size) {
            return config_error(
                "vocab_size",
                format!("found {}, expected 2 … {MAX_VOCAB}", self.vocab_size),
            );
        }
        let most = MAX_K.min(self.vocab_size as usize);
        if !(1..=most).contains(&self.k) {
            return config_error("k", format!("found {}, expected 1 … {most}", self.k));
        }
        for (name, value) in [("threshold", self.threshold), ("mass", self.mass)] {
            if let Some(value) = value
                && !(value > 0.0 && value < 1.0)
            {
                return config_error(
                    name,
                    format!("found {value}, expected a probability between 0 and 1, or null"),
                );
            }
        }
        if !(STEPS[0]..=STEPS[1]).contains(&self.step) {
            return config_error(
                "step",
                format!("found {}, expected {} … {}", self.step, STEPS[0], STEPS[1]),
            );
        }
        check_hash(self.prior.as_deref())
    }

    /// Whether rows may differ in how many ids they store.
    #[must_use]
    pub const fn is_adaptive(&self) -> bool {
        self.threshold.is_some() || self.mass.is_some()
    }

    /// The configuration that a prior is learned for: without the hash.
    #[must_use]
    pub fn without_prior(&self) -> Self {
        Self { prior: None, ..self.clone() }
    }

    /// What is valid but probably not wanted.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.threshold.is_some_and(|threshold| threshold * self.k as f64 > 1.0) {
            let most = (1.0 / self.threshold.unwrap_or(1.0)).floor();
            warnings.push(format!(
                "k: {} ids never have probabilities of `threshold` or more at once: at most {most} do",
                self.k
            ));
        }
        warnings
    }
}

/// Checks the hash of a prior.
pub(super) fn check_hash(hash: Option<&str>) -> Result<()> {
    let is_digit = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
    match hash {
        Some(hash) if !(hash.len() == 32 && hash.bytes().all(is_digit)) => config_error(
            "prior",
            format!("found {hash:?}, expected 32 hexadecimal digits in lower case, or null"),
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str, field: &str) {
        match CompactConfig::from_json(json) {
            Err(CodecError::Config { field: found, .. }) => assert_eq!(found, field, "{json}"),
            other => unreachable!("{json}: {other:?}"),
        }
    }

    #[test]
    fn what_is_not_valid_is_refused_by_field() {
        let whole = r#"{"vocab_size": 300, "k": 20, "step": 0.003}"#;
        assert_eq!(CompactConfig::from_json(whole).expect("valid").k, 20);
        for (field, value) in [
            ("vocab_size", "1"),
            ("k", "0"),
            ("k", "301"),
            ("threshold", "0"),
            ("mass", "1.0"),
            ("step", "0.0001"),
            ("step", "\"a\""),
            ("prior", "\"abc\""),
        ] {
            let mut fields = serde_json::from_str::<serde_json::Value>(whole).expect("JSON");
            fields[field] = serde_json::from_str(value).expect("JSON");
            refused(&fields.to_string(), field);
        }
        refused(r#"{"vocab_size": 300, "k": 20, "step": 0.003, "more": 1}"#, "more");
        refused(r#"{"vocab_size": 300, "k": 20, "step": 0.003} 1"#, "compact");
        refused(r#"{"vocab_size": 300, "k": 20}"#, "compact");
    }
}
