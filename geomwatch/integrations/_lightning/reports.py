"""What a callback hands to a Trainer: metrics, checkpoints, and words about what it can't see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geomwatch.integrations._host.watch import survived
from geomwatch.integrations._lightning.host import steps_taken
from geomwatch.records import Record
from geomwatch.sinks import logger


def publish(trainer: Any, module: Any, prefix: str, record: Record) -> None:
    """Send a record to all loggers at the present step, and to callbacks and progress bar.

    To the loggers on rank zero, to the rest on every rank: callbacks decide on all of them.
    """
    metrics = record.scalars(prefix)
    for tracker in trainer.loggers if trainer.is_global_zero else ():
        with survived(f"the record of step {record.step} did not reach {type(tracker).__name__}"):
            tracker.log_metrics(metrics, step=steps_taken(trainer))
    if trainer.barebones:  # which allows no module.log
        return
    for name, value in metrics.items():
        # Not to the loggers: they would get it again at each step until the next probe.
        module.log(
            name,
            value,
            logger=False,
            prog_bar=name == f"{prefix}stability_margin",
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )


def react(trainer: Any, wanted: str | None) -> None:
    """Stop, or save a checkpoint, on all ranks."""
    step = steps_taken(trainer)
    if wanted == "stop":
        trainer.should_stop = True
    elif wanted == "save":
        path = _checkpoint_folder(trainer) / f"geomwatch-step={step + 1}.ckpt"
        trainer.save_checkpoint(path)
        logger.warning("step %d: saved %s, as on_critical asks.", step, path)


def tell_of_no_training(stage: str) -> None:
    """Tell that there is nothing to measure."""
    logger.warning(
        "GeomwatchCallback measures while trainer.fit() runs; in trainer.%s() there is nothing to "
        "see. Leave it out of a Trainer that does not train.",
        stage,
    )


def _checkpoint_folder(trainer: Any) -> Path:
    """Where the Trainer's own checkpoints go, or its logs, or all that it writes."""
    own = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(own or trainer.log_dir or trainer.default_root_dir)
