"""How much one answer may hold: 10,000 rows, and 1 MiB as JSON."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

ROWS_MAX: Final = 10_000
ANSWER_BYTES_MAX: Final = 1 << 20
LIST_BYTES_MAX: Final = ANSWER_BYTES_MAX - 65_536
"""Of the list in an answer; the rest is for what stands around it."""


def as_json(answer: object) -> str:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"), default=str)


def fitting(items: Iterable[Any], *, limit: int = ROWS_MAX) -> tuple[list[Any], bool]:
    """The first items that fit into an answer, and whether some are left out."""
    kept: list[Any] = []
    size = 0
    for item in items:
        size += len(as_json(item).encode(errors="replace")) + 1
        if len(kept) >= min(limit, ROWS_MAX) or size > LIST_BYTES_MAX:
            return kept, True
        kept.append(item)
    return kept, False


def fitted(answer: dict[str, Any], lists: Sequence[str]) -> str:
    """The answer as JSON; if it is too long, the named lists are emptied in turn.

    >>> fitted({"a": [1], "truncated": False}, ["a"])
    '{"a":[1],"truncated":false}'
    """
    text = as_json(answer)
    for name in lists:
        if len(text.encode(errors="replace")) <= ANSWER_BYTES_MAX:
            break
        answer = answer | {name: [], "truncated": True}
        text = as_json(answer)
    return text
