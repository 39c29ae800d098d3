"""The order of the package's layers: nothing imports to its right, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "distillkit"
# Left to right as data flows. Packages that share a place know nothing of each other.
LAYERS: tuple[set[str], ...] = (
    {"_native"},
    {"errors"},
    {"types", "memory", "console", "configuration"},
    {"codec"},
    {"shards", "models"},
    {"text", "losses"},
    {"capture"},
    {"reports"},
    {"training"},
    {"bench"},
    {"cli"},
)
# Public spellings and entry points: a few lines each over the layers, which never use them.
SPELLINGS = {"__main__", "bits", "config", "pack_logits", "sample_logits_vllm"}


def imports() -> dict[str, set[str]]:
    """Return what each module imports of the package, lazily or not: `codec.codec` → {`_native`, `errors`, …}."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    modules = {".".join(parts).removesuffix(".__init__"): path for parts, path in paths.items()}
    del modules["__init__"]
    return {name: _targets(path, modules) - {name, ""} for name, path in modules.items()}


def _targets(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "distillkit":
            continue
        parent = (node.module or "").removeprefix("distillkit").removeprefix(".")
        children = [f"{parent}.{alias.name}".removeprefix(".") for alias in node.names]
        found |= {child if child in modules or child == "_native" else parent for child in children}
    return found


def layer(module: str) -> int:
    """Return the place of a module's layer."""
    return next(place for place, packages in enumerate(LAYERS) if module.partition(".")[0] in packages)


def arrows() -> list[tuple[str, str]]:
    """Return (importing module, imported module) of all modules that are in a layer."""
    return [(name, target) for name, targets in imports().items() if name not in SPELLINGS for target in targets]


def test_nothing_imports_to_its_right() -> None:
    package = {name: name.partition(".")[0] for arrow in arrows() for name in arrow}
    wrong = [(a, b) for a, b in arrows() if b in SPELLINGS or (package[a] != package[b] and layer(b) >= layer(a))]
    assert wrong == []


def test_capture_and_training_are_independent() -> None:
    between = {("capture", "training"), ("training", "capture")}
    assert [(a, b) for a, b in arrows() if (a.partition(".")[0], b.partition(".")[0]) in between] == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph, done = imports(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_top_level_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10
