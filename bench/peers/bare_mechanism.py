"""The bare mechanism: what ROUTER, DEALER, msgspec and a DuckDB journal cost with nothing around.

As many messages and journal rows a job, as many jobs outstanding, batches and commits as ours. No
leases, no retries, no fencing, no checks: the ceiling of this design in this language.

    python -m bench.peers.bare_mechanism ADDRESS        one worker
"""

import sys
from collections import deque
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import zmq

from bench import processes
from bench.harness import Stopwatch, Values, check

NAME = "bare mechanism"
CREDIT = 1024
_TYPES: dict[str, pa.DataType] = {
    "seq": pa.int64(),
    "job": pa.int64(),
    "kind": pa.string(),
    "attempt": pa.int32(),
    "at_us": pa.int64(),
    "data": pa.string(),
}
_SCHEMA = pa.schema(_TYPES)
_CREATE = (
    "CREATE TABLE journal (seq BIGINT NOT NULL, job BIGINT NOT NULL, kind VARCHAR NOT NULL, "
    "attempt INTEGER NOT NULL, at_us BIGINT NOT NULL, data VARCHAR)"
)
_encode, _decode = msgspec.json.encode, msgspec.json.decode


def run(database: Path, jobs: int, log: Path) -> Values:
    """Put `jobs` jobs through two workers."""
    router: Any = zmq.Context.instance().socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    command = [processes.PYTHON, "-m", "bench.peers.bare_mechanism", f"tcp://127.0.0.1:{port}"]
    with (
        processes.running(command, log),
        processes.running(command, log),
        duckdb.connect(str(database)) as connection,
    ):
        connection.execute(_CREATE)
        connection.execute("SET threads = 1")
        workers = [router.recv_multipart()[0] for _ in range(2)]
        with Stopwatch() as watch:
            _dispatch_all(router, connection, workers, jobs)
        for worker in workers:
            router.send_multipart([worker, b""])
        counted = connection.execute("SELECT count(*) FROM journal GROUP BY kind").fetchall()
        check(counted == [(jobs,)] * 3, f"bare mechanism: the journal has {counted}")
    router.close()
    return {"jobs/s": jobs / watch.seconds}


def _dispatch_all(router: Any, connection: Any, workers: list[bytes], jobs: int) -> None:
    queue, done, rows = deque(range(jobs)), 0, list[tuple[Any, ...]]()
    free = dict.fromkeys(workers, CREDIT)
    acks: dict[bytes, list[str]] = {worker: [] for worker in workers}
    seq = 0
    while True:
        sends: dict[bytes, list[Any]] = {worker: [] for worker in workers}
        for worker in workers:
            while free[worker] and queue:
                job, seq = queue.popleft(), seq + 1
                token = f"ledger00-1-{job}-1"
                data = {"token": token, "owner": worker.hex(), "manifest_id": 1}
                rows.append((seq, job, "LEASED", 1, 0, _encode(data).decode()))
                sends[worker].append([job, token, f"/data/{job}.csv", "0" * 64, [1, 2, 3, 4, 5]])
                free[worker] -= 1
        _commit(connection, rows)
        rows = []
        for worker in workers:
            if sends[worker] or acks[worker]:
                router.send_multipart([worker, _encode([acks[worker], sends[worker]])])
        acks = {worker: [] for worker in workers}
        if done == jobs:
            return
        router.poll()
        while router.poll(0):
            worker, payload = router.recv_multipart()
            for kind, job, token, metrics in _decode(payload):
                seq += 1
                rows.append((seq, job, kind, 1, 0, _encode(metrics).decode()))
                if kind == "COMPLETED":
                    acks[worker].append(token)
                    free[worker] += 1
                    done += 1


def _commit(connection: Any, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        columns = zip(zip(*rows, strict=True), _SCHEMA, strict=True)
        arrays = [pa.array(column, field.type) for column, field in columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)
        connection.execute("INSERT INTO journal SELECT * FROM batch")
        del batch


def work(address: str) -> None:
    """One worker: every job is answered with its beginning and its end."""
    dealer: Any = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(address)
    dealer.send(b"hello")
    while payload := dealer.recv():
        _acks, jobs = _decode(payload)
        answers: list[Any] = []
        for job, token, *_ in jobs:
            answers.append(["STARTED", job, token, {}])
            answers.append(["COMPLETED", job, token, {"rows": 0, "bytes": 0}])
        if answers:
            dealer.send(_encode(answers))


if __name__ == "__main__":
    work(sys.argv[1])
