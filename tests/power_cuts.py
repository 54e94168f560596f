"""What power loss and damage leave of a ledger's files, and the judge of what opening makes of it.

`record` runs a ledger through a few commits and keeps, after each acknowledged one, the bytes of
its write-ahead log and of its high-water mark, and what was true then. `cases` draws from them
what a disk might hold afterwards. `judge` puts one such case on disk, opens it and compares.

Run as a program it judges every n-th case and prints what went wrong as JSON:

    python power_cuts.py FOLDER SEED CASES PART PARTS
"""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ledger_kit import ManualClock, completed, granted, insert_jobs, leased, output, started

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.repair import repair
from casparian_flow.domain.errors import LedgerCorruptError

JOBS = 48
NAME = "ledger.duckdb"
SECTOR = 512
BITS = 8


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The truth after one acknowledged commit.

    Attributes:
        wal_bytes: length of the write-ahead log then; what is before never changes.
        seq: the sequence number that the mark holds.
        statuses: of the jobs 1, 2, …
    """

    wal_bytes: int
    seq: int
    statuses: tuple[str, ...]


class Kind(StrEnum):
    CUT = "the log ends within the commit that was under way"
    ZEROS = "the log has its new length, but zeros in place of its last bytes"
    SECTORS = "some sectors of the commit under way were never written"
    GARBAGE = "something else follows the last commit"
    SHORT = "the log ends before what was acknowledged"
    FLIP = "one bit of the log is flipped"
    GONE = "the log is missing"
    OLDER = "an older copy of file and log was restored"


UNDER_WAY = frozenset({Kind.CUT, Kind.ZEROS, Kind.SECTORS, Kind.GARBAGE})
"""What an honest disk may leave when power is lost: all that was acknowledged is there."""
_WEIGHTS = {
    Kind.CUT: 60,
    Kind.ZEROS: 10,
    Kind.SECTORS: 8,
    Kind.GARBAGE: 2,
    Kind.SHORT: 8,
    Kind.FLIP: 10,
    Kind.GONE: 1,
    Kind.OLDER: 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One state of the disk.

    Attributes:
        last: index of the newest acknowledged commit; its mark is on disk.
        at: offset of the damage.
        seed: of everything else that is random in it.
    """

    kind: Kind
    last: int
    at: int
    seed: int


@dataclass(slots=True)
class History:
    """A ledger's file at its last checkpoint, the whole log since, and the truths on the way."""

    file: bytes
    wal: bytes
    marks: list[bytes]
    truths: list[Acknowledged]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(self.file)
        (folder / "wal").write_bytes(self.wal)
        for number, mark in enumerate(self.marks):
            (folder / f"mark-{number}").write_bytes(mark)
        (folder / "truths.json").write_text(json.dumps([asdict(t) for t in self.truths]))

    @classmethod
    def load(cls, folder: Path) -> "History":
        truths = [
            Acknowledged(t["wal_bytes"], t["seq"], tuple(t["statuses"]))
            for t in json.loads((folder / "truths.json").read_text())
        ]
        marks = [(folder / f"mark-{n}").read_bytes() for n in range(len(truths))]
        return cls((folder / "file").read_bytes(), (folder / "wal").read_bytes(), marks, truths)


