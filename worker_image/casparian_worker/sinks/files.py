"""Sinks that write one file per output: the mechanism, whatever the format.

Staged as `<root>/.stage/{token}.{n}`, published by `link(stage, final)`, which never overwrites.
The final name says all that a reader or a later publisher needs:

    {topic}-{slice, 24 hex}-{version}.{manifest}.{generation}-{output key, 32 hex}.parquet

so the newest result of a source file is the one with the highest numbers among the names that
share a slice. For `replace` and `error` an index keeps the look-up independent of how many files
the folder holds: an empty file `<root>/.slices/{2 hex}/{slice key}/{numbers}-{key}` is made
before the output is linked, and removed after the output is.
"""

import abc
import contextlib
import os
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from casparian_flow.domain.errors import (
    OutputLostError,
    SinkConflictError,
    SinkError,
    require,
)
from casparian_flow.domain.outputs import (
    QUARANTINE_SUFFIX,
    OutputEntry,
    OutputKind,
    SinkAddress,
    SinkMode,
    parse_sink_uri,
)
from casparian_worker.sinks.base import (
    Receipt,
    RowWriter,
    SinkEnvironment,
    StageContext,
    StagedData,
    keys_of,
    stage_name,
    token_of_stage,
    token_parts,
    topic_name,
)
from casparian_worker.sinks.durable import (
    HashingFile,
    file_sha256,
    sink_error,
    unlink_if_present,
)
from casparian_worker.sinks.root import SLICE_FOLDER, STAGE_FOLDER, OutputRoot

_MAX_NAME_BYTES: Final = 255
_PROBE: Final = ".casparian-probe"
_MARKER: Final = re.compile(r"(\d{1,18})\.(\d{1,18})\.(\d{1,18})-([0-9a-f]{32})")


class FormatWriter(abc.ABC):
    """Writes batches into an open file in one format."""

    @abc.abstractmethod
    def write(self, batch: pa.RecordBatch) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is still buffered and the format's end; the file itself stays open."""


class FileFormat(abc.ABC):
    """A file format."""

    extension: str

    @abc.abstractmethod
    def writer(
        self,
        file: HashingFile,
        schema: pa.Schema,
        ctx: StageContext,
        before: FormatWriter | None = None,
    ) -> FormatWriter:
        """A writer for rows of `schema`, taking over from the one `before` after a change."""

    @abc.abstractmethod
    def needs_rewrite(self, old: pa.Schema, new: pa.Schema) -> bool:
        """Whether a file begun in one schema cannot go on in a wider one."""

    @abc.abstractmethod
    def copy(
        self,
        path: str,
        writer: FormatWriter,
        conform: Callable[[pa.RecordBatch], pa.RecordBatch],
    ) -> None:
        """Write the rows of the file at `path` again, a bounded number at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the outputs of one slice go.

    Attributes:
        folder: relative to the output root, "" for the root itself.
        label: what file names begin with.
        extension: with its dot.
    """

    folder: str
    label: str
    extension: str

    def final(self, slice_key: str, numbers: str, key: str) -> str:
        """Path of a published file, relative to the output root."""
        name = f"{self.label}-{slice_key[:24]}-{numbers}-{key[:32]}{self.extension}"
        if len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise SinkError(
                f"the file name {name[:60]!r}… is longer than {_MAX_NAME_BYTES} bytes",
                hint="Shorten the topic or the last part of the sink URI.",
            )
        return f"{self.folder}/{name}" if self.folder else name


def place_of(address: SinkAddress, topic: str, kind: OutputKind, extension: str) -> Place:
    """Folder and label of an output; `topic` carries the quarantine suffix already.

    A path that ends in the format's extension gives the label, and its parent the folder. The
    quarantine of either goes to a folder beside it, `{path}_quarantine`.
    """
    folder, label = address.path, topic
    if folder.lower().endswith(extension):
        stem = folder[: -len(extension)]
        folder, _, label = stem.rpartition("/")
        if kind is OutputKind.QUARANTINE:
            folder = stem + QUARANTINE_SUFFIX
    elif kind is OutputKind.QUARANTINE:
        folder += QUARANTINE_SUFFIX
    return Place(folder, label, extension)


