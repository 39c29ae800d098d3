//! `distillkit._native`: borrow arrays, release the GIL, call the codec, wrap what comes out.
//! Nothing else.

#![expect(clippy::needless_pass_by_value, reason = "extracted arguments are owned")]

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;

use distillkit_codec::compact::{Compact, CompactConfig, Part, Sampled, SampledConfig, Sizes};
use distillkit_codec::retokenize;
use distillkit_codec::{self as core, CodecError, Config, HalfBitsSliceExt, bf16, f16};
use numpy::ndarray::Dimension;
use numpy::{
    IntoPyArray, Ix1, Ix2, PyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray,
    PyReadwriteArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

mod errors {
    pyo3::import_exception!(distillkit.errors, ConfigError);
    pyo3::import_exception!(distillkit.errors, CorruptDataError);
    pyo3::import_exception!(distillkit.errors, DistillKitError);
    pyo3::import_exception!(distillkit.errors, InputError);
    pyo3::import_exception!(distillkit.errors, TruncatedDataError);
}

/// The one place where core errors become Python exceptions.
fn raise(error: CodecError) -> PyErr {
    let message = error.to_string();
    match error {
        CodecError::Config { .. } => errors::ConfigError::new_err(message),
        CodecError::Input(_) => errors::InputError::new_err(message),
        CodecError::Corrupt(_) => errors::CorruptDataError::new_err(message),
        CodecError::Truncated { .. } => errors::TruncatedDataError::new_err(message),
        // What the signal's handler raised.
        CodecError::Interrupted => {
            Python::attach(PyErr::take).unwrap_or_else(|| PyKeyboardInterrupt::new_err(message))
        }
        _ => errors::DistillKitError::new_err(message),
    }
}

/// The thread that imported the module: Python runs the handlers of signals only in the main one,
/// and another must not wait for the GIL only to learn that it has nothing to do.
static IMPORTED_BY: OnceLock<ThreadId> = OnceLock::new();

/// Runs the handlers of signals that arrived meanwhile; false if one of them raised, as Ctrl-C does.
fn goes_on() -> bool {
    if IMPORTED_BY.get() != Some(&std::thread::current().id()) {
        return true;
    }
    Python::attach(|py| py.check_signals().map_err(|error| error.restore(py)).is_ok())
}

/// Runs `work` without the GIL.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> core::Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(raise)
}

/// The memory of arguments of calls that are running: its ends, and whether the call writes there.
static IN_USE: Mutex<Vec<(usize, usize, bool)>> = Mutex::new(Vec::new());

/// Holds the memory of one argument for the time of a call. numpy's own borrows do not see memory
/// that comes from elsewhere, such as a tensor's.
struct InUse(usize, usize, bool);

impl InUse {
    fn claim<T: numpy::Element, D: Dimension>(
        name: &str,
        array: &Bound<'_, PyArray<T, D>>,
        writes: bool,
    ) -> PyResult<Self> {
        let start = array.data() as usize;
        let end = start + array.len() * size_of::<T>();
        let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let meets = |&(from, to, written): &(usize, usize, bool)| {
            from < end && start < to && (written || writes)
        };
        if in_use.iter().any(meets) {
            return Err(errors::InputError::new_err(format!(
                "{name} shares memory with another argument, or with an array that another thread is \
                 passing to the codec; outputs need memory of their own"
            )));
        }
        in_use.push((start, end, writes));
        Ok(Self(start, end, writes))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let own = (self.0, self.1, self.2);
        if let Some(place) = in_use.iter().position(|each| *each == own) {
            in_use.swap_remove(place);
        }
    }
}

/// An argument that is read, C-contiguous.
struct Input<'py, T: numpy::Element, D: Dimension = Ix2> {
    name: &'static str,
    array: PyReadonlyArray<'py, T, D>,
    _memory: InUse,
}

impl<'py, T: numpy::Element, D: Dimension> Input<'py, T, D> {
    fn new(name: &'static str, array: &Bound<'py, PyArray<T, D>>) -> PyResult<Self> {
        let memory = InUse::claim(name, array, false)?;
        let array = array.try_readonly().map_err(|error| refused(name, &error))?;
        Ok(Self { name, array, _memory: memory })
    }

    fn slice(&self) -> PyResult<&[T]> {
        self.array.as_slice().map_err(|_| refused(self.name, &"must be C-contiguous"))
    }
}

/// An argument that is written, C-contiguous.
struct Output<'py, T: numpy::Element> {
    name: &'static str,
    array: PyReadwriteArray2<'py, T>,
    _memory: InUse,
}

