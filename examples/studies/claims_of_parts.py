"""The paper's claims about skip connections, size and noise, each with its criterion."""

from __future__ import annotations

import numpy as np

from studies.cases import ARCHITECTURES
from studies.claims_of_nets import NAMES
from studies.inference import ratio
from studies.table import Table
from studies.verdicts import OPEN, Claim, Condition, larger


def of_parts(table: Table) -> list[Claim]:
    """Return the claims on skip connections, size and noise, judged."""
    return [
        Claim(
            "4.2",
            "Skip connections make the training of the ResNet stable",
            "without them it takes more steps to the target, and a larger difficulty",
            (
                _without_skip(table, "ResNet-18", "steps_to_target", "steps", "end"),
                _without_skip(table, "ResNet-18", "difficulty", "difficulty", "end"),
            ),
        ),
        Claim(
            "6.3",
            "Architectures with skip connections consistently have lower worst-case slice variance",
            "R of the worst of the directions is smaller with them in each of the nets, at 10 % "
            "and at the end",
            tuple(
                _without_skip(table, name, "train_filter_worst", f"{name} {when}", stage)
                for name in ARCHITECTURES
                for stage, when in NAMES.items()
            ),
        ),
        Claim(
            "5",
            "Total curvature mass scales with the number of parameters",
            "tr(H) is larger than at a quarter of the width, in each of the nets at 10 % and at "
            "the end",
            tuple(_wider(table, name, stage) for name in ARCHITECTURES for stage in NAMES),
        ),
        Claim(
            "5, 1",
            "SGD finds flat minima because of its noise",
            "at four times the learning rate, and so of the temperature, SGD ends at a smaller "
            "λ_max (only a hint: it also goes further)",
            tuple(_hotter(table, name) for name in ("MLP", "ResNet-18")),
        ),
    ]


def _without_skip(
    table: Table, architecture: str, quantity: str, word: str, stage: str
) -> Condition:
    """Ask that a quantity is larger without skip connections than with them."""
    base = table.net(architecture)
    other = table.variant(architecture, "with skip", "without skip")
    if other is None:
        return Condition(OPEN, f"{word}: no such variant")
    pair = (other, base) if base.skip else (base, other)
    without, with_them = (table.mean(case, quantity, stage) for case in pair)
    return larger(f"{word}, without to with", without, with_them)


def _wider(table: Table, architecture: str, stage: str) -> Condition:
    wide, narrow = table.net(architecture), table.variant(architecture, "width/4")
    if narrow is None:
        return Condition(OPEN, f"{architecture}: no such variant")
    large, small = (table.mean(case, "trace", stage) for case in (wide, narrow))
    found = larger(f"{architecture} {NAMES[stage]}", large, small)
    growth = ratio(large, small)
    if growth is None:
        return found
    sizes = [table.mean(case, "parameters").mean or 1.0 for case in (narrow, wide)]
    power = np.log(growth.value) / np.log(sizes[1] / sizes[0])
    return Condition(found.verdict, f"{found.evidence}, tr ~ D^{power:.2f}")


def _hotter(table: Table, architecture: str) -> Condition:
    slow = table.variant(architecture, "lr/4")
    if slow is None:
        return Condition(OPEN, f"{architecture}: no such variant")
    a, b = table.mean(slow, "lambda_max"), table.mean(table.net(architecture), "lambda_max")
    return larger(f"{architecture}, λ_max at a quarter of the rate to that at the whole", a, b)
