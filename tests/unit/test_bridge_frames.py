"""The bridge between worker and plugin process, from the side that trusts nothing."""

import os
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.sdk import BATCH_ROWS_MAX
from casparian_worker import bridge
from casparian_worker.arrow_ipc import HostileBatchError, decode, encode
from casparian_worker.bridge import BridgeError, Frame, FrameReader, Kind, pack, pack_json
from casparian_worker.guest_log import GuestLog


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = bridge.bridge_pair()
    yield ends
    for end in ends:
        end.close()


def read_all(sock: socket.socket) -> list[Frame]:
    reader = FrameReader(sock)
    frames: list[Frame] = []
    while True:
        frame = reader.pop()
        if frame is not None:
            frames.append(frame)
        elif not reader.fill():
            return frames


def test_frames_arrive_whole_however_they_are_cut(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    host, guest = pair
    sent = [
        pack_json(Kind.RUN, 1, {"path": os.fsdecode(b"caf\xe9\n")}),
        pack(Kind.BATCH, 1, name="topic", body=rng.randbytes(700_000)),
        pack(Kind.END, 1),
        pack(Kind.BATCH, 2, name="t", body=b""),
        pack(Kind.BATCH, 2, name="t", body=rng.randbytes(262_145)),
    ]
    stream = b"".join(sent)

    def send() -> None:
        place = 0
        while place < len(stream):
            step = rng.choice([1, 7, 15, 4096, 100_000])
            guest.sendall(stream[place : place + step])
            place += step
        guest.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    frames = read_all(host)
    sender.join()
    assert [pack(f.kind, f.job, name=f.name, body=bytes(f.body)) for f in frames] == sent
    assert os.fsencode(frames[0].json()["path"]) == b"caf\xe9\n"


@pytest.mark.parametrize(
    "raw",
    [
        bridge.HEADER.pack(0, 0, 0, 1, 0),
        bridge.HEADER.pack(99, 0, 0, 1, 0),
        bridge.HEADER.pack(Kind.END, 1, 0, 1, 0),
        bridge.HEADER.pack(Kind.BATCH, 0, 257, 1, 0),
        bridge.HEADER.pack(Kind.END, 0, 3, 1, 0) + b"abc",
        bridge.HEADER.pack(Kind.BATCH, 0, 0, 1, bridge.BODY_BYTES_MAX + 1),
        bridge.HEADER.pack(Kind.ERROR, 0, 0, 1, 2**63),
        bridge.HEADER.pack(Kind.BATCH, 0, 2, 1, 0) + b"\xff\xfe",
    ],
)
def test_hostile_frames_are_refused_before_memory_is_taken(
    pair: tuple[socket.socket, socket.socket], raw: bytes
) -> None:
    host, guest = pair
    guest.sendall(raw)
    reader = FrameReader(host)
    reader.fill()
    with pytest.raises(BridgeError):
        reader.pop()


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"[" * 100_000, b"1"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BridgeError):
        Frame(Kind.END, 1, "", body).json()


def test_a_partial_frame_is_known_as_such(pair: tuple[socket.socket, socket.socket]) -> None:
    host, guest = pair
    guest.sendall(pack(Kind.BATCH, 1, name="t", body=b"x" * 100)[:50])
    guest.shutdown(socket.SHUT_WR)
    reader = FrameReader(host)
    assert reader.fill()
    assert reader.pop() is None
    assert reader.partial
    assert not reader.fill()


_COLUMNS: dict[str, Any] = {
    "a": pa.array([1, 2]),
    "s": pa.array(["x", None]),
    "l": pa.array([[1], []]),
}
PLAIN = pa.record_batch(_COLUMNS)


def test_a_plain_batch_comes_back_equal() -> None:
    assert decode(bytes(encode(PLAIN))).equals(PLAIN)


def compressed() -> bytes:
    out = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(out, PLAIN.schema, options=options) as writer:
        writer.write_batch(PLAIN)
    raw: bytes = out.getvalue().to_pybytes()
    return raw


def test_bytes_that_stand_for_more_than_they_hold_are_refused() -> None:
    dictionary = pa.record_batch({"d": pa.array(["x"]).dictionary_encode()})
    ends: Any = pa.RunEndEncodedArray.from_arrays(pa.array([60_000], pa.int32()), pa.array(["x"]))
    run_ends = pa.record_batch({"r": ends})
    nulls = pa.record_batch([pa.nulls(1 << 24)], names=["n"])
    for what, raw in (
        ("dictionary", bytes(encode(dictionary))),
        ("run ends", bytes(encode(run_ends))),
        ("nulls", bytes(encode(nulls))),
        ("compressed", compressed()),
        ("empty", b""),
        ("schema only", bytes(encode(PLAIN))[:200]),
    ):
        print(what)
        with pytest.raises(HostileBatchError):
            decode(raw)


def test_mutated_batches_are_refused_or_valid_but_never_more() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    raw = bytes(encode(PLAIN))
    for _ in range(3000):
        mutated = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            batch = decode(mutated)
        except HostileBatchError:
            continue
        batch.validate(full=True)
        assert batch.num_rows <= BATCH_ROWS_MAX


def test_a_log_keeps_the_tail_of_each_job() -> None:
    pipe, end = os.pipe()
    log = GuestLog(pipe, 100)
    os.write(end, b"loading\n\x1eCASPARIAN 1\x1e\none\n\x1eCASPA")
    log.drain()
    os.write(end, b"RIAN 2\x1e\n" + b"y" * 1000 + b"two\n")
    assert log.take(0) == "loading\n"
    assert log.take(1) == "one\n"
    second = log.take(2)
    assert second.startswith("[904 bytes before this were not kept]\n")
    assert second.endswith("two\n")
    os.write(end, b"bad \xff\x1e")
    os.close(end)
    assert log.take(2) == "bad \ufffd\x1e"
    log.drain()
    assert log.closed


def test_a_length_alone_takes_little_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    host, guest = pair
    guest.sendall(
        bridge.HEADER.pack(Kind.BATCH, 0, 1, 1, bridge.BODY_BYTES_MAX) + b"t" + bytes(1000)
    )
    reader = FrameReader(host)
    tracemalloc.start()
    reader.fill()
    assert reader.pop() is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.partial
    assert peak < bridge.BODY_BYTES_MAX // 8


def test_a_body_larger_than_its_first_memory_arrives_whole(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    host, guest = pair
    body = random.Random(7).randbytes(1 << 20) * 40 + b"end"
    raw = pack(Kind.BATCH, 1, name="t", body=body)
    sender = threading.Thread(target=guest.sendall, args=(raw,))
    sender.start()
    reader = FrameReader(host)
    while (frame := reader.pop()) is None:
        assert reader.fill()
    sender.join()
    assert frame.body == body