impl<'py, T: numpy::Element> Output<'py, T> {
    fn new(name: &'static str, array: &Bound<'py, PyArray2<T>>) -> PyResult<Self> {
        let memory = InUse::claim(name, array, true)?;
        let array = array.try_readwrite().map_err(|error| refused(name, &error))?;
        Ok(Self { name, array, _memory: memory })
    }

    fn slice(&mut self) -> PyResult<&mut [T]> {
        self.array.as_slice_mut().map_err(|_| refused(self.name, &"must be C-contiguous"))
    }
}

fn refused(name: &str, why: &dyn std::fmt::Display) -> PyErr {
    errors::InputError::new_err(format!("{name}: {why}"))
}

/// Dense logits in one of the types they come in; 16-bit types arrive as their bits.
#[derive(FromPyObject)]
enum Logits<'py> {
    #[pyo3(transparent)]
    Float32(Bound<'py, PyArray2<f32>>),
    #[pyo3(transparent)]
    Bits16(Bound<'py, PyArray2<u16>>),
}

/// Log-probabilities in one of the types they come in.
#[derive(FromPyObject)]
enum LogProbs<'py> {
    #[pyo3(transparent)]
    Float32(Bound<'py, PyArray2<f32>>),
    #[pyo3(transparent)]
    Float64(Bound<'py, PyArray2<f64>>),
}

/// Calls `$run` with the logits as a slice of their type.
macro_rules! with_logits {
    ($logits:expr, $bfloat16:expr, |$slice:ident, $width:ident| $run:expr) => {
        match &$logits {
            Logits::Float32(array) => {
                let input = Input::new("logits", array)?;
                let $slice = input.slice()?;
                let $width = array.shape()[1];
                $run
            }
            Logits::Bits16(array) => {
                let input = Input::new("logits", array)?;
                let bits = input.slice()?;
                let $width = array.shape()[1];
                if $bfloat16 {
                    let $slice = bits.reinterpret_cast::<bf16>();
                    $run
                } else {
                    let $slice = bits.reinterpret_cast::<f16>();
                    $run
                }
            }
        }
    };
}

fn two_dimensional<T: numpy::Element>(
    py: Python<'_>,
    data: Vec<T>,
    rows: usize,
    columns: usize,
) -> PyResult<Bound<'_, PyArray2<T>>> {
    data.into_pyarray(py).reshape([rows, columns])
}

/// A codec of one configuration. Arrays are C-contiguous; shapes (rows, k), (rows,
/// `bytes_per_row`), (rows, vocabulary).
#[pyclass(frozen, module = "distillkit._native")]
struct Codec {
    inner: core::Codec,
}

#[pymethods]
impl Codec {
    #[new]
    #[pyo3(signature = (format, config_json, published_rounding = false))]
    fn new(format: &str, config_json: &str, published_rounding: bool) -> PyResult<Self> {
        let mut config = Config::from_json(format, config_json).map_err(raise)?;
        if let Config::Quantized(config) = &mut config {
            config.published_rounding = published_rounding;
        }
        Ok(Self { inner: core::Codec::new(config).map_err(raise)? })
    }

    /// Name of the instruction set in use.
    #[getter]
    fn backend(&self) -> &'static str {
        self.inner.backend().name()
    }

    #[getter]
    fn k(&self) -> usize {
        self.inner.k()
    }

    #[getter]
    fn vocab_size(&self) -> u64 {
        self.inner.vocab_size()
    }

    #[getter]
    fn value_bytes(&self) -> usize {
        self.inner.value_bytes()
    }

    #[getter]
    fn id_bytes(&self) -> usize {
        self.inner.id_bytes()
    }

    #[getter]
    fn id_bits(&self) -> u32 {
        match self.inner.format() {
            core::Format::Quantized(format) => format.config().id_bits(),
            core::Format::Legacy(format) => format.config().id_bits(),
        }
    }

    /// Words a row of the legacy format, 0 for others.
    #[getter]
    fn words(&self) -> usize {
        match self.inner.format() {
            core::Format::Quantized(_) => 0,
            core::Format::Legacy(format) => format.config().words(),
        }
    }

    /// The configuration with every default filled in, as JSON.
    #[getter]
    fn config_json(&self) -> PyResult<String> {
        match self.inner.format() {
            core::Format::Quantized(format) => json(serde_json::to_string(format.config())),
            core::Format::Legacy(format) => json(serde_json::to_string(format.config())),
        }
    }

    /// What is valid but probably not wanted.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        match self.inner.format() {
            core::Format::Quantized(format) => format.config().warnings(),
            core::Format::Legacy(_) => Vec::new(),
        }
    }

    /// (terms, approximated ranks) float64: the terms as a decoder evaluates them.
    fn terms<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let (terms, m, n) = match self.inner.format() {
            core::Format::Quantized(format) => {
                (format.terms(), format.config().terms().len(), format.config().approximated())
            }
            core::Format::Legacy(format) => {
                (format.terms(), format.config().terms().len(), format.config().approximated())
            }
        };
        two_dimensional(py, terms.to_vec(), m, n)
    }

    /// Encodes rows into `out` (rows, `bytes_per_row`).
    fn encode(
        &self,
        py: Python<'_>,
        ids: Bound<'_, PyArray2<i64>>,
        logprobs: Bound<'_, PyArray2<f32>>,
        out: Bound<'_, PyArray2<u8>>,
    ) -> PyResult<()> {
        let (ids, logprobs) = (Input::new("ids", &ids)?, Input::new("logprobs", &logprobs)?);
        let mut out = Output::new("out", &out)?;
        let (ids, logprobs, out) = (ids.slice()?, logprobs.slice()?, out.slice()?);
        detached(py, || self.inner.encode(ids, logprobs, out))
    }

    /// Decodes rows into `ids` and `logprobs`, both (rows, k).
    fn decode(
        &self,
        py: Python<'_>,
        data: Bound<'_, PyArray2<u8>>,
        ids: Bound<'_, PyArray2<i64>>,
        logprobs: Bound<'_, PyArray2<f32>>,
    ) -> PyResult<()> {
        let data = Input::new("data", &data)?;
        let mut ids = Output::new("out[0]", &ids)?;
        let mut logprobs = Output::new("out[1]", &logprobs)?;
        let (data, ids, logprobs) = (data.slice()?, ids.slice()?, logprobs.slice()?);
        detached(py, || self.inner.decode(data, ids, logprobs))
    }

    /// Encodes the k most probable ids of dense logits into `out` (rows, `bytes_per_row`).
    fn encode_logits(
        &self,
        py: Python<'_>,
        logits: Logits<'_>,
        bfloat16: bool,
        out: Bound<'_, PyArray2<u8>>,
    ) -> PyResult<()> {
        let mut out = Output::new("out", &out)?;
        let out = out.slice()?;
        with_logits!(logits, bfloat16, |slice, width| detached(py, || self
            .inner
            .encode_logits(slice, width, out)))
    }
}

