"""One chunk of a scan: registry, versions, pointers, tags and jobs in one transaction.

A file is in the ledger whole or not at all, so no crash leaves a version without its jobs. Every
finding names the version it was compared with; if the ledger has moved on meanwhile, the file is
left for the next scan.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import duckdb

from casparian_flow.db.columns import RowShape
from casparian_flow.db.fanout import (
    Wanted,
    enqueue,
    existing_jobs,
    manual_tags,
    merged_tags,
    rules_of_root,
)
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.records import Job
from casparian_flow.sentinel.api import ChunkResult, FileFinding
from casparian_flow.services.routing import format_tags

log = logging.getLogger(__name__)

CHUNK_FILES_MAX = 2_000
PATH_BYTES_MAX = 16_384
"""Linux takes 4,096 bytes; each byte that is not UTF-8 stands as four characters."""
_HEX = frozenset("0123456789abcdef")
_LOCATION, _VERSION = "cf_file_location", "cf_file_version"

_NEW_LOCATIONS = RowShape(
    _LOCATION,
    {
        "id": "BIGINT",
        "source_root_id": "BIGINT",
        "rel_path": "VARCHAR",
        "filename": "VARCHAR",
        "current_version_id": "BIGINT",
        "discovered_time": "TIMESTAMP",
        "last_seen_time": "TIMESTAMP",
        "dev": "BIGINT",
        "ino": "BIGINT",
        "size": "BIGINT",
        "mtime_ns": "BIGINT",
        "ctime_ns": "BIGINT",
        "hashed_at_us": "BIGINT",
    },
)
_CHANGED_LOCATIONS = RowShape(
    _LOCATION,
    {
        "id": "BIGINT",
        "current_version_id": "BIGINT",
        "dev": "BIGINT",
        "ino": "BIGINT",
        "size": "BIGINT",
        "mtime_ns": "BIGINT",
        "ctime_ns": "BIGINT",
        "hashed_at_us": "BIGINT",
    },
)
_NEW_VERSIONS = RowShape(
    _VERSION,
    {
        "id": "BIGINT",
        "location_id": "BIGINT",
        "seq": "INTEGER",
        "content_hash": "VARCHAR",
        "size_bytes": "BIGINT",
        "modified_time": "TIMESTAMP",
        "detected_at": "TIMESTAMP",
        "applied_tags": "VARCHAR",
        "dev": "BIGINT",
        "ino": "BIGINT",
        "mtime_ns": "BIGINT",
        "ctime_ns": "BIGINT",
    },
)


class _Place(NamedTuple):
    """A location as the ledger has it."""

    location_id: int
    version_id: int
    content_hash: str
    seq: int
    deleted: bool


@dataclass(slots=True)
class _Sorted:
    """What is to be done with the findings of a chunk."""

    new_files: list[FileFinding] = field(default_factory=list)
    new_contents: list[tuple[FileFinding, _Place]] = field(default_factory=list)
    same_contents: list[tuple[FileFinding, _Place]] = field(default_factory=list)
    moved: list[tuple[FileFinding, _Place]] = field(default_factory=list)
    unread: list[tuple[FileFinding, _Place | None]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def commit_chunk(
    ledger: Ledger,
    root_id: int,
    findings: Sequence[FileFinding],
    *,
    now_us: int,
) -> tuple[ChunkResult, list[Job]]:
    """Record up to CHUNK_FILES_MAX files in one transaction.

    Args:
        now_us: wall clock, microseconds.

    Returns:
        Counts, and the new jobs for the broker.

    Raises:
        UsageError: a finding cannot be right; nothing is recorded.
        LedgerUnavailableError: the commit failed; nothing is recorded.
    """
    if len(findings) > CHUNK_FILES_MAX:
        raise UsageError(f"a chunk holds at most {CHUNK_FILES_MAX} files, got {len(findings)}")
    for finding in findings:
        _check(finding)
    origins = [f.renamed_from for f in findings if f.renamed_from]
    if len({f.rel_path for f in findings}) != len(findings) or len(set(origins)) != len(origins):
        raise UsageError("a chunk names a file twice")
    if not findings:
        return ChunkResult(), []
    if not any(f.expected_version_id or f.renamed_from for f in findings):
        # All new, it seems. Looking for their paths costs a walk over all locations; the unique
        # index finds an exception as surely.
        try:
            return _commit(ledger, root_id, findings, now_us, known=False)
        except duckdb.ConstraintException:
            log.debug("a chunk of new files has known ones among them")
    return _commit(ledger, root_id, findings, now_us, known=True)


def _commit(
    ledger: Ledger, root_id: int, findings: Sequence[FileFinding], now_us: int, *, known: bool
) -> tuple[ChunkResult, list[Job]]:
    ledger.fold()
    with ledger.transaction() as connection:
        work = _sort(findings, _places(connection, root_id, findings) if known else {})
        writer = _Writer(ledger, connection, root_id, now_us)
        writer.write(work)
        jobs = enqueue(ledger, connection, writer.wanted, now_us)
    result = ChunkResult(
        locations=writer.locations,
        versions=writer.versions,
        jobs=len(jobs),
        unchanged=len(work.same_contents),
        renamed=len(work.moved),
        conflicts=work.conflicts,
    )
    return result, jobs


def check_rel_path(path: str) -> str:
    """A relative path fit for the ledger.

    Raises:
        UsageError: it is absolute, leaves the root, or cannot be a path.
    """
    parts = path.split("/")
    if (
        not path
        or len(path) > PATH_BYTES_MAX
        or "\0" in path
        or any(part in {"", ".", ".."} for part in parts)
    ):
        raise UsageError(f"{path[:200]!r} is no path relative to a source root")
    return path


def _check(finding: FileFinding) -> None:
    check_rel_path(finding.rel_path)
    if finding.renamed_from:
        check_rel_path(finding.renamed_from)
    digest = finding.content_hash
    if digest and (len(digest) != 64 or not _HEX.issuperset(digest)):
        raise UsageError(f"{finding.rel_path!r}: {digest[:80]!r} is no SHA-256 in hex")
    numbers = (*finding.signature, finding.hashed_at_us)
    if finding.signature[2] < 0 or not all(-(1 << 63) <= n < 1 << 63 for n in numbers):
        raise UsageError(f"{finding.rel_path!r}: signature out of range")


def _places(
    connection: duckdb.DuckDBPyConnection, root_id: int, findings: Sequence[FileFinding]
) -> dict[str, _Place]:
    paths = {f.rel_path for f in findings} | {f.renamed_from for f in findings if f.renamed_from}
    rows = connection.execute(
        f"""
        SELECT l.rel_path, l.id, coalesce(l.current_version_id, 0), coalesce(v.content_hash, ''),
               coalesce(v.seq, 0), l.deleted_at IS NOT NULL
        FROM {_LOCATION} l LEFT JOIN {_VERSION} v ON v.id = l.current_version_id
        WHERE l.source_root_id = $1 AND l.rel_path IN (SELECT unnest($2::VARCHAR[]))
        """,
        [root_id, list(paths)],
    ).fetchall()
    return {row[0]: _Place(*row[1:]) for row in rows}


def _sort(findings: Sequence[FileFinding], places: dict[str, _Place]) -> _Sorted:
    work = _Sorted()
    for finding in findings:
        place = places.get(finding.rel_path)
        origin = places.get(finding.renamed_from) if finding.renamed_from else None
        if not finding.content_hash:
            work.unread.append((finding, place))
        elif finding.renamed_from and place is None:
            moves = (
                origin is not None
                and not origin.deleted
                and origin.version_id == finding.expected_version_id
                and origin.content_hash == finding.content_hash
            )
            if moves and origin is not None:
                work.moved.append((finding, origin))
            else:
                # Same inode and times, other bytes: a file of its own.
                work.new_files.append(finding)
        elif place is None:
            _sort_new(work, finding)
        elif not _expected(finding, place):
            work.conflicts.append(finding.rel_path)
        elif place.version_id and place.content_hash == finding.content_hash:
            work.same_contents.append((finding, place))
        else:
            work.new_contents.append((finding, place))
    return work


def _sort_new(work: _Sorted, finding: FileFinding) -> None:
    if finding.expected_version_id:
        work.conflicts.append(finding.rel_path)
    else:
        work.new_files.append(finding)


def _expected(finding: FileFinding, place: _Place) -> bool:
    if finding.renamed_from:
        # Another file moved to where a deleted one was: that place has a history of its own.
        return place.deleted
    if place.deleted:
        # Scout is not told of deleted locations; the file came back.
        return finding.expected_version_id in {0, place.version_id}
    return place.version_id == finding.expected_version_id


@dataclass(slots=True)
class _Writer:
    """Writes one chunk's work within the open transaction."""

    ledger: Ledger
    connection: duckdb.DuckDBPyConnection
    root_id: int
    now_us: int
    locations: int = 0
    versions: int = 0
    wanted: list[Wanted] = field(default_factory=list)

    def write(self, work: _Sorted) -> None:
        versioned = len(work.new_files) + len(work.new_contents)
        version_ids = iter(self.ledger.next_ids(_VERSION, versioned))
        unknown = [f for f, place in work.unread if place is None]
        location_ids = iter(self.ledger.next_ids(_LOCATION, len(work.new_files) + len(unknown)))
        self._register([*work.new_files, *(f for f, _ in work.new_contents)])
        fresh: list[tuple[FileFinding, int, int, int]] = []
        new_rows = []
        for finding in work.new_files:
            location_id, version_id = next(location_ids), next(version_ids)
            new_rows.append(self._location_row(finding, location_id, version_id))
            fresh.append((finding, location_id, version_id, 1))
        new_rows.extend(self._unread_row(finding, next(location_ids)) for finding in unknown)
        changed = [
            _changed_row(finding, place.location_id, place.version_id)
            for finding, place in (*work.same_contents, *work.moved)
        ]
        for finding, place in work.new_contents:
            version_id = next(version_ids)
            changed.append(_changed_row(finding, place.location_id, version_id))
            fresh.append((finding, place.location_id, version_id, place.seq + 1))
        _NEW_LOCATIONS.insert(self.connection, new_rows)
        self._update(changed)
        self._rename(work.moved)
        self._add_versions(fresh)
        self._route_moved(work.moved)
        self._see([place.location_id for _, place in work.unread if place is not None])
        self.locations, self.versions = len(new_rows), len(fresh)

    def _register(self, findings: Sequence[FileFinding]) -> None:
        sizes = {f.content_hash: f.signature[2] for f in findings}
        if not sizes:
            return
        self.connection.execute(
            """
            INSERT INTO cf_file_hash_registry (content_hash, first_seen, size_bytes)
            SELECT n.content_hash, make_timestamp($3), n.size_bytes
            FROM (SELECT unnest($1::VARCHAR[]) AS content_hash, unnest($2::BIGINT[]) AS size_bytes)
                 n
            ON CONFLICT DO NOTHING
            """,
            [list(sizes), list(sizes.values()), self.now_us],
        )

    def _location_row(
        self, finding: FileFinding, location_id: int, version_id: int | None
    ) -> tuple[object, ...]:
        path = finding.rel_path
        return (
            location_id,
            self.root_id,
            path,
            path.rpartition("/")[2],
            version_id,
            self.now_us,
            self.now_us,
            *finding.signature,
            finding.hashed_at_us,
        )

    def _unread_row(self, finding: FileFinding, location_id: int) -> tuple[object, ...]:
        return self._location_row(finding, location_id, None)

    def _update(self, rows: Sequence[tuple[object, ...]]) -> None:
        if not rows:
            return
        batch = _CHANGED_LOCATIONS.batch(zip(*rows, strict=True))
        self.connection.execute(
            f"""
            UPDATE {_LOCATION} l SET
                current_version_id = b.current_version_id, dev = b.dev, ino = b.ino,
                size = b.size, mtime_ns = b.mtime_ns, ctime_ns = b.ctime_ns,
                hashed_at_us = b.hashed_at_us, last_seen_time = make_timestamp($1),
                deleted_at = NULL
            FROM batch b WHERE l.id = b.id
            """,
            [self.now_us],
        )
        del batch

    def _rename(self, moved: Sequence[tuple[FileFinding, _Place]]) -> None:
        """Give a location its new path; it keeps its id, and with it versions, tags and outputs."""
        if not moved:
            return
        self.connection.execute(
            f"""
            UPDATE {_LOCATION} l SET
                rel_path = n.rel_path, filename = n.filename, renamed_from = n.renamed_from
            FROM (SELECT unnest($1::BIGINT[]) AS id, unnest($2::VARCHAR[]) AS rel_path,
                         unnest($3::VARCHAR[]) AS filename, unnest($4::VARCHAR[]) AS renamed_from) n
            WHERE l.id = n.id
            """,
            [
                [place.location_id for _, place in moved],
                [f.rel_path for f, _ in moved],
                [f.rel_path.rpartition("/")[2] for f, _ in moved],
                [f.renamed_from for f, _ in moved],
            ],
        )

    def _see(self, location_ids: list[int]) -> None:
        if location_ids:
            self.connection.execute(
                f"UPDATE {_LOCATION} SET last_seen_time = make_timestamp($2) "
                "WHERE id IN (SELECT unnest($1::BIGINT[]))",
                [location_ids, self.now_us],
            )

    def _add_versions(self, fresh: Sequence[tuple[FileFinding, int, int, int]]) -> None:
        rules = rules_of_root(self.connection, self.root_id)
        manual = manual_tags(self.connection, [place for _, place, _, seq in fresh if seq > 1])
        rows = []
        for finding, location_id, version_id, seq in fresh:
            tags = merged_tags(rules.tags(finding.rel_path), manual.get(location_id))
            self.wanted.extend(Wanted(version_id, match) for match in rules.takers(tags))
            dev, ino, size, mtime_ns, ctime_ns = finding.signature
            rows.append(
                (
                    version_id,
                    location_id,
                    seq,
                    finding.content_hash,
                    size,
                    mtime_ns // 1_000,
                    self.now_us,
                    format_tags(tags),
                    dev,
                    ino,
                    mtime_ns,
                    ctime_ns,
                )
            )
        _NEW_VERSIONS.insert(self.connection, rows)

    def _route_moved(self, moved: Sequence[tuple[FileFinding, _Place]]) -> None:
        """A moved file is done again only by plugins that have not had this version."""
        if not moved:
            return
        rules = rules_of_root(self.connection, self.root_id)
        manual = manual_tags(self.connection, [place.location_id for _, place in moved])
        done = {
            (version, plugin)
            for version, plugin, _ in existing_jobs(
                self.connection, [place.version_id for _, place in moved]
            )
        }
        for finding, place in moved:
            tags = merged_tags(rules.tags(finding.rel_path), manual.get(place.location_id))
            self.wanted.extend(
                Wanted(place.version_id, match)
                for match in rules.takers(tags)
                if (place.version_id, match.plugin) not in done
            )


def _changed_row(
    finding: FileFinding, location_id: int, version_id: int | None
) -> tuple[object, ...]:
    return (location_id, version_id, *finding.signature, finding.hashed_at_us)
