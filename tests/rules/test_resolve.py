"""Which rules a monitor judges by, and which of them it asks about a step."""

from __future__ import annotations

import itertools

import pytest
import torch
from observations import Watched, measured, random_run, trained, wild_run
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.monitoring.dispatch import is_due
from geomwatch.observation.observer import Observer
from geomwatch.records import Estimate
from geomwatch.rules import (
    DEFAULT,
    GradientMargin,
    NonFinite,
    Observation,
    StabilityMargin,
    default_rules,
    resolve,
)


def test_a_later_rule_of_the_same_name_replaces_the_earlier_one():
    mine = StabilityMargin(warning=0.9)
    rules = resolve([*default_rules(), mine, NonFinite()])
    assert [rule.name for rule in rules] == [kind.name for kind in DEFAULT]
    assert mine in rules
    assert resolve([StabilityMargin(), mine]) == [mine]


def test_one_rule_works_as_a_list_and_none_as_no_rules():
    rule = GradientMargin()
    assert resolve(rule) == [rule]
    assert resolve([]) == []
    assert resolve(iter([rule])) == [rule]
    assert [type(r) for r in resolve(None)] == list(DEFAULT)


class Nameless:
    def __call__(self, step: Observation) -> None:
        pass


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            StabilityMargin,
            UsageTypeError,
            r"got <class .*\n.*default_rules\(\), StabilityMargin\(\)",
        ),
        ([NonFinite(), StabilityMargin], UsageTypeError, r"\*default_rules\(\), StabilityMargin"),
        ("loss_rise", UsageTypeError, r"got 'loss_rise'\. .*\n.*, LossRise\(\)\]"),
        (["los-rize"], UsageTypeError, r"got 'los-rize'\. .*\n.*, LossRise\(\)\]"),
        (["GradientMargin"], UsageTypeError, r"rules=\[.*, GradientMargin\(\)\]"),
        (
            [3],
            UsageTypeError,
            r"rules must hold rules, got 3\. Write:\n    rules=.*StabilityMargin",
        ),
        (3, UsageTypeError, r"rules must hold rules, got 3\. Write"),
        ([Nameless()], UsageError, r"must have a name, got none: .*Give it name = "),
    ],
)
def test_what_is_no_rule_is_refused_with_the_line_to_write(rules, error, message):
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        geomwatch.Monitor(model, cross_entropy, optimizer, rules=rules)


# Asked about a step


class Everything:
    """A rule of a user, without any base class."""

    name = "everything"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, step: Observation) -> None:
        self.asked.append(step.index)


def test_a_rule_that_does_not_say_what_it_reads_is_asked_about_every_step():
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = Everything()
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, rules=rule)
    for _ in range(6):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    assert rule.asked == list(range(6))
    again = geomwatch.Monitor(model, cross_entropy, optimizer, rules=rule)
    again.load_state_dict(monitor.state_dict())  # a rule need not remember anything


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (trained(3, 1.0), "step"),
        (Observation(3, (0.1,), jump=1.1), "step rise"),
        (Observation(3, (0.1,), gradient_fresh=True), "step rise look"),
        (measured(3, 0.1), "step rise look probe"),
        (measured(3, 0.1, estimates={"a": Estimate(1.0)}), "step rise look probe a"),
        (
            measured(3, 0.1, estimates=dict.fromkeys("ab", Estimate(1.0))),
            "step rise look probe a b",
        ),
    ],
)
def test_a_rule_is_asked_about_what_it_reads(step, asked):
    possible = {"step": "step", "rise": "rise", "look": "look", "probe": "probe"}
    possible |= {("a",): "a", ("a", "b"): "b"}
    found = [said for reads, said in possible.items() if is_due(reading(reads), step)]
    assert found == asked.split()


def reading(what: str | tuple[str, ...]) -> NonFinite:
    rule = NonFinite()
    rule.reads = what
    return rule


def test_a_plain_step_asks_the_rules_that_read_losses_and_norms_alone():
    rules = [rule for rule in default_rules() if not getattr(rule, "waits", False)]
    asked = {rule.name for rule in rules if is_due(rule, trained(30, 1.0))}
    assert asked == {"non_finite", "bad_batch", "no_progress", "loss_rise", "grad_norm_spike"}


@pytest.mark.parametrize("build", [random_run, wild_run])
@pytest.mark.parametrize("seed", range(25))
def test_not_to_ask_a_rule_changes_nothing_that_it_says(build, seed):
    watched, observer, rules = Watched(*default_rules()), Observer(), default_rules()
    for step in build(seed):
        known = observer(step)
        every = [alert for rule in rules if (alert := rule(known)) is not None]
        assert list(map(repr, watched.all_of(step))) == list(map(repr, every))


def test_rules_are_not_shared_between_monitors():
    assert all(a is not b for a, b in itertools.product(default_rules(), resolve(None)))
