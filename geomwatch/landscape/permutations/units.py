"""Which units of a net can change places without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.isolation.isolation import isolated
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.permutations import operations as ops

Units: TypeAlias = Mapping[str, Sequence[tuple[str, int]]]  # name -> (key of the state, axis)

_FIXED = 0  # the group of inputs and outputs, whose order is given
_ADVICE = (
    "align knows chains and residual sums of Linear, Conv, BatchNorm, LayerNorm, elementwise "
    "functions, pooling and flattening. Pass units={name: [(key, axis), ...]} for others."
)


class _Flow(NamedTuple):
    """A tensor on its way: the group its channels belong to, and where they are."""

    group: int
    shape: str  # "maps" (N, C, ...), "flat" (N, C * places), "rows" (..., C), "any"

    def flattened(self) -> _Flow:
        return self._replace(shape="flat") if self.shape == "maps" else self


@traceless
def permutable_units(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """Return the groups of hidden units, with all axes of the state that a permutation moves.

    Found in a symbolic trace of the model's forward (torch.fx), without evaluating it: what leaves
    a layer is permuted together with what enters the next; a residual sum joins two groups; inputs
    and outputs keep their order. An axis may be a whole multiple of the group, as behind a
    flattening.

    Raises:
        UsageError: the forward can't be traced, or has an operation that does not treat each
            channel alike.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> permutable_units(net)
        {'units 1': [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]}
    """
    try:
        with isolated(model, tuple(model.parameters()), mode="eval"):
            from torch import fx

            graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever tracing meets in a forward
        raise UsageError(
            f"align must be able to trace the forward of {type(model).__name__}, got "
            f"{type(error).__name__}: {error}. {_ADVICE}"
        ) from error
    return _Trace(model).of(graph)


class _Trace:
    """Groups of axes, joined as the graph of the forward is gone through."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._keys: dict[int, list[str]] = {}  # a tied tensor has several
        for key, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                self._keys.setdefault(id(tensor), []).append(key)
        self._parents = [_FIXED]
        self._sizes: dict[int, int] = {}
        self._axes: dict[tuple[int, int], int] = {}  # (id of a tensor, axis) -> group

    def of(self, graph: Any) -> dict[str, list[tuple[str, int]]]:
        flows: dict[Any, _Flow | None] = {}
        for node in graph.nodes:
            inputs = [flows[n] for n in node.all_input_nodes]
            known = [flow for flow in inputs if flow is not None]
            if node.op == "placeholder":
                flows[node] = _Flow(_FIXED, "any")
            elif node.op == "output":
                for flow in known:
                    self._join(flow.group, _FIXED)
            else:
                flows[node] = self._follow(node, known)
        return self._found()

    def _follow(self, node: Any, flows: Sequence[_Flow]) -> _Flow | None:
        if node.op == "call_module":
            return self._through_module(node.target, self._modules[node.target], flows[0])
        if node.op == "get_attr":
            raise self._refused(node, "a bare parameter or buffer")
        if not flows or node.target in ops.SIZES:
            return None
        if node.target in ops.SUMS:
            return self._sum(node, flows)
        if all(self._root(flow.group) == _FIXED for flow in flows):
            return _Flow(_FIXED, "any")
        return self._through_function(node, flows[0])

    def _through_function(self, node: Any, flow: _Flow) -> _Flow:
        if node.target in ops.ELEMENTWISE:
            return flow
        flattens = node.target in ops.FLATTENING or (
            node.target in ops.RESHAPES and _to_rows(node.args[1:])
        )
        averages = node.target in ops.MEANS and flow.shape == "maps" and 1 not in _dims(node)
        if flattens or averages:
            return flow.flattened()
        if node.target in ops.MEANS and flow.shape == "rows" and _dims(node) == (1,):
            return flow
        raise self._refused(node, "an operation")

    def _through_module(self, name: str, module: nn.Module, flow: _Flow) -> _Flow:
        if isinstance(module, nn.Linear) and flow.shape in ("flat", "rows", "any"):
            return self._layer(name, module, flow, (1, 0), "rows")
        if isinstance(module, ops.CONVOLUTIONS) and flow.shape in ("maps", "any"):
            return self._convolution(name, module, flow)
        if (
            isinstance(module, ops.TRANSPOSED)
            and module.groups == 1
            and flow.shape in ("maps", "any")
        ):
            return self._layer(name, module, flow, (0, 1), "maps")
        if isinstance(module, ops.EACH_FOR_ITSELF):
            return flow
        if isinstance(module, ops.PER_CHANNEL) and self._keeps_channels(module, flow):
            self._bind_vectors(module, flow)
            return flow
        if isinstance(module, nn.Flatten):
            return flow.flattened()
        if self._root(flow.group) == _FIXED and not list(module.parameters()):
            return _Flow(_FIXED, "any")
        raise UsageError(
            f"align does not know how to permute {name!r} ({type(module).__name__}) here. {_ADVICE}"
        )

    def _keeps_channels(self, module: nn.Module, flow: _Flow) -> bool:
        if isinstance(module, nn.LayerNorm):
            return flow.shape != "maps" and len(module.normalized_shape) == 1
        return not isinstance(module, nn.GroupNorm) or module.num_groups == 1

    def _convolution(self, name: str, module: Any, flow: _Flow) -> _Flow:
        if module.groups == 1:
            return self._layer(name, module, flow, (1, 0), "maps")
        if module.groups == module.in_channels == module.out_channels:  # depthwise
            self._bind(module.weight, 0, flow.group)
            self._bind_vectors(module, flow, ("bias",))
            return _Flow(flow.group, "maps")
        raise UsageError(
            f"align does not know how to permute {name!r}, a convolution of {module.groups} groups."
            f" {_ADVICE}"
        )

    def _layer(
        self, name: str, module: Any, flow: _Flow, axes: tuple[int, int], shape: str
    ) -> _Flow:
        """Bind what comes in, begin a group for what goes out."""
        into, out = axes
        if id(module.weight) not in self._keys:
            raise UsageError(
                f"align must find the weight of {name!r} in the state, which is parametrized. "
                f"{_ADVICE}"
            )
        length = module.weight.shape[into]
        size = self._sizes.get(self._root(flow.group))
        if size is not None and (length % size or (flow.shape != "flat" and length != size)):
            raise UsageError(
                f"align found {length} inputs of {name!r} for {size} units before it. {_ADVICE}"
            )
        self._bind(module.weight, into, flow.group)
        self._parents.append(len(self._parents))
        group = len(self._parents) - 1
        self._sizes[group] = module.weight.shape[out]
        self._bind(module.weight, out, group)
        made = _Flow(group, shape)
        self._bind_vectors(module, made, ("bias",))
        return made

    def _bind_vectors(
        self,
        module: nn.Module,
        flow: _Flow,
        names: Iterable[str] = ("weight", "bias", "running_mean", "running_var"),
    ) -> None:
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() > 1:
                self._bind(tensor, 0, flow.group)

    def _bind(self, tensor: Tensor, axis: int, group: int) -> None:
        """Note that an axis is permuted with a group; one that is bound twice joins two groups."""
        before = self._axes.setdefault((id(tensor), axis), group)
        self._join(before, group)

    def _sum(self, node: Any, flows: Sequence[_Flow]) -> _Flow:
        shapes = {flow.shape for flow in flows} - {"any"}
        if len(shapes) > 1:
            raise self._refused(node, "a sum of tensors of different kinds")
        for flow in flows[1:]:
            self._join(flows[0].group, flow.group)
        return _Flow(flows[0].group, shapes.pop() if shapes else "any")

    def _join(self, a: int, b: int) -> None:
        a, b = sorted((self._root(a), self._root(b)))
        self._parents[b] = a  # the smaller: _FIXED stays what it is

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _found(self) -> dict[str, list[tuple[str, int]]]:
        found: dict[int, list[tuple[str, int]]] = {}
        for (tensor, axis), group in self._axes.items():
            if self._root(group) != _FIXED:
                slots = found.setdefault(self._root(group), [])
                slots += [(key, axis) for key in self._keys[tensor]]
        return {f"units {i}": slots for i, slots in enumerate(found.values(), 1)}

    def _refused(self, node: Any, what: str) -> UsageError:
        target = getattr(node.target, "__name__", node.target)
        return UsageError(f"align does not know how to permute {what}, {target!r}. {_ADVICE}")


def _to_rows(args: tuple[Any, ...]) -> bool:
    """Tell whether a reshape is to (N, all the rest)."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    return len(sizes) == 2


def _dims(node: Any) -> tuple[int, ...]:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 1)
    return tuple(dims) if isinstance(dims, tuple | list) else (dims,)
