"""The tools: what each takes, what it gives, and what it does.

None of them has a lasting effect of its own. What would have one becomes a request that waits for
a person; deciding is not offered. Backtests and previews publish nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from casparian_flow.db.api_checks import ID_MAX
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.mcp_server import job_requests
from casparian_flow.mcp_server.allow_list import PATH_CHARS_MAX
from casparian_flow.mcp_server.budget import ROWS_MAX, fitting
from casparian_flow.mcp_server.desk import Desk
from casparian_flow.mcp_server.query import SQL_CHARS_MAX, select
from casparian_flow.mcp_server.redaction import RedactionMode
from casparian_flow.mcp_server.scan import HashMode, scan
from casparian_flow.protocol.http_types import (
    NAME_CHARS_MAX,
    Approval,
    ApprovalStatus,
    HttpJobStatus,
)

Answer = dict[str, Any]
PathText = Annotated[
    str,
    msgspec.Meta(
        min_length=1, max_length=PATH_CHARS_MAX, description="Absolute path of a folder in reach."
    ),
]
FileText = Annotated[
    str,
    msgspec.Meta(
        min_length=1, max_length=PATH_CHARS_MAX, description="Path of a file below the folder."
    ),
]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Id = Annotated[int, msgspec.Meta(ge=0, le=ID_MAX)]
Redaction = RedactionMode | None
Schemas = Annotated[
    dict[Name, dict[str, Any] | list[dict[str, Any]]],
    msgspec.Meta(
        max_length=100,
        description="Contracts by topic for this call, in place of the topics' own: a list of "
        'columns, or {"columns": [{"name", "type", "nullable", "format"}], "mode": "strict", '
        '"allow_extra" or "allow_missing_optional", "quarantine": {"allow", "max_pct", '
        '"max_count"}}.',
    ),
]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what tools take; anything else is refused."""


class PluginRef(Arguments, frozen=True):
    """A deployed plugin; without a version, the active one."""

    plugin: Name
    version: Name | None = None


class PluginsArguments(Arguments, frozen=True):
    include_dev: bool = False


class ScanArguments(Arguments, frozen=True):
    path: PathText
    pattern: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    recursive: bool = True
    hash_mode: HashMode = "none"
    limit: Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)] = 1_000


class PreviewArguments(Arguments, frozen=True):
    plugin_ref: PluginRef
    input_dir: PathText
    files: Annotated[list[FileText], msgspec.Meta(max_length=job_requests.PREVIEW_FILES_MAX)] = []
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 100
    redaction: Redaction = None


class QueryArguments(Arguments, frozen=True):
    sql: Annotated[str, msgspec.Meta(min_length=1, max_length=SQL_CHARS_MAX)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)] = 1_000
    redaction: Redaction = None


class BacktestArguments(Arguments, frozen=True):
    plugin_ref: PluginRef
    input_dir: PathText
    schemas: Schemas = {}
    fail_fast: bool = True


class RunArguments(Arguments, frozen=True):
    plugin_ref: PluginRef
    input_dir: PathText
    output: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)] | None = None
    schemas: Schemas = {}


class JobArguments(Arguments, frozen=True):
    job_id: Id


class JobStatusArguments(Arguments, frozen=True):
    job_id: Id
    redaction: Redaction = None


class JobListArguments(Arguments, frozen=True):
    status: HttpJobStatus | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 20


class ApprovalArguments(Arguments, frozen=True):
    approval_id: Name


class ApprovalListArguments(Arguments, frozen=True):
    status: Literal["all", "pending", "approved", "rejected", "expired", "stale"] = "pending"
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 100


def plugins(desk: Desk, asked: PluginsArguments) -> Answer:
    redactor = desk.redactor(None)
    with desk.control() as control:
        rows, topics = control.list_plugins(), control.list_topics()
    shown = [
        {
            "plugin": row["plugin_name"],
            "version": row["version"],
            "status": row["status"],
            "paused": bool(row["paused"]),
            "pause_reason": redactor.message(row["pause_reason"] or ""),
            "topics": [
                {"topic": t["topic_name"], "sinks": str(t["uri"]).split("\n"), "mode": t["mode"]}
                for t in topics
                if t["plugin_name"] == row["plugin_name"]
            ],
        }
        for row in rows
        if asked.include_dev or row["status"] == "ACTIVE"
    ]
    kept, cut = fitting(shown)
    return {"plugins": kept, "truncated": cut}


def scan_folder(desk: Desk, asked: ScanArguments) -> Answer:
    with desk.control() as control:
        allowed = desk.allowed(control)
    if desk.elsewhere and not os.path.isdir(allowed.named(asked.path)):
        raise UsageError(
            f"{asked.path[:200]!r} is not mounted where this server runs",
            hint="casparian_query tells what Scouts have found: SELECT * FROM cf_file_location.",
        )
    with allowed.open(asked.path) as folder:
        return scan(
            folder,
            pattern=asked.pattern,
            recursive=asked.recursive,
            hash_mode=asked.hash_mode,
            limit=asked.limit,
            clock=desk.clock,
        )


def query(desk: Desk, asked: QueryArguments) -> Answer:
    redactor = desk.redactor(asked.redaction)
    started = desk.clock.now().mono
    found = select(desk.snapshot, asked.sql, asked.limit, desk.query_limits(), redactor)
    elapsed_ms = round((desk.clock.now().mono - started) * 1_000)
    return found | {"row_count": len(found["rows"]), "elapsed_ms": elapsed_ms}


