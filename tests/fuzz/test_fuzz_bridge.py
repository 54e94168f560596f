"""What a hostile plugin may write to its bridge: the job fails by name, the worker lives on."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from fuzzing import FRAMES, Fuzz, rss_mb
from plugin_runs import Bench, handler

from casparian_flow.domain.failures import Reason
from casparian_worker.arrow_ipc import encode
from casparian_worker.bridge import (
    HEADER,
    BridgeError,
    FrameReader,
    Kind,
    bridge_pair,
    pack,
    pack_json,
)
from casparian_worker.plugin_events import Failed
from casparian_worker.runtime import PluginRuntime

STREAMS = max(500, FRAMES // 20)
RUNS = max(8, FRAMES // 12_500)
GROWTH_MB = 100.0
ROWS = bytes(encode(pa.RecordBatch.from_pydict({"n": [1, 2, 3], "t": ["a", None, "c"]})))


def stream(fuzz: Fuzz, job: int) -> bytes:
    """What an honest guest says of one job, broken somewhere."""
    rng = fuzz.rng
    frames = [
        pack(Kind.BEGIN, job),
        pack(Kind.BATCH, job, name="out", body=ROWS),
        pack(Kind.BATCH, job, name="other", body=ROWS),
        pack_json(Kind.END, job, {"rows": 6, "batches": 2}),
    ]
    match rng.randrange(7):
        case 0:
            rng.shuffle(frames)
        case 1:
            frames.insert(rng.randrange(4), pack(rng.choice(list(Kind)), rng.choice((0, job, 99))))
        case 2:
            frames[1] = pack(Kind.BATCH, job, name="out", body=fuzz.bytes_of(ROWS))
        case 3:
            end = fuzz.json_of({"rows": 6, "batches": 2, "message": "x", "kind": "raised"})
            kind = rng.choice((Kind.END, Kind.ERROR, Kind.CONFINED, Kind.READY))
            frames[3] = pack(kind, job, body=json.dumps(end).encode())
        case 4:
            length = rng.choice((2**28, 2**40, 2**63, 300_000))
            frames[rng.randrange(4)] = HEADER.pack(Kind.BATCH, 0, 3, job, length) + b"out" + ROWS
        case 5:
            frames *= rng.choice((0, 2, 30))
        case _:
            return fuzz.bytes_of(b"".join(frames))
    return b"".join(frames)


def test_a_stream_is_cut_into_frames_or_refused_in_bounded_memory() -> None:
    fuzz = Fuzz("bridge streams")
    before = rss_mb()
    frames = refused = 0
    for number in range(STREAMS):
        host, guest = bridge_pair()
        with host, guest:
            guest.setblocking(False)
            raw = stream(fuzz, number % 5)[:100_000]
            sent = guest.send(raw) if raw else 0
            guest.shutdown(socket.SHUT_WR)
            reader = FrameReader(host)
            try:
                while reader.fill():
                    while (frame := reader.pop()) is not None:
                        frames += 1
                        if frame.kind is not Kind.BATCH:
                            frame.json()
            except BridgeError:
                refused += 1
            assert sent <= len(raw)
    print(f"{frames} frames, {refused} of {STREAMS} streams refused")
    assert frames
    assert refused
    assert rss_mb() - before < GROWTH_MB


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    runtime = PluginRuntime(
        scratch_root=str(tmp_path / "scratch"), cache_root=str(tmp_path / "cache")
    )
    bench = Bench(runtime, tmp_path)
    yield bench
    bench.close()
    runtime.close()


HOSTILE = handler(
    """
    import os, stat
    raw = open(file_path, "rb").read()
    for fd in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, raw)
        except OSError:
            pass
    os._exit(0)
    """
)
NAMED = {Reason.PROTOCOL, Reason.TRUNCATED, Reason.EXITED, Reason.PLUGIN_ERROR}
"""What the guest's end and its own words may be taken for."""


def test_a_hostile_guest_costs_its_own_jobs_only(bench: Bench) -> None:
    fuzz = Fuzz("hostile guests")
    hostile = bench.host(HOSTILE, timeout_s=20.0)
    outcomes = []
    before = rss_mb()
    for number in range(RUNS):
        # The guest's jobs are numbered from 1 on, by the host.
        path = bench.file(f"input{number}.txt", stream(fuzz, number + 1))
        run = bench.again(hostile, path=path, key=f"job{number}")
        if isinstance(run.outcome, Failed):
            assert run.outcome.reason in NAMED, run.outcome
            outcomes.append(run.outcome.reason.value)
        else:
            outcomes.append("finished")
    print(outcomes)
    assert set(outcomes) - {"finished"}
    assert rss_mb() - before < GROWTH_MB
    assert bench.run(handler("return [{'n': 1}]")).rows() == [{"n": 1}]
