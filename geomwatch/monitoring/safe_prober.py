"""A probe never stops a run: failures are reported once, and probing is paused if they go on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from geomwatch.errors import NoCurvatureError, UsageError, WithheldError
from geomwatch.isolation.signals import raised_by_users
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.probed import Measures, Probed
from geomwatch.observation.margins import Margin
from geomwatch.parallel.ranks import RankError
from geomwatch.quantities.plan import Plan
from geomwatch.quantities.table import QUANTITIES
from geomwatch.records import Estimate, Record
from geomwatch.sinks.log import logger
from geomwatch.vectors.layout import Layout

T = TypeVar("T")
_CERTAIN = ("loss", "grad_norm")  # a probe that has neither raises


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What failed probes in a row lead to."""

    failures: int = 3  # before probing is paused
    pause: int = 100  # steps that the first pause lasts; each further one lasts twice as long


class SafeProber(Resumable):
    """Runs probes, survives them, and keeps the last margin for the steps in between."""

    margin: Kept[Margin]
    gradient_margin: Kept[Margin]
    _prober: Kept[Measures]

    def __init__(
        self, prober: Measures, account: Account, patience: Patience | None = None
    ) -> None:
        self._prober, self._account = prober, account
        self._patience = patience or Patience()
        self.paused = False  # by the user
        self.address = "monitor"  # how messages speak of it
        self.why = ""  # the last look has found no margin
        self._until: int | None = None  # the step at which failed probes are tried again
        self._pause = self._patience.pause
        self.last: Probed | None = None
        self.margin = self.gradient_margin = Margin()
        self._failures = 0
        self._told: set[str] = set()
        self.why_not_ahead = ""  # why there are no rehearsals
        self._refuses = False  # the first probe has shown that something can't work

    def probe(self, window: Sequence[Any], step: int, **known: Any) -> Probed | None:
        """Probe, or report why not and return None.

        Raises:
            UsageError: the very first probe shows that something was passed that can't work.
        """
        try:
            probed = self._probe_within_memory(window, step, **known)
        except Exception as error:  # whatever a loss_fn raises in a probe, training goes on
            self._tell_surprises()
            if self._prober.plan.probes == 0:
                self._refuses = True
                self._prober.ranks.refuse_after(error)
                self._refuses = False
            self._report(step, error)
            return None
        self.last = probed
        self.why = probed.gradient_margin.reason
        if reason := _nothing_measured(probed.record):
            self._report(step, NoCurvatureError(f"none of its quantities could be had: {reason}"))
        else:
            self._failures, self._pause = 0, self._patience.pause
        self._account.work += self._work_of(probed)
        self.margin = Margin(probed.margin, probed.record.lr)
        self.gradient_margin = Margin(probed.gradient_margin, probed.record.lr)
        self._tell_surprises()
        self._tell_of_no_products(probed.record)
        return probed

    def restart(self, layout: Layout, optimizer: Any) -> None:
        """Forget the margins of other parameters, or of another optimizer, and probe again."""
        self._prober.restart(layout, optimizer)
        self.last, self.margin, self.gradient_margin = None, Margin(), Margin()
        self._until, self._failures, self._pause = None, 0, self._patience.pause
        self.why_not_ahead = ""

    def ahead(
        self,
        windows: Sequence[Any],
        multiples: Sequence[float],
        *,
        scale: float = 1.0,
        **known: Any,
    ) -> Sequence[float] | None:
        """Rehearse at multiples of `scale` times the present rates; None where that can't be.

        What keeps it from being done is said once, and not tried again.
        """
        if self.why_not_ahead:
            return None
        self._account.work += self._account.units.rehearsed * len(windows) * len(multiples)
        try:
            return self._prober.rehearse(windows, [scale * m for m in multiples], **known)
        except Exception as error:  # of a loss_fn or an optimizer that is unlike others
            is_known = isinstance(error, WithheldError)
            self.why_not_ahead = str(error) if is_known else f"{type(error).__name__}: {error}"
            logger.info(
                "steps ahead are not rehearsed: %s. Warnings go by margins and losses alone.",
                self.why_not_ahead,
            )
            return None

    def present(self, windows: Sequence[Any]) -> Sequence[float] | None:
        """Return the losses of the windows at the present weights; None where that can't be."""
        if self._prober.ranks.size > 1:  # the others are not here to take part
            return None
        self._account.work += self._account.units.sentinel * len(windows)
        try:
            return self._prober.present(windows)
        except Exception as error:  # of a loss_fn: rules then go by what they have
            logger.debug("no hindsight: %s: %s", type(error).__name__, error)
            return None

    def is_off(self, step: int) -> bool:
        """Tell whether nothing is measured before this step; a pause after failures ends."""
        if self._until is not None and step >= self._until:
            self._until, self._failures = None, self._patience.failures - 1
        return self.paused or self._until is not None

    def not_to_be_told(self, reason: str) -> None:
        """Say that there is no margin of the optimizer's steps, "" if there is again."""
        self._prober.no_margin = reason
        if reason:
            self.tell(reason)

    def glance(self, window: Sequence[Any], step: int, lr: tuple[float, ...], **known: Any) -> bool:
        """Measure the gradient margin; tell whether it could be had.

        What keeps it from being measured is for the next probe to report.
        """
        self._account.work += self._account.units.sentinel
        try:
            with self._prober.ranks.together():
                found = self._prober.glance(window, step, **known)
        except Exception as error:  # whatever a loss_fn raises; the next probe reports it
            logger.debug("a sentinel failed with %s: %s", type(error).__name__, error)
            self.why = f"a look failed with {type(error).__name__}: {error}"
            return False
        self.gradient_margin, self.why = Margin(found, lr), found.reason
        return found.value is not None

    def _work_of(self, probed: Probed) -> float:
        """Return the steps' worth of a probe; what is dear has a period of its own (see `plan`)."""
        if self.plan.is_whole and self.plan.probes > 1:
            return 0.0
        units = self._account.units
        return units.gradients + units.product * int(probed.record.provenance["hvps"])

    @property
    def plan(self) -> Plan:
        """What probes measure."""
        return self._prober.plan

    @property
    def same_data(self) -> bool:
        """Whether the last steps looked at saw the same data."""
        return self._prober.same_data

    @property
    def limit_ratio(self) -> float:
        """Full-batch over small-batch limit of the optimizer, as far as it has been looked at."""
        return self._prober.limit_ratio

    def lambda_max(self) -> float | None:
        """Return the last known lambda_max of the Hessian."""
        return self._prober.lambda_max()

    def margin_at(self, rates: Sequence[float], scale: float) -> float | None:
        """Return the last stability margin at `scale` times these rates."""
        return _scaled(self.margin.at(rates), scale)

    def margin_along(self, rates: Sequence[float], scale: float) -> float | None:
        """Return the last gradient margin there, counted as the stability margin is."""
        margin = _scaled(self.gradient_margin.at(rates), scale)
        return margin if margin is None else margin / self.limit_ratio

    def resume(self) -> None:
        """Probe again after a pause."""
        self.paused, self._until = False, None
        self._failures, self._pause = 0, self._patience.pause

    def attempt(self, part: Callable[[], T], step: int) -> T | None:
        """Return what a part of watching a step returns; None where it fails, told once."""
        try:
            return part()
        except Exception as error:  # whatever it is, what comes after it goes on
            self.survive(error, step, but_wrong_use=False)
            return None

    def survive(self, error: Exception, step: int, *, but_wrong_use: bool) -> None:
        """Tell of an error, once, so that training goes on.

        Raises:
            UsageError: it is one of the first call or the first probe.
        """
        if isinstance(error, UsageError) and (but_wrong_use or self._refuses):
            raise error
        if type(error).__name__ in self._told:
            return
        self._told.add(type(error).__name__)
        with contextlib.suppress(Exception):  # of a handler of the log
            logger.warning(
                "step %d: watching it failed with %s: %s. Training goes on untouched. This is "
                "said once.",
                step,
                type(error).__name__,
                error,
                exc_info=error,
            )

    def tell(self, message: str) -> None:
        """Warn of something, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", self.addressed(message))

    def addressed(self, message: str) -> str:
        """Return a message with what it has the user call by the name that it has here."""
        for method in ("follow(", "resume("):
            message = message.replace(f" monitor.{method}", f" {self.address}.{method}")
        return message

    def _probe_within_memory(self, window: Sequence[Any], step: int, **known: Any) -> Probed:
        ranks = self._prober.ranks
        try:
            with ranks.together():
                return self._prober.probe(window, step, **known)
        except Exception as error:  # all but a lack of memory is passed on
            if not ranks.any(isinstance(error, torch.OutOfMemoryError)):
                raise
            smaller = self._prober.cut_batches(window)
            if smaller is None:
                raise
            shortage = error.with_traceback(None)
        # outside of the handler: the frames of the error hold the probe's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with ranks.together():
                probed = self._prober.probe(window, step, **known)
        except Exception as error:  # ranks have to agree on its kind
            if not ranks.any(isinstance(error, UsageError)):  # this loss is no mean over items
                raise
            self._prober.uncut_batches()
            raise shortage from error
        self.tell(
            f"a probe ran out of memory and was repeated {smaller} items at a time, as further "
            f"ones will be; micro_batch={smaller} does so from the start. ({shortage})"
        )
        return probed

    def _report(self, step: int, error: Exception) -> None:
        self._failures += 1
        self.why = f"a probe failed with {type(error).__name__}: {error}"
        if "failure" not in self._told:
            self._told.add("failure")
            logger.warning(
                "step %d: a probe failed with %s: %s. Training goes on untouched. %s",
                step,
                type(error).__name__,
                error,
                _remedy(error),
                exc_info=error,
                extra={"each_rank": not isinstance(error, RankError)},
            )
        if self._failures >= self._patience.failures:
            self._until, self._pause = step + self._pause, 2 * self._pause
            logger.warning(
                "step %d: probing is paused after %d failed probes in a row, the last with %s: %s. "
                "It is tried again at step %d; %s.resume() does so at once.",
                step,
                self._failures,
                type(error).__name__,
                error,
                self._until,
                self.address,
            )

    def _tell_of_no_products(self, record: Record) -> None:
        """Say that of what needs products with the Hessian nothing could be had, and why."""
        of_all = {n: e for n, e in record.estimates.items() if n in QUANTITIES}  # not of modules
        needy = [e for n, e in of_all.items() if QUANTITIES[n].needs_products]
        if not needy or any(e.status != "failed" for e in needy):
            return
        known = any(message.startswith("curvature can't be measured") for message in self._told)
        if known or not math.isfinite(record.loss) or not needy[0].reason:
            return
        self.tell(
            f"no quantity that needs products with the Hessian could be measured: "
            f"{needy[0].reason}. Measurement(hvp='finite_difference') makes them in another way."
        )

    def _tell_surprises(self) -> None:
        for surprise in self._prober.surprises:
            self.tell(surprise)
        self._prober.surprises.clear()


def _nothing_measured(record: Record) -> str:
    """Return why a probe of a finite loss has measured nothing; "" where it has."""
    asked = {n: e for n, e in record.estimates.items() if n not in _CERTAIN and e.age == 0}
    size = record.estimates.get("grad_norm")
    is_finite = math.isfinite(record.loss) and (size is None or size.value is not None)
    if not asked or not is_finite or any(e.status != "failed" for e in asked.values()):
        return ""
    return next(iter(asked.values())).reason


def _remedy(error: BaseException) -> str:
    """Say what to do about a failed probe; loss_fn is blamed only for what was raised in it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "A probe takes more memory than a step; Measurement(micro_batch=...) lowers that."
    if isinstance(error, RankError):
        return "The rank that failed says why."
    if raised_by_users(error):
        return "A probe calls loss_fn(model, batch) again on the same batch; make sure that works."
    return (
        "loss_fn worked; it is what a probe does beside it that failed. If it goes on, try "
        "Measurement(hvp='finite_difference')."
    )


def _scaled(margin: Estimate | None, scale: float) -> float | None:
    return None if margin is None or margin.value is None else scale * margin.value
