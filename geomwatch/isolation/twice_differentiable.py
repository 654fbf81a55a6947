"""Parts of torch without a second derivative, switched to equal ones that have it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from geomwatch.isolation.sync_norm import alone
from geomwatch.isolation.undo import enter, later, swap


def twice_differentiable(modules: Sequence[nn.Module]) -> None:
    """Compute attention, RNNs, norms, checkpoints and compiled code so that they can be.

    The results differ by rounding only. Costs nothing for attention; an LSTM's gradient is up to
    1.4 times as expensive.
    """
    enter(sdpa_kernel(SDPBackend.MATH))
    _checkpoints_not_reentrant()
    weight_norm_written_out()
    spectral_norm_held()
    swap(nn.SyncBatchNorm, "forward", alone)
    if any(isinstance(m, nn.RNNBase) for m in modules):
        _disable(torch.backends.mkldnn)
        _disable(torch.backends.cudnn)
    not_compiled()


def not_compiled() -> None:
    """Run what torch.compile has compiled as it was written, and compile nothing anew."""
    # Importing dynamo takes seconds; nothing is compiled unless somebody has done it already.
    if "torch._dynamo" in sys.modules:
        enter(torch.compiler.set_stance("force_eager"))


def weight_norm_written_out() -> None:
    """Compute g v / ||v|| by operations whose second derivative is right.

    That of torch's fused one takes ||v|| for a constant, without a word: HVPs of small nets are 15
    to 50 % off (torch 2.13 on a CPU).
    """

    def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, dim))

    # The norm by hooks has imported it under its own name.
    owners: list[Any] = [torch, sys.modules["torch.nn.utils.weight_norm"]]
    for owner in owners:
        swap(owner, "_weight_norm", weight_norm)


def spectral_norm_held() -> None:
    """Hold the singular vectors of each spectral norm as the first evaluation leaves them.

    A power iteration outside of autograd makes them follow the weights. In a displaced evaluation
    they would follow too, and the Jacobian of the gradient be asymmetric, by half its norm in nets
    that have trained: no operator whose spectrum could be told. Held, the loss is the function of
    the weights whose gradient training uses, and double backward is its Hessian.
    """
    held: dict[Hashable, list[Tensor]] = {}
    power_method, compute_weight = _SpectralNorm._power_method, SpectralNorm.compute_weight

    def hold(key: Hashable, vectors: Sequence[Tensor], iterate: Callable[[], object]) -> None:
        if key not in held:
            iterate()
            held[key] = [vector.clone() for vector in vectors]
        for vector, value in zip(vectors, held[key], strict=True):
            vector.data.copy_(value)  # unseen by a graph that has saved the vector

    def held_power_method(norm: Any, weight: Tensor, count: int) -> None:
        hold(norm, (norm._u, norm._v), lambda: power_method(norm, weight, count))

    def held_weight(hook: SpectralNorm, module: nn.Module, do_power_iteration: bool) -> Any:
        if do_power_iteration:
            vectors = [getattr(module, hook.name + end) for end in ("_u", "_v")]
            hold((module, hook.name), vectors, lambda: compute_weight(hook, module, True))
        return compute_weight(hook, module, do_power_iteration=False)

    swap(_SpectralNorm, "_power_method", held_power_method)
    swap(SpectralNorm, "compute_weight", held_weight)


def _disable(backend: Any) -> None:
    # Not `backend.flags(enabled=False)`: it sets all other flags too, and warns on doing so.
    later(functools.partial(setattr, backend, "enabled", backend.enabled))
    backend.enabled = False


def _checkpoints_not_reentrant() -> None:
    """Send checkpoint(use_reentrant=True) the way of use_reentrant=False.

    torch.autograd.grad refuses a reentrant checkpoint, or passes it over and finds no gradient
    for the parameters inside it, if no measured parameter comes before it.
    """

    def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve)

    swap(CheckpointFunction, "apply", staticmethod(apply))
