"""Frames: a 16-byte header `!BBHQI` and a JSON payload. Standard library only.

A message is two ZeroMQ frames, [header][payload]. BATCH carries many in one: its payload is a
sequence of header+payload items, and its header's LEN covers them all.
"""

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from casparian_flow.domain.errors import ProtocolError

VERSION = 0x04
HEADER = struct.Struct("!BBHQI")
HEADER_BYTES = HEADER.size
PAYLOAD_BYTES_MAX = 16 * 1024 * 1024
"""Larger payloads are refused before they are parsed; a plugin's source and lock fit well."""
BATCH_ITEMS_MAX = 4096


class Op(IntEnum):
    IDENTIFY = 1
    DISPATCH = 2
    ABORT = 3
    HEARTBEAT = 4
    CONCLUDE = 5
    ERR = 6
    RELOAD = 7
    DISPATCH_ACK = 8
    # 9 stays unused: earlier protocols of this version meant ENV_READY by it.
    DEPLOY = 10
    ACK = 11
    STAGE = 12
    GRANT = 13
    REFUSE = 14
    CONCLUDE_ACK = 15
    RECOVER = 16
    BATCH = 17
    WELCOME = 18
    PLUGIN = 19
    STAGES = 20
    DISCARD = 21
    TRIAL = 22
    TRIAL_RESULT = 23


_OPS: dict[int, Op] = {int(op): op for op in Op}


class Frame(NamedTuple):
    op: Op
    job_id: int
    payload: bytes


def pack(op: Op, job_id: int, payload: bytes) -> tuple[bytes, bytes]:
    """One message as its two frames."""
    return HEADER.pack(VERSION, op, 0, job_id, len(payload)), payload


def pack_batch(items: Iterable[Frame]) -> tuple[bytes, bytes]:
    """Many messages as the two frames of one BATCH."""
    parts: list[bytes] = []
    for op, job_id, payload in items:
        parts.append(HEADER.pack(VERSION, op, 0, job_id, len(payload)))
        parts.append(payload)
    body = b"".join(parts)
    return HEADER.pack(VERSION, Op.BATCH, 0, 0, len(body)), body


def unpack(frames: list[bytes]) -> Iterator[Frame]:
    """The messages within one ZeroMQ message, BATCH taken apart.

    Raises:
        ProtocolError: wrong number of frames, short header, other version, unknown op, reserved
            bits set, length that does not match, too large, BATCH within BATCH.
    """
    if len(frames) != 2:
        raise ProtocolError(f"want 2 frames, got {len(frames)}")
    header, payload = frames
    if len(header) != HEADER_BYTES:
        raise ProtocolError(f"header has {len(header)} bytes, want {HEADER_BYTES}")
    op, job_id, length = _header(header, 0)
    if length != len(payload):
        raise ProtocolError(f"header says {length} payload bytes, got {len(payload)}")
    if op is not Op.BATCH:
        yield Frame(op, job_id, payload)
        return
    offset, count, end = 0, 0, len(payload)
    while offset < end:
        count += 1
        if count > BATCH_ITEMS_MAX:
            raise ProtocolError(f"BATCH has more than {BATCH_ITEMS_MAX} items")
        if end - offset < HEADER_BYTES:
            raise ProtocolError("BATCH ends within a header")
        op, job_id, length = _header(payload, offset)
        if op is Op.BATCH:
            raise ProtocolError("BATCH within BATCH")
        offset += HEADER_BYTES
        if length > end - offset:
            raise ProtocolError("BATCH ends within a payload")
        yield Frame(op, job_id, payload[offset : offset + length])
        offset += length


def _header(buffer: bytes, offset: int) -> tuple[Op, int, int]:
    version, op_code, reserved, job_id, length = HEADER.unpack_from(buffer, offset)
    if version != VERSION:
        raise ProtocolError(f"protocol version 0x{version:02x}, want 0x{VERSION:02x}")
    if reserved:
        raise ProtocolError("reserved bits are set")
    if length > PAYLOAD_BYTES_MAX:
        raise ProtocolError(f"payload of {length} bytes exceeds {PAYLOAD_BYTES_MAX}")
    op = _OPS.get(op_code)
    if op is None:
        raise ProtocolError(f"unknown op {op_code}")
    return op, job_id, length
