"""In the sandbox: load the plugin and run it over one file after another."""

import contextlib
import errno
import linecache
import os
import socket
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

import pyarrow as pa

from casparian_flow.sdk import BATCH_BYTES, BATCH_ROWS_MAX, BasePlugin, FileEvent, PluginContext
from casparian_flow.sdk.plugin import deliver, manifest_of
from casparian_worker import arrow_ipc, clearing
from casparian_worker.bridge import (
    BridgeError,
    ErrorKind,
    Frame,
    FrameReader,
    Kind,
    pack,
    pack_json,
    send_batch,
)

LOG_MARK = b"\x1eCASPARIAN %d\x1e\n"
"""Written to stderr before each job, so that the host can tell whose output follows."""
MESSAGE_CHARS_MAX = 4_000
_MODULE = "casparian_plugin"
_HELD_ROWS = 8_192
"""Batches below this are gathered; larger ones are sent as they come."""


class InvalidPluginError(Exception):
    """The source cannot be a plugin; the message says what to change."""


def serve(
    sock: socket.socket, reader: FrameReader, hello: dict[str, Any], *, scratch: str
) -> NoReturn:
    """Answer RUN frames until the host closes the bridge or a job fails."""
    own = os.getpid()
    # A forked copy of the plugin must not speak for it.
    os.register_at_fork(after_in_child=sock.close)
    outbox = Outbox(sock)
    # Its first use imports pandas, where there is one: better now than within a job's time.
    pa.array([0])
    with _reporting(sock, 0, loading=True):
        plugin, topic = _load(hello, outbox, scratch)
    sock.sendall(pack(Kind.READY))
    while True:
        frame = reader.pop()
        if frame is None:
            if not reader.fill():
                os._exit(0)
            continue
        sys.stdout.flush()
        os.write(2, LOG_MARK % frame.job)
        with _reporting(sock, frame.job):
            _run(sock, frame, plugin, topic, outbox)
        if os.getpid() != own:
            os._exit(0)
        outbox.end()
        sys.stdout.flush()
        sys.stderr.flush()
        clearing.empty(scratch)
        counts = {"rows": outbox.rows, "batches": outbox.batches}
        sock.sendall(pack_json(Kind.END, frame.job, counts))


def _run(
    sock: socket.socket, frame: Frame, plugin: BasePlugin, topic: str, outbox: "Outbox"
) -> None:
    run = frame.json()
    outbox.begin(frame.job)
    sock.sendall(pack(Kind.BEGIN, frame.job))
    event = FileEvent(run["path"], run["file_version_id"], metadata=run["metadata"])
    deliver(plugin, event, topic)
    outbox.flush()


class Outbox:
    """Sends batches under the current job; small ones of one topic are gathered into larger."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._job = 0
        self._held: dict[str, list[pa.RecordBatch]] = {}
        self._bytes = 0
        self.rows = 0
        self.batches = 0

    def begin(self, job: int) -> None:
        self._job = job
        self._held.clear()
        self._bytes = self.rows = self.batches = 0

    def end(self) -> None:
        """From now on refuse what a thread of the job may still have to say."""
        self._job = 0

    def publish(self, topic: str, batch: pa.RecordBatch) -> None:
        """Take a batch over; called by BasePlugin.publish."""
        if self._job == 0:
            raise RuntimeError("publish only while a file is being processed")
        held = self._held.get(topic)
        if held and held[0].schema != batch.schema:
            self._flush_topic(topic)
            held = None
        if not held and batch.num_rows >= _HELD_ROWS:
            self._send(topic, batch)
            return
        self._held.setdefault(topic, []).append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= BATCH_BYTES or len(self._held[topic]) >= _HELD_ROWS:
            self.flush()

    def flush(self) -> None:
        for topic in list(self._held):
            self._flush_topic(topic)
        self._bytes = 0

    def _flush_topic(self, topic: str) -> None:
        held = self._held.pop(topic, [])
        if len(held) <= 1:
            for batch in held:
                self._send(topic, batch)
            return
        table = pa.Table.from_batches(held).combine_chunks()
        for batch in table.to_batches(max_chunksize=BATCH_ROWS_MAX) or held[:1]:
            self._send(topic, batch)

    def _send(self, topic: str, batch: pa.RecordBatch) -> None:
        try:
            send_batch(self._sock, self._job, topic, arrow_ipc.encode(batch))
        except BridgeError as error:
            raise ValueError(f"cannot publish to {topic}: {error}") from error
        self.rows += batch.num_rows
        self.batches += 1


def _load(hello: dict[str, Any], outbox: Outbox, scratch: str) -> tuple[BasePlugin, str]:
    """Run the plugin's module, make its Handler and configure it."""
    name, source = hello["plugin_name"], hello["source_code"]
    filename = f"{name}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = ModuleType(_MODULE)
    module.__file__ = filename
    sys.modules[_MODULE] = module
    exec(compile(source, filename, "exec"), module.__dict__)  # noqa: S102 - in the sandbox
    handler = _handler_class(module)
    plugin = handler()
    plugin._publisher = outbox.publish  # noqa: SLF001 - the SDK's hook for its host
    context = PluginContext(name, hello["plugin_version"], scratch)
    plugin.configure(context, hello["parameters"])
    manifest = manifest_of(module)
    return plugin, manifest.topic if manifest else ""


