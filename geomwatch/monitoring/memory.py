"""Quantities that live across probes: the running trace, difficulty, held values."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, replace
from typing import Any

from geomwatch.estimators.hutchinson import Samples, mean_with_stderr
from geomwatch.observation.step import Settled
from geomwatch.records import Estimate

_SAMPLES_KEPT = 8


class RunningTrace:
    """tr(H) from the few samples a probe can afford, pooled over the last probes.

    What is averaged is the ratio of each sample to lambda_max at its own time: that moves much
    less in training than the trace itself (a plain average lags behind by up to 66 % while the
    trace moves). The standard error is that of the pooled ratios, so drift shows up in it.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_SAMPLES_KEPT)
        self._by_lambda = False

    def update(self, samples: Samples, lambda_max: float | None) -> Estimate:
        """Add a probe's samples and return the trace at its point."""
        by_lambda = lambda_max is not None and lambda_max > 0
        if by_lambda != self._by_lambda:
            self._ratios.clear()
            self._by_lambda = by_lambda
        reference = lambda_max if lambda_max is not None and lambda_max > 0 else 1.0
        self._ratios.extend(q / reference for q in samples.quadratic)
        hvps = len(samples.quadratic)
        if len(self._ratios) < 2:
            reason = "one sample has no standard error; the next probe adds another"
            return Estimate(None, status="withheld", reason=reason, hvps=hvps)
        mean = mean_with_stderr(list(self._ratios), hvps=hvps)
        assert mean.value is not None
        assert mean.error is not None
        return replace(mean, value=reference * mean.value, error=reference * mean.error)

    def state_dict(self) -> dict[str, Any]:
        """Return the pooled ratios."""
        return {"ratios": list(self._ratios), "by_lambda": self._by_lambda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the pooled ratios."""
        self._ratios = deque(state["ratios"], maxlen=_SAMPLES_KEPT)
        self._by_lambda = state["by_lambda"]


class Difficulty:
    """Optimization difficulty so far, O = sum_t lr_t ||g_t||^2 lambda_max(H_t).

    The paper's cumulative training sensitivity, in units of loss / lr. lambda_max is held between
    probes and the gradient is the mini-batch's (as stepped with, biased up by its noise), so this
    is an approximation and has no error bar. 0 HVPs.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._missing = False  # lambda_max, at the last step

    def update(self, lr: float, step: Settled, lambda_max: float | None) -> None:
        """Add one optimizer step, if it was taken with a finite gradient."""
        self._missing = lambda_max is None
        if lambda_max is not None and step.stepped and math.isfinite(step.grad_norm):
            self._total += lr * step.grad_norm**2 * abs(lambda_max)

    def estimate(self) -> Estimate:
        """Return the sum so far; none where lambda_max was never known."""
        if self._missing:
            return Estimate(None, status="withheld", reason="lambda_max is not known")
        reason = "lambda_max held between probes, mini-batch gradient norm"
        return Estimate(self._total, status="ok", reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Return the sum."""
        return {"total": self._total, "missing": self._missing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sum."""
        self._total, self._missing = float(state["total"]), bool(state["missing"])


class Held:
    """The last good estimate of each quantity, for the probes that do not measure it."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Estimate]] = {}

    def merge(self, step: int, fresh: dict[str, Estimate]) -> dict[str, Estimate]:
        """Return the fresh estimates and, marked with their age, the held ones."""
        for name, estimate in fresh.items():
            if estimate.value is not None:
                self._last[name] = (step, estimate)
        held = {
            name: replace(estimate, status="held", hvps=0, age=step - measured)
            for name, (measured, estimate) in self._last.items()
            if name not in fresh
        }
        return fresh | held

    def value(self, name: str) -> float | None:
        """Return the last good value of a quantity."""
        return self._last[name][1].value if name in self._last else None

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the fields of each."""
        return {name: [step, asdict(estimate)] for name, (step, estimate) in self._last.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._last = {name: (step, Estimate(**fields)) for name, (step, fields) in state.items()}
