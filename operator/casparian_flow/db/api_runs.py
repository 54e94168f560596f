"""API jobs that the Sentinel carries out: what they would do, and how they end.

    folder, plugin ─ plan ─> file versions, sinks ─ begin (api_begin.py) ─> jobs of the queue,
    its tasks ─ collect ─> events, then the result

A task is told once: its events and the mark that they are written are one transaction. What was
approved is compared with the plan when it is approved, when its job is made, and when it begins.
All functions run in the ledger's thread.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, NamedTuple

import msgspec

from casparian_flow.db import api_approvals, api_jobs
from casparian_flow.db.api_checks import checked
from casparian_flow.db.api_state import Connection, Unit, checked_event
from casparian_flow.db.api_tables import APPROVALS, JOBS, PLANS, TASKS
from casparian_flow.db.fanout import (
    QUEUE_TABLE,
    load_rule_set,
    manual_tags,
    merged_tags,
)
from casparian_flow.db.group_commit import transaction_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock, utc
from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import CasparianError, ConflictError, NotFoundError, UsageError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import TERMINAL, JobStatus
from casparian_flow.domain.outputs import (
    ANY_TOPIC,
    TOPIC_PATTERN,
    QuarantinePolicy,
    SinkMode,
    SinkSpec,
    parse_sink_uri,
    sinks_for,
)
from casparian_flow.domain.paths import path_to_text
from casparian_flow.domain.records import PluginSpec
from casparian_flow.domain.scoped_names import namespace_of
from casparian_flow.domain.wording import counted
from casparian_flow.protocol.http_types import (
    COUNT_MAX,
    Approval,
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    EventPayload,
    EventType,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobProgress,
    JobResult,
    JobSpec,
    OutputInfo,
    RowsReport,
    TopicReport,
    ViolationSummary,
    decode_report,
    encode_payload,
    new_approval_id,
)
from casparian_flow.services.routing import parse_tags

FILES_MAX: Final = 100_000
"""File versions of one API job."""
PREVIEW_FILES: Final = 3
"""Files of a preview that does not say how many."""
TOLD_MAX: Final = 500
"""Tasks told in one transaction."""
MESSAGE_CHARS_MAX: Final = 1_000
SINK_CHARS_MAX: Final = 4_000
_CARRIED: Final = '{"carried_out_by":"sentinel"'
"""How the JSON of a JobSpec begins."""
_ENDED: Final = ", ".join(f"'{status}'" for status in sorted(TERMINAL))


class RunFile(NamedTuple):
    """A current file version below the folder; `path` is absolute, as text."""

    version_id: int
    path: str
    content_hash: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job would do if it began now.

    Attributes:
        spec: the plugin's active version.
        sinks: where its topics go.
        given_sink: whether the job names its sink, or contracts, itself.
    """

    spec: PluginSpec
    sinks: tuple[SinkSpec, ...]
    given_sink: bool
    files: tuple[RunFile, ...]

    @property
    def binding(self) -> ApprovalBinding:
        digest = hashlib.sha256()
        for file in sorted(self.files):
            digest.update(f"{file.version_id}\0{file.content_hash}\0{file.path}\n".encode())
        return ApprovalBinding(
            artifact_hash=self.spec.artifact_hash,
            files_digest=digest.hexdigest(),
            file_count=len(self.files),
            sink=_sinks_text(self.sinks),
            parameters_hash=self.spec.parameters_hash,
        )


def _sinks_text(sinks: Sequence[SinkSpec]) -> str:
    rest = "each topic" if all(s.topic == ANY_TOPIC for s in sinks) else "other topics"
    text = "; ".join(
        f"{rest if s.topic == ANY_TOPIC else s.topic} -> {s.uri} ({s.mode}{_rules_mark(s)})"
        for s in sorted(sinks, key=lambda s: (s.topic == ANY_TOPIC, s.topic, s.uri))
    )
    text = text or "each topic -> parquet://TOPIC (append)"
    if len(text) <= SINK_CHARS_MAX:
        return text
    return f"{counted(len(sinks), 'sink')}, sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _rules_mark(sink: SinkSpec) -> str:
    """Tells rules for the rows apart: contract and quarantine, "" if there are none."""
    if not sink.schema_json and sink.quarantine == QuarantinePolicy():
        return ""
    rules = f"{sink.schema_json}\0{sink.quarantine}"
    return f", contract {hashlib.sha256(rules.encode()).hexdigest()[:12]}"