/// Bytes of a document, its rows, and which of them are meant: `start` … `stop` − 1.
type DocumentPart<'py> = (Bound<'py, PyArray1<u8>>, usize, usize, usize);

/// A codec of a format with a prior, compact or sampled: a configuration and its prior. Arrays are
/// C-contiguous.
macro_rules! document_codec {
    ($(#[$attribute:meta])* $name:ident: $codec:ty, $config:ty, $k:expr) => {
        $(#[$attribute])*
        #[pyclass(frozen, module = "distillkit._native")]
        struct $name {
            inner: $codec,
        }

        #[pymethods]
        impl $name {
            #[new]
            #[pyo3(signature = (config_json, prior = None))]
            fn new(py: Python<'_>, config_json: &str, prior: Option<&[u8]>) -> PyResult<Self> {
                let config = <$config>::from_json(config_json).map_err(raise)?;
                Ok(Self { inner: detached(py, || <$codec>::new(config, prior))? })
            }

            #[getter]
            fn k(&self) -> usize {
                ($k)(self.inner.config())
            }

            #[getter]
            fn vocab_size(&self) -> u32 {
                self.inner.config().vocab_size
            }

            /// The configuration with every default and the prior's hash filled in, as JSON.
            #[getter]
            fn config_json(&self) -> PyResult<String> {
                json(serde_json::to_string(self.inner.config()))
            }

            /// What is valid but probably not wanted.
            #[getter]
            fn warnings(&self) -> Vec<String> {
                self.inner.config().warnings()
            }

            /// Name of the instruction set in use.
            #[getter]
            fn backend(&self) -> &'static str {
                self.inner.backend().name()
            }

            /// Encodes the rows of a document, ids and logprobs (rows, at least k).
            fn encode_document<'py>(
                &self,
                py: Python<'py>,
                ids: Bound<'_, PyArray2<i64>>,
                logprobs: Bound<'_, PyArray2<f32>>,
            ) -> PyResult<Bound<'py, PyBytes>> {
                let width = ids.shape()[1];
                let (ids, logprobs) = same_shape(&ids, &logprobs)?;
                let (ids, logprobs) = (ids.slice()?, logprobs.slice()?);
                let data = detached(py, || self.inner.encode_document(ids, logprobs, width))?;
                Ok(PyBytes::new(py, &data))
            }

            /// Decodes a document into `ids` and `logprobs`, both (rows, k).
            fn decode_document(
                &self,
                py: Python<'_>,
                data: Bound<'_, PyArray1<u8>>,
                ids: Bound<'_, PyArray2<i64>>,
                logprobs: Bound<'_, PyArray2<f32>>,
            ) -> PyResult<()> {
                for (name, shape) in [("out[0]", ids.shape()), ("out[1]", logprobs.shape())] {
                    if shape[1] != self.k() || shape != ids.shape() {
                        let (rows, k) = (ids.shape()[0], self.k());
                        return Err(refused(
                            name,
                            &format!("found shape {shape:?}, expected ({rows}, {k})"),
                        ));
                    }
                }
                let data = Input::new("data", &data)?;
                let mut ids = Output::new("out[0]", &ids)?;
                let mut logprobs = Output::new("out[1]", &logprobs)?;
                let (data, ids, logprobs) = (data.slice()?, ids.slice()?, logprobs.slice()?);
                detached(py, || self.inner.decode_document(data, ids, logprobs))
            }

            /// Checks that a document may hold so many rows, without decoding it.
            fn check(&self, data: Bound<'_, PyArray1<u8>>, rows: usize) -> PyResult<()> {
                let data = Input::new("data", &data)?;
                self.inner.check(data.slice()?, rows).map_err(raise)
            }

            /// Bytes of a document by part.
            fn sizes(
                &self,
                py: Python<'_>,
                data: Bound<'_, PyArray1<u8>>,
                rows: usize,
            ) -> PyResult<BTreeMap<&'static str, f64>> {
                let data = Input::new("data", &data)?;
                let data = data.slice()?;
                let sizes = detached(py, || self.inner.sizes(data, rows))?;
                let Sizes { head, ids, values, framing } = sizes;
                Ok([("head", head), ("ids", ids), ("values", values), ("framing", framing)].into())
            }

            /// Bits of each row, (rows,), without the framing of the document.
            fn row_bits<'py>(
                &self,
                py: Python<'py>,
                data: Bound<'_, PyArray1<u8>>,
                rows: usize,
            ) -> PyResult<Bound<'py, PyArray1<f32>>> {
                let data = Input::new("data", &data)?;
                let data = data.slice()?;
                Ok(detached(py, || self.inner.row_bits(data, rows))?.into_pyarray(py))
            }

            /// Puts rows of documents together to one document that decodes to the same.
            fn join<'py>(
                &self,
                py: Python<'py>,
                parts: Vec<DocumentPart<'_>>,
            ) -> PyResult<Bound<'py, PyBytes>> {
                let inputs = parts.iter().map(|part| Input::new("data", &part.0));
                let inputs = inputs.collect::<PyResult<Vec<_>>>()?;
                let described = inputs.iter().zip(&parts).map(|(input, &(_, rows, start, stop))| {
                    Ok(Part { data: input.slice()?, rows, start, stop })
                });
                let described = described.collect::<PyResult<Vec<_>>>()?;
                let data = detached(py, || self.inner.join(&described))?;
                Ok(PyBytes::new(py, &data))
            }
        }
    };
}

