"""The order of the package's layers: nothing imports to its right, and no modules import each other in a circle."""

from __future__ import annotations

from pathlib import Path

from structure import arrows_of_rooms, circles, levels, module_imports, room

PACKAGE = Path(__file__).parents[1] / "python" / "distillkit"
# Left to right as data flows. Packages that share a place know nothing of each other.
LAYERS: tuple[set[str], ...] = (
    {"errors"},
    {"types", "memory", "console", "configuration"},
    {"codec"},
    {"shards", "models"},
    {"text", "losses"},
    {"capture", "retokenize"},
    {"reports"},
    {"training"},
    {"bench", "hub"},
    {"cli"},
)
# Public spellings and entry points: a few lines each over the layers, which never use them.
SPELLINGS = {"__main__", "bits", "config", "pack_logits", "sample_logits_vllm"}


IMPORTS = module_imports(PACKAGE)
ARROWS = [(name, target) for name, targets in IMPORTS.items() if name not in SPELLINGS for target in targets]


def layer(module: str) -> int:
    """Return the place of a module's layer."""
    return next(place for place, rooms in enumerate(LAYERS) if room(module) in rooms)


def test_paths_and_urls_are_told_apart_in_one_place() -> None:
    """fsspec reads `a::b` as a chain of URLs and `a*` as a pattern, and would write or remove something else."""
    words = ("url_to_fs", "fsspec.open", "open_files", "filesystem.glob", '"://"')
    modules = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    modules.pop(Path("configuration/urls.py"))
    assert [(path, word) for path, text in modules.items() for word in words if word in text] == []


def test_nothing_imports_to_its_right() -> None:
    wrong = [(a, b) for a, b in ARROWS if b in SPELLINGS or (room(a) != room(b) and layer(b) >= layer(a))]
    assert wrong == []


# Captures and training ask servers, and start vLLM, in the same way.
ENGINE = {"capture.engine_settings"}
ENGINE |= {f"capture.teachers.{name}" for name in ("base", "connection", "hf", "openai", "vllm")}


def test_capture_and_training_only_share_what_asks_servers_and_starts_vllm() -> None:
    between = [(a, b) for a, b in ARROWS if {room(a), room(b)} == {"capture", "training"}]
    assert {b for _, b in between} == ENGINE


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert [part for part in circles(IMPORTS) if len(part) > 1] == []


def test_the_house_stays_small_at_the_top() -> None:
    assert levels(arrows_of_rooms(IMPORTS)) <= 10
    assert len(list(PACKAGE.glob("*.py"))) <= 10
