"""How large the parts of a message may be, so that no peer can make the other side hold more.

`bound` runs on every decoded message. Text that only informs people (logs, error messages) is
cut, because refusing it would make the peer repeat it for ever; everything else is refused.
"""

from collections.abc import Callable, Collection, Iterable, Sized
from typing import Any

from casparian_flow.domain.errors import ProtocolError
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.samples import samples_problem
from casparian_flow.protocol import messages as m

INT_MAX = 2**63 - 1
"""Largest integer in any field, and largest job id: what a BIGINT column holds."""
NAME_CHARS_MAX = 255
"""Worker and plugin names, versions, hosts, nonces, reasons, hashes, tokens."""
TEXT_CHARS_MAX = 8_192
"""URIs, paths, table and stage names."""
MESSAGE_CHARS_MAX = 16_384
"""Error messages; cut at the end."""
TOKEN_CHARS_MAX = 16_384
"""A pod's token; those of Kubernetes have about 1,200."""
LOG_CHARS_MAX = 262_144
"""Logs; cut at the beginning, as the end tells most."""
REPORT_CHARS_MAX = 65_536
"""Of a run's rows; left out if it is longer."""
CAPABILITIES_MAX = 1_024
HELD_MAX = 65_536
SLOTS_MAX = 1_024
CREDIT_MAX = 4_096
SANDBOX_MAX = 64
METRICS_MAX = 256
ENTRIES_MAX = 16_384
TOKENS_MAX = 65_536
BUNDLE_BYTES_MAX = 6 * 1024 * 1024
"""Holds the largest plugin bundle (docs/artifact.md)."""
TOPICS_MAX = 1_024


def bound(message: m.Message) -> None:
    """Cut what may be cut and refuse what is too large.

    Raises:
        ProtocolError: names the field and its limit.
    """
    check = _CHECKS.get(type(message))
    if check is not None:
        check(message)


def _text(field: str, text: str, limit: int = NAME_CHARS_MAX) -> None:
    if len(text) > limit:
        raise ProtocolError(f"{field} has {len(text)} characters, at most {limit}")


def _count(field: str, items: Sized, limit: int) -> None:
    if len(items) > limit:
        raise ProtocolError(f"{field} has {len(items)} items, at most {limit}")


def _integer(field: str, value: int, low: int = 0, high: int = INT_MAX) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{field} must be {low} to {high}")


def _held(held: Collection[str]) -> None:
    _count("held", held, HELD_MAX)
    for token in held:
        _text("held", token)


def _identify(message: m.Identify) -> None:
    for field in ("worker_id", "nonce", "root_id", "hostname", "version"):
        _text(field, getattr(message, field))
    if not message.nonce or not message.worker_id:
        raise ProtocolError("worker_id and nonce must not be empty")
    _count("capabilities", message.capabilities, CAPABILITIES_MAX)
    for name in message.capabilities:
        _text("capabilities", name)
    _held(message.held)
    _integer("slots", message.slots, 1, SLOTS_MAX)
    _integer("credit", message.credit, 1, CREDIT_MAX)
    _integer("pid", message.pid)
    _count("sandbox", message.sandbox, SANDBOX_MAX)
    for name, state in message.sandbox.items():
        _text("sandbox", name)
        _text("sandbox", state, TEXT_CHARS_MAX)
    _text("token", message.token, TOKEN_CHARS_MAX)


def _heartbeat(message: m.Heartbeat) -> None:
    _text("status", message.status)
    _held(message.held)


def _dispatch_ack(message: m.DispatchAck) -> None:
    _text("token", message.token)


def _conclude(message: m.Conclude) -> None:
    _text("token", message.token)
    _text("status", message.status)
    _text("reason", message.reason)
    _count("metrics", message.metrics, METRICS_MAX)
    for name, value in message.metrics.items():
        _text("metrics", name)
        _integer("metrics", value, -INT_MAX)
    if len(message.error_message) > MESSAGE_CHARS_MAX:
        message.error_message = message.error_message[:MESSAGE_CHARS_MAX]
    if len(message.log) > LOG_CHARS_MAX:
        message.log = message.log[-LOG_CHARS_MAX:]
    if len(message.report) > REPORT_CHARS_MAX:
        message.report = ""  # a part of it could not be read


def _entries(entries: Iterable[OutputEntry]) -> None:
    for entry in entries:
        # Sums first: hardly any entry comes near a limit, and only then is it worth a name.
        names = len(entry.topic) + len(entry.root_id) + len(entry.output_key)
        names += len(entry.slice_key) + len(entry.sha256)
        texts = len(entry.uri) + len(entry.stage) + len(entry.final)
        numbers = (entry.n, entry.rows, entry.bytes, *entry.order_no)
        short = names <= NAME_CHARS_MAX and texts <= TEXT_CHARS_MAX
        if short and min(numbers) >= 0 and max(numbers) <= INT_MAX:
            continue
        for field in ("topic", "root_id", "output_key", "slice_key", "sha256"):
            _text(field, getattr(entry, field))
        for field in ("uri", "stage", "final"):
            _text(field, getattr(entry, field), TEXT_CHARS_MAX)
        for field in ("n", "rows", "bytes"):
            _integer(field, getattr(entry, field))
        for part in entry.order_no:
            _integer("order_no", part)


def _stage(message: m.Stage) -> None:
    _text("token", message.token)
    _count("entries", message.entries, ENTRIES_MAX)
    _entries(message.entries)


def _err(message: m.Err) -> None:
    _text("code", message.code)
    if len(message.message) > MESSAGE_CHARS_MAX:
        message.message = message.message[:MESSAGE_CHARS_MAX]


def _tokens(message: Any) -> None:
    _count("tokens", message.tokens, TOKENS_MAX)
    for token in message.tokens:
        _text("tokens", token)


def _deploy(message: m.Deploy) -> None:
    if len(message.bundle) > BUNDLE_BYTES_MAX:
        raise ProtocolError(f"bundle has {len(message.bundle)} bytes, at most {BUNDLE_BYTES_MAX}")


def _trial(message: m.Trial) -> None:
    _text("trial_id", message.trial_id)
    problem = samples_problem(message.samples)
    if problem:
        raise ProtocolError(f"samples: {problem}")


def _trial_result(message: m.TrialResult) -> None:
    for field in ("trial_id", "outcome", "reason"):
        _text(field, getattr(message, field))
    _count("rows", message.rows, TOPICS_MAX)
    for topic, rows in message.rows.items():
        _text("rows", topic)
        _integer("rows", rows)
    if len(message.message) > MESSAGE_CHARS_MAX:
        message.message = message.message[:MESSAGE_CHARS_MAX]
    if len(message.log) > LOG_CHARS_MAX:
        message.log = message.log[-LOG_CHARS_MAX:]


_CHECKS: dict[type[Any], Callable[[Any], None]] = {
    m.Identify: _identify,
    m.Heartbeat: _heartbeat,
    m.DispatchAck: _dispatch_ack,
    m.Conclude: _conclude,
    m.Stage: _stage,
    m.Recover: _stage,
    m.Err: _err,
    m.ConcludeAck: _tokens,
    m.Stages: _tokens,
    m.Discard: _tokens,
    m.Deploy: _deploy,
    m.Trial: _trial,
    m.TrialResult: _trial_result,
}
