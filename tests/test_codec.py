"""The codec against the published vectors, against its own promises, and against bad input."""

from __future__ import annotations

import json
import pickle
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.bench.fidelity import optimum
from distillkit.bench.published import is_resolved, published_codec
from distillkit.codec import Codec, DistributionQuantizationConfig, LegacyLogitCompressionConfig, codec_config, preset
from distillkit.errors import ConfigError, CorruptDataError, InputError, TruncatedDataError, UnsupportedVersionError
from support import reference
from support.golden import CASES, golden, published_tolerance
from support.refusals import check_names, refused


@pytest.mark.parametrize("name", CASES)
def test_published_vectors_decode(name: str) -> None:
    codec, recorded, data = golden(name)
    ids, logprobs = codec.decode(data)
    np.testing.assert_array_equal(ids, recorded["out_ids"])
    exact_k = codec.config.exact_k
    exact, rest = published_tolerance(codec, recorded)
    difference = np.abs(logprobs - recorded["out_logprobs"])
    assert (difference[:, :exact_k] <= exact[:, :exact_k]).all()
    assert difference[:, exact_k:].max(initial=0.0) <= rest


def test_torch_decodes_what_rust_decodes(subtests: pytest.Subtests) -> None:
    for name in CASES:
        with subtests.test(case=name):
            codec, _, data = golden(name)
            ids, logprobs = codec.decode(data)
            padded = torch.zeros(data.size + 1, dtype=torch.uint8)  # one byte off: nothing may rely on aligned rows
            padded[1:] = torch.from_numpy(data).flatten()
            with torch.inference_mode():
                torch_ids, torch_logprobs = codec.decode_torch(padded[1:].view(2, -1, data.shape[1]))
            np.testing.assert_array_equal(torch_ids.flatten(0, 1).numpy(), ids)
            np.testing.assert_array_equal(torch_logprobs.flatten(0, 1).numpy(), logprobs)


def published_error(codec: Codec) -> tuple[float, float, float]:
    """Mean error where residuals are: of version 1, of version 2, and of the published decoder, on published bytes."""
    k, exact_k = codec.k, codec.config.exact_k
    logits = np.random.default_rng(0).standard_normal((64, 1000)) * 4
    logprobs = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, ::-1][:, :k].astype(np.float32)
    published = published_codec(codec.config)
    data = published.encode(torch.arange(k).repeat(64, 1), torch.from_numpy(logprobs.copy()))
    decoded = [Codec(codec.config).decode(data.numpy())[1], codec.decode(data.numpy())[1], published.decode(data)[1]]
    np.testing.assert_array_equal(codec.decode_torch(data)[1].numpy(), decoded[1])
    version1, version2, theirs = (float(np.abs(np.asarray(d) - logprobs)[:, exact_k:].mean()) for d in decoded)
    return version1, version2, theirs


