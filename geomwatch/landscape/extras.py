"""What is said when a package that drawing or aligning needs is not installed."""

from __future__ import annotations


def missing(what: str, package: str) -> ImportError:
    """Return the error to raise `from` the ImportError of the package."""
    return ImportError(
        f"{what} needs {package}, which is not installed. "
        "Install it with: pip install 'geomwatch[landscape]'"
    )
