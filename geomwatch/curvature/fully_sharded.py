"""A model that fully_shard has cut, evaluated through its own hooks: gradients come as shards.

FSDP's forward and backward are collectives. A rank that stays away from one leaves the others
waiting for it, so ranks agree before each call of the model and before each backward pass. Within
them an error on one rank alone is what it is in training: the others wait until their collective
times out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.isolation.undo import attach
from geomwatch.vectors.fsdp import is_fully_sharded

_WIDE = (None, torch.float32, torch.float64)


class FullySharded:
    """What a probe needs of the modules that fully_shard has made its own."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [m for m in model.modules() if is_fully_sharded(m)]
        self._depth = 0  # of modules of ours whose forward is running

    def obstacle(self, params: Sequence[Tensor]) -> str:
        """Say why differences of losses and gradients have no meaning; "" where they have one."""
        narrow = {p.dtype for p in params} - set(_WIDE)
        where = "parameters are"
        for module in self._modules:
            policy = module._get_fsdp_state()._mp_policy
            asked = {policy.param_dtype, policy.reduce_dtype, policy.output_dtype} - set(_WIDE)
            if asked and not narrow:
                narrow, where = asked, "the MixedPrecisionPolicy of fully_shard asks for"
        if not narrow:
            return ""
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        return (
            f"{where} {names}, too coarse for differences (hvp='double_backward' measures a "
            "replica in float32, if there is memory for it)"
        )

    def unknown_reduction(self) -> bool:
        """Tell whether gradients are reduced by an operation of the user's own (older torch)."""
        return any(getattr(g, "reduce_scatter_reduce_op", None) for g in self._groups())

    def check(self) -> None:
        """Refuse to go on where FSDP would keep gradients to each rank.

        Raises:
            UsageError: gradient synchronisation is off.
        """
        if not all(group.reduce_grads and group.all_reduce_grads for group in self._groups()):
            raise UsageError(
                "gradients must be reduced over the ranks when a probe is due, got a model with "
                "set_requires_gradient_sync(False). Set it to True for the last micro-batch of a "
                "step, before its forward pass."
            )

    def gradient(self, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the shards of the sum over ranks of d loss / d p. One backward pass.

        Zero where no rank's loss depends on a parameter.
        """
        loss.backward()
        factors = self._factors()
        shards = [
            torch.zeros_like(p) if p.grad is None else p.grad.mul_(factors[id(p)]) for p in params
        ]
        for group in self._groups():
            for managed in group.fsdp_params:
                managed.sharded_param.grad = None
        return shards

    def settle(self) -> None:
        """Leave no module whole, and none in the middle of a pass.

        After a forward pass without backward the outermost module keeps its whole parameters, and
        would go on using them however the shards change.
        """
        for module in self._modules:
            if not hasattr(module, "reset_iter_state"):  # in older torch, good after whole passes
                module.reshard()
            elif module._get_fsdp_state()._is_root:
                module.reset_iter_state()

    def guard(self, agree: Callable[[], None]) -> None:
        """Call `agree` before each outermost forward pass until the block around ends."""

        def enter(*_: object) -> None:
            if self._depth == 0:
                agree()
            self._depth += 1

        def leave(*_: object) -> None:
            self._depth -= 1

        for module in self._modules:
            # before FSDP's own, which gathers the parameters
            attach(module.register_forward_pre_hook, enter, prepend=True)
            attach(module.register_forward_hook, leave, always_call=True)

    def _groups(self) -> Iterator[Any]:
        """The groups of parameters that FSDP gathers and reduces together."""
        for state in {id(s): s for s in (m._get_fsdp_state() for m in self._modules)}.values():
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # in older torch there is one at most
                groups = [state._fsdp_param_group] if state._fsdp_param_group else []
            yield from groups

    def _factors(self) -> dict[int, float]:
        """What FSDP has divided the sum of each parameter's gradients by."""
        return {
            id(managed.sharded_param): float(
                getattr(group, "gradient_divide_factor", None) or group.mesh_info.mesh.size()
            )
            for group in self._groups()
            for managed in group.fsdp_params
        }