def _numbers(order_no: tuple[int, int, int]) -> str:
    version, manifest, generation = order_no
    return f"{version:06d}.{manifest:06d}.{generation:04d}"


class FileSink:
    """A sink of one format below the output root."""

    def __init__(self, address: SinkAddress, env: SinkEnvironment, file_format: FileFormat) -> None:
        self._address = address
        self._env = env
        self._format = file_format
        self._root = env.root
        self._probed: set[str] = set()

    @property
    def address(self) -> SinkAddress:
        return self._address

    def check(self) -> None:
        self._probe(self._root.stage_folder)

    def open_stage(self, ctx: StageContext) -> "FileStageWriter":
        place = place_of(self._address, topic_name(ctx), ctx.kind, self._format.extension)
        self._probe(self._root.folder(place.folder))
        keys = keys_of(ctx, self._address, self._root.root_id)
        if ctx.mode is SinkMode.ERROR:
            self._refuse_foreign(keys.slice, keys.output, place)
        final = place.final(keys.slice, _numbers(ctx.run.order_no), keys.output)
        return FileStageWriter(ctx, self._address, self._root, final, self._format)

    def publish(self, entry: OutputEntry, token: str) -> Receipt:
        """See `Sink.publish`.

        Files: link the stage into place; then, for `replace`, take the slice's older files away.
        A reader may briefly see both.
        """
        place = self._checked_place(entry, token)
        slices = _SliceIndex(self._root, entry.slice_key, place)
        guarded = entry.mode is not SinkMode.APPEND
        if entry.mode is SinkMode.ERROR:
            self._refuse_foreign(entry.slice_key, entry.output_key, place)
        already = False
        if entry.rows:
            if guarded:
                slices.mark(entry.order_no, entry.output_key)
            already = self._link(entry, place)
        removed = 0
        if entry.mode is SinkMode.REPLACE:
            removed = slices.remove_older(entry.order_no, besides=entry.output_key)
        return Receipt(entry.output_key, already, removed)

    def unstage(self, entry: OutputEntry, token: str) -> None:
        if entry.rows:
            self._checked_place(entry, token)
            path = self._root.resolve(entry.stage)
            try:
                unlink_if_present(path)
            except OSError as error:
                raise sink_error(error, "delete", path) from error
            self._root.directories.sync(self._root.stage_folder)

    def list_stages(self) -> AbstractSet[str]:
        return list_stage_files(self._root)

    def delete_stages(self, tokens: AbstractSet[str]) -> int:
        return delete_stage_files(self._root, tokens)

    def _checked_place(self, entry: OutputEntry, token: str) -> Place:
        """Work the names out again, and insist that the manifest says the same."""
        if entry.root_id != self._root.root_id:
            raise SinkError(
                f"output {entry.output_key[:12]} was staged under output root {entry.root_id}, "
                f"this is {self._root.root_id}",
                hint="Start a worker with that output folder.",
            )
        address = parse_sink_uri(entry.uri)
        place = place_of(address, entry.topic, entry.kind, self._format.extension)
        if entry.rows:
            final = place.final(entry.slice_key, _numbers(entry.order_no), entry.output_key)
            stage = f"{STAGE_FOLDER}/{stage_name(token, entry.n)}"
            require(entry.final == final, f"manifest names {entry.final!r}, not {final!r}")
            require(entry.stage == stage, f"manifest names {entry.stage!r}, not {stage!r}")
        return place

    def _link(self, entry: OutputEntry, place: Place) -> bool:
        """Put the file in place. True if it was there already."""
        stage = self._root.resolve(entry.stage)
        folder = self._root.folder(place.folder)
        final = self._root.resolve(entry.final)
        already = False
        try:
            os.link(stage, final, follow_symlinks=False)
        except FileExistsError:
            already = True
            self._require_same(final, entry)
        except FileNotFoundError:
            already = True
            self._require_published(final, entry)
        except OSError as error:
            raise sink_error(error, "publish", final) from error
        self._root.directories.sync(folder)
        return already

    def _require_same(self, final: str, entry: OutputEntry) -> None:
        try:
            found = file_sha256(final)
        except OSError as error:
            raise sink_error(error, "read", final) from error
        if found != entry.sha256:
            raise SinkConflictError(
                f"{final} holds other bytes (sha256 {found[:12]}…, granted {entry.sha256[:12]}…)",
                hint="Move that file away, then let the job publish again: "
                "`casparian job resolve --forward`.",
            )

    def _require_published(self, final: str, entry: OutputEntry) -> None:
        if os.path.lexists(final):
            self._require_same(final, entry)
            return
        raise OutputLostError(
            f"neither the stage {entry.stage} nor {final} exists",
            hint="Restore either from a backup, or give the output up with "
            "`casparian job resolve --abandon` and run the job again.",
        )

    def _refuse_foreign(self, slice_key: str, output_key: str, place: Place) -> None:
        others = _SliceIndex(self._root, slice_key, place).present(besides=output_key)
        if others:
            raise SinkConflictError(
                f"mode=error: {others[0]} already holds rows of this file and topic",
                hint="Use mode=replace or mode=append, or move that file away.",
            )

    def _probe(self, folder: str) -> None:
        """Prove once per folder that a file can be made and linked from the stages into it.

        Another file system mounted below the root, or one without hard links, would otherwise
        fail after the grant, when it is too late to refuse.
        """
        if folder in self._probed:
            return
        source = os.path.join(self._root.stage_folder, _PROBE)
        target = os.path.join(folder, _PROBE)
        try:
            os.close(os.open(source, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
            with contextlib.suppress(FileExistsError):  # another worker probes right now
                os.link(source, target)
            if folder != self._root.stage_folder:
                unlink_if_present(target)
        except OSError as error:
            raise sink_error(error, "link files into", folder) from error
        self._probed.add(folder)


class FileStageWriter(RowWriter):
    """Streams one output into its stage, hashing as it writes."""

    def __init__(
        self,
        ctx: StageContext,
        address: SinkAddress,
        root: OutputRoot,
        final: str,
        file_format: FileFormat,
    ) -> None:
        super().__init__(ctx, address, root.root_id)
        self._root = root
        self._format = file_format
        self._name = stage_name(ctx.run.token, ctx.n)
        self._path = os.path.join(root.stage_folder, self._name)
        self._final = final
        self._file: HashingFile | None = None
        self._schema = pa.schema([])
        self._writer: FormatWriter | None = None

    def abort(self) -> None:
        self._writer = None
        if self._file is not None:
            self._file.discard()
            self._file = None
            for path in (self._path, self._narrow_path):
                unlink_if_present(path)

    @property
    def _narrow_path(self) -> str:
        return self._path + ".narrow"

    def _where(self) -> str:
        return self._path

    def _begin(self, schema: pa.Schema) -> None:
        unlink_if_present(self._path)  # of this very attempt: nobody else has its token
        self._file = HashingFile(self._path)
        self._schema = schema
        self._writer = self._format.writer(self._file, schema, self._ctx, self._writer)

    def _widen(self, schema: pa.Schema) -> None:
        """Go on in a wider schema; rows that no longer fit it are written again."""
        if not self._format.needs_rewrite(self._schema, schema):
            self._schema = schema
            return
        assert self._file is not None
        assert self._writer is not None
        self._writer.close()
        self._file.flush()
        self._file.discard()
        os.replace(self._path, self._narrow_path)
        self._begin(schema)
        assert self._writer is not None
        self._format.copy(self._narrow_path, self._writer, self._tracker.conform)
        os.unlink(self._narrow_path)

    def _append(self, batch: pa.RecordBatch) -> None:
        assert self._writer is not None
        self._writer.write(batch)

    def _end(self) -> StagedData:
        assert self._file is not None
        assert self._writer is not None
        self._writer.close()
        size = self._file.size
        digest = self._file.commit()
        self._root.directories.sync(self._root.stage_folder)
        stage = f"{STAGE_FOLDER}/{self._name}"
        return StagedData(stage, self._final, self._rows, size, digest)


class _SliceIndex:
    """Which files are in place for one slice: empty marker files, one an output."""

    def __init__(self, root: OutputRoot, slice_key: str, place: Place) -> None:
        self._root = root
        self._slice_key = slice_key
        self._place = place
        self._relative = f"{SLICE_FOLDER}/{slice_key[:2]}/{slice_key}"

    def mark(self, order_no: tuple[int, int, int], output_key: str) -> None:
        """Record, durably, that this output is about to be in place."""
        folder = self._root.folder(self._relative)
        path = os.path.join(folder, f"{_numbers(order_no)}-{output_key[:32]}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise sink_error(error, "write", path) from error
        self._root.directories.sync(folder)

    def present(self, *, besides: str) -> list[str]:
        """Files of the slice that exist under other keys, relative to the root."""
        finals = [
            self._place.final(self._slice_key, numbers, key)
            for _, numbers, key in self._markers()
            if key != besides[:32]
        ]
        return [final for final in finals if os.path.lexists(self._root.resolve(final))]

    def remove_older(self, order_no: tuple[int, int, int], *, besides: str) -> int:
        """Take away the slice's other files, but for newer ones; returns how many there were."""
        removed = 0
        older = [m for m in self._markers() if m[0] <= order_no and m[2] != besides[:32]]
        try:
            for _, numbers, key in older:
                final = self._root.resolve(self._place.final(self._slice_key, numbers, key))
                removed += unlink_if_present(final)
            if removed:
                self._root.directories.sync(self._root.folder(self._place.folder))
            for _, numbers, key in older:
                unlink_if_present(self._root.resolve(f"{self._relative}/{numbers}-{key}"))
        except OSError as error:
            raise sink_error(error, "remove replaced files from", self._place.folder) from error
        return removed

    def _markers(self) -> list[tuple[tuple[int, int, int], str, str]]:
        """(order, its text, first 32 digits of the key) of every marker, in no special order."""
        folder = self._root.resolve(self._relative)
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise sink_error(error, "read", folder) from error
        markers = []
        for name in names:
            match = _MARKER.fullmatch(name)
            if match:
                order = (int(match[1]), int(match[2]), int(match[3]))
                markers.append((order, name.rpartition("-")[0], match[4]))
        return markers


def list_stage_files(root: OutputRoot) -> set[str]:
    """Tokens with a stage file in the output root, of any sink that stages files.

    Raises:
        SinkError: the folder cannot be read.
    """
    try:
        names = os.listdir(root.stage_folder)
    except OSError as error:
        raise sink_error(error, "read", root.stage_folder) from error
    return {token for token in map(token_of_stage, names) if token}


def delete_stage_files(root: OutputRoot, tokens: AbstractSet[str]) -> int:
    """Delete the stage files of these tokens; returns how many files went.

    Raises:
        SinkError: one could not be deleted.
    """
    for token in tokens:
        token_parts(token)
    deleted = 0
    try:
        for name in os.listdir(root.stage_folder):
            if token_of_stage(name) in tokens:
                deleted += unlink_if_present(os.path.join(root.stage_folder, name))
    except OSError as error:
        raise sink_error(error, "delete stages in", root.stage_folder) from error
    if deleted:
        root.directories.sync(root.stage_folder)
    return deleted
