"""What all tests share: one thread, fixed seeds, no network, real data where it is installed."""

import importlib.util
import itertools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _clock_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no budget run out: how loaded the machine is decides nothing in a test."""
    monkeypatch.setattr("geomwatch.monitoring.budget.clock", lambda: 0.0)


@pytest.fixture
def clock_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a budget run out at once: each look at the clock finds a second gone by."""
    ticks = itertools.count()
    monkeypatch.setattr("geomwatch.monitoring.budget.clock", lambda: float(next(ticks)))


@pytest.fixture(autouse=True)
def _log_and_trackers() -> Iterator[None]:
    """Undo what a host's logging set-up or the tracker of another test has left in the process."""
    log = logging.getLogger("geomwatch")
    log.disabled, log.propagate = False, True
    log.setLevel(logging.NOTSET)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads WANDB_DIR once


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URI of an empty file store, which MLflow forgets again: it keeps one a process."""
    import mlflow

    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # put back, as the next line sets it too
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def needs_data() -> Callable[[str, str], Path]:
    """Return `find(package, file)`: where a data package keeps a file, or skip the test."""

    def find(package: str, file: str) -> Path:
        spec = importlib.util.find_spec(package)  # imports nothing
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"needs the data package {package}: run `make data`")
        return Path(spec.submodule_search_locations[0]) / file

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that read data, and skip those that need a GPU where there is none."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "needs_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
