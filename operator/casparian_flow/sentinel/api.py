"""Every call that the command line, Scout and other clients may make of the control plane.

One interface, two ways to reach it: `RemoteControl` asks a running Sentinel over the control
socket, `LocalControl` opens the ledger in this process when none runs. Arguments and results are
JSON-able (bytes where said); rows are dicts whose keys are the ledger's column names unless said
otherwise. Times are ISO 8601 text in UTC.

All methods may raise NotFoundError, ConflictError, UsageError, LedgerError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Row = dict[str, Any]
AWAIT_MAX_S = 20.0
"""Longest that one call waits, well below the patience of a client."""


@dataclass(slots=True)
class FileFinding:
    """What Scout found out about one file.

    Attributes:
        rel_path: as text (domain/paths.py), "/" between parts.
        signature: (dev, ino, size, mtime_ns, ctime_ns) of the stat that framed the read.
        content_hash: SHA-256 hex; "" = not read, only the signature or last-seen changes.
        hashed_at_us: wall clock when hashing began; decides whether the record is racy.
        expected_version_id: the current version Scout compared with, 0 for none; the commit is
            refused for this file if the ledger has moved on.
        renamed_from: rel_path of the location this file was moved from, "" if none.
    """

    rel_path: str
    signature: tuple[int, int, int, int, int]
    content_hash: str = ""
    hashed_at_us: int = 0
    expected_version_id: int = 0
    renamed_from: str = ""


@dataclass(slots=True)
class ChunkResult:
    """Counts of one committed chunk."""

    locations: int = 0
    versions: int = 0
    jobs: int = 0
    unchanged: int = 0
    """Files read that still have their current version's bytes."""
    renamed: int = 0
    conflicts: list[str] = field(default_factory=list)
    """rel_paths not taken because the ledger had moved on; scanned again next time."""


@dataclass(slots=True)
class ScanReport:
    """How one scan went."""

    root_id: int
    files: int = 0
    unchanged: int = 0
    versions: int = 0
    jobs: int = 0
    deleted: int = 0
    renamed: int = 0
    unsettled: int = 0
    ignored: int = 0
    complete: bool = True
    problems: list[str] = field(default_factory=list)
    """One line each: unreadable directories, vanished files, special files, overlapping roots."""
    seconds: float = 0.0
    st_dev: int = 0
    """Device of the root to record as this source's own; 0 leaves the record as it is."""


class ControlApi(Protocol):
    # -- liveness and overview
    def ping(self) -> Row:
        """{pid, ledger_id, epoch, version, started_at, db_location}."""

    def status(self) -> Row:
        """{sentinel, ledger, jobs: {status: count}, workers: [...], plugins, sources, causes}.

        `causes` is a list of {about, cause, cure}: why nothing happens, if nothing does.
        """

    def stop(self) -> None:
        """Drain and stop the Sentinel."""

    # -- jobs
    def list_jobs(
        self,
        *,
        status: str | None = None,
        plugin: str | None = None,
        path: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Row]: ...

    def show_job(self, job_id: int) -> Row:
        """The job's row, its file and version, `history` (journal) and `outputs`."""

    def job_log(self, job_id: int) -> list[Row]:
        """{attempt, log} for each attempt that said something."""

    def submit(self, *, version_id: int, plugin: str, priority: int | None, force: bool) -> int:
        """Enqueue one job for a file version; `force` raises the generation. Returns its id."""

    def await_job(self, job_id: int, *, timeout_s: float) -> Row:
        """{outcome: "ended" | "waiting", status}; returns as soon as the job's end is durable.

        `timeout_s` is cut to AWAIT_MAX_S: ask again for more.
        """

    def cancel_job(self, job_id: int) -> Row:
        """{outcome: "cancelled" | "too_late" | "already", status}."""

    def retry_job(self, job_id: int) -> int:
        """A new job for the same version and plugin, `retry_of` the old one. Returns its id."""

    def resolve_job(self, job_id: int, *, forward: bool) -> Row:
        """Operator's decision on a STAGED job that cannot complete: publish again, or give up."""

    def list_dead_letters(self, *, plugin: str | None = None, limit: int = 50) -> list[Row]: ...

    def replay(self, *, plugin: str | None = None, job_ids: Sequence[int] = ()) -> list[int]:
        """New jobs for dead letters; returns their ids."""

    # -- files
    def add_source(
        self,
        path: str,
        *,
        settle_seconds: float | None = None,
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> Row: ...

    def list_sources(self) -> list[Row]: ...

    def remove_source(self, path: str) -> None:
        """Deactivate a source root; its history stays."""

    def list_files(
        self, *, root_id: int | None = None, pattern: str | None = None, limit: int = 50
    ) -> list[Row]: ...

    def versions(self, path: str) -> list[Row]:
        """Versions of the file at `path` (absolute, or relative to a root), oldest first."""

    # -- scanning
    def begin_scan(self, root_id: int) -> Row:
        """{scan_id, path, include, ignore, settle_seconds, st_dev}; one scan per root at a time."""

    def inventory(self, root_id: int) -> bytes:
        """Arrow IPC stream: rel_path, location_id, version_id, dev, ino, size, mtime_ns, ctime_ns,
        hashed_at_us, for every location not marked deleted."""

    def commit_chunk(
        self, root_id: int, scan_id: int, findings: Sequence[FileFinding]
    ) -> ChunkResult:
        """Registry, versions, pointers, tags and jobs of up to 2,000 files, in one transaction."""

    def finish_scan(
        self, root_id: int, scan_id: int, deleted: Sequence[str], report: ScanReport
    ) -> None:
        """Mark deletions and record the report."""

    def next_rescans(self) -> list[Row]:
        """{root_id, rel_path} that a job found changed; each is handed out once."""

    # -- wiring
    def deploy(
        self,
        *,
        plugin_name: str,
        version: str,
        source_code: str,
        lockfile: str = "",
        artifact_hash: str = "",
        publisher: str = "",
    ) -> Row:
        """{plugin_id, message, unchanged, rule, topics, subscriptions}."""

    def list_plugins(self) -> list[Row]: ...

    def pause_plugin(self, plugin: str, *, reason: str) -> None: ...

    def resume_plugin(self, plugin: str) -> None: ...

    def backfill(self, plugin: str, *, execute: bool, force: bool = False) -> Row:
        """{jobs: n, bytes_gone: [...]} for existing current versions without a job."""

    def list_topics(self) -> list[Row]: ...

    def set_topic(
        self,
        plugin: str,
        topic: str,
        *,
        uri: str,
        mode: str = "append",
        schema_json: str = "",
    ) -> None: ...

    def list_rules(self) -> list[Row]: ...

    def add_rule(self, pattern: str, tag: str, *, priority: int = 50) -> int: ...

    def remove_rule(self, rule_id: int) -> None: ...

    def list_workers(self) -> list[Row]: ...

    # -- reading
    def snapshot(self) -> str:
        """Path of a consistent copy of the ledger, made for this caller, who deletes it."""

    def check(self) -> list[str]:
        """Broken rules between tables, one line each; empty when sound."""

    def export(self, directory: str) -> Row:
        """Write the whole history to `directory`; {tables: {name: rows}}."""
