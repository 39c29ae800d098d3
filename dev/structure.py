"""Count the structure of a checkout: rooms, import levels, arrows, arrows upwards, circles, lines of code.

    python dev/structure.py [CHECKOUT]

A room is a folder at the top of the package, with all that is in it, or a module there. An arrow goes from a room to
another that one of its modules imports, at the top of a file or in a function. A room's level is the length of the
longest way down from it, where a circle counts as one room.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def module_imports(package: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    paths = {path.relative_to(package).with_suffix("").parts: path for path in package.rglob("*.py")}
    modules = {".".join(parts).removesuffix("__init__").removesuffix("."): path for parts, path in paths.items()}
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package.name:
                parent = (node.module or "").removeprefix(package.name).removeprefix(".")
                children = [f"{parent}.{alias.name}".removeprefix(".") for alias in node.names]
                found |= {child if child in modules else parent for child in children}
        imports[name] = (found & set(modules)) - {name, ""}
    imports.pop("", None)
    return imports


def circles(graph: Mapping[Node, Iterable[Node]]) -> list[list[Node]]:
    """Return the strongly connected components of a graph (Tarjan's algorithm), those below others first."""
    number: dict[Node, int] = {}
    least: dict[Node, int] = {}
    stack: list[Node] = []
    components: list[list[Node]] = []

    def visit(node: Node) -> None:
        number[node] = least[node] = len(number)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in number:
                visit(target)
                least[node] = min(least[node], least[target])
            elif target in stack:
                least[node] = min(least[node], number[target])
        if least[node] == number[node]:
            start = stack.index(node)
            components.append(stack[start:])
            del stack[start:]

    for node in graph:
        if node not in number:
            visit(node)
    return components


def levels(graph: Mapping[Node, Iterable[Node]]) -> int:
    """Return the number of nodes of the longest way through a graph whose circles count as one node."""
    depth: dict[Node, int] = {}
    for component in circles(graph):
        below = {target for node in component for target in graph[node]} - set(component)
        depth |= dict.fromkeys(component, 1 + max((depth[target] for target in below), default=0))
    return max(depth.values())


def lines_of(folder: Path, suffix: str) -> int:
    """Return the lines of all files with a suffix below a folder."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in folder.rglob(f"*{suffix}"))


def room(module: str) -> str:
    """Return the room that a module is in."""
    return module.partition(".")[0]


def arrows_of_rooms(imports: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Return the other rooms that each room's modules import."""
    rooms: dict[str, set[str]] = {room(module): set() for module in imports}
    for module, targets in imports.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    return rooms


def main(checkout: Path) -> None:
    """Print the counts."""
    package = checkout / "python" / "distillkit"
    imports = module_imports(package)
    rooms = arrows_of_rooms(imports)
    in_circle = {node: place for place, part in enumerate(circles(rooms)) for node in part if len(part) > 1}
    counts = {
        "Python modules": len(imports),
        "modules at the top": len(list(package.glob("*.py"))),
        "rooms": len(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "arrows within circles of rooms": sum(
            in_circle.get(a, -1) == in_circle.get(b, -2) for a, targets in rooms.items() for b in targets
        ),
        "circles of rooms": sum(len(part) > 1 for part in circles(rooms)),
        "circles of modules": sum(len(part) > 1 for part in circles(imports)),
        "import levels of modules": levels(imports),
        "import levels of rooms": levels(rooms),
        "lines of Python": lines_of(package, ".py"),
        "lines of Rust": lines_of(checkout / "rust" / "codec" / "src", ".rs"),
        "lines of tests": lines_of(checkout / "tests", ".py"),
        "lines of the README": (checkout / "README.md").read_text(encoding="utf-8").count("\n"),
    }
    for name, count in counts.items():
        print(f"{name:32}{count:>8,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
