"""Checks of what callers of the API give: a typed error for whatever does not fit."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, TypeVar, cast

import msgspec

from casparian_flow.domain.errors import UsageError
from casparian_flow.protocol.http_types import PAYLOAD_BYTES_MAX, TEXT_CHARS_MAX

S = TypeVar("S", bound=msgspec.Struct)
W = TypeVar("W", bound=StrEnum)
LIMIT_MAX: Final = 10_000
"""Rows that one call returns at most; further ones by offset or by the last id."""
ID_MAX: Final = 2**63 - 1


def checked(struct: S, decode: Callable[[bytes], Any] | None = None) -> S:
    """The struct, its fields compared with their types and bounds.

    Args:
        decode: reads it back from JSON; by default as its own class.

    Raises:
        UsageError: names the field that does not fit.
    """
    try:
        text = msgspec.json.encode(struct)
        if len(text) > PAYLOAD_BYTES_MAX:
            raise UsageError(
                f"{type(struct).__name__}: {len(text)} bytes exceed {PAYLOAD_BYTES_MAX}",
                hint="Say less at once.",
            )
        return cast(S, decode(text) if decode else msgspec.json.decode(text, type=type(struct)))
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{type(struct).__name__}: {error}") from error


def checked_word(words: type[W], word: str) -> W:
    """Raises:
    UsageError: not one of the words.
    """
    try:
        return words(word)
    except ValueError:
        raise UsageError(
            f"{str(word)[:80]!r} is no {words.__name__}", hint=f"Use one of {', '.join(words)}."
        ) from None


def checked_id(number: object) -> int:
    """Raises:
    UsageError: not a number that an id column holds.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= ID_MAX:
        raise UsageError(f"{str(number)[:80]!r} is no id")
    return number


def checked_text(text: object, what: str, *, chars_max: int = TEXT_CHARS_MAX) -> str | None:
    """Raises:
    UsageError: no text, too much of it, or characters that UTF-8 does not have.
    """
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > chars_max:
        raise UsageError(f"{what} wants text of at most {chars_max} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what}: {error}") from error
    return text


def checked_limit(limit: int, offset: int = 0) -> None:
    """Raises:
    UsageError: a page that is empty, too long, or begins before the first row.
    """
    checked_id(limit)
    checked_id(offset)
    if not 1 <= limit <= LIMIT_MAX or offset >= 2**62:
        raise UsageError(f"limit must be 1 to {LIMIT_MAX}, offset not negative")
