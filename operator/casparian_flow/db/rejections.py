"""Deploys that were refused, kept so that `status` can say why a plugin is not there."""

import hashlib

from casparian_flow.db.ledger import Ledger

TEXT_CHARS_MAX = 4_000
SOURCE_CHARS_MAX = 1 << 20
REJECTED_MAX = 200
"""Refused versions kept; further ones are only answered to their sender."""


def record(
    ledger: Ledger, *, plugin: str, version: str, source_code: str, error: str, now_us: int
) -> None:
    """Record a refused version as REJECTED; the same one again changes nothing.

    It never stands in the way of a later deploy: only what was accepted fixes a version's bytes.

    Raises:
        LedgerUnavailableError: nothing is recorded.
    """
    plugin, version = plugin[:100] or "(unnamed)", version[:50]
    source_code = source_code[:SOURCE_CHARS_MAX]
    digest = hashlib.sha256(source_code.encode("utf-8", "surrogatepass")).hexdigest()
    with ledger.transaction() as connection:
        found = connection.execute(
            "SELECT count(*), count(*) FILTER (plugin_name = $1 AND version = $2 "
            "AND source_hash = $3) FROM cf_plugin_manifest WHERE status = 'REJECTED'",
            [plugin, version, digest],
        ).fetchone()
        if found is None or found[0] >= REJECTED_MAX or found[1]:
            return
        connection.execute(
            "INSERT INTO cf_plugin_manifest (id, plugin_name, version, source_code, source_hash, "
            "status, validation_error, created_at, artifact_hash) "
            "VALUES ($1, $2, $3, $4, $5, 'REJECTED', $6, make_timestamp($7), $8)",
            [
                ledger.next_id("cf_plugin_manifest"),
                plugin,
                version,
                source_code.encode("utf-8", "replace").decode(),
                digest,
                error[:TEXT_CHARS_MAX],
                now_us,
                # No accepted version has such a hash, so the two never collide.
                f"rejected:{digest}",
            ],
        )
