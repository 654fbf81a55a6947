"""The monitor of a training run: due? -> measure -> rules -> controllers -> sinks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from geomwatch.controllers.actuators import CLIP, SKIP, Actuator
from geomwatch.controllers.claim import claim
from geomwatch.controllers.conductor import Conductor
from geomwatch.controllers.protocol import Controller, check_controllers
from geomwatch.curvature.checks import check_batch, check_loss_fn, check_optimizer
from geomwatch.curvature.settings import LossFn
from geomwatch.curvature.subject import Subject
from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.backlog import Backlog
from geomwatch.monitoring.budget import DEFAULT_BUDGET, Account, budget_of
from geomwatch.monitoring.changes import Changes, changed_line, strangers_line
from geomwatch.monitoring.dispatch import Dispatch
from geomwatch.monitoring.face import check_state, is_disabled, run_facts
from geomwatch.monitoring.fixed_window import fixed_window
from geomwatch.monitoring.inspection import Inspector
from geomwatch.monitoring.memory import Difficulty
from geomwatch.monitoring.movement import MovementSampler
from geomwatch.monitoring.probed import Probed
from geomwatch.monitoring.prober import Prober
from geomwatch.monitoring.scalars import Late, StepScalars, arriving, checked, gradient_norm
from geomwatch.monitoring.schedule import Cadence
from geomwatch.monitoring.step_counter import StepCounter
from geomwatch.monitoring.taken_steps import TakenSteps
from geomwatch.monitoring.view import View
from geomwatch.monitoring.watch import Coming, Watch
from geomwatch.observation.findings import Findings, Present
from geomwatch.observation.movement import Movement
from geomwatch.observation.step import Settled
from geomwatch.parallel.ranks import Ranks, unwrapped
from geomwatch.quantities.measurement import Measurement, check_how, refuse_options
from geomwatch.quantities.plan import Plan
from geomwatch.quantities.table import paces_of
from geomwatch.records import Alert, Estimate, Record
from geomwatch.rules.calm import Calm
from geomwatch.rules.rule import Rule
from geomwatch.sinks.given import as_sinks
from geomwatch.sinks.lines import Sink, run_line
from geomwatch.sinks.log import logger
from geomwatch.stability.problem import learning_rates, unwrap
from geomwatch.vectors.layout import Layout

T = TypeVar("T")

STATE = 2  # the version of what state_dict returns
_HEAD = ("version", "step", "of")  # of it, beside the memory

_PLACE = (
    "Call monitor.step(batch) once per optimizer step, after loss.backward() and before "
    "optimizer.step()."
)


_IN_BACKWARD = (
    "Its parameters have hooks that step in the backward pass itself, so that no step can be seen "
    "before it is taken. Let the optimizer step after backward(), or measure such a run now and "
    "then."
)
_ORDER = "loss.backward(); monitor.step(batch, loss=loss.detach()); optimizer.step()"


class Monitor(View, Resumable):
    """Watches the geometry of the loss while a model trains, and warns before it goes wrong.

    Call `step(batch)` between `loss.backward()` and `optimizer.step()`. When a probe is due it
    measures and returns a Record, otherwise None. Training is bit-identical with and without it,
    but for what loss_fn changes beside the model, random generators apart: what goes on with each
    evaluation, such as an iterator or a counter, is found and told before the first step.

    Args:
        model: the module in training.
        loss_fn: (model, batch) -> the scalar loss that is trained on, evaluated again by probes.
        optimizer: the optimizer in use; it sets the limit that the margin is measured against.
        how: how to measure: a Measurement.
        every: optimizer steps between two probes of the spectrum. None: as the budget allows,
            dense where it matters (see `Cadence`).
        budget: the share of training time that all of geomwatch may take, such as 0.05 for 5 %;
            None for no limit. With `every` too, the stricter of the two; an `every` that is given
            alone has no limit. Sentinels, the looks between probes, are made in any case: where
            steps are too short for the budget they are the least that watches.
        rules: the rules to judge by, or one; `default_rules()` by default.
        controllers: what may adjust the training, for example `LearningRateCap()`; nothing by
            default.
        sinks: called with each line of the run's log; a path such as "run.jsonl" is a file of it.
        on_alert: called with each Alert; on rank zero.

    Raises:
        UsageError: (a ValueError) an argument can't work; at construction or at the first probe.
    """

    _counter: Kept[StepCounter]
    _lr: Kept[tuple[float, ...]]
    _scalars: Kept[StepScalars]
    _account: Kept[Account]
    _watch: Kept[Watch]
    _inspector: Kept[Inspector]
    _dispatch: Kept[Dispatch]
    _control: Kept[Conductor]
    _difficulty: Kept[Difficulty]
    _window: list[Any]
    _past: list[Any]  # the last window, while it is not known whether it was bad

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Any = None,
        how: Measurement | None = None,
        *,
        every: int | None = None,
        budget: float | None = DEFAULT_BUDGET,
        rules: Sequence[Rule] | Rule | None = None,
        controllers: Sequence[Controller] | Controller = (),
        sinks: Sequence[Sink | str | Path] | Sink | str | Path = (),
        on_alert: Callable[[Alert], None] | None = None,
        **gone: Any,
    ) -> None:
        refuse_options("Monitor(model, loss_fn, optimizer", gone)
        how = check_how(how)
        check_loss_fn(loss_fn)
        check_optimizer(optimizer)
        budget = budget_of(every, budget)
        self._changes = Changes(model, how.params, optimizer)
        controllers = check_controllers(controllers)
        needed = {name for c in controllers for name in getattr(c, "needs", ())}
        names = tuple(dict.fromkeys((*how.names(has_optimizer=True), *sorted(needed))))
        self._disabled = is_disabled()
        self._ranks = Ranks.of(model)
        layout, self._optimizer = self._changes.layout, optimizer
        self._account = Account(budget, counts_work=bool(controllers))
        plan = Plan(
            paces_of(names),
            interval=(every or Cadence.calm) if how.quantities == "default" else None,
            frugal=budget is not None and not needed,
            per_layer=how.per_layer,
            needed=needed,
        )
        subject = Subject(unwrapped(model), loss_fn, layout, how, self._ranks)
        prober = Prober(subject, optimizer, plan, per_layer=how.per_layer, seed=how.seed)
        self._watch = Watch(prober, self._account, every, controlled=bool(controllers))
        self._inspector, self._moved = Inspector(subject, optimizer), MovementSampler(layout.params)
        self._control = claim(
            optimizer, Conductor(() if self._disabled else controllers, optimizer)
        )
        self._taken = TakenSteps(
            optimizer, layout, prober.loss_on, self._account, watch=not self._disabled
        )
        self._dispatch = Dispatch(rules, as_sinks(sinks), on_alert, self._control, self._account)
        self._difficulty, self._has_difficulty = Difficulty(), "difficulty" in names
        self._fixed_window = fixed_window(how.batch)
        self._counter = StepCounter(None if self._disabled else unwrap(optimizer), layout.params)
        self._scalars, self._backlog = StepScalars(self._ranks), Backlog(optimizer)
        self._window, self._past, self._called = [], [], False
        self._lr: tuple[float, ...] = ()  # of the last call
        kinds = [type(c).__name__ for c in controllers]
        chosen = {"every": every, "budget": budget, "controllers": kinds}
        self._facts = run_facts(optimizer, layout.dim, names, how) | chosen

    @property
    def address(self) -> str:
        """How messages speak of it, "monitor"; a host whose callback holds it sets another."""
        return self._watch.prober.address

    @address.setter
    def address(self, address: str) -> None:
        self._watch.prober.address = address

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

    def follow(self, optimizer: Any, *, params: str | Sequence[str] | None = None) -> None:
        """Watch the steps of another optimizer from now on, as where a phase of a recipe makes one.

        `params` are the parameters to measure, where they are others (see `Measurement`). What was
        measured so far is forgotten, and the next call probes. A new torch optimizer is found
        without this within three steps.

        Raises:
            UsageError: it is no optimizer, or another monitor's controllers turn its rates.
        """
        check_optimizer(optimizer)
        if self._disabled:
            return
        claim(optimizer, self._control)
        counter, by_hook = self._counter, self._counter.is_automatic
        self._optimizer = optimizer
        self._control.follow(optimizer)
        self._changes.search.reset()
        counter.follow(unwrap(optimizer), self._layout.params)
        if self._lr:  # without a hook the step of the last call is counted by the next one
            counter.steps += counter.is_automatic - by_hook
        self._changes.patterns = params if params is not None else self._changes.patterns
        self._lr = learning_rates(optimizer) if self._lr else ()
        self._adapt()

    def check_gradient(self, remedy: str = _PLACE) -> None:
        """Make sure that there is a gradient which the optimizer has not stepped with.

        Raises:
            UsageError: there is none; the message ends with `remedy`.
        """
        write = _ORDER
        if any(p._post_accumulate_grad_hooks for p in self._layout.params):
            remedy, write = _IN_BACKWARD, "geomwatch.measure(model, loss_fn, batch)"
        if not self._counter.has_gradient():
            raise UsageError(f"monitor.step() must find gradients, got none. {remedy}", write=write)
        if self._counter.gradient_is_used_up():
            raise UsageError(
                "monitor.step() must come before optimizer.step(), got a gradient that it has "
                f"stepped with already. {remedy}",
                write=write,
            )

    def observe(self, batch: Any) -> None:
        """Note a micro-batch of the accumulation window that the coming step averages over."""
        if not self._disabled and not self._watch.prober.paused:
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
            UsageError: at the first call, when it is made in the wrong place or without a batch;
                or at the first probe. Nothing else ever stops a run.
        """
        if self._disabled:
            return None
        was_called = self._called
        self._account.enter(self._counter.steps)
        try:
            if batch is not None:
                self.observe(batch)
            window, self._window = self._window, []
            if not was_called:
                self._start(window)
            try:
                norm, known_loss = arriving(grad_norm), self._scalars.loss(loss)
            except UsageError as error:
                self._leave_out(error, is_first=not was_called)
                loss, grad_norm = checked(loss, grad_norm)
                norm, known_loss = arriving(grad_norm), self._scalars.loss(loss)
            if self._may_wait(known_loss, norm, window):
                return None
            # what fails here on one rank must not keep it from what ranks do together
            self._attempt(self._catch_up)
            self._attempt(self._control.lift)
            settled = self._exchange(known_loss, norm, grad_scale)
            self._attempt(self._find_optimizer)
            known = {"loss": loss, "grad_norm": grad_norm, "grad_scale": grad_scale}
            return self._looked(settled, window, known)
        except Exception as error:  # whatever it is, training goes on
            steps = self._counter.steps
            self._watch.prober.survive(error, steps, but_wrong_use=not was_called)
            return None
        finally:
            self._account.leave()

    def _leave_out(self, error: UsageError, *, is_first: bool) -> None:
        """Say that a loss or norm of this step is none, and go on without it.

        Raises:
            UsageError: at the first call.
        """
        if is_first:
            raise error
        self._watch.prober.tell(f"{error} What is none is left out.")

    def _attempt(self, part: Callable[[], T]) -> T | None:
        return self._watch.prober.attempt(part, self._counter.steps)

    def _may_wait(self, loss: Late, grad_norm: Late, window: Sequence[Any]) -> bool:
        """Tell whether nothing is due before a step, nor to be said of it, and note it then."""
        steps, backlog = self._counter.steps, self._backlog
        if loss is None and grad_norm is None:  # then every norm is of interest
            return False
        if not (self._counter.is_sure and backlog.may_take(steps)):
            return False
        before = self._scalars.last
        if not backlog.take(self._scalars.put(steps, loss, grad_norm)):
            self._scalars.last = before
            return False
        self._past = [] if type(loss) is float else list(window)
        self._watch.keep(steps, self._lr, window)
        return True

    def _catch_up(self) -> None:
        """Show the steps that have waited to the rules."""
        steps = self._backlog.drained()
        for settled, _ in steps:
            self._add_difficulty(settled)
            self._watch.learn(settled)
            self._watch.beat(settled.step + 1, measured=False)
        if steps:
            self._changes.search.stepped(steps[-1][0].step + 1)
            self._dispatch.waited(steps)

    def _let_wait(self) -> None:
        """Let the coming steps wait, as far as that is known to change nothing."""
        self._backlog.close()
        last, calm = self._scalars.last, self._dispatch.calm()
        if calm is None or last is None or not self._counter.is_automatic:
            return
        if self._taken.is_busy:  # with what the rules are to see next
            return
        steps, schedule = last.step, self._watch.schedule
        until = min(
            steps + Calm.most + 1,
            schedule.next_look,
            schedule.cadence.next_norm(steps),
            self._moved.due(steps),
            self._dispatch.known_until,
        )
        self._backlog.optimizer = unwrap(self._optimizer)
        self._backlog.open(last, until, calm, self._lr)

    def _looked(
        self, settled: Settled | None, window: Sequence[Any], known: dict[str, Any]
    ) -> Record | None:
        """Do what is due before a step, and judge it."""
        self._learn()
        step = Coming(
            self._counter.steps, self._lr, self._control.scale, settled, *self._known_of(window)
        )
        step = replace(step, taken=self._taken.last)
        due = self._watch.due(step)
        if due != "nothing" and self._adapt():
            due = self._watch.due(step)
        known["same_data"] = window
        probed, looked = self._watch.look(due, step, self._fixed_window or window, known)
        step = self._watch.rehearse(step, window, known)
        if probed is not None or looked:
            self._inspector.note(window)
        last = self._scalars.last
        if probed is not None and last is not None and not math.isfinite(probed.record.loss):
            step = replace(step, present=last.present(wait=True))
        record = self._conclude(step, probed, looked=looked)
        if known["grad_scale"] == 1:  # or else it is changed by what unscales it
            self._counter.see(will_step=not self._control.skips)
        self._taken.coming(
            step.index,
            window,
            due=(looked or probed is not None) and not self._control.skips,
            scale=self._control.scale,
            grad_scale=known["grad_scale"],
        )
        self._let_wait()
        return record

    def headroom(self, most: float = 64.0) -> Estimate:
        """Return the largest multiple of the present learning rate that the run can bear.

        The next 8 steps over the last 8 batches, with the optimizer as it is, lose no more than a
        fifth of what was learnt at that multiple; everything is put back bit for bit. For use
        between two calls of `step`, with its `loss=`. Some 11 steps of training for each of up to
        2 log2(most) + 3 multiples, whatever the budget.

        Returns:
            An Estimate: `error` is the way to a multiple that breaks. Without a value where
            there can be no rehearsal, with the reason.
        """
        return self._watch.headroom(most)

    def equip(self, *actuators: Actuator) -> None:
        """Take what turns the knobs of this loop's host, for controllers to use."""
        self._control.equip(*actuators)

    def release(self) -> None:
        """Give the loop its own knobs back, for another monitor to turn; watching goes on."""
        self._control.close()

    def pause(self) -> None:
        """Stop probing; loss and gradient are still watched."""
        self._watch.prober.paused = True

    def resume(self) -> None:
        """Probe again, after `pause` or after failed probes."""
        self._watch.prober.resume()

    def close(self) -> None:
        """Judge the last step, take the hook off the optimizer and close the sinks."""
        for part in (
            self._catch_up,
            self._backlog.close,
            self._judge_last,
            self._tell_of_a_short_run,
            self._watch.end,
            self._changes.search.reset,
            self._counter.close,
            self._taken.close,
            self._control.close,
        ):
            self._attempt(part)
        self._dispatch.end(self._counter.steps, self.seconds, self.overhead, self._lr)

    def _judge_last(self) -> None:
        self._counter.settle()
        if not self._counter.is_automatic and self._lr:
            self._counter.count()
        settled = self._scalars.take(self._counter.steps)
        if settled is not None:
            step = Coming(self._counter.steps, self._lr, self._control.scale, settled)
            self._conclude(step, None, looked=False)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives; the first probe after loading them starts cold."""
        self._catch_up()
        self._counter.settle()
        # Without a hook the step of the last call is counted by the next one.
        uncounted = not self._counter.is_automatic and bool(self._lr)
        head = {"version": STATE, "step": self._counter.steps + uncounted, "of": self._described()}
        return head | super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another monitor of the same run stopped: take over all of it, or nothing.

        Raises:
            UsageError: it is of another version, model, rules or controllers, or damaged.
        """
        check_state(state, STATE, self._described())
        self._backlog.steps.clear()
        self._backlog.close()
        super().load_state_dict({k: v for k, v in state.items() if k not in _HEAD})

    def _described(self) -> dict[str, Any]:
        """What a state has to be of."""
        return {
            "parameters": [self._layout.dim, len(self._layout.names)],
            "rules": self._dispatch.rule_names,
            "controllers": self._control.knobs,
        }

    def _start(self, window: Sequence[Any]) -> None:
        """Check that the first call can work, and say what runs."""
        self.check_gradient()
        self._ranks.refuse_join()
        alone = self._ranks.size == 1  # another rank may have items
        if alone and not (window or self._fixed_window or self._watch.prober.paused):
            raise UsageError(
                "monitor.step() must know the batch, got none. Pass it as step(batch), call "
                "observe(batch) for each micro-batch, or give it Measurement(batch=...).",
                write="monitor.step(batch, loss=loss.detach())",
            )
        for batch in window:
            check_batch(batch, "for batch in loader: ... monitor.step(batch)")
        self._changes.refuse_another_model()
        self._called = True
        self._check_held()
        self._dispatch.begin(run_line(self._facts))

    def _exchange(self, loss: Late, grad_norm: Late, grad_scale: float) -> Settled | None:
        """Read what the last step left behind and start copying this step's scalars."""
        settled = self._attempt(self._settled)
        steps = self._counter.steps
        is_bad = loss is None or (isinstance(loss, float) and not math.isfinite(loss))
        if grad_norm is None and (is_bad or self._wants_norm(steps)):
            grad_norm = self._attempt(
                lambda: arriving(gradient_norm(self._layout.params) / grad_scale)
            )
        self._scalars.put(steps, loss, grad_norm)
        if settled is not None:
            self._add_difficulty(settled)
        self._lr = learning_rates(self._optimizer)
        return settled

    def _settled(self) -> Settled | None:
        """Return what became of the step of the last call."""
        self._counter.settle()
        if not self._counter.is_automatic and self._lr:
            self._counter.count()
        return self._scalars.take(self._counter.steps)

    def _add_difficulty(self, settled: Settled) -> None:
        if self._has_difficulty and settled.grad_norm is not None:
            lr = self._control.scale * max(self._lr)
            self._difficulty.update(lr, settled, self._watch.prober.lambda_max())

    def _find_optimizer(self) -> None:
        """Follow the optimizer that steps, where it is another than the one that is known.

        Say so, if it has not stepped with what was seen.
        """
        counter = self._counter
        if not counter.is_automatic:
            return
        if counter.changed:
            self._watch.prober.tell(changed_line(counter.changed, self._optimizer))
        found = self._changes.search.call(counter.steps, self._changes.trained_now)
        if not found:
            return
        known = type(unwrap(self._optimizer)).__name__
        said = (
            f"step {counter.steps}: the {known} that monitor knows no longer steps while its "
            f"parameters move; {', '.join(type(o).__name__ for o in found)} does"
        )
        if len(found) > 1:
            logger.warning("%s. Build one Monitor for each of these, or follow(optimizer).", said)
            return
        logger.warning("%s, and is followed from now on, as by monitor.follow(optimizer).", said)
        counter.steps += self._changes.search.missed
        self.follow(found[0])

    def _learn(self) -> None:
        """Say what the optimizer's first steps have shown, and measure it so from here on."""
        if not self._taken.may_learn:
            return
        said = self._taken.learnt()
        if not self._ranks.any(bool(said)):
            return
        steps = self._counter.steps
        if said:
            level = logging.INFO if self._taken.has_limit else logging.WARNING
            logger.log(level, "step %d: %s", steps, said)
        self._watch.restart(self._layout, self._optimizer, steps)
        self._dispatch.forget()

    def _adapt(self) -> bool:
        """Measure what is trained now, if it is not what was; tell whether that is so."""
        prober, steps = self._watch.prober, self._counter.steps
        changes: list[str] = []
        try:
            changes = self._changes.look(self._optimizer)
        except UsageError as error:
            prober.why = str(error)
            prober.tell(f"step {steps}: nothing can be measured until this is mended: {error}")
            self._watch.schedule.probed(steps, None)
        if not self._ranks.any(bool(changes)):
            return False
        self._counter.follow(unwrap(self._optimizer), self._layout.params)
        self._watch.restart(self._layout, self._optimizer, steps)
        self._inspector.follow(self._layout, self._optimizer)
        self._moved = MovementSampler(self._layout.params)
        self._taken.follow(self._optimizer, self._layout)
        self._dispatch.forget()
        self._check_held()
        logger.info("step %d: %s. Measured anew from here on.", steps, "; ".join(changes))
        return True

    def _check_held(self) -> None:
        """Say which of the parameters the optimizer does not step."""
        strangers, total = self._changes.strangers, len(self._layout.names)
        said = strangers_line(strangers, total, self._optimizer) if strangers else ""
        self._watch.prober.not_to_be_told(said if len(strangers) == total else "")
        if said:
            self._watch.prober.tell(said)

    @property
    def _layout(self) -> Layout:
        return self._changes.layout

    def _known_of(
        self, window: Sequence[Any]
    ) -> tuple[Present | None, Movement | None, Callable[..., Findings]]:
        """Return what the host knows of the coming step, of the weights, and a way to find more."""
        inspect = partial(self._inspector, window, self._past)
        wait = SKIP in self._control.knobs  # else it would be known too late
        last = self._scalars.last
        present = None if last is None else last.present(wait=wait)
        is_known = present is not None and present.loss is not None
        self._past = [] if is_known else list(window)
        moved = self._attempt(lambda: self._moved(self._counter.steps, self._lr))
        return present, moved, inspect

    def _wants_norm(self, steps: int) -> bool:
        """Tell whether to compute the gradient's norm: at the start, and at every tenth step.

        And at each where a controller goes by it.
        """
        is_due = self._watch.schedule.cadence.next_norm(steps - 1) == steps
        return is_due or not {CLIP, SKIP}.isdisjoint(self._control.knobs)

    def _conclude(self, step: Coming, probed: Probed | None, *, looked: bool) -> Record | None:
        record = probed.record if probed is not None else None
        if record is not None:
            record = replace(record, overhead=self._account.share_by_now)
        if record is not None and self._has_difficulty:
            estimates = {**record.estimates, "difficulty": self._difficulty.estimate()}
            record = replace(record, estimates=estimates)
        return self._dispatch(self._watch.observation(step, record, looked=looked), record)

    def _tell_of_a_short_run(self) -> None:
        steps, every = self._counter.steps, self._watch.schedule.every
        if every is not None and self._watch.schedule.last_probe == 0 and 1 < steps <= every:
            self._watch.prober.tell(
                f"every must be smaller than the run, got every={every} for {steps} steps: only "
                f"the first was probed. Pass every={max(1, steps // 10)}, say, or leave it out."
            )
