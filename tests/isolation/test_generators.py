"""Random generators are put back wherever they are kept, on whichever device."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import drawing_elsewhere
import numpy as np
import pytest
import torch
from noise_outside import assert_unseen, denoised
from torch import Tensor, nn

from geomwatch.isolation.random_state import RandomState, sources

GLOBAL = torch.Generator()
BY_NAME = types.SimpleNamespace(inner=types.SimpleNamespace(generator=GLOBAL))
HIDDEN: dict[str, Any] = {}

Draw = Callable[[Any, torch.Size], Tensor]


def torchs(generator: torch.Generator, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator)


def numpys(generator: np.random.Generator, shape: torch.Size) -> Tensor:
    return torch.tensor(generator.normal(size=tuple(shape)), dtype=torch.float32)


def pythons(generator: random.Random, shape: torch.Size) -> Tensor:
    return torch.full(shape, generator.gauss(0, 1))


class Noisy:
    def __init__(self, generator: Any, draw: Draw) -> None:
        self.parts = {"noise": [types.SimpleNamespace(generator=generator)]}
        self.draw = draw

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        return denoised(model, x, self.draw(self.parts["noise"][0].generator, x.shape))

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return self(model, x)


@dataclasses.dataclass
class Held:
    generator: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    generator: Any


class OfClass:
    generator: Any = None


PLACES: dict[str, Callable[[Any, Draw], tuple[Any, Callable[[Tensor], Any]]]] = {}


def place(name: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        PLACES[name] = make
        return make

    return register


def same(x: Tensor) -> Tensor:
    return x


@place("closure")
def closure(g: Any, draw: Draw) -> Any:
    return lambda m, x: denoised(m, x, draw(g, x.shape)), same


@place("closure of what it calls")
def nested_closure(g: Any, draw: Draw) -> Any:
    def noise(x: Tensor) -> Tensor:
        return draw(g, x.shape)

    return lambda m, x: denoised(m, x, noise(x)), same


@place("default")
def default(g: Any, draw: Draw) -> Any:
    def loss_fn(m: nn.Module, x: Tensor, g: Any = g) -> Tensor:
        return denoised(m, x, draw(g, x.shape))

    return loss_fn, same


@place("partial")
def partial(g: Any, draw: Draw) -> Any:
    def loss_fn(g: Any, m: nn.Module, x: Tensor) -> Tensor:
        return denoised(m, x, draw(g, x.shape))

    return functools.partial(functools.partial(loss_fn, g)), same


@place("keyword of a partial")
def keyword_of_partial(g: Any, draw: Draw) -> Any:
    def loss_fn(m: nn.Module, x: Tensor, *, options: dict[str, Any]) -> Tensor:
        return denoised(m, x, draw(options["g"], x.shape))

    return functools.partial(loss_fn, options={"g": g}), same


@place("another partial")
def method_held(g: Any, draw: Draw) -> Any:
    held = functools.partial(draw, g)
    return lambda m, x: denoised(m, x, held(x.shape)), same


@place("slots")
def slotted(g: Any, draw: Draw) -> Any:
    held = Slotted(g)
    return lambda m, x: denoised(m, x, draw(held.generator, x.shape)), same


@place("behind a weak reference")
def weak(g: Any, draw: Draw) -> Any:
    held = Held(g)
    HIDDEN["kept"] = held
    reference = weakref.ref(held)
    return lambda m, x: denoised(m, x, draw(reference().generator, x.shape)), same


@place("attribute of a class")
def of_class(g: Any, draw: Draw) -> Any:
    OfClass.generator = g
    return lambda m, x: denoised(m, x, draw(OfClass().generator, x.shape)), same


@place("attribute of a function")
def attribute_of_function(g: Any, draw: Draw) -> Any:
    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return denoised(m, x, draw(loss_fn.generator, x.shape))

    loss_fn.generator = g
    return loss_fn, same


@place("behind a decorator")
def wrapped(g: Any, draw: Draw) -> Any:
    inner, _ = closure(g, draw)

    @functools.wraps(inner)
    def loss_fn(*args: Any) -> Tensor:
        return inner(*args)

    return loss_fn, same


@place("deep in the batch")
def deque_in_batch(g: Any, draw: Draw) -> Any:
    def collate(x: Tensor) -> Any:
        return {"x": x, "rest": collections.deque([{"g": (g,)}])}

    return lambda m, b: denoised(m, b["x"], draw(b["rest"][0]["g"][0], b["x"].shape)), collate


@place("attribute of the batch")
def object_in_batch(g: Any, draw: Draw) -> Any:
    return (
        lambda m, b: denoised(m, b.x, draw(b.g, b.x.shape)),
        lambda x: types.SimpleNamespace(x=x, g=g),
    )


@place("callable object")
def callable_object(g: Any, draw: Draw) -> Any:
    return Noisy(g, draw), same


@place("owner of a method")
def owner_of_a_method(g: Any, draw: Draw) -> Any:
    return Noisy(g, draw).loss, same


KINDS: dict[str, tuple[Draw, Callable[[], Any]]] = {
    "torch": (torchs, lambda: torch.Generator().manual_seed(5)),
    "NumPy": (numpys, lambda: np.random.default_rng(5)),
    "NumPy, old": (numpys, lambda: np.random.RandomState(5)),
    "Python": (pythons, lambda: random.Random(5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", PLACES)
def test_a_private_generator_is_put_back_wherever_it_is_kept(where, kind, caplog):
    draw, make = KINDS[kind]
    assert_unseen(lambda: PLACES[where](make(), draw))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def by_global(model: nn.Module, x: Tensor) -> Tensor:
    return denoised(model, x, torch.randn(x.shape, generator=GLOBAL))


def by_object_in_a_global(model: nn.Module, x: Tensor) -> Tensor:
    return denoised(model, x, torch.randn(x.shape, generator=BY_NAME.inner.generator))


def by_another_module(model: nn.Module, x: Tensor) -> Tensor:
    return denoised(model, x, drawing_elsewhere.noise(x.shape))


def by_a_generator_that_no_name_leads_to(model: nn.Module, x: Tensor) -> Tensor:
    found = globals()["HID" + "DEN"]["generator"]
    return denoised(model, x, torch.randn(x.shape, generator=found))


@pytest.mark.parametrize(
    "loss_fn",
    [
        by_global,
        by_object_in_a_global,
        by_another_module,
        by_a_generator_that_no_name_leads_to,
    ],
)
def test_a_generator_that_functions_name_or_use_is_put_back(loss_fn):
    def make() -> Any:
        for generator in (GLOBAL, drawing_elsewhere.GENERATOR):
            generator.manual_seed(5)
        HIDDEN["generator"] = torch.Generator().manual_seed(5)
        return loss_fn, lambda x: x

    assert_unseen(make)


class Device(types.ModuleType):
    """A module of torch for a device of somebody's own, with two generators."""

    def __init__(self) -> None:
        super().__init__("somebodys")
        self.generators = [torch.Generator().manual_seed(i) for i in range(2)]

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    def device_count(self) -> int:
        return 2

    def get_rng_state(self, device: Any) -> Tensor:
        return self.generators[torch.device(device).index].get_state()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        self.generators[torch.device(device).index].set_state(state)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch, torch._C._get_privateuse1_backend_name(), made, raising=False)
    return made


def test_the_generators_of_every_kind_of_device_are_put_back(device):
    before = RandomState()
    assert sum("privateuseone" in source.name for source in sources()) == 2
    first = [float(torch.rand((), generator=g)) for g in device.generators]
    assert before.changed() == ["torch on privateuseone:0", "torch on privateuseone:1"]
    before.restore()
    assert before.changed() == []
    assert [float(torch.rand((), generator=g)) for g in device.generators] == first


def test_training_with_a_devices_own_generator_is_bit_identical(device):
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        own = device.generators[1]
        return denoised(model, x, torch.randn(x.shape, generator=own))

    def make() -> Any:
        device.generators[1].manual_seed(3)
        return loss_fn, lambda x: x

    assert_unseen(make)


def test_a_device_that_was_not_used_is_not_asked_for_its_state(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("asking starts the device")

    monkeypatch.setattr(torch.cuda, "get_rng_state_all", refuse)
    monkeypatch.setattr(torch.xpu, "get_rng_state_all", refuse)
    RandomState().restore()
