"""Source roots, and what the ledger knows of their files.

What writes takes the Ledger; what reads takes a connection, such as a reader's.
"""

import os
from collections.abc import Sequence
from typing import Any

import duckdb
import msgspec

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.queries import rows as select
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.domain.paths import text_to_path
from casparian_flow.domain.scoped_names import check_namespace, check_root_name, scoped, split
from casparian_flow.sentinel.api import Row
from casparian_flow.services.patterns import compile_pattern

PATTERNS_MAX = 1_000
SETTLE_SECONDS_MAX = 86_400.0
LIMIT_MAX = 1_000_000
Connection = duckdb.DuckDBPyConnection
_ROOT, _IGNORE = "cf_source_root", "cf_ignore_rule"


def add_source(
    ledger: Ledger,
    path: str,
    *,
    settle_seconds: float | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    name: str = "",
    namespace: str = "",
    now_us: int,
) -> Row:
    """Record a source root, or take a removed one up again.

    Adding an active root again changes its settings and accepts the device that it is on now.

    Args:
        path: absolute, as text (domain/paths.py).
        ignore: replaces the root's own ignore patterns.
        name: within the namespace; "" leaves it as it is.
        namespace: whose plugins see its files. A folder that was one namespace's is never
            another's, for its files and their history are the first one's.

    Returns:
        {id, path, settle_seconds, include, ignore, added, overlaps, name, namespace}; the name is
        the scoped one.

    Raises:
        UsageError: the path is not absolute, or a pattern, the settle time or a name is not usable.
        ConflictError: the folder is another namespace's or has another name, or the name stands
            for another folder.
    """
    path = _normal(path)
    _check_names(name, namespace)
    _check_settings(settle_seconds, include, ignore)
    settings = [settle_seconds, msgspec.json.encode(list(include)).decode()]
    with ledger.transaction() as connection:
        found = select(
            connection, f"SELECT id, active, namespace, name FROM {_ROOT} WHERE path = $1", [path]
        )
        _require_free(connection, path, found[0] if found else None, name, namespace)
        if found:
            root_id = int(found[0]["id"])
            name = name or found[0]["name"]
            connection.execute(
                f"UPDATE {_ROOT} SET active = 1, settle_seconds = $2, include_patterns = $3, "
                "st_dev = NULL, name = $4 WHERE id = $1",
                [root_id, *settings, name],
            )
            connection.execute(f"DELETE FROM {_IGNORE} WHERE source_root_id = $1", [root_id])
        else:
            root_id = ledger.next_id(_ROOT)
            connection.execute(
                f"INSERT INTO {_ROOT} (id, path, settle_seconds, include_patterns, created_at, "
                "namespace, name) VALUES ($1, $2, $3, $4, make_timestamp($5), $6, $7)",
                [root_id, path, *settings, now_us, namespace, name],
            )
        for rule_id, pattern in zip(ledger.next_ids(_IGNORE, len(ignore)), ignore, strict=True):
            connection.execute(
                f"INSERT INTO {_IGNORE} (id, source_root_id, pattern, created_at) "
                "VALUES ($1, $2, $3, make_timestamp($4))",
                [rule_id, root_id, pattern, now_us],
            )
        overlaps = overlaps_of(connection, root_id, path)
    return {
        "id": root_id,
        "path": path,
        "settle_seconds": settle_seconds,
        "include": list(include),
        "ignore": list(ignore),
        "added": not found,
        "overlaps": overlaps,
        "name": scoped(namespace, name) if name else "",
        "namespace": namespace,
    }


def _require_free(
    connection: Connection, path: str, found: Row | None, name: str, namespace: str
) -> None:
    """Whether a root may have this folder and this name."""
    if found is not None and found["namespace"] != namespace:
        owner = found["namespace"] or "no namespace"
        raise ConflictError(
            f"{path} is a source root of {owner} already",
            hint="Each namespace has folders of its own.",
        )
    if found is not None and found["active"] and name and found["name"] not in ("", name):
        raise ConflictError(
            f"{path} is the source root {scoped(namespace, found['name'])} already",
            hint="Retire that first, or use its name.",
        )
    taken = select(
        connection,
        f"SELECT path FROM {_ROOT} WHERE active = 1 AND name = $1 AND namespace = $2 "
        "AND name <> '' AND path <> $3",
        [name, namespace, path],
    )
    if taken:
        raise ConflictError(
            f"source root {scoped(namespace, name)} is the folder {taken[0]['path']}",
            hint="Retire it first, or choose another name.",
        )


