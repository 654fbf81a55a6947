"""A probe leaves no trace: what is switched off, set up and put back around it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from geomwatch.isolation.precision import autocast_off
from geomwatch.isolation.random_state import Draws, RandomState
from geomwatch.isolation.snapshot import HOOKS, Snapshot
from geomwatch.isolation.tf32 import tf32_off
from geomwatch.isolation.twice_differentiable import twice_differentiable
from geomwatch.isolation.undo import enter, later, until_here

_GLOBAL_HOOKS = (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks)
_PROBING: ContextVar[bool] = ContextVar("geomwatch_probing", default=False)


def is_probing() -> bool:
    """Tell whether geomwatch is evaluating the loss, so that a hook or loss_fn can step aside."""
    return _PROBING.get()


@contextlib.contextmanager
def isolated(model: nn.Module, params: Sequence[Tensor], **options: Any) -> Iterator[Snapshot]:
    """Isolate a model (see `isolate`) for a `with` block."""
    with until_here():
        yield isolate(model, params, **options)


def isolate(
    model: nn.Module,
    params: Sequence[Tensor],
    *,
    others: Sequence[object] = (),
    draws: Draws | None = None,
    mode: str,
    autocast: bool = False,
    second_order: bool = True,
) -> Snapshot:
    """Have all that a probe changes put back bit for bit when the block around ends.

    Off until then: parameter and backward hooks (they would bend an HVP), autocast and TF32 (unless
    autocast is asked for), the caller's no_grad or inference_mode, and what has no second
    derivative (see `second_order`; not asked for, the kernels stay those of training). `.grad` is
    set aside, so that a loss_fn that calls backward() inside can't add to it. Forward hooks do run:
    spectral norm and FSDP need them.
    """
    later(functools.partial(_PROBING.set, _PROBING.get()))
    _PROBING.set(True)
    enter(torch.inference_mode(False))
    enter(torch.enable_grad())
    snapshot = Snapshot([model, *others], rng=RandomState(draws))
    if not autocast:
        autocast_off({p.device.type for p in params} | {"cpu"})
        tf32_off()
    if second_order:
        twice_differentiable(snapshot.modules)
    parameters = _parameters(snapshot.modules)
    _hooks_off(parameters, snapshot.modules)
    _gradients_aside(parameters)
    later(snapshot.finish)
    if _set_mode(model, mode):
        # Each evaluation is to start from the new mode, the end of the probe is not.
        snapshot = snapshot.anew(sharing=True)
    return snapshot


def _set_mode(model: nn.Module, mode: str) -> bool:
    # A model that trains keeps its flags as they are: the user may hold some BatchNorm in eval.
    if mode == "train" and not model.training:
        model.train()
        return True
    if mode == "eval" and any(m.training for m in model.modules()):
        model.eval()
        return True
    return False


def _hooks_off(params: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """Empty the hook dictionaries in place (autograd holds on to them)."""

    def dictionaries() -> list[dict[Any, Any]]:
        of_tensors = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in params]
        of_modules = [tuple(getattr(m, name) for name in HOOKS) for m in modules]
        every = itertools.chain(*of_tensors, *of_modules, _GLOBAL_HOOKS)
        return [hooks for hooks in every if hooks]

    filled = [(hooks, list(hooks.items())) for hooks in dictionaries()]

    def put_back() -> None:
        for hooks in dictionaries():  # of a loss_fn that registers hooks itself
            hooks.clear()
        for hooks, items in filled:
            hooks.update(items)

    later(put_back)
    for hooks, _ in filled:
        hooks.clear()


def _gradients_aside(params: Sequence[Tensor]) -> None:
    gradients = [p.grad for p in params]

    def put_back() -> None:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient

    later(put_back)
    for p in params:
        p.grad = None


def _parameters(modules: Iterable[nn.Module]) -> list[Tensor]:
    found = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    return list(found.values())
