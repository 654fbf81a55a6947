"""A probe never stops a run: failures are reported once, and probing is paused if they go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from geomwatch.distributed import RankError
from geomwatch.errors import UsageError
from geomwatch.prober import Probed, Prober
from geomwatch.records import Estimate
from geomwatch.sinks import logger

_PATIENCE = 3  # failed probes in a row before probing is paused


class Guard:
    """Runs probes, survives them, and keeps the last margin for the steps in between."""

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.paused = False
        self.seconds = 0.0  # spent in probes so far
        self.last: Probed | None = None
        self._lr: tuple[float, ...] = ()  # of the last probe
        self._margin: Estimate | None = None
        self._failures = 0
        self._told: set[str] = set()

    def probe(
        self, window: Sequence[Any], step: int, *, same_data: Sequence[Any], grad_scale: float
    ) -> Probed | None:
        """Probe, or report why not and return None.

        Raises:
            UsageError: the very first probe shows that something was passed that can't work.
        """
        start = time.perf_counter()
        try:
            probed = self._probe_within_memory(
                window, step, same_data=same_data, grad_scale=grad_scale
            )
        except Exception as error:  # whatever a loss_fn raises in a probe, training goes on
            if isinstance(error, UsageError) and self.prober.plan.probes == 0:
                raise
            self._report(step, error)
            return None
        finally:
            self.seconds += time.perf_counter() - start
        self._failures = 0
        self.last = probed
        self._lr, self._margin = probed.record.lr, probed.margin
        self._tell_surprises()
        return probed

    def resume(self) -> None:
        """Probe again after a pause."""
        self.paused = False
        self._failures = 0

    def lr_ratio(self, lr: Sequence[float]) -> float:
        """Return the largest factor by which a group's rate has grown since the last probe."""
        if not self._lr or self._lr == lr:
            return 1.0
        pairs = zip(lr, self._lr, strict=False)
        return max((now / then for now, then in pairs if then > 0), default=1.0)

    def margin(self, lr: Sequence[float]) -> Estimate | None:
        """Return the last margin, re-scaled to the learning rates `lr` of the coming step."""
        margin, ratio = self._margin, self.lr_ratio(lr)
        if margin is None or margin.value is None or margin.error is None or ratio == 1:
            return margin
        return replace(margin, value=margin.value * ratio, error=margin.error * ratio)

    def tell(self, message: str) -> None:
        """Warn of something, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)

    def state_dict(self) -> dict[str, Any]:
        """Return the last margin and its learning rates."""
        return {
            "lr": list(self._lr),
            "margin": None if self._margin is None else asdict(self._margin),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the last margin and its learning rates."""
        self._lr = tuple(state["lr"])
        self._margin = None if state["margin"] is None else Estimate(**state["margin"])

    def _probe_within_memory(self, window: Sequence[Any], step: int, **known: Any) -> Probed:
        ranks = self.prober.ranks
        try:
            with ranks.together():
                return self.prober.probe(window, step, **known)
        except Exception as error:  # all but a lack of memory is passed on
            if not ranks.any(isinstance(error, torch.OutOfMemoryError)):
                raise
            smaller = self.prober.cut_batches(window)
            if smaller is None:
                raise
            shortage = error.with_traceback(None)
        # outside of the handler: the frames of the error hold the probe's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with ranks.together():
                probed = self.prober.probe(window, step, **known)
        except UsageError as refused:  # this loss is no mean over items
            self.prober.uncut_batches()
            raise shortage from refused
        self.tell(
            f"a probe ran out of memory and was repeated {smaller} items at a time, as further "
            f"ones will be; micro_batch={smaller} does so from the start. ({shortage})"
        )
        return probed

    def _report(self, step: int, error: Exception) -> None:
        self._failures += 1
        if "failure" not in self._told:
            self._told.add("failure")
            logger.warning(
                "step %d: a probe failed with %s: %s. Training goes on untouched. A probe calls "
                "loss_fn(model, batch) again on the same batch; make sure that works.",
                step,
                type(error).__name__,
                error,
                exc_info=error,
                extra={"each_rank": not isinstance(error, RankError)},
            )
        if self._failures == _PATIENCE:
            self.paused = True
            logger.warning(
                "step %d: probing is paused after %d failed probes in a row, the last with %s: %s. "
                "monitor.resume() starts it again.",
                step,
                _PATIENCE,
                type(error).__name__,
                error,
            )

    def _tell_surprises(self) -> None:
        for surprise in self.prober.surprises:
            self.tell(surprise)
        self.prober.surprises.clear()