@pytest.mark.parametrize("term_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("exact_dtype", ["float32", "float16", "bfloat16"])
def test_published_bytes_decode_as_exactly_as_published(term_dtype: str, exact_dtype: str) -> None:
    """Their encoder took residuals against its own polynomial, rounded to 16 bits."""
    codec = Codec.for_published(
        {
            "d": 1000,
            "k": 24,
            "exact_k": 4,
            "exact_dtype": exact_dtype,
            "polynomial_terms": [0, 1, "sqrt"],
            "term_dtype": term_dtype,
            "residual_bins": [{"scale_dtype": "float32", "element_bits": 10, "num_elements": 20}],
            "delta_encoding": False,
            "normalize_t": True,
        }
    )
    version1, version2, theirs = published_error(codec)
    assert version2 <= 1.1 * theirs
    if exact_dtype == "float32":
        assert version2 < version1 / 2


@pytest.mark.parametrize("name", ["q_rand3", "q_rand6", "q_rand7"])
def test_published_vectors_of_rounded_polynomials(name: str) -> None:
    """Version 2 gives the recorded values, but for sums that the published product rounded the other way."""
    version1, recorded, data = golden(name)
    codec = Codec.for_published(version1.config)
    assert (codec.version, Codec.for_published(CASES["q_readme_bins"]["config"]).version) == (2, 1)
    assert Codec.from_dict(json.loads(json.dumps(codec.to_dict()))) == pickle.loads(pickle.dumps(codec)) == codec
    assert codec != version1
    ids, logprobs = codec.decode(data)
    np.testing.assert_array_equal(ids, recorded["out_ids"])
    np.testing.assert_array_equal(codec.decode_torch(torch.from_numpy(data))[1].numpy(), logprobs)
    theirs = recorded["out_logprobs"]
    old = np.abs(version1.decode(data)[1] - theirs)
    assert np.abs(logprobs - theirs).mean() < old.mean()
    if name == "q_rand6":
        np.testing.assert_array_equal(logprobs, theirs)


def test_columns_convert_both_ways_bit_for_bit(subtests: pytest.Subtests) -> None:
    for name in CASES:
        with subtests.test(case=name):
            codec, recorded, data = golden(name)
            for column, values in codec.to_published(data).items():
                expected = recorded[column].view(np.uint64) if column == "packed_indices" else recorded[column]
                np.testing.assert_array_equal(values, expected, column)


def test_encodes_close_and_the_published_way(subtests: pytest.Subtests) -> None:
    """Own bytes: same sizes, ids exact, values close; the oracle's decoder, written from FORMAT.md alone, agrees."""
    for name in CASES:
        with subtests.test(case=name):
            check_encoding(*golden(name))


def check_encoding(codec: Codec, recorded: dict[str, np.ndarray[Any, Any]], published: np.ndarray[Any, Any]) -> None:
    data = codec.encode(recorded["in_ids"], recorded["in_logprobs"])
    assert data.shape == published.shape
    ids, logprobs = codec.decode(data)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.sort(recorded["in_ids"], axis=1))
    oracle_ids, oracle = reference.decode_row(codec.to_dict(), bytes(data[0]))
    np.testing.assert_array_equal(oracle_ids, ids[0])
    np.testing.assert_allclose(logprobs[0], oracle, rtol=1e-6, atol=1e-6)
    ours = reference.kl_with_missing(recorded["in_logprobs"], logprobs).mean()
    if is_resolved(codec.config):
        theirs = reference.kl_with_missing(recorded["in_logprobs"], recorded["out_logprobs"]).mean()
        # These few rows are half synthetic.
        assert ours <= 1.1 * theirs + 1e-9, f"KL {ours:.3e}, published encoder {theirs:.3e}"
    else:
        # The recorded values depend on rounding errors: compare with the optimum instead.
        descending = -np.sort(-recorded["in_logprobs"], axis=1)
        least = reference.kl_with_missing(descending, optimum(codec.config, descending)).mean()
        assert ours <= 1.2 * least, f"KL {ours:.3e}, the least possible {least:.3e}"


def test_bytes_do_not_depend_on_how_rows_are_batched() -> None:
    codec, recorded, _ = golden("q_readme_bins")
    ids, logprobs = (np.tile(recorded[key], (20, 1)) for key in ("in_ids", "in_logprobs"))
    whole = codec.encode(ids, logprobs)
    np.testing.assert_array_equal(
        whole, np.concatenate([codec.encode(ids[i], logprobs[i])[None] for i in range(len(ids))])
    )


def random_config(draw: st.DrawFn) -> DistributionQuantizationConfig:
    floats = st.sampled_from(["float16", "bfloat16", "float32", "float64"])
    d = draw(st.sampled_from([2, 3, 255, 256, 257, 49_152, 131_072, 131_073, 262_144]))
    k = draw(st.integers(1, min(d, 70)))
    exact_k = draw(st.integers(0, k))
    terms = draw(st.lists(st.sampled_from([0, 1, 2, 3, "sqrt", "exp"]), max_size=5))
    bins, left = [], k - exact_k
    while left and draw(st.booleans()):
        size = draw(st.integers(1, left))
        bins.append({"scale_dtype": draw(floats), "element_bits": draw(st.integers(1, 64)), "num_elements": size})
        left -= size
    if exact_k < k and not terms and not bins:
        terms = [0]
    return DistributionQuantizationConfig(
        d=d,
        k=k,
        exact_k=exact_k,
        exact_dtype=draw(floats),
        polynomial_terms=terms,
        term_dtype=draw(floats),
        residual_bins=bins,
        delta_encoding=draw(st.booleans()),
        error_diffusion=draw(st.booleans()),
        normalize_t=True,
    )


