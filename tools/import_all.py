"""Import all of the installed geomwatch, and compare its files with the source: `make wheel`."""

import importlib
import pkgutil
import sys
from pathlib import Path

import geomwatch


def import_all() -> list[str]:
    """Import every public module; return what was wrong.

    A module whose extra is not installed may raise an ImportError that names the `pip install`.
    """
    wrong = []
    modules = pkgutil.walk_packages(geomwatch.__path__, "geomwatch.", onerror=lambda name: None)
    for name in ["geomwatch", *(module.name for module in modules)]:
        if any(part.startswith("_") for part in name.split(".")):
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            if "pip install" not in str(error):
                wrong.append(f"{name}: {error!r}")
            else:
                print(f"{name} wants an extra: {error}")
        except Exception as error:  # a finding like any other; the rest is still imported
            wrong.append(f"{name}: {error!r}")
        else:
            print(f"{name}: imported")
    return wrong


def files(package: Path) -> set[str]:
    """Return the files of a package, relative to it, without compiled ones."""
    paths = (path for path in package.rglob("*") if path.is_file())
    return {str(p.relative_to(package)) for p in paths if "__pycache__" not in p.parts}


def main(source: Path) -> int:
    """Check the installed package against `source`, the geomwatch/ of the checkout."""
    installed = Path(geomwatch.__path__[0])
    assert installed.is_relative_to(sys.prefix), f"{installed} is not the wheel's"
    missing = sorted(files(source) - files(installed))
    wrong = [*import_all(), *(f"not in the wheel: {name}" for name in missing)]
    if not (installed / "py.typed").is_file():
        wrong.append("not in the wheel: py.typed")
    print("\n".join(wrong) or "the wheel is whole")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
