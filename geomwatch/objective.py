"""One loss on one batch at one point: its value, gradient and Hessian-vector products."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.isolation import captured_by, isolated
from geomwatch.snapshot import Snapshot
from geomwatch.vectors import Layout

_SMALLEST_PART = 16  # items
_WRONG_DEVICE = "same device|expected device|expected on|weight type|storage has not been allocated"

LossFn: TypeAlias = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


class Objective:
    """The loss of `model` on a window of batches, as a deterministic function of the weights.

    L(w) = sum_b n_b loss_fn(model, b) / sum_b n_b over the batches b of the window, n_b their
    items. A context manager: inside, the model is isolated (see `isolation`) and every evaluation
    replays one random state, so dropout draws the same masks again, other ones for each batch.

    HVPs are double backward, H v = grad(<grad L, v>) (Pearlmutter 1994). For one batch the graph
    of the gradient is built once and kept: an HVP then costs 1.2-2.2 training steps. For several
    it is built anew for each batch and HVP (about 3), so that memory stays that of one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        *,
        layout: Layout | None = None,
        mode: str = "train",
        also: Sequence[object] = (),
    ) -> None:
        _check_options(loss_fn, mode)
        self.layout = layout or Layout.of(model)
        self.hvps = 0
        self.items = sum(batches.items(batch) for batch in window)
        if self.items == 0:
            raise UsageError(f"window must hold items, got {len(window)} batches without any.")
        self._model = model
        self._loss_fn = loss_fn
        self._window = list(window)
        self._mode = mode
        self._others = [*also, *captured_by(loss_fn)]
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None
        self._graph: list[Tensor] | None = None  # d loss / d param with graph, of a single batch
        self._loss: float | None = None
        self._gradient: Tensor | None = None

    def __enter__(self) -> Objective:
        self._loss = self._gradient = None
        self._snapshot = self._stack.enter_context(
            isolated(self._model, self.layout.params, others=self._others, mode=self._mode)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._graph = self._snapshot = None
        self._stack.close()

    @property
    def how(self) -> dict[str, str | int | float | bool]:
        """How the numbers are obtained: backend, dtype, mode and items."""
        return {
            "backend": "double_backward",
            "dtype": str(self.layout.dtype).removeprefix("torch."),
            "mode": self._mode,
            "items": self.items,
        }

    @property
    def changed_objects(self) -> list[str]:
        """Python state that the loss changed and that can't be put back."""
        return self._snapshot.changed_objects() if self._snapshot else []

    def loss(self) -> float:
        """Return L(w). Costs a forward and a backward pass, shared with `gradient`."""
        if self._loss is None:
            self.gradient()
        assert self._loss is not None
        return self._loss

    def gradient(self) -> Tensor:
        """Return the gradient of L.

        Raises:
            UsageError: the loss is no scalar tensor that depends on the parameters.
        """  # (D,)
        if self._gradient is None:
            losses = []
            total = torch.zeros(self.layout.dim, dtype=self.layout.dtype, device=self.layout.device)
            for weight, batch in self._sweep():
                loss, graph = self._differentiate(batch, create_graph=self._keeps_graph)
                losses.append(weight * loss.detach())
                total.add_(self.layout.flatten(graph), alpha=weight)
                self._graph = graph if self._keeps_graph else None
            self._loss = float(torch.stack(losses).sum())
            self._gradient = total
        return self._gradient

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, H the Hessian of L. One HVP."""  # (D,) -> (D,)
        self.hvps += 1
        if self._graph is not None:
            return self._differentiate_again(self._graph, v)
        total = torch.zeros_like(v)
        for weight, batch in self._sweep():
            _, graph = self._differentiate(batch, create_graph=True)
            total.add_(self._differentiate_again(graph, v), alpha=weight)
            self._graph = graph if self._keeps_graph else None
        return total

    def part(self, share: int) -> Objective | None:
        """Return the same loss on the first 1/`share` of the items, for use inside this block.

        A coarse stand-in at 1/`share` of the cost, never a number to report. None where the
        window has several batches or too few items.
        """
        if len(self._window) != 1 or self.items < _SMALLEST_PART * share:
            return None
        piece = batches.head(self._window[0], self.items // share)
        part = Objective(self._model, self._loss_fn, [piece], layout=self.layout, mode=self._mode)
        part._snapshot = self._snapshot
        # What the part does to the buffers would reach into the graph that is kept.
        self._graph = None
        return part

    def is_finite(self) -> bool:
        """Tell whether loss and gradient are finite, so that curvature has a meaning."""
        return math.isfinite(self.loss()) and bool(torch.isfinite(self.gradient()).all())

    @property
    def _keeps_graph(self) -> bool:
        return len(self._window) == 1

    def _sweep(self) -> Iterator[tuple[float, Any]]:
        """Yield each batch with its weight; state runs on through the window, as in training."""
        if self._snapshot is None:
            raise RuntimeError("an Objective is used inside its `with` block only")
        self._snapshot.restore()
        for batch in self._window:
            yield batches.items(batch) / self.items, batch

    def _differentiate(self, batch: Any, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        loss = self._evaluate(batch)
        params = self.layout.params
        found = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        if all(g is None for g in found):
            raise UsageError(
                "loss_fn must return a loss that depends on the model's parameters, got one that "
                f"depends on none of the {len(params)} measured. Use the model it is called with."
            )
        gradients = zip(params, found, strict=True)
        return loss, [torch.zeros_like(p) if g is None else g for p, g in gradients]

    def _differentiate_again(self, graph: Sequence[Tensor], v: Tensor) -> Tensor:
        # A gradient without grad_fn is constant in the parameters: its rows of H are zero.
        rows = [
            (g, piece)
            for g, piece in zip(graph, self.layout.unflatten(v), strict=True)
            if g.requires_grad
        ]
        if not rows:
            return torch.zeros_like(v)
        outputs, pieces = zip(*rows, strict=True)
        hv = torch.autograd.grad(
            outputs, self.layout.params, pieces, retain_graph=True, materialize_grads=True
        )
        return self.layout.flatten(hv)

    def _evaluate(self, batch: Any) -> Tensor:
        try:
            loss = self._loss_fn(self._model, batches.fresh_copy(batch))
        except RuntimeError as error:
            self._explain_device(batch, error)
            raise
        return _checked(loss)

    def _explain_device(self, batch: Any, error: RuntimeError) -> None:
        devices = {str(t.device) for t in batches.tensors(batch)}
        elsewhere = bool(devices) and str(self.layout.device) not in devices
        # Out of memory, say, has nothing to do with a batch that loss_fn itself moves.
        if elsewhere and re.search(_WRONG_DEVICE, str(error)):
            raise UsageError(
                f"batch must be on the model's device {self.layout.device}, got tensors on "
                f"{', '.join(sorted(devices))}. Move the batch before step(batch), or inside "
                f"loss_fn. (torch said: {error})"
            ) from error


def _check_options(loss_fn: object, mode: str) -> None:
    if not callable(loss_fn):
        raise UsageTypeError(
            f"loss_fn must be callable as loss_fn(model, batch), got {type(loss_fn).__name__}."
        )
    if mode not in ("train", "eval"):
        raise UsageError(f'mode must be "train" or "eval", got {mode!r}.')


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise UsageTypeError(
            f"loss_fn must return a scalar tensor, got {type(loss).__name__} {loss!r}. "
            "Return the loss itself, without .item() or float()."
        )
    if loss.numel() != 1:
        raise UsageError(
            f"loss_fn must return a scalar tensor, got shape {tuple(loss.shape)}. "
            "Reduce it the way you train on it, for example loss.mean()."
        )
    if not loss.requires_grad:
        raise UsageError(
            "loss_fn must return a loss that depends on the model's parameters, got a tensor "
            "without a graph. Don't detach it or compute it under torch.no_grad()."
        )
    return loss.reshape(())
