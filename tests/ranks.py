"""Scenes that several processes play together over gloo, as torchrun would start them."""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib.util
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from geomwatch.records import Alert

_LONGEST = 120.0  # seconds before what still runs is killed, and the test fails
_GRACE = 3.0  # seconds that the others have once a rank has failed


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    value: Any = None  # what its scene returned
    error: str = ""  # or the traceback of what it raised
    seconds: float = 0.0
    is_gone: bool = False  # killed on the way


def run(scene: Callable[..., Any], folder: Path, *arguments: Any, group: bool = True) -> list[Any]:
    """Play `scene(rank, *arguments)` on two ranks; return what each returned.

    With `group` they share a process group already; hosts make their own.
    """
    outcomes = play(scene, folder, *arguments, group=group)
    failed = [f"rank {rank}: {o.error or 'it is gone'}" for rank, o in enumerate(outcomes)]
    assert not any(o.error or o.is_gone for o in outcomes), "\n".join(failed)
    return [outcome.value for outcome in outcomes]


def play(
    scene: Callable[..., Any], folder: Path, *arguments: Any, group: bool = True, size: int = 2
) -> list[Outcome]:
    """Play a scene in which a rank may fail or be killed."""
    part = (scene.__code__.co_filename, scene.__qualname__, folder, arguments, _port(), size, group)
    context: Any = _server()
    ranks = [context.Process(target=_rank, args=(rank, *part)) for rank in range(size)]
    for process in ranks:
        process.start()
    hung = _hung(ranks)
    for process in ranks:
        process.kill()
        process.join()
    assert not hung, f"ranks {hung} still ran after {_LONGEST:.0f} seconds"
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [
        torch.load(path, weights_only=False) if path.exists() else Outcome(is_gone=True)
        for path in paths
    ]


# DistributedDataParallel imports a compiler for four seconds.
_wanted = ["pytest", "geomwatch", "problems", "torch._inductor.config", "torch.distributed.fsdp"]


def preload(*modules: str) -> None:
    """Have modules imported once for all scenes; call it where a test module is imported."""
    _wanted.extend(modules)


def listen() -> list[str]:
    """Return a list that grows by what geomwatch logs on this rank."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("geomwatch").addHandler(handler)
    return said


class OnOneRank:
    """A rule that alerts on one rank only, at one step."""

    name = "odd"

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, seen: Any) -> Alert | None:
        if seen.index != self._step or dist.get_rank() != 1:
            return None
        return Alert("odd", "critical", "odd", 1.0, 0.0, seen.index)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def die(*, asleep: bool) -> None:
    """Take a rank away from the others: killed, or not coming back in time."""
    if asleep:
        time.sleep(_LONGEST / 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _hung(ranks: Sequence[Any]) -> list[int]:
    """Wait until all have ended, or until one has failed, as torchrun does; return who has not."""
    end = time.monotonic() + _LONGEST
    while any(process.is_alive() for process in ranks):
        if time.monotonic() > end:
            return [rank for rank, process in enumerate(ranks) if process.is_alive()]
        if any(process.exitcode == 1 for process in ranks):
            for process in ranks:
                process.join(_GRACE)
            return []
        time.sleep(0.05)
    return []


@functools.cache
def _server() -> BaseContext:
    """Return a context whose processes are forked where all that takes long is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_wanted)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # it does not hand on its own
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank(
    rank: int,
    file: str,
    name: str,
    folder: Path,
    arguments: Sequence[Any],
    port: int,
    size: int,
    group: bool,
) -> None:
    gc.freeze()  # what was imported: looking through it costs a second each time
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "scene",  # by which Lightning knows torchrun
        "HF_HUB_OFFLINE": "1",
    }
    # A rank that hangs says where.
    faulthandler.dump_traceback_later(0.9 * _LONGEST, file=sys.__stderr__)
    # The group ends with the process: taken down while a thread of gloo lets go of a tensor, it may
    # wait for that thread, which waits for the interpreter. Hosts and scripts call it by this name,
    # in this process alone.
    dist.destroy_process_group = lambda *_: None  # type: ignore[assignment]  # a function's place
    began = time.monotonic()
    try:
        if group:
            dist.init_process_group("gloo")
        outcome = Outcome(_scene(file, name)(rank, *arguments), seconds=time.monotonic() - began)
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        outcome = Outcome(error=traceback.format_exc(), seconds=time.monotonic() - began)
    torch.save(outcome, folder / f"{rank}.pt")
    os._exit(
        1 if outcome.error else 0
    )  # gloo's threads may abort a process that ends in the ordinary way


def _scene(file: str, name: str) -> Callable[..., Any]:
    """Load a scene from the file it is in, whatever a test runner calls that module."""
    module = Path(file).stem
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return functools.reduce(getattr, name.split("."), sys.modules[module])  # type: ignore[arg-type]
