"""A case of the zoo, and its Hessian in float64 without geomwatch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import geomwatch
from geomwatch.curvature import batches


@dataclass(frozen=True)
class Case:
    """A model as a user would build it, how it is trained, and what a record must say of it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: Callable[[Any, Any], Tensor] = geomwatch.model_loss
    optimizer: Callable[..., Any] = torch.optim.AdamW

    # The same function of the same parameters in the same order, all of it twice differentiable.
    twin: Callable[[], nn.Module] | None = None
    twin_loss: Callable[[Any, Any], Tensor] | None = None
    # The model as it can run in float64, where an operation has no kernel for that.
    wide: Callable[[], nn.Module] | None = None
    # It computes parts of itself in float32, whatever its parameters are.
    mixed: bool = False
    # State follows its weights outside of autograd, and stands still in its twin and in a probe.
    still: bool = False

    # Its gradient takes a part of it for constant, by detach().
    held: bool = False

    # Of double backward without geomwatch: what torch says, or that it is wrong without a word.
    obstacle: str = ""
    silent: bool = False

    # What a record says of how it came about.
    backend: str = "double_backward"
    dtype: str = "float32"
    validation: str = ""  # why it is not validated
    validation_error: float = 1e-6  # the largest, where it is

    # The largest relative error of an HVP against the twin's in float64.
    float32: float = 1e-5
    float64: float = 1e-10

    def build(self) -> tuple[nn.Module, Any]:
        """The model, in train mode, and a batch; the same ones each time."""
        torch.manual_seed(0)
        return self.make().train(), self.batch()

    def build_wide(self) -> tuple[nn.Module, Any]:
        """The same in float64."""
        model, batch = self.build()
        wide = (self.wide or self.make)().train().double()
        load(wide, model)
        return wide, batches.fresh_copy(batch, torch.float64)

    def build_twin(self) -> nn.Module:
        """The twin in float64."""
        model, _ = self.build()
        twin = (self.twin or self.make)().train().double()
        load(twin, model)
        return twin

    @contextlib.contextmanager
    def wholly(self, dtype: torch.dtype) -> Iterator[None]:
        """Let a model in float64 compute in float64 throughout.

        An RMSNorm, a softmax or a loss in float32 would be all the error that is left to see.
        """
        with _Float64() if self.mixed and dtype == torch.float64 else contextlib.nullcontext():
            yield


def exact_hvp(case: Case, v: Tensor, *, seed: int) -> Tensor:
    """H v of the twin in float64, by double backward as it stands in torch's manual."""
    model, (_, batch) = case.build_twin(), case.build_wide()
    params = trainable(model)
    with case.wholly(torch.float64), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        loss = (case.twin_loss or case.loss_fn)(model, batch)
    return double_backward(loss, params, v)


def double_backward(loss: Tensor, params: Sequence[Tensor], v: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    slope = sum((g * piece).sum() for g, piece in zip(gradients, split(v, params), strict=True))
    return join(torch.autograd.grad(slope, params, materialize_grads=True))


def difference(case: Case, v: Tensor, *, seed: int, step: float = 1e-5) -> Tensor:
    """H v of the model as it trains, in float64, from differences of its gradients.

    Two central ones, the second at half the step, extrapolated to none (Richardson).
    """
    detached: list[Tensor] = []

    def gradient(displacement: Tensor) -> Tensor:
        model, batch = case.build_wide()
        if case.still:
            model = case.build_twin()
            case.loss_fn(model, batch)
        params = trainable(model)
        with torch.no_grad():
            for p, piece in zip(params, split(displacement, params), strict=True):
                p.add_(piece)
        held = _Held(detached) if case.held else contextlib.nullcontext()
        with case.wholly(torch.float64), held:
            torch.manual_seed(seed)
            case.loss_fn(model, batch).backward()
        return join([torch.zeros_like(p) if p.grad is None else p.grad for p in params])

    gradient(0 * v)  # what is detached here is held
    coarse, fine = ((gradient(h * v) - gradient(-h * v)) / (2 * h) for h in (step, step / 2))
    return (4 * fine - coarse) / 3


def learned(model: nn.Module) -> Tensor:
    """1 for each parameter, but 0 on the rows of embeddings that padding keeps as they are."""
    ones = {id(p): torch.ones_like(p) for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            ones[id(module.weight)][module.padding_idx] = 0
    return join([ones[id(p)] for p in trainable(model)]).double()


def load(model: nn.Module, other: nn.Module) -> None:
    """Copy weights and buffers one by one: twins may have other names for theirs."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    for mine, theirs in pairs:
        mine.copy_(theirs)


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    pieces = v.to(params[0].dtype).split([p.numel() for p in params])
    return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]


def join(tensors: Any) -> Tensor:
    return torch.cat([t.detach().to_dense().reshape(-1) for t in tensors])


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


class _Held(TorchFunctionMode):
    """Notes what is detached where nothing is noted yet, else detaches that again."""

    def __init__(self, detached: list[Tensor]) -> None:
        super().__init__()
        self._again = iter(list(detached)) if detached else None
        self._detached = detached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self._again is not None:
            return next(self._again)
        self._detached.append(func(*args))
        return self._detached[-1]
