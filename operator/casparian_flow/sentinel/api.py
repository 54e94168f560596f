"""Every call that the command line, Scout and other clients may make of the control plane.

One interface, two ways to reach it: `RemoteControl` asks a running Sentinel over the control
socket, `LocalControl` opens the ledger in this process when none runs. Arguments and results are
JSON-able (bytes where said); rows are dicts whose keys are the ledger's column names unless said
otherwise. Times are ISO 8601 text in UTC.

All methods may raise NotFoundError, ConflictError, UsageError, LedgerError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

from casparian_flow.domain.ids import JobId
from casparian_flow.protocol.http_types import (
    AnyEvent,
    AnyOperation,
    Approval,
    ApprovalBinding,
    ApprovalStatus,
    Cleaned,
    Event,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobResult,
    JobSpec,
    OutputInfo,
)

Row = dict[str, Any]
SNAPSHOT_PART_BYTES = 8 * 1024 * 1024
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
        """{sentinel, ledger, jobs: {status: count}, api_jobs: {status: count}, requests, workers:
        [...], trials, plugins, sources, causes}.

        `api_jobs` are those that the Sentinel carries out and that are not over, `requests` how
        many wait for a person.

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
        name: str = "",
        namespace: str = "",
    ) -> Row:
        """Record a source root, or take a removed one up again; the same one twice is one.

        Args:
            name, namespace: `namespace/name` names the root; only plugins and rules of its
                namespace see its files.
        """

    def list_sources(self) -> list[Row]: ...

    def remove_source(self, path: str) -> None:
        """Deactivate a source root; its history stays."""

    def retire_source(self, name: str) -> bool:
        """Deactivate the source root of a scoped name; False if none is active. Idempotent."""

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

    def next_rescans(self, root_id: int | None = None) -> list[Row]:
        """{root_id, rel_path} that a job found changed, of one root or all; each is handed out
        once."""

    # -- wiring
    def deploy(self, bundle: bytes, namespace: str = "") -> Row:
        """Check a plugin bundle's signature, hash, source and MANIFEST; record and wire it.

        A worker tries the version before it becomes active; `list_plugins` tells how it stands.

        Args:
            namespace: in which the plugin lives from then on: it is `namespace/name` everywhere,
                while its author signed the plain name.

        Returns {plugin_id, status, message, unchanged, rule, topics, subscriptions, kept}.
        """

    def plugin_bundle(self, plugin: str, version: str = "") -> Row:
        """{bundle, deployed_at_us}: a version as the ledger holds it, in base64.

        Args:
            version: "" takes the one that runs, or else the newest.
        """

    def reload(self) -> None:
        """Read the plugins, their wiring and who is trusted anew; who is not, is paused."""

    def list_plugins(self) -> list[Row]:
        """Every version of every plugin, newest of each first, with how it stands."""

    def list_trials(self) -> list[Row]:
        """{plugin_id, plugin_name, version, state, tries, note} of versions to be tried."""

    def rollback_plugin(self, plugin: str, version: str) -> Row:
        """Make an earlier version active again: {plugin, version, superseded, withdrawn, kept,
        message}."""

    def retire_plugin(self, plugin: str) -> Row:
        """Take a plugin out of service, with its wiring; history and queued jobs stay. Idempotent.

        A later deploy brings it back; for a version that was active before, `rollback_plugin`.

        Returns {plugin, superseded, withdrawn}: the version that was active, and the staged ones.
        """

    def plugin_counts(self) -> list[Row]:
        """How much there is to do for each plugin version, for those who start workers.

        One row for every version that is active, staged, or has jobs under way: {plugin_name,
        version, plugin_id, artifact_hash, status, queued, running, failed, workers, idle, trial}.

        `queued` are the jobs that wait for the plugin, told with the version that will run them
        (the active one, else the first staged one). `running` are leased or publishing with this
        version. `failed` are its dead letters that nobody replayed. `workers` could run it, `idle`
        ones hold nothing. `trial` says how its trial stands, "" if it has none.
        """

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

    def add_rule(
        self, pattern: str, tag: str, *, priority: int = 50, namespace: str = ""
    ) -> int: ...

    def remove_rule(self, rule_id: int) -> None: ...

    def list_workers(self) -> list[Row]: ...

    # -- reading
    def snapshot(self) -> str:
        """Path of a consistent copy of the ledger, made for this caller, who deletes it."""

    def snapshot_part(self, name: str, offset: int) -> bytes:
        """The next bytes, SNAPSHOT_PART_BYTES at most, of a file that `snapshot` made; empty at
        its end.

        Args:
            name: the last part of the path that `snapshot` gave.
        """

    def remove_snapshot(self, name: str) -> None:
        """Delete a snapshot that was read by `snapshot_part`. Idempotent."""

    def check(self) -> list[str]:
        """Broken rules between tables, one line each; empty when sound."""

    def export(self, directory: str) -> Row:
        """Write the whole history to `directory`; {tables: {name: rows}}."""


