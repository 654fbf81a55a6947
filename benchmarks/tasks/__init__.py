"""Training tasks of every kind, small enough to train hundreds of them on a CPU.

`TASKS[name]` is a `Task`; `rates(task, optimizer, batch)` the learning rates that suit it, found
once by `python benchmarks/tasks/calibrate.py` and kept in rates.json. To add one, put a file with a
`TASK` into kinds/ and its name into one of the sets of sets.py, then calibrate it.
"""

from __future__ import annotations

import importlib
import pkgutil

from tasks import classifiers, kinds
from tasks.data import DataMissingError
from tasks.task import Evaluation, Task

__all__ = ["TASKS", "DataMissingError", "Evaluation", "Task"]

_FILES = sorted(info.name for info in pkgutil.iter_modules(kinds.__path__))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *classifiers.TASKS,
        *(importlib.import_module(f"tasks.kinds.{name}").TASK for name in _FILES),
    )
}
