"""Steps by which the tables of an existing ledger follow a changed schema, history and all.

A step leads from one fingerprint to the next and runs in one transaction with the note of the new
one: a ledger is always whole, before it or after it. What DuckDB's ALTER TABLE cannot do in place
(constraints over several columns) is no step; such a change goes by export and import.
"""

import logging
from typing import Final, NamedTuple

import duckdb

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """From the tables with the fingerprint `before` to those with `after`."""

    before: str
    after: str
    statements: tuple[str, ...]


def _text_column(table: str, name: str) -> tuple[str, ...]:
    """A new last column, '' in the rows that are there."""
    return (
        f"ALTER TABLE {table} ADD COLUMN {name} VARCHAR DEFAULT ''",
        f"ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL",
    )


STEPS: Final[tuple[Step, ...]] = (
    Step(
        "5bb71079323300faeb0dd464339f2758c22a91556f56a3d32844ccc1b99e38b5",
        "85492196223cb6eab8fe861c99e3a1f7c62ec833d6604637c3107b865316b934",
        (
            *_text_column("cf_source_root", "namespace"),
            *_text_column("cf_source_root", "name"),
            *_text_column("cf_routing_rule", "namespace"),
        ),
    ),
    Step(
        "85492196223cb6eab8fe861c99e3a1f7c62ec833d6604637c3107b865316b934",
        "e51c6575bd4cbf364474cc40118aa0b0a217c798ebd9cf6d92e24670e2bd8221",
        (
            """
            CREATE TABLE cf_api_plans (
                api_job_id BIGINT PRIMARY KEY,
                plan_json VARCHAR NOT NULL,
                made BIGINT NOT NULL DEFAULT 0 CHECK (made >= 0)
            )
            """,
        ),
    ),
)
"""Oldest first; the last one's `after` is the fingerprint of db/schema.py."""


def steps_from(fingerprint: str) -> tuple[Step, ...]:
    """The steps from a ledger's fingerprint to this version's; empty if there is no way."""
    for number, step in enumerate(STEPS):
        if step.before == fingerprint:
            return STEPS[number:]
    return ()


def migrate(connection: duckdb.DuckDBPyConnection, fingerprint: str) -> str:
    """Bring the tables forward as far as there are steps; returns their fingerprint then.

    Raises:
        duckdb.Error: a step failed, and changed nothing.
    """
    for step in steps_from(fingerprint):
        connection.execute("BEGIN")
        try:
            for statement in step.statements:
                connection.execute(statement)
            connection.execute(
                "UPDATE cf_meta SET value = $1 WHERE key = 'schema_fingerprint'", [step.after]
            )
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        log.info("the ledger's tables were brought from schema %.8s to %.8s", *step[:2])
        fingerprint = step.after
    return fingerprint
