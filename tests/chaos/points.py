"""Named points of the commit protocol at which a process kills itself with SIGKILL.

The product knows nothing of this: a process that is to die is started by zygote.py, which wraps
one function of the parts it is made of before it runs them. docs/ARCHITECTURE.md, "The commit
protocol", has the steps that the points lie between.
"""

import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from casparian_flow.domain.jobs import JournalKind
from casparian_flow.domain.records import Record
from casparian_flow.protocol.frames import Op

Where = Callable[[tuple[Any, ...]], bool]


def _always(_: tuple[Any, ...]) -> bool:
    return True


def _records(kind: JournalKind) -> Where:
    """Calls of Ledger.commit whose batch has a record of this kind."""
    return lambda args: any(isinstance(i, Record) and i.kind is kind for i in args[1])


def _says(op: Op) -> Where:
    """Calls of Wire._flush that send a message of this kind."""
    return lambda args: any(frame.op is op for frame in args[0]._outgoing)


def _sql(word: str) -> Where:
    """Calls of a table target with a statement that begins so."""
    return lambda args: args[1].lstrip().upper().startswith(word)


@dataclass(frozen=True)
class Point:
    """Where a process dies.

    Attributes:
        role: "worker" or "sentinel".
        target: `module:Class.method` or `module:function`.
        after: whether the call is made first.
        where: which calls count.
    """

    name: str
    role: str
    target: str
    after: bool
    where: Where = _always


WORKER = "casparian_worker"
LEDGER = "casparian_flow.db.ledger:Ledger"
POINTS = (
    Point("dispatched", "worker", f"{WORKER}.worker_state:WorkerState._dispatch", True),
    Point("plugin-began", "worker", f"{WORKER}.runner:Runner.began", True),
    Point("half-staged", "worker", f"{WORKER}.job_outputs:JobOutputs.write", True),
    Point("staged", "worker", f"{WORKER}.worker_state:WorkerState._staged", False),
    Point("stage-said", "worker", f"{WORKER}.wire:Wire._flush", True, _says(Op.STAGE)),
    Point("granted", "worker", f"{WORKER}.worker_state:WorkerState._grant", False),
    Point("recovering", "worker", f"{WORKER}.worker_state:WorkerState._recover", True),
    Point("nothing-in-place", "worker", f"{WORKER}.publishing:Publisher._put_in_place", False),
    Point("one-in-place", "worker", f"{WORKER}.publishing:Publisher._put_in_place", True),
    Point("linked", "worker", f"{WORKER}.sinks.files:FileSink.publish", True),
    Point(
        "rows-inserted", "worker", f"{WORKER}.sinks.sqlite:SqliteTarget.execute", True,
        _sql("INSERT"),
    ),
    Point(
        "before-sql-commit", "worker", f"{WORKER}.sinks.sqlite:SqliteTarget.execute", False,
        _sql("COMMIT"),
    ),
    Point(
        "after-sql-commit", "worker", f"{WORKER}.sinks.sqlite:SqliteTarget.execute", True,
        _sql("COMMIT"),
    ),
    Point("all-in-place", "worker", f"{WORKER}.sinks.files:FileSink.unstage", False),
    Point("one-unstaged", "worker", f"{WORKER}.sinks.files:FileSink.unstage", True),
    Point("published", "worker", f"{WORKER}.worker_state:WorkerState._published", False),
    Point("conclude-said", "worker", f"{WORKER}.wire:Wire._flush", True, _says(Op.CONCLUDE)),
    Point("acknowledged", "worker", f"{WORKER}.worker_state:WorkerState._conclude_ack", False),
    Point("discarding", "worker", f"{WORKER}.publishing:delete_stages", False),
    Point("before-lease", "sentinel", f"{LEDGER}.commit", False, _records(JournalKind.LEASED)),
    Point("after-lease", "sentinel", f"{LEDGER}.commit", True, _records(JournalKind.LEASED)),
    Point("before-grant", "sentinel", f"{LEDGER}.commit", False, _records(JournalKind.GRANTED)),
    Point("after-grant", "sentinel", f"{LEDGER}.commit", True, _records(JournalKind.GRANTED)),
    Point("before-end", "sentinel", f"{LEDGER}.commit", False, _records(JournalKind.COMPLETED)),
    Point("after-end", "sentinel", f"{LEDGER}.commit", True, _records(JournalKind.COMPLETED)),
    Point("in-transaction", "sentinel", f"{LEDGER}._mark_transaction", True),
    Point("unmarked-commit", "sentinel", "casparian_flow.db.highwater:HighWater.write", False),
    Point("in-fold", "sentinel", "casparian_flow.db.folding:project", True),
    Point("new-epoch", "sentinel", f"{LEDGER}.begin_epoch", True),
)  # fmt: skip
BY_NAME = {point.name: point for point in POINTS}


def arm(point: Point, nth: int, met: Path) -> None:
    """Make the `nth` call that counts the last thing this process does; it notes so in `met`."""
    module_name, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    call = getattr(owner, name)
    left = iter(range(nth - 1))

    @wraps(call)
    def last(*args: Any, **kwargs: Any) -> Any:
        if not point.where(args) or next(left, None) is not None:
            return call(*args, **kwargs)
        if point.after:
            call(*args, **kwargs)
        _die(point.name, met)
        raise AssertionError("survived SIGKILL")

    setattr(owner, name, last)


def _die(name: str, met: Path) -> None:
    descriptor = os.open(met, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{name}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
