"""Promises of the project itself: what it imports, exports and documents."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import geomwatch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "geomwatch").rglob("*.py"))

# Runs with every optional package hidden, the installed ones too.
IMPORT_CORE = """
import importlib, pkgutil, sys

OPTIONAL = {
    "accelerate", "lightning", "matplotlib", "pytorch_lightning", "scipy", "sklearn",
    "transformers",
}
CORNERS = ("geomwatch.cli", "geomwatch.integrations", "geomwatch.landscape")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Absent())
import geomwatch
for module in pkgutil.walk_packages(geomwatch.__path__, "geomwatch.", onerror=lambda name: None):
    if not module.name.startswith(CORNERS):
        importlib.import_module(module.name)
        print(module.name)
"""


def order(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, then Classes, then functions: ruff's order of `__all__`."""
    return not name.isupper(), not name[0].isupper(), name


def test_core_imports_where_nothing_optional_is_installed() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_CORE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "geomwatch.records" in run.stdout.split()


def test_core_depends_on_torch_and_numpy_only() -> None:
    requirements = map(Requirement, importlib.metadata.requires("geomwatch") or ())
    assert {r.name for r in requirements if r.marker is None} == {"torch", "numpy"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_all_holds_the_public_names_in_order() -> None:
    public = {
        name
        for name, value in vars(geomwatch).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    exported = [name for name in geomwatch.__all__ if not name.startswith("_")]
    assert set(exported) == public - {"annotations"}  # the __future__ import
    assert exported == sorted(exported, key=order)


def test_contributing_fits_on_one_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 50
