"""Requests and replies of the control socket: JSON whose shapes come from the interfaces.

A request is one frame, `{"id", "op", "args"}`. A reply is `{"id", "ok": true, "result"}` or
`{"id", "ok": false, "error"}`; a result of bytes follows as a second frame. See docs/control.md.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec

from casparian_flow.domain import errors
from casparian_flow.domain.errors import CasparianError, ProtocolError, UsageError
from casparian_flow.sentinel.api import ApiStore, ControlApi

REQUEST_BYTES_MAX = 32 * 1024 * 1024
"""Holds 2,000 findings with the longest paths, and a plugin's source with its lock."""
REPLY_BYTES_MAX = 1024 * 1024 * 1024
"""Holds the inventory of several million files."""


def _rebuildable(kind: object) -> bool:
    """Whether `kind` is an error class made from a message and a hint alone."""
    if not (isinstance(kind, type) and issubclass(kind, CasparianError)):
        return False
    wanted = [
        p.name
        for p in inspect.signature(kind).parameters.values()
        if p.default is inspect.Parameter.empty
    ]
    return wanted == ["message"]


ERROR_CLASSES: dict[str, type[CasparianError]] = {
    name: kind for name, kind in vars(errors).items() if _rebuildable(kind)
}


class Request(msgspec.Struct):
    id: int
    op: str
    args: msgspec.Raw = msgspec.Raw(b"{}")


class ErrorBody(msgspec.Struct):
    kind: str
    message: str
    hint: str = ""
    exit_code: int = 1


class Reply(msgspec.Struct):
    id: int
    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorBody | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of ControlApi or ApiStore as it travels.

    Attributes:
        signature: to bind a client's arguments, without `self`.
        arguments: decoder of the args object into a struct with one field a parameter.
        result: decoder of the result; unused where `binary`.
        binary: the result is bytes and travels as a frame of its own.
    """

    name: str
    signature: inspect.Signature
    arguments: msgspec.json.Decoder[Any]
    result: msgspec.json.Decoder[Any]
    binary: bool


def _operation(name: str, method: Any) -> Operation:
    hints = get_type_hints(method)
    returns = hints.pop("return")
    signature = inspect.signature(method)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    fields: list[Any] = [
        (p.name, hints[p.name])
        if p.default is inspect.Parameter.empty
        else (p.name, hints[p.name], p.default)
        for p in parameters
    ]
    kind = msgspec.defstruct(
        f"{name.replace('.', '_')}_args", fields, forbid_unknown_fields=True, kw_only=True
    )
    return Operation(
        name,
        signature.replace(parameters=parameters),
        msgspec.json.Decoder(kind),
        msgspec.json.Decoder(Any if returns is bytes else returns),
        binary=returns is bytes,
    )


def _operations(interface: type, prefix: str = "") -> dict[str, Operation]:
    return {
        prefix + name: _operation(prefix + name, method)
        for name, method in vars(interface).items()
        if not name.startswith("_") and inspect.isfunction(method)
    }


API_PREFIX = "api."
"""Before the names of ApiStore's methods, some of which ControlApi has as well."""
CONTROL_OPERATIONS = _operations(ControlApi)
API_OPERATIONS = _operations(ApiStore, API_PREFIX)
OPERATIONS: dict[str, Operation] = CONTROL_OPERATIONS | API_OPERATIONS
_requests = msgspec.json.Decoder(Request)
_replies = msgspec.json.Decoder(Reply)
_encode = msgspec.json.Encoder().encode


def encode_request(number: int, operation: Operation, arguments: Mapping[str, Any]) -> bytes:
    """Raises:
    UsageError: an argument that JSON cannot hold, or a request above REQUEST_BYTES_MAX.
    """
    try:
        args = msgspec.Raw(_encode(arguments))
    except (TypeError, OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise UsageError(f"{operation.name}: {error}") from error
    request = _encode(Request(number, operation.name, args))
    if len(request) > REQUEST_BYTES_MAX:
        raise UsageError(
            f"{operation.name}: a request of {len(request)} bytes exceeds {REQUEST_BYTES_MAX}",
            hint="Send less at once.",
        )
    return request


def decode_request(frames: list[bytes]) -> Request:
    """Raises:
    ProtocolError: not one frame of JSON in a request's shape.
    """
    if len(frames) != 1:
        raise ProtocolError(f"a request is 1 frame, got {len(frames)}")
    if len(frames[0]) > REQUEST_BYTES_MAX:
        raise ProtocolError(f"a request of {len(frames[0])} bytes exceeds {REQUEST_BYTES_MAX}")
    try:
        return _requests.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"request: {error}") from error


def decode_arguments(request: Request) -> tuple[Operation, dict[str, Any]]:
    """The operation that a request names, and its arguments in the method's own types.

    Raises:
        UsageError: no such operation, or arguments of another shape.
    """
    operation = OPERATIONS.get(request.op)
    if operation is None:
        raise UsageError(
            f"the Sentinel knows no operation {request.op[:80]!r}",
            hint="Client and Sentinel may be of different versions: restart the Sentinel.",
        )
    try:
        arguments = operation.arguments.decode(request.args)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{request.op}: {error}") from error
    return operation, {f: getattr(arguments, f) for f in arguments.__struct_fields__}


def encode_result(number: int, operation: Operation, result: object) -> list[bytes]:
    if operation.binary:
        assert isinstance(result, bytes)
        return [_encode(Reply(number, ok=True)), result]
    return [_encode(Reply(number, ok=True, result=msgspec.Raw(_encode(result))))]


def encode_error(number: int, error: CasparianError) -> list[bytes]:
    # A class of somebody else's module travels as its nearest ancestor that every client knows.
    kind = next(k.__name__ for k in type(error).__mro__ if k.__name__ in ERROR_CLASSES)
    body = ErrorBody(kind, str(error), error.hint, error.exit_code)
    return [_encode(Reply(number, ok=False, error=body))]


def decode_reply(frames: list[bytes]) -> Reply:
    """Raises:
    ProtocolError: not a reply.
    """
    if not 1 <= len(frames) <= 2:
        raise ProtocolError(f"a reply is 1 or 2 frames, got {len(frames)}")
    try:
        return _replies.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"reply: {error}") from error


def result_of(operation: Operation, reply: Reply, frames: list[bytes]) -> Any:
    """The result in a reply, or the error in it raised as the class that the Sentinel raised.

    Raises:
        CasparianError: the reply's error.
        ProtocolError: a result of another shape.
    """
    if not reply.ok:
        raise error_of(reply.error or ErrorBody("CasparianError", "unknown error"))
    if operation.binary:
        if len(frames) != 2:
            raise ProtocolError(f"{operation.name}: the reply lacks its data")
        return frames[1]
    try:
        return operation.result.decode(reply.result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{operation.name}: {error}") from error


def error_of(body: ErrorBody) -> CasparianError:
    error = ERROR_CLASSES.get(body.kind, CasparianError)(body.message, hint=body.hint)
    if error.exit_code != body.exit_code:
        # A class this version does not know; its exit code still means something.
        error.exit_code = body.exit_code
    return error
