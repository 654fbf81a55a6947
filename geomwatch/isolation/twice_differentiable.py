"""Parts of torch without a second derivative, switched to equal ones that have it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from geomwatch.isolation.norms import spectral_norm_held, weight_norm_written_out
from geomwatch.parallel.sync_norm import sync_norm_alone


@contextlib.contextmanager
def twice_differentiable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Compute attention, RNNs, norms, checkpoints and compiled code so that they can be.

    The results differ by rounding only. Costs nothing for attention; an LSTM's gradient is up to
    1.4 times as expensive.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_checkpoints_not_reentrant())
        stack.enter_context(weight_norm_written_out())
        stack.enter_context(spectral_norm_held())
        stack.enter_context(sync_norm_alone())
        if any(isinstance(m, nn.RNNBase) for m in modules):
            stack.enter_context(_disabled(torch.backends.mkldnn))
            stack.enter_context(_disabled(torch.backends.cudnn))
        stack.enter_context(not_compiled())
        yield


def not_compiled() -> contextlib.AbstractContextManager[object]:
    """Run what torch.compile has compiled as it was written, and compile nothing anew."""
    # Importing dynamo takes seconds; nothing is compiled unless somebody has done it already.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _disabled(backend: Any) -> Iterator[None]:
    # Not `backend.flags(enabled=False)`: it sets all other flags too, and warns on doing so.
    before, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = before


@contextlib.contextmanager
def _checkpoints_not_reentrant() -> Iterator[None]:
    """Send checkpoint(use_reentrant=True) the way of use_reentrant=False.

    torch.autograd.grad refuses a reentrant checkpoint, or passes it over and finds no gradient
    for the parameters inside it, if no measured parameter comes before it.
    """

    def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve)

    function: Any = CheckpointFunction
    before = vars(function).get("apply")
    function.apply = staticmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del function.apply  # and inherit it again
        else:
            function.apply = before