# -- planning -----------------------------------------------------------------------------------


def plan(
    ledger: Ledger,
    plugin: str,
    version: str | None,
    input_dir: str,
    output: str | None,
    spec: JobSpec,
) -> Plan:
    """What would be run now.

    The files are those below the folder that are routed to the plugin; a plugin that nothing is
    routed to, by any rule, gets every file.

    Raises:
        NotFoundError: no such active plugin version.
        UsageError: a folder that is in no source root, or has no file for the plugin; a sink URI
            or a contract that is none.
    """
    active = _active(ledger, plugin, version)
    sinks = active.sinks if output is None else _given_sinks(active.sinks, output)
    sinks = _with_contracts(sinks, spec.schemas)
    folder = _folder(input_dir)
    files = ledger.read(lambda connection: _files(connection, plugin, folder, spec))
    return Plan(active, sinks, output is not None or bool(spec.schemas), tuple(files))


def _active(ledger: Ledger, plugin: str, version: str | None) -> PluginSpec:
    found = next((s for s in ledger.plugin_specs() if s.plugin == plugin), None)
    if found is None:
        raise NotFoundError(
            f"no active version of plugin {plugin[:80]!r}",
            hint="'casparian plugins' lists them and how they stand.",
        )
    if version is not None and version != found.plugin_version:
        raise NotFoundError(
            f"version {version[:80]} of plugin {plugin!r} is not active; {found.plugin_version} is",
            hint=f"Ask for that, or run 'casparian plugin rollback {plugin} {version[:80]}'.",
        )
    if found.refused:
        raise ConflictError(f"plugin {plugin!r} may not run: {found.refused}")
    return found


def _given_sinks(sinks: Sequence[SinkSpec], output: str) -> tuple[SinkSpec, ...]:
    """The plugin's topics, with their contracts, all to one sink."""
    address = parse_sink_uri(output)
    by_topic = {sink.topic: sink for sink in reversed(sinks)}
    by_topic.setdefault(ANY_TOPIC, SinkSpec(ANY_TOPIC, address.uri))
    return tuple(
        replace(
            sink,
            uri=address.uri,
            mode=sink.mode if address.mode is SinkMode.APPEND else address.mode,
        )
        for _, sink in sorted(by_topic.items())
    )


def _with_contracts(
    sinks: tuple[SinkSpec, ...], contracts: Mapping[str, str]
) -> tuple[SinkSpec, ...]:
    """The sinks, those of the named topics with these contracts in place of their own."""
    for topic, text in contracts.items():
        if not TOPIC_PATTERN.fullmatch(topic):
            raise UsageError(f"{topic[:80]!r} is no topic", hint="Name the plugin's outputs.")
        contract = parse_contract(text).to_json()
        its_own = [
            replace(sink, topic=topic, schema_json=contract) for sink in sinks_for(topic, sinks)
        ]
        sinks = (*(sink for sink in sinks if sink.topic != topic), *its_own)
    return sinks


def _folder(input_dir: str) -> str:
    if not os.path.isabs(input_dir) or "\0" in input_dir:
        raise UsageError(
            f"{input_dir[:200]!r} is no absolute path",
            hint="The Sentinel may run in another folder: give the whole path.",
        )
    return path_to_text(os.path.realpath(input_dir)).rstrip("/") + "/"


