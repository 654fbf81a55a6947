"""The optimizers that are known: what each reads, its formula, or why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from geomwatch.stability import beyond_torch as others
from geomwatch.stability import optimizers as own
from geomwatch.stability.step import Coming, Step

Decay = Literal["coupled", "decoupled", "own"]  # own: the formula sees to it
# Options by which libraries say that weight decay is decoupled.
_DECOUPLES = ("decoupled_weight_decay", "weight_decouple", "decouple", "decouple_wd")

_CONSTANT = "its steps have a constant size, whatever the curvature"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One optimizer as geomwatch knows it."""

    step: Callable[[Coming], Step] | None = None  # None: no limit is known
    state: tuple[str, ...] = ()  # tensors that it reads of a parameter's state
    options: tuple[str, ...] = ()  # that a group must have
    decay: Decay = "coupled"  # unless an option of the group says otherwise
    adaptive: bool = True  # preconditions its steps by the gradients it has seen
    start: Callable[[Mapping[str, Any], float], float] = own.sgd_start  # how much longer at first
    whole: bool = False  # needs each tensor as a whole
    sets_rate: bool = False  # finds its rate itself, so that no controller should
    directional: bool = False  # steps of constant size
    reason: str = ""  # why there is no limit

    def couples(self, group: Mapping[str, Any]) -> Decay:
        """Return how a group's weight decay enters."""
        said = [bool(group[name]) for name in _DECOUPLES if group.get(name) is not None]
        if self.decay == "own" or not said:
            return self.decay
        return "decoupled" if said[0] else "coupled"


def _without(reason: str, **more: Any) -> Algorithm:
    return Algorithm(reason=reason, **more)


_BETAS = ("lr", "betas", "eps")
_ADAM: dict[str, Any] = {
    "state": ("exp_avg", "exp_avg_sq"),
    "options": _BETAS,
    "start": own.first_moment_start,
}
_FACTORED: dict[str, Any] = {"decay": "decoupled", "whole": True}

# By the class whose step() runs.
TORCH: dict[str, Algorithm] = {
    "SGD": Algorithm(own.sgd, ("momentum_buffer",), ("lr",), adaptive=False),
    "Adam": Algorithm(own.adam, **_ADAM),
    "AdamW": Algorithm(own.adam, **_ADAM, decay="decoupled"),
    "RMSprop": Algorithm(
        own.rmsprop, ("square_avg",), ("lr", "alpha", "momentum", "centered", "eps"),
        start=own.rmsprop_start,
    ),
    "Adagrad": Algorithm(own.adagrad, ("sum",), ("lr", "lr_decay", "eps"), start=own.adagrad_start),
    "ASGD": Algorithm(own.asgd, (), ("lr", "lambd"), adaptive=False),
    "Adamax": Algorithm(
        own.adamax, ("exp_avg", "exp_inf"), _BETAS, start=own.first_moment_start
    ),
    "NAdam": Algorithm(
        own.nadam, ("exp_avg", "exp_avg_sq"), (*_BETAS, "momentum_decay"), start=own.nadam_start
    ),
    "RAdam": Algorithm(own.radam, **_ADAM),
    "Adadelta": Algorithm(own.adadelta, ("square_avg", "acc_delta"), ("lr", "rho", "eps")),
    "SparseAdam": Algorithm(own.sparse_adam, **_ADAM),
    "Adafactor": Algorithm(own.adafactor, (), ("lr", "beta2_decay", "eps", "d"), **_FACTORED),
    "Muon": _without(f"Muon orthogonalises each update: {_CONSTANT}", directional=True),
    "Rprop": _without(f"Rprop goes by signs alone: {_CONSTANT}", directional=True),
    "LBFGS": _without("LBFGS finds its step by a search: a margin has no meaning for it"),
}  # fmt: skip

# By the library and the class.
ELSEWHERE: dict[tuple[str, str], Algorithm] = {
    ("schedulefree", "SGDScheduleFree"): Algorithm(
        others.schedule_free_sgd, ("z",), ("lr", "momentum", "weight_sum"), adaptive=False
    ),
    ("schedulefree", "AdamWScheduleFree"): Algorithm(
        others.schedule_free_adamw, ("z", "exp_avg_sq"), (*_BETAS, "weight_sum"), decay="own"
    ),
    ("prodigyopt", "Prodigy"): Algorithm(
        others.prodigy,
        ("exp_avg", "exp_avg_sq"),
        (*_BETAS, "d"),
        start=others.corrected_or_not_start,
        sets_rate=True,
    ),
    ("dadaptation", "DAdaptAdam"): Algorithm(
        others.d_adapt_adam,
        ("exp_avg", "exp_avg_sq"),
        (*_BETAS, "d"),
        start=others.corrected_or_not_start,
        sets_rate=True,
    ),
    ("transformers", "Adafactor"): Algorithm(
        others.transformers_adafactor, (), ("lr", "clip_threshold", "eps"), **_FACTORED
    ),
    ("pytorch_optimizer", "AdEMAMix"): Algorithm(
        others.ademamix,
        ("exp_avg", "exp_avg_sq", "exp_avg_slow"),
        (*_BETAS, "alpha"),
        decay="decoupled",
        start=own.first_moment_start,
    ),
    ("pytorch_optimizer", "AdaBelief"): Algorithm(
        others.adabelief, ("exp_avg", "exp_avg_var"), _BETAS, start=own.first_moment_start
    ),
}

# By the class alone: no theory gives these a limit, in whatever library they are.
WITHOUT: dict[str, Algorithm] = {
    **{
        name: _without(f"{name} goes by signs alone: {_CONSTANT}", directional=True)
        for name in ("Lion", "SignSGD", "Tiger")
    },
    **{
        name: _without(f"{name} scales steps to the weights: {_CONSTANT}", directional=True)
        for name in ("Lamb", "LAMB", "LARS", "Lars")
    },
    **{
        name: _without(f"{name} orthogonalises each update: {_CONSTANT}", directional=True)
        for name in ("Muon", "AdaMuon", "AdaGO", "DistributedMuon", "MuonWithAuxAdam", "Scion")
    },
    **{
        name: _without(f"{name} clips each entry of its step: where it does, {_CONSTANT}")
        for name in ("Sophia", "SophiaG", "SophiaH")
    },
    **{
        name: _without(f"the preconditioner of {name} is not diagonal, and has no formula here")
        for name in ("SOAP", "Shampoo", "ScalableShampoo", "DistributedShampoo", "Kron", "PSGD")
    },
    **{
        name: _without(f"{name} takes its gradient at other weights than those it is measured at")
        for name in ("SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM")
    },
    "Lookahead": _without("Lookahead pulls the weights back to slow ones now and then"),
    "LBFGS": TORCH["LBFGS"],
    "PyTorchLBFGS": TORCH["LBFGS"],
    **{
        name: _without(f"{name} finds its rate itself, by a formula that is not here")
        for name in ("DAdaptAdaGrad", "DAdaptSGD", "DAdaptLion", "DAdaptAdan", "DAdaptation")
    },
}

# What an optimizer of an unknown class may turn out to be by its first steps, likeliest first.
CANDIDATES = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta")
