"""How to measure: one object that every entry point takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from geomwatch.curvature.settings import Settings
from geomwatch.errors import UsageError, UsageTypeError, did_you_mean
from geomwatch.quantities.table import check_names, resolve


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement(Settings):
    """How to measure: what Monitor, measure, doctor, landscape and the callbacks share.

    Checked when it is made. All arguments are keywords.

    Args:
        quantities: "default", "all", a name or names of quantities.
        operator: "hessian", or "ggn" for the generalised Gauss-Newton matrix, where the loss is a
            function of the model's outputs.
        hvp: how Hessian-vector products are computed: "auto"; "double_backward"; "one_sided", by
            one difference of gradients a product, where the loss is smooth; "finite_difference", by
            four. Of a model that fully_shard has cut: on a replica or on its local shards by memory
            ("auto"), on a replica ("double_backward"), or on the shards ("finite_difference").
        precision: "float32" (without autocast, whatever trains) or "training".
        mode: "train" (the flags of the training step) or "eval".
        micro_batch: evaluate so many items at a time, to bound the memory of a probe. A product is
            then dearer by a gradient.
        params: shell-style patterns of the parameter names to measure; all by default.
        also: another module the loss uses (a teacher, a discriminator) that probes must isolate,
            or several.
        items: what one item of a batch is, where it can't be told: the dimension that items lie
            along (1 of time-major sequences), or a function of a batch that counts them. What is
            cut into items is checked: their losses have to make up that of the batch.
        per_layer: lambda_max and trace of each module too, as "lambda_max/<module>" and
            "trace/<module>". Costs up to 10 products a module.
        batch: measure on this batch always, or on all of a DataLoader's, read once, instead of the
            step's own. Of a Monitor alone.
        seed: of the random vectors; the global generators are never touched.

    Raises:
        UsageError: (a ValueError) a value or a name is unknown.

    Example:
        >>> Measurement(quantities="lambda_max", micro_batch=8).micro_batch
        8
    """

    quantities: str | Sequence[str] = "default"
    params: str | Sequence[str] | None = None
    per_layer: bool = False
    batch: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        check_names(self.quantities)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(f"seed must be an integer, got {self.seed!r}.")

    def names(self, *, has_optimizer: bool) -> tuple[str, ...]:
        """Return the names of the quantities.

        Raises:
            UsageError: one that was asked for needs an optimizer.
        """
        return resolve(self.quantities, has_optimizer=has_optimizer)


OPTIONS = frozenset(field.name for field in fields(Measurement))
ARGUMENTS = ("how", "every", "budget", "rules", "controllers", "sinks", "on_alert")


def check_how(how: object) -> Measurement:
    """Return how to measure, the defaults for None.

    Raises:
        UsageTypeError: it is no Measurement.
    """
    if how is None:
        return Measurement()
    if isinstance(how, Measurement):
        return how
    raise UsageTypeError(
        f"how must be a geomwatch.Measurement, got {how!r:.80}.", write=_meant_by(how)
    )


def _meant_by(how: object) -> str:
    """Return the option that was probably meant by what stands where `how` does."""
    if isinstance(how, int | float) and not isinstance(how, bool):
        return f"every={how}" if isinstance(how, int) else f"budget={how}"
    if isinstance(how, Mapping):
        fields = ", ".join(f"{name}={_shown(value)}" for name, value in how.items())
        return f"how=geomwatch.Measurement({fields})"
    return "how=geomwatch.Measurement()"


def refuse_options(call: str, given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a Monitor, or what stands for one, does not have.

    `call` is how it is made, up to the options: "Monitor(model, loss_fn, optimizer".

    Raises:
        UsageError: there are any; the message ends with the line to write.
    """
    for name, value in given.items():
        _refuse(call, name, value)


def _refuse(call: str, name: str, value: Any) -> NoReturn:
    shown = _shown(value)
    lines = {
        "max_overhead": f"budget={shown}",
        "probe_batch": "how=Measurement(batch=...)",
        "schedule": "every=100" if value == "fixed" else "budget=0.02",
        "dry_run": "controllers=LearningRateCap(dry_run=True)",
    }
    if name in OPTIONS:
        lines[name] = f"how=Measurement({name}={shown})"
    name_of = call.partition("(")[0]
    joint = "" if call.endswith("(") else ", "
    if name not in lines:
        raise UsageError(
            f"{name_of} has no argument {name!r}.{did_you_mean(name, (*ARGUMENTS, *OPTIONS))} It "
            f"takes {', '.join(ARGUMENTS)}; how to measure is said by Measurement(...)."
        )
    raise UsageError(
        f"{name_of} must be given its options in the new way, got {name}={shown}.",
        write=f"{call}{joint}{lines[name]})",
    )


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, str | int | float | bool)
    return repr(value) if plain else "..."
