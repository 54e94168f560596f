"""Frames and messages: what is packed comes back, and what is malformed is refused by name."""

import contextlib
import random
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casparian_flow.domain.errors import ProtocolError
from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode, SinkSpec
from casparian_flow.domain.records import Limits, Sample
from casparian_flow.protocol import frames, limits
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import MESSAGE_OF, OP_OF, decode, decode_all, encode
from casparian_flow.protocol.frames import HEADER, Frame, Op, pack, pack_batch, unpack
from casparian_flow.protocol.limits import BUNDLE_BYTES_MAX

TOKEN = "7f3ac91e-4-1042-2"
ENTRY = OutputEntry(
    n=0,
    topic="sales",
    kind=OutputKind.OUTPUT,
    uri="parquet://sales",
    mode=SinkMode.APPEND,
    root_id="r1",
    output_key="a" * 64,
    slice_key="b" * 64,
    order_no=(1, 2, 0),
    stage=".cf-stage/x",
    final="sales/x.parquet",
    rows=3,
    bytes=900,
    sha256="c" * 64,
)
PLUGIN = m.Plugin(
    "s1", "sales", "1.0", "a", "code", "", "", (SinkSpec("*", "csv://x"),), "{}", "", Limits(),
    '{"name":"sales"}', '{"payload":""}', 1_760_000_000_000_000,
)  # fmt: skip
EXAMPLES: list[m.Message] = [
    m.Identify("w1", "n1", held=[TOKEN], slots=2, credit=64, batch=True, sandbox={"seccomp": "on"}),
    m.Welcome("7f3ac91e", 4, 10.0, 30.0, batch=True),
    PLUGIN,
    m.Dispatch(TOKEN, 2, "s1", "sales", "/in/é.csv", 7, 8, "d" * 64, (1, 2, 3, 4, 5), (1, 2, 0)),
    m.DispatchAck(TOKEN),
    m.Abort(TOKEN, "cancelled"),
    m.Heartbeat("BUSY", [TOKEN]),
    m.Stage(TOKEN, (ENTRY,)),
    m.Grant(TOKEN),
    m.Refuse(TOKEN, "superseded", "newer"),
    m.Conclude(TOKEN, "FAILED", "plugin_error", "boom", transient=False, metrics={"rows": 1}),
    m.ConcludeAck([TOKEN]),
    m.Recover(TOKEN, (ENTRY,)),
    m.Err("what", "malformed"),
    m.Reload(),
    m.Deploy(b"\x00bundle\xff"),
    m.Ack(success=True, message="ok", plugin_id=3, details={"topics": ["x"]}),
    m.Stages([TOKEN]),
    m.Discard([TOKEN]),
    m.Trial("t-1", PLUGIN, (Sample("a.csv", b"x\xff"),)),
    m.TrialResult("t-1", "passed", rows={"sales": 3}, log="x"),
]


def header(
    op: int = Op.HEARTBEAT, job_id: int = 0, length: int = 0, version: int = 4, reserved: int = 0
) -> bytes:
    return HEADER.pack(version, op, reserved, job_id, length)


def refusal(parts: list[bytes]) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode_all(parts)
    return str(caught.value)


def test_the_header_is_16_bytes_in_network_order() -> None:
    assert pack(Op.DISPATCH, 0x0102030405060708, b"{}")[0] == bytes(
        [4, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 2]
    )


def test_op_numbers_never_change() -> None:
    assert {op.name: op.value for op in Op} == {
        "IDENTIFY": 1,
        "DISPATCH": 2,
        "ABORT": 3,
        "HEARTBEAT": 4,
        "CONCLUDE": 5,
        "ERR": 6,
        "RELOAD": 7,
        "DISPATCH_ACK": 8,
        "DEPLOY": 10,
        "ACK": 11,
        "STAGE": 12,
        "GRANT": 13,
        "REFUSE": 14,
        "CONCLUDE_ACK": 15,
        "RECOVER": 16,
        "BATCH": 17,
        "WELCOME": 18,
        "PLUGIN": 19,
        "STAGES": 20,
        "DISCARD": 21,
        "TRIAL": 22,
        "TRIAL_RESULT": 23,
    }


def test_every_op_but_batch_has_a_message_and_an_example() -> None:
    assert set(MESSAGE_OF) == set(Op) - {Op.BATCH}
    assert {type(example) for example in EXAMPLES} == set(OP_OF)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_message_comes_back_as_it_was_packed(message: m.Message) -> None:
    frame = encode(42, message)
    assert decode_all(list(pack(*frame))) == [(42, message)]


