"""One SELECT by a client, in a process of its own that can reach a copy of the ledger and outputs.

    python -I -m casparian_flow.mcp_server.query_child < request.json > answer.json

Four guards, each of which holds without the others: Landlock lets the process read its own code,
the copy and the output folder, and write nothing; resource limits bound its time and memory; DuckDB
has external access off but for the output folder, and its configuration locked; and DuckDB's own
parser says what the text is: one SELECT over tables that exist, whatever it looks like.
"""

import json
import resource
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import duckdb

from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.outputs import OutputKind, OutputState, SinkMode
from casparian_flow.mcp_server.budget import LIST_BYTES_MAX, as_json
from casparian_flow.mcp_server.query_outputs import (
    LOADED,
    UnreadableError,
    offer,
    published_outputs,
    quoted,
)
from casparian_flow.mcp_server.redaction import RedactionMode, Redactor
from casparian_flow.protocol.http_types import (
    EVENT_TYPES,
    ApprovalStatus,
    HttpJobStatus,
    HttpJobType,
)
from casparian_worker.sandbox import landlock, libc

TABLE_FUNCTIONS: Final = frozenset({"unnest", "range", "generate_series"})
"""Those that compute; all others read files, settings or other SQL."""
TELLING: Final = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException)
"""Errors found before a value is read, so that their text tells of none."""
FETCH_ROWS: Final = 256
INTERRUPT_S: Final = 0.2
SLACK_BYTES: Final = 2 << 30
"""Address space beside DuckDB's own memory: code, threads, allocator."""
_SYSTEM: Final = ("/usr", "/lib", "/lib64", "/etc/localtime", "/dev/urandom", "/dev/null",
                  "/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/sys/devices/system/cpu",
                  "/sys/fs/cgroup")  # fmt: skip


_WORDS: Final = frozenset(
    {*JobStatus, *OutputState, *OutputKind, *SinkMode, *HttpJobStatus, *HttpJobType}
    | {*ApprovalStatus, *EVENT_TYPES, "YES", "NO", "PRI", "UNI"}
)


class RefusedError(Exception):
    """The text is not what may be asked."""


def main() -> int:
    request = json.load(sys.stdin)
    _confine(request)
    answer = answer_to(request)
    sys.stdout.write(as_json(answer))
    return 0


def _confine(request: dict[str, Any]) -> None:
    """Before foreign text is read, and while this process has one thread."""
    seconds = int(request["timeout_s"]) * 2 + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    space = (request["memory_mb"] << 20) + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (space, space))
    snapshot, output_root = request["snapshot"], request["output_root"]
    code = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path)}
    reads = (*_SYSTEM, *code, snapshot, snapshot + ".wal", output_root)
    try:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(landlock.Rule(path, landlock.READ) for path in reads)
    except OSError:
        # An old kernel: DuckDB's own guards hold without this one.
        return


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """{columns, types, rows, truncated}, or {refused} or {failed} with a message."""
    redactor = Redactor(RedactionMode(request["redaction"]), bytes.fromhex(request["key"]))
    connection = _open(request)
    ended = threading.Event()
    try:
        _interrupt_after(connection, request["timeout_s"], ended)
        _prepare(connection, request)
        redactor = replace(redactor, known=_words(connection))
        return _run(connection, request["sql"], request["limit"], redactor)
    except RefusedError as error:
        return {"refused": str(error)}
    except UnreadableError as error:
        return {"failed": str(error)}
    except duckdb.InterruptException:
        return {"failed": f"the query did not end within {request['timeout_s']:g} seconds"}
    except (duckdb.OutOfMemoryException, MemoryError):
        return {"failed": f"the query needs more than {request['memory_mb']} MiB"}
    except TELLING as error:
        return {"failed": str(error)[:2_000]}
    except (duckdb.Error, UnicodeError, ValueError, OverflowError) as error:
        told = redactor.mode is RedactionMode.NONE
        return {"failed": str(error)[:2_000] if told else _without_values(error)}
    finally:
        ended.set()


def _interrupt_after(
    connection: duckdb.DuckDBPyConnection, seconds: float, ended: threading.Event
) -> None:
    """Interrupt what runs after some seconds, again and again: one that comes too early is lost."""

    def watch() -> None:
        if ended.wait(seconds):
            return
        while not ended.wait(INTERRUPT_S):
            connection.interrupt()

    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def _without_values(error: Exception) -> str:
    return f"{type(error).__name__} while values were read; its text may quote some and is kept"


def _open(request: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        ":memory:",
        config={
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": f"{request['memory_mb']}MB",
            "temp_directory": "",
            "threads": "2",
        },
    )
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"ATTACH {quoted(request['snapshot'])} AS ledger (READ_ONLY)")
    connection.execute("CREATE SCHEMA outputs")
    connection.execute(f"CREATE SCHEMA {LOADED}")
    return connection


