"""A probe never stops a run: failures are reported once, and probing is paused if they go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.prober import Probed, Prober
from geomwatch.observation.margins import Margin
from geomwatch.parallel.ranks import RankError
from geomwatch.sinks import logger

_PATIENCE = 3  # failed probes in a row before probing is paused
_GRADIENTS, _PRODUCT, _GLANCE = 2.0, 2.2, 0.5  # steps' worth of a probe, of an HVP, of a sentinel


class Guard(Resumable):
    """Runs probes, survives them, and keeps the last margin for the steps in between."""

    work: Kept[float]
    margin: Kept[Margin]
    gradient_margin: Kept[Margin]

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.paused = False
        self.seconds = 0.0  # spent in probes and sentinels so far
        self.glance_seconds = 0.0  # in sentinels
        self.work = 0.0  # steps' worth of sentinels and recurring probes so far
        self.last: Probed | None = None
        self.margin = self.gradient_margin = Margin()
        self._failures = 0
        self._told: set[str] = set()

    def probe(self, window: Sequence[Any], step: int, **known: Any) -> Probed | None:
        """Probe, or report why not and return None.

        Raises:
            UsageError: the very first probe shows that something was passed that can't work.
        """
        start = time.perf_counter()
        try:
            probed = self._probe_within_memory(window, step, **known)
        except Exception as error:  # whatever a loss_fn raises in a probe, training goes on
            if self.prober.plan.probes == 0:
                self.prober.ranks.refuse_after(error)
            self._report(step, error)
            return None
        finally:
            self.seconds += time.perf_counter() - start
        self._failures = 0
        self.last = probed
        self.work += self._work_of(probed)
        self.margin = Margin(probed.margin, probed.record.lr)
        self.gradient_margin = Margin(probed.gradient_margin, probed.record.lr)
        self._tell_surprises()
        return probed

    def glance(self, window: Sequence[Any], step: int, lr: tuple[float, ...], **known: Any) -> bool:
        """Measure the gradient margin; tell whether it could be had.

        What keeps it from being measured is for the next probe to report.
        """
        start = time.perf_counter()
        try:
            with self.prober.ranks.together():
                found = self.prober.glance(window, step, **known)
        except Exception as error:
            logger.debug("a sentinel failed with %s: %s", type(error).__name__, error)
            return False
        finally:
            spent = time.perf_counter() - start
            self.work += _GLANCE
            self.seconds += spent
            self.glance_seconds += spent
        self.gradient_margin = Margin(found, lr)
        return found.value is not None

    def _work_of(self, probed: Probed) -> float:
        """Return the steps' worth of a probe; what is dear has a period of its own (see `plan`)."""
        if self.prober.plan.is_whole and self.prober.plan.probes > 1:
            return 0.0
        return _GRADIENTS + _PRODUCT * int(probed.record.provenance["hvps"])

    def resume(self) -> None:
        """Probe again after a pause."""
        self.paused = False
        self._failures = 0

    def tell(self, message: str) -> None:
        """Warn of something, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)

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