def _files(connection: Connection, plugin: str, folder: str, spec: JobSpec) -> list[RunFile]:
    namespace = namespace_of(plugin)
    known = connection.execute(
        """
        SELECT count(*) FROM cf_source_root
        WHERE active = 1 AND namespace = $2
          AND (starts_with($1, rtrim(path, '/') || '/') OR starts_with(path, $1))
        """,
        [folder, namespace],
    ).fetchone()
    if not known or not known[0]:
        raise UsageError(
            f"{folder} is in no source root",
            hint=f"'casparian source add {folder}' adds it, then 'casparian scan {folder}'.",
        )
    found = connection.execute(
        """
        SELECT v.id, rtrim(r.path, '/') || '/' || l.rel_path AS path, v.content_hash, l.id,
               l.rel_path
        FROM cf_source_root r
        JOIN cf_file_location l ON l.source_root_id = r.id AND l.deleted_at IS NULL
        JOIN cf_file_version v ON v.id = l.current_version_id
        WHERE r.active = 1 AND r.namespace = $2
          AND starts_with(rtrim(r.path, '/') || '/' || l.rel_path, $1)
        ORDER BY path
        """,
        [folder, namespace],
    ).fetchall()
    files = [
        RunFile(version_id, path, digest)
        for version_id, path, digest, *_ in _chosen(connection, plugin, folder, spec, found)
    ][: spec.files_max]
    if not files:
        raise UsageError(
            f"no file below {folder} is one for plugin {plugin!r}",
            hint="'casparian files' lists the known ones and their tags, 'casparian scan' looks "
            "for new ones.",
        )
    if len(files) > FILES_MAX:
        raise UsageError(
            f"{len(files)} files below {folder} are more than {FILES_MAX} at once",
            hint="Ask for its folders one by one, or use 'casparian backfill'.",
        )
    return files


def _chosen(
    connection: Connection,
    plugin: str,
    folder: str,
    spec: JobSpec,
    found: Sequence[tuple[Any, ...]],
) -> Sequence[tuple[Any, ...]]:
    """Those of the rows that were asked for by name, or else those that the plugin takes."""
    if spec.files:
        by_path = {row[1]: row for row in found}
        paths = [folder + name for name in dict.fromkeys(spec.files)]
        missing = [path for path in paths if path not in by_path]
        if missing:
            raise NotFoundError(
                f"{missing[0][:300]} is no known file", hint="'casparian scan' looks for new ones."
            )
        return [by_path[path] for path in paths]
    if not _is_routed(connection, plugin):
        return found
    rules = load_rule_set(connection, namespace_of(plugin))
    manual = manual_tags(connection)
    return [
        row
        for row in found
        if any(
            match.plugin == plugin
            for match in rules.takers(merged_tags(rules.tags(row[4]), manual.get(row[3])))
        )
    ]


def _is_routed(connection: Connection, plugin: str) -> bool:
    """Whether any rule or person gives a tag that the plugin subscribes to."""
    row = connection.execute(
        "SELECT subscription_tags FROM cf_plugin_config WHERE plugin_name = $1", [plugin]
    ).fetchone()
    given = connection.execute(
        """
        SELECT count(*) FROM (
            SELECT tag FROM cf_routing_rule WHERE namespace = $2
            UNION
            SELECT t.tag FROM cf_file_tag t
            JOIN cf_file_location l ON l.id = t.file_id
            JOIN cf_source_root r ON r.id = l.source_root_id AND r.namespace = $2
        ) WHERE tag IN (SELECT unnest($1::VARCHAR[]))
        """,
        [sorted(parse_tags(row[0])) if row else [], namespace_of(plugin)],
    ).fetchone()
    return bool(given and given[0])


# -- asking, approving --------------------------------------------------------------------------


