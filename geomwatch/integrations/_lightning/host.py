"""What a callback asks a Lightning Trainer, can't work with, and hands to it."""

from __future__ import annotations

import fnmatch
import glob
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from geomwatch.errors import UsageError
from geomwatch.integrations._host.words import survived
from geomwatch.isolation.random_state import RandomState
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Alert, Look, Record
from geomwatch.sinks.log import logger
from geomwatch.sinks.tracker import send_alert


def steps_taken(trainer: Any) -> int:
    """Return the step at which a Trainer logs: the number of batches it has stepped on."""
    # as DeviceStatsMonitor does; global_step counts the steps of each optimizer
    taken = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if taken is None else taken)


def steps_to_come(trainer: Any) -> float:
    """Return how many optimizer steps a run will take; infinity where that is unknown."""
    steps = float(trainer.estimated_stepping_batches)  # -1: as many as the data last
    return steps - steps_taken(trainer) if steps >= 0 else float("inf")


def refuse_what_no_probe_can_follow(trainer: Any, module: Any) -> None:
    """Refuse a Trainer whose gradients, or a module whose batches, can't be known.

    Raises:
        UsageError: it is one.
    """
    _refuse_unknown_gradients(trainer)
    _refuse_own_fetching(module)


def _refuse_unknown_gradients(trainer: Any) -> None:
    """Refuse strategies that leave less than the whole gradient of the step in `p.grad`.

    Raises:
        UsageError: a strategy that accumulates by itself (DeepSpeed), or does not average over
            processes as DistributedDataParallel and fully_shard do.
    """
    name = type(trainer.strategy).__name__
    ranks = Ranks.of(trained_model(trainer))
    if trainer.strategy.handles_gradient_accumulation:
        raise UsageError(
            f"GeomwatchCallback must find gradients in p.grad, got {name}, which keeps them to "
            "itself. Use another strategy."
        )
    if ranks.size != trainer.world_size:
        raise UsageError(
            "GeomwatchCallback must find gradients that are averaged over all processes, got "
            f"{name} with {trainer.world_size}. Use DDPStrategy, or ModelParallelStrategy with "
            "fully_shard (FSDP2) in configure_model()."
        )


def trained_model(trainer: Any) -> Any:
    """Return the module as its strategy has wrapped it, where there are several processes."""
    return trainer.strategy.model


def gradient_scale(trainer: Any, optimizer: Any) -> float:
    """Return what a GradScaler has the gradient multiplied by: fused optimizers divide by it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0


def prepared(trainer: Any, batch: Any) -> Any:
    """Treat a batch of the user's as the training loop treats those of its loader."""
    random = RandomState()  # hooks may augment
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    random.restore()
    return batch


def names_of(optimizer: Any, module: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Return the names, as patterns, of the optimizer's parameters that these patterns match."""
    wanted = [patterns] if isinstance(patterns, str) else patterns
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in module.named_parameters() if id(p) in own]
    if wanted is not None:
        names = [n for n in names if any(fnmatch.fnmatchcase(n, w) for w in wanted)]
    return [glob.escape(name) for name in names]


def _refuse_own_fetching(module: Any) -> None:
    """Refuse a training_step that takes its batches from the loader itself.

    Raises:
        UsageError: its batches can't be known.
    """
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UsageError(
            "training_step must be given its batch, so that a probe can use it too, got one that "
            "takes it from dataloader_iter itself. Define training_step(batch, batch_idx)."
        )


def losses_by_name(
    module: Any, loss_fn: Any, optimizers: int
) -> dict[str, Callable[[Any, Any], Any] | None]:
    """Return a loss for each optimizer: the user's, the module's `geometry_loss`, or None.

    None stands for training_step, which gives its loss under automatic optimisation only.

    Raises:
        UsageError: losses and optimizers don't go together.
    """
    if isinstance(loss_fn, Mapping):
        if len(loss_fn) == optimizers:
            return dict(loss_fn)
        raise UsageError(
            "loss_fn must name a loss for each optimizer that configure_optimizers() returns, got "
            f"{len(loss_fn)} ({', '.join(map(str, loss_fn))}) for {optimizers}."
        )
    if optimizers > 1:
        raise UsageError(
            f"loss_fn must name a loss for each of {optimizers} optimizers, got "
            f"{'none' if loss_fn is None else 'one for all'}. Pass GeomwatchCallback(loss_fn="
            '{"generator": ..., "discriminator": ...}), functions (module, batch) -> loss in the '
            "order of configure_optimizers()."
        )
    if loss_fn is None and hasattr(module, "geometry_loss"):
        return {"": geometry_loss}
    if loss_fn is None and not module.automatic_optimization:
        raise UsageError(
            "loss_fn must be given for a module with manual optimisation, whose training_step "
            "steps the optimizer itself. Pass GeomwatchCallback(loss_fn=...), a function (module, "
            "batch) -> loss, or give the module a method geometry_loss(batch)."
        )
    return {"": loss_fn}


def geometry_loss(module: Any, batch: Any) -> Any:
    """Evaluate the loss that a module offers for this purpose."""
    return module.geometry_loss(batch)


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


def publish_looks(
    trainer: Any, prefix: str, looks: Sequence[tuple[str, Look]], alerts: Sequence[Alert]
) -> None:
    """Send what was seen along steps to all loggers, and alerts to those that have any."""
    for tracker in trainer.loggers if trainer.is_global_zero and (looks or alerts) else ():
        with survived(f"looks did not reach {type(tracker).__name__}"):
            for name, look in looks:
                start = f"{prefix}{name}/" if name else prefix
                tracker.log_metrics(look.scalars(start), step=steps_taken(trainer))
            for alert in alerts:
                send_alert(tracker.experiment, alert, prefix)


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