def test_a_batch_comes_back_in_order() -> None:
    items = [encode(i, example) for i, example in enumerate(EXAMPLES)]
    assert decode_all(list(pack_batch(items))) == list(enumerate(EXAMPLES))


def test_an_empty_batch_holds_nothing() -> None:
    assert decode_all(list(pack_batch([]))) == []


def test_an_empty_payload_reads_as_an_empty_object() -> None:
    assert decode_all([header(Op.RELOAD), b""]) == [(0, m.Reload())]


def test_unknown_fields_are_ignored() -> None:
    payload = b'{"status":"IDLE","active_job_count":0,"extra":[1,{"a":2}]}'
    assert decode(Frame(Op.HEARTBEAT, 0, payload)) == m.Heartbeat("IDLE")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "want 2 frames, got 0"),
        ([header()], "want 2 frames, got 1"),
        ([header(), b"", b""], "want 2 frames, got 3"),
        ([b"", b""], "header has 0 bytes"),
        ([header()[:15], b""], "header has 15 bytes"),
        ([header() + b"x", b""], "header has 17 bytes"),
        ([header(version=3), b""], "protocol version 0x03, want 0x04"),
        ([header(version=5), b""], "protocol version 0x05, want 0x04"),
        ([header(reserved=1), b""], "reserved bits"),
        ([header(op=0), b""], "unknown op 0"),
        ([header(op=9), b""], "unknown op 9"),
        ([header(op=255), b""], "unknown op 255"),
        ([header(length=3), b"{}"], "header says 3 payload bytes, got 2"),
        ([header(length=1), b"{}"], "header says 1 payload bytes, got 2"),
        ([header(length=frames.PAYLOAD_BYTES_MAX + 1), b"{}"], "exceeds 16777216"),
        ([header(length=2), b"{]"], "HEARTBEAT"),
        ([header(length=2), b"[]"], "HEARTBEAT"),
        ([header(length=2), b"{}"], "status"),
        ([header(length=2), b"\xff\xfe"], "HEARTBEAT"),
        ([header(length=12), b'{"status":1}'], "status"),
        ([header(Op.RELOAD, job_id=2**63, length=2), b"{}"], "job id 9223372036854775808"),
        ([header(Op.BATCH, length=5), b"12345"], "ends within a header"),
        ([header(Op.BATCH, length=16), header(length=1)], "ends within a payload"),
        ([header(Op.BATCH, length=16), header(Op.BATCH)], "BATCH within BATCH"),
        ([header(Op.BATCH, length=16), header(version=9)], "protocol version 0x09"),
    ],
)
def test_malformed_frames_are_refused_by_name(parts: list[bytes], words: str) -> None:
    assert words in refusal(parts)


def test_one_bad_item_spoils_its_whole_batch() -> None:
    good = encode(1, m.Heartbeat("IDLE"))
    assert "CONCLUDE" in refusal(list(pack_batch([good, Frame(Op.CONCLUDE, 1, b"{")])))


def test_a_batch_of_too_many_items_is_refused() -> None:
    items = [Frame(Op.RELOAD, 0, b"")] * (frames.BATCH_ITEMS_MAX + 1)
    assert "more than 4096 items" in refusal(list(pack_batch(items)))


def test_deeply_nested_json_is_refused_without_exhausting_the_stack() -> None:
    payload = b'{"success":true,"message":"","details":{"a":' + b"[" * 1_000_000
    assert "ACK" in refusal(list(pack(Op.ACK, 0, payload)))


OVERSIZE: list[tuple[m.Message, str]] = [
    (m.Identify("w" * 256, "n"), "worker_id"),
    (m.Identify("w", ""), "nonce"),
    (m.Identify("w", "n", capabilities=["p"] * 1025), "capabilities"),
    (m.Identify("w", "n", held=["t"] * 65_537), "held"),
    (m.Identify("w", "n", credit=0), "credit"),
    (m.Identify("w", "n", credit=4097), "credit"),
    (m.Identify("w", "n", slots=0), "slots"),
    (m.Identify("w", "n", sandbox={"a": "b" * 8193}), "sandbox"),
    (m.Heartbeat("x" * 256), "status"),
    (m.Heartbeat("IDLE", ["t" * 256]), "held"),
    (m.Conclude(TOKEN, "SUCCESS", metrics={"rows": 2**63}), "metrics"),
    (m.Conclude(TOKEN, "SUCCESS", metrics={str(i): i for i in range(257)}), "metrics"),
    (m.Conclude("t" * 256, "SUCCESS"), "token"),
    (m.Stage(TOKEN, (ENTRY,) * 16_385), "entries"),
    (m.Stages(["t"] * 65_537), "tokens"),
    (m.Deploy(bytes(BUNDLE_BYTES_MAX + 1)), "bundle"),
]