def request_run(
    ledger: Ledger,
    clock: Clock,
    operation: ApprovalOperation.Run,
    expires_in: timedelta,
    requester: str | None,
) -> Approval:
    """Ask for a run; the request is bound to what it would do now.

    Raises:
        NotFoundError, UsageError, ConflictError: as `plan`.
    """
    asked = plan_of(ledger, operation)
    files = counted(len(asked.files), "file")
    operation = msgspec.structs.replace(
        operation, plugin_version=asked.spec.plugin_version, file_count=len(asked.files)
    )
    summary = (
        f"Run {operation.plugin_name} {operation.plugin_version} on {files} below "
        f"{operation.input_dir}, writing {_sinks_text(asked.sinks)}"
    )
    if operation.spec is not None and operation.spec.schemas:
        summary += f", with contracts given for {', '.join(sorted(operation.spec.schemas))}"
    approval_id = new_approval_id()
    age_us = expires_in // timedelta(microseconds=1)
    with transaction_of(ledger, clock) as unit:
        api_approvals.create_approval(
            unit, approval_id, operation, summary, age_us, requester, asked.binding
        )
        found = api_approvals.find(unit, approval_id)
    assert found is not None
    return found


def plan_of(ledger: Ledger, operation: ApprovalOperation.Run) -> Plan:
    """As `plan`, for what a request asks for."""
    return plan(
        ledger,
        operation.plugin_name,
        operation.plugin_version,
        operation.input_dir,
        operation.output,
        operation.spec or JobSpec(),
    )


def approve(
    ledger: Ledger, clock: Clock, approval_id: str, decided_by: str | None, *, allow_self: bool
) -> bool:
    """Approve a request. One that the Sentinel carries out is compared with what it would do now,
    and its job is made, all in one transaction.

    Returns:
        False if it is missing, decided, expired, or has become stale.

    Raises:
        NotPermittedError: who asked may not decide.
    """
    current = _current(ledger, clock, approval_id)
    with transaction_of(ledger, clock) as unit:
        if isinstance(current, str):
            api_approvals.mark_stale(unit, approval_id, [current])
            return False
        approved = api_approvals.approve(
            unit, approval_id, decided_by, current.binding if current else None,
            allow_self=allow_self,
        )  # fmt: skip
        if approved and current is not None:
            _make_job(unit, approval_id, current.binding)
    return approved


def _current(ledger: Ledger, clock: Clock, approval_id: str) -> Plan | str | None:
    """What an open request that the Sentinel carries out would do now, or why it cannot any
    more; None for every other request."""
    now = utc(clock.now().wall_us)
    found = ledger.read(lambda c: api_approvals.get_approval(c, approval_id, now))
    if found is None or found.status not in {ApprovalStatus.PENDING, ApprovalStatus.APPROVED}:
        return None
    asked = found.operation
    if not isinstance(asked, ApprovalOperation.Run) or asked.spec is None or found.binding is None:
        return None
    try:
        return plan_of(ledger, asked)
    except CasparianError as error:
        return str(error)


def _make_job(unit: Unit, approval_id: str, binding: ApprovalBinding) -> JobId | None:
    found = api_approvals.find(unit, approval_id)
    assert found is not None
    assert isinstance(found.operation, ApprovalOperation.Run)
    text = encode_payload(found.operation.spec or JobSpec())
    return api_approvals.start_approved(unit, approval_id, binding, text)


def start_approved_runs(ledger: Ledger, clock: Clock) -> int:
    """Make the job of each approved run that has none: it was approved, and nothing more came of
    it. Returns how many were made."""
    waiting = ledger.query(
        f"SELECT approval_id FROM {APPROVALS} WHERE status = 'approved' AND job_id IS NULL "
        "AND binding_json IS NOT NULL AND contains(operation_json, $1)",
        [_CARRIED],
        folded=False,
    )
    made = 0
    for row in waiting:
        approval_id = row["approval_id"]
        current = _current(ledger, clock, approval_id)
        with transaction_of(ledger, clock) as unit:
            if isinstance(current, str):
                api_approvals.mark_stale(unit, approval_id, [current])
            elif current is not None:
                made += _make_job(unit, approval_id, current.binding) is not None
    return made


def standing(connection: Connection, now_us: int) -> dict[str, Any]:
    """{api_jobs: {status: n} of jobs that the Sentinel carries out and that are not over,
    requests: n that wait for a person}."""
    jobs = connection.execute(
        f"SELECT status, count(*) FROM {JOBS} WHERE status IN ('queued', 'running') "
        "AND starts_with(spec_json, $1) GROUP BY status ORDER BY status",
        [_CARRIED],
    ).fetchall()
    waiting = connection.execute(
        f"SELECT count(*) FROM {APPROVALS} WHERE status = 'pending' AND expires_at > $1",
        [utc(now_us)],
    ).fetchone()
    return {"api_jobs": dict(jobs), "requests": waiting[0] if waiting else 0}