def list_sources(connection: Connection) -> list[Row]:
    """Every root with its settings, how many files it has, and how its last scan went."""
    rows = select(
        connection,
        f"""
        SELECT r.id, r.path, r.namespace, r.name, r.type, r.active, r.settle_seconds,
               r.include_patterns, r.created_at, coalesce(f.files, 0) AS files,
               s.finished_at AS last_scan, s.complete AS last_scan_complete,
               s.report_json AS last_report
        FROM {_ROOT} r
        LEFT JOIN (SELECT source_root_id, count(*) AS files FROM cf_file_location
                   WHERE deleted_at IS NULL GROUP BY source_root_id) f ON f.source_root_id = r.id
        LEFT JOIN (SELECT * FROM cf_scan WHERE finished_at IS NOT NULL
                   QUALIFY row_number() OVER (PARTITION BY source_root_id ORDER BY id DESC) = 1) s
               ON s.source_root_id = r.id
        ORDER BY r.id
        """,
    )
    patterns: dict[int, list[str]] = {}
    for rule in select(
        connection,
        f"SELECT source_root_id, pattern FROM {_IGNORE} "
        "WHERE active AND source_root_id IS NOT NULL ORDER BY id",
    ):
        patterns.setdefault(rule["source_root_id"], []).append(rule["pattern"])
    for row in rows:
        row["active"] = bool(row["active"])
        row["name"] = scoped(row["namespace"], row["name"]) if row["name"] else ""
        row["include"] = msgspec.json.decode(row.pop("include_patterns"), type=list[str])
        row["ignore"] = patterns.get(row["id"], [])
        report = row.pop("last_report")
        row["problems"] = _problems(report) if report else []
    return rows


def _problems(report: str) -> list[str]:
    return list(msgspec.json.decode(report, type=dict[str, Any]).get("problems", ()))


def remove_source(ledger: Ledger, path: str) -> None:
    """Deactivate a root; its history stays.

    Raises:
        NotFoundError: no active root has this path.
    """
    root = _normal(path)
    with ledger.transaction() as connection:
        count = connection.execute(
            f"UPDATE {_ROOT} SET active = 0 WHERE path = $1 AND active = 1", [root]
        ).fetchone()
        if not count or not count[0]:
            raise NotFoundError(
                f"{root} is no active source root", hint="'casparian source list' shows them."
            )


def retire_source(ledger: Ledger, name: str) -> bool:
    """Deactivate the root of a scoped name, with its history kept; False if there is none."""
    root = split(name)
    if not root.name:
        return False
    with ledger.transaction() as connection:
        count = connection.execute(
            f"UPDATE {_ROOT} SET active = 0 WHERE namespace = $1 AND name = $2 AND active = 1",
            [root.namespace, root.name],
        ).fetchone()
    return bool(count and count[0])


def root_id_of(connection: Connection, name: str) -> int | None:
    """The id of the active root with a scoped name; None if there is none."""
    root = split(name)
    row = connection.execute(
        f"SELECT id FROM {_ROOT} WHERE namespace = $1 AND name = $2 AND name <> '' AND active = 1",
        [root.namespace, root.name],
    ).fetchone()
    return None if row is None else int(row[0])


def require_root(connection: Connection, root_id: int) -> Row:
    """The row of an active root.

    Raises:
        NotFoundError: there is none.
    """
    rows = select(connection, f"SELECT * FROM {_ROOT} WHERE id = $1", [root_id])
    if not rows or not rows[0]["active"]:
        state = (
            f"source root {rows[0]['path']} was removed" if rows else f"no source root {root_id}"
        )
        raise NotFoundError(state, hint="Add it with 'casparian source add FOLDER'.")
    return rows[0]


def overlaps_of(connection: Connection, root_id: int, path: str) -> list[str]:
    """One line per other active root that lies inside this one or around it."""
    own = _real(path)
    lines = []
    for row in select(
        connection, f"SELECT path FROM {_ROOT} WHERE active = 1 AND id <> $1 ORDER BY id", [root_id]
    ):
        other = _real(row["path"])
        if own == other:
            relation = "is the same folder as"
        elif _inside(own, other):
            relation = "lies inside"
        elif _inside(other, own):
            relation = "lies around"
        else:
            continue
        lines.append(
            f"this root {relation} the source root {row['path']}: "
            "their common files are recorded, and processed, under both"
        )
    return lines


