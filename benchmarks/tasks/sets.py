"""Which tasks a level may be chosen on, and which are kept for reporting: three sets by task."""

from __future__ import annotations

from typing import Literal

Part = Literal["development", "validation", "test"]
PARTS: tuple[Part, ...] = ("development", "validation", "test")
