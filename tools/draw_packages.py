"""Draw which package imports which into docs/architecture.md; run it when the imports changed."""

from __future__ import annotations

from pathlib import Path

from import_graph import PACKAGE, ROOT, Graph, by_file, by_package, sources

PAGE = ROOT / "docs" / "architecture.md"
START, END = "```mermaid\n", "```\n"
# Everything imports these, or they import everything: arrows that would say nothing.
LEFT_OUT = {PACKAGE, *(f"{PACKAGE}.{name}" for name in ("errors", "records", "cli", "__main__"))}


def drawing(graph: Graph) -> str:
    """Return a Mermaid graph of the packages, without arrows that a longer way implies."""
    drawn = {n: imports - LEFT_OUT for n, imports in graph.items() if n not in LEFT_OUT}
    lines = ["graph TD"]
    for name in sorted(drawn, key=lambda n: (-len(_reached(drawn, n)), n)):
        implied = set().union(*(_reached(drawn, other) for other in drawn[name]))
        direct = sorted(drawn[name] - implied)
        below = " & ".join(_short(other) for other in direct)
        lines.append(f"    {_short(name)}" + (f" --> {below}" if below else ""))
    return "\n".join(lines) + "\n"


def page(text: str, graph: Graph) -> str:
    """Return the page with its drawing made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + drawing(graph) + END + after


def main() -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(text, by_package(by_file(sources()))), encoding="utf-8")
    print(f"drawn into {PAGE.relative_to(Path.cwd())}")


def _reached(graph: Graph, name: str) -> set[str]:
    """Return what a package imports, directly or not."""
    found: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += graph[other]
    return found


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


if __name__ == "__main__":
    main()