def record(folder: Path) -> History:
    """Run a ledger through commits small and large, transactions and a fold."""
    path = folder / NAME
    wal, sidecar = (path.with_name(NAME + end) for end in (".wal", ".hwm"))
    with Ledger.open(path, clock=ManualClock()) as ledger:
        ledger.begin_epoch()
        insert_jobs(ledger, JOBS)
    ledger = Ledger.open(path, clock=ManualClock())
    history = History(path.read_bytes(), b"", [], [])

    def note() -> None:
        statuses = tuple(str(ledger.status_of(i)) for i in range(1, JOBS + 1))
        size = wal.stat().st_size if wal.exists() else 0
        history.truths.append(Acknowledged(size, ledger.history_end, statuses))
        history.marks.append(sidecar.read_bytes())

    note()
    ledger.begin_epoch()
    note()
    ledger.commit([leased(ledger, i) for i in range(1, JOBS + 1)])
    note()
    for job_id in (1, 2, 3):
        ledger.commit([started(job_id), granted(job_id, output(job_id), output(job_id, n=1))])
        note()
        ledger.commit([completed(job_id)])
        note()
    ledger.commit([started(i) for i in range(4, 41)])
    note()
    ledger.fold()
    note()
    ledger.commit([granted(i) for i in range(4, 10)])
    note()
    with ledger.transaction() as connection:
        connection.execute("INSERT INTO cf_plugin_config (plugin_name) VALUES ('other')")
    note()
    ledger.commit([completed(i) for i in range(4, 10)])
    note()
    history.wal = wal.read_bytes()
    _leave(ledger)
    return history


def _leave(ledger: Ledger) -> None:
    """Let go of the files as a kill would."""
    ledger._connection.execute("PRAGMA disable_checkpoint_on_shutdown")
    ledger._release()
    ledger._forget()


def cases(history: History, seed: int, count: int) -> Iterator[Case]:
    """`count` cases; the CUTs walk through the log's last bytes one by one, then at random."""
    rng = random.Random(seed)
    kinds = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=count)
    ends = [t.wal_bytes for t in history.truths]
    next_cut = len(history.wal)
    for kind in kinds:
        at = rng.randrange(ends[1], len(history.wal))
        if kind is Kind.CUT and next_cut > ends[1] + 1:
            next_cut -= 1
            at = next_cut
        if kind in UNDER_WAY:
            last = max(i for i, end in enumerate(ends) if end <= at)
        elif kind is Kind.SHORT:
            last = rng.choice([i for i, end in enumerate(ends) if end > at])
        else:
            last = rng.randrange(2, len(ends))
            at = rng.randrange(ends[last])
        yield Case(kind, last, at, rng.getrandbits(32))