def list_files(
    connection: Connection,
    *,
    root_id: int | None = None,
    pattern: str | None = None,
    limit: int = 50,
) -> list[Row]:
    """Known files with their current version, newest change first; see `ControlApi.list_files`.

    Raises:
        UsageError: the pattern or the limit is not usable.
    """
    if not 1 <= limit <= LIMIT_MAX:
        raise UsageError(f"limit wants 1 to {LIMIT_MAX}")
    matches = compile_pattern(pattern).matches if pattern else None
    # A pattern is gitignore syntax, which SQL does not know, so it is applied here.
    rows = select(
        connection,
        f"""
        SELECT l.id, l.source_root_id, r.path AS root_path, l.rel_path, l.filename,
               l.last_known_size, l.current_version_id, v.seq AS version_seq, v.content_hash,
               v.size_bytes, v.modified_time, v.detected_at, v.applied_tags, l.discovered_time,
               CASE WHEN l.deleted_at IS NULL THEN greatest(l.last_seen_time, s.seen)
                    ELSE l.last_seen_time END AS last_seen_time,
               l.deleted_at, l.renamed_from
        FROM cf_file_location l
        JOIN {_ROOT} r ON r.id = l.source_root_id
        LEFT JOIN cf_file_version v ON v.id = l.current_version_id
        LEFT JOIN (SELECT source_root_id, max(started_at) AS seen FROM cf_scan
                   WHERE complete GROUP BY source_root_id) s
               ON s.source_root_id = l.source_root_id
        WHERE $1::BIGINT IS NULL OR l.source_root_id = $1
        ORDER BY coalesce(v.detected_at, l.discovered_time) DESC, l.id DESC
        {"" if matches else f"LIMIT {limit:d}"}
        """,
        [root_id],
    )
    if matches:
        rows = [row for row in rows if matches(row["rel_path"])][:limit]
    return rows


def versions(connection: Connection, path: str) -> list[Row]:
    """Versions of the file at `path`, oldest first; see `ControlApi.versions`.

    Raises:
        NotFoundError: the ledger knows no such file.
        ConflictError: several roots have a file of this relative path.
    """
    locations = select(
        connection,
        f"""
        SELECT l.id, r.path AS root_path, l.rel_path
        FROM cf_file_location l JOIN {_ROOT} r ON r.id = l.source_root_id
        WHERE l.rel_path = $1 OR rtrim(r.path, '/') || '/' || l.rel_path = $1
        ORDER BY l.id
        """,
        [path],
    )
    if not locations:
        raise NotFoundError(
            f"no file {path!r} is known", hint="'casparian files' lists what Scout has found."
        )
    if len(locations) > 1:
        where = ", ".join(str(row["root_path"]) for row in locations[:5])
        raise ConflictError(
            f"{path!r} is in several source roots: {where}", hint="Give its absolute path."
        )
    location = locations[0]
    rows = select(
        connection,
        """
        SELECT v.*, count(j.id) AS jobs
        FROM cf_file_version v LEFT JOIN cf_processing_queue j ON j.file_version_id = v.id
        WHERE v.location_id = $1 GROUP BY ALL ORDER BY v.seq
        """,
        [location["id"]],
    )
    for row in rows:
        row["rel_path"], row["root_path"] = location["rel_path"], location["root_path"]
    return rows


def _normal(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path) > 16_384:
        raise UsageError(
            f"source root {path[:200]!r} is not an absolute path", hint="Give its full path."
        )
    return os.path.normpath("/" + path.lstrip("/"))


def _check_names(name: str, namespace: str) -> None:
    check_root_name(name)
    if check_namespace(namespace) and not name:
        raise UsageError(
            f"a source root of namespace {namespace} wants a name", hint="Give one with it."
        )


def _check_settings(
    settle_seconds: float | None, include: Sequence[str], ignore: Sequence[str]
) -> None:
    if settle_seconds is not None and not 0 <= settle_seconds <= SETTLE_SECONDS_MAX:
        raise UsageError(f"settle_seconds wants 0 to {SETTLE_SECONDS_MAX:.0f}")
    if len(include) + len(ignore) > PATTERNS_MAX:
        raise UsageError(f"a root has at most {PATTERNS_MAX} patterns")
    for pattern in (*include, *ignore):
        compile_pattern(pattern)


def _real(path: str) -> str:
    return os.path.realpath(text_to_path(path))


def _inside(path: str, other: str) -> bool:
    return path.startswith(other.rstrip("/") + "/")
