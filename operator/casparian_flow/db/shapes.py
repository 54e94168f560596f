"""Rows that the commit path inserts, and how they are made from records."""

from typing import Any

from casparian_flow.db.columns import RowShape
from casparian_flow.domain.ids import Token
from casparian_flow.domain.records import NewJob, Record

JOURNAL = RowShape(
    "cf_journal",
    {
        "seq": "BIGINT",
        "job_id": "BIGINT",
        "kind": "VARCHAR",
        "attempt": "INTEGER",
        "at_us": "BIGINT",
        "data": "VARCHAR",
    },
)

QUEUE = RowShape(
    "cf_processing_queue",
    {
        "id": "BIGINT",
        "file_version_id": "BIGINT",
        "plugin_name": "VARCHAR",
        "config_overrides": "VARCHAR",
        "status": "VARCHAR",
        "priority": "INTEGER",
        "generation": "INTEGER",
        "retry_of": "BIGINT",
        "plugin_manifest_id": "BIGINT",
        "scheduled_at": "TIMESTAMP",
        "created_at": "TIMESTAMP",
        "input_file": "VARCHAR",
        "pin": "VARCHAR",
        "rehearsal": "BIGINT",
    },
)

OUTPUT = RowShape(
    "cf_output",
    {
        "output_key": "VARCHAR",
        "slice_key": "VARCHAR",
        "order_version_seq": "INTEGER",
        "order_manifest_id": "BIGINT",
        "order_generation": "INTEGER",
        "job_id": "BIGINT",
        "token": "VARCHAR",
        "n": "INTEGER",
        "topic": "VARCHAR",
        "kind": "VARCHAR",
        "mode": "VARCHAR",
        "sink_uri": "VARCHAR",
        "root_id": "VARCHAR",
        "stage": "VARCHAR",
        "final": "VARCHAR",
        "rows": "BIGINT",
        "bytes": "BIGINT",
        "sha256": "VARCHAR",
        "granted_at": "TIMESTAMP",
    },
)

SLICE = RowShape(
    "cf_slice",
    {
        "slice_key": "VARCHAR",
        "order_version_seq": "INTEGER",
        "order_manifest_id": "BIGINT",
        "order_generation": "INTEGER",
        "output_key": "VARCHAR",
        "job_id": "BIGINT",
    },
)

LOG = RowShape("cf_job_log", {"job_id": "BIGINT", "attempt": "INTEGER", "log": "VARCHAR"})


def queue_row(item: NewJob) -> tuple[Any, ...]:
    job = item.job
    return (
        job.job_id,
        job.version_id or None,
        job.plugin,
        item.config_overrides or None,
        job.status,
        job.priority,
        job.generation,
        job.retry_of,
        job.manifest_id or None,
        job.not_before_us or None,
        job.created_us,
        None,
        job.pin or None,
        job.rehearsal,
    )


def output_rows(record: Record, token: Token) -> list[tuple[Any, ...]]:
    return [
        (
            entry.output_key,
            entry.slice_key,
            *entry.order_no,
            record.job_id,
            token,
            entry.n,
            entry.topic,
            entry.kind,
            entry.mode,
            entry.uri,
            entry.root_id,
            entry.stage,
            entry.final,
            entry.rows,
            entry.bytes,
            entry.sha256,
            record.at_us,
        )
        for entry in record.manifest
    ]
