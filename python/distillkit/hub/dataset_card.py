"""The dataset card of a capture, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillkit.capture.summary import ShardSummary
from distillkit.codec import Codec, CompactConfig
from distillkit.codec.presets import preset_of
from distillkit.configuration.cards import front_matter, hub_id, public_name
from distillkit.console import human_bytes, number_of
from distillkit.reports.run_report import MARKDOWN, table
from distillkit.shards import Manifest

__all__ = ["CARD_MARK", "dataset_card"]

CARD_MARK = "<!-- written by distillkit push; remove this line to keep the card as you edit it -->"
"""Tells our cards from those that users wrote, which are kept."""

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_COLUMNS = (
    ("doc_id", "hash of the token ids and of what else decides the document"),
    ("input_ids", "the document's token ids"),
    ("teacher", "the encoded distributions, decoded by distillkit"),
    ("checksum", "of the document's other fields, checked when it is read"),
    ("loss_mask", "which tokens count in a loss; null if all do"),
    ("segment_lengths", "lengths of the documents packed into one row; null if it is not packed"),
    ("label_logprobs", "the teacher's log-probability of each next token, if it was stored"),
)

_COUNTED = {"all": "all tokens", "assistant": "the assistant's turns", "completion": "the responses"}


def dataset_card(manifest: Manifest, codec: Codec, repo: str, license: str | None = None) -> str:
    """Compose the card of a capture in Markdown, with a YAML header.

    Args:
        manifest: that of the capture.
        codec: what decodes its rows.
        repo: the dataset's hub id.
        license: SPDX identifier or the hub's name of a licence; None leaves it open.
    """
    header, shards = manifest.header, manifest.shards
    documents = sum(shard.documents for shard in shards)
    teacher = (header.teacher or {}).get("name")
    fields = {
        "license": license,
        "pretty_name": repo.rpartition("/")[2],
        "task_categories": ["text-generation"],
        "size_categories": [next((name for most, name in _SIZES if documents < most), "n>10M")],
        "tags": ["distillkit", "knowledge-distillation", "logits"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data-*.parquet"}]},
        ],
    }
    whose = _teacher(teacher) if teacher else "a teacher that is not recorded"
    licence = (
        "The licences of the teacher and of the documents apply to what was made of them."
        if license
        else "No licence was chosen for it; those of the teacher and of the documents apply to what was made of them."
    )
    sections = [
        front_matter(fields),
        CARD_MARK,
        f"# {repo.rpartition('/')[2]}",
        f"{'Next-token distributions' if codec.draws is None else 'Draws from the next-token distributions'} of "
        f"{whose} over {number_of(documents, 'document')}, {_origin(manifest)} with "
        "[distillkit](https://pypi.org/project/distillkit/) for training smaller models (knowledge distillation).",
        table(("", ""), _facts(manifest, codec)),
        "## Read it",
        _reading(repo),
        f"Only what is used is downloaded. Each row of `rows` has {_row(codec)}.",
        "## Train on it",
        _training(repo),
        "The student needs the tokenizer named above; this is checked before the first step.",
        "## Columns",
        table(("column", "content"), [(f"`{name}`", about) for name, about in _COLUMNS]),
        "Other columns were kept from the source's rows. How the distributions are encoded is in the files' metadata "
        "and in `manifest.json`.",
        "## Licence and privacy",
        f"{licence} The token ids are the documents: whoever can read this dataset can read the text.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(manifest: Manifest, codec: Codec) -> list[tuple[str, str]]:
    header, shards = manifest.header, manifest.shards
    tokens, rows, size = (sum(getattr(shard, name) for shard in shards) for name in ("tokens", "rows", "bytes"))
    size += 0 if codec.prior is None else len(codec.prior.data)
    named = preset_of(codec.config)
    facts = [
        ("teacher", _named(header.teacher, "revision", "dtype")),
        ("tokenizer", _named(header.tokenizer, "fingerprint")),
        ("vocabulary", f"{header.vocab_size:,} ids, logits {header.head_size:,} wide"),
        ("documents", f"{sum(shard.documents for shard in shards):,}"),
        ("tokens", f"{tokens:,}"),
        ("distributions", f"{rows:,}, temperature {header.temperature:g}"),
        ("size", f"{human_bytes(size)} in {number_of(len(shards), 'shard')}"),
        ("per distribution", f"{_stored_ids(codec)}, {size / max(rows, 1):,.1f} bytes with all else"),
        ("codec", f"{codec.format} version {header.codec['version']}" + (f", preset `{named}`" if named else "")),
    ]
    if counted := _COUNTED.get(header.capture.get("loss_on", "auto")):
        facts.append(("counted in a loss", counted))
    fidelity = header.fidelity
    if fidelity is not None and fidelity.get("rows") and codec.draws is None:
        # Of what was made of a capture, the teacher's own rows are not at hand.
        compared = {"converted": "converted from", "retokenized": "retokenized", "merged": "average"}
        original = next((name for key, name in compared.items() if key in header.changes), "teacher")
        facts += [
            (f"KL({original} ‖ stored)", f"mean {fidelity['kl_mean']:.2e}, p99 {fidelity['kl_p99']:.2e} nats"),
            ("most probable id kept", f"{fidelity['top1_agreement']:.2%} of the distributions"),
        ]
    summary = (manifest.capture or {}).get("summary")
    mass = None if summary is None else ShardSummary.from_dict(summary).mass_mean
    if mass is not None and codec.draws is None:
        facts.append(("probability of the stored ids", f"{mass:.2%} on average"))
    longest = header.capture.get("max_seq_len")
    if isinstance(longest, int):
        facts.append(("longest document", f"at most {longest:,} tokens"))
    return facts


def _origin(manifest: Manifest) -> str:
    header = manifest.header
    made = "captured" if header.capture.get("dataset") else "written"
    return ", ".join([made, *(MARKDOWN.fact(change) for change in header.changes.values())])


def _row(codec: Codec) -> str:
    if codec.draws is not None:
        return f"the ids that {codec.draws.number:,} draws gave, and the logarithms of their shares of the draws"
    return "the ids and log-probabilities of the teacher's most probable next tokens"


def _stored_ids(codec: Codec) -> str:
    if isinstance(codec.config, CompactConfig) and codec.config.threshold is not None:
        return f"the ids of a probability of at least {codec.config.threshold:g}, at most {codec.k:,}"
    if codec.draws is not None:
        return f"{codec.draws.number:,} draws"
    return f"the {codec.k:,} most probable ids"


def _named(recorded: Mapping[str, Any] | None, *details: str) -> str:
    if recorded is None:
        return "not recorded"
    known = ", ".join(MARKDOWN.name(recorded[name]) for name in details if recorded.get(name))
    return _teacher(recorded["name"]) + (f" ({known})" if known else "")


def _teacher(name: str) -> str:
    """A model's name, linked if it is on the hub."""
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{found})" if found else MARKDOWN.name(public_name(name))


def _reading(repo: str) -> str:
    return (
        "```python\nimport distillkit  # pip install 'distillkit[hub]'\n\n"
        f'dataset = distillkit.Dataset.open("hf://datasets/{repo}")\n'
        "rows = dataset.decode(0)  # the teacher's distributions over the first document\n```"
    )


def _training(repo: str) -> str:
    return (
        "```yaml\nmodel: Qwen/Qwen3-0.6B  # any student with the same tokenizer\noutput_path: ./trained\n"
        f"sequence_length: 1024\ndataset: {{train_dataset: {{repo_id: {repo}}}}}\nteacher: {{kind: dataset}}\n```"
    )
