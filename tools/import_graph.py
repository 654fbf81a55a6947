"""Which file of the package imports which, read from the source: nothing is imported.

Counted are imports inside functions and under TYPE_CHECKING too, but not the `__init__` files that
Python runs on the way to a module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]

ROOT = Path(__file__).parents[1]
PACKAGE = "geomwatch"


def sources() -> dict[str, Path]:
    """Return the package's modules by name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def by_file(modules: Mapping[str, Path]) -> Graph:
    """Return what each module imports of the others."""
    return {
        name: {m for m in _imported(path, modules) if m in modules and m != name}
        for name, path in modules.items()
    }


def by_package(graph: Graph) -> Graph:
    """Join the modules of a sub-package; those of the root stay as they are."""
    joined: Graph = {}
    for name, imports in graph.items():
        own = package_of(name)
        joined.setdefault(own, set()).update(package_of(m) for m in imports)
        joined[own].discard(own)
    return joined


def package_of(name: str) -> str:
    """Return geomwatch.vectors for geomwatch.vectors.layout, and geomwatch.cli for itself."""
    return ".".join(name.split(".")[:2])


def cycle(graph: Graph) -> list[str]:
    """Return modules that import one another in a circle; none if there are none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((c for m in sorted(graph[name]) if (c := search(m, [*way, name]))), [])
        done.add(name)
        return found

    return next((c for name in sorted(graph) if (c := search(name, []))), [])


def longest_chain(graph: Graph) -> list[str]:
    """Return the longest way of imports through a graph without a cycle."""
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            below = (chain(m) for m in sorted(graph[name]))
            chains[name] = [name, *max(below, key=len, default=[])]
        return chains[name]

    return max((chain(name) for name in sorted(graph)), key=len, default=[])


def _imported(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module
