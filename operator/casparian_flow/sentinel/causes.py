"""Why nothing happens, if nothing does: facts in, causes with their cures out. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.outputs import parse_sink_uri
from casparian_flow.domain.wording import counted
from casparian_flow.sentinel.broker import REFUSED

Row = dict[str, Any]
LISTED_MAX = 5
"""Things of one kind that are named one by one."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about the system now.

    Attributes:
        running: whether a Sentinel runs.
        problem: why the ledger takes no commits, "" if it does; with what to do.
        jobs: counts by status.
        standing: db.queries.standing.
        workers: `ControlApi.list_workers`.
        stuck: {job_id, message} of granted jobs whose sink refused for good.
        orphans: {job_id, root_ids} of granted jobs that no connected worker can publish.
        trials: `Trials.rows` of versions that are still to be tried.
    """

    running: bool
    problem: tuple[str, str] | None
    jobs: dict[str, int]
    standing: Row
    workers: Sequence[Row]
    stuck: Sequence[Row] = field(default_factory=tuple)
    orphans: Sequence[Row] = field(default_factory=tuple)
    trials: Sequence[Row] = field(default_factory=tuple)


def explain(facts: Facts) -> list[Row]:
    """Causes that hold, the one to look at first on top: {about, cause, cure}."""
    return [
        {"about": about, "cause": cause, "cure": cure}
        for about, check in _CHECKS.items()
        for cause, cure in check(facts)
    ]


Found = Iterator[tuple[str, str]]


def _ledger(facts: Facts) -> Found:
    if facts.problem is not None:
        yield f"the ledger takes no commits: {facts.problem[0]}", facts.problem[1]


def _sources(facts: Facts) -> Found:
    if not facts.standing["sources"]:
        yield (
            "no source root is configured, so no file is ever looked at",
            "Add a folder with 'casparian source add DIR'.",
        )
    elif not facts.standing["files"]:
        if facts.standing["scans"]:
            yield (
                "no file was found below the source roots",
                (
                    "Put files there, or look at the paths and ignore patterns with "
                    "'casparian source list'."
                ),
            )
        else:
            yield (
                "the source roots have not been scanned yet",
                "Run 'casparian scan', or 'casparian start', which scans again and again.",
            )


def _plugins(facts: Facts) -> Found:
    for row in facts.standing["rejected"][-LISTED_MAX:]:
        yield (
            f"plugin {row['plugin_name']} {row['version']} was rejected: {row['validation_error']}",
            "Correct the file and publish it again; the plugin class must be named Handler.",
        )
    staged = facts.standing["staged"]
    if not staged and not any(row["version"] for row in facts.standing["plugins"]):
        yield (
            "no plugin is deployed, so no job is made",
            (
                "Publish one with 'casparian publish FILE --version 1.0.0'; its class must be "
                "named Handler."
            ),
        )


def _trials(facts: Facts) -> Found:
    known = {(row["plugin_name"], row["version"]): row for row in facts.trials}
    for row in facts.standing["staged"][:LISTED_MAX]:
        name, version = row["plugin_name"], row["version"]
        trial = known.get((name, version), {"state": "waits for a worker", "note": ""})
        note = f": {trial['note']}" if trial["note"] else ""
        if not facts.running:
            yield (
                f"plugin {name} {version} is not active yet: a worker has to try it",
                "Run 'casparian start'; its jobs are kept meanwhile.",
            )
        elif trial["state"] == "waits for a worker":
            yield (
                f"plugin {name} {version} waits for a worker that tries it{note}",
                "Start one that takes it, or wait until one is free.",
            )
        else:
            yield (
                f"plugin {name} {version} is {trial['state']}{note}",
                "It becomes active by itself once it has passed.",
            )


def _routing(facts: Facts) -> Found:
    if not facts.standing["files"]:
        return
    for row in facts.standing["plugins"]:
        if row["wired"] and not row["jobs"]:
            name = row["plugin_name"]
            yield (
                f"plugin {name} has no job: no file seen since its deploy matches its rules",
                (
                    "Compare 'casparian rules' with 'casparian files'; for files seen before it "
                    f"was deployed run 'casparian backfill {name} --execute'."
                ),
            )


def _untrusted(facts: Facts) -> Found:
    for row in facts.standing["plugins"]:
        reason = str(row["pause_reason"])
        if row["paused"] and reason.startswith(REFUSED):
            yield (
                f"plugin {row['plugin_name']} is paused: {reason}",
                (
                    "Publish a new version with a key that is trusted here, or trust its key; "
                    "it then goes on by itself."
                ),
            )


def _waiting(facts: Facts) -> Found:
    queued = facts.jobs[JobStatus.QUEUED]
    if not queued:
        return
    if not facts.running:
        yield f"{_jobs(queued, 'is', 'are')} queued and no Sentinel runs", "Run 'casparian start'."
    elif not facts.workers:
        yield (
            f"{_jobs(queued, 'is', 'are')} queued and no worker is connected",
            "Run 'casparian start', or 'casparian worker --connect ADDRESS'.",
        )
    for row in facts.standing["plugins"]:
        if row["queued"]:
            yield from _held_up(facts, row)


def _jobs(number: int, one: str, several: str) -> str:
    return f"{counted(number, 'job')} {one if number == 1 else several}"


def _held_up(facts: Facts, row: Row) -> Found:
    name, queued = row["plugin_name"], row["queued"]
    if row["paused"] and str(row["pause_reason"]).startswith(REFUSED):
        return  # told by `_untrusted`
    if row["paused"]:
        yield (
            (
                f"{_jobs(queued, 'waits', 'wait')} because plugin {name} is paused: "
                f"{row['pause_reason']}"
            ),
            f"Correct the cause, then run 'casparian plugin resume {name}'.",
        )
    elif any(staged["plugin_name"] == name for staged in facts.standing["staged"]):
        return  # told with the trials
    elif not row["version"]:
        yield (
            f"{_jobs(queued, 'waits', 'wait')} for plugin {name}, which has no active version",
            f"Publish it with 'casparian publish {name}.py --version …'.",
        )
    elif facts.workers and not any(_runs(worker, name) for worker in facts.workers):
        yield (
            f"{_jobs(queued, 'waits', 'wait')} for plugin {name}, which no connected worker takes",
            "Start a worker that takes it, or one that takes any plugin.",
        )
    elif row["delayed"] == queued:
        yield (
            f"{counted(queued, 'job')} of plugin {name} failed and will be tried again",
            f"The next try comes by itself; 'casparian jobs --plugin {name}' shows why.",
        )


def _runs(worker: Row, plugin: str) -> bool:
    return "*" in worker["capabilities"] or plugin in worker["capabilities"]


def _sinks(facts: Facts) -> Found:
    for row in facts.standing["plugins"]:
        name = row["plugin_name"]
        for uri in (line for uris in row["uris"] for line in uris.splitlines() if line.strip()):
            try:
                parse_sink_uri(uri.strip())
            except UsageError as error:
                yield (
                    f"plugin {name} has a topic whose sink cannot be used: {error}",
                    f"Set it anew with 'casparian topics set {name} TOPIC URI'.",
                )
        if row["completed"] and not row["outputs"]:
            yield (
                f"plugin {name} completed {counted(row['completed'], 'job')} and wrote nothing",
                (
                    f"It published no data: see 'casparian job logs {row['a_completed_job']}', and "
                    "'casparian topics' for where its topics go."
                ),
            )


def _granted(facts: Facts) -> Found:
    for row in facts.stuck[:LISTED_MAX]:
        yield (
            f"job {row['job_id']} is granted, but its sink refuses: {row['message']}",
            (
                f"Correct the sink, then run 'casparian job resolve {row['job_id']} --forward', or "
                "give the outputs up with --abandon."
            ),
        )
    for row in facts.orphans[:LISTED_MAX]:
        yield (
            (
                f"job {row['job_id']} is granted and waits for a worker that writes to output root "
                f"{', '.join(row['root_ids']) or '(any)'}"
            ),
            "Start a worker with that output root.",
        )


def _failures(facts: Facts) -> Found:
    dead = facts.standing["dead_letters"]
    if not dead:
        return
    last = facts.standing["last_failure"][0]
    message = (last["error_message"] or "").strip().splitlines() or [""]
    yield (
        (
            f"{counted(dead, 'job')} failed for good; the last is job {last['job_id']} of plugin "
            f"{last['plugin_name']}: {last['reason']}: {message[-1][:300]}"
        ),
        (
            f"'casparian job show {last['job_id']}' and 'casparian job logs {last['job_id']}' tell "
            f"more; after correcting the cause run 'casparian replay --plugin "
            f"{last['plugin_name']}'."
        ),
    )


def _nothing_to_do(facts: Facts) -> Found:
    moving = (JobStatus.QUEUED, JobStatus.DISPATCHING, JobStatus.RUNNING, JobStatus.STAGED)
    if any(facts.jobs[status] for status in moving) or not any(facts.jobs.values()):
        return
    yield (
        "no job is in QUEUED status: everything that was found is done",
        "Workers wait for new or changed files; 'casparian scan' looks for them at once.",
    )


_CHECKS: dict[str, Callable[[Facts], Found]] = {
    "ledger": _ledger,
    "sources": _sources,
    "plugins": _plugins,
    "trials": _trials,
    "trust": _untrusted,
    "routing": _routing,
    "waiting": _waiting,
    "sinks": _sinks,
    "granted": _granted,
    "failures": _failures,
    "idle": _nothing_to_do,
}
