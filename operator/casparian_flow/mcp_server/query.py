"""The parent's side of a query: copy the ledger, let a child read it, delete the copy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.mcp_server.redaction import Redactor

START_S: Final = 20.0
"""For a child to start and to open the copy, beside the query's own time."""
SQL_CHARS_MAX: Final = 65_536


class QueryFailedError(CasparianError):
    """The query was allowed and did not succeed."""


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """What one query may use.

    Attributes:
        output_root: folder whose published files are offered as tables.
    """

    timeout_s: float
    memory_mb: int
    output_root: Path


def select(
    snapshot: Callable[[], str], sql: str, limit: int, limits: QueryLimits, redactor: Redactor
) -> dict[str, Any]:
    """Run one SELECT.

    Args:
        snapshot: makes a copy of the ledger, which is deleted here, and tells its path.

    Returns:
        {columns, types, rows, truncated}

    Raises:
        UsageError: not one SELECT over tables that exist.
        QueryFailedError: it failed, or needed more than the limits.
    """
    copy = snapshot()
    request = {
        "snapshot": copy,
        "output_root": os.path.realpath(limits.output_root),
        "sql": sql,
        "limit": limit,
        "timeout_s": limits.timeout_s,
        "memory_mb": limits.memory_mb,
        "redaction": redactor.mode,
        "key": redactor.key.hex(),
    }
    try:
        answer = _asked(request, limits.timeout_s + START_S)
    finally:
        for path in (Path(copy), Path(copy + ".wal")):
            path.unlink(missing_ok=True)
    if "refused" in answer:
        raise UsageError(answer["refused"], hint="The server reads only; see docs/mcp.md.")
    if "failed" in answer:
        raise QueryFailedError(answer["failed"])
    return answer


def _asked(request: dict[str, Any], patience_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-m", "casparian_flow.mcp_server.query_child"],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=patience_s,
            env={"LANG": "C.UTF-8"},
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise QueryFailedError("the query was stopped: its time is over") from None
    except OSError as error:
        raise QueryFailedError(f"no process for the query: {error.strerror}") from error
    if done.returncode != 0:
        # Its stderr may quote values: it is for the operator's log, not for the client.
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise QueryFailedError(
            "the query's process was ended by its limits of memory or time"
            if done.returncode < 0 or "MemoryError" in last
            else "the query's process failed"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