document_codec! {
    /// A codec of the compact format.
    CompactCodec: Compact, CompactConfig, |config: &CompactConfig| config.k
}

document_codec! {
    /// A codec of the sampled format, whose log-probabilities are those of shares of the draws.
    SampledCodec: Sampled, SampledConfig, SampledConfig::k
}

/// The ids and log-probabilities of rows with any number of ids.
fn same_shape<'py>(
    ids: &Bound<'py, PyArray2<i64>>,
    logprobs: &Bound<'py, PyArray2<f32>>,
) -> PyResult<(Input<'py, i64>, Input<'py, f32>)> {
    if logprobs.shape() != ids.shape() {
        let shapes = format!("{:?}, expected that of ids: {:?}", logprobs.shape(), ids.shape());
        return Err(refused("logprobs", &format!("found shape {shapes}")));
    }
    Ok((Input::new("ids", ids)?, Input::new("logprobs", logprobs)?))
}

fn json(config: serde_json::Result<String>) -> PyResult<String> {
    config.map_err(|error| errors::DistillKitError::new_err(error.to_string()))
}

/// The configuration that a prior was learned for, as JSON.
#[pyfunction]
fn prior_config(py: Python<'_>, prior: &[u8]) -> PyResult<String> {
    json(serde_json::to_string(&detached(py, || Compact::prior_config(prior))?))
}

