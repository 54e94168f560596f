"""Sinks, outputs and the one key under which a result may be published once.

`output_key` is what makes execution at-least-once but publication at-most-once: it is reserved
in the ledger at the grant, names the final file, and is the primary key of the fence row that a
SQL sink writes in the publishing transaction.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from urllib.parse import parse_qsl, quote, unquote, urlencode

from casparian_flow.domain.errors import UsageError

TOPIC_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
ANY_TOPIC = "*"
QUARANTINE_SUFFIX = "_quarantine"
LINEAGE_COLUMNS = (
    "_cf_source_hash",
    "_cf_job_id",
    "_cf_processed_at",
    "_cf_parser_version",
)
SCHEMES = ("parquet", "csv", "sqlite", "duckdb", "mssql")
FILE_SCHEMES = ("parquet", "csv")
_OPTIONS: dict[str, frozenset[str]] = {
    "parquet": frozenset({"compression", "mode"}),
    "csv": frozenset({"mode"}),
    "sqlite": frozenset({"table", "mode"}),
    "duckdb": frozenset({"table", "mode"}),
    "mssql": frozenset({"mode", "chunksize"}),
}
_COMPRESSIONS = ("snappy", "zstd", "gzip", "lz4", "brotli", "none")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


class SinkMode(StrEnum):
    APPEND = "append"
    """Keeps the rows of every version of a file."""
    REPLACE = "replace"
    """Removes, in the same commit, the rows of earlier versions of the same file and topic."""
    ERROR = "error"
    """Fails if the target already holds rows of that file and topic."""


@dataclass(frozen=True, slots=True)
class SinkAddress:
    """A parsed sink URI: `scheme://path?options`, in canonical form, without credentials.

    Attributes:
        scheme: one of SCHEMES.
        path: parquet, csv: a folder (or file stem) relative to the output root;
            sqlite, duckdb: the database file, absolute or relative to the output root;
            mssql: `table` or `schema.table`.
        table: for sqlite and duckdb the table given by `?table=`, else "" (table = topic).
        mode: given by `?mode=`, else append.
        compression: for parquet.
        chunksize: rows per bulk insert, for mssql.
    """

    scheme: str
    path: str
    table: str = ""
    mode: SinkMode = SinkMode.APPEND
    compression: str = "zstd"
    chunksize: int = 10_000

    @property
    def identity(self) -> str:
        """Where the data goes, without what only says how (mode, compression, chunk size)."""
        query = "?" + urlencode({"table": self.table}) if self.table else ""
        return f"{self.scheme}://{quote(self.path)}{query}"

    @property
    def uri(self) -> str:
        """The whole address as text; `parse_sink_uri` reads it back to an equal one."""
        options: dict[str, str] = {}
        if self.table:
            options["table"] = self.table
        if self.mode is not SinkMode.APPEND:
            options["mode"] = self.mode
        if self.scheme == "parquet" and self.compression != "zstd":
            options["compression"] = self.compression
        if self.scheme == "mssql" and self.chunksize != 10_000:
            options["chunksize"] = str(self.chunksize)
        query = "?" + urlencode(options) if options else ""
        return f"{self.scheme}://{quote(self.path)}{query}"


@lru_cache(maxsize=1024)
def parse_sink_uri(uri: str) -> SinkAddress:
    """Read a sink URI as a user writes it.

    `parquet://path/to/output`, `csv://…` (relative to the output root), `sqlite:///abs/db.sqlite3`
    or `sqlite://rel/db.sqlite3`, likewise `duckdb://`, and `mssql://table`.

    Raises:
        UsageError: unknown scheme or option, a path that leaves the output root, credentials in
            the URI, or a name that is no identifier.

    >>> parse_sink_uri("parquet://sales/daily?compression=gzip").uri
    'parquet://sales/daily?compression=gzip'
    >>> parse_sink_uri("sqlite:///var/db/x.sqlite3").path
    '/var/db/x.sqlite3'
    """
    scheme, separator, rest = uri.partition("://")
    full, uri = uri, _told(uri)
    if len(full) > 2000 or any(ord(c) < 32 for c in full):
        raise UsageError(f"sink URI {uri[:80]!r} is too long or has control characters")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in full):
        raise UsageError(f"sink URI {uri[:80]!r} is not valid Unicode")
    if not separator or scheme not in SCHEMES:
        raise UsageError(
            f"sink URI {uri!r}: unknown scheme {scheme!r}",
            hint="Use one of " + ", ".join(f"{s}://" for s in SCHEMES) + ".",
        )
    raw_path, _, query = rest.partition("?")
    path = _unquote(raw_path, uri)
    if "@" in raw_path.split("/")[0]:
        raise UsageError(
            f"sink URI for {scheme!r} carries credentials",
            hint="Put them into the configuration or the environment of the worker.",
        )
    options = _options(scheme, query, uri)
    if scheme in FILE_SCHEMES:
        path = _relative(path, uri)
    elif scheme == "mssql":
        names = path.strip("/").split(".")
        if len(names) > 2 or not all(_IDENTIFIER.fullmatch(n) for n in names):
            raise UsageError(f"sink URI {uri!r}: want mssql://table or mssql://schema.table")
        path = path.strip("/")
    elif path.startswith("/"):
        path = "/" + _relative(path.lstrip("/"), uri)
    else:
        path = _relative(path, uri)
    table = options.get("table", "")
    if table and not _IDENTIFIER.fullmatch(table):
        raise UsageError(f"sink URI {uri!r}: table {table!r} is no plain identifier")
    compression = options.get("compression", "zstd")
    if compression not in _COMPRESSIONS:
        raise UsageError(
            f"sink URI {uri!r}: unknown compression {compression!r}",
            hint="Use one of " + ", ".join(_COMPRESSIONS) + ".",
        )
    chunksize = options.get("chunksize", "10000")
    if not (chunksize.isascii() and chunksize.isdigit() and 1 <= int(chunksize) <= 1_000_000):
        raise UsageError(f"sink URI {uri!r}: chunksize wants 1 to 1000000")
    return SinkAddress(
        scheme,
        path,
        table,
        parse_mode(options.get("mode", "append")),
        compression,
        int(chunksize),
    )


def _told(uri: str) -> str:
    """A URI as messages and logs may show it: without what could be a password."""
    return re.sub(r"//[^/?]*@", "//…@", uri.partition("?")[0])


def parse_mode(text: str) -> SinkMode:
    """Read a sink mode.

    Raises:
        UsageError: for anything but append, replace and error.
    """
    try:
        return SinkMode(text)
    except ValueError:
        raise UsageError(
            f"unknown sink mode {text!r}", hint="Use append, replace or error."
        ) from None


def _unquote(path: str, uri: str) -> str:
    try:
        text = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise UsageError(f"sink URI {uri!r}: the path is not UTF-8") from None
    if any(ord(c) < 32 for c in text):
        raise UsageError(f"sink URI {uri!r} has control characters")
    return text


def _relative(path: str, uri: str) -> str:
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise UsageError(
            f"sink URI {uri!r} leaves the output root",
            hint="Remove '..' from the path.",
        )
    if not parts:
        raise UsageError(f"sink URI {uri!r} names no path")
    if any(p.startswith(".") for p in parts):
        raise UsageError(f"sink URI {uri!r}: a part begins with a dot; those are kept for stages")
    return "/".join(parts)


def _options(scheme: str, query: str, uri: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise UsageError(f"sink URI {uri!r}: the part after '?' is not key=value") from None
    options = dict(pairs)
    if len(options) != len(pairs):
        raise UsageError(f"sink URI {uri!r} gives an option twice")
    unknown = sorted(set(options) - _OPTIONS[scheme])
    if unknown:
        raise UsageError(
            f"sink URI {uri!r}: unknown option {unknown[0]!r}",
            hint=f"{scheme}:// takes " + ", ".join(sorted(_OPTIONS[scheme])) + ".",
        )
    return options


@dataclass(frozen=True, slots=True)
class QuarantinePolicy:
    """How many bad rows an output may have before the job fails with nothing written."""

    allow: bool = False
    max_pct: float = 10.0
    """Percent of the topic's rows in one job."""
    max_count: int | None = None


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """One place where one topic goes.

    Attributes:
        topic: a topic's name, or ANY_TOPIC for those without a sink of their own.
        uri: canonical (`SinkAddress.uri`).
        schema_json: the topic's contract as JSON text, "" for none (domain/contracts.py).
    """

    topic: str
    uri: str
    mode: SinkMode = SinkMode.APPEND
    schema_json: str = ""
    quarantine: QuarantinePolicy = field(default_factory=QuarantinePolicy)


