"""What a look at a bad batch has found, in words: the data first."""

from __future__ import annotations

from geomwatch.observation.findings import Findings


def evidence(found: Findings, size: float) -> str:
    """Say what is wrong with a batch, as sentences; "" where nothing was found.

    Args:
        found: by the look.
        size: times its usual size from which a tensor is worth a word.
    """
    if found.weights:
        return f" The weights are not finite any more, first in {found.weights!r}."
    said = []
    if found.not_finite:
        said.append(f"In the data, {found.not_finite} is not finite.")
    if found.unlabelled:
        said.append(f"In the data, {found.unlabelled} holds no labels.")
    if found.outsized and found.times >= size:
        said.append(f"In the data, {found.outsized} is {found.times:.2g} x as large as usual.")
    if found.module:
        said.append(f"The first module whose output is not finite is {found.module!r}.")
    if found.is_loss:
        said.append(
            "The outputs of all modules are finite: it arises in the loss, from labels or targets."
        )
    return "".join(f" {each}" for each in said)
