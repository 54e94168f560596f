"""How every figure is taken: contestants in turn, round by round, compared pair by pair.

    A B A B … ─ one warm-up each, then ROUNDS rounds ─ ratio of each round ─ median and spread

Taking turns lets a machine that is slow for a minute slow both down; the ratio of one round is
of two runs that were neighbours in time.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

ROUNDS = 5
WARM_UPS = 1

Values = Mapping[str, float]
"""What one run measured, by metric."""


class Stopwatch:
    """Seconds of what runs inside the `with`."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something that does the row's work once, checks the outcome, and says how it went."""

    name: str
    run: Callable[[], Values]


@dataclass(frozen=True, slots=True)
class Goal:
    """What the ratio ours / peer should be."""

    bound: Literal["at least", "at most"]
    factor: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.factor if self.bound == "at least" else ratio <= self.factor

    def __str__(self) -> str:
        return f"{'≥' if self.bound == 'at least' else '≤'} {self.factor:g}"


@dataclass(slots=True)
class Figure:
    """One line of the table.

    Attributes:
        row: as in the table, such as "1a".
        peer: "" where there is none; `limit` is compared with our values then.
        ours, theirs: one value a round, in `unit`.
        notes: what a reader has to know to judge the figure.
    """

    row: str
    work: str
    unit: str
    ours: list[float]
    goal: Goal
    peer: str = ""
    theirs: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Pair by pair; our own values where there is no peer."""
        if not self.theirs:
            return list(self.ours)
        return [our / their for our, their in zip(self.ours, self.theirs, strict=True)]

    @property
    def met(self) -> bool:
        return self.goal.met(statistics.median(self.ratios))


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with the lowest and highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done.

    Attributes:
        quick: small sizes, to see that a row works; its figures mean little.
    """

    quick: bool = False
    rounds: int = ROUNDS
    warm_ups: int = WARM_UPS

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


class Row(Protocol):
    """What a row's module defines as `measure`."""

    def __call__(self, plan: Plan) -> list[Figure]: ...


def alternate(contestants: Sequence[Contestant], plan: Plan) -> dict[str, list[Values]]:
    """Let each contestant run in turn; the warm-ups' values are thrown away.

    Returns:
        One entry a round for each contestant's name.
    """
    results: dict[str, list[Values]] = {c.name: [] for c in contestants}
    for number in range(-plan.warm_ups, plan.rounds):
        for contestant in contestants:
            gc.collect()
            values = contestant.run()
            if number >= 0:
                results[contestant.name].append(values)
            _tell(contestant.name, number, values)
    return results


def figure(
    results: Mapping[str, Sequence[Values]],
    metric: str,
    unit: str,
    *,
    row: str,
    work: str,
    ours: str,
    peer: str,
    goal: Goal,
    notes: Sequence[str] = (),
) -> Figure:
    """One metric of two contestants as a line of the table."""
    return Figure(
        row=row,
        work=work,
        unit=unit,
        ours=[values[metric] for values in results[ours]],
        goal=goal,
        peer=peer,
        theirs=[values[metric] for values in results[peer]],
        notes=list(notes),
    )


def at_least(factor: float) -> Goal:
    return Goal("at least", factor)


def at_most(factor: float) -> Goal:
    return Goal("at most", factor)


def check(condition: object, what: str) -> None:
    """A figure counts only if the work was done.

    Raises:
        RuntimeError: it was not.
    """
    if not condition:
        raise RuntimeError(f"outcome is wrong: {what}")


def _tell(name: str, number: int, values: Values) -> None:
    stage = "warm-up" if number < 0 else f"round {number + 1}"
    told = ", ".join(f"{metric} {value:,.4g}" for metric, value in values.items())
    print(f"    {stage:8} {name:28} {told}", file=sys.stderr, flush=True)