def sinks_for(topic: str, sinks: Iterable[SinkSpec]) -> list[SinkSpec]:
    """The sinks of a topic: its own; if it has none, the wildcard's; else a default Parquet one."""
    everything = list(sinks)
    own = [s for s in everything if s.topic == topic]
    if own:
        return own
    wild = [s for s in everything if s.topic == ANY_TOPIC]
    return wild or [SinkSpec(topic, f"parquet://{quote(topic)}")]


OUTPUTS_MAX = 1000
"""Outputs of one job."""


class OutputKind(StrEnum):
    OUTPUT = "output"
    QUARANTINE = "quarantine"


class OutputState(StrEnum):
    GRANTED = "GRANTED"
    PUBLISHED = "PUBLISHED"
    ABANDONED = "ABANDONED"


@dataclass(frozen=True, slots=True)
class OutputEntry:
    """One staged output, as the manifest records it; enough for any worker to publish it.

    Attributes:
        n: index within the job's manifest; with the token it names the stage.
        topic: the topic as published by the plugin (with suffix for quarantine).
        uri: canonical URI of the sink, without credentials.
        root_id: id of the output root (file sinks, embedded databases) or of the server.
        stage: what the sink calls the staged data: a path relative to the output root or an
            absolute one, or a table name. Empty for zero rows.
        final: likewise for the published data.
        rows, bytes: counts of the staged data.
        sha256: hex digest of the staged file, "" for tables.
    """

    n: int
    topic: str
    kind: OutputKind
    uri: str
    mode: SinkMode
    root_id: str
    output_key: str
    slice_key: str
    order_no: tuple[int, int, int]
    stage: str
    final: str
    rows: int
    bytes: int
    sha256: str = ""


