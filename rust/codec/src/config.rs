//! Codec configurations: their fields, what makes them valid, and the sizes that follow.
//!
//! Every field is part of the meaning of the bytes except `error_diffusion`, which only steers the
//! encoder.

use serde::{Deserialize, Serialize};

use crate::bits::packed_len;
use crate::error::{CodecError, Result, config_error};
use crate::float::{FloatType, power};

/// Largest k: bounds what a configuration from outside can make the codec allocate.
pub const MAX_K: usize = 1 << 16;
/// Most polynomial terms.
pub const MAX_TERMS: usize = 32;
/// Largest vocabulary: ids are signed 64-bit integers in every interface.
pub const MAX_VOCAB: u64 = 1 << 63;

/// One function of the rank that the polynomial is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged, expecting = "a term is an integer power, \"sqrt\" or \"exp\"")]
pub enum Term {
    /// tⁱ.
    Power(i32),
    /// √t or eᵗ.
    Named(NamedTerm),
}

/// The terms that are not powers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamedTerm {
    /// √t.
    Sqrt,
    /// eᵗ.
    Exp,
}

impl Term {
    /// The term at `t`, in float64.
    #[must_use]
    pub fn at(self, t: f64) -> f64 {
        match self {
            Self::Power(i) => power(t, i),
            Self::Named(NamedTerm::Sqrt) => t.sqrt(),
            Self::Named(NamedTerm::Exp) => libm::exp(t),
        }
    }
}

/// Quantised residuals of the next `num_elements` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidualBin {
    /// Stored type of the scale.
    pub scale_dtype: FloatType,
    /// Bits of one code, 1–64.
    pub element_bits: u32,
    /// How many ranks have a residual in this bin, at least 1.
    pub num_elements: usize,
}

impl ResidualBin {
    /// Bytes of the scale and the codes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.scale_dtype.size() + packed_len(self.num_elements, self.element_bits)
    }
}

const fn default_true() -> bool {
    true
}

const fn default_float32() -> FloatType {
    FloatType::Float32
}

/// Configuration of the published "distribution quantization" (`logprob_compressor`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "fields of the published configuration")]
pub struct QuantizedConfig {
    /// Vocabulary size: ids are 0 … d − 1.
    pub d: u64,
    /// Stored ids a row.
    pub k: usize,
    /// How many of the most probable are stored as values.
    pub exact_k: usize,
    /// Type of those values.
    #[serde(default = "default_float32")]
    pub exact_dtype: FloatType,
    /// Terms of the polynomial over the other ranks; none: the bins hold the values themselves.
    #[serde(default)]
    pub polynomial_terms: Option<Vec<Term>>,
    /// Type of the coefficients, and of the terms when they are evaluated.
    #[serde(default = "default_float32")]
    pub term_dtype: FloatType,
    /// Quantised residuals, in rank order.
    pub residual_bins: Vec<ResidualBin>,
    /// Store the first value and then differences.
    #[serde(default = "default_true")]
    pub delta_encoding: bool,
    /// Carry each quantisation error into the next element (encoder only).
    #[serde(default)]
    pub error_diffusion: bool,
    /// Evaluate the terms at n points evenly on \[0, 1\] instead of 0 … n − 1.
    #[serde(default)]
    pub normalize_t: bool,
    /// Decode as version 2 of the format: with the roundings of the published decoder. It is no
    /// field of a published configuration, so never part of its JSON.
    #[serde(skip)]
    pub published_rounding: bool,
}

impl QuantizedConfig {
    /// Ranks that are not exact: n = k − `exact_k`.
    #[must_use]
    pub const fn approximated(&self) -> usize {
        self.k - self.exact_k
    }

    /// Approximated ranks with a residual of their own; they come first.
    #[must_use]
    pub fn residual_count(&self) -> usize {
        self.residual_bins.iter().map(|bin| bin.num_elements).fold(0, usize::saturating_add)
    }

    /// The terms; empty where the configuration has none.
    #[must_use]
    pub fn terms(&self) -> &[Term] {
        self.polynomial_terms.as_deref().unwrap_or(&[])
    }

