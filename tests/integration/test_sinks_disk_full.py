"""No space left: a transient error that names the file system, and a clean second try.

The limit is RLIMIT_FSIZE in a process of its own, so that no mount is needed; the kernel answers
EFBIG where a full disk answers ENOSPC. Both take the same way through our code; SQLite alone
tells them apart, and what it says of a full disk is provoked by a page limit below.
"""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.domain.errors import DiskFullError, SinkError
from casparian_flow.domain.failures import Reason
from casparian_worker.sinks.base import reason_of
from casparian_worker.sinks.durable import mount_point, sink_error
from casparian_worker.sinks.sqlite import SqliteTarget

SCRIPT = """
import json, random, resource, sys
from pathlib import Path
from casparian_flow.domain.errors import SinkError
from casparian_worker.sinks.garbage import list_stages
from sink_kit import job_run, output_at

folder, uri, where = sys.argv[1:4]
output = output_at(Path(folder), uri)
rng = random.Random(1)
rows = {"a": [rng.randbytes(64).hex() for _ in range(20_000)]}
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
run = job_run()
found = {}
if where == "publish":
    entry = output.stage(run, rows)
limit(200_000)
try:
    if where == "publish":
        output.sink.publish(entry, run.token)
    else:
        entry = output.stage(run, rows)
except SinkError as error:
    found = {"message": str(error), "kind": type(error).__name__, "transient": error.transient}
limit(resource.RLIM_INFINITY)
found["left"] = sorted(list_stages(output.env)) if where == "stage" else []
if where == "stage":
    entry = output.stage(run, rows)
output.publish(run, entry)
found["already"] = output.sink.publish(entry, run.token).already
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("uri", "where"),
    [
        ("parquet://out", "stage"),
        ("csv://out", "stage"),
        ("sqlite://db.sqlite3", "stage"),
        ("duckdb://db.duckdb", "stage"),
        ("sqlite://db.sqlite3", "publish"),
        ("duckdb://db.duckdb", "publish"),
    ],
)
def test_a_full_disk_is_transient_named_and_leaves_nothing_behind(
    tmp_path: Path, uri: str, where: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), uri, where]
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tests, timeout=60
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["transient"] is True, found
    assert found["kind"] == ("SinkError" if uri.startswith("sqlite") else "DiskFullError")
    assert f"file system mounted at {mount_point(str(tmp_path))}" in found["message"]
    assert found["left"] == []
    assert found["already"] is True


def test_sqlite_s_own_word_for_a_full_disk_is_understood(tmp_path: Path) -> None:
    target = SqliteTarget(str(tmp_path / "db.sqlite3"), busy_timeout_s=1.0)
    target.execute("PRAGMA max_page_count = 2")
    target.execute("CREATE TABLE t (a)")
    with pytest.raises(DiskFullError, match="mounted at"):
        target.execute("INSERT INTO t VALUES (randomblob(100000))")
    target.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_being_out_of_space_is_told_as_such(number: int) -> None:
    error = sink_error(OSError(number, "x"), "write", "/tmp/no/such/file")
    assert isinstance(error, DiskFullError)
    assert reason_of(error) is Reason.DISK_FULL


def test_a_read_only_file_system_is_not_tried_again() -> None:
    error = sink_error(OSError(errno.EROFS, "x"), "write", "/tmp/file")
    assert isinstance(error, SinkError)
    assert not error.transient
    assert sink_error(OSError(errno.EIO, "x"), "write", "/tmp/file").transient