def output_roots(entries: Iterable[OutputEntry]) -> set[str]:
    """Ids of the output roots that whoever publishes these has to reach; a server's is none."""
    return {e.root_id for e in entries if e.root_id and not e.uri.startswith("mssql:")}


def framed_digest(*parts: str) -> str:
    """SHA-256, hex, over the parts, each preceded by its length in eight bytes.

    No two lists of parts share an encoding.
    """
    framed: list[bytes] = []
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        framed += (len(raw).to_bytes(8, "big"), raw)
    return hashlib.sha256(b"".join(framed)).hexdigest()


def sink_id(address: SinkAddress, root_id: str, mode: SinkMode) -> str:
    """Identity of a sink within a key: canonical URI, root id, table and mode."""
    return "\n".join((address.identity, root_id, mode))


def output_key(
    ledger_id: str,
    version_id: int,
    artifact_hash: str,
    parameters_hash: str,
    topic: str,
    sink: str,
    generation: int,
) -> str:
    """The key under which one result may be published, once: 64 hex digits (`framed_digest`)."""
    return framed_digest(
        ledger_id,
        str(version_id),
        artifact_hash,
        parameters_hash,
        topic,
        sink,
        str(generation),
    )


def slice_key(ledger_id: str, location_id: int, plugin: str, topic: str, sink: str) -> str:
    """The key of what `replace` replaces: all versions of one file under one plugin and topic."""
    return framed_digest(ledger_id, str(location_id), plugin, topic, sink)


def parameters_hash(parameters_json: str) -> str:
    """Digest of a plugin's parameters as canonical JSON text."""
    return hashlib.sha256(parameters_json.encode()).hexdigest()


def metrics_of(entries: Iterable[OutputEntry]) -> Mapping[str, int]:
    """Sum rows and bytes over the outputs, and the quarantined rows apart.

    A topic with several sinks has its bad rows in a quarantine at each; they are counted once.
    """
    rows = size = 0
    quarantined: dict[str, int] = {}
    for entry in entries:
        size += entry.bytes
        if entry.kind is OutputKind.QUARANTINE:
            quarantined[entry.topic] = max(quarantined.get(entry.topic, 0), entry.rows)
        else:
            rows += entry.rows
    return {"rows": rows, "bytes": size, "quarantine_rows": sum(quarantined.values())}
