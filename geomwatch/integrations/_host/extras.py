"""What an adapter says when its host is not installed."""

from __future__ import annotations


def missing(host: str, extra: str) -> ImportError:
    """Return the error to raise `from` the ImportError of the host's own package."""
    return ImportError(
        f"geomwatch.integrations.{extra} needs {host}, which is not installed. "
        f"Install it with: pip install 'geomwatch[{extra}]'"
    )