def _handler_class(module: ModuleType) -> type[BasePlugin]:
    handler = getattr(module, "Handler", None)
    own = sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == _MODULE
    )
    if not isinstance(handler, type):
        found = f"found: {', '.join(own)}" if own else "found no class"
        raise InvalidPluginError(f"plugin class must be named Handler ({found})")
    if not issubclass(handler, BasePlugin):
        raise InvalidPluginError("Handler must derive from casparian_flow.sdk.BasePlugin")
    if handler.execute is BasePlugin.execute and handler.consume is BasePlugin.consume:
        raise InvalidPluginError("Handler must define execute(file_path) or consume(event)")
    return handler


class _reporting(contextlib.AbstractContextManager["_reporting"]):  # noqa: N801 - reads as a verb
    """Turn any exception of foreign code into an ERROR frame, and end the process."""

    def __init__(self, sock: socket.socket, job: int, *, loading: bool = False) -> None:
        self._sock = sock
        self._job = job
        self._loading = loading
        self._own = os.getpid()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        with contextlib.suppress(Exception):
            _print_traceback(error)
        if os.getpid() == self._own:
            told = describe(error, loading=self._loading)
            with contextlib.suppress(OSError):
                self._sock.sendall(pack_json(Kind.ERROR, self._job, told))
        os._exit(0)


def describe(error: BaseException, *, loading: bool) -> dict[str, Any]:
    """An exception as the fields of an ERROR frame."""
    told: dict[str, Any] = {"kind": _error_kind(error, loading=loading), "message": _told(error)}
    if isinstance(error, SystemExit):
        told["message"] = f"the plugin called sys.exit({error.code!r})"[:MESSAGE_CHARS_MAX]
    transient = getattr(error, "transient", None)
    if isinstance(transient, bool):
        told["transient"] = transient
    return told


def _error_kind(error: BaseException, *, loading: bool) -> str:
    if isinstance(error, SystemExit):
        return ErrorKind.EXITED
    if isinstance(error, MemoryError):
        return ErrorKind.MEMORY
    if isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN:
        return ErrorKind.PROCESSES
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return ErrorKind.PROCESSES
    if loading or isinstance(error, InvalidPluginError):
        return ErrorKind.INVALID
    return ErrorKind.RAISED


def _told(error: BaseException) -> str:
    """The exception in one line with the plugin's own line number."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a plugin's __str__ may raise anything
        text = "(its text cannot be made)"
    kind = type(error).__name__
    own = isinstance(error, InvalidPluginError)
    line = _line_of(error)
    where = f" (line {line})" if line and not own else ""
    head = text if own else f"{kind}: {text}" if text else kind
    return head[:MESSAGE_CHARS_MAX] + where


def _line_of(error: BaseException) -> int:
    lines = [
        number
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == _MODULE
    ]
    return lines[-1] if lines else 0


def _print_traceback(error: BaseException) -> None:
    """Into the log, beginning at the plugin's first frame."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_globals.get("__name__") != _MODULE:
        trace = trace.tb_next
    if not isinstance(error, InvalidPluginError):
        traceback.print_exception(type(error), error, trace or error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
