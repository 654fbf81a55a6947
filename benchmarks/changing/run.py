"""One run with a change on its way: what is done in every host alike, and what is found."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from changing.changes import CHANGES, begin
from changing.exact import Exact, exact
from changing.net import CHANGE, STEPS, Net, Tape, batches, loss_fn
from geomwatch import Measurement

EVERY = 6
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(torch.optim.SGD, lr=0.4),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What changes, and how a step is made."""

    change: str
    optimizer: str = "SGD"
    clip: float | None = None
    accumulate: int = 1
    divided: bool = True
    host: str = "raw"

    @property
    def name(self) -> str:
        """The case in a few words."""
        clip = [] if self.clip is None else [f"clip {self.clip:g}"]
        whole = "" if self.divided else ", not divided"
        window = [] if self.accumulate == 1 else [f"{self.accumulate} micro-batches{whole}"]
        return ", ".join([self.change, self.host, self.optimizer, *clip, *window])


class Run:
    """A training that a host carries out, with the exact numbers at each record."""

    steps = STEPS

    def __init__(self, case: Case) -> None:
        self.case, self.kind = case, CHANGES[case.change]
        self.net, self.tape = Net(), Tape()
        self.make = OPTIMIZERS[case.optimizer]
        self.optimizer = begin(self.net, self.make, frozen=self.kind.frozen)
        self.found: list[tuple[dict[str, Any], Exact]] = []
        self.broken: list[Exception] = []
        self.said: list[str] = []

    @property
    def options(self) -> dict[str, Any]:
        """What a monitor is given."""
        how = Measurement(quantities=["stability_margin", "lambda_max"])
        return {"how": how, "every": EVERY, "sinks": self.note}

    def note(self, line: dict[str, Any]) -> None:
        """Compute what is right where a record is made, before the step is taken."""
        if line["kind"] == "record":
            try:
                self.found.append((line, exact(self.net, self.optimizer, self.tape.batches)))
            except Exception as error:  # which a monitor would survive
                self.broken.append(error)

    def batches(self) -> list[Tensor]:
        """Return all micro-batches."""
        return batches(self.steps * self.case.accumulate)

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        """Return the loss that is trained on, and note it."""
        loss = loss_fn(model, tokens)
        self.tape.note(tokens, loss)
        return loss

    def change_before(self, step: int, into: Callable[[Any], Any] = lambda made: made) -> bool:
        """Change what is to be changed before this step; `into` makes an optimizer the host's."""
        if step != CHANGE:
            return False
        known = getattr(self.optimizer, "optimizer", self.optimizer)
        made = self.kind.change(self.net, known, self.make)
        self.optimizer = self.optimizer if made is known else into(made)
        return made is not known

    def state(self) -> list[Tensor]:
        """Return all that must be the same with the monitor and without."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        moments = [v for s in inner.state.values() for v in s.values() if isinstance(v, Tensor)]
        tensors = [*self.net.state_dict().values(), *moments, torch.get_rng_state()]
        return [copy.deepcopy(t.detach()) for t in tensors]


class Listening(logging.Handler):
    """Keeps what geomwatch says, at INFO too."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.INFO)
        self._said, self._log = said, logging.getLogger("geomwatch")

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())

    def __enter__(self) -> Listening:
        self._before = self._log.level, self._log.propagate
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        self._log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.level, self._log.propagate = self._before