# -- beginning ----------------------------------------------------------------------------------


def new_run(
    ledger: Ledger,
    job_type: HttpJobType,
    plugin: str,
    version: str | None,
    input_dir: str,
    output: str | None,
    spec: JobSpec,
) -> HttpJob:
    """A job for `api_jobs.create_job` that the Sentinel carries out.

    Raises:
        NotFoundError, UsageError, ConflictError: as `plan`.
    """
    if job_type is not HttpJobType.RUN and output is not None:
        raise UsageError(f"a {job_type} writes to no sink", hint="Leave the sink out.")
    planned = plan(ledger, plugin, version, input_dir, output, spec)
    text = encode_payload(spec)
    found = planned.spec.plugin_version
    return api_jobs.new_job(job_type, plugin, found, input_dir, output, None, text)


def waiting_jobs(ledger: Ledger) -> list[int]:
    """Ids of queued jobs that the Sentinel carries out."""
    found = ledger.query(
        f"SELECT job_id FROM {JOBS} WHERE status = 'queued' AND starts_with(spec_json, $1) "
        "ORDER BY job_id",
        [_CARRIED],
        folded=False,
    )
    return [int(row["job_id"]) for row in found]


def checked_spec(job: HttpJob) -> JobSpec:
    """Raises:
    UsageError: the job's spec is none.
    """
    try:
        return msgspec.json.decode(job.spec_json or "", type=JobSpec)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the job's spec: {error}") from error


def give_up(ledger: Ledger, clock: Clock, api_job_id: int, message: str) -> None:
    """Let a job fail that cannot be carried out any further."""
    told = message[:MESSAGE_CHARS_MAX]
    with transaction_of(ledger, clock) as unit:
        api_jobs.finish_job(unit, api_job_id, HttpJobStatus.FAILED, told, None)


# -- under way ----------------------------------------------------------------------------------


def running_tasks(ledger: Ledger) -> dict[int, list[int]]:
    """Tasks that are not told yet, by running API job; a job without any is there as well."""
    found = ledger.query(
        f"""
        SELECT j.job_id AS api_job_id, t.job_id FROM {JOBS} j
        LEFT JOIN {TASKS} t ON t.api_job_id = j.job_id AND NOT t.told
        WHERE j.status = 'running' AND starts_with(j.spec_json, $1)
        """,
        [_CARRIED],
        folded=False,
    )
    tasks: dict[int, list[int]] = {}
    for row in found:
        listed = tasks.setdefault(int(row["api_job_id"]), [])
        if row["job_id"] is not None:
            listed.append(int(row["job_id"]))
    return tasks


def ended_among(ledger: Ledger, job_ids: Iterable[int]) -> list[int]:
    """Those of the jobs that have ended, as far as that is durable."""
    return [n for n in job_ids if (status := ledger.status_of(n)) is None or status in TERMINAL]


def orphaned_tasks(ledger: Ledger) -> list[int]:
    """Jobs made for API jobs that are over, and not told: they are to be cancelled."""
    found = ledger.query(
        f"""
        SELECT t.job_id FROM {TASKS} t JOIN {JOBS} j ON j.job_id = t.api_job_id
        WHERE NOT t.told AND t.own AND j.status IN ('completed', 'failed', 'cancelled')
        ORDER BY t.job_id
        """,
        folded=False,
    )
    return [int(row["job_id"]) for row in found]


def forget_tasks(ledger: Ledger, job_ids: Sequence[int]) -> None:
    """Nobody waits for these any more."""
    with ledger.transaction(folded=False) as connection:
        connection.execute(
            f"UPDATE {TASKS} SET told = true WHERE job_id IN (SELECT unnest($1::BIGINT[]))",
            [list(job_ids)],
        )


