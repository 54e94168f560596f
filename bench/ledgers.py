"""Ledgers filled for a purpose, faster than a scan would: by SQL, in bulk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from bench.harness import check
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.services.scout import scan
from casparian_flow.trust.bundle import make_bundle, pack
from casparian_flow.trust.gatekeeper_lists import Profile
from casparian_flow.trust.policy import TrustPolicy
from casparian_flow.trust.rules import TrustRules

PLUGIN = "benchmark"
NOOP_SOURCE = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", subscriptions=["text"])

class Handler(BasePlugin):
    def execute(self, file_path):
        return None
"""
MEMORY_LIMIT_MB = 4_096
"""For filling; what is measured runs under the ledger's own default."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """A ledger with one source root and one plugin."""

    database: Path
    root_id: int
    manifest_id: int


def wire(
    database: Path, root: Path, source: str = NOOP_SOURCE, *, ignore: tuple[str, ...] = ()
) -> Wiring:
    """Make a ledger that knows the source root and the plugin, but no file."""
    root.mkdir(parents=True, exist_ok=True)
    with LocalControl.open(database, trust=unsigned_rules, trials=False) as control:
        row = control.add_source(str(root), settle_seconds=0.0, ignore=ignore)
        deploy(control, source)
        (plugin,) = control.list_plugins()
    return Wiring(database, int(row["id"]), int(plugin["id"]))


def scanned(database: Path, root: Path, source: str = NOOP_SOURCE) -> Path:
    """Make a ledger that has seen the files under `root` before the plugin was deployed."""
    with LocalControl.open(database, trust=unsigned_rules, trials=False) as control:
        row = control.add_source(str(root), settle_seconds=0.0)
        report = scan(int(row["id"]), control)
        check(not report.problems, f"scan: {report.problems}")
        deploy(control, source)
    return database


def unsigned_rules() -> TrustRules:
    """Measurements are about the flow; their plugins are unsigned and unread."""
    return TrustRules(TrustPolicy(allow_unsigned=True), Profile.OFF)


def deploy(control: LocalControl, source: str) -> None:
    control.deploy(pack(make_bundle(PLUGIN, "1.0.0", source)))


def add_versions(wiring: Wiring, files: int, *, versions: int = 1) -> None:
    """Record `files` files that nobody can read, `versions` of each, as scans would have."""
    now_us = SystemClock().now().wall_us
    with _open(wiring.database) as ledger, ledger.transaction() as connection:
        locations = ledger.next_ids("cf_file_location", files)
        ids = ledger.next_ids("cf_file_version", files * versions)
        connection.execute(
            """
                INSERT INTO cf_file_location (id, source_root_id, rel_path, filename,
                    current_version_id, discovered_time, last_seen_time, dev, ino, size, mtime_ns,
                    ctime_ns, hashed_at_us)
                SELECT $1 + i, $2, format('folder{:04}/file{:07}.txt', i % 2000, i),
                       format('file{:07}.txt', i), $3 + (i + 1) * $4 - 1, make_timestamp($5),
                       make_timestamp($5), 1, 1000 + i, 10, 5, 5, $5
                FROM range($6) r(i)
                """,
            [locations.start, wiring.root_id, ids.start, versions, now_us, files],
        )
        connection.execute(
            """
                INSERT INTO cf_file_version (id, location_id, seq, content_hash, size_bytes,
                    modified_time, detected_at, applied_tags, dev, ino, mtime_ns, ctime_ns)
                SELECT $1 + i, $2 + i // $3, 1 + i % $3, sha256(i::VARCHAR), 10,
                       make_timestamp($4), make_timestamp($4), 'text', 1, 1000 + i // $3, 5, 5
                FROM range($5) r(i)
                """,
            [ids.start, locations.start, versions, now_us, files * versions],
        )
        connection.execute(
            "INSERT INTO cf_file_hash_registry SELECT sha256(i::VARCHAR), make_timestamp($1), "
            "10 FROM range($2) r(i)",
            [now_us, files * versions],
        )


def add_jobs(wiring: Wiring, queued: int, *, completed: int = 0) -> None:
    """Enqueue a job for each of the first versions; the `completed` first ones are done."""
    now_us = SystemClock().now().wall_us
    count = completed + queued
    with _open(wiring.database) as ledger:
        jobs = ledger.enqueue_bulk(job_table(count, wiring.manifest_id))
        if completed:
            with ledger.transaction() as connection:
                connection.execute(
                    "UPDATE cf_processing_queue SET status = 'COMPLETED', attempt = 1, "
                    "completion_status = 'SUCCESS', claim_time = make_timestamp($1), "
                    "end_time = make_timestamp($1), lease_token = format('{:s}-1-{:d}-1', $2, id) "
                    "WHERE id < $3",
                    [now_us, ledger.ledger_id, jobs.start + completed],
                )


def job_table(count: int, manifest_id: int) -> pa.Table:
    """Columns for `Ledger.enqueue_bulk`: one job for each of the versions 1, 2, 3 …"""
    return pa.table(
        {
            "plugin_name": pa.array([PLUGIN]).take(pa.array([0] * count, pa.int32())),
            "file_version_id": pa.array(range(1, count + 1), pa.int64()),
            "plugin_manifest_id": pa.array([manifest_id]).take(pa.array([0] * count, pa.int32())),
        }
    )


def copy(database: Path, target: Path) -> Path:
    """Copy a closed ledger with its side files, so that every round begins alike."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".wal", ".hwm"):
        source = database.with_name(database.name + suffix)
        if source.exists():
            shutil.copyfile(source, target.with_name(target.name + suffix))
    return target


def _open(database: Path) -> Ledger:
    return Ledger.open(database, clock=SystemClock(), memory_limit_mb=MEMORY_LIMIT_MB)