/// The configuration that a prior of the sampled format was learned for, as JSON.
#[pyfunction]
fn sampled_prior_config(py: Python<'_>, prior: &[u8]) -> PyResult<String> {
    json(serde_json::to_string(&detached(py, || Sampled::prior_config(prior))?))
}

/// Learns the prior of a configuration of the sampled format from rows, ids and logprobs (rows,
/// any number) and, if they are known, the most probable ids of each, `likely` (rows, any number);
/// with another prior as `base`, its clusters are taken over.
#[pyfunction]
fn learn_sampled_prior<'py>(
    py: Python<'py>,
    config_json: &str,
    ids: Bound<'_, PyArray2<i64>>,
    logprobs: Bound<'_, PyArray2<f32>>,
    likely: Option<Bound<'_, PyArray2<i64>>>,
    base: Option<&[u8]>,
) -> PyResult<Bound<'py, PyBytes>> {
    let config = SampledConfig::from_json(config_json).map_err(raise)?;
    let width = ids.shape()[1];
    let (ids, logprobs) = same_shape(&ids, &logprobs)?;
    let (ids, logprobs) = (ids.slice()?, logprobs.slice()?);
    let likely_width = likely.as_ref().map(|likely| likely.shape()[1]);
    let likely = likely.as_ref().map(|likely| Input::new("likely", likely)).transpose()?;
    let likely = likely.as_ref().map(Input::slice).transpose()?.zip(likely_width);
    let learn = || core::compact::learn_sampled(&config, ids, logprobs, width, likely, base);
    let prior = detached(py, || Ok(learn()?.to_bytes()))?;
    Ok(PyBytes::new(py, &prior))
}

/// Learns the prior of a configuration from rows, ids and logprobs (rows, at least k); with another
/// prior as `base`, its clusters are taken over.
#[pyfunction]
fn learn_prior<'py>(
    py: Python<'py>,
    config_json: &str,
    ids: Bound<'_, PyArray2<i64>>,
    logprobs: Bound<'_, PyArray2<f32>>,
    base: Option<&[u8]>,
) -> PyResult<Bound<'py, PyBytes>> {
    let config = CompactConfig::from_json(config_json).map_err(raise)?;
    let width = ids.shape()[1];
    let (ids, logprobs) = same_shape(&ids, &logprobs)?;
    let (ids, logprobs) = (ids.slice()?, logprobs.slice()?);
    let learn = || core::compact::learn(&config, ids, logprobs, width, base);
    let prior = detached(py, || Ok(learn()?.to_bytes()))?;
    Ok(PyBytes::new(py, &prior))
}