@pytest.mark.parametrize(("message", "field"), OVERSIZE)
def test_values_beyond_their_limit_are_refused_by_field(message: m.Message, field: str) -> None:
    assert field in refusal(list(pack(*encode(1, message))))


@pytest.mark.parametrize("field", ["n", "rows", "bytes"])
@pytest.mark.parametrize("value", [-1, 2**63])
def test_counts_of_an_output_that_no_column_holds_are_refused(field: str, value: int) -> None:
    entry: dict[str, Any] = {name: getattr(ENTRY, name) for name in ENTRY.__slots__}
    stage = m.Stage(TOKEN, (OutputEntry(**(entry | {field: value})),))
    assert field in refusal(list(pack(*encode(1, stage))))


def test_long_error_texts_and_logs_are_cut_not_refused() -> None:
    """A refused CONCLUDE would be repeated for ever."""
    long = m.Conclude(TOKEN, "FAILED", "plugin_error", "e" * 20_000, log="a" * 10 + "z" * 262_144)
    ((_, cut),) = decode_all(list(pack(*encode(1, long))))
    assert isinstance(cut, m.Conclude)
    assert len(cut.error_message) == limits.MESSAGE_CHARS_MAX
    assert cut.log == "z" * limits.LOG_CHARS_MAX


def valid_messages() -> list[list[bytes]]:
    packed = [encode(i, example) for i, example in enumerate(EXAMPLES)]
    return [list(pack(*frame)) for frame in packed] + [list(pack_batch(packed))]


def mutate(parts: list[bytes], rng: random.Random) -> list[bytes]:
    """Damage one message in one to four of the ways a bug or a wire could."""
    parts = list(parts)
    for _ in range(rng.randint(1, 4)):
        which = rng.randrange(len(parts)) if parts else 0
        kind = rng.randrange(7)
        if not parts or kind == 0:
            parts.insert(which, rng.randbytes(rng.randint(0, 40)))
        elif kind == 1:
            del parts[which]
        elif kind == 2 and parts[which]:
            raw = bytearray(parts[which])
            for _ in range(rng.randint(1, 5)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            parts[which] = bytes(raw)
        elif kind == 3:
            parts[which] = parts[which][: rng.randint(0, len(parts[which]))]
        elif kind == 4:
            parts[which] += rng.randbytes(rng.randint(1, 20))
        elif kind == 5:
            rng.shuffle(parts)
        elif len(parts) == 2 and len(parts[0]) == HEADER.size:
            # Keep the frame valid, so that the damage reaches the JSON.
            fields = HEADER.unpack(parts[0])
            parts[0] = HEADER.pack(*fields[:4], len(parts[1]))
    return parts


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=1500, deadline=None, derandomize=False, print_blob=True)
def test_damaged_messages_raise_protocol_errors_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    damaged = mutate(rng.choice(valid_messages()), rng)
    try:
        for _, message in decode_all(damaged):
            assert type(message) in OP_OF
    except ProtocolError:
        pass


@given(op=st.sampled_from(list(Op)), job=st.integers(0, 2**64 - 1), payload=st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_payloads_raise_protocol_errors_and_nothing_else(
    op: Op, job: int, payload: bytes
) -> None:
    with contextlib.suppress(ProtocolError):
        decode_all([header(op, job, len(payload)), payload])


def test_a_message_that_claims_much_costs_little_memory() -> None:
    """Lengths are checked against what arrived before anything is set aside for them."""
    body = struct.pack("!BBHQI", 4, Op.HEARTBEAT, 0, 0, frames.PAYLOAD_BYTES_MAX)
    claims = [[header(length=frames.PAYLOAD_BYTES_MAX), b"{}"], [header(Op.BATCH, 0, 16), body]]
    tracemalloc.start()
    try:
        for claim in claims:
            refusal(claim)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_unpack_is_lazy_about_batches() -> None:
    items = unpack(list(pack_batch([Frame(Op.RELOAD, i, b"") for i in range(3)])))
    assert next(items) == Frame(Op.RELOAD, 0, b"")