@st.composite
def coded_rows(draw: st.DrawFn) -> tuple[Codec, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if draw(st.booleans()):
        codec = Codec(random_config(draw))
    else:
        d = draw(st.sampled_from([2, 255, 256, 32_000, 65_536, 65_537, 151_936, 2**31, 2**62]))
        k = draw(st.integers(1, min(d, 70)))
        codec = Codec(
            LegacyLogitCompressionConfig(
                vocab_size=d,
                k=k,
                exact_k=draw(st.integers(0, k)),
                polynomial_degree=draw(st.integers(0, 4)),
                invert_polynomial=draw(st.booleans()),
                with_sqrt_term=draw(st.booleans()),
                term_dtype=draw(st.sampled_from(["float32", "float64", "bfloat16"])),
            )
        )
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.integers(0, 4))
    spread = draw(st.sampled_from([0.0, 0.1, 3.0, 20.0]))
    logits = generator.standard_normal((rows, codec.k)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.01
    span = min(codec.vocab_size, 10**6)
    ids = (
        np.stack([generator.choice(span, codec.k, replace=False) for _ in range(rows)])
        if rows
        else np.zeros((0, codec.k))
    )
    # The top of the range as well: the widest ids.
    return codec, codec.vocab_size - 1 - ids.astype(np.int64), logprobs.astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(coded_rows())
def test_any_config_round_trips(case: tuple[Codec, np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
    codec, ids, logprobs = case
    data = codec.encode(ids, logprobs)
    assert data.dtype == np.uint8
    assert data.shape == (len(ids), codec.bytes_per_token)
    back_ids, back = codec.decode(data)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    np.testing.assert_array_equal(back_ids, np.take_along_axis(ids, order, 1))
    assert np.isfinite(back).all()
    torch_ids, torch_logprobs = codec.decode_torch(torch.from_numpy(data))
    np.testing.assert_array_equal(torch_ids.numpy(), back_ids)
    np.testing.assert_allclose(torch_logprobs.numpy(), back, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(codec.from_published(codec.to_published(data)), data)
    if not codec.config.delta_encoding if codec.format == "quantized" else True:
        exact_k = codec.config.exact_k
        dtype = codec.config.exact_dtype if codec.format == "quantized" else "float16"
        # A neighbour in the stored type: the order and the mass of the row decide between the two.
        step = torch.finfo(getattr(torch, dtype)).eps
        exact = np.take_along_axis(logprobs, order, 1)[:, :exact_k]
        np.testing.assert_allclose(back[:, :exact_k], exact, rtol=max(step, 2e-7), atol=6e-8)


@settings(max_examples=200, deadline=None)
@given(coded_rows(), st.randoms(use_true_random=False))
def test_arbitrary_bytes_decode_or_are_refused(case: Any, random: Any) -> None:
    codec, _, _ = case
    data = np.frombuffer(random.randbytes(3 * codec.bytes_per_token), np.uint8).reshape(3, -1)
    try:
        ids, logprobs = codec.decode(data)
    except CorruptDataError:
        return
    assert ((ids >= 0) & (ids < codec.vocab_size)).all()
    assert np.isfinite(logprobs).all()


def test_every_prefix_of_a_document_is_refused() -> None:
    codec, _, rows = golden("q_small_vocab")
    data = rows[:2].tobytes()
    assert codec.encode_document(codec.decode_document(data, 2))[:3] == data[:3]
    for length in range(len(data)):
        with refused(TruncatedDataError, str(length)):
            codec.decode_document(data[:length], 2)


def test_bad_rows_are_refused_by_row() -> None:
    """An id twice; tests/test_codec_inputs.py has the other faults of a row."""
    codec, recorded, _ = golden("q_small_vocab")
    ids = recorded["in_ids"].astype(np.int64)
    ids[1, 2] = ids[1, 3]
    with refused(InputError, "row 1", str(ids[1, 3])):
        codec.encode(ids, recorded["in_logprobs"])


def test_wrong_columns_are_refused() -> None:
    codec, _, data = golden("q_small_vocab")
    with refused(InputError, "bytepacked_indices", "compressed_logprobs"):
        codec.from_published({"compressed_logprobs": data[:, :18]})
    legacy, columns, _ = golden("legacy_readme")
    with refused(InputError, "exact_values", "float16"):
        legacy.from_published({**columns, "exact_values": columns["exact_values"] * np.float32(1.0001)})


def test_any_layout_of_the_input_is_accepted() -> None:
    codec, recorded, _ = golden("q_small_vocab")
    ids, logprobs = recorded["in_ids"], recorded["in_logprobs"]
    expected = codec.encode(ids, logprobs)
    read_only = logprobs.copy()
    read_only.flags.writeable = False
    shuffled = np.random.default_rng(0).permutation(codec.k)
    np.testing.assert_array_equal(codec.encode(np.asfortranarray(ids), read_only.astype(np.float64)), expected)
    np.testing.assert_array_equal(codec.encode(ids[:, shuffled], logprobs[:, shuffled])[:4], expected[:4])
    tensors = codec.encode(torch.from_numpy(ids), torch.from_numpy(logprobs))
    np.testing.assert_array_equal(tensors.numpy(), expected)
    torch_ids, _ = codec.decode(tensors)
    np.testing.assert_array_equal(torch_ids.numpy(), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encode_logits_is_topk_then_encode(dtype: torch.dtype) -> None:
    codec = Codec(preset("budget", vocab_size=1000))
    logits = (torch.randn(2, 40, 1000, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    exact = torch.log_softmax(logits.double(), -1)
    ids, logprobs = codec.decode(codec.encode_logits(logits))
    assert ids.shape == (2, 40, 50)
    best, _ = exact.sort(dim=-1, descending=True)
    torch.testing.assert_close(exact.gather(-1, ids), best[..., :50])  # ties may come in any order
    # The exact value is one of the two bfloat16 neighbours of what was given.
    towards_zero = best[..., 0].float().view(torch.int32) & ~0xFFFF
    neighbours = torch.stack([towards_zero, towards_zero + 0x10000]).view(torch.float32)
    assert (logprobs[..., 0] == neighbours).any(0).all()


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"k": 0}, ["k", "0"]),
        ({"k": 400}, ["k", "400", "300"]),
        ({"exact_k": 21}, ["exact_k", "21"]),
        ({"d": 1}, ["d", "1"]),
        ({"polynomial_terms": [0, "sqr"]}, ["polynomial_terms", "sqr"]),
        ({"polynomial_terms": []}, ["polynomial_terms", "exact_k", "3", "k", "20"]),
        ({"polynomial_terms": [-1]}, ["polynomial_terms.0", "t = 0"]),
        ({"polynomial_terms": [0, 5], "term_dtype": "float16"}, ["polynomial_terms.1", "t = 10"]),
        ({"term_dtype": "float8"}, ["term_dtype", "float16"]),
        (
            {"residual_bins": [{"scale_dtype": "float16", "element_bits": 65, "num_elements": 1}]},
            ["element_bits", "65"],
        ),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 18}]}, ["18", "17"]),
        ({"residual_bins": None}, ["residual_bins"]),
        ({"exact": 3}, ["exact"]),
        ({"k": "20"}, ["k"]),
    ],
    ids=str,
)
def test_bad_configs_are_refused_by_field(fields: dict[str, Any], facts: list[str]) -> None:
    config = {**CASES["q_small_vocab"]["config"], **fields}
    with refused(ConfigError, *facts):
        codec_config({"logprob_compressor": config})


