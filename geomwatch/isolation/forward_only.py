"""Forward passes of a loss of which no gradient is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import checkpoint


@contextmanager
def forward_only() -> Iterator[None]:
    """Evaluate without a graph; re-entrant checkpoints don't warn that gradients will be None."""
    warn = checkpoint.check_backward_validity
    checkpoint.check_backward_validity = _nothing
    try:
        with torch.no_grad():
            yield
    finally:
        checkpoint.check_backward_validity = warn


def _nothing(inputs: object) -> None:
    """Find nothing to say."""