def collect(ledger: Ledger, clock: Clock, api_job_id: int, job_ids: Sequence[int]) -> bool:
    """Tell of tasks that have ended; after the last one, end the API job.

    Args:
        job_ids: the ended ones, at most TOLD_MAX.

    Returns:
        Whether the API job is over.
    """
    with transaction_of(ledger, clock, folded=True) as unit:
        if unit.head(api_job_id).status is not HttpJobStatus.RUNNING:
            return True
        ended = unit.look(_ENDED_TASKS, [api_job_id, list(job_ids)])
        reports = _reports(unit, job_ids)
        (progress,) = unit.look(
            "SELECT progress_phase AS phase, progress_items_done AS done, "
            f"progress_items_total AS total FROM {JOBS} WHERE job_id = $1",
            [api_job_id],
        )
        done, total = progress["done"], progress["total"]
        outputs = _published(unit, job_ids)
        for row in ended:
            done += 1
            for event in _events_of(row, outputs.get(row["id"], []), reports.get(row["id"])):
                add_event(unit, api_job_id, event)
            add_event(unit, api_job_id, EventType.Progress(done, total, _told(row)))
        unit.change(
            f"UPDATE {TASKS} SET told = true WHERE api_job_id = $1 "
            "AND job_id IN (SELECT unnest($2::BIGINT[]))",
            [api_job_id, list(job_ids)],
        )
        set_progress(unit, api_job_id, progress["phase"], done, total)
        return _end_if_over(unit, api_job_id, total)


_ENDED_TASKS: Final = f"""
    SELECT q.id, q.status, q.reason, q.error_message, l.rel_path
    FROM {TASKS} t JOIN {QUEUE_TABLE} q ON q.id = t.job_id
    LEFT JOIN cf_file_version v ON v.id = q.file_version_id
    LEFT JOIN cf_file_location l ON l.id = v.location_id
    WHERE t.api_job_id = $1 AND NOT t.told AND q.id IN (SELECT unnest($2::BIGINT[]))
    ORDER BY q.id
"""


def _events_of(
    row: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]], report: RowsReport | None
) -> list[EventPayload]:
    events: list[EventPayload] = [
        EventType.Violation(topic.violations)
        for topic in (report.topics if report else ())
        if topic.violations
    ]
    if row["status"] == JobStatus.COMPLETED:
        events += [
            EventType.Output(o["topic"], o["sink_uri"], o["rows"], o["bytes"]) for o in outputs
        ]
    return events


def _told(row: Mapping[str, Any]) -> str:
    """One line about an ended task."""
    name = row["rel_path"] or f"job {row['id']}"
    if row["status"] == JobStatus.COMPLETED:
        return f"{name}: done"[:MESSAGE_CHARS_MAX]
    why = row["error_message"] or row["reason"] or ""
    return f"{name}: {str(row['status']).lower()}: {why}"[:MESSAGE_CHARS_MAX]


