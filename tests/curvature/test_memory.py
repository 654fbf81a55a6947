"""A probe's memory: bounded by `micro_batch`, and free again when the probe ends."""

from __future__ import annotations

import gc

import pytest
import torch
from memory import QUICK, Training, peak, probe_peaks, step_peak
from torch.optim import AdamW

import geomwatch


def test_probes_in_quarters_of_a_batch_stay_below_1_2_training_steps() -> None:
    step = step_peak(QUICK)
    for found in probe_peaks(QUICK, QUICK.batch // 4):
        assert found < 1.2 * step


def test_the_peak_of_known_allocations_is_counted() -> None:
    def run() -> None:
        for _ in range(3):
            held = torch.zeros(1_000)
            del held
        pair = torch.zeros(1_000), torch.zeros(500)
        del pair

    assert peak(run) == 6_000


@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_a_probe_leaves_no_cycles_that_hold_its_tensors(hvp: str) -> None:
    training = Training(QUICK)
    assert isinstance(training.optimizer, AdamW)
    monitor = geomwatch.Monitor(
        training.model,
        geomwatch.model_loss,
        training.optimizer,
        how=geomwatch.Measurement(hvp=hvp),
        every=1,
    )
    training.backward()
    gc.collect()
    gc.disable()
    try:
        monitor.step(training.batch)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