/// The tokens of a document and the bytes that each covers: ids, starts and ends, all (tokens,).
type TokenArrays<'py> =
    (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

/// A teacher's and a student's vocabulary, and what has been found out of the borders of tokens.
#[pyclass(module = "distillkit._native")]
struct TokenMap {
    inner: retokenize::TokenMap,
}

#[pymethods]
impl TokenMap {
    /// The bytes of all ids and where those of each end; the student's tokens of each teacher token
    /// and where they end; the teacher tokens for which they depend on the text before; the
    /// student's merges (n, 3).
    #[new]
    fn new(
        teacher: (Bound<'_, PyBytes>, Bound<'_, PyArray1<i64>>),
        student: (Bound<'_, PyBytes>, Bound<'_, PyArray1<i64>>),
        pieces: (Bound<'_, PyArray1<i64>>, Bound<'_, PyArray1<i64>>),
        varying: Bound<'_, PyArray1<i64>>,
        merges: Option<Bound<'_, PyArray2<i64>>>,
    ) -> PyResult<Self> {
        let strings = |(bytes, ends): (Bound<'_, PyBytes>, Bound<'_, PyArray1<i64>>)| {
            retokenize::Strings::new(bytes.as_bytes().to_vec(), Input::new("ends", &ends)?.slice()?)
                .map_err(raise)
        };
        let merges = merges.map(|merges| {
            let merges = Input::new("merges", &merges)?;
            let (triples, _) = merges.slice()?.as_chunks::<3>();
            PyResult::Ok(
                triples.iter().map(|&[l, r, m]| (l as u32, r as u32, m as u32)).collect::<Vec<_>>(),
            )
        });
        let merges = merges.transpose()?;
        let pieces = divided(&pieces.0, &pieces.1)?;
        let inner = retokenize::TokenMap::new(
            strings(teacher)?,
            strings(student)?,
            pieces,
            Input::new("varying", &varying)?.slice()?,
            merges.as_deref(),
        );
        Ok(Self { inner: inner.map_err(raise)? })
    }

    /// The student's rows of a document: ids and logprobs (rows, keep), the log-probability of each
    /// next token (rows,), where each position lies (rows,), and sums. `places` are keep, and whether
    /// places without an id get one. `tokenize` takes a list of
    /// bytes and returns their tokens, all together, and where those of each end.
    #[expect(clippy::type_complexity, reason = "five arrays")]
    #[expect(clippy::too_many_arguments, reason = "the parts of a document")]
    fn map<'py>(
        &mut self,
        py: Python<'py>,
        teacher: TokenArrays<'_>,
        student: TokenArrays<'_>,
        ids: Bound<'_, PyArray2<i64>>,
        logprobs: Bound<'_, PyArray2<f32>>,
        labels: Option<Bound<'_, PyArray1<f32>>>,
        places: (usize, bool),
        tokenize: Bound<'_, PyAny>,
    ) -> PyResult<(
        Bound<'py, PyArray2<i64>>,
        Bound<'py, PyArray2<f32>>,
        Bound<'py, PyArray1<f32>>,
        Bound<'py, PyArray1<u8>>,
        Vec<f64>,
    )> {
        let width = ids.shape()[1];
        let (ids, logprobs) = same_shape(&ids, &logprobs)?;
        let labels = labels.map(|labels| Input::new("labels", &labels)).transpose()?;
        let sides = [("teacher", &teacher), ("student", &student)].map(|(name, side)| {
            PyResult::Ok([
                Input::new(name, &side.0)?,
                Input::new(name, &side.1)?,
                Input::new(name, &side.2)?,
            ])
        });
        let [teacher, student] = sides;
        let (teacher, student) = (teacher?, student?);
        let document = retokenize::Document {
            teacher: tokens_of(&teacher)?,
            student: tokens_of(&student)?,
            ids: ids.slice()?,
            logprobs: logprobs.slice()?,
            width,
            labels: labels.as_ref().map(Input::slice).transpose()?,
        };
        // What Python raises ends the mapping, and is raised again.
        let mut raised = None;
        let mut ask = |texts: &[Vec<u8>]| {
            let answer = (|| {
                let texts: Vec<_> = texts.iter().map(|text| PyBytes::new(py, text)).collect();
                let answer = tokenize.call1((texts,))?;
                let (ids, ends) =
                    answer.extract::<(Bound<'_, PyArray1<i64>>, Bound<'_, PyArray1<i64>>)>()?;
                divided(&ids, &ends)
            })();
            answer.map_err(|error| {
                raised = Some(error);
                CodecError::Interrupted
            })
        };
        let mapped = self.inner.map(&document, places, &mut ask);
        if let Some(error) = raised {
            return Err(error);
        }
        let mapped = mapped.map_err(raise)?;
        let rows = mapped.kinds.len();
        let sums = mapped.sums;
        Ok((
            two_dimensional(py, mapped.ids, rows, places.0)?,
            two_dimensional(py, mapped.logprobs, rows, places.0)?,
            mapped.labels.into_pyarray(py),
            mapped.kinds.iter().map(|&kind| kind as u8).collect::<Vec<_>>().into_pyarray(py),
            vec![
                sums.teacher_mass,
                sums.teacher_rows,
                sums.teacher_bits,
                sums.teacher_bytes,
                sums.student_mass,
                sums.student_rows,
                sums.student_bits,
                sums.student_bytes,
            ],
        ))
    }
}