class ApiStore(Protocol):
    """Jobs, events and approvals of the API; what a method returns is durable.

    Every method raises UsageError for an id, word, count or text that does not fit, and
    LedgerError while the ledger cannot be used. The `update_…` methods return False, and change
    nothing, where the job is finished already.
    """

    def init_schema(self) -> None:
        """See that the tables are there. Idempotent."""

    # -- jobs
    def create_job(
        self,
        job_type: HttpJobType,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        approval_id: str | None = None,
        *,
        spec_json: str | None = None,
    ) -> JobId:
        """A queued job; returns its id, which no other job ever has.

        Args:
            approval_id: of an approved request that has not started a job; the two are linked.

        Raises:
            NotFoundError: there is no such approval.
            ConflictError: it is not approved, or has started a job.
        """

    def start_job(
        self,
        job_type: HttpJobType,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        *,
        spec: JobSpec | None = None,
    ) -> JobId:
        """A queued job that the Sentinel carries out, while one runs; `create_job` leaves that to
        its caller.

        Args:
            plugin_version: None for the active one; no other can be run.
            input_dir: absolute; in a source root, or around some.
            output_sink: of a run: where all topics go, None for the plugin's own sinks.

        Raises:
            NotFoundError: no such active plugin version, or no such file.
            UsageError: a folder that is in no source root, or has no file for the plugin; a sink
                that is none.
        """

    def get_job(self, job_id: int) -> HttpJob | None:
        """The job, None if there is none."""

    def list_jobs(
        self, status: HttpJobStatus | None = None, limit: int = 1_000, offset: int = 0
    ) -> list[HttpJob]:
        """Jobs, newest first."""

    def update_job_status(
        self, job_id: int, status: HttpJobStatus, error_message: str | None = None
    ) -> bool:
        """Move a job on; `started_at` and `finished_at` follow. No event is added.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: a move that there is none (running to queued).
        """

    def update_job_progress(
        self,
        job_id: int,
        phase: str,
        items_done: int,
        items_total: int | None = None,
        message: str | None = None,
    ) -> bool:
        """Set all of a job's progress; raises NotFoundError."""

    def update_job_result(
        self,
        job_id: int,
        rows_processed: int,
        bytes_written: int | None = None,
        outputs: Sequence[OutputInfo] = (),
        metrics: dict[str, int] | None = None,
    ) -> bool:
        """Set all of a job's result, before it is finished; raises NotFoundError."""

    def finish_job(
        self,
        job_id: int,
        status: HttpJobStatus,
        error_message: str | None = None,
        result: JobResult | None = None,
    ) -> bool:
        """End a job: result, status and job_finished event in one transaction.

        Raises:
            NotFoundError: there is no such job.
        """

    def cancel_job(self, job_id: int) -> bool:
        """Cancel a job with its job_finished event. False if it is missing or finished."""

    # -- events
    def next_event_id(self, job_id: int) -> int:
        """The id that the job's next event gets; raises NotFoundError."""

    def insert_event(self, job_id: int, event: AnyEvent) -> int:
        """Append an event; returns its id: 1, 2, 3 … within the job.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: it is finished. The one event it then still takes is a job_finished
                that tells its status, if there is none yet.
        """

    def insert_events(self, job_id: int, events: Sequence[AnyEvent]) -> list[int]:
        """Append events, all or none; as `insert_event`."""

    def list_events(
        self, job_id: int, after: int | None = None, limit: int | None = None
    ) -> list[Event]:
        """The events after `after`, in order; at most `limit`. Empty for an unknown job."""

    def wait_events(
        self, job_id: int, after: int, timeout_seconds: float, limit: int = 1_000
    ) -> list[Event]:
        """As `list_events`; if there is none yet, waits until the job has news.

        Empty after `timeout_seconds`, or sooner if its status changed without an event.
        """

    # -- approvals
    def create_approval(
        self,
        approval_id: str,
        operation: AnyOperation,
        summary: str,
        expires_in: timedelta,
        *,
        requester: str | None = None,
        binding: ApprovalBinding | None = None,
    ) -> None:
        """A pending request; with `expires_in` of zero or less it is expired at once.

        Raises:
            ConflictError: the id is taken.
        """

    def request_run(
        self,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        *,
        spec: JobSpec | None = None,
        expires_in: timedelta = timedelta(hours=1),
        requester: str | None = None,
    ) -> Approval:
        """Ask a person for a run. Once it is approved the Sentinel makes its one job and carries it
        out, unless plugin, files, sink or parameters have changed: then the request is stale.

        Args:
            requester: over the control socket by default the caller's user name.

        Raises:
            NotFoundError, UsageError: as `start_job`.
        """

    def get_approval(self, approval_id: str) -> Approval | None:
        """The request as it stands at this moment, None if there is none."""

    def list_approvals(
        self, status: ApprovalStatus | None = None, limit: int = 1_000, offset: int = 0
    ) -> list[Approval]:
        """Requests, newest first."""

    def approve(
        self,
        approval_id: str,
        decided_by: str | None = None,
        *,
        binding: ApprovalBinding | None = None,
    ) -> bool:
        """Approve a pending request. False if it is missing, decided, expired or stale.

        One made by `request_run` gets its job with that.

        Args:
            decided_by: over the control socket it is replaced by the caller's user name.
            binding: what would be done now; if that is not what was asked for, the request
                becomes stale. Not wanted for `request_run`'s, which are compared anyway.

        Raises:
            NotPermittedError: who asked may not decide.
        """

    def reject(
        self, approval_id: str, decided_by: str | None = None, reason: str | None = None
    ) -> bool:
        """Reject a pending request. False if it is missing, decided or expired."""

    def expire_approvals(self) -> int:
        """Write down which pending requests are over; returns how many."""

    def link_approval_to_job(self, approval_id: str, job_id: int) -> bool:
        """Record which job an approved request has started; True, also if it is recorded.

        Raises:
            NotFoundError: there is no such request or job.
            ConflictError: it is not approved, or either is linked with another.
        """

    def start_approved(
        self,
        approval_id: str,
        *,
        binding: ApprovalBinding | None = None,
        spec_json: str | None = None,
    ) -> JobId | None:
        """Create the one job of an approved request, or find it, in one transaction.

        Returns:
            The job's id, always the same; None if the request is not approved or is stale.

        Raises:
            NotFoundError: there is no such request.
            UsageError: it is bound and `binding` is missing, or it asks for no job.
        """

    def mark_stale(self, approval_id: str, changes: Sequence[str]) -> bool:
        """Void a pending or approved request; its job, if it has not begun, fails.

        Args:
            changes: what has changed, a line each.

        Returns:
            False, and nothing changed, if it is past that.

        Raises:
            NotFoundError: there is no such request.
        """

    # -- retention
    def cleanup_old_data(self, job_ttl_hours: float, event_ttl_hours: float) -> Cleaned:
        """Delete finished jobs, and events of finished jobs, by their age: (jobs, events)."""


class ApiClient(ApiStore, Protocol):
    """ApiStore that can be closed; also a context manager."""

    @staticmethod
    def generate_approval_id() -> str:
        """A new id, UUID version 4."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
