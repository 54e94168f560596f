"""What values look like to a client: as they are, cut, or as a keyed hash.

Numbers, times and truth values stay as they are, so that counts and sums mean something, and so
do words that tell nothing (statuses, names of tables and plugins); other text, binaries and
whatever is nested may tell of people and are redacted. The hash is keyed: equal values have equal
hashes within one server's life, and no list of guesses tells what stands behind one.
"""

import datetime as dt
import decimal
import hashlib
import hmac
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from casparian_flow.domain.errors import NotPermittedError

VALUE_CHARS_MAX: Final = 100
TEXT_CHARS_MAX: Final = 10_000
"""Of one value that is shown as it is."""
_QUOTED: Final = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|\d{4,}")


class RedactionMode(StrEnum):
    """From the least to the most that is hidden."""

    NONE = "none"
    TRUNCATE = "truncate"
    """Text is cut after VALUE_CHARS_MAX characters."""
    HASH = "hash"
    """Text becomes `[hash:…]`, 8 hex digits."""


_ORDER: Final = list(RedactionMode)


@dataclass(frozen=True, slots=True)
class Redactor:
    """Values for one answer.

    Attributes:
        key: of the hash; the same for one server's life.
        known: words that stay as they are.
    """

    mode: RedactionMode
    key: bytes
    known: frozenset[str] = frozenset()

    def value(self, value: object) -> Any:
        """A JSON-able stand-in for a value."""
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, decimal.Decimal | dt.timedelta):
            return str(value)
        if isinstance(value, dt.date | dt.time):
            return value.isoformat()
        return self.text(_as_text(value))

    def row(self, row: Sequence[object]) -> list[Any]:
        return [self.value(value) for value in row]

    def text(self, text: str) -> str:
        """Text that stands in a file's row."""
        if text in self.known:
            return text
        if self.mode is RedactionMode.HASH:
            digest = hmac.new(self.key, text.encode(errors="replace"), hashlib.sha256)
            return f"[hash:{digest.hexdigest()[:8]}]"
        most = VALUE_CHARS_MAX if self.mode is RedactionMode.TRUNCATE else TEXT_CHARS_MAX
        return text if len(text) <= most else text[:most] + "…"

    def message(self, text: str) -> str:
        """A message that may quote values: what is quoted, and long numbers, are redacted."""
        if self.mode is RedactionMode.NONE:
            return text
        return _QUOTED.sub(lambda found: self.text(found[0].strip("'\"")), text)


def stricter(least: RedactionMode, asked: RedactionMode | None) -> RedactionMode:
    """The mode for a call.

    Raises:
        NotPermittedError: less than the configured mode is asked for.
    """
    if asked is None:
        return least
    if _ORDER.index(asked) < _ORDER.index(least):
        raise NotPermittedError(
            f"redaction {asked} would show more than is allowed here ({least})",
            hint="A person may change [mcp] redaction.",
        )
    return asked


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return json.dumps(value, default=str, ensure_ascii=False)
