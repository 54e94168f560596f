"""What one simulated run is made of, drawn from its seed (swarm testing).

Each run has only some of the faults, at rates of its own: runs with every fault all the time
explore less (Groce et al., "Swarm Testing", ISSTA 2012).
"""

import random
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """Rates are per second of simulated time unless said otherwise; 0 turns a fault off."""

    seed: int
    jobs: int
    workers: int
    slots: int
    credit: int
    fault_seconds: float
    # messages: probability each
    drop: float
    duplicate: float
    delay: float
    reorder: float
    # network
    partition: float
    one_way: float
    # processes
    kill_worker: float
    pause_worker: float
    kill_sentinel: float
    twin_identity: float
    # ledger: probability a commit
    disk_full: float
    fsync_error: float
    commit_seconds: float
    # sinks
    sink_down: float
    slow_consumer: bool
    foreign_file: float
    # people and files
    clock_jump: float
    cancel: float
    redeploy: float
    pause_plugin: float
    change_source: float
    replay: float
    # people and keys
    bound: bool = False
    """Each worker is bound to one plugin version, as those of other machines are."""

    def without(self, name: str) -> "Options":
        """The same run with one fault taken out."""
        return replace(self, **{name: False if name == "slow_consumer" else 0.0})

    @property
    def active(self) -> list[str]:
        """Names of the faults that can happen in this run."""
        return [name for name in FAULTS if getattr(self, name)]

    def __str__(self) -> str:
        shown = {
            k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items() if v
        }
        return ", ".join(f"{k}={v}" for k, v in shown.items())


NOT_FAULTS = frozenset(
    {"seed", "jobs", "workers", "slots", "credit", "fault_seconds", "commit_seconds", "bound"}
)
FAULTS = tuple(f.name for f in fields(Options) if f.name not in NOT_FAULTS)


def draw(seed: int) -> Options:
    """The options of a seed; each fault is in half of the runs, at a rate over two decades."""
    rng = random.Random(f"options-{seed}")

    def maybe(highest: float) -> float:
        return highest * 10 ** -rng.uniform(0, 2) if rng.random() < 0.5 else 0.0

    values: dict[str, Any] = {
        "drop": maybe(0.3),
        "duplicate": maybe(0.3),
        "delay": maybe(0.3),
        "reorder": maybe(0.3),
        "partition": maybe(0.1),
        "one_way": maybe(0.1),
        "kill_worker": maybe(0.3),
        "pause_worker": maybe(0.2),
        "kill_sentinel": maybe(0.2),
        "twin_identity": maybe(0.05),
        "disk_full": maybe(0.1),
        "fsync_error": maybe(0.1),
        "sink_down": maybe(0.1),
        "foreign_file": maybe(1.0),
        "slow_consumer": rng.random() < 0.3,
        "clock_jump": maybe(0.1),
        "cancel": maybe(1.0),
        "redeploy": maybe(0.1),
        "pause_plugin": maybe(0.05),
        "change_source": maybe(1.0),
        "replay": maybe(0.2),
    }
    slots = rng.choice((1, 1, 2, 4))
    options = Options(
        seed=seed,
        jobs=rng.choice((1, 2, 5, 10, 20, 40)),
        workers=rng.choice((1, 2, 3, 5)),
        slots=slots,
        credit=slots * rng.choice((1, 2, 16)),
        fault_seconds=rng.choice((5.0, 30.0, 90.0)),
        commit_seconds=rng.choice((0.0005, 0.005, 0.2)),
        **values,
    )
    if rng.random() < 0.25:
        # Each plugin needs a worker of its own then.
        options = replace(options, bound=True, workers=max(2, options.workers))
    return options
