"""The format sampled: draws from a teacher's distributions, from dense logits to a student's gradient."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

from distillkit.bench.sample import bundled_sample
from distillkit.capture import capture
from distillkit.codec import Codec, Prior, SampledConfig, codec_config, draws_from_logits, uniforms
from distillkit.codec.draws import _on_device
from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.hub.dataset_card import dataset_card
from distillkit.losses.config import LINEAR_LOSSES, LOSS_NAMES, LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Positions, Targets, TeacherLogits
from distillkit.losses.registry import LOSSES, loss
from distillkit.models.head import check_lm_head
from distillkit.reports.inspection import inspect_dataset
from distillkit.reports.inspection_page import inspection_page
from distillkit.reports.inspection_plots import plot_inspection
from distillkit.shards import Dataset, Header, ShardWriter, convert, load_prior, read_manifest, verify_dataset
from distillkit.shards.convert import target_codec
from distillkit.shards.repack import pack_dataset
from distillkit.training.run import train
from distillkit.types import Draws, SparseLogprobs
from support.capturing import files
from support.capturing import run as run_capture
from support.cli import run_here
from support.compact_reference import decode_sampled
from support.refusals import check_names, refused
from support.teachers import HEAD
from support.training import losses_of, run_config, save_student, tiny_model

VOCABULARY = 300
NUMBER = 20


def drawn(rows: int, first: int = 0, number: int = NUMBER) -> SparseLogprobs:
    """Draws from distributions with some ids in common."""
    generator = np.random.default_rng(first)
    topics = np.random.default_rng(0).normal(size=(5, VOCABULARY)) * 3
    logits = topics[generator.integers(5, size=rows)] + generator.normal(size=(rows, VOCABULARY))
    return draws_from_logits(logits.astype(np.float32), uniforms([first], rows, number))


def counts_of(rows: SparseLogprobs, width: int) -> npt.NDArray[np.int64]:
    """(R, width) how often each id was drawn."""
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    counts = np.zeros((len(ids), width), np.int64)
    number = 0 if rows.draws is None else rows.draws.number
    there = np.isfinite(logprobs)
    row = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    np.add.at(
        counts, (row[there], ids[there]), np.rint(np.exp(logprobs[there].astype(np.float64)) * number).astype(int)
    )
    return counts


def softmax(logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def deviations(chi_square: float, degrees: int) -> float:
    """How many standard deviations a χ² is from its mean, which is nearly normal for many degrees of freedom."""
    return (chi_square - degrees) / np.sqrt(2 * degrees)


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_are_distributed_as_the_softmax(temperature: float) -> None:
    logits = (np.random.default_rng(1).normal(size=VOCABULARY) * 1.5).astype(np.float32)
    logits[[0, 131, VOCABULARY - 1]] = -np.inf
    rows, number = 2_000, 50
    numbers = uniforms([1, 2, 3], rows, number)
    found = draws_from_logits(np.broadcast_to(logits, (rows, VOCABULARY)), numbers, temperature=temperature)
    counts = counts_of(found, VOCABULARY)
    assert (counts.sum(-1) == number).all()
    expected = softmax(logits, temperature) * rows * number
    possible = expected > 0
    assert (counts.sum(0)[~possible] == 0).all()
    chi_square = ((counts.sum(0) - expected)[possible] ** 2 / expected[possible]).sum()
    assert abs(deviations(chi_square, possible.sum() - 1)) < 4
    # Draws of a row are independent: the counts of an id vary as a binomial's do.
    p = softmax(logits, temperature)[possible]
    assert counts[:, possible].var(0).sum() == pytest.approx(number * (p * (1 - p)).sum(), rel=0.02)
    # Another seed, position or document makes others.
    for other in (uniforms([1, 2, 3], rows, number, seed=1), uniforms([1, 2, 4], rows, number), numbers[::-1]):
        assert (other != numbers).mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_draws_as_the_cpu_does(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    logits[3, 40:] = -torch.inf
    numbers = uniforms([7], 40, 60)
    native, ours = draws_from_logits(logits, numbers, temperature=1.3), _on_device(logits, numbers, Draws(60, 1.3))
    assert native.draws == ours.draws == Draws(60, 1.3)
    assert torch.equal(*(torch.as_tensor(rows.ids) for rows in (native, ours)))
    assert torch.equal(*(torch.as_tensor(rows.logprobs) for rows in (native, ours)))
    for bad in (torch.nan, torch.inf):
        logits[5, 9] = bad
        for draw in (draws_from_logits, lambda given, n: _on_device(given, n, Draws(60))):
            with refused(InputError, "row"):
                draw(logits, numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_as_the_cpu_does() -> None:
    logits = torch.randn(200, 151_936, generator=torch.Generator().manual_seed(0)).mul(3)
    numbers = uniforms([7], 200, 50)
    native, ours = draws_from_logits(logits, numbers), draws_from_logits(logits.cuda(), numbers)
    assert ours.ids.device.type == "cuda"  # type: ignore[union-attr]
    there = SparseLogprobs(*(each.cpu() for each in ours.tensors()), ours.draws)
    same = (counts_of(native, 151_936) == counts_of(there, 151_936)).all(-1)
    # Exponentials are rounded otherwise there.
    assert same.mean() > 0.98


# -- the codec ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.learn(SampledConfig(vocab_size=VOCABULARY, draws=NUMBER), drawn(3_000))


@pytest.mark.parametrize("learned", [False, True])
def test_draws_come_back_as_they_were(prior: Prior, learned: bool) -> None:
    config = SampledConfig(vocab_size=VOCABULARY, draws=NUMBER)
    codec = Codec(config, prior=prior if learned else None)
    given = drawn(200, first=9)
    data = codec.encode_document(given)
    found = codec.decode_document(data, 200)
    # By falling count, then ascending id: the order in which draws are made, too.
    for name in ("ids", "logprobs"):
        assert (getattr(found, name) == getattr(given, name)).all()
    assert found.draws == codec.draws == Draws(NUMBER)
    assert sum(codec.sizes(data, 200).values()) == pytest.approx(len(data), abs=1)
    assert codec.row_bits(data, 200).sum() / 8 == pytest.approx(len(data), rel=0.02)
    joined = codec.join_documents([(data, 200, slice(150, 200)), (data, 200, slice(0, 3))])
    assert (codec.decode_document(joined, 53).ids == np.concatenate([found.ids[150:], found.ids[:3]])).all()
    assert pickle.loads(pickle.dumps(codec)).encode_document(given) == data
    assert codec_config(json.loads(codec.config.model_dump_json())) == codec.config
    if learned:
        assert prior.config == config.without_prior()
        assert len(data) < 0.9 * len(Codec(config).encode_document(given))
        # As FORMAT.md §5 has it.
        ids, counts = decode_sampled(prior.data, data, 200)
        assert (ids == found.ids).all()
        assert (counts == np.rint(np.exp(found.logprobs) * NUMBER)).all()


def test_what_was_not_drawn_is_refused(prior: Prior) -> None:
    codec = Codec(SampledConfig(vocab_size=VOCABULARY, draws=NUMBER), prior=prior)
    given = drawn(20)
    ids, logprobs = np.asarray(given.ids), np.asarray(given.logprobs)
    with refused(InputError, "distribution", f"{NUMBER} draws"):
        codec.encode_document(SparseLogprobs(ids, logprobs))
    with refused(InputError, "0.5", f"{NUMBER} draws"):
        codec.encode_document(SparseLogprobs(ids, logprobs, Draws(NUMBER, 0.5)))
    compact = Codec({"vocab_size": VOCABULARY, "k": 4, "step": 0.01})
    with refused(InputError, f"{NUMBER} draws"):
        compact.encode_document(given)
    for row, column, value, fact in ((3, 0, logprobs[3, 0] - 0.05, "row 3"), (7, 0, np.nan, "row 7")):
        other = logprobs.copy()
        other[row, column] = value
        with refused(InputError, fact):
            codec.encode_document(SparseLogprobs(ids, other, Draws(NUMBER)))
    for value in (VOCABULARY, -1, ids[5, 1]):
        other = ids.copy()
        other[5, 0] = value
        with refused(InputError, "row 5"):
            codec.encode_document(SparseLogprobs(other, logprobs, Draws(NUMBER)))
    for fields in ({"draws": 0}, {"draws": 5000}, {"temperature": 0}, {"seed": -1}, {"k": 3}):
        with refused(ConfigError, *fields):
            SampledConfig(**{"vocab_size": VOCABULARY, "draws": NUMBER, **fields})
    with refused(ConfigError, "20", "21"):
        Codec(SampledConfig(vocab_size=VOCABULARY, draws=21), prior=prior)


def test_damage_is_noticed(prior: Prior) -> None:
    """Every prefix and every flipped bit; with the checksum made right again, at least rows of so many draws."""
    codec = Codec(SampledConfig(vocab_size=VOCABULARY, draws=NUMBER), prior=prior)
    data = codec.encode_document(drawn(6, first=3))
    for end in range(len(data)):
        with pytest.raises(CorruptDataError):
            codec.decode_document(data[:end], 6)
    decoded = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            codec.decode_document(bytes(damaged), 6)
        damaged[:4] = (xxhash.xxh3_64_intdigest(damaged[4:]) % 2**32).to_bytes(4, "little")
        try:
            found = codec.decode_document(bytes(damaged), 6)
        except CorruptDataError:
            continue
        decoded += 1
        counts = counts_of(found, VOCABULARY)
        assert (counts.sum(-1) == NUMBER).all()
        assert ((counts > 0).sum(-1) == np.isfinite(found.logprobs).sum(-1)).all()
    assert 0 < decoded < 8 * len(data)
    with refused(CorruptDataError, "0 or 1"):
        Codec({"vocab_size": VOCABULARY, "k": NUMBER, "step": 0.01}).decode_document(data, 6)


CASES = json.loads((Path(__file__).parent / "golden" / "sampled.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_documents_decode_to_what_was_recorded(case: dict[str, Any]) -> None:
    prior = None if case["prior"] is None else Prior(bytes.fromhex(case["prior"]))
    codec, document = Codec(SampledConfig(**case["config"]), prior=prior), bytes.fromhex(case["document"])
    found = codec.decode_document(document, case["rows"])
    ids, counts = (np.array(case[name]).reshape(case["rows"], codec.k) for name in ("ids", "counts"))
    assert (found.ids == ids).all()
    with np.errstate(divide="ignore"):
        assert (found.logprobs == np.log(counts / case["config"]["draws"]).astype(np.float32)).all()
    # Tables of the built-in prior are not on the page.
    if prior is not None and document[4] == 2:
        assert all(
            (a == b).all()
            for a, b in zip(decode_sampled(prior.data, document, case["rows"]), (ids, counts), strict=True)
        )


# -- losses ------------------------------------------------------------------------------------------------------------


def of_draws(logits: torch.Tensor, teacher: npt.NDArray[np.float32], temperature: float, seeds: int) -> torch.Tensor:
    """(seeds, V) gradients of kl at a student's logits, for draws of a teacher's distribution by each seed."""
    numbers = np.concatenate([uniforms([1, 2], 1, NUMBER, seed=seed) for seed in range(seeds)])
    rows = draws_from_logits(torch.from_numpy(teacher).expand(seeds, -1).contiguous(), numbers, temperature=temperature)
    leaf = logits.expand(seeds, -1).clone().requires_grad_()
    loss("kl", missing_probability_handling="uniform")(
        Positions(leaf, Targets(torch.zeros(seeds).long(), rows))
    ).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_the_dense_one_on_average(temperature: float) -> None:
    """χ² of the mean over 2,000 seeds: by definition T·(q − w), with w the shares of multinomial draws of p."""
    seeds, generator = 2_000, np.random.default_rng(4)
    teacher = (generator.normal(size=40) * 2).astype(np.float32)
    student = torch.from_numpy((generator.normal(size=40)).astype(np.float32))
    leaf = student[None].clone().requires_grad_()
    dense = Positions(leaf, Targets(torch.zeros(1).long(), TeacherLogits(torch.from_numpy(teacher)[None])))
    loss("kl", temperature=temperature)(dense).sum().backward()
    assert leaf.grad is not None
    p = softmax(teacher, temperature)
    mean = of_draws(student, teacher, temperature, seeds).double().mean(0)
    difference = (mean - leaf.grad[0].double()).numpy() / temperature
    chi_square = seeds * NUMBER * (difference**2 / p).sum()
    assert abs(deviations(float(chi_square), len(p) - 1)) < 4
    # The test can fail: shares of draws at temperature 1, softened, are others on average.
    plain = np.concatenate([uniforms([1, 2], 1, NUMBER, seed=seed) for seed in range(seeds)])
    counts = counts_of(draws_from_logits(np.broadcast_to(teacher, (seeds, 40)), plain), 40)
    softened = counts ** (1 / temperature)
    shares = (softened / softened.sum(-1, keepdims=True)).mean(0)
    if temperature != 1.0:
        assert deviations(float(seeds * NUMBER * ((shares - p) ** 2 / p).sum()), len(p) - 1) > 100


def test_losses_that_draws_do_not_allow_are_refused() -> None:
    rows = drawn(3)
    tensors = SparseLogprobs(torch.as_tensor(rows.ids), torch.as_tensor(rows.logprobs), rows.draws)
    positions = Positions(torch.zeros(3, VOCABULARY), Targets(torch.zeros(3).long(), tensors))
    for name in LOSS_NAMES:
        if name in LOSSES and name not in LINEAR_LOSSES:
            with refused(ConfigError, name, "kl"):
                loss(name)(positions)
    with refused(ConfigError, "temperature", "2", "1"):
        loss("kl", temperature=2.0)(positions)
    # All that an evaluation measures works, and is what the definition says.
    head = check_lm_head(tiny_model(vocabulary=VOCABULARY))
    found = Objective.training([LossConfig(function="kl", weight=1.0)]).evaluation()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = found(head, hidden, Targets(torch.zeros(3).long(), tensors))
        log_q = (hidden @ head.weights()[0].T).double().log_softmax(-1).numpy()
    shares = counts_of(rows, VOCABULARY) / NUMBER
    expected = (shares * (np.log(np.maximum(shares, 1e-30)) - log_q)).sum()
    for name in ("eval:kl", "eval:kl_with_rest", "kl"):
        assert result.statistics[0, found.names.index(name)].item() == pytest.approx(expected, rel=1e-5)


# -- captures and datasets ---------------------------------------------------------------------------------------------

SAMPLED = {"sampled": {"vocab_size": HEAD, "draws": 12, "temperature": 1.5, "seed": 3}}


@pytest.fixture(scope="module")
def captured(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "captured"
    report = run_capture(teacher, text, folder, compression_config=SAMPLED, prior_rows=1500, preset=None)
    # The shares of draws sum to 1, which says nothing of the teacher.
    assert (report.kl_mean, report.mass_mean, report.mass_quantiles) == (None, None, {})
    return folder


@torch.no_grad()
def test_a_capture_draws_from_the_teacher(teacher: Path, text: Path, captured: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    dataset = Dataset.open(captured)
    assert (dataset.header.temperature, dataset.header.codec["config"]["seed"]) == (1.5, 3)
    assert dataset.header.prior == load_prior(captured).hash
    same = total = 0
    for document in (dataset[index] for index in range(0, len(dataset), 7)):
        found = dataset.codec.decode_document(document.teacher, document.num_rows)
        ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
        p = softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].numpy(), 1.5)
        numbers = uniforms(document.input_ids, len(p), 12, seed=3)
        # By definition: the first id up to which the probabilities add up to more than the number.
        expected = (np.cumsum(p, -1)[:, None, :] <= numbers[:, :, None]).sum(-1)
        counts = np.stack([np.bincount(row, minlength=HEAD) for row in expected])
        same += int((counts == counts_of(found, HEAD)).all(-1).sum())
        total += len(p)
    assert same > 0.99 * total > 100
    assert verify_dataset(captured).ok
    # Whatever is computed together, however the capture is divided; and other draws by another seed.
    options = {"compression_config": SAMPLED, "prior": str(captured / "prior.bin"), "preset": None}
    run_capture(teacher, text, tmp_path / "other", **options, batch_tokens=64, head_rows=7)  # type: ignore[arg-type]
    other = Dataset.open(tmp_path / "other")
    pairs = [
        [each.codec.decode_document(each[i].teacher, each[i].num_rows) for each in (dataset, other)]
        for i in range(len(dataset))
    ]
    differ = sum(int((a.ids != b.ids).any(-1).sum()) for a, b in pairs)
    assert differ < 0.002 * dataset.num_rows
    seeded = {"sampled": {**SAMPLED["sampled"], "seed": 4}}
    run_capture(teacher, text, tmp_path / "seeded", **{**options, "compression_config": seeded}, samples=5)  # type: ignore[arg-type]
    third = Dataset.open(tmp_path / "seeded")
    places = [document.doc_id for document in dataset]
    for document in third:
        found, before = (
            third.codec.decode_document(document.teacher, document.num_rows),
            pairs[places.index(document.doc_id)][0],
        )
        assert document.num_rows < 5 or (found.ids != before.ids).any(-1).mean() > 0.8


def test_captures_that_cannot_draw_are_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    places = {"model": str(teacher), "dataset": str(text), "output": str(tmp_path / "out")}
    for codec in ({"preset": "sampled-50"}, {"compression_config": SAMPLED}):
        for options, fact in (({"engine": "vllm"}, "vllm"), ({"keep_ids": [1]}, "keep_ids")):
            with refused(ConfigError, fact, "sampled"):
                capture(**places, **codec, **options)


def test_datasets_of_draws_are_not_converted_to_others(captured: Path, tmp_path: Path) -> None:
    source = Dataset.open(captured)
    own = source.codec.config
    assert isinstance(own, SampledConfig)
    size, path = own.vocab_size, str(captured)
    with refused(InputError, path, "12 draws"):
        target_codec(source, codec_config({"vocab_size": size, "k": 8, "step": 0.01}), folder=tmp_path / "to")
    with refused(InputError, path, "draws", "12", "20"):
        target_codec(source, own.without_prior().model_copy(update={"draws": 20}), folder=tmp_path / "to")
    # With another prior, the draws are the same.
    fresh = Codec(own.without_prior())
    convert(source, tmp_path / "builtin", codec=fresh)
    for ours, theirs in zip(Dataset.open(tmp_path / "builtin"), source, strict=True):
        found, original = (
            fresh.decode_document(ours.teacher, ours.num_rows),
            source.codec.decode_document(theirs.teacher, theirs.num_rows),
        )
        assert (found.ids == original.ids).all()
        assert (found.logprobs == original.logprobs).all()
    exact = Dataset.open(_exact(tmp_path / "exact"))
    with refused(InputError, "exact", "transformers"):
        target_codec(exact, SampledConfig(vocab_size=exact.codec.vocab_size, draws=5), folder=tmp_path / "to")


def _exact(folder: Path) -> Path:
    sample = bundled_sample()
    codec = Codec({"vocab_size": sample.vocab_size, "k": 8, "step": 0.01})
    header = Header(codec=codec.to_dict(), vocab_size=sample.vocab_size, head_size=sample.vocab_size)
    with ShardWriter(folder, header) as writer:
        rows = SparseLogprobs(sample.ids[:5, :8].copy(), sample.logprobs[:5, :8].copy())
        writer.write(np.append(0, rows.ids[:, 0]).astype(np.int32), rows)
    return folder


def test_an_inspection_says_how_noisy_the_draws_are(captured: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(captured)
    found = inspect_dataset(dataset)
    counts = np.concatenate([counts_of(rows, HEAD) for _, rows in dataset.decoded()])
    distinct = (counts > 0).sum(-1)
    assert found.ids_mean == pytest.approx(distinct.mean())
    shares = counts / 12
    assert found.draws is not None
    assert found.draws.number == 12
    assert found.draws.effective_ids == pytest.approx((1 / (shares**2).sum(-1)).mean(), rel=1e-6)
    # Σ var(w) = (1 − Σ p²) / N, of which 1 − Σ w² over N − 1 is the unbiased estimate; at most 1 / N.
    assert found.draws.variance == pytest.approx(((1 - (shares**2).sum(-1)) / 11).mean(), rel=1e-6)
    assert found.draws.variance <= found.draws.variance_bound == pytest.approx(1 / 12)
    assert found.plausible
    assert not found.doubts
    assert found.fidelity is None
    page = inspection_page(found)
    assert "effective ids" in page
    assert "Stored probability" not in page
    plot_inspection(found, tmp_path / "plot.png")
    result = run_here("inspect", captured)
    assert f"{found.draws.effective_ids:.1f}" in result.stdout
    assert "12 draws" in run_here("show", captured, "--tokens", "0:3").stdout
    card = dataset_card(read_manifest(captured), dataset.codec, "me/draws")
    check_names(card, "12 draws")
    size = re.search(r"([\d.]+) bytes with all else", card)
    assert size is not None
    # Of nine small shards, in which Parquet's page headers are not told from what they head.
    assert float(size[1]) == pytest.approx(found.total_bytes, abs=0.1)
    assert "most probable" not in card
    assert "probability of the stored ids" not in card


def test_a_student_is_trained_with_draws(captured: Path, teacher: Path, tmp_path: Path) -> None:
    student = save_student(tmp_path / "student", vocabulary=HEAD)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path(student) / file).write_bytes((teacher / file).read_bytes())
    kl = [{"function": "kl", "weight": 1.0}]
    arguments = {"max_steps": 25}
    config = run_config(student, tmp_path / "out", str(captured), loss_functions=kl, training_args=arguments)
    train(config)
    losses = losses_of(tmp_path / "out")
    assert np.mean([losses[step] for step in range(21, 26)]) < 0.8 * losses[1]
    assert "stored draws: 12" in (tmp_path / "out" / "report.md").read_text()
    for losses_given, fact in (
        ([*kl, {"function": "jsd", "weight": 0.5}], "jsd"),
        ([{"function": "kl", "weight": 1.0, "temperature": 2.0}], "1.5"),
    ):
        config = run_config(student, tmp_path / "refused", str(captured), loss_functions=losses_given)
        with refused(ConfigError, "loss_functions", fact, str(captured)):
            train(config)
    packed = tmp_path / "packed"
    pack_dataset(Dataset.open(captured), packed, 128)
    assert Dataset.open(packed).codec == Dataset.open(captured).codec
    assert files(packed)["prior.bin"] == files(captured)["prior.bin"]
