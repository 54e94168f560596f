"""Row 10: from kill -9 with a long queue to the first dispatch after the restart."""

import secrets
import subprocess
from pathlib import Path

import zmq

from bench import ledgers, processes
from bench.flow import Flow
from bench.harness import (
    Contestant,
    Figure,
    Plan,
    Stopwatch,
    Values,
    alternate,
    at_most,
    check,
    figure,
)
from bench.workspace import fresh, workspace
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import decode_all, encode
from casparian_flow.protocol.frames import pack

QUEUED, QUICK_QUEUED = 100_000, 1_000
COMPLETED, QUICK_COMPLETED = 900_000, 9_000
PRELUDE = 64
"""Jobs leased before the kill, so that the write-ahead log is as a crash leaves it."""
OURS, PEER = "Sentinel, kill -9 to dispatch", "duckdb.connect + scan"
RECONNECT_MS = 5
_SCAN = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
rows = connection.execute(
    "SELECT * FROM cf_processing_queue WHERE status = 'QUEUED' ORDER BY priority DESC, id"
).to_arrow_table()
print(rows.num_rows)
"""


def measure(plan: Plan) -> list[Figure]:
    queued = plan.size(QUEUED, QUICK_QUEUED)
    completed = plan.size(COMPLETED, QUICK_COMPLETED)
    with workspace("row10") as folder:
        wiring = ledgers.wire(folder / "template.duckdb", folder / "none")
        ledgers.add_versions(wiring, queued + completed)
        ledgers.add_jobs(wiring, queued, completed=completed)
        crashed = _crash(folder, wiring.database)
        contestants = [
            Contestant(OURS, lambda: _restart(folder, crashed)),
            Contestant(PEER, lambda: _connect_and_scan(folder, crashed, queued)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "s", "s", row="10",
            work=f"restart with {queued + completed:,} jobs, {queued:,} queued, to first dispatch",
            ours=OURS, peer=PEER, goal=at_most(3),
            notes=[
                ("each a fresh Python process on the same crashed file; the worker reconnects "
                f"every {RECONNECT_MS} ms"),
            ],
        )
    ]  # fmt: skip


class _Probe:
    """A worker that takes dispatches and answers nothing."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        identify = m.Identify(
            "probe", secrets.token_hex(8), slots=PRELUDE, credit=PRELUDE, batch=True
        )
        self._socket.send_multipart(pack(*encode(0, identify)))

    def await_dispatches(self, count: int) -> None:
        seen = 0
        while seen < count:
            check(self._socket.poll(120_000), "a dispatch comes within two minutes")
            messages = decode_all(self._socket.recv_multipart())
            seen += sum(isinstance(message, m.Dispatch) for _, message in messages)

    def close(self) -> None:
        self._socket.close()


def _crash(folder: Path, template: Path) -> Path:
    """Kill a Sentinel that has just leased jobs; returns the ledger as it was left."""
    place = folder / "crash"
    database = ledgers.copy(template, place / "ledger.duckdb")
    with Flow(database, place) as flow:
        sentinel = flow.start_sentinel()
        probe = _Probe(flow.address)
        probe.await_dispatches(PRELUDE)
        sentinel.kill()
        sentinel.wait()
        probe.close()
    return database


def _restart(folder: Path, crashed: Path) -> Values:
    with fresh(folder) as inner:
        database = ledgers.copy(crashed, inner / "ledger.duckdb")
        with Flow(database, inner) as flow:
            probe = _Probe(flow.address)
            with Stopwatch() as watch:
                flow.start_sentinel()
                probe.await_dispatches(1)
            probe.close()
    return {"s": watch.seconds}


def _connect_and_scan(folder: Path, crashed: Path, queued: int) -> Values:
    with fresh(folder) as inner:
        database = ledgers.copy(crashed, inner / "ledger.duckdb")
        with Stopwatch() as watch:
            done = subprocess.run(
                [processes.PYTHON, "-c", _SCAN, str(database)], capture_output=True, check=True
            )
    check(queued - PRELUDE <= int(done.stdout) <= queued, f"{done.stdout!r} rows scanned")
    return {"s": watch.seconds}
