"""The report in Markdown: each figure with its interval and what its probes cost."""

from __future__ import annotations

from forecasting.halves import Halves
from forecasting.noise import batch_noise
from forecasting.outcome import HEALTHY
from forecasting.policies import ADVICE, BUDGETS, DEFAULT
from forecasting.ramps import equal_false_alarms, ramps
from forecasting.scenarios import advice, edges, jumps, starts
from forecasting.scoring import MOST_FALSE
from forecasting.summary import budgets, by_task, census, false_alarms


def write(by_policy: dict[str, Halves], *, note: str) -> str:
    """Write the whole report."""
    main = by_policy[DEFAULT]
    return f"""# Forecasting failed runs

Written by `benchmarks/forecast.py` from {len(main.tune) + len(main.held)} trainings. {note}

The runs come in two halves that differ in architecture *and* seed. Thresholds of the baselines were
chosen on one ("chosen on"), as low as at most {MOST_FALSE:.0%} of its healthy runs allow, and
frozen; all figures with an interval are of the other ("held back"). geomwatch runs with its
defaults, one set of levels for all. Intervals are 95 %: Clopper-Pearson for shares, bootstrap for
medians. What counts as failed and healthy was fixed beforehand, by losses alone:
`benchmarks/forecasting/outcome.py`. Announced means: before the step at which the loss blows up.
Lead is counted in optimizer steps, over the runs announced. Overhead is the median wall time of the
monitor over that of forward, backward and optimizer; in brackets that of the probes after the first
10 % of the steps, to which a longer run converges.

{census(main)}

## Rates too large from the start

{starts(main)}

## Batch noise before the first step

What batches that differ in curvature add to the stability margin, N = M_ms - M, by the first probe
and at the largest rate of the schedule. Nets with BatchNorm have no micro-batches and are left out.

{batch_noise(main)}

## Ramps, SGD with momentum

A ramp is a LinearLR of torch, which leaves the rate that it is headed for in the optimizer. What is
announced of one that leaves nothing there is in the row "of an unknown schedule".

{ramps(main, adaptive=False)}

The same detectors with thresholds chosen in hindsight, on the held-back runs themselves:

{equal_false_alarms(main, adaptive=False)}

![ROC curves](forecast_roc.png)

![Lead](forecast_lead.png)

## Ramps, Adam and AdamW

{ramps(main, adaptive=True)}

{equal_false_alarms(main, adaptive=True)}

## Jumps of the rate by a scheduler

A critical alert before the step that is taken at the new rate.

{jumps(main)}

## Full-batch gradient descent at the edge of stability

{edges(main)}

## False alarms

Healthy is a run that ends well, also one at many times the tuned rate that ends less well than it
might. By its largest rate:

{false_alarms(main)}

## By task

{by_task(main)}

## Advice followed

From the alert on, the learning rate is held at or below what its message says. Where the message
says to start again (in the first 20 steps, or when all that was learnt is lost), the run does, at
the advised rate at most and with all of its steps; three times at most. A run trains when less than
{HEALTHY:.0%} of what can be learnt is left at its end.

{advice(main, by_policy[ADVICE]) if ADVICE in by_policy else "Not run."}

## Budgets

Runs of the held-back half that were done with each of these budgets.

{budgets({name: by_policy[name] for name in BUDGETS if name in by_policy})}
"""
