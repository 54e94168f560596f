"""The module that huey's consumer imports: one queue and one task."""

import os
from typing import Any

from huey import SqliteHuey

DATABASE_VARIABLE = "BENCH_HUEY_DATABASE"
DONE_VARIABLE = "BENCH_HUEY_DONE"


def attach(path: str) -> tuple[Any, Any]:
    """The queue in a database, which keeps no results as nothing asks for them, and its task."""
    attached: Any = SqliteHuey("bench", filename=path, fsync=True, results=False)
    return attached, attached.task(name="noop")(_noop)


def _noop() -> None:
    """One byte in a file proves that it ran, at a millionth of a second."""
    os.write(_done, b".")


if DATABASE_VARIABLE in os.environ:
    _done = os.open(os.environ[DONE_VARIABLE], os.O_WRONLY | os.O_APPEND)
    queue, noop = attach(os.environ[DATABASE_VARIABLE])
