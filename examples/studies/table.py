"""All numbers of the study in one place: by net, seed, stage and quantity."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from studies.cases import Case, plain, variants
from studies.connecting import pairs
from studies.inference import Mean
from studies.schedule import stages
from studies.settings import Settings
from studies.store import Store

BARRIERS = {  # of pairs of seeds: (which path, which number)
    "barrier_height": ("straight", "height"),
    "barrier_max": ("straight", "max_loss"),
    "aligned_height": ("aligned", "height"),
}


@dataclass(frozen=True)
class Entry:
    """One number: of one seed, or of a pair of seeds such as "01"."""

    case: Case
    seed: str
    stage: str
    quantity: str
    value: float | None
    error: float | None = None
    reason: str = ""


class Table:
    """Reads a finished study."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.settings = settings
        self.plain, self.variants = plain(settings), variants(settings)
        self._store = store
        self._entries: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self:
            key = entry.case.name, entry.stage, entry.quantity
            self._entries.setdefault(key, []).append(entry)

    def __iter__(self) -> Iterator[Entry]:
        for case in (*self.plain, *self.variants):
            for seed in self.settings.seeds:
                yield from self._of_run(case, seed)
            for pair in pairs(self.settings):
                yield from self._of_pair(case, pair)

    def entries(self, case: Case, quantity: str, stage: str) -> list[Entry]:
        """Return the numbers of all seeds, or pairs of them."""
        return self._entries.get((case.name, stage, quantity), [])

    def mean(self, case: Case, quantity: str, stage: str = "end") -> Mean:
        """Return their mean; of those that have a value."""
        entries = self.entries(case, quantity, stage)
        return Mean(tuple(e.value for e in entries if e.value is not None))

    def missing(self, case: Case, quantity: str, stage: str) -> list[str]:
        """Return why seeds have no value."""
        return [e.reason for e in self.entries(case, quantity, stage) if e.value is None]

    def of_seed(self, case: Case, quantity: str, stage: str, seed: int) -> float | None:
        """Return the number of one seed; of pairs the mean of those it is part of."""
        own = [
            e.value
            for e in self.entries(case, quantity, stage)
            if e.value is not None and str(seed) in e.seed.split("-")
        ]
        return Mean(tuple(own)).mean

    def variant(self, architecture: str, *words: str) -> Case | None:
        """Return the variant of a net whose name is one of these words."""
        own = (c for c in self.variants if c.architecture == architecture and c.variant in words)
        return next(own, None)

    def net(self, architecture: str, kind: str = "images") -> Case:
        """Return a net as the paper has it."""
        return next(c for c in self.plain if (c.architecture, c.kind) == (architecture, kind))

    @functools.cached_property
    def text(self) -> Case | None:
        """The Transformer on text, if that is part of the study."""
        return next((c for c in self.plain if c.kind == "text"), None)

    def artefact(self, case: Case, name: str) -> dict[str, Any]:
        """Return what "power" or "rugged" has found."""
        return self._read(f"{case.name}/{name}")

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Return a training."""
        return self._read(f"{case.name}/seed{seed}-run")

    def _of_run(self, case: Case, seed: int) -> Iterator[Entry]:
        run, name = self.run(case, seed), str(seed)
        for stage in stages(case):
            found = self._read(f"{case.name}/seed{seed}-{stage}-geometry")
            for quantity, e in found.items():
                rest = e.get("error"), e.get("reason", "")
                yield Entry(case, name, stage, quantity, e["value"], *rest)
            yield Entry(case, name, stage, "difficulty", run["difficulty"][stage])
        steps = run["steps_to_target"]
        margins = [p["stability_margin"] for p in run["probes"] if p["stability_margin"]]
        at_the_end = {
            # never reached: after all that did
            "steps_to_target": self.settings.steps + 1 if steps is None else steps,
            "test_gap": _difference(run["test"]["loss"], run["train"]["loss"]),
            "train_loss": run["train"]["loss"],
            "test_loss": run["test"]["loss"],
            "test_accuracy": run["test"]["accuracy"],
            "largest_margin": max(margins, default=None),
            "parameters": run["parameters"],
        }
        for quantity, value in at_the_end.items():
            yield Entry(case, name, "end", quantity, value)

    def _of_pair(self, case: Case, pair: tuple[int, int]) -> Iterator[Entry]:
        name = f"{pair[0]}-{pair[1]}"
        for stage in stages(case):
            found = self._read(f"{case.name}/pair{pair[0]}{pair[1]}-{stage}-barrier")
            for quantity, (path, what) in BARRIERS.items():
                if path in found:
                    yield Entry(case, name, stage, quantity, found[path][what])

    def _read(self, name: str) -> Any:
        if not self._store.has(name):
            raise FileNotFoundError(f"{name} has not been computed yet")
        return self._store.facts(name, dict)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
