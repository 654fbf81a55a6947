"""The page of each rule: what it means, where its levels come from, what to do."""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Any

from geomwatch.errors import UsageError
from geomwatch.observation.documented import Documented, rows_of, table_of
from geomwatch.rules.default import DEFAULT
from geomwatch.rules.rule import Rule

_RULES: dict[str, Any] = {kind.name: kind for kind in DEFAULT}
_PAGES = Path(__file__).parent / "pages"
_PLACE = re.compile(r"\{([a-z_.]+)(?::([^}]+))?\}")  # {levels}, {warning} or {calm:.0%}


def explained() -> dict[str, str]:
    """Return the rules that have a page, and the first sentence of each."""
    return {name: _summary(explain(name)) for name in sorted(p.stem for p in _PAGES.glob("*.md"))}


def explain(rule: str | Rule | type[Rule]) -> str:
    """Return the page of a rule, in Markdown, with its levels as they are.

    A rule of one's own has its page, NAME.md, in a folder `pages` beside its module; without one it
    is its docstring and its levels.

    Args:
        rule: the name of one of ours, or any rule, or its class.

    Raises:
        UsageError: no rule of that name.
    """
    if not isinstance(rule, str):
        return _filled(_page_beside(rule), rule)
    page = _PAGES / f"{rule}.md"
    if not rule.isidentifier() or not page.is_file():
        names = sorted(p.stem for p in _PAGES.glob("*.md"))
        raise UsageError(
            f"rule must be one of {', '.join(names)}, got {rule!r}.{_near(rule, names)}"
        )
    return _filled(page.read_text(encoding="utf-8"), _RULES.get(rule))


def advice_of(rule: str) -> str:
    """Return what a rule means and what to do about it, without the rest of its page.

    Raises:
        UsageError: no rule of that name.
    """
    head, *sections = explain(rule).split("\n## ")
    wanted = [text for text in sections if text.startswith("What to do")]
    summary = "\n\n".join(head.split("\n\n")[:2])
    rest = f"geomwatch explain {rule} --why: when it speaks, and where its levels come from."
    return "\n\n".join([summary, *(f"## {text}".strip() for text in wanted), rest])


def _page_beside(rule: Any) -> str:
    kind: Any = rule if isinstance(rule, type) else type(rule)
    page = Path(inspect.getfile(kind)).parent / "pages" / f"{kind.name}.md"
    if page.is_file():
        return page.read_text(encoding="utf-8")
    return f"# {kind.name}\n\n{inspect.getdoc(kind) or ''}\n\n{{levels}}\n"


def _filled(page: str, rule: Any) -> str:
    """Return a page with the levels of a rule in their places."""
    kind = rule if isinstance(rule, type) else type(rule)
    has_levels = issubclass(kind, Documented)
    values = {name: value for name, value, _ in rows_of(rule)} if has_levels else {}

    def fill(place: re.Match[str]) -> str:
        if place[1] == "levels":
            return table_of(rule) if has_levels else ""
        return format(values[place[1]], place[2] or "g")

    return _PLACE.sub(fill, page)


def _summary(page: str) -> str:
    paragraph = " ".join(page.split("\n\n")[1].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


def _near(rule: str, names: list[str]) -> str:
    close = difflib.get_close_matches(rule.lower().replace("-", "_"), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
