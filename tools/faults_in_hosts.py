"""Faults in the probes of a training that a host drives: Lightning, Transformers, accelerate."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fault_injector import (
    Allocations,
    Fault,
    Lines,
    Tally,
    allocations_of,
    faults_at,
    inject,
    lines_of,
    points_in,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geomwatch

Train = Callable[[int], object]  # so many steps


class _EnoughError(Exception):
    """All faults have struck."""


class InHost:
    """Stands in the place of `Monitor.step`, which the host calls, and strikes there.

    The second call notes the lines of a probe and the third counts its allocations; each further
    one is struck by a fault. The call returns to the host whatever came of it.
    """

    def __init__(self, lines: int, allocations: int, rng: random.Random) -> None:
        self.at_lines, self.at_allocations = Tally(), Tally()
        self._limits, self._rng = (lines, allocations), rng
        self._faults: Iterator[tuple[Fault, Any, Tally]] = iter(())
        self._calls = 0
        self._places: list[str] = []

    def step(
        self, original: Callable[..., Any], monitor: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Call the step of a monitor, with the next fault."""

        def call() -> object:
            return original(monitor, *args, **kwargs)

        self._calls += 1
        monitor.resume()
        if self._calls == 1:
            return call()
        if self._calls == 2:
            self._places = lines_of(call)
            return None
        if self._calls == 3:
            self._faults = self._chosen(allocations_of(call))
            return None
        fault, mode, tally = next(self._faults, (None, None, Tally()))
        if fault is None:
            raise _EnoughError
        inject(fault, mode, monitor._watch.prober._prober._subject.model, call, tally, stops=False)
        return None

    def _chosen(self, allocations: int) -> Iterator[tuple[Fault, Any, Tally]]:
        lines, most = self._limits
        for fault in faults_at(points_in(self._places, lines, self._rng)):
            yield fault, Lines(fault.at_line), self.at_lines
        for point in range(1, min(allocations, most) + 1):
            fault = Fault(torch.OutOfMemoryError, point)
            yield fault, Allocations(fault.at_allocation), self.at_allocations


def in_host(train: Train, lines: int, allocations: int, rng: random.Random) -> tuple[Tally, Tally]:
    """Train until all faults have struck; return what came of those at lines and allocations."""
    struck = InHost(lines, allocations, rng)
    original = geomwatch.Monitor.step

    def step(monitor: Any, *args: Any, **kwargs: Any) -> Any:
        return struck.step(original, monitor, args, kwargs)

    geomwatch.Monitor.step = step  # type: ignore[method-assign]
    try:
        train(lines + allocations + 10)
    except _EnoughError:
        pass
    finally:
        geomwatch.Monitor.step = original  # type: ignore[method-assign]
    return struck.at_lines, struck.at_allocations


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)
    )


def _loader(steps: int) -> DataLoader[Any]:
    torch.manual_seed(1)
    inputs, labels = torch.randn(8 * steps, 6), torch.randint(0, 3, (8 * steps,))
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def _lightning(steps: int) -> None:
    import pytorch_lightning as pl

    from geomwatch.integrations.lightning import GeomwatchCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GeomwatchCallback(every=1)],
    )
    trainer.fit(Module(), _loader(steps))


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _transformers(steps: int) -> None:
    import transformers

    from geomwatch.integrations.transformers import GeomwatchCallback

    rows = [{"x": x, "labels": y} for x, y in _loader(steps).dataset]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            _Classifier(), arguments, train_dataset=rows, callbacks=[GeomwatchCallback(every=1)]
        )
        trainer.train()


def _accelerate(steps: int) -> None:
    from accelerate import Accelerator

    from geomwatch.integrations.accelerate import watch

    accelerator = Accelerator(cpu=True)
    net = _net()
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=1e-3), _loader(steps)
    )
    loss_fn = geomwatch.supervised(F.cross_entropy)
    monitor = watch(accelerator, model, loss_fn, optimizer, every=1)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()


HOSTS: dict[str, Train] = {
    "Lightning": _lightning,
    "Transformers": _transformers,
    "accelerate": _accelerate,
}
