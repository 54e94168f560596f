"""The class a plugin derives from."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, TextIO, overload

import pyarrow as pa

from casparian_flow.sdk.convert import record_batches
from casparian_flow.sdk.metadata import FileEvent, PluginContext, PluginMetadata

_TOPIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")

_inputs: dict[int, str] = {}
"""By plugin (its id), the file it processes now. No attribute of the plugin's, which could change
what `open_input` opens."""
Publisher = Callable[[str, pa.RecordBatch], None]


class BasePlugin:
    """Derive a class named `Handler` from this and write `execute` or `consume`.

    Rows leave by `publish(topic, data)`, or by returning or yielding them; those go to the topic
    of the module's MANIFEST, unless they come as `(topic, data)`.
    """

    _publisher: Publisher | None = None
    _published: dict[str, pa.Table] | None = None

    def configure(self, ctx: PluginContext, config: Mapping[str, Any]) -> None:
        """Called once, before the first file, with the plugin's parameters."""

    def execute(self, file_path: str) -> Any:
        """Process one file. Override this, or `consume` where more than the path is wanted."""
        raise NotImplementedError("write execute(self, file_path) or consume(self, event)")

    def consume(self, event: FileEvent) -> Any:
        """Process one file version; by default `execute(event.path)`."""
        return self.execute(event.path)

    @overload
    def open_input(self, mode: Literal["rb"] = "rb") -> BinaryIO: ...

    @overload
    def open_input(
        self,
        mode: Literal["r"],
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
    ) -> TextIO: ...

    def open_input(
        self,
        mode: Literal["rb", "r"] = "rb",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
    ) -> BinaryIO | TextIO:
        """Open the file that is being processed, for reading. Close it, or use it in a `with`.

        Args:
            mode: "rb" for bytes, "r" for text.
            encoding, errors, newline: of text, as for `open`.

        Raises:
            ValueError: another mode, or no file is being processed.
        """
        if mode not in {"rb", "r"}:
            raise ValueError(f"an input is opened in mode 'rb' or 'r', not {mode!r}")
        path = _inputs.get(id(self))
        if path is None:
            raise ValueError("no file is being processed: call open_input in execute or consume")
        if mode == "rb":
            return open(path, "rb")
        return open(path, encoding=encoding, errors=errors, newline=newline)

    def publish(self, topic: str, data: Any) -> None:
        """Send rows to a topic. May be called any number of times; order is kept.

        Args:
            topic: letters, digits, "_", "." and "-", at most 100.
            data: a pandas or polars DataFrame, a pyarrow Table, RecordBatch or
                RecordBatchReader, a list of dicts, any object with the Arrow PyCapsule interface,
                or a list or generator of these.

        Raises:
            ValueError: for a topic that cannot be one.
            TypeError: for data that is no rows; the message says what it was.
        """
        check_topic(topic)
        for batch in record_batches(data):
            self._emit(topic, batch)

    @property
    def published(self) -> dict[str, pa.Table]:
        """What was published so far, when the plugin runs outside of Casparian."""
        return {} if self._published is None else self._published

    def run(self, path: str, *, parameters: Mapping[str, Any] | None = None) -> dict[str, pa.Table]:
        """Process one file outside of Casparian, as a test would.

        Args:
            parameters: replace MANIFEST's one by one.

        Returns:
            What was published, by topic.
        """
        manifest = manifest_of(sys.modules.get(type(self).__module__))
        self._published = {}
        defaults = dict(manifest.parameters) if manifest else {}
        self.configure(PluginContext(), defaults | dict(parameters or {}))
        deliver(self, FileEvent(path), manifest.topic if manifest else "")
        return self.published

    def _emit(self, topic: str, batch: pa.RecordBatch) -> None:
        if self._publisher is not None:
            self._publisher(topic, batch)
            return
        tables = self._published = self._published or {}
        table = pa.Table.from_batches([batch])
        known = tables.get(topic)
        tables[topic] = (
            table if known is None else pa.concat_tables([known, table], promote_options="default")
        )


def check_topic(topic: object) -> None:
    """Refuse what cannot be a topic's name.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
        raise ValueError(
            f"topic {topic!r} must be 1 to 100 letters, digits, '_', '.' or '-', "
            "and must not begin with '.' or '-'"
        )


def manifest_of(module: object) -> PluginMetadata | None:
    """The module's MANIFEST, if it has one of the right kind."""
    manifest = getattr(module, "MANIFEST", None)
    return manifest if isinstance(manifest, PluginMetadata) else None


def deliver(plugin: BasePlugin, event: FileEvent, topic: str) -> None:
    """Have a plugin process one event, and publish what it returns or yields.

    Args:
        topic: where returned rows go that name no topic.

    Raises:
        TypeError: rows were returned and there is no topic for them, or they are no rows.
    """
    _inputs[id(plugin)] = event.path
    try:
        # Also while what it yields is read: a generator opens its input only then.
        for name, data in _addressed(plugin.consume(event)):
            plugin.publish(_required_topic(name or topic), data)
    finally:
        del _inputs[id(plugin)]


def _addressed(result: Any) -> Iterator[tuple[str, Any]]:
    """Take a returned value apart into (topic or "", data)."""
    if result is None:
        return
    if _is_addressed(result):
        yield result
    elif isinstance(result, list) and any(map(_is_addressed, result)):
        for item in result:
            yield from _addressed(item)
    elif isinstance(result, Iterator) and not hasattr(result, "__arrow_c_stream__"):
        yield from _addressed_run(result)
    else:
        yield "", result


def _addressed_run(items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """Keep runs of unaddressed items together, so that yielded dicts become batches, not rows."""
    for item in items:
        if item is None:
            continue
        if _is_addressed(item):
            yield item
            continue
        held: list[tuple[str, Any]] = []
        yield "", _until_addressed(item, items, held)
        yield from held


def _until_addressed(
    first: Any, items: Iterator[Any], held: list[tuple[str, Any]]
) -> Iterator[Any]:
    yield first
    for item in items:
        if _is_addressed(item):
            held.append(item)
            return
        yield item


def _is_addressed(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _required_topic(topic: str) -> str:
    if not topic:
        raise TypeError(
            "rows were returned, but MANIFEST names no topic for them: "
            "set PluginMetadata(topic=…), publish(topic, data), or return (topic, data)"
        )
    return topic