def preview(desk: Desk, asked: PreviewArguments) -> Answer:
    redactor = desk.redactor(asked.redaction)
    ref = asked.plugin_ref
    return job_requests.preview(
        desk, ref.plugin, ref.version, asked.input_dir, asked.files, asked.limit, redactor
    )


def backtest_start(desk: Desk, asked: BacktestArguments) -> Answer:
    ref = asked.plugin_ref
    return job_requests.backtest(
        desk,
        ref.plugin,
        ref.version,
        asked.input_dir,
        job_requests.contracts(asked.schemas),
        fail_fast=asked.fail_fast,
    )


def run_request(desk: Desk, asked: RunArguments) -> Answer:
    ref = asked.plugin_ref
    schemas = job_requests.contracts(asked.schemas)
    return job_requests.run(desk, ref.plugin, ref.version, asked.input_dir, asked.output, schemas)


def job_status(desk: Desk, asked: JobStatusArguments) -> Answer:
    redactor = desk.redactor(asked.redaction)
    with desk.control() as control:
        return job_requests.job_shown(control.api, asked.job_id, redactor)


def job_cancel(desk: Desk, asked: JobArguments) -> Answer:
    with desk.control() as control:
        told = job_requests.cancel(control.api, asked.job_id, desk.caller)
    return {"job_id": asked.job_id, "status": told}


def job_list(desk: Desk, asked: JobListArguments) -> Answer:
    redactor = desk.redactor(None)
    with desk.control() as control:
        jobs = control.api.list_jobs(asked.status, asked.limit)
    kept, cut = fitting(job_requests.plain_job(job, redactor) for job in jobs)
    return {"jobs": kept, "truncated": cut}


def approval_status(desk: Desk, asked: ApprovalArguments) -> Answer:
    with desk.control() as control:
        approval = control.api.get_approval(asked.approval_id)
    if approval is None:
        raise NotFoundError(f"no approval {asked.approval_id[:80]!r}")
    return _plain_approval(approval)


def approval_list(desk: Desk, asked: ApprovalListArguments) -> Answer:
    wanted = None if asked.status == "all" else ApprovalStatus(asked.status)
    with desk.control() as control:
        approvals = control.api.list_approvals(wanted, asked.limit)
    kept, cut = fitting(map(_plain_approval, approvals))
    return {"approvals": kept, "truncated": cut}


def _plain_approval(approval: Approval) -> Answer:
    plain: Answer = msgspec.to_builtins(approval)
    return plain


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool.

    Attributes:
        arguments: the class of what it takes.
        run: carries it out; may raise CasparianError.
        lists: parts of its answer that may be left out if it is too long.
    """

    name: str
    description: str
    arguments: type[Arguments]
    run: Callable[[Desk, Any], Answer]
    lists: tuple[str, ...] = ()
    reads_only: bool = True

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments, an object."""
        template = "#/$defs/{name}"
        (_,), parts = msgspec.json.schema_components([self.arguments], ref_template=template)
        own: dict[str, Any] = parts.pop(self.arguments.__name__)
        return {**own, "$defs": parts} if parts else own


TOOLS: Final[dict[str, Tool]] = {
    tool.name: tool
    for tool in (
        Tool(
            "casparian_plugins",
            "Deployed plugins with their topics and sinks; include_dev also lists versions that "
            "are not active.",
            PluginsArguments,
            plugins,
            ("plugins",),
        ),
        Tool(
            "casparian_scan",
            "List the files of a folder, by a gitignore-style pattern, as Scout sees them. "
            "Nothing is recorded.",
            ScanArguments,
            scan_folder,
            ("files",),
        ),
        Tool(
            "casparian_preview",
            "Run a plugin over a few files and show some of its rows, publishing nothing. The "
            "files must be known to Casparian Flow (below a source root, and scanned).",
            PreviewArguments,
            preview,
            ("outputs", "errors"),
            reads_only=False,
        ),
        Tool(
            "casparian_query",
            "One SELECT in DuckDB's SQL over a copy of the ledger (tables cf_*, see SHOW TABLES) "
            "and the published outputs (a table for each topic).",
            QueryArguments,
            query,
            ("rows",),
        ),
        Tool(
            "casparian_backtest_start",
            "Run a plugin over all files of a folder and publish nothing; tells which rows break "
            "the contract. Ask casparian_job_status how it goes.",
            BacktestArguments,
            backtest_start,
            reads_only=False,
        ),
        Tool(
            "casparian_run_request",
            "Ask a person for a run of a plugin over a folder, with its rows written to the sink. "
            "Nothing runs before a person approves with the approve_command on the machine.",
            RunArguments,
            run_request,
            reads_only=False,
        ),
        Tool(
            "casparian_job_status",
            "How a job goes: progress, result, violations with samples.",
            JobStatusArguments,
            job_status,
            ("violations", "rows"),
        ),
        Tool(
            "casparian_job_cancel",
            "Cancel a backtest or preview, or a run that was asked for here: cancelled, "
            "already_completed or not_found.",
            JobArguments,
            job_cancel,
            reads_only=False,
        ),
        Tool("casparian_job_list", "Jobs, newest first.", JobListArguments, job_list, ("jobs",)),
        Tool(
            "casparian_approval_status",
            "How a request stands. Only a person decides, not a tool.",
            ApprovalArguments,
            approval_status,
        ),
        Tool(
            "casparian_approval_list",
            "Requests, newest first; by default those that wait for a person.",
            ApprovalListArguments,
            approval_list,
            ("approvals",),
        ),
    )
}
