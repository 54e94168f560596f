"""Scout: finds out which files of a source root are new, changed, moved or gone.

    walk ─ compare with the inventory ─┬─ unchanged
                                       ├─ stood still ──────── hash ── chunk ── commit
                                       └─ young ── wait ── stood still? ── hash ── chunk ── commit
    what the walk did not meet ─ moved? ─ gone? ── finish

A file counts as unchanged if its signature is the recorded one and the record is not racy; any
difference leads to a hash, and only another hash to a version. A file is read once it has stood
still for the settle time. Conclusions from absence (deleted, renamed) are drawn only below
directories that were listed in full.
"""

import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import CasparianError, ConflictError, UsageError
from casparian_flow.domain.paths import text_to_path
from casparian_flow.domain.signature import Signature, signature_of
from casparian_flow.sentinel.api import ControlApi, FileFinding, Row, ScanReport
from casparian_flow.services.hashing import ChangedError, Reading
from casparian_flow.services.ignore import compile_rules
from casparian_flow.services.known import NO_ROW, Known
from casparian_flow.services.scan_hashing import Candidate, Hasher, Outcome
from casparian_flow.services.walk import Listing, WalkNotes, walk

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from casparian_flow.db.models import SourceRoot

log = logging.getLogger(__name__)

CHUNK_FILES = 2_000
CHUNK_PATH_BYTES = 4 << 20
DELETIONS_MAX_BYTES = 8 << 20
"""What one request carries; further deletions are recorded by the next scan."""
PROBLEMS_MAX = 1_000
DEFAULT_SETTLE_S = 2.0
SETTLE_MARGIN_S = 0.02
"""File timestamps come from a clock that ticks every few milliseconds."""
BUSY_WAIT_S = 30.0
BUSY_POLL_S = 0.1

Progress = Callable[[int, int], None]
"""Called with (files done, files found so far)."""
Observed = dict[str, tuple[Signature, float]]
"""Young files of earlier rounds: path → signature and when, on the monotonic clock, it was new."""


def scan(
    root: Row | int,
    control: ControlApi,
    *,
    rehash: bool = False,
    wait_for_settle: bool = True,
    progress: Progress | None = None,
    settle_seconds: float | None = None,
    force: Collection[str] = (),
    observed: Observed | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
    threads: int = 0,
) -> ScanReport:
    """Look through one source root and record what is new.

    Args:
        root: id of the source root, or its row.
        rehash: read every file, also those that look unchanged.
        wait_for_settle: wait up to the settle time for files that changed just now; without it
            they are reported as unsettled and taken by a later scan.
        settle_seconds: for roots without a value of their own; 2 by default.
        force: rel_paths to read even if they look unchanged.
        observed: kept by the caller between scans that do not wait, so that a file whose
            timestamps are in the future settles too.
        stop: when set, the scan ends early and concludes nothing from absence.
        threads: for hashing; 0 chooses.

    Raises:
        ConflictError: another scan of this root is under way and did not end in time.
        NotFoundError: no such source root.
        LedgerError: a commit failed; what was committed before it stands.
    """
    clock = clock or SystemClock()
    started = clock.now().mono
    stop = stop or threading.Event()
    root_id = int(root if isinstance(root, int) else root["id"])
    begin = _begin(control, root_id, stop, clock, patient=wait_for_settle)
    scan_id = int(begin["scan_id"])
    settle = begin.get("settle_seconds")
    settle = (
        DEFAULT_SETTLE_S
        if settle is None and settle_seconds is None
        else (settle_seconds if settle is None else settle)
    )
    report = ScanReport(root_id)
    try:
        known = Known.read(control.inventory(root_id))
        run = _Scan(
            control=control,
            begin=begin,
            known=known,
            report=report,
            clock=clock,
            stop=stop,
            settle_us=int(float(settle or 0) * 1e6),
            rehash=rehash,
            force=frozenset(force),
            wait=wait_for_settle,
            observed={} if observed is None else observed,
            progress=progress or (lambda _done, _total: None),
        )
        deleted = run.run(threads)
    except BaseException:
        report.complete = False
        _give_up(control, root_id, scan_id, report)
        raise
    if len(report.problems) > PROBLEMS_MAX:
        rest = len(report.problems) - PROBLEMS_MAX
        report.problems[PROBLEMS_MAX:] = [f"… and {rest} more"]
    report.deleted = len(deleted)
    report.seconds = clock.now().mono - started
    control.finish_scan(root_id, scan_id, deleted, report)
    log.debug(
        "scanned source root %d: %d files, %d new versions, %d jobs in %.2f s",
        root_id,
        report.files,
        report.versions,
        report.jobs,
        report.seconds,
    )
    return report


def report_row(report: ScanReport) -> Row:
    """A report as a row for people and JSON."""
    row = asdict(report)
    row["seconds"] = round(report.seconds, 3)
    return row