fn tokens_of<'a>(side: &'a [Input<'_, i64, Ix1>; 3]) -> PyResult<retokenize::Tokens<'a>> {
    let [ids, starts, ends] = side;
    Ok(retokenize::Tokens { ids: ids.slice()?, starts: starts.slice()?, ends: ends.slice()? })
}

/// Lists of ids from all of them and where those of each list end.
fn divided(
    ids: &Bound<'_, PyArray1<i64>>,
    ends: &Bound<'_, PyArray1<i64>>,
) -> PyResult<Vec<Vec<u32>>> {
    let (ids, ends) = (Input::new("ids", ids)?, Input::new("ends", ends)?);
    let (ids, ends) = (ids.slice()?, ends.slice()?);
    let mut start = 0;
    let mut lists = Vec::with_capacity(ends.len());
    for &end in ends {
        let part = ids
            .get(start..end as usize)
            .ok_or_else(|| refused("ends", &"do not divide the ids"))?;
        lists.push(part.iter().map(|&id| id as u32).collect());
        start = end as usize;
    }
    Ok(lists)
}

/// Compares log-probabilities (rows, k) of the same ids: the divergence of each row (rows,), rows
/// whose first id is still that, the sum of errors of the mass, the largest error of a value, and
/// sums by rank (4, k).
#[pyfunction]
fn compare<'py>(
    py: Python<'py>,
    before: LogProbs<'py>,
    after: LogProbs<'py>,
) -> PyResult<Compared<'py>> {
    match (&before, &after) {
        (LogProbs::Float32(before), LogProbs::Float32(after)) => compare_as(py, before, after),
        (LogProbs::Float64(before), LogProbs::Float64(after)) => compare_as(py, before, after),
        _ => Err(refused("after", &"its type is not that of before")),
    }
}

type Compared<'py> = (Bound<'py, PyArray1<f64>>, usize, f64, f64, Bound<'py, PyArray2<f64>>);

fn compare_as<'py, T: core::fidelity::LogProb + numpy::Element>(
    py: Python<'py>,
    before: &Bound<'py, PyArray2<T>>,
    after: &Bound<'py, PyArray2<T>>,
) -> PyResult<Compared<'py>> {
    if before.shape() != after.shape() {
        let shapes = format!("found shape {:?}, expected {:?}", after.shape(), before.shape());
        return Err(refused("after", &shapes));
    }
    let k = before.shape()[1];
    let (before, after) = (Input::new("before", before)?, Input::new("after", after)?);
    let (before, after) = (before.slice()?, after.slice()?);
    let found = detached(py, || core::fidelity::compare(before, after, k))?;
    Ok((
        found.kl.into_pyarray(py),
        found.top1,
        found.mass_error,
        found.worst_error,
        two_dimensional(py, found.ranks, 4, k)?,
    ))
}

/// The logprobs (rows, k) that rows of n ids have for those of other rows, −inf where they have
/// none; and of each row whether it has all (rows,).
#[pyfunction]
#[expect(clippy::type_complexity, reason = "two arrays")]
fn values_of<'py>(
    py: Python<'py>,
    ids: Bound<'py, PyArray2<i64>>,
    logprobs: Bound<'py, PyArray2<f32>>,
    wanted: Bound<'py, PyArray2<i64>>,
    stored: Bound<'py, PyArray2<f32>>,
) -> PyResult<(Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<bool>>)> {
    if ids.shape()[0] != wanted.shape()[0] {
        let rows = format!("found {} rows, expected {}", wanted.shape()[0], ids.shape()[0]);
        return Err(refused("wanted", &rows));
    }
    let (n, [rows, k]) = (ids.shape()[1], [wanted.shape()[0], wanted.shape()[1]]);
    let (ids, logprobs) = same_shape(&ids, &logprobs)?;
    let (wanted, stored) = same_shape(&wanted, &stored)?;
    let own = (ids.slice()?, logprobs.slice()?, n);
    let others = (wanted.slice()?, stored.slice()?, k);
    let (values, found) = detached(py, || core::fidelity::values_of(own, others))?;
    Ok((two_dimensional(py, values, rows, k)?, found.into_pyarray(py)))
}

/// ids (rows, k), logprobs (rows, k) and logsumexp (rows,) of dense logits.
#[pyfunction]
#[expect(clippy::type_complexity, reason = "three arrays")]
fn topk<'py>(
    py: Python<'py>,
    logits: Logits<'py>,
    k: usize,
    bfloat16: bool,
) -> PyResult<(Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<f32>>)> {
    with_logits!(logits, bfloat16, |slice, width| {
        let rows = slice.len() / width.max(1);
        let (ids, logprobs, logsumexp) = detached(py, || {
            let mut ids = vec![0; rows * k];
            let mut logprobs = vec![0.0; rows * k];
            let mut logsumexp = vec![0.0; rows];
            core::topk(slice, width, k, &mut ids, &mut logprobs, &mut logsumexp)?;
            Ok((ids, logprobs, logsumexp))
        })?;
        Ok((
            two_dimensional(py, ids, rows, k)?,
            two_dimensional(py, logprobs, rows, k)?,
            logsumexp.into_pyarray(py),
        ))
    })
}

