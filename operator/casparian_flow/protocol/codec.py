"""JSON for the messages, by prebuilt decoders."""

from typing import Any

import msgspec

from casparian_flow.domain.errors import ProtocolError
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.frames import Frame, Op, unpack
from casparian_flow.protocol.limits import INT_MAX, bound

MESSAGE_OF: dict[Op, type[Any]] = {
    Op.IDENTIFY: m.Identify,
    Op.DISPATCH: m.Dispatch,
    Op.ABORT: m.Abort,
    Op.HEARTBEAT: m.Heartbeat,
    Op.CONCLUDE: m.Conclude,
    Op.ERR: m.Err,
    Op.RELOAD: m.Reload,
    Op.DISPATCH_ACK: m.DispatchAck,
    Op.DEPLOY: m.Deploy,
    Op.ACK: m.Ack,
    Op.STAGE: m.Stage,
    Op.GRANT: m.Grant,
    Op.REFUSE: m.Refuse,
    Op.CONCLUDE_ACK: m.ConcludeAck,
    Op.RECOVER: m.Recover,
    Op.WELCOME: m.Welcome,
    Op.PLUGIN: m.Plugin,
    Op.STAGES: m.Stages,
    Op.DISCARD: m.Discard,
    Op.TRIAL: m.Trial,
    Op.TRIAL_RESULT: m.TrialResult,
}
OP_OF: dict[type[Any], Op] = {kind: op for op, kind in MESSAGE_OF.items()}
_DECODERS = {op: msgspec.json.Decoder(kind) for op, kind in MESSAGE_OF.items()}
_encode = msgspec.json.Encoder().encode


def encode(job_id: int, message: m.Message) -> Frame:
    """A message as one frame, its op taken from its type."""
    return Frame(OP_OF[type(message)], job_id, _encode(message))


def decode(frame: Frame) -> m.Message:
    """The message in a frame.

    Raises:
        ProtocolError: the payload is not JSON of the op's shape, or exceeds its limits.
    """
    try:
        message: m.Message = _DECODERS[frame.op].decode(frame.payload or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{frame.op.name}: {error}") from error
    if frame.job_id > INT_MAX:
        raise ProtocolError(f"{frame.op.name}: job id {frame.job_id} is too large")
    bound(message)
    return message


def decode_all(frames: list[bytes]) -> list[tuple[int, m.Message]]:
    """Every (job id, message) within one ZeroMQ message.

    Raises:
        ProtocolError: nothing of the message is to be used then.
    """
    return [(frame.job_id, decode(frame)) for frame in unpack(frames)]
