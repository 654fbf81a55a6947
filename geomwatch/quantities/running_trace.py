"""tr(H) pooled over the few samples of the last probes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from geomwatch.estimators.hutchinson import Samples, mean_with_stderr
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.records import Estimate

_SAMPLES_KEPT = 8


class RunningTrace(Resumable):
    """tr(H) from the few samples a probe can afford, pooled over the last probes.

    What is averaged is the ratio of each sample to lambda_max at its own time: that moves much
    less in training than the trace itself (a plain average lags behind by up to 66 % while the
    trace moves). The standard error is that of the pooled ratios, so drift shows up in it.
    """

    _ratios: Kept[deque[float]]
    _by_lambda: Kept[bool]

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
