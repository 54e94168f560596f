"""Deleting what is old of the API's jobs and events.

Only finished jobs lose anything, events from the first one on. What a job has lost is kept as a
number beside it, and the next free ids are noted in the ledger, so that no id is given twice.
Approvals stay: they are the record of who allowed what.
"""

from casparian_flow.db.api_state import Unit
from casparian_flow.db.api_tables import EVENTS, JOBS, PLANS, TASKS
from casparian_flow.domain.clock import utc
from casparian_flow.protocol.http_types import Cleaned

_FINISHED = "status IN ('completed', 'failed', 'cancelled')"


def clean_up(unit: Unit, job_age_us: int, event_age_us: int) -> Cleaned:
    """Delete finished jobs, with their events, and events of finished jobs, by their age.

    A job's age counts from its end.
    """
    now_us = unit.now_us()
    connection = unit.connection_for_change()
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE old_jobs AS SELECT job_id FROM {JOBS} "
        f"WHERE {_FINISHED} AND finished_at <= $1",
        [utc(max(0, now_us - job_age_us))],
    )
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE old_events AS
        SELECT job_id, max(event_id) AS removed_to FROM {EVENTS}
        WHERE "timestamp" <= $1 AND job_id IN (SELECT job_id FROM {JOBS} WHERE {_FINISHED})
          AND job_id NOT IN (SELECT job_id FROM old_jobs)
        GROUP BY job_id
        """,
        [utc(max(0, now_us - event_age_us))],
    )
    unit.ledger.keep_ids(JOBS, EVENTS)
    events = unit.change(
        f"DELETE FROM {EVENTS} e USING old_events o "
        "WHERE e.job_id = o.job_id AND e.event_id <= o.removed_to"
    )
    unit.change(
        f"UPDATE {JOBS} j SET events_removed_to = o.removed_to FROM old_events o "
        "WHERE j.job_id = o.job_id"
    )
    events += unit.change(f"DELETE FROM {EVENTS} WHERE job_id IN (SELECT job_id FROM old_jobs)")
    for table in (TASKS, PLANS):
        unit.change(f"DELETE FROM {table} WHERE api_job_id IN (SELECT job_id FROM old_jobs)")
    jobs = unit.change(f"DELETE FROM {JOBS} WHERE job_id IN (SELECT job_id FROM old_jobs)")
    connection.execute("DROP TABLE old_jobs")
    connection.execute("DROP TABLE old_events")
    unit.forget_heads()
    return Cleaned(jobs, events)