    /// Bytes of `compressed_logprobs`.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        self.exact_k * self.exact_dtype.size()
            + self.terms().len() * self.term_dtype.size()
            + self.residual_bins.iter().map(ResidualBin::bytes).sum::<usize>()
    }

    /// Bits of one id: ⌈log₂ d⌉.
    #[must_use]
    pub const fn id_bits(&self) -> u32 {
        bits_for(self.d)
    }

    /// Bytes of `bytepacked_indices`.
    #[must_use]
    pub const fn id_bytes(&self) -> usize {
        packed_len(self.k, self.id_bits())
    }

    /// The point at which rank `exact_k + j` evaluates the terms.
    #[must_use]
    pub fn t(&self, j: usize) -> f64 {
        match (self.normalize_t, self.approximated()) {
            (false, _) => j as f64,
            // n points evenly on [0, 1]; a single point is 0.
            (true, 0 | 1) => 0.0,
            (true, n) => j as f64 / (n - 1) as f64,
        }
    }

    /// Refuses what cannot be encoded, and names the field.
    pub fn validate(&self) -> Result<()> {
        check_sizes("d", self.d, self.k, self.exact_k)?;
        self.validate_terms()?;
        for (i, bin) in self.residual_bins.iter().enumerate() {
            if !(1..=64).contains(&bin.element_bits) {
                let message = format!("is {}, must be between 1 and 64", bin.element_bits);
                return config_error(format!("residual_bins.{i}.element_bits"), message);
            }
            if bin.num_elements == 0 {
                return config_error(
                    format!("residual_bins.{i}.num_elements"),
                    "is 0, must be at least 1",
                );
            }
        }
        let residual_count = self.residual_count();
        if residual_count > self.approximated() {
            let message = format!(
                "cover {residual_count} ranks, but only k − exact_k = {} ranks are not exact",
                self.approximated()
            );
            return config_error("residual_bins", message);
        }
        if self.approximated() > 0 && self.terms().is_empty() && residual_count == 0 {
            let message = format!(
                "exact_k = {} < k = {}, and neither polynomial_terms nor residual_bins describe \
                 the other ranks",
                self.exact_k, self.k
            );
            return config_error("polynomial_terms", message);
        }
        Ok(())
    }

    fn validate_terms(&self) -> Result<()> {
        let terms = self.terms();
        if terms.len() > MAX_TERMS {
            return config_error(
                "polynomial_terms",
                format!("has {} terms, at most {MAX_TERMS} are allowed", terms.len()),
            );
        }
        for (i, term) in terms.iter().enumerate() {
            for j in 0..self.approximated() {
                let value = self.term_dtype.round(term.at(self.t(j)));
                if !value.is_finite() {
                    let message = format!(
                        "is not finite at t = {} in {:?} (term_dtype); use a smaller term, a wider \
                         term_dtype or normalize_t",
                        self.t(j),
                        self.term_dtype
                    );
                    return config_error(format!("polynomial_terms.{i}"), message);
                }
            }
        }
        Ok(())
    }

    /// What is valid but probably not intended.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let low = matches!(self.term_dtype, FloatType::Float16 | FloatType::Bfloat16);
        let last = self.t(self.approximated().saturating_sub(1));
        let largest = self.terms().iter().map(|term| term.at(last).abs()).fold(0.0, f64::max);
        if low && largest > 256.0 {
            warnings.push(format!(
                "term_dtype {:?} has too few bits for terms that reach {largest:.3e}: the fit will \
                 be coarse; use float32 or normalize_t",
                self.term_dtype
            ));
        }
        if self.terms().is_empty() && self.residual_count() < self.approximated() {
            let first = self.exact_k + self.residual_count();
            let what = if self.delta_encoding {
                "all repeat the value before them"
            } else {
                "decode to log-probability 0, probability 1"
            };
            warnings.push(format!("without polynomial_terms, the ranks from {first} on {what}"));
        }
        warnings
    }
}

/// Configuration of the published legacy format (`legacy_logit_compression`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LegacyConfig {
    /// Vocabulary size: ids are 0 … `vocab_size` − 1.
    pub vocab_size: u64,
    /// Stored ids a row.
    pub k: usize,
    /// How many of the most probable are stored as float16 values.
    pub exact_k: usize,
    /// Highest power of the polynomial over the other ranks.
    pub polynomial_degree: u32,
    /// Powers of 1/a instead of a.
    #[serde(default = "default_true")]
    pub invert_polynomial: bool,
    /// One more term, √a.
    #[serde(default)]
    pub with_sqrt_term: bool,
    /// Type that terms and coefficients are rounded to.
    #[serde(default = "default_float32")]
    pub term_dtype: FloatType,
}

