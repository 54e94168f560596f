"""`casparian events`: what happens to an API job."""

import json
from collections.abc import Iterator

import click

from casparian_flow.cli.context import App, output_option, pass_app
from casparian_flow.cli.output import one_line, short_time, to_json
from casparian_flow.domain.errors import CasparianError, NotFoundError
from casparian_flow.protocol.http_types import (
    Event,
    EventType,
    HttpJob,
    HttpJobStatus,
    ViolationSummary,
)
from casparian_flow.sentinel.api import ApiStore

PAGE = 1_000
WAIT_S = 20.0
"""Of one call that waits for news; asked again until the job is over."""


@click.command()
@click.argument("job_id", type=click.IntRange(1), metavar="JOB")
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Those after N.")
@click.option("--follow", is_flag=True, help="Go on until the job is over; one JSON a line.")
@output_option
@pass_app
def events(app: App, job_id: int, after: int, follow: bool) -> None:
    """Show what happened to an API job, by its id.

    With --follow the exit code is 0 if the job completed, 1 if not.

    \b
    Examples:
      casparian events 7
      casparian events 7 --follow
    """
    _job(app.api, job_id)
    if not follow:
        _show(app, [e for page in _pages(app.api, job_id, after) for e in page])
        return
    for page in _news(app.api, job_id, after):
        for event in page:
            click.echo(_json_line(event) if app.json else _line(event))
    job = _job(app.api, job_id)
    if job.status is not HttpJobStatus.COMPLETED:
        raise CasparianError(f"API job {job_id} is {job.status}: {job.error_message or ''}")


def _job(api: ApiStore, job_id: int) -> HttpJob:
    job = api.get_job(job_id)
    if job is None:
        raise NotFoundError(f"there is no API job {job_id}")
    return job


def _pages(api: ApiStore, job_id: int, after: int) -> Iterator[list[Event]]:
    while page := api.list_events(job_id, after, PAGE):
        yield page
        after = page[-1].event_id


def _news(api: ApiStore, job_id: int, after: int) -> Iterator[list[Event]]:
    """Events as they happen, until the job is over and all are told."""
    while True:
        over = _job(api, job_id).status.is_terminal
        page = (
            api.list_events(job_id, after, PAGE)
            if over
            else api.wait_events(job_id, after, WAIT_S, PAGE)
        )
        if page:
            yield page
            after = page[-1].event_id
        elif over:
            return


def _show(app: App, found: list[Event]) -> None:
    if app.json:
        click.echo(to_json([event.flattened() for event in found]))
        return
    for event in found:
        click.echo(_line(event))


def _json_line(event: Event) -> str:
    return json.dumps(event.flattened(), ensure_ascii=False)


def _line(event: Event) -> str:
    at = short_time(event.timestamp.isoformat())
    return one_line(f"{at}  {event.event_id:>4}  {event.event_type:<17}  {_told(event)}").rstrip()


def _told(event: Event) -> str:
    match event.payload:
        case EventType.Phase(name):
            return name
        case EventType.Progress(done, total, message):
            of = f" of {total}" if total is not None else ""
            return f"{done}{of}" + (f"  {message}" if message else "")
        case EventType.Output(name, uri, rows, size):
            return f"{name} -> {uri}  {rows} rows" + (f", {size} bytes" if size else "")
        case EventType.Violation(violations):
            return "; ".join(_violation(v) for v in violations)
        case EventType.JobFinished(status, message):
            return f"{status}" + (f": {message}" if message else "")
        case EventType.ApprovalRequired(approval_id):
            return approval_id
        case _:
            return ""


def _violation(violation: ViolationSummary) -> str:
    seen = ", ".join(repr(sample) for sample in violation.samples)
    told = f"{violation.column_name or 'columns'}: {violation.count} x {violation.violation_type}"
    return f"{told} ({seen})" if seen else told