def _begin(
    control: ControlApi, root_id: int, stop: threading.Event, clock: Clock, *, patient: bool
) -> Row:
    deadline = clock.now().mono + (BUSY_WAIT_S if patient else 0.0)
    while True:
        try:
            return control.begin_scan(root_id)
        except ConflictError:
            if clock.now().mono >= deadline or stop.wait(BUSY_POLL_S):
                raise


def _give_up(control: ControlApi, root_id: int, scan_id: int, report: ScanReport) -> None:
    try:
        control.finish_scan(root_id, scan_id, [], report)
    except CasparianError as error:
        # The error that ended the scan is the one to tell; this one only delays the next scan.
        report.problems.append(f"the scan could not be closed: {error}")


class Scout:
    """Scans the source roots that a SQLAlchemy session holds.

    Args:
        db: a session of `db.access.get_engine`'s engine.
        control: how to reach the control plane; by default the running Sentinel of the session's
            database, else the database itself in this process.
    """

    def __init__(self, db: "Session", control: ControlApi | None = None) -> None:
        self._db = db
        self._control = control

    def scan_source(self, root: "SourceRoot", *, rehash: bool = False) -> ScanReport:
        """Look through one root once, waiting for files that are still young.

        What the session has pending is committed first, so that the scan sees it; afterwards
        the session reads anew.

        Raises:
            UsageError: the root is in no ledger.
            CasparianError: as `scan`.
        """
        self._db.commit()
        root_id = root.id
        if root_id is None:
            raise UsageError(
                "the source root is not in the ledger", hint="Add it to the session first."
            )
        # Ends the read that fetched the id, so that the session holds nothing back.
        self._db.commit()
        with self._connected() as control:
            report = scan(root_id, control, rehash=rehash)
        self._db.expire_all()
        return report

    @contextmanager
    def _connected(self) -> Iterator[ControlApi]:
        if self._control is not None:
            yield self._control
            return
        from casparian_flow.sentinel.control import connect

        with connect(self._db.get_bind().engine.url.database or "") as control:
            yield control


@dataclass(slots=True)
class _Young:
    candidate: Candidate
    deadline: float
    """On the monotonic clock: it has stood still long enough if nothing changes until then."""


