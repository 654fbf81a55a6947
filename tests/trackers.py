"""What real trackers have kept on disk, read back for the tests: {key: [(step, value), ...]}."""

from __future__ import annotations

import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Scalars = dict[str, list[tuple[int, float]]]

_BLOCK = 32768  # bytes, of the LevelDB log that a .wandb file is
_LAST = (1, 4)  # types of a chunk that ends a record: whole, last


def tensorboard_scalars(folder: Path) -> Scalars:
    """Read the event files of one run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    keys = events.Tags()["scalars"]
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def wandb_scalars(folder: Path) -> Scalars:
    """Read the history of the only run that WANDB_MODE=offline has kept under a folder."""
    (file,) = folder.rglob("run-*.wandb")
    found: Scalars = defaultdict(list)
    for record in _finished(file):
        items = record.history.item
        row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        for key, value in row.items():
            found[key].append((row["_step"], value))
    return found


def mlflow_scalars(uri: str, experiment: str) -> Scalars:
    """Read the only run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {
        # Hosts log asynchronously, and two threads may write in either order.
        key: sorted(
            (metric.step, metric.value)
            for metric in client.get_metric_history(run.info.run_id, key)
        )
        for key in run.data.metrics
    }


def _finished(file: Path) -> list[Any]:
    """Wait for the end of the file, which another process writes after run.finish() returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(600):
        records = []
        for data in _chunks(file.read_bytes()):
            records.append(Record())
            records[-1].ParseFromString(data)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{file} is not finished")


def _chunks(log: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: each a checksum, its length, its type, then data."""
    at, record = 7, b""  # past the header
    while at + 7 <= len(log):
        room = _BLOCK - at % _BLOCK
        if room < 7:  # for another header: filled with zeros
            at += room
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in _LAST and at <= len(log):
            yield record
            record = b""
