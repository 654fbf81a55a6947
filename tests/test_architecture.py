"""The order of the packages, and how far a reader has to go: docs/architecture.md tells why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from draw_packages import PAGE, drawing, page
from import_graph import by_file, by_package, cycle, longest_chain, package_of, sources

MODULES = sources()
GRAPH = by_file(MODULES)
PACKAGES = by_package(GRAPH)

# What stands on one floor does not import one another; each imports only from floors below.
FLOORS = [
    {"errors"},
    {"records"},
    {"isolation"},
    {"parallel"},
    {"vectors", "sinks"},
    {"curvature"},
    {"stability", "losses"},
    {"estimators"},
    {"quantities"},
    {"observation"},
    {"rules"},
    {"controllers"},
    {"monitoring"},
    {"measure", "doctor"},
    {"integrations", "landscape", "report"},
    {"cli"},
    {"__main__"},
]
FACE = "geomwatch"  # its `__init__` re-exports from all floors, and nothing may import it
RE_EXPORT = {
    FACE,
    "geomwatch.rules",
    "geomwatch.controllers",
    "geomwatch.landscape",
    "geomwatch.sinks",
}

LONGEST_CHAIN = 14  # files
LONGEST_CHAIN_OF_PACKAGES = 9  # those of one file, in the root, left out
MOST_ARGUMENTS = 12
MOST_NUMBERS = 30
MOST_HAND_WRITTEN = 12  # functions that save or load a memory
JUDGED = ("rules", "controllers", "observation", "monitoring")


def floor(name: str) -> int:
    own = package_of(name).removeprefix("geomwatch.")
    return next(i for i, names in enumerate(FLOORS) if own in names)


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def test_the_root_holds_the_public_face_only():
    found = {path.stem for path in Path(MODULES[FACE]).parent.glob("*.py")}
    face = "__init__ __main__ cli records errors losses measure doctor"
    assert found == set(face.split())


def test_every_package_has_its_floor():
    assert {package_of(name) for name in GRAPH} - {FACE} == {
        f"geomwatch.{name}" for names in FLOORS for name in names
    }


def test_a_module_imports_from_floors_below_or_from_its_own_package():
    assert not [
        f"{name} -> {imported}"
        for name, imports in GRAPH.items()
        for imported in imports
        if FACE not in (name, imported)
        and package_of(name) != package_of(imported)
        and floor(imported) >= floor(name)
    ]


def test_no_module_imports_the_face():
    assert not [name for name, imports in GRAPH.items() if FACE in imports]


def test_inside_the_package_names_come_from_where_they_are_defined():
    packages = {name for name in GRAPH if is_package(name)}
    assert not [f"{name} -> {m}" for name, imports in GRAPH.items() for m in imports & packages]


def test_a_package_imports_nothing_by_itself_but_the_public_ones():
    importing = {
        name
        for name in GRAPH
        if is_package(name) and name not in RE_EXPORT and _imports(MODULES[name])
    }
    assert not importing


def test_no_imports_go_round_in_a_circle():
    assert not cycle(GRAPH)
    assert not cycle(PACKAGES)


def test_the_longest_chain_of_imports_can_be_walked():
    chain = longest_chain(GRAPH)
    assert len(chain) <= LONGEST_CHAIN, "\n".join(chain)


def test_the_longest_chain_of_packages_can_be_walked():
    folders = {name: {m for m in imports if _is_folder(m)} for name, imports in PACKAGES.items()}
    chain = longest_chain({name: i for name, i in folders.items() if _is_folder(name)})
    assert len(chain) <= LONGEST_CHAIN_OF_PACKAGES, "\n".join(chain)


def test_no_constructor_takes_more_than_can_be_held_in_mind():
    counts = {
        f"{name}.{kind.name}": _arguments(function.args)
        for name, path in MODULES.items()
        for kind in ast.walk(_tree(path))
        if isinstance(kind, ast.ClassDef)
        for function in kind.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    }
    assert not {name: count for name, count in counts.items() if count > MOST_ARGUMENTS}


def test_numbers_that_decide_are_fields_that_can_be_set():
    found = {
        name: _numbers(path)
        for name, path in MODULES.items()
        if package_of(name).removeprefix("geomwatch.") in JUDGED
    }
    assert sum(found.values()) <= MOST_NUMBERS, {n: count for n, count in found.items() if count}


def test_a_memory_is_declared_and_not_written_by_hand():
    found = [
        f"{name}.{node.name}"
        for name, path in MODULES.items()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef) and node.name in ("state_dict", "load_state_dict")
    ]
    assert len(found) <= MOST_HAND_WRITTEN, found


@pytest.mark.parametrize("name", sorted(p for p in GRAPH if p != FACE and is_package(p)))
def test_a_package_says_what_a_newcomer_would_change_there(name: str):
    assert "A newcomer would change something here" in told_by(name)


@pytest.mark.parametrize("name", sorted(p for p in PACKAGES if p != FACE and is_package(p)))
def test_a_package_says_what_it_imports(name: str):
    said = re.search(r"May import ([^.]*)\.", told_by(name))
    assert said, "May import ..., up to the first full stop"
    allowed = {f"geomwatch.{other}" for other in re.findall(r"\w+", said[1])}
    assert PACKAGES[name] <= allowed


def told_by(name: str) -> str:
    return " ".join((ast.get_docstring(_tree(MODULES[name])) or "").split())


def test_the_drawing_of_the_packages_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text, by_package(GRAPH)), "run: python tools/draw_packages.py"


def test_a_drawing_leaves_out_what_a_longer_way_implies():
    graph = {"geomwatch.top": {"geomwatch.middle", "geomwatch.low"}}
    graph |= {"geomwatch.middle": {"geomwatch.low"}, "geomwatch.low": set()}
    assert drawing(graph) == "graph TD\n    top --> middle\n    middle --> low\n    low\n"


def test_a_circle_is_found_and_a_chain_measured():
    line = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert not cycle(line)
    assert longest_chain(line) == ["a", "b", "c"]
    assert cycle({**line, "c": {"b"}}) == ["b", "c", "b"]


def _is_folder(name: str) -> bool:
    return name != FACE and is_package(name)


def _imports(path: Path) -> bool:
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(_tree(path)))


def _arguments(arguments: ast.arguments) -> int:
    """Return how many can be passed, `self` aside."""
    return len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1


def _numbers(path: Path) -> int:
    """Count the numbers in the values of a module's own names."""
    values = (n.value for n in _tree(path).body if isinstance(n, ast.Assign | ast.AnnAssign))
    return sum(
        isinstance(node, ast.Constant) and type(node.value) in (int, float)
        for value in values
        if value is not None
        for node in ast.walk(value)
    )


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
