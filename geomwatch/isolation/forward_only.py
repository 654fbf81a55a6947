"""Forward passes of a loss of which no gradient is wanted."""

from __future__ import annotations

import contextlib

import torch
from torch.utils import checkpoint

from geomwatch.isolation.undo import enter, swap, until_here


def forward_only() -> contextlib.ExitStack:
    """Return a block without graphs; re-entrant checkpoints don't warn of gradients of None."""
    block = until_here()
    swap(checkpoint, "check_backward_validity", _nothing)
    enter(torch.no_grad())
    return block


def _nothing(inputs: object) -> None:
    """Find nothing to say."""
