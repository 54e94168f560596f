"""Judges of what a flow has left behind: its ledger, its sinks, its folders.

They read files and tables only, after every process has ended. Each gives a list of sentences
about what is wrong; none knows what happened meanwhile.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from casparian_worker.lineage import global_job_id

Rows = Counter[tuple[Any, ...]]
RUN_COLUMNS = frozenset({"_cf_job_id", "_cf_processed_at"})
"""What differs between two runs over the same bytes."""
FINE_SKIPS = frozenset({"source_changed", "source_missing", "superseded"})


@dataclass(frozen=True)
class Output:
    """One row of cf_output, with its job's plugin and end."""

    plugin: str
    topic: str
    sink_uri: str
    token: str
    final: str
    rows: int
    sha256: str
    state: str
    status: str


class Remains:
    """What a world has left behind. Its ledger must be closed."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        with closing(duckdb.connect(str(folder / "ledger.duckdb"), read_only=True)) as db:
            self.outputs = [
                Output(*row)
                for row in db.execute(
                    "SELECT q.plugin_name, o.topic, o.sink_uri, o.token, o.final, o.rows, o.sha256,"
                    " o.state, q.status FROM cf_output o JOIN cf_processing_queue q"
                    " ON q.id = o.job_id"
                ).fetchall()
            ]
            self.jobs = db.execute(
                "SELECT q.id, q.plugin_name, q.status, coalesce(q.reason, ''), l.rel_path, v.seq,"
                " v.content_hash, v.id = l.current_version_id, q.attempt"
                " FROM cf_processing_queue q JOIN cf_file_version v ON v.id = q.file_version_id"
                " JOIN cf_file_location l ON l.id = v.location_id ORDER BY q.id"
            ).fetchall()
            self.dead_letters = db.execute(
                "SELECT original_job_id, reason, error_message FROM cf_dead_letter"
            ).fetchall()
            self.epochs = int(
                db.execute("SELECT value FROM cf_meta WHERE key = 'epoch'").fetchone()[0]  # type: ignore[index]
            )

    # -- the ledger -----------------------------------------------------------------------------

    def ledger_faults(self, contents: dict[str, bytes]) -> list[str]:
        """Jobs that did not end as they must; versions of bytes that never were in a file."""
        wrong = [f"dead letter {row}" for row in self.dead_letters]
        done: Counter[tuple[str, str]] = Counter()
        for job_id, plugin, status, reason, path, seq, sha, current, _ in self.jobs:
            told = f"job {job_id} ({plugin}, {path} version {seq})"
            if sha not in contents:
                wrong.append(f"{told} is of bytes that never were in the file")
            if status == "COMPLETED":
                done[plugin, sha + path + str(seq)] += 1
            elif status != "SKIPPED" or reason not in FINE_SKIPS:
                wrong.append(f"{told} is {status} {reason}")
            elif current and not self._done_later(job_id, plugin, path, seq):
                wrong.append(f"{told} is the newest, yet SKIPPED: {reason}")
        wrong += [f"{key} was completed {n} times" for key, n in done.items() if n > 1]
        wrong += [
            f"{o.topic} of {o.token} is {o.state}, its job {o.status}"
            for o in self.outputs
            if (o.state, o.status) != ("PUBLISHED", "COMPLETED")
        ]
        return wrong

    def _done_later(self, job_id: int, plugin: str, path: str, seq: int) -> bool:
        return any(
            (j[1], j[2], j[4], j[5]) == (plugin, "COMPLETED", path, seq) and j[0] > job_id
            for j in self.jobs
        )

    def completed(self, plugin: str) -> dict[str, list[str]]:
        """For every file the bytes (SHA-256) of its completed versions, oldest first."""
        found: dict[str, list[tuple[int, str]]] = {}
        for _, name, status, _, path, seq, sha, _, _ in self.jobs:
            if name == plugin and status == "COMPLETED":
                found.setdefault(path, []).append((seq, sha))
        return {path: [sha for _, sha in sorted(pairs)] for path, pairs in found.items()}

    # -- sinks against the ledger -----------------------------------------------------------------

    def sink_faults(self, replaced: Iterable[str] = ()) -> list[str]:
        """Files and rows beside or other than what the manifests of granted attempts say.

        Args:
            replaced: topics of which the ledger knows more outputs than are still in place.
        """
        wrong: list[str] = []
        files: set[Path] = set()
        tables: dict[tuple[str, str], dict[str, int]] = {}
        gone = set(replaced)
        for output in self.outputs:
            if output.sink_uri.startswith("parquet:"):
                path = self.output / output.final
                if output.topic in gone and not path.exists():
                    continue
                files.add(path)
                wrong += _file_faults(path, output)
            else:
                table = tables.setdefault((_database(output.sink_uri), output.topic), {})
                table[global_job_id(output.token)] = output.rows
        for found in self.output.rglob("*.parquet"):
            if found not in files and ".stage" not in found.parts:
                wrong.append(f"{found.name} is no output of any job")
        for (name, table_name), expected in tables.items():
            have = self._rows_by_job(name, table_name)
            for job in have.keys() | expected.keys():
                rows, want = have.get(job, 0), expected.get(job, 0)
                if rows != want and not (table_name in gone and rows == 0):
                    wrong.append(f"{table_name}: {rows} rows of {job}, in its manifest {want}")
            wrong += self._fence_faults(name)
        return wrong

    def _rows_by_job(self, name: str, table: str) -> dict[str, int]:
        with closing(sqlite3.connect(self.output / name)) as db:
            sql = f'SELECT _cf_job_id, count(*) FROM "{table}" GROUP BY 1'
            return dict(db.execute(sql).fetchall())

    def _fence_faults(self, name: str) -> list[str]:
        with closing(sqlite3.connect(self.output / name)) as db:
            fenced = {row[0] for row in db.execute("SELECT token FROM _cf_fence")}
            sound = db.execute("PRAGMA integrity_check").fetchall()
        granted = {o.token for o in self.outputs if _database(o.sink_uri) == name}
        wrong = [f"{name}: rows under {token}, never granted" for token in fenced - granted]
        wrong += [f"{name}: no rows under the granted {token}" for token in granted - fenced]
        return wrong if sound == [("ok",)] else [*wrong, f"{name}: {sound}"]

    # -- rows -----------------------------------------------------------------------------------

    def parquet_rows(self, folder: str) -> Rows:
        """All rows of a folder as a multiset, without what differs between runs."""
        rows: Rows = Counter()
        for path in (self.output / folder).glob("*.parquet"):
            table = pq.read_table(path)
            names = sorted(n for n in table.column_names if n not in RUN_COLUMNS)
            rows.update(zip(*(table[n].to_pylist() for n in names), strict=True))
        return rows

    def sqlite_rows(self, name: str, table: str) -> Rows:
        with closing(sqlite3.connect(self.output / name)) as db:
            names = sorted(
                row[1]
                for row in db.execute(f'PRAGMA table_info("{table}")')
                if row[1] not in RUN_COLUMNS
            )
            columns = ", ".join(f'"{n}"' for n in names)
            return Counter(db.execute(f'SELECT {columns} FROM "{table}"').fetchall())

    def draws(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """By job, the draws found in the Parquet files and in the table of the chance plugin."""
        files: dict[str, set[str]] = {}
        for path in (self.output / "dice").glob("*.parquet"):
            table = pq.read_table(path, columns=["_cf_job_id", "draw"])
            for job, draw in zip(*(c.to_pylist() for c in table.columns), strict=True):
                files.setdefault(str(job), set()).add(draw)
        rows: dict[str, set[str]] = {}
        with closing(sqlite3.connect(self.output / "dice.sqlite3")) as db:
            for job, draw in db.execute("SELECT _cf_job_id, draw FROM dice_rows"):
                rows.setdefault(job, set()).add(draw)
        return files, rows


def _file_faults(path: Path, output: Output) -> list[str]:
    if not output.rows:
        return []
    if not path.exists():
        return [f"{path.name} of {output.token} is missing"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != output.sha256:
        return [f"{path.name} is not what {output.token} staged"]
    rows = pq.read_metadata(path).num_rows
    return [] if rows == output.rows else [f"{path.name} has {rows} rows, not {output.rows}"]


def _database(uri: str) -> str:
    return uri.partition("://")[2].partition("?")[0]


def attempts(jobs: Iterable[tuple[Any, ...]]) -> Counter[int]:
    """How many jobs took how many attempts."""
    return Counter(job[8] for job in jobs)
