"""Packets between a worker and its plugin container: they come back as sent, or are refused."""

import json
import os
import random
import socket
from collections.abc import Iterator

import pytest

from casparian_worker import launch_line as line

MESSAGES: list[line.Request | line.Report] = [
    line.Start(1 << 40, {"python": "/usr/bin/python3", "site": ["räte"], "confinement": {}}),
    line.Look(2),
    line.Kill(3),
    line.Hello("0.1.0", "/usr/bin/python3", "/tmp/kits/x", "/tmp/y", 1000, [1000, 2000]),
    line.Started(4, 17),
    line.Refused(5, "no \ud800 room"),
    line.Used(6, 1 << 33, 12, 3),
    line.Judged(7, "out_of_memory", "too much"),
    line.Ended(8),
]
SEED = int(os.environ.get("CASPARIAN_FUZZ_SEED", "20261122"))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_arrives_as_it_was_sent(
    ends: tuple[socket.socket, socket.socket], message: line.Request | line.Report
) -> None:
    ours, theirs = ends
    if isinstance(message, line.Start):
        lines = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        line.send_start(ours, message, tuple(lines))
        line.close_all(lines)
    else:
        ours.send(line.pack(message))
    if isinstance(message, line.Request):
        found, descriptors = line.receive_request(theirs)
        assert found == message
        assert all(not os.get_inheritable(d) for d in descriptors)
        line.close_all(descriptors)
    else:
        assert line.receive(theirs) == message


def test_descriptors_that_come_unasked_are_given_back(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    before = len(os.listdir("/proc/self/fd"))
    for message, count in ((line.Look(1), 1), (MESSAGES[0], 3), (MESSAGES[0], 0), (MESSAGES[0], 9)):
        lines = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        socket.send_fds(ours, [line.pack(message)], lines)
        line.close_all(lines)
        with pytest.raises(line.LineError, match="descriptors"):
            line.receive_request(theirs)
    socket.send_fds(ours, [line.pack(line.Ended(1))], [0])
    assert line.receive(theirs) == line.Ended(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_packet_that_is_too_large_is_refused_at_both_ends(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    with pytest.raises(line.LineError, match="too large"):
        line.pack(line.Refused(1, "x" * line.PACKET_BYTES_MAX))
    ours, theirs = ends
    ours.send(b" " * (line.PACKET_BYTES_MAX + 1))
    with pytest.raises(line.LineError, match="too large"):
        line.receive(theirs)


def test_nothing_but_its_own_error_comes_of_a_broken_packet() -> None:
    print("seed", SEED)
    chance = random.Random(SEED)
    raw = [line.pack(message) for message in MESSAGES]
    values: list[object] = [None, True, -1, 1e300, "x", [], {}, [1, "2"], {"op": "x"}]
    refused = 0
    for _ in range(5_000):
        packet = bytearray(chance.choice(raw))
        if chance.random() < 0.5:
            for _ in range(chance.randint(1, 3)):
                packet[chance.randrange(len(packet))] = chance.randrange(256)
        else:
            value = json.loads(packet)
            value[chance.choice([*value, "more"])] = chance.choice(values)
            packet = bytearray(json.dumps(value).encode())
        try:
            line._unpacked(bytes(packet))
        except line.LineError:
            refused += 1
    assert refused > 1_000
