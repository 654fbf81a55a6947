"""What every question's program does: list, run what is missing, report, one file a run."""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from harness.policies import named
from harness.pool import predicted_seconds, work
from harness.store import Job, Store
from harness.story import Story
from harness.version import ROOT, code

Options = argparse.Namespace
Verb = Callable[[Options, Store], int]
DOCS = ROOT / "docs/benchmarks"


class Question(ABC):
    """A list of jobs and a page; `usage` is what the command line says of it."""

    name: str
    usage: str

    @abstractmethod
    def jobs(self, options: Options) -> list[Job]:
        """Return all that is trained, as far as it is known beforehand."""

    def later(self, options: Options, store: Store) -> list[Job]:
        """Return what only the first jobs tell to train."""
        return []

    @abstractmethod
    def report(self, options: Options, store: Store, out: Path) -> str | None:
        """Write the page and its plots; return the page, or None where there is nothing yet."""

    @abstractmethod
    def options(self, parser: argparse.ArgumentParser) -> None:
        """Add options of its own."""

    @property
    def verbs(self) -> dict[str, Verb]:
        """What the program can be told to do; each returns the exit code."""
        return {"run": self._run, "list": self._list, "report": self._report}

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Do what the command line says; return the exit code."""
        options = self._parser().parse_args(arguments)
        usual = ROOT / "runs" / (f"{self.name}-quick" if options.quick else self.name)
        return self.verbs[options.verb](options, Store(options.folder or usual))

    def do(self, options: Options, store: Store, jobs: Iterable[Job]) -> bool:
        """Train what is missing; tell of what failed, and return whether all went well."""
        failures = work(store.missing(jobs), store, workers=options.workers)
        for (run, policy), trace in failures:
            print(f"{run.name} ({policy}) failed:\n{trace}", file=sys.stderr)
        return not failures

    def _run(self, options: Options, store: Store) -> int:
        well = self.do(options, store, self.jobs(options))
        well &= self.do(options, store, self.later(options, store))
        return self._report(options, store) or int(not well)

    def _list(self, options: Options, store: Store) -> int:
        jobs = self.jobs(options)
        missing = store.missing(jobs)
        left, wanted = (Counter((r.setting.label, p) for r, p in some) for some in (missing, jobs))
        for (label, policy), count in wanted.items():
            print(f"{label:25s} {policy:12s} {left[label, policy]:5d} of {count} missing")
        minutes = sum(map(predicted_seconds, missing)) / options.workers / 60
        print(f"{len(jobs)} trainings, {len(missing)} missing: about {minutes:.0f} minutes.")
        return 0

    def _report(self, options: Options, store: Store) -> int:
        part = options.quick or options.folder or options.only or options.policies
        out = store.folder if part else DOCS  # the docs are of all runs
        text = self.report(options, store, out)
        if text is None:
            print(f"no runs under {store.folder}", file=sys.stderr)
            return 1
        (out / f"{self.name}.md").write_text(text, encoding="utf-8")
        print(text)
        return 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.usage, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        add("verb", nargs="?", default="run", choices=tuple(self.verbs))
        add("--quick", action="store_true", help="a few cheap runs, no docs")
        add("--workers", type=int, default=2, help="runs side by side, one core each")
        add("--policies", nargs="+", type=_policy, help="what stands beside the runs")
        add("--only", default="", help="runs whose name contains this")
        add("--folder", type=Path, help="of the runs, and then of the report")
        self.options(parser)
        return parser


def written(name: str, stories: Sequence[Story], wanted: int) -> str:
    """Return the first lines of a report: from which runs it is, and of which version they are."""
    commits = sorted({s.data["commit"] for s in stories})
    lines = [
        f"Written by `benchmarks/{name}.py` from {len(stories)} trainings at commit "
        f"{', '.join(commits)}."
    ]
    if len(stories) < wanted:
        lines.append(f"**Incomplete: {wanted - len(stories)} runs are missing.**")
    versions = {s.data["code"] for s in stories}
    if len(versions) > 1:
        lines.append(f"**The runs were done with {len(versions)} versions of geomwatch.**")
    elif code() not in versions:
        lines.append("**geomwatch has changed since.**")
    return " ".join(lines)


def _policy(name: str) -> str:
    try:
        named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
