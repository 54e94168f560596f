"""The whole flow on real files, in two minutes at most: `make demo`.

Takes CSV and JSON files out of the installed package vega_datasets, publishes the example plugins,
runs Sentinel, Scout and two workers, changes a file, and shows what became of it all. Everything
is in ./demo afterwards, to be looked at; the next run begins afresh.
"""

import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq

from casparian_flow.cli.idle import active
from casparian_flow.config import CONFIG_NAME, load_settings
from casparian_flow.domain.errors import SentinelUnreachableError
from casparian_flow.sentinel.control import remote
from casparian_flow.sentinel.paths import control_address

PLUGINS = Path(__file__).parent / "plugins"
DEMO = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").absolute()
NAMES = (
    "airports.csv",
    "la-riots.csv",
    "seattle-weather.csv",
    "stocks.csv",
    "us-employment.csv",
    "barley.json",
    "cars.json",
    "iris.json",
)
JOBS = len(NAMES) + 1
"""stocks.csv goes to two plugins."""
NEW_ROWS = "\nAAPL,Apr 1 2010,235.97\nAAPL,May 1 2010,unknown\n"
"""The file does not end with a line end."""
PATIENCE_S = 90.0

CONFIG = """\
[database]
db_location = "casparian_flow.duckdb"

[sentinel]
bind_address = "tcp://127.0.0.1:{port}"

[worker]
output_root = "output"

[scout]
interval_seconds = 1
settle_seconds = 1
"""

TIMELINE = """\
SELECT l.rel_path, v.id AS version_id, v.content_hash[:12] AS sha256, v.size_bytes, v.detected_at,
       count(j.id) AS jobs_processed
FROM cf_file_location l
JOIN cf_file_version v ON v.location_id = l.id
LEFT JOIN cf_processing_queue j ON j.file_version_id = v.id
GROUP BY l.rel_path, v.id
ORDER BY l.rel_path, v.detected_at"""

WRITTEN = """\
SELECT topic, kind, split_part(sink_uri, ':', 1) AS sink, count(*) AS outputs, sum(rows) AS rows,
       sum(bytes) AS bytes
FROM cf_output GROUP BY ALL ORDER BY ALL"""


def main() -> int:
    began = time.monotonic()
    prepare()
    heading("Make a key and deploy three plugins, signed with it")
    casparian("init")
    casparian("source", "add", "inbox")
    for name in ("csv_table", "json_records", "stock_prices"):
        casparian("publish", str(PLUGINS.resolve() / f"{name}.py"), "--version", "1.0.0")
    heading("Run Sentinel, Scout and two workers")
    with running():
        wait_for_jobs(JOBS)
        heading("Change one file: two more rows, one of them bad")
        with (DEMO / "inbox" / "stocks.csv").open("a") as file:
            file.write(NEW_ROWS)
        wait_for_jobs(JOBS + 2)
        heading("Stop, as Ctrl-C does")
    report()
    print(f"\nThat took {time.monotonic() - began:.0f} seconds. Look around: cd {shown(DEMO)}")
    return 0


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def shown(path: Path) -> Path:
    """As short as it can be said from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "casparian_flow.cli", *arguments]


def casparian(*arguments: str) -> None:
    """Run one command in the demo's folder, as a user would."""
    words = " ".join(f'"{a}"' if " " in a else a for a in arguments)
    print(f"$ casparian {words}", flush=True)
    subprocess.run(command(*arguments), cwd=DEMO, check=True)


def prepare() -> None:
    heading(f"Take {len(NAMES)} real files out of vega_datasets into {shown(DEMO)}/inbox")
    if DEMO.exists() and not (DEMO / CONFIG_NAME).exists():
        sys.exit(f"{DEMO} is not from an earlier demo; move it away first")
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "inbox").mkdir(parents=True)
    (DEMO / CONFIG_NAME).write_text(CONFIG.format(port=free_port()))
    source = Path(str(files("vega_datasets"))) / "_data"
    for name in NAMES:
        shutil.copyfile(source / name, DEMO / "inbox" / name)
        print(f"  {name:<22}{(DEMO / 'inbox' / name).stat().st_size:>9,} bytes")


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running() -> Iterator[None]:
    """`casparian start` in the background; ended by the signal that Ctrl-C sends."""
    print("$ casparian start --workers 2", flush=True)
    process = subprocess.Popen(command("start", "--workers", "2"), cwd=DEMO, process_group=0)
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.send_signal(signal.SIGINT)
    code = process.wait()
    if code != 0:
        sys.exit(f"casparian start ended with exit code {code}")


def wait_for_jobs(number: int) -> None:
    """Until so many jobs have ended and none is left."""
    address = control_address(load_settings(DEMO / CONFIG_NAME).database.db_location)
    end = time.monotonic() + PATIENCE_S
    with remote(address) as control:
        while time.monotonic() < end:
            try:
                counts = control.status()["jobs"]
            except SentinelUnreachableError:
                counts = {}
            if counts.get("FAILED"):
                sys.exit(f"a job failed; see 'cd {DEMO}; casparian dead-letters'")
            if sum(counts.values()) >= number and active(counts) == 0:
                return
            time.sleep(0.3)
    sys.exit(f"{number} jobs should have ended by now; see 'cd {DEMO}; casparian status'")


def report() -> None:
    heading("The versions of every file")
    casparian("sql", TIMELINE)
    heading("The jobs")
    casparian("jobs")
    heading("The rows written")
    casparian("sql", WRITTEN)
    heading("Where they are")
    output = DEMO / "output"
    for path in sorted(output.rglob("*.parquet")):
        print(f"  {shown(path)}  {pq.read_metadata(path).num_rows:,} rows")
    for path in sorted(output.rglob("*.sqlite3")):
        for table, rows in sqlite_tables(path):
            print(f"  {shown(path)}  {table}: {rows:,} rows")


def sqlite_tables(path: Path) -> list[tuple[str, int]]:
    """The tables of a SQLite database, without those that the sink keeps for itself."""
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        names = database.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '\\_%' "
            "ESCAPE '\\' ORDER BY name"
        ).fetchall()
        return [
            (name, database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])
            for (name,) in names
        ]
    finally:
        database.close()


if __name__ == "__main__":
    sys.exit(main())