/// Uniform numbers (positions, draws) of consecutive positions of a document, each row ascending.
#[pyfunction]
fn uniforms(
    py: Python<'_>,
    seed: u64,
    document: u64,
    first: u64,
    positions: usize,
    draws: usize,
) -> PyResult<Bound<'_, PyArray2<f64>>> {
    let make = || Ok(core::draws::uniforms(seed, document, first, positions, draws));
    two_dimensional(py, detached(py, make)?, positions, draws)
}

/// Draws from softmax(logits / temperature) with uniform numbers (rows, draws), each row ascending:
/// ids and logprobs (rows, k) with k the lesser of draws and the width of the logits.
#[pyfunction]
#[expect(clippy::type_complexity, reason = "two arrays")]
fn draw<'py>(
    py: Python<'py>,
    logits: Logits<'py>,
    temperature: f64,
    uniforms: Bound<'py, PyArray2<f64>>,
    bfloat16: bool,
) -> PyResult<(Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f32>>)> {
    let draws = uniforms.shape()[1];
    let uniforms = Input::new("uniforms", &uniforms)?;
    let uniforms = uniforms.slice()?;
    with_logits!(logits, bfloat16, |slice, width| {
        let (rows, k) = (slice.len() / width.max(1), draws.min(width));
        let (ids, logprobs) = detached(py, || {
            let (mut ids, mut logprobs) = (vec![0; rows * k], vec![0.0; rows * k]);
            core::draws::draw(slice, width, temperature, uniforms, &mut ids, &mut logprobs)?;
            Ok((ids, logprobs))
        })?;
        Ok((two_dimensional(py, ids, rows, k)?, two_dimensional(py, logprobs, rows, k)?))
    })
}

/// Packs each row of `values`; (rows, n) uint64 → (rows, bytes) uint8.
#[pyfunction]
fn pack_bits<'py>(
    py: Python<'py>,
    values: Bound<'py, PyArray2<u64>>,
    width: u32,
) -> PyResult<Bound<'py, PyArray2<u8>>> {
    let rows = values.shape()[0];
    let n = values.shape()[1];
    let values = Input::new("values", &values)?;
    let values = values.slice()?;
    let bytes = core::bits::packed_len(n, width.min(64));
    let data = detached(py, || {
        let mut data = vec![0; rows * bytes];
        if bytes > 0 {
            for (row, out) in data.chunks_mut(bytes).enumerate() {
                core::bits::pack(&values[row * n..(row + 1) * n], width, out)
                    .map_err(|error| error.at_row(row))?;
            }
        }
        Ok(data)
    })?;
    two_dimensional(py, data, rows, bytes)
}

/// Unpacks `count` values from each row of `data`; (rows, bytes) uint8 → (rows, count) uint64.
#[pyfunction]
fn unpack_bits<'py>(
    py: Python<'py>,
    data: Bound<'py, PyArray2<u8>>,
    width: u32,
    count: usize,
) -> PyResult<Bound<'py, PyArray2<u64>>> {
    let rows = data.shape()[0];
    let bytes = data.shape()[1];
    let data = Input::new("data", &data)?;
    let data = data.slice()?;
    let values = detached(py, || {
        let mut values = vec![0; rows * count];
        for row in 0..rows {
            let out = &mut values[row * count..(row + 1) * count];
            core::bits::unpack(&data[row * bytes..(row + 1) * bytes], width, out)
                .map_err(|error| error.at_row(row))?;
        }
        Ok(values)
    })?;
    two_dimensional(py, values, rows, count)
}

/// Native parts of distillkit; use the Python modules over it.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::{
        Codec, CompactCodec, SampledCodec, TokenMap, compare, draw, learn_prior,
        learn_sampled_prior, pack_bits, prior_config, sampled_prior_config, topk, uniforms,
        unpack_bits, values_of,
    };
    use super::{IMPORTED_BY, core, goes_on};
    use pyo3::prelude::*;

    #[pymodule_init]
    #[expect(clippy::unnecessary_wraps, reason = "PyO3 takes a function that may fail")]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        IMPORTED_BY.get_or_init(|| std::thread::current().id());
        core::ask_whether_to_go_on(goes_on);
        Ok(())
    }

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