def _published(unit: Unit, job_ids: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    found = unit.look(
        'SELECT job_id, topic, sink_uri, "rows", bytes FROM cf_output '
        "WHERE job_id IN (SELECT unnest($1::BIGINT[])) ORDER BY job_id, n",
        [list(job_ids)],
    )
    by_job: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        by_job[row["job_id"]].append(row)
    return by_job


def _reports(unit: Unit, job_ids: Sequence[int]) -> dict[int, RowsReport]:
    """What workers told of these jobs' rows."""
    found = unit.look(
        "SELECT job_id, json_extract_string(data, '$.report') AS report FROM cf_journal "
        "WHERE kind IN ('COMPLETED', 'FAILED') AND contains(data, '\"report\"') "
        "AND job_id IN (SELECT unnest($1::BIGINT[]))",
        [list(job_ids)],
    )
    reports = {}
    for row in found:
        try:
            reports[int(row["job_id"])] = decode_report(row["report"] or "")
        except msgspec.MsgspecError:
            # A worker of another version; the job's own outcome stands without it.
            continue
    return reports


def _end_if_over(unit: Unit, api_job_id: int, total: int) -> bool:
    (job_row,) = unit.look(
        f"SELECT spec_json, job_type FROM {JOBS} WHERE job_id = $1", [api_job_id]
    )
    counts = Counter[str]()
    for row in unit.look(
        f"""
        SELECT CASE WHEN q.status = 'SKIPPED' AND q.reason = $2 THEN 'DONE' ELSE q.status END AS s,
               t.told, count(*) AS n
        FROM {TASKS} t JOIN {QUEUE_TABLE} q ON q.id = t.job_id
        WHERE t.api_job_id = $1 GROUP BY ALL
        """,
        [api_job_id, Reason.DUPLICATE_OUTPUT],
    ):
        counts[row["s"] if row["told"] else "UNTOLD"] += row["n"]
    counts["UNTOLD"] += _unmade(unit, api_job_id)
    spec = msgspec.json.decode(job_row["spec_json"], type=JobSpec)
    bad = counts[JobStatus.FAILED] + counts[JobStatus.ABORTED] + counts[JobStatus.SKIPPED]
    if counts["UNTOLD"] and not (spec.fail_fast and counts[JobStatus.FAILED]):
        return False
    rehearsed = job_row["job_type"] != HttpJobType.RUN
    result = _result(unit, api_job_id, total, counts, rehearsed=rehearsed)
    if job_row["job_type"] == HttpJobType.PREVIEW:
        _set_preview(unit, api_job_id, spec)
    message = _failures(unit, api_job_id, bad, total) if bad else None
    status = HttpJobStatus.FAILED if bad else HttpJobStatus.COMPLETED
    return api_jobs.finish_job(unit, api_job_id, status, message, result)


def _unmade(unit: Unit, api_job_id: int) -> int:
    """Files of a job that has begun, and whose tasks are still to be made."""
    found = unit.look(
        f"SELECT json_array_length(plan_json, '$.version_ids') - made AS n FROM {PLANS} "
        "WHERE api_job_id = $1",
        [api_job_id],
    )
    return int(found[0]["n"]) if found else 0


def _failures(unit: Unit, api_job_id: int, bad: int, total: int) -> str:
    (first,) = unit.look(
        f"""
        SELECT q.id, q.status, q.reason, q.error_message, l.rel_path
        FROM {TASKS} t JOIN {QUEUE_TABLE} q ON q.id = t.job_id
        LEFT JOIN cf_file_version v ON v.id = q.file_version_id
        LEFT JOIN cf_file_location l ON l.id = v.location_id
        WHERE t.api_job_id = $1 AND t.told AND q.status IN ('FAILED', 'ABORTED', 'SKIPPED')
          AND q.reason IS DISTINCT FROM $2
        ORDER BY q.status = 'FAILED' DESC, q.id LIMIT 1
        """,
        [api_job_id, Reason.DUPLICATE_OUTPUT],
    )
    return f"{bad} of {counted(total, 'file')} not done; the first: {_told(first)}"


def _result(
    unit: Unit, api_job_id: int, total: int, counts: Mapping[str, int], *, rehearsed: bool
) -> JobResult:
    tasks = sum(counts.values())
    metrics = {
        "files": total,
        "files_completed": counts[JobStatus.COMPLETED],
        "files_done_before": total - tasks + counts["DONE"],
        "files_failed": counts[JobStatus.FAILED],
        "files_cancelled": counts[JobStatus.ABORTED] + counts["UNTOLD"],
        "files_skipped": counts[JobStatus.SKIPPED],
    }
    if rehearsed:
        found, metrics["quarantine_rows"] = _rehearsed_rows(unit, api_job_id)
        for summary in _violations(unit, api_job_id):
            name = f"violations/{summary.column_name or '*'}/{summary.violation_type}"
            metrics[name] = metrics.get(name, 0) + summary.count
        return checked(
            JobResult(rows_processed=found, bytes_written=0, outputs=[], metrics=metrics)
        )
    outputs = unit.look(
        f"""
        SELECT o.topic, o.sink_uri, sum(o."rows")::BIGINT AS "rows", sum(o.bytes)::BIGINT AS bytes,
               o.kind
        FROM {TASKS} t JOIN cf_output o ON o.job_id = t.job_id
        WHERE t.api_job_id = $1 AND t.told AND o.state = 'PUBLISHED'
        GROUP BY ALL ORDER BY o.kind, o.topic, o.sink_uri
        """,
        [api_job_id],
    )
    by_topic: dict[tuple[str, str], int] = {}
    for row in outputs:
        # Each sink of a topic holds the same rows.
        key = (row["kind"], row["topic"])
        by_topic[key] = max(row["rows"], by_topic.get(key, 0))
    metrics["quarantine_rows"] = sum(n for (kind, _), n in by_topic.items() if kind != "output")
    return checked(
        JobResult(
            rows_processed=sum(n for (kind, _), n in by_topic.items() if kind == "output"),
            bytes_written=sum(row["bytes"] for row in outputs),
            outputs=[
                OutputInfo(
                    name=row["topic"], sink_uri=row["sink_uri"], rows=row["rows"],
                    bytes=row["bytes"],
                )
                for row in outputs
            ],
            metrics=metrics,
        )
    )  # fmt: skip


def _told_tasks(unit: Unit, api_job_id: int) -> list[int]:
    found = unit.look(
        f"SELECT job_id FROM {TASKS} WHERE api_job_id = $1 AND told ORDER BY job_id", [api_job_id]
    )
    return [int(row["job_id"]) for row in found]


def _rehearsed_rows(unit: Unit, api_job_id: int) -> tuple[int, int]:
    """Good rows and bad ones of rehearsals, which have no outputs in the ledger."""
    (row,) = unit.look(
        f"""
        SELECT least(coalesce(sum((data->>'$.metrics.rows')::BIGINT), 0), $2)::BIGINT AS good,
               least(coalesce(sum((data->>'$.metrics.quarantine_rows')::BIGINT), 0), $2)::BIGINT
                   AS bad
        FROM cf_journal WHERE kind = 'COMPLETED'
          AND job_id IN (SELECT job_id FROM {TASKS} WHERE api_job_id = $1 AND told)
        """,
        [api_job_id, COUNT_MAX],
    )
    return row["good"], row["bad"]


def _violations(unit: Unit, api_job_id: int) -> list[ViolationSummary]:
    reports = _reports(unit, _told_tasks(unit, api_job_id)).values()
    return [v for report in reports for topic in report.topics for v in topic.violations]


def _set_preview(unit: Unit, api_job_id: int, spec: JobSpec) -> None:
    """Keep the rows that the preview shows: of all files together at most `rows_max` a topic."""
    topics: dict[str, TopicReport] = {}
    reports = _reports(unit, _told_tasks(unit, api_job_id))
    for _, report in sorted(reports.items()):
        for topic in report.topics:
            known = topics.get(topic.topic, TopicReport(topic=topic.topic))
            topics[topic.topic] = TopicReport(
                topic=topic.topic,
                rows=known.rows + topic.rows,
                bad_rows=known.bad_rows + topic.bad_rows,
                violations=known.violations + topic.violations,
                sample=(known.sample + topic.sample)[: spec.rows_max],
            )
    text = encode_payload(list(topics.values()))
    unit.change(f"UPDATE {JOBS} SET preview_json = $1 WHERE job_id = $2", [text, api_job_id])


def decode_preview(text: str | None) -> list[TopicReport]:
    """What a preview's `preview_json` shows; nothing before it is over."""
    return msgspec.json.decode(text, type=list[TopicReport]) if text else []


def add_event(unit: Unit, api_job_id: int, event: EventPayload) -> None:
    unit.add_event(api_job_id, checked_event(event))


def set_progress(unit: Unit, api_job_id: int, phase: str, done: int, total: int) -> None:
    progress = JobProgress(phase=phase, items_done=done, items_total=total)
    api_jobs.update_part(unit, api_job_id, "progress", checked(progress))