def _prepare(connection: duckdb.DuckDBPyConnection, request: dict[str, Any]) -> None:
    """Judge the text, make the views that it names, and lock what may be reached."""
    views = dict(published_outputs(connection, request["output_root"]))
    referenced = referenced_tables(connection, request["sql"])
    tables = _catalog(connection)
    unknown = sorted(referenced - tables - views.keys())
    if unknown:
        raise RefusedError(
            f"there is no table {unknown[0][:80]!r}; SHOW ALL TABLES lists them, and "
            f"outputs are: {', '.join(sorted(views)) or 'none yet'}"
        )
    # Each view opens its files once: only those that are asked for, or all for a listing.
    listing = "" in referenced or not referenced.isdisjoint(_LISTINGS)
    for name, output in views.items():
        if listing or name in referenced:
            offer(connection, name, output, rows=name in referenced)
    root = request["output_root"].rstrip("/") + "/"
    connection.execute("SET search_path = 'ledger.main,memory.outputs'")
    connection.execute(f"SET allowed_directories = [{quoted(root)}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


_LISTINGS: Final = frozenset({"tables", "columns", "views", "duckdb_views", "duckdb_columns"})


def _catalog(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Names of tables and system views, in small letters; "" stands for SHOW and DESCRIBE."""
    found = connection.execute(
        "SELECT lower(table_name) FROM duckdb_tables() WHERE database_name = 'ledger' "
        "UNION SELECT lower(view_name) FROM duckdb_views() WHERE internal"
    )
    return {"", *(name for (name,) in found.fetchall())}


def _words(connection: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """What a client may read in any mode: names of tables, columns, types and plugins, statuses."""
    found = connection.execute(
        "SELECT table_name FROM duckdb_columns() UNION SELECT column_name FROM duckdb_columns() "
        "UNION SELECT data_type FROM duckdb_columns() "
        "UNION SELECT plugin_name FROM ledger.main.cf_plugin_manifest "
        "UNION SELECT version FROM ledger.main.cf_plugin_manifest "
        "UNION SELECT topic FROM ledger.main.cf_output"
    )
    return _WORDS | {str(word) for (word,) in found.fetchall()}


def referenced_tables(connection: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Names of the tables that a SELECT reads, in small letters, without its own CTEs.

    Raises:
        RefusedError: not exactly one SELECT, or one that calls a table function that reads.
        duckdb.ParserException: no SQL.
    """
    if any(0xD800 <= ord(c) <= 0xDFFF for c in sql):
        raise RefusedError("the text is not Unicode")
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(s.type.name for s in statements[:5]) or "nothing"
        raise RefusedError(f"one SELECT is wanted, not {kinds}")
    row = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchone()
    tree: dict[str, Any] = json.loads(row[0]) if row else {"error": True}
    if tree["error"] or len(tree["statements"]) != 1:
        raise RefusedError(f"one SELECT is wanted: {tree.get('error_message', 'it is none')[:500]}")
    tables: set[str] = set()
    own: set[str] = set()
    for node in _nodes(tree["statements"]):
        kind = node.get("type")
        if kind == "BASE_TABLE":
            _require_offered(node)
            tables.add(str(node.get("table_name", "")).lower())
        elif kind == "SHOW_REF":
            tables.add("")
        elif kind == "TABLE_FUNCTION":
            _require_computing(node)
        if isinstance(ctes := node.get("cte_map"), dict):
            own |= {str(entry.get("key", "")).lower() for entry in ctes.get("map", [])}
    return tables - own


def _require_offered(node: dict[str, Any]) -> None:
    place = str(node.get("schema_name", "")).lower()
    if place == LOADED:
        raise RefusedError(f"the schema {place!r} is this process's own; use the topic's name")


def _require_computing(node: dict[str, Any]) -> None:
    function = node.get("function")
    name = str(function.get("function_name", "")) if isinstance(function, dict) else ""
    if name.lower() not in TABLE_FUNCTIONS:
        raise RefusedError(
            f"the table function {name[:80]!r} is not allowed; outputs are tables by topic"
        )


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of the parser's answer, without recursion: how deep it is, a client decides."""
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _run(
    connection: duckdb.DuckDBPyConnection, sql: str, limit: int, redactor: Redactor
) -> dict[str, Any]:
    cursor = connection.execute(sql)
    described = cursor.description or []
    rows, truncated, size = list[list[Any]](), False, 0
    for row in _fetched(cursor):
        shown = redactor.row(row)
        size += len(as_json(shown).encode(errors="replace")) + 1
        if len(rows) >= limit or size > LIST_BYTES_MAX:
            truncated = True
            break
        rows.append(shown)
    return {
        "columns": [str(column[0])[:255] for column in described],
        "types": [str(column[1])[:255] for column in described],
        "rows": rows,
        "truncated": truncated,
    }


def _fetched(cursor: duckdb.DuckDBPyConnection) -> Iterable[tuple[Any, ...]]:
    while some := cursor.fetchmany(FETCH_ROWS):
        yield from some


if __name__ == "__main__":
    sys.exit(main())
