"""The monitor of a training run: due? -> measure -> rules -> controllers -> sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.controllers.actuators import Actuator
from geomwatch.controllers.conductor import Conductor
from geomwatch.controllers.protocol import Controller, check_controllers
from geomwatch.curvature.checks import check_optimizer, check_options
from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.monitoring.dispatch import Judge
from geomwatch.monitoring.memory import Difficulty
from geomwatch.monitoring.options import is_disabled
from geomwatch.monitoring.pace import Pace, is_frugal
from geomwatch.monitoring.probe_data import fixed_window
from geomwatch.monitoring.prober import Probed, Prober
from geomwatch.monitoring.progress import StepCounter, StepScalars, gradient_norm
from geomwatch.monitoring.safe_prober import Guard
from geomwatch.observation.step import Settled
from geomwatch.parallel.ranks import Ranks, unwrapped
from geomwatch.quantities.table import resolve
from geomwatch.records import Adjustment, Alert, Record
from geomwatch.rules import Observation, Rule
from geomwatch.sinks import Sink, run_line
from geomwatch.stability.optimizers import is_adaptive
from geomwatch.stability.problem import cold_start, learning_rates, planned_rates, unwrap
from geomwatch.vectors.layout import Layout

_PLACE = (
    "Call monitor.step(batch) once per optimizer step, after loss.backward() and before "
    "optimizer.step()."
)


class Monitor:
    """Watches the geometry of the loss while a model trains, and warns before it goes wrong.

    Call `step(batch)` between `loss.backward()` and `optimizer.step()`. When a probe is due it
    measures and returns a Record, otherwise None. Training is bit-identical with and without it.

    Args:
        model: the module in training.
        loss_fn: (model, batch) -> the scalar loss that is trained on, evaluated again by probes.
        optimizer: the optimizer in use; it sets the limit that the margin is measured against.
        every: optimizer steps between two probes of a calm run, at most. From 100 on an adaptive
            schedule is also held to a tenth of the work of training, so that the probes of a young
            run lie further apart; an interval below 100 is taken as asked for, and so are the
            measurements that a controller needs.
        schedule: "adaptive" (denser when it matters) or "fixed".
        max_overhead: upper bound on probe time over the rest of the run's time, for example 0.05,
            by the clock and instead of that tenth. Sentinels may take half as much beside.
        quantities: "default", "all", or names of quantities.
        probe_batch: measure on this batch always, or on all of a DataLoader's, read once, instead
            of the step's own.
        mode: "train" (the flags of the training step) or "eval".
        operator: "hessian", or "ggn" for the generalised Gauss-Newton matrix, where the loss is a
            function of the model's outputs.
        micro_batch: evaluate so many items at a time, to bound the memory of a probe.
        per_layer: lambda_max and trace of each module too, at whole probes.
        hvp: how HVPs are computed: "auto", "double_backward" or "finite_difference". Of a model
            that fully_shard has cut: on a replica or on its local shards by memory, on a replica,
            or on the shards.
        precision: "float32" (without autocast, whatever trains) or "training".
        params: shell-style patterns of the parameter names to measure; all by default.
        also: other modules the loss uses (a teacher, a discriminator) that probes must isolate.
        rules: the rules to judge by; `default_rules()` by default.
        controllers: what may adjust the training, for example `LearningRateCap()`; nothing by
            default.
        dry_run: log what controllers would do, and do nothing.
        on_alert: called with each Alert; on rank zero.
        sinks: called with each line of the run's log, for example `JsonLines("run.jsonl")`.
        seed: of the probes' own random vectors; the global generators are never touched.

    Raises:
        UsageError: (a ValueError) an argument can't work; at construction or at the first probe.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Any,
        *,
        every: int = 100,
        schedule: str = "adaptive",
        max_overhead: float | None = None,
        quantities: str | Sequence[str] = "default",
        probe_batch: Any = None,
        mode: str = "train",
        operator: str = "hessian",
        micro_batch: int | None = None,
        per_layer: bool = False,
        hvp: str = "auto",
        precision: str = "float32",
        params: str | Sequence[str] | None = None,
        also: Sequence[object] = (),
        rules: Sequence[Rule] | None = None,
        controllers: Sequence[Controller] | Controller = (),
        dry_run: bool = False,
        on_alert: Callable[[Alert], None] | None = None,
        sinks: Sequence[Sink] = (),
        seed: int = 0,
    ) -> None:
        _check_options(model, max_overhead)
        check_options(loss_fn, mode=mode, operator=operator, hvp=hvp, precision=precision)
        check_optimizer(optimizer)
        controllers = check_controllers(controllers)
        for controller in controllers if dry_run else ():
            vars(controller)["dry_run"] = True
        needed = {name for c in controllers for name in getattr(c, "needs", ())}
        names = tuple(dict.fromkeys((*resolve(quantities, has_optimizer=True), *sorted(needed))))
        self._ranks = Ranks.of(model)
        model = unwrapped(model)
        layout = Layout.of(model, params)
        frugal = is_frugal(schedule, every, max_overhead, needed)
        self._guard = Guard(
            Prober(
                model,
                loss_fn,
                optimizer,
                names,
                layout=layout,
                mode=mode,
                operator=operator,
                also=also,
                micro_batch=micro_batch,
                per_layer=per_layer,
                hvp=hvp,
                precision=precision,
                every=every if quantities == "default" else None,
                warms_up=schedule == "adaptive",
                frugal=frugal,
                seed=seed,
                ranks=self._ranks,
                needed=needed,
            )
        )
        self._pace = Pace(
            schedule,
            every,
            self._guard,
            self._ranks,
            max_overhead=max_overhead,
            frugal=frugal,
            controlled=bool(controllers),
        )
        self._disabled = is_disabled()
        self._control = Conductor(() if self._disabled else controllers, optimizer)
        self._judge = Judge(rules, sinks, on_alert, self._control)
        self._difficulty = Difficulty() if "difficulty" in names else None
        self._optimizer = optimizer
        self._optimizer_name = _describe(optimizer)
        self._adaptive = is_adaptive(unwrap(optimizer))
        self._params = layout.params
        self._fixed_window = fixed_window(probe_batch)
        self._counter = StepCounter(None if self._disabled else unwrap(optimizer), layout.params)
        self._scalars = StepScalars(self._ranks)
        self._window: list[Any] = []
        self._lr: tuple[float, ...] = ()  # of the last call
        self._called = False
        self._facts = {
            "torch": torch.__version__,
            "optimizer": self._optimizer_name,
            "parameters": layout.dim,
            "every": every,
            "schedule": schedule,
            "quantities": list(names),
            "mode": mode,
            "operator": operator,
            "seed": seed,
            "controllers": [type(c).__name__ for c in controllers],
            "dry_run": dry_run,
        }

    @property
    def name(self) -> str:
        """What stands in front of all it says; a Group sets it."""
        return self._judge.name

    @name.setter
    def name(self, name: str) -> None:
        self._judge.name = name

    @property
    def history(self) -> list[Record]:
        """All records so far."""
        return self._judge.history

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far."""
        return self._judge.alerts

    @property
    def adjustments(self) -> list[Adjustment]:
        """All adjustments so far, with those that a dry run or advice only speaks of."""
        return self._judge.adjustments

    @property
    def probe_seconds(self) -> float:
        """Wall time spent in probes so far."""
        return self._guard.seconds

    @property
    def params(self) -> list[Tensor]:
        """The parameters that it measures."""
        return list(self._params)

    def start_at(self, step: int) -> None:
        """Count from `step` on: so many optimizer steps the run has taken without this monitor.

        Raises:
            UsageError: it is no number of steps, or `step()` has been called.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise UsageError(
                f"step must be the number of optimizer steps taken so far, got {step!r}. Pass an "
                "integer >= 0."
            )
        if self._called:
            raise UsageError(
                f"start_at({step}) must come before the first monitor.step(), got step "
                f"{self._counter.steps} counted already. Call it where the monitor is built."
            )
        self._counter.steps = step
        self._pace.last_probe = step - 1

    def succeed(self, before: Monitor) -> None:
        """Take the place of a monitor of other parameters: the same run goes on.

        Its step, the memories of its rules and controllers and all that it has recorded are taken
        over. The first probe starts cold.

        Raises:
            UsageError: it has other rules or controllers.
        """
        self.start_at(before.state_dict()["step"])
        self._judge.load_state_dict(before._judge.state_dict())
        self._control.load_state_dict(before._control.state_dict())
        self.history.extend(before.history)
        self.alerts.extend(before.alerts)
        self.adjustments.extend(before.adjustments)

    def check_gradient(self, remedy: str = _PLACE) -> None:
        """Make sure that there is a gradient which the optimizer has not stepped with.

        Raises:
            UsageError: there is none; the message ends with `remedy`.
        """
        if not self._counter.has_gradient():
            raise UsageError(f"monitor.step() must find gradients, got none. {remedy}")
        if self._counter.gradient_is_used_up():
            raise UsageError(
                "monitor.step() must come before optimizer.step(), got a gradient that it has "
                f"stepped with already. {remedy}"
            )

    def observe(self, batch: Any) -> None:
        """Note a micro-batch of the accumulation window that the coming step averages over."""
        if not self._disabled and not self._guard.paused:
            self._window.append(batch)

    def step(
        self,
        batch: Any = None,
        *,
        loss: Tensor | float | None = None,
        grad_norm: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> Record | None:
        """Watch one optimizer step; call it after backward() and before optimizer.step().

        With a GradScaler or clipping, after `unscale_` and after `clip_grad_norm_`.

        Args:
            batch: the step's batch (or use `observe` for each micro-batch of a window).
            loss: the step's loss; lets the loss rule see every step. No host sync.
            grad_norm: what `clip_grad_norm_` returned, to know the norm before clipping.
            grad_scale: what a GradScaler has the gradients multiplied by where nothing calls
                `unscale_` before its `step`: `scaler.get_scale()`.

        Returns:
            The Record when a probe was due, else None.

        Raises:
            UsageError: at the first call, when it is made in the wrong place or without a batch.
        """
        if self._disabled:
            return None
        if batch is not None:
            self.observe(batch)
        window, self._window = self._window, []
        if not self._called:
            self._check_place(window)
        self._control.lift()
        settled = self._exchange(loss, grad_norm, grad_scale)
        now = self._counter.steps, self._lr, self._control.scale
        if self._pace.probe_due(*now):
            probed = self._probe(window, loss, grad_scale, noise=self._pace.noise_matters(now[0]))
            return self._conclude(settled, probed)
        glanced = self._pace.glance_due(*now) and self._glance(window, loss, grad_scale)
        if glanced and self._pace.second_look_due(self._observation(settled, None, glanced)):
            probed = self._probe(window, loss, grad_scale, noise=True)
            return self._conclude(settled, probed, glanced=True)
        return self._conclude(settled, None, glanced=glanced)

    def equip(self, *actuators: Actuator) -> None:
        """Take what turns the knobs of this loop's host, for controllers to use."""
        self._control.equip(*actuators)

    def release(self) -> None:
        """Give the loop its own knobs back, for another monitor to turn; watching goes on."""
        self._control.close()

    def pause(self) -> None:
        """Stop probing; loss and gradient are still watched."""
        self._guard.paused = True

    def resume(self) -> None:
        """Probe again, after `pause` or after failed probes."""
        self._guard.resume()

    def close(self) -> None:
        """Judge the last step, take the hook off the optimizer and close the sinks."""
        settled = self._scalars.take(self._counter.steps)
        if settled is not None:
            self._conclude(settled, None)
        self._tell_of_a_short_run()
        self._counter.close()
        self._control.close()
        self._judge.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives; the first probe after loading them starts cold."""
        # Without a hook the step of the last call is counted by the next one.
        uncounted = not self._counter.is_automatic and bool(self._lr)
        return {
            "step": self._counter.steps + uncounted,
            "lr": list(self._lr),
            "last": self._scalars.state_dict(),
            "guard": self._guard.state_dict(),
            "schedule": self._pace.state_dict(),
            "prober": self._guard.prober.state_dict(),
            "rules": self._judge.state_dict(),
            "control": self._control.state_dict(),
            "difficulty": self._difficulty.state_dict() if self._difficulty else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another monitor of the same run stopped.

        Raises:
            UsageError: it was saved with other rules or controllers.
        """
        self._judge.load_state_dict(state["rules"])
        self._control.load_state_dict(state["control"])
        self._lr = tuple(state["lr"])
        uncounted = not self._counter.is_automatic and bool(self._lr)
        self._counter.steps = state["step"] - uncounted
        self._scalars.load_state_dict(state["last"])
        self._pace.load_state_dict(state["schedule"], step=state["step"])
        self._guard.load_state_dict(state["guard"])
        self._guard.prober.load_state_dict(state["prober"])
        if self._difficulty and state["difficulty"]:
            self._difficulty.load_state_dict(state["difficulty"])

    def _check_place(self, window: Sequence[Any]) -> None:
        self.check_gradient()
        self._ranks.refuse_join()
        alone = self._ranks.size == 1  # another rank may have items
        if alone and not (window or self._fixed_window or self._guard.paused):
            raise UsageError(
                "monitor.step() must know the batch, got none. Pass it as step(batch), call "
                "observe(batch) for each micro-batch, or give the monitor a probe_batch."
            )
        self._called = True
        self._judge.emit(run_line(self._facts))

    def _exchange(
        self, loss: Tensor | float | None, grad_norm: Tensor | float | None, grad_scale: float
    ) -> Settled | None:
        """Read what the last step left behind and start copying this step's scalars."""
        if not self._counter.is_automatic and self._lr:
            self._counter.count()
        steps = self._counter.steps
        settled = self._scalars.take(steps)
        norm = gradient_norm(self._params) / grad_scale if grad_norm is None else grad_norm
        self._scalars.put(steps, loss, norm)
        if settled is not None and self._difficulty is not None:
            lr = self._control.scale * max(self._lr)
            self._difficulty.update(lr, settled, self._guard.prober.lambda_max())
        self._lr = learning_rates(self._optimizer)
        return settled

    def _glance(
        self, window: Sequence[Any], loss: Tensor | float | None, grad_scale: float
    ) -> bool:
        own = self._fixed_window or window
        if not self._ranks.any(bool(own)):
            return False
        index = self._counter.steps
        known = self._guard.glance(
            own, index, self._lr, same_data=window, loss=_number(loss), grad_scale=grad_scale
        )
        self._pace.glanced(index, self._lr, self._control.scale)
        return known

    def _probe(
        self,
        window: Sequence[Any],
        loss: Tensor | float | None,
        grad_scale: float,
        *,
        noise: bool,
    ) -> Probed | None:
        own = self._fixed_window or window
        if not self._ranks.any(bool(own)):
            self._guard.tell(
                "step() has no batch to probe on, so nothing is measured. Pass it as step(batch), "
                "or call observe(batch) for each micro-batch."
            )
            return None
        step = self._pace.last_probe = self._counter.steps
        probed = self._guard.probe(
            own,
            step,
            same_data=window,
            noise=noise,
            loss=_number(loss),
            grad_scale=grad_scale,
        )
        self._pace.probed(step, probed, self._control.scale)
        return probed

    def _conclude(
        self, settled: Settled | None, probed: Probed | None, *, glanced: bool = False
    ) -> Record | None:
        record = probed.record if probed is not None else None
        if record is not None and self._difficulty is not None:
            estimates = {**record.estimates, "difficulty": self._difficulty.estimate()}
            record = replace(record, estimates=estimates)
        return self._judge(self._observation(settled, record, glanced), record)

    def _observation(
        self, settled: Settled | None, record: Record | None, glanced: bool
    ) -> Observation:
        last = self._guard.last
        return Observation(
            index=self._counter.steps,
            lr=self._lr,
            optimizer=self._optimizer_name,
            margin=self._guard.margin.at(self._lr),
            fresh=record is not None,
            gradient_margin=self._guard.gradient_margin.at(self._lr),
            gradient_fresh=glanced or record is not None,
            cold_start=cold_start(self._optimizer, self._counter.steps),
            adaptive=self._adaptive,
            limit_ratio=last.limit_ratio if last is not None else 1.0,
            peak=planned_rates(self._optimizer, self._lr),
            same_data=self._guard.prober.same_data,
            estimates=record.estimates if record is not None else None,
            provenance=record.provenance if record is not None else None,
            loss=record.loss if record is not None else None,
            items=last.items if last is not None else 0,
            layers=last.layers if last is not None else (),
            settled=settled,
        )

    def _tell_of_a_short_run(self) -> None:
        steps, every = self._counter.steps, self._pace.every
        is_fixed = self._facts["schedule"] == "fixed"
        if is_fixed and self._pace.last_probe == 0 and 1 < steps <= every:
            self._guard.tell(
                f"every must be smaller than the run, got every={every} for {steps} steps: only "
                f"the first was probed. Pass every={max(1, steps // 10)}, say, or leave out "
                'schedule="fixed".'
            )


def _check_options(model: object, max_overhead: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if max_overhead is None:
        return
    if not isinstance(max_overhead, float | int) or not max_overhead > 0:
        raise UsageError(
            f"max_overhead must be a positive share such as 0.05 for 5 %, got {max_overhead!r}."
        )


def _number(loss: Tensor | float | None) -> float | None:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss


def _describe(optimizer: Any) -> str:
    inner: Any = unwrap(optimizer)
    group = inner.param_groups[0] if getattr(inner, "param_groups", None) else {}
    options = [f"{k} {group[k]:g}" for k in ("momentum", "weight_decay") if group.get(k)]
    return " ".join([type(inner).__name__, *options])