def lay_out(history: History, case: Case, folder: Path) -> Path:
    """Write the case's files; returns the ledger's path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / NAME
    path.write_bytes(history.file)
    path.with_name(NAME + ".hwm").write_bytes(history.marks[case.last])
    log = _log(history, case)
    if log is not None:
        path.with_name(NAME + ".wal").write_bytes(log)
    return path


def _log(history: History, case: Case) -> bytes | None:
    ends = [t.wal_bytes for t in history.truths]
    rng = random.Random(case.seed)
    acknowledged = ends[case.last]
    following = next((end for end in ends if end > case.at), len(history.wal))
    match case.kind:
        case Kind.CUT | Kind.SHORT:
            return history.wal[: case.at]
        case Kind.ZEROS:
            return history.wal[: case.at] + bytes(following - case.at + rng.choice([0, 1, 4096]))
        case Kind.SECTORS:
            log = bytearray(history.wal[:following])
            first = -(-acknowledged // SECTOR) * SECTOR
            for start in range(first, following, SECTOR):
                if rng.random() < 0.5:
                    end = min(start + SECTOR, following)
                    log[start:end] = bytes(end - start)
            return bytes(log)
        case Kind.GARBAGE:
            return history.wal[:acknowledged] + rng.randbytes(rng.randrange(1, 3000))
        case Kind.FLIP:
            log = bytearray(history.wal[:acknowledged])
            log[case.at] ^= 1 << rng.randrange(BITS)
            return bytes(log)
        case Kind.GONE:
            return None
        case Kind.OLDER:
            older = rng.randrange(case.last)
            return history.wal[: ends[older]]


@dataclass(slots=True)
class Verdict:
    """What happened; `wrong` is empty if it may."""

    outcome: str
    wrong: str = ""


def judge(history: History, case: Case, folder: Path, *, thorough: bool) -> Verdict:
    """Open the case and compare with the truth; `thorough` also goes on working or repairs."""
    path = lay_out(history, case, folder)
    before = _files(folder)
    truth = history.truths[case.last]
    try:
        ledger = Ledger.open(path, clock=ManualClock())
    except LedgerCorruptError as error:
        return _judge_refusal(history, case, path, error, before, thorough=thorough)
    try:
        end = ledger.history_end
        allowed = [t for t in history.truths[case.last :] if t.seq == end]
        statuses = tuple(str(ledger.status_of(i)) for i in range(1, JOBS + 1))
        if end < truth.seq:
            return Verdict("opened", f"silent loss: it ends at {end}, not {truth.seq}")
        if not any(statuses == t.statuses for t in allowed):
            return Verdict("opened", f"statuses at {end} are none that ever were")
        if thorough:
            broken = ledger.check()
            ledger.begin_epoch()
            if broken:
                return Verdict("opened", broken[0])
    finally:
        _leave(ledger)
    if thorough:
        with Ledger.open(path, clock=ManualClock()) as again:
            if again.history_end != end + 1:
                return Verdict("opened", "a commit after the repair is lost")
    return Verdict("opened")


def _judge_refusal(
    history: History,
    case: Case,
    path: Path,
    error: LedgerCorruptError,
    before: dict[str, bytes],
    *,
    thorough: bool,
) -> Verdict:
    if case.kind in UNDER_WAY:
        return Verdict("refused", f"all that was acknowledged is there: {error}")
    if "casparian ledger repair" not in error.hint:
        return Verdict("refused", f"no way forward: {error} {error.hint}")
    if _files(path.parent) != before:
        return Verdict("refused", "a refused ledger's files were changed")
    if not thorough:
        return Verdict("refused")
    done = repair(path, ManualClock())
    if done.kept is None or _files(done.kept) != before:
        return Verdict("repaired", "the files as they were are not kept")
    if done.acknowledged != history.truths[case.last].seq:
        return Verdict("repaired", f"it does not know what was acknowledged: {done}")
    with Ledger.open(path, clock=ManualClock()) as ledger:
        statuses = tuple(str(ledger.status_of(i)) for i in range(1, JOBS + 1))
        past = {t.seq: t.statuses for t in history.truths}
        if past.get(done.ends_at) != statuses:
            return Verdict("repaired", f"statuses at {done.ends_at} are none that ever were")
        newest = history.truths[-1].seq
        if ledger.epoch <= newest or insert_jobs(ledger, 1)[0].job_id <= newest:
            return Verdict("repaired", "ids or epochs may be given twice")
    return Verdict("repaired")


def _files(folder: Path) -> dict[str, bytes]:
    """Contents by name; an empty log is as good as none."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
    return {name: content for name, content in found.items() if content}


THOROUGH_EVERY = 12


def main(folder: Path, seed: int, count: int, part: int, parts: int) -> None:
    """Judge this part's share of the cases and print {"met": …, "wrong": […]} as JSON."""
    history = History.load(folder)
    # The log is small: leaving out the checkpoint at open, whose result is not looked at, makes
    # opening twice as fast. The thorough cases have it.
    checkpoint = Ledger._checkpoint
    met: Counter[str] = Counter()
    wrong = []
    for number, case in enumerate(cases(history, seed, count)):
        if number % parts != part:
            continue
        thorough = (number // parts) % THOROUGH_EVERY == 0
        Ledger._checkpoint = checkpoint if thorough else lambda _: None  # type: ignore[method-assign]
        verdict = judge(history, case, folder / f"part-{part}", thorough=thorough)
        met[f"{case.kind.name} {verdict.outcome}"] += 1
        if verdict.wrong:
            wrong.append(f"{case}: {verdict.wrong}")
    print(json.dumps({"met": met, "wrong": wrong[:20], "failures": len(wrong)}))


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))
