"""The page of each rule: what it means, where its levels come from, what to do."""

from __future__ import annotations

import difflib
from importlib.resources import files

from geomwatch.errors import UsageError

_PAGES = files("geomwatch.rules") / "pages"


def explained() -> dict[str, str]:
    """Return the rules that have a page, and the first sentence of each."""
    names = sorted(p.name.removesuffix(".md") for p in _PAGES.iterdir() if p.name.endswith(".md"))
    return {name: _summary(explain(name)) for name in names}


def explain(rule: str) -> str:
    """Return the page of a rule, in Markdown.

    Raises:
        UsageError: no rule of that name.
    """
    page = _PAGES / f"{rule}.md"
    if not rule.isidentifier() or not page.is_file():
        raise UsageError(
            f"rule must be one of {', '.join(explained())}, got {rule!r}.{_near(rule)}"
        )
    return page.read_text(encoding="utf-8")


def _summary(page: str) -> str:
    paragraph = " ".join(page.split("\n\n")[1].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


def _near(rule: str) -> str:
    close = difflib.get_close_matches(rule.lower().replace("-", "_"), explained(), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
