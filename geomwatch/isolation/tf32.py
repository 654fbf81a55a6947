"""float32 that is float32: TF32 and bfloat16 kernels switched off, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from geomwatch.isolation.undo import later

# What float32 may be computed by, the general before the special (torch >= 2.9).
_UNITS = [
    ("generic", "all"),
    *((owner, kind) for owner in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")),
]


def tf32_off() -> None:
    """Compute float32 without TF32 (a mantissa of 10 bits) or bfloat16 until the block around ends.

    Differences of losses drown in it: in convolutional nets, for which it is on by default, a
    margin from losses is then 20 % off in the median, and may have the wrong sign.

    Torch has two ways to say it, and refuses to read the older one where they disagree. That is
    used where it can be read, so that a loss can read it too, and the newer one for the rest.
    """
    before = _Flags()
    later(before.put_back)
    before.clear()


class _Flags:
    """The flags of both ways, as they are."""

    def __init__(self) -> None:
        self._cudnn = _or_none(torch._C._get_cudnn_allow_tf32)
        self._matmul = _or_none(torch.get_float32_matmul_precision)
        read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
        self._read: Callable[..., str] = read or (lambda *unit: "none")
        self._write: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
        self._units = {unit: self._read(*unit) for unit in _UNITS}

    def clear(self) -> None:
        if self._cudnn:
            torch._C._set_cudnn_allow_tf32(False)
        if self._matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for unit in _UNITS:
            if self._read(*unit) not in ("ieee", "none"):
                self._write(*unit, "ieee")

    def put_back(self) -> None:
        if self._cudnn:
            torch._C._set_cudnn_allow_tf32(True)
        if self._matmul not in (None, "highest"):
            torch.set_float32_matmul_precision(self._matmul)
        for unit, precision in self._units.items():  # what is inherited is right by now
            if self._read(*unit) != precision:
                self._write(*unit, precision)


def _or_none(read: Callable[[], Any]) -> Any:
    """Read a flag; None where torch refuses to, since it was said in both ways."""
    try:
        return read()
    except RuntimeError:
        return None
