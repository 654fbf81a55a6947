"""The same run in each host: a raw loop, accelerate, Lightning and the Hugging Face Trainer."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import geomwatch
from changing.net import ITEMS, loss_fn
from changing.run import Run


def raw(run: Run, *, watched: bool) -> None:
    """Train in a loop of one's own; the norm before clipping is told where nothing is summed."""
    case = run.case
    monitor = geomwatch.Monitor(run.net, loss_fn, run.optimizer, **run.options) if watched else None
    given = iter(run.batches())
    for step in range(run.steps):
        run.change_before(step)
        run.net.zero_grad()
        for tokens in itertools.islice(given, case.accumulate):
            loss = run.loss(run.net, tokens)
            (loss / (case.accumulate if case.divided else 1)).backward()
            if monitor is not None:
                monitor.observe(tokens)
        norm = None
        if case.clip is not None:
            norm = nn.utils.clip_grad_norm_(run.net.parameters(), case.clip)
        if monitor is not None:
            alone = case.accumulate == 1
            monitor.step(loss=loss.detach() if alone else None, grad_norm=norm if alone else None)
        run.optimizer.step()
        run.tape.clear()
    if monitor is not None:
        monitor.close()


def accelerated(run: Run, *, watched: bool) -> None:
    """Train in a loop on accelerate."""
    from accelerate import Accelerator

    from geomwatch.integrations.accelerate import watch

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=run.case.accumulate)
    loader = DataLoader(run.batches(), batch_size=None)
    model, run.optimizer, loader = accelerator.prepare(run.net, run.optimizer, loader)
    monitor = watch(accelerator, model, loss_fn, run.optimizer, **run.options) if watched else None
    for index, tokens in enumerate(loader):
        if index % run.case.accumulate == 0:
            run.change_before(index // run.case.accumulate, accelerator.prepare)
        with accelerator.accumulate(model):
            loss = run.loss(model, tokens)
            accelerator.backward(loss)
            if accelerator.sync_gradients and run.case.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), run.case.clip)
            if monitor is not None:
                monitor.step(tokens, loss=loss.detach())
            run.optimizer.step()
            run.optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.tape.clear()
    if monitor is not None:
        monitor.close()
    accelerator.free_memory()


def _changing_in_lightning(run: Run) -> Any:
    import pytorch_lightning as pl

    class Changing(pl.Callback):
        """Makes the change before its step."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if not run.tape.batches and run.change_before(trainer.global_step):
                trainer.strategy.optimizers = [run.optimizer]

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if (args[-1] + 1) % run.case.accumulate == 0:
                run.tape.clear()

    return Changing()


def in_lightning(run: Run, *, watched: bool) -> None:
    """Train by a Lightning Trainer, whose callback makes the change."""
    import pytorch_lightning as pl

    from geomwatch.integrations.lightning import GeomwatchCallback

    class Module(pl.LightningModule):
        """The net, and the tape."""

        def __init__(self) -> None:
            super().__init__()
            self.net = run.net

        def training_step(self, tokens: Tensor) -> Tensor:
            return run.loss(self.net, tokens)

        def configure_optimizers(self) -> Any:
            return run.optimizer

    callbacks = [_changing_in_lightning(run)]
    if watched:
        callbacks.append(GeomwatchCallback(**run.options))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=run.steps,
        accumulate_grad_batches=run.case.accumulate,
        gradient_clip_val=run.case.clip,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(run.batches(), batch_size=None)
    trainer.fit(Module(), loader)


class Constant(torch.optim.lr_scheduler.LRScheduler):
    """Leaves the rates as they are, of however many groups."""

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


class WithLoss(nn.Module):
    """The net as a Trainer expects it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self._loss = run.net, run.loss

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"loss": self._loss(self.net, tokens)}


def in_transformers(run: Run, *, watched: bool) -> None:
    """Train by a Hugging Face Trainer, whose callback makes the change."""
    import transformers

    from geomwatch.integrations.transformers import GeomwatchCallback

    class Trainer(transformers.Trainer):
        """Draws in order."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Changing(transformers.TrainerCallback):
        """Makes the change before its step."""

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            run.optimizer = kwargs["optimizer"]

        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if run.change_before(state.global_step, trainer.accelerator.prepare):
                trainer.optimizer = run.optimizer

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            run.tape.clear()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=ITEMS,
            gradient_accumulation_steps=run.case.accumulate,
            max_grad_norm=run.case.clip or 0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1000,
        )
        rows = torch.cat(run.batches())
        callbacks: list[Any] = [Changing()]
        if watched:
            callbacks.append(GeomwatchCallback(**run.options))
        trainer = Trainer(
            model=WithLoss(run),
            args=arguments,
            train_dataset=[{"tokens": row} for row in rows],
            callbacks=callbacks,
            optimizers=(run.optimizer, Constant(run.optimizer)),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


HOSTS: dict[str, Callable[..., None]] = {
    "raw": raw,
    "accelerate": accelerated,
    "Lightning": in_lightning,
    "Transformers": in_transformers,
}


def train(run: Run, *, watched: bool) -> list[Tensor]:
    """Train in the host of its case, and return what must be the same watched or not."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hosts about small runs, and schedulers
        HOSTS[run.case.host](run, watched=watched)
    return run.state()