def test_configs_come_in_every_published_spelling() -> None:
    fields = CASES["q_small_vocab"]["config"]
    config = DistributionQuantizationConfig(**fields)
    assert codec_config(fields) == codec_config({"logprob_compressor": fields}) == codec_config(config) == config
    legacy = CASES["legacy_readme"]["config"]
    assert codec_config(legacy) == codec_config({"legacy_logit_compression": legacy})
    with refused(ConfigError, "kk"):
        codec_config({"kk": 1})
    with refused(ConfigError, "budgit", "budget"):
        preset("budgit", vocab_size=100)
    assert DistributionQuantizationConfig(d=10, k=2, exact_k=2, residual_bins=[]).delta_encoding  # as published


def test_a_coarse_config_warns() -> None:
    config = DistributionQuantizationConfig(
        d=1000, k=64, exact_k=4, polynomial_terms=[0, 1, 2], term_dtype="float16", residual_bins=[]
    )
    (warning,) = Codec(config).warnings
    check_names(warning, "term_dtype", "normalize_t")
    assert Codec(preset("recommended", vocab_size=49_152)).warnings == []


def long_call() -> tuple[Codec, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A codec, and ids, log-probabilities and output of rows that take it about a second."""
    codec = Codec(preset("faithful", vocab_size=49_152))
    logits = np.sort(np.random.default_rng(0).standard_normal((500, codec.k)).astype(np.float32) * 4)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.1
    logprobs = np.ascontiguousarray(np.tile(logprobs, (60, 1)))
    ids = np.tile(np.arange(codec.k), (len(logprobs), 1))
    return codec, ids, logprobs, np.zeros((len(ids), codec.bytes_per_token), np.uint8)


def test_a_signal_ends_a_long_call_at_once() -> None:
    codec, ids, logprobs, out = long_call()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            codec.encode(ids, logprobs, out=out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not out[-1].any(), "the call went on to its end"
    codec.encode(ids[:300], logprobs[:300], out=out[:300])


def test_outputs_share_no_memory() -> None:
    codec, ids, logprobs, _ = long_call()
    data = codec.encode(ids[:4], logprobs[:4])
    both = np.zeros(2 * 4 * codec.k, np.int64)
    first = both[: 4 * codec.k].reshape(4, -1)
    overlapping = both.view(np.float32)[4 * codec.k : 8 * codec.k].reshape(4, -1)
    apart = both.view(np.float32)[8 * codec.k : 12 * codec.k].reshape(4, -1)
    with refused(InputError, "out[1]"):
        codec.decode(data, out=(first, overlapping))
    with refused(InputError, "out"):
        codec.decode_torch(torch.from_numpy(data), out=(torch.from_numpy(first), torch.from_numpy(overlapping)))
    codec.decode(data, out=(first, apart))
    np.testing.assert_array_equal(first, ids[:4])


def test_two_threads_cannot_write_into_one_array() -> None:
    codec, ids, logprobs, out = long_call()
    started = threading.Event()

    def encode() -> None:
        started.set()
        codec.encode(ids, logprobs, out=out)

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        started.wait()
        with refused(InputError, "out"):
            while thread.is_alive():
                codec.encode(ids[:8], logprobs[:8], out=torch.from_numpy(out[:8]).numpy())
    finally:
        thread.join()
    np.testing.assert_array_equal(codec.encode(ids[:8], logprobs[:8]), out[:8])


def test_descriptions_identify_a_codec() -> None:
    codec = Codec(preset("recommended", vocab_size=49_152))
    assert codec.bytes_per_token == 312
    description = json.loads(json.dumps(codec.to_dict()))
    assert Codec.from_dict(description) == codec == pickle.loads(pickle.dumps(codec))
    assert Codec(preset("recommended", vocab_size=49_153)) != codec
    with refused(UnsupportedVersionError, "3"):
        Codec.from_dict({**description, "version": 3})
    with refused(UnsupportedVersionError, "sparse"):
        Codec.from_dict({**description, "format": "sparse"})
    with pytest.raises(CorruptDataError):
        Codec.from_dict({"format": "quantized"})


def test_presets_have_the_published_sizes() -> None:
    sizes = [(32_000, 296, 108), (50_257, 312, 114), (128_256, 328, 121), (151_936, 344, 127)]
    for vocab, recommended, budget in sizes:
        assert Codec(preset("recommended", vocab_size=vocab)).bytes_per_token == recommended, vocab
        assert Codec(preset("budget", vocab_size=vocab)).bytes_per_token == budget, vocab


def test_decodes_in_a_forked_child_of_a_threaded_parent() -> None:
    import multiprocessing

    codec, _, data = golden("q_recommended")
    many = np.tile(data, (40, 1))
    codec.decode(many)  # starts the thread pool here
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        results = pool.map_async(codec.decode, [many, many]).get(timeout=60)
    for ids, _ in results:
        np.testing.assert_array_equal(ids, codec.decode(many)[0])