impl LegacyConfig {
    /// Ranks that are not exact: n = k − `exact_k`.
    #[must_use]
    pub const fn approximated(&self) -> usize {
        self.k - self.exact_k
    }

    /// The terms over a = 1, 2, …; none when every rank is exact.
    #[must_use]
    pub fn terms(&self) -> Vec<Term> {
        if self.approximated() == 0 {
            return Vec::new();
        }
        let sign = if self.invert_polynomial { -1 } else { 1 };
        let powers = (0..=self.polynomial_degree as i32).map(|i| Term::Power(sign * i));
        powers.chain(self.with_sqrt_term.then_some(Term::Named(NamedTerm::Sqrt))).collect()
    }

    /// Bits of one id: ⌈log₂ `vocab_size`⌉.
    #[must_use]
    pub const fn id_bits(&self) -> u32 {
        bits_for(self.vocab_size)
    }

    /// Ids in one 64-bit word.
    #[must_use]
    pub const fn ids_per_word(&self) -> usize {
        64 / self.id_bits() as usize
    }

    /// Words a row.
    #[must_use]
    pub const fn words(&self) -> usize {
        self.k.div_ceil(self.ids_per_word())
    }

    /// Type that coefficients are stored in: the published column is float32, so a float64
    /// coefficient is rounded to it.
    #[must_use]
    pub const fn coefficient_type(&self) -> FloatType {
        match self.term_dtype {
            FloatType::Float64 => FloatType::Float32,
            other => other,
        }
    }

    /// Bytes of the exact values and coefficients.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        self.exact_k * FloatType::Float16.size()
            + self.terms().len() * self.coefficient_type().size()
    }

    /// Bytes of the words.
    #[must_use]
    pub const fn id_bytes(&self) -> usize {
        self.words() * 8
    }

    /// Refuses what cannot be encoded, and names the field.
    pub fn validate(&self) -> Result<()> {
        check_sizes("vocab_size", self.vocab_size, self.k, self.exact_k)?;
        if self.polynomial_degree as usize >= MAX_TERMS {
            let message = format!("is {}, must be below {MAX_TERMS}", self.polynomial_degree);
            return config_error("polynomial_degree", message);
        }
        for (i, term) in self.terms().iter().enumerate() {
            let last = self.approximated() as f64;
            if !self.term_dtype.round(term.at(last)).is_finite() {
                let message = format!(
                    "term {i} is not finite at a = {last} in {:?} (term_dtype)",
                    self.term_dtype
                );
                return config_error("polynomial_degree", message);
            }
        }
        Ok(())
    }
}

/// Bits that the ids 0 … d − 1 need: ⌈log₂ d⌉.
const fn bits_for(d: u64) -> u32 {
    if d < 2 { 0 } else { 64 - (d - 1).leading_zeros() }
}

fn check_sizes(vocab_field: &str, d: u64, k: usize, exact_k: usize) -> Result<()> {
    if !(2..=MAX_VOCAB).contains(&d) {
        return config_error(vocab_field, format!("is {d}, must be between 2 and {MAX_VOCAB}"));
    }
    if k == 0 || k > MAX_K || k as u64 > d {
        return config_error(
            "k",
            format!(
                "is {k}, must be between 1 and {} (the vocabulary, at most {MAX_K})",
                d.min(MAX_K as u64)
            ),
        );
    }
    if exact_k > k {
        return config_error("exact_k", format!("is {exact_k}, must be between 0 and k = {k}"));
    }
    Ok(())
}

/// A valid configuration of either published format.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Config {
    /// `logprob_compressor`.
    Quantized(QuantizedConfig),
    /// `legacy_logit_compression`.
    Legacy(LegacyConfig),
}

impl Config {
    /// Parses and validates the JSON of a configuration of the named format, `quantized` or
    /// `legacy`.
    pub fn from_json(format: &str, json: &str) -> Result<Self> {
        match format {
            "quantized" => {
                let config: QuantizedConfig = parse(json)?;
                config.validate()?;
                Ok(Self::Quantized(config))
            }
            "legacy" => {
                let config: LegacyConfig = parse(json)?;
                config.validate()?;
                Ok(Self::Legacy(config))
            }
            other => {
                config_error("format", format!("is '{other}', must be 'quantized' or 'legacy'"))
            }
        }
    }
}

fn parse<T: for<'de> Deserialize<'de>>(json: &str) -> Result<T> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(json)).map_err(
        |error| CodecError::Config {
            field: error.path().to_string(),
            message: error.inner().to_string(),
        },
    )
}
