"""Products with the generalised Gauss-Newton matrix, by autograd alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.double_backward import differentiating_twice
from geomwatch.errors import UsageError
from geomwatch.isolation.undo import attach, until_here
from geomwatch.vectors.layout import Layout

_THROUGH = 1e-3  # of the gradient may bypass the outputs: more than rounding


@contextlib.contextmanager
def outputs_noted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that fills with the outputs of the model, at each call."""
    noted: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        noted.extend(_differentiable(output))

    with until_here():
        attach(model.register_forward_hook, note)
        yield noted


class GaussNewton:
    r"""G v = J' (d^2 loss / d z^2) J v for one batch, z the model's outputs, J = dz/dw.

    (Schraudolph 2002.) The Hessian without the curvature of the model itself: positive
    semi-definite where the loss is convex in z. J v is the derivative of J'u, linear in u, along
    v, so that reverse mode is enough. A product costs about three backward passes.

    Raises:
        UsageError: no output was noted, or the loss depends on the parameters past them (weight
            decay in the loss, an auxiliary loss of an inner layer).
        DoubleBackwardError: a backward failed.
    """

    @differentiating_twice()
    def __init__(self, loss: Tensor, outputs: Sequence[Tensor], leaves: Layout) -> None:
        self._leaves = leaves
        self._outputs = [z for z in outputs if z.requires_grad and z is not loss]
        if not self._outputs:
            raise UsageError(
                'operator="ggn" needs a loss of the model\'s outputs, got none: loss_fn does not '
                'call model(...), or the model returns its loss only. Use operator="hessian".'
            )
        self._slopes = torch.autograd.grad(
            loss, self._outputs, create_graph=True, materialize_grads=True
        )
        self._seeds = [torch.zeros_like(z).requires_grad_() for z in self._outputs]
        self._pulled = torch.autograd.grad(
            self._outputs, leaves.params, self._seeds, create_graph=True, materialize_grads=True
        )
        self.gradient = _grad([loss], leaves.params, None)  # of the loss
        self._check()

    @differentiating_twice()
    def __call__(self, v: Tensor) -> Tensor:
        """Return G v."""  # (D,) -> (D,)
        pieces = self._leaves.unflatten(v)
        rows = [(p, piece) for p, piece in zip(self._pulled, pieces, strict=True) if p.grad_fn]
        pushed = _grad([p for p, _ in rows], self._seeds, [piece for _, piece in rows])
        curved = [
            (s, t) for s, t in zip(self._slopes, pushed, strict=True) if s.requires_grad
        ]  # a slope without graph: the loss is linear in that output
        if not curved:
            return torch.zeros_like(v)
        bent = _grad([s for s, _ in curved], self._outputs, [t for _, t in curved])
        return self._leaves.flatten(_grad(self._outputs, self._leaves.params, bent))

    def _check(self) -> None:
        slopes = [s.detach() for s in self._slopes]
        through = self._leaves.flatten(_grad(self._outputs, self._leaves.params, slopes))
        whole = self._leaves.flatten(self.gradient)
        if float((through - whole).norm()) > _THROUGH * float(whole.norm()):
            raise UsageError(
                'operator="ggn" needs a loss that depends on the parameters through the model\'s '
                "outputs only, got one with other paths (weight decay in the loss, say, or an "
                'auxiliary loss). Use operator="hessian".'
            )


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, materialize_grads=True)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that a loss is made from: its logits, if it names them."""
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = getattr(output, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else batches.tensors(output)
    return [t for t in found if t.requires_grad and t.ndim > 0]
