"""Characters that would break a line, or show it as another one: control, direction, surrogates."""

from __future__ import annotations

import re
from typing import Final

# C0 but tab and newline, DEL and C1 (among them NEL, U+0085), the line and paragraph separators,
# marks and embeddings of direction (Unicode Technical Report 36, 2.5), lone surrogates, which no
# encoding takes, and the byte order mark.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def escaped(text: str) -> str:
    r"""Return the text with each unsafe character written out, as \u2028."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_entry(text: str) -> str:
    """Return the text so that it reads as one entry of a log: further lines are indented."""
    return re.sub(r"\n(?! {4})", "\n    ", escaped(text))
