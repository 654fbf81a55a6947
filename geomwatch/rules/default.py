"""The rules that a monitor has, and what it makes of those it is given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.rules.bad_batch import BadBatch
from geomwatch.rules.batch_noise import BatchNoise
from geomwatch.rules.critical_batch_size import CriticalBatchSize
from geomwatch.rules.flat_but_rough import FlatButRough
from geomwatch.rules.grad_norm_spike import GradNormSpike
from geomwatch.rules.gradient_margin import GradientMargin
from geomwatch.rules.headroom import Headroom
from geomwatch.rules.loss_rise import LossRise
from geomwatch.rules.no_progress import NoProgress
from geomwatch.rules.non_finite import NonFinite
from geomwatch.rules.planned_rate import PlannedRate
from geomwatch.rules.rate_jump import RateJump
from geomwatch.rules.rule import Rule
from geomwatch.rules.stability_margin import StabilityMargin
from geomwatch.rules.taken_step import TakenStep
from geomwatch.rules.untrusted_probe import UntrustedProbe

DEFAULT = (
    NonFinite,
    BadBatch,
    NoProgress,
    LossRise,
    StabilityMargin,
    GradientMargin,
    TakenStep,
    Headroom,
    BatchNoise,
    PlannedRate,
    RateJump,
    GradNormSpike,
    FlatButRough,
    CriticalBatchSize,
    UntrustedProbe,
)


def default_rules() -> list[Rule]:
    """Return the rules a monitor uses unless told otherwise."""
    return [kind() for kind in DEFAULT]


def resolve(rules: Rule | Iterable[Rule] | None) -> list[Rule]:
    """Return the rules to judge by: the default ones, or those given, or the one that was given.

    Of two that have a name in common the later one counts, in the place of the earlier.

    Raises:
        UsageError: one of them is no rule; the message shows the line to write.
    """
    if rules is None:
        return default_rules()
    alone = callable(rules) or isinstance(rules, str) or not isinstance(rules, Iterable)
    given: list[Rule] = [rules] if alone else list(rules)  # type: ignore[list-item, arg-type]
    for rule in given:
        if isinstance(rule, type) or not callable(rule):
            raise UsageTypeError(
                f"rules must hold rules, got {rule!r}.",
                write=f"rules=[*default_rules(), {_repaired(rule)}]",
            )
        if not isinstance(getattr(rule, "name", None), str):
            raise UsageError(f'a rule must have a name, got none: {rule!r}. Give it name = "...".')
    return list({rule.name: rule for rule in given}.values())


def _repaired(given: object) -> str:
    if isinstance(given, type):
        return f"{given.__name__}()"
    ours = {kind.name: kind.__name__ for kind in DEFAULT}
    wanted = str(given).lower().replace("-", "_")
    near = difflib.get_close_matches(wanted, [*ours, *map(str.lower, ours.values())], 1, cutoff=0.3)
    by_class = {name.lower(): name for name in ours.values()}
    return f"{(ours | by_class)[near[0]] if near else 'StabilityMargin'}()"
