"""Every call of ControlApi, carried out on a ledger and a core.

Reads look at the ledger through a cursor of their own, after a fold. Writes run in the ledger's
thread; those that make jobs or change the wiring tell the broker in the order in which they
became durable. What concerns a running job goes through the broker, which alone knows whether a
cancel still comes in time.

The same class serves the Sentinel's control socket and a command that opens the ledger itself.
"""

import base64
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from casparian_flow import __version__
from casparian_flow.db import (
    api_runs,
    inventory,
    plugin_roots,
    queries,
    rejections,
    releases,
    requeue,
    sources,
    wiring,
)
from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.engine_errors import reading
from casparian_flow.db.journal import Folded
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import load_counts
from casparian_flow.db.snapshot import remove as remove_snapshot
from casparian_flow.db.workload import workload, workload_of_roots
from casparian_flow.domain.clock import Clock, Now, utc
from casparian_flow.domain.errors import (
    ConflictError,
    LedgerError,
    NotFoundError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import TERMINAL, JobStatus
from casparian_flow.domain.outputs import output_roots
from casparian_flow.domain.records import Job, PluginSpec
from casparian_flow.domain.scoped_names import check_namespace, scoped
from casparian_flow.sentinel import api_calls
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.api import (
    AWAIT_MAX_S,
    SNAPSHOT_PART_BYTES,
    ChunkResult,
    FileFinding,
    Row,
    ScanReport,
)
from casparian_flow.sentinel.broker import REFUSED, Broker, Worker
from casparian_flow.sentinel.caller import Caller
from casparian_flow.sentinel.causes import Facts, explain
from casparian_flow.sentinel.control_codec import API_PREFIX, Operation
from casparian_flow.sentinel.core import SentinelCore
from casparian_flow.sentinel.loop import CoreLoop, fail, settle
from casparian_flow.sentinel.paths import IN_MEMORY, private_folder, snapshot_folder, state_folder
from casparian_flow.sentinel.trial_desk import TrialDesk
from casparian_flow.services import architect
from casparian_flow.trust.bundle import pack, unpack
from casparian_flow.trust.errors import UntrustedError
from casparian_flow.trust.rules import TrustSource, nobody

log = logging.getLogger(__name__)

T = TypeVar("T")
LOADING_WAIT_S = 10.0
LOADING_POLL_S = 0.05
"""A job of a long queue may not have been read into the broker yet."""
WAL_SUFFIX = ".wal"
SNAPSHOT_NAME = re.compile(r"[0-9a-z]{1,64}-[0-9]{1,20}-[0-9]{1,20}\.duckdb(\.wal)?")
"""As `Ledger.snapshot` names its files."""
SNAPSHOT_AGE_S = 3600.0
"""Snapshots older than this were left behind by a caller that died."""
QUIET = frozenset(
    {
        "ping", "status", "list_jobs", "show_job", "await_job", "job_log", "list_dead_letters",
        "list_sources", "list_files", "versions", "inventory", "next_rescans", "list_plugins",
        "list_topics", "list_trials", "plugin_bundle", "list_rules", "list_workers", "snapshot",
        "check", "begin_scan",
        "commit_chunk", "finish_scan", "plugin_counts", "snapshot_part", "remove_snapshot",
    }
) | api_calls.QUIET  # fmt: skip
"""Operations that change nothing people decided, or come in great numbers; not logged."""
DEFERRED = {"await_job": "_end_of_job"}
"""Operations that wait for something to happen, and how they do it without holding a thread."""
PROMPT = frozenset({"ping", *DEFERRED}) | api_calls.PROMPT
"""Operations that hold up the thread that asks for nothing but a moment."""
_actor: ContextVar[str] = ContextVar("actor", default="")


class ControlPlane:
    """Implements ControlApi.

    Args:
        loop: driven by another thread.
        database: where the ledger is; snapshots go beside it.
        bind_address: where workers connect, "" if no Sentinel serves any.
        stop: ends the Sentinel; None if there is none.
        allow_self_approval: whether who asked for something may also approve it.
        trust: the rules by which deploys are judged.
        trials: whether a worker has to try a version before it becomes active.
        desk: where trials are carried out; None if no Sentinel serves any worker.

    Attributes:
        api: the API's jobs, events and approvals in this ledger.
    """

    def __init__(
        self,
        loop: CoreLoop[Ledger],
        *,
        database: str | Path,
        clock: Clock,
        bind_address: str = "",
        stop: Callable[[], None] | None = None,
        allow_self_approval: bool = True,
        trust: TrustSource = nobody,
        trials: bool = True,
        desk: TrialDesk | None = None,
    ) -> None:
        self._loop = loop
        self._database = str(database)
        self._clock = clock
        self._bind_address = bind_address
        self._stop = stop
        self._trust = trust
        self._trials = trials
        self._desk = desk
        self._started_us = clock.now().wall_us
        self.api = ApiStorage(door=loop, clock=clock, allow_self_approval=allow_self_approval)

    def carry_out(self, operation: Operation, arguments: dict[str, Any], caller: Caller) -> object:
        """One operation by name, for the control socket; writes are logged with their caller.

        Returns:
            The result, or a future of it for an operation that waits.
        """
        token = _actor.set(str(caller))
        try:
            if operation.name not in QUIET:
                log.info("%s by %s", operation.name, caller)
            if operation.name.startswith(API_PREFIX):
                method = operation.name.removeprefix(API_PREFIX)
                return api_calls.carry_out(self.api, method, arguments, caller)
            return getattr(self, DEFERRED.get(operation.name, operation.name))(**arguments)
        finally:
            _actor.reset(token)

    # -- ways to the ledger and the broker ----------------------------------------------------

    def _now_us(self) -> int:
        return self._clock.now().wall_us

    def _write(self, fn: Callable[[Ledger], T]) -> T:
        """Run in the ledger's thread, where neither jobs nor wiring change."""
        return self._loop.call(fn).result()

    def on_ledger(self, fn: Callable[[Ledger], T]) -> T:
        """Run something in the ledger's thread that neither makes jobs nor changes the wiring."""
        return self._write(fn)

    def _enlist(self, fn: Callable[[Ledger], tuple[T, Sequence[Job]]]) -> T:
        return self._loop.enlist(fn).result()

    def _rewire(self, fn: Callable[[Ledger], T]) -> T:
        def run(ledger: Ledger) -> tuple[T, Sequence[PluginSpec]]:
            result = fn(ledger)
            return result, ledger.plugin_specs()

        return self._loop.rewire(run).result()

    @contextmanager
    def _reader(self) -> Iterator[queries.Connection]:
        """A cursor that sees everything committed so far, for use in this thread."""
        with self._reading(self._write(_fresh_reader)) as connection:
            yield connection

    @contextmanager
    def _reading(self, connection: queries.Connection) -> Iterator[queries.Connection]:
        try:
            with reading(Path(self._database)):
                yield connection
        finally:
            connection.close()

    def _look(self, fn: Callable[[SentinelCore[Ledger]], T]) -> T:
        return self._loop.look(fn).result()

    def _command(self, make: Callable[[Future[dict[str, Any]]], e.Event]) -> dict[str, Any]:
        """Ask the broker. `make` runs in the loop's thread: it must not look at `_actor`."""
        return self._loop.command(make).result()

    # -- liveness and overview ----------------------------------------------------------------

    def ping(self) -> Row:
        # Plain attributes, read from this thread on purpose: a ping waits for nobody.
        broker = self._loop.core.broker
        ledger_id = broker.ledger_id or self._write(lambda ledger: ledger.ledger_id)
        return {
            "pid": os.getpid(),
            "ledger_id": ledger_id,
            "epoch": broker.epoch,
            "version": __version__,
            "started_at": iso(self._started_us),
            "db_location": self._database,
            "bind_address": self._bind_address,
        }

    def status(self) -> Row:
        running = self._stop is not None
        view = self._look(lambda core: _View(core, self._desk, self._clock.now()))
        try:
            with self._reader() as connection:
                counts = {status.value: n for status, n in load_counts(connection).items()}
                standing = queries.standing(connection, self._now_us())
                api = api_runs.standing(connection, self._now_us())
            plugins, sources = self.list_plugins(), self.list_sources()
        except LedgerError as error:
            # The one moment when status matters most: tell what is known without the ledger.
            return self._status_without_ledger(view, error)
        facts = Facts(
            running,
            view.problem,
            counts,
            standing,
            view.workers,
            view.stuck,
            view.orphans,
            view.trials,
        )
        return {
            "sentinel": self._sentinel_row() if running else None,
            "ledger": {"path": self._database, "state": _told(view.problem)},
            "jobs": counts,
            **api,
            "workers": view.workers,
            "trials": view.trials,
            "plugins": plugins,
            "sources": sources,
            "causes": explain(facts),
        }

    def _status_without_ledger(self, view: "_View", error: LedgerError) -> Row:
        problem = view.problem or (str(error), error.hint)
        return {
            "sentinel": self._sentinel_row() if self._stop is not None else None,
            "ledger": {"path": self._database, "state": _told(problem)},
            "jobs": {},
            "api_jobs": {},
            "requests": 0,
            "workers": view.workers,
            "trials": view.trials,
            "plugins": [],
            "sources": [],
            "causes": [
                {"cause": f"the ledger cannot be used: {problem[0]}", "cure": problem[1]},
            ],
        }

    def _sentinel_row(self) -> Row:
        row = self.ping()
        return {
            "pid": row["pid"],
            "workers_connect_to": self._bind_address,
            "started_at": row["started_at"],
            "epoch": row["epoch"],
        }

    def stop(self) -> None:
        if self._stop is None:
            raise SentinelUnreachableError(
                "no Sentinel runs for this ledger", hint="There is nothing to stop."
            )
        self._stop()

    def list_workers(self) -> list[Row]:
        return self._look(lambda core: worker_rows(core.broker, self._clock.now()))

    # -- jobs -----------------------------------------------------------------------------------

    def list_jobs(
        self,
        *,
        status: str | None = None,
        plugin: str | None = None,
        path: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Row]:
        with self._reader() as connection:
            return queries.list_jobs(
                connection, status=status, plugin=plugin, path=path, limit=limit, offset=offset
            )

    def show_job(self, job_id: int) -> Row:
        checked_id(job_id)
        pinned, unfolded = self._write(lambda ledger: _pinned_reader(ledger, job_id))
        with self._reading(pinned) as connection:
            row = queries.show_job(connection, job_id, unfolded)
        stuck = self._look(lambda core: stuck_rows(core.broker))
        row["stuck"] = next((s["message"] for s in stuck if s["job_id"] == job_id), "")
        return row

    def job_log(self, job_id: int) -> list[Row]:
        with self._reader() as connection:
            return queries.job_log(connection, checked_id(job_id))

    def submit(self, *, version_id: int, plugin: str, priority: int | None, force: bool) -> int:
        checked_id(version_id)
        if priority is not None and not -(2**31) <= priority < 2**31:
            raise UsageError(f"priority {priority} is out of range")
        return self._enlist(
            lambda ledger: requeue.submit(
                ledger,
                version_id=version_id,
                plugin=plugin,
                priority=priority,
                force=force,
                now_us=self._now_us(),
            )
        )

    def await_job(self, job_id: int, *, timeout_s: float) -> Row:
        return self._end_of_job(job_id, timeout_s=timeout_s).result()

    def _end_of_job(self, job_id: int, *, timeout_s: float) -> Future[Row]:
        """`await_job` without a thread that waits."""
        checked_id(job_id)
        answer: Future[Row] = Future()

        def look_up(found: Future[JobStatus | None]) -> None:
            if (error := found.exception()) is not None:
                fail(answer, error)
            elif (status := found.result()) is None:
                fail(answer, queries.no_job(job_id))
            else:
                # Neither ended nor known to the broker: of a long queue, and not read yet.
                outcome = "ended" if status in TERMINAL else "waiting"
                settle(answer, {"outcome": outcome, "status": status.value})

        def told(reply: Future[dict[str, Any]]) -> None:
            if (error := reply.exception()) is not None:
                fail(answer, error)
            elif reply.result()["outcome"] != "unknown":
                settle(answer, reply.result())
            else:
                self._loop.call(lambda ledger: ledger.status_of(job_id)).add_done_callback(look_up)

        seconds = min(max(timeout_s, 0.0), AWAIT_MAX_S)
        asked = self._loop.command(lambda r: e.AwaitJob(r, JobId(job_id), seconds))
        asked.add_done_callback(told)
        return answer

    def cancel_job(self, job_id: int) -> Row:
        checked_id(job_id)
        waited, by = 0.0, _actor.get()
        while True:
            reply = self._command(lambda r: e.Cancel(r, JobId(job_id), by))
            if reply["outcome"] != "unknown":
                return reply
            status = self._status_of(job_id)
            if status in TERMINAL:
                return {"outcome": "already", "status": status.value}
            if waited >= LOADING_WAIT_S:
                raise ConflictError(
                    f"job {job_id} is {status.value} and not loaded yet",
                    hint="Repeat the command in a moment.",
                )
            threading.Event().wait(LOADING_POLL_S)
            waited += LOADING_POLL_S

    def retry_job(self, job_id: int) -> int:
        checked_id(job_id)
        return self._enlist(lambda ledger: requeue.retry(ledger, job_id, self._now_us()))

    def resolve_job(self, job_id: int, *, forward: bool) -> Row:
        checked_id(job_id)
        by = _actor.get()
        reply = self._command(lambda r: e.Resolve(r, JobId(job_id), forward, by))
        if reply["outcome"] != "not_staged":
            return reply
        raise ConflictError(
            f"job {job_id} is {self._status_of(job_id).value}, not STAGED",
            hint="Only a granted job that cannot complete needs to be resolved.",
        )

    def _status_of(self, job_id: int) -> JobStatus:
        status = self._write(lambda ledger: ledger.status_of(job_id))
        if status is None:
            raise queries.no_job(job_id)
        return status

    def list_dead_letters(self, *, plugin: str | None = None, limit: int = 50) -> list[Row]:
        with self._reader() as connection:
            return queries.list_dead_letters(connection, plugin=plugin, limit=limit)

    def replay(self, *, plugin: str | None = None, job_ids: Sequence[int] = ()) -> list[int]:
        ids = [checked_id(job_id) for job_id in job_ids]
        return self._enlist(
            lambda ledger: requeue.replay(ledger, plugin=plugin, job_ids=ids, now_us=self._now_us())
        )

    # -- files ----------------------------------------------------------------------------------

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
        return self._write(
            lambda ledger: sources.add_source(
                ledger,
                path,
                settle_seconds=settle_seconds,
                include=include,
                ignore=ignore,
                name=name,
                namespace=namespace,
                now_us=self._now_us(),
            )
        )

    def list_sources(self) -> list[Row]:
        with self._reader() as connection:
            return sources.list_sources(connection)

    def remove_source(self, path: str) -> None:
        self._write(lambda ledger: sources.remove_source(ledger, path))

    def retire_source(self, name: str) -> bool:
        return self._write(lambda ledger: sources.retire_source(ledger, name))

    def list_files(
        self, *, root_id: int | None = None, pattern: str | None = None, limit: int = 50
    ) -> list[Row]:
        with self._reader() as connection:
            return sources.list_files(connection, root_id=root_id, pattern=pattern, limit=limit)

    def versions(self, path: str) -> list[Row]:
        with self._reader() as connection:
            return sources.versions(connection, path)

    # -- scanning -------------------------------------------------------------------------------

    def begin_scan(self, root_id: int) -> Row:
        checked_id(root_id)
        return self._write(
            lambda ledger: inventory.begin_scan(ledger, root_id, now_us=self._now_us())
        )

    def inventory(self, root_id: int) -> bytes:
        with self._reader() as connection:
            return inventory.inventory(connection, checked_id(root_id))

    def commit_chunk(
        self, root_id: int, scan_id: int, findings: Sequence[FileFinding]
    ) -> ChunkResult:
        return self._enlist(
            lambda ledger: inventory.record_chunk(
                ledger, checked_id(root_id), scan_id, findings, now_us=self._now_us()
            )
        )

    def finish_scan(
        self, root_id: int, scan_id: int, deleted: Sequence[str], report: ScanReport
    ) -> None:
        self._enlist(
            lambda ledger: inventory.finish_scan(
                ledger, checked_id(root_id), scan_id, deleted, report, now_us=self._now_us()
            )
        )

    def next_rescans(self, root_id: int | None = None) -> list[Row]:
        taken = self._look(lambda _: self._loop.take_rescans(root_id))
        return [{"root_id": root_id, "rel_path": rel_path} for root_id, rel_path in taken]

    # -- wiring ---------------------------------------------------------------------------------

    def deploy(self, bundle: bytes, namespace: str = "") -> Row:
        check_namespace(namespace)
        # Reading somebody's source takes its time; the ledger's thread is not the place for it.
        given, now_us = unpack(bundle), self._now_us()
        try:
            rules = self._trust()
            verdict = rules.policy.check(given, deployed_at_us=now_us)
            release = architect.prepare(given, verdict, namespace)
            rules.require_source(given.source, f"{given.name}.py")
        except (UsageError, UntrustedError) as refusal:
            error = str(refusal)
            self._write(
                lambda ledger: rejections.record(
                    ledger,
                    plugin=scoped(namespace, given.name),
                    version=given.version,
                    source_code=given.source,
                    error=error,
                    now_us=now_us,
                )
            )
            raise
        row = self._rewire(
            lambda ledger: releases.record_release(
                ledger, release, now_us=now_us, trial=self._trials
            )
        )
        self._staged_changed()
        return row

    def _staged_changed(self) -> None:
        if self._desk is not None:
            self._desk.wiring_changed()

    def plugin_bundle(self, plugin: str, version: str = "") -> Row:
        with self._reader() as connection:
            bundle, deployed_at_us = releases.bundle_of(connection, plugin, version)
        return {
            "bundle": base64.b64encode(pack(bundle)).decode("ascii"),
            "deployed_at_us": deployed_at_us,
        }

    def reload(self) -> None:
        self._rewire(lambda _: None)

    def list_plugins(self) -> list[Row]:
        with self._reader() as connection:
            return wiring.list_plugins(connection)

    def list_trials(self) -> list[Row]:
        desk = self._desk
        return [] if desk is None else self._look(lambda _: desk.rows(self._clock.now()))

    def rollback_plugin(self, plugin: str, version: str) -> Row:
        now_us = self._now_us()
        row = self._rewire(lambda ledger: releases.rollback(ledger, plugin, version, now_us=now_us))
        self._staged_changed()
        return row

    def retire_plugin(self, plugin: str) -> Row:
        row = self._rewire(lambda ledger: releases.retire(ledger, plugin))
        self._staged_changed()
        return row

    def plugin_counts(self) -> list[Row]:
        with self._reader() as connection:
            counted = workload(connection)
        return self._look(lambda core: self._with_workers(core.broker, counted))

    def _with_workers(self, broker: Broker, counted: list[Row]) -> list[Row]:
        now = self._clock.now()
        trials = {} if self._desk is None else {t["plugin_id"]: t for t in self._desk.rows(now)}
        for row in counted:
            plugin, artifact_hash = row["plugin_name"], row["artifact_hash"]
            able = [w for w in broker.workers.values() if w.runs(plugin, artifact_hash)]
            row["running"] = row.pop("under_way")
            row["workers"] = len(able)
            row["idle"] = sum(not worker.held for worker in able)
            row["trial"] = trials[row["plugin_id"]]["state"] if row["plugin_id"] in trials else ""
        return counted

    def pause_plugin(self, plugin: str, *, reason: str) -> None:
        self._require_plugin(plugin)
        told = reason or f"paused by {_actor.get() or 'an operator'}"
        self._command(lambda r: e.PausePlugin(r, plugin, told))

    def resume_plugin(self, plugin: str) -> None:
        self._require_plugin(plugin)
        self._command(lambda r: e.ResumePlugin(r, plugin))
        # One that is not trusted is paused again at once, with the reason that holds now.
        self._rewire(lambda _: None)
        health = self._look(lambda core: core.broker.queue.lane(plugin).health)
        if health.paused and health.reason.startswith(REFUSED):
            raise ConflictError(f"{plugin} stays paused: {health.reason}")

    def _require_plugin(self, plugin: str) -> None:
        if not any(row["plugin_name"] == plugin for row in self.list_plugins()):
            raise NotFoundError(f"no plugin {plugin!r}", hint="'casparian plugins' lists them.")

    def backfill(self, plugin: str, *, execute: bool, force: bool = False) -> Row:
        return self._enlist(
            lambda ledger: wiring.backfill(
                ledger, plugin, execute=execute, force=force, now_us=self._now_us()
            )
        )

    def list_topics(self) -> list[Row]:
        with self._reader() as connection:
            return wiring.list_topics(connection)

    def set_topic(
        self, plugin: str, topic: str, *, uri: str, mode: str = "append", schema_json: str = ""
    ) -> None:
        self._rewire(
            lambda ledger: wiring.set_topic(
                ledger, plugin, topic, uri=uri, mode=mode, schema_json=schema_json
            )
        )

    def source_counts(self) -> list[Row]:
        """{root_id, versions, queued, last_scan_seconds} of every source root. For this process
        alone."""
        with self._reader() as connection:
            return workload_of_roots(connection)

    def plugin_roots(self) -> Mapping[str, frozenset[str]]:
        """Names of the source roots whose files a plugin gets, where those are not all of its
        namespace; by scoped plugin. For this process alone."""
        with self._reader() as connection:
            return plugin_roots.chosen_roots(connection)

    def choose_roots(self, plugin: str, roots: Sequence[str]) -> None:
        """Give a plugin the files of these roots, of all if there are none. Likewise."""
        self._write(lambda ledger: plugin_roots.choose_roots(ledger, plugin, roots))

    def list_rules(self) -> list[Row]:
        with self._reader() as connection:
            return wiring.list_rules(connection)

    def add_rule(self, pattern: str, tag: str, *, priority: int = 50, namespace: str = "") -> int:
        return self._write(
            lambda ledger: wiring.add_rule(
                ledger, pattern, tag, priority=priority, namespace=namespace
            )
        )

    def remove_rule(self, rule_id: int) -> None:
        self._write(lambda ledger: wiring.remove_rule(ledger, checked_id(rule_id)))

    # -- reading --------------------------------------------------------------------------------

    def snapshot(self) -> str:
        folder = self._snapshot_folder()
        self.remove_old_snapshots()
        return str(self._write(lambda ledger: ledger.snapshot(folder)))

    def snapshot_part(self, name: str, offset: int) -> bytes:
        if offset < 0:
            raise UsageError(f"{offset} is no offset")
        path = self._snapshot_file(name)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(SNAPSHOT_PART_BYTES)
        except FileNotFoundError:
            if name.endswith(WAL_SUFFIX):
                return b""  # a snapshot need not have one
            raise NotFoundError(
                f"there is no snapshot {name}", hint="Make one first; old ones are deleted."
            ) from None

    def remove_snapshot(self, name: str) -> None:
        remove_snapshot(self._snapshot_file(name))

    def _snapshot_file(self, name: str) -> Path:
        if not SNAPSHOT_NAME.fullmatch(name) or self._database == IN_MEMORY:
            raise NotFoundError(f"{name[:80]!r} is no snapshot of this ledger")
        return snapshot_folder(self._database) / name

    def _snapshot_folder(self) -> Path:
        if self._database == IN_MEMORY:
            return Path(tempfile.mkdtemp(prefix="casparian-snapshot-"))
        private_folder(state_folder(self._database))
        return private_folder(snapshot_folder(self._database))

    def remove_old_snapshots(self) -> None:
        """Delete what callers that died have left."""
        if self._database == IN_MEMORY:
            return
        oldest = self._now_us() / 1e6 - SNAPSHOT_AGE_S
        for path in snapshot_folder(self._database).glob("*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def check(self) -> list[str]:
        return self._write(lambda ledger: ledger.check())

    def export(self, directory: str) -> Row:
        target = Path(directory)
        if not target.is_absolute():
            raise UsageError(
                f"{directory!r} is not absolute",
                hint="The Sentinel may run in another folder: give the whole path.",
            )
        return {"tables": self._write(lambda ledger: ledger.export_to(target))}


class _View:
    """What `status` needs of the core, read between two turns."""

    def __init__(self, core: SentinelCore[Ledger], desk: TrialDesk | None, now: Now) -> None:
        self.workers = worker_rows(core.broker, now)
        self.stuck = stuck_rows(core.broker)
        self.orphans = orphan_rows(core.broker)
        self.trials = [] if desk is None else desk.rows(now)
        self.problem: tuple[str, str] | None = None
        if core.problem is not None:
            self.problem = (str(core.problem), core.problem.hint)


def worker_rows(broker: Broker, now: Now) -> list[Row]:
    """Connected workers, by name."""
    return [
        worker_row(worker, now)
        for worker in sorted(broker.workers.values(), key=lambda w: (w.worker_id, w.identity))
    ]


def worker_row(worker: Worker, now: Now) -> Row:
    return {
        "worker_id": worker.worker_id,
        # Not all of it: who knows a routing id could try to pass for its owner.
        "identity": worker.identity.hex()[:12],
        "leaving": worker.leaving,
        "bound_to": worker.bound.artifact_hash if worker.bound else "",
        "hostname": worker.hostname,
        "pid": worker.pid,
        "version": worker.version,
        "status": worker.status,
        "slots": worker.slots,
        "credit": worker.credit,
        "held": sorted(worker.held),
        "done": worker.done,
        "capabilities": sorted(worker.capabilities),
        "root_id": worker.root_id,
        "sandbox": dict(worker.sandbox),
        "connected_at": iso(worker.since_us),
        "last_heartbeat": iso(now.wall_us - int((now.mono - worker.last_seen) * 1e6)),
    }


def stuck_rows(broker: Broker) -> list[Row]:
    """Granted jobs whose sink refused for good: {job_id, message}."""
    return [
        {"job_id": int(job_id), "message": lease.stuck}
        for job_id, lease in sorted(broker.leases.items())
        if lease.stuck
    ]


def orphan_rows(broker: Broker) -> list[Row]:
    """Granted jobs that nobody publishes: {job_id, root_ids}."""
    return [
        {"job_id": int(job_id), "root_ids": sorted(output_roots(job.manifest))}
        for job_id, lease in sorted(broker.leases.items())
        if lease.owner is None
        and not lease.stuck
        and (job := broker.jobs[job_id]).status is JobStatus.STAGED
    ]


def _told(problem: tuple[str, str] | None) -> str:
    return "ok" if problem is None else f"{problem[0]} {problem[1]}".rstrip()


def _fresh_reader(ledger: Ledger) -> queries.Connection:
    ledger.fold()
    return ledger.reader()


def _pinned_reader(ledger: Ledger, job_id: int) -> tuple[queries.Connection, Folded | None]:
    """A cursor that goes on seeing this very moment, and what is not in the tables yet.

    Cheaper than a fold, where one job is asked for.
    """
    connection = ledger.reader()
    # A transaction begins to see with its first look.
    connection.execute("BEGIN").execute("SELECT 1 FROM cf_meta LIMIT 1").fetchall()
    return connection, ledger.unfolded(job_id)


def iso(at_us: int) -> str:
    """ISO 8601 in UTC of a wall clock reading, such as 2026-01-02T03:04:05.678901Z."""
    return f"{utc(at_us).isoformat()}Z"


def checked_id(number: int) -> int:
    """Raises UsageError for a number that no id column holds."""
    if not 0 <= number < 2**63:
        raise UsageError(f"{number} is no id")
    return number
