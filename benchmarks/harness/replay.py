"""Rules judged again on what the monitor saw, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from geomwatch.monitoring.dispatch import is_due
from geomwatch.observation.observer import Observer
from geomwatch.rules import Observation, Rule, default_rules
from harness.codec import decode
from harness.run import Run
from harness.store import Store
from harness.story import Story
from harness.watching import heard_at

Rules = Callable[[], Sequence[Rule]]


@dataclass(frozen=True)
class Difference:
    """A story whose first alerts at or above warning are not those of the run itself."""

    story: Story
    before: tuple[int, str] | None  # step, rule
    after: tuple[int, str] | None


def replay(story: Story, rules: Rules = default_rules) -> Story:
    """Return the story with the alerts that these rules raise on its stored observations."""
    fresh, observer = list(rules()), Observer()
    alerts: list[dict[str, Any]] = []
    for shown in story.data["observations"]:
        seen = observer(decode(Observation, shown["seen"]))
        for rule in fresh:
            alert = rule(seen) if is_due(rule, seen) else None
            if alert is not None:
                alerts.append(heard_at(shown["at"], alert))
    return Story(story.run, story.policy, {**story.data, "alerts": alerts}, dict(story.scores))


def read_replayed(store: Store, runs: Sequence[Run], policy: str, *, workers: int) -> list[Story]:
    """Read what is there of these runs, judged by today's rules; half a second a run."""
    one = partial(_read_replayed, store, policy)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = pool.map(one, runs, chunksize=4)
        bar = tqdm(found, desc=f"judging {policy}", total=len(runs), leave=False)
        return [story for story in bar if story is not None]


def _read_replayed(store: Store, policy: str, run: Run) -> Story | None:
    data = store.load(run, policy)
    return None if data is None else replay(Story(run, policy, data))


def differences(stories: Iterable[Story], rules: Rules = default_rules) -> list[Difference]:
    """List the stories that these rules tell otherwise, by the first loud alert."""
    found = []
    for story in stories:
        before, after = _first(story), _first(replay(story, rules))
        if before != after:
            found.append(Difference(story, before, after))
    return found


def _first(story: Story) -> tuple[int, str] | None:
    loud = [a for a in story.alerts if a["severity"] != "info"]
    return min(((a["raised"], a["rule"]) for a in loud), default=None)