@dataclass(slots=True)
class _Scan:
    """One run over one root; see the module's text for its course."""

    control: ControlApi
    begin: Mapping[str, Any]
    known: Known
    report: ScanReport
    clock: Clock
    stop: threading.Event
    settle_us: int
    rehash: bool
    force: frozenset[str]
    wait: bool
    observed: Observed
    progress: Progress
    notes: WalkNotes = field(default_factory=WalkNotes)
    trusted: list[int | None] = field(default_factory=list)
    """See Known.trustworthy_mtimes."""
    young: list[_Young] = field(default_factory=list)
    moved: list[Candidate] = field(default_factory=list)
    """New files with the inode of a known one: read after the walk, when absence is known."""
    findings: list[FileFinding] = field(default_factory=list)
    findings_bytes: int = 0
    held_back: set[int] = field(default_factory=set)
    """Rows not to be marked deleted: a file with their inode has not settled yet."""
    claimed: set[int] = field(default_factory=set)
    confirmed: bool = False
    """A known file was found with its recorded content."""
    waited: bool = False
    walked: bool = False

    def run(self, threads: int) -> list[str]:
        """Scan, commit, and return the paths to be marked deleted."""
        self._distrust()
        root = text_to_path(str(self.begin["path"]))
        rules = compile_rules(self.begin.get("ignore") or (), self.begin.get("include") or ())
        self.report.problems.extend(rules.problems)
        self.report.problems.extend(self.begin.get("overlaps") or ())
        with Hasher(root, self.clock, threads) as hasher:
            for listing in walk(root, rules, self.notes):
                if self.stop.is_set():
                    break
                self._take_all(self._compare(listing, hasher), hasher)
            else:
                self.walked = True
            self._take_all(hasher.drain(), hasher)
            for candidate in self.moved:
                self._take_all(hasher.add(candidate), hasher)
            self._take_all(hasher.drain(), hasher)
            self._settle(hasher)
            self._flush()
            self.report.problems.extend(self.notes.problems)
            self.report.ignored = self.notes.ignored
            return self._gone(hasher)

    def _distrust(self) -> None:
        """Decide which files' signatures prove anything."""
        if self.rehash:
            self.trusted = [None] * (len(self.known) + 1)
            return
        self.trusted = self.known.trustworthy_mtimes(self.clock.now().wall_us)
        for path in self.force:
            row = self.known.unseen.get(path, NO_ROW)
            if row != NO_ROW:
                self.trusted[row] = None

    # -- the walk -----------------------------------------------------------------------------

    def _compare(self, listing: Listing, hasher: Hasher) -> Iterable[Outcome]:
        known, mtimes, prefix = self.known, self.trusted, listing.prefix
        ctimes, inos, sizes, devs = known.ctimes, known.inos, known.sizes, known.devs
        take = known.unseen.pop
        rows = [take(prefix + name, NO_ROW) for name in listing.names]
        unchanged = 0
        for i, (row, found) in enumerate(zip(rows, listing.stats, strict=True)):
            if (
                mtimes[row] == found.st_mtime_ns
                and ctimes[row] == found.st_ctime_ns
                and inos[row] == found.st_ino
                and sizes[row] == found.st_size
                and devs[row] == found.st_dev
            ):
                unchanged += 1
            elif stat.S_ISREG(found.st_mode):
                path = prefix + listing.names[i]
                yield from self._consider(path, row, signature_of(found), hasher)
        self.report.files += len(listing.names)
        self.report.unchanged += unchanged
        self._tell()

    def _consider(
        self, path: str, row: int, signature: Signature, hasher: Hasher
    ) -> Iterable[Outcome]:
        if self.trusted[row] == signature[3] and self.known.signature(row) == signature:
            # Numbers beyond 63 bits look different until they are brought into range.
            self.report.unchanged += 1
            return ()
        candidate = Candidate(path, row, signature)
        if not self._has_settled(candidate):
            return ()
        if row == NO_ROW and not self.walked and self.known.moved_from(signature):
            self.moved.append(candidate)
            return ()
        return hasher.add(candidate)

    def _has_settled(self, candidate: Candidate) -> bool:
        """Whether the file has stood still long enough; if not, it joins the young ones."""
        now = self.clock.now()
        age_us = now.wall_us - candidate.signature[4] // 1_000
        if age_us >= self.settle_us:
            self.observed.pop(candidate.path, None)
            return True
        before = self.observed.get(candidate.path)
        since = before[1] if before and before[0] == candidate.signature else now.mono
        if (now.mono - since) * 1e6 >= self.settle_us:
            self.observed.pop(candidate.path, None)
            return True
        self.observed[candidate.path] = (candidate.signature, since)
        # A change time in the future says nothing about age: count from when it was seen.
        remaining_us = self.settle_us - max(age_us, 0)
        deadline = now.mono + remaining_us / 1e6 + SETTLE_MARGIN_S
        self.young.append(_Young(candidate, deadline))
        return False

    # -- reading and committing ---------------------------------------------------------------

    def _take_all(self, outcomes: Iterable[Outcome], hasher: Hasher) -> None:
        for candidate, result in outcomes:
            if isinstance(result, Reading):
                self._add(self._finding(candidate, result, hasher))
            else:
                self._not_read(candidate, result, hasher)
            self._tell()

    def _finding(self, candidate: Candidate, reading: Reading, hasher: Hasher) -> FileFinding:
        row = candidate.row
        finding = FileFinding(
            rel_path=candidate.path,
            signature=reading.signature,
            content_hash=reading.content_hash,
            hashed_at_us=reading.hashed_at_us,
            expected_version_id=self.known.version_ids[row] if row >= 0 else 0,
        )
        if row == NO_ROW:
            self._link_to_moved(finding, hasher)
        return finding

    def _link_to_moved(self, finding: FileFinding, hasher: Hasher) -> None:
        if not self.walked or not self._may_conclude():
            return
        for row in self.known.moved_from(finding.signature):
            if row not in self.claimed and self._is_gone(row, hasher):
                self.claimed.add(row)
                finding.renamed_from = self.known.paths[row]
                finding.expected_version_id = self.known.version_ids[row]
                return

    def _not_read(
        self, candidate: Candidate, error: OSError | ChangedError, hasher: Hasher
    ) -> None:
        if isinstance(error, FileNotFoundError):
            self.report.problems.append(f"{candidate.path}: vanished while it was scanned")
        elif isinstance(error, OSError):
            self.report.problems.append(
                f"{candidate.path}: cannot be read: {error.strerror or error}"
            )
        else:
            self._changed_meanwhile(candidate, hasher)

    def _changed_meanwhile(self, candidate: Candidate, hasher: Hasher) -> None:
        signature = _regular(hasher.path(candidate.path))
        if signature is None:
            self.report.problems.append(f"{candidate.path}: replaced while it was scanned")
            return
        changed = Candidate(candidate.path, candidate.row, signature)
        self.observed.pop(candidate.path, None)
        if self.waited or self._has_settled(changed):
            # Changing under the reader and yet not young: a clock that cannot be trusted.
            self._report_unsettled(changed)

    def _add(self, finding: FileFinding) -> None:
        self.findings.append(finding)
        self.findings_bytes += len(finding.rel_path) + len(finding.renamed_from)
        if len(self.findings) >= CHUNK_FILES or self.findings_bytes >= CHUNK_PATH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.findings:
            return
        chunk, self.findings, self.findings_bytes = self.findings, [], 0
        result = self.control.commit_chunk(self.report.root_id, int(self.begin["scan_id"]), chunk)
        self.report.versions += result.versions
        self.report.jobs += result.jobs
        self.report.unchanged += result.unchanged
        self.report.renamed += result.renamed
        self.confirmed = self.confirmed or result.unchanged > 0
        self.report.problems.extend(
            f"{path}: recorded by someone else meanwhile; the next scan looks again"
            for path in result.conflicts
        )

    def _tell(self) -> None:
        waiting = len(self.young) + len(self.moved)
        self.progress(max(self.report.files - waiting, 0), self.report.files)

    # -- files that changed just now ----------------------------------------------------------

    def _settle(self, hasher: Hasher) -> None:
        self.waited = True
        young, self.young = self.young, []
        if young and self.wait:
            deadline = max(y.deadline for y in young)
            self.stop.wait(max(deadline - self.clock.now().mono, 0.0))
        for item in young:
            candidate = item.candidate
            signature = _regular(hasher.path(candidate.path))
            if signature is None:
                self.report.problems.append(f"{candidate.path}: vanished while it was scanned")
            elif signature != candidate.signature or self.clock.now().mono < item.deadline:
                self._report_unsettled(Candidate(candidate.path, candidate.row, signature))
            else:
                self.observed.pop(candidate.path, None)
                self._take_all(hasher.add(candidate), hasher)
        self._take_all(hasher.drain(), hasher)
        self._tell()

    def _report_unsettled(self, candidate: Candidate) -> None:
        self.report.unsettled += 1
        if self.wait:
            self.report.problems.append(f"{candidate.path}: still being written; left for later")
        if candidate.row == NO_ROW:
            self.held_back.update(self.known.moved_from(candidate.signature))

    # -- absence ------------------------------------------------------------------------------

    def _gone(self, hasher: Hasher) -> list[str]:
        """The paths that are surely gone."""
        self._accept_device()
        unseen = self.known.unseen
        if not self.walked:
            self.report.complete = False
            return []
        self.report.complete = not self.notes.incomplete
        if not unseen or not self._may_conclude():
            return []
        gone: list[str] = []
        size = 0
        for path, row in unseen.items():
            if row in self.claimed or row in self.held_back or not self._is_gone(row, hasher):
                continue
            size += len(path.encode())
            if size > DELETIONS_MAX_BYTES:
                self.report.problems.append("more deletions are recorded by the next scan")
                break
            gone.append(path)
        return gone

    def _may_conclude(self) -> bool:
        """Whether absence under this root means anything."""
        return not (self.notes.root_failed or "" in self.notes.empty or self._other_device())

    def _other_device(self) -> bool:
        recorded = int(self.begin.get("st_dev") or 0)
        return bool(recorded and self.notes.root_device and recorded != self.notes.root_device)

    def _accept_device(self) -> None:
        """Say why nothing is concluded, and settle which device is this root's own."""
        if "" in self.notes.empty and len(self.known):
            self.report.problems.append(
                f"the folder is suddenly empty: none of its {len(self.known)} known files is "
                "marked deleted; is its disk mounted?"
            )
        if not self._other_device():
            self.report.st_dev = self.notes.root_device
            return
        line = "the folder is on another device than before: nothing is marked deleted"
        if self.confirmed:
            # Devices are renumbered, by a reboot for instance; the content proves the tree.
            self.report.st_dev = self.notes.root_device
            self.report.problems.append(f"{line} this time; its files are the known ones")
        else:
            self.report.problems.append(
                f"{line}; is the right disk mounted? 'casparian source add' accepts it"
            )

    def _is_gone(self, row: int, hasher: Hasher) -> bool:
        path = self.known.paths[row]
        if _lies_under(path, self.notes.unlisted) or self._was_unmounted(path, row):
            return False
        try:
            found = os.lstat(hasher.path(path))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return not stat.S_ISREG(found.st_mode)

    def _was_unmounted(self, path: str, row: int) -> bool:
        """Whether a directory above is empty now and another device was there before."""
        if not self.notes.empty:
            return False
        return any(
            prefix in self.notes.empty and self.notes.empty[prefix] != self.known.devs[row]
            for prefix in _prefixes(path)
        )


def _regular(path: str) -> Signature | None:
    """The signature of a regular file, None if there is none at `path`."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return signature_of(found) if stat.S_ISREG(found.st_mode) else None


def _prefixes(path: str) -> Iterable[str]:
    end = path.find("/")
    while end >= 0:
        yield path[: end + 1]
        end = path.find("/", end + 1)


def _lies_under(path: str, prefixes: Collection[str]) -> bool:
    return any(prefix in prefixes for prefix in _prefixes(path))
