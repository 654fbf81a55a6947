"""One training, watched: its losses, its difficulty, and its states at the three stages."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geomwatch
from studies.cases import Case
from studies.data import Batch
from studies.settings import STAGES, Settings
from studies.store import Store

loss_fn = geomwatch.supervised(F.cross_entropy)

_SMOOTHING = 10  # steps over which the training loss is averaged for `steps_to_target`
_PIECE = 500  # items evaluated at a time


def train(store: Store, case: Case, seed: int, settings: Settings) -> dict[str, Any]:
    """Train a net, keep its states, and return what happened on the way."""
    data = case.data(settings)
    model = case.build(seed, settings)
    states = {0: STAGES[0], settings.early: STAGES[1], settings.steps: STAGES[2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from it
        trace = _watched(store, case, seed, model, states, settings)
    train_batch = data.first(len(data.held_out[1]))
    return trace | {
        "train": evaluate(model, train_batch),
        "test": evaluate(model, data.held_out),
        "steps_to_target": steps_to_target(trace["losses"], case.target),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _watched(
    store: Store,
    case: Case,
    seed: int,
    model: nn.Module,
    states: dict[int, str],
    settings: Settings,
) -> dict[str, Any]:
    optimizer = case.optimizer(model)
    quantities = ["lambda_max", "difficulty", "stability_margin"]  # every tenth of the run
    monitor = geomwatch.Monitor(
        model,
        loss_fn,
        optimizer,
        how=geomwatch.Measurement(quantities=quantities),
        every=settings.early,
        rules=[],
    )
    batches = case.data(settings).batches(seed, settings.batch)
    losses: list[float] = []
    for step in range(settings.steps + 1):
        if step in states:
            store.keep_state(state_name(case, seed, states[step]), model.state_dict())
        batch = next(batches)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        if step == settings.steps:  # the last state is looked at, not left
            break
        optimizer.step()
        losses.append(loss.item())
    monitor.close()
    probes = [
        {name: record[name].value for name in quantities} | {"step": record.step}
        for record in monitor.history
    ]
    difficulty = {states[p["step"]]: p["difficulty"] for p in probes if p["step"] in states}
    return {"losses": losses, "difficulty": difficulty, "probes": probes}


def evaluate(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return loss and share of right answers in eval mode."""
    was_training = model.training
    model.eval()
    loss = right = 0.0
    with torch.no_grad():
        for inputs, targets in zip(batch[0].split(_PIECE), batch[1].split(_PIECE), strict=True):
            logits = model(inputs)
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(1) == targets).sum())
    model.train(was_training)
    return {"loss": loss / len(batch[1]), "accuracy": right / len(batch[1])}


def steps_to_target(losses: list[float], target: float) -> int | None:
    """Return after how many steps the mean of the last ten losses is below the target; or None."""
    for step in range(_SMOOTHING, len(losses) + 1):
        if math.fsum(losses[step - _SMOOTHING : step]) / _SMOOTHING < target:
            return step
    return None


def state_name(case: Case, seed: int, stage: str) -> str:
    """Return the name that a state is kept under."""
    return f"{case.name}/seed{seed}-{stage}"


def restored(store: Store, case: Case, seed: int, stage: str, settings: Settings) -> nn.Module:
    """Return a net at a stage of its training, in train mode."""
    model = case.build(seed, settings)
    state: dict[str, Tensor] = store.state(state_name(case, seed, stage))
    model.load_state_dict(state)
    return model
