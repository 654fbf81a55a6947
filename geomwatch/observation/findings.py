"""What is known of a step at the call before it, and what a look at its batch has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Present:
    """What the host knows of the coming step without waiting for a device; None where it does not.

    On a CPU that is all, on an accelerator what the loop has passed as numbers.
    """

    loss: float | None
    grad_norm: float | None


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look at a batch, the weights and one forward pass has found; "" is nothing."""

    not_finite: str = ""  # the first tensor of the batch with such entries
    unlabelled: str = ""  # the first tensor of integers that all are the same negative number
    outsized: str = ""  # the tensor of the batch that is farthest above its usual size
    times: float = 1.0  # the usual size of that one
    module: str = ""  # the first whose output is not finite
    is_loss: bool = False  # the outputs of all modules are finite, and the loss is not
    weights: str = ""  # the first parameter that is not finite
    has_weights: bool = False  # the weights were looked at
    is_scaled: bool = False  # a GradScaler leaves out what is not finite

    @property
    def weights_are_finite(self) -> bool:
        """Whether they were looked at, and all of them are."""
        return self.has_weights and not self.weights


def nothing_found(*, before: bool = False) -> Findings:
    """Stand for the look at a batch that nobody has kept."""
    return Findings()
