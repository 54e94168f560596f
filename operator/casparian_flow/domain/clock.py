"""The only place where real time and real randomness are read."""

import random
import time
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - naive UTC, as in the ledger


class Now(NamedTuple):
    """One reading of both clocks.

    Leases and delays are measured on `mono`, which never jumps; `wall_us` is written down
    for people and survives a restart.
    """

    mono: float
    """Seconds on a clock that only moves forward."""
    wall_us: int
    """Microseconds since the epoch, UTC; may jump either way."""


class Clock(Protocol):
    def now(self) -> Now: ...


class SystemClock:
    def now(self) -> Now:
        return Now(time.monotonic(), time.time_ns() // 1_000)


def utc(wall_us: int) -> datetime:
    """A wall clock reading as the ledger has it: naive, in UTC."""
    return _EPOCH + timedelta(microseconds=wall_us)


def system_random() -> random.Random:
    """A generator seeded by the operating system, for jitter and nonces that need no secrecy."""
    return random.Random()
