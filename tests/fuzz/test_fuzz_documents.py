"""Texts that people and strangers write, broken in small ways: taken, or refused with a reason."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FRAMES, ODD_TEXTS, Fuzz, rss_mb

from casparian_flow.config import load_settings
from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.lockfile import read_lock
from casparian_flow.domain.outputs import parse_sink_uri
from casparian_flow.sdk import BATCH_ROWS_MAX
from casparian_flow.sentinel.control_codec import (
    OPERATIONS,
    decode_arguments,
    decode_reply,
    decode_request,
    result_of,
)
from casparian_flow.services.ignore import compile_rules
from casparian_flow.services.manifest import read_manifest
from casparian_flow.services.routing import compile_route
from casparian_worker.arrow_ipc import HostileBatchError, decode, encode

ROUNDS = max(200, FRAMES // 50)
GROWTH_MB = 150.0
EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"
LOCK = Path(__file__).parents[1] / "data" / "excel_reader.uv.lock"


def survive(name: str, make: Callable[[Fuzz], Any], rounds: int = ROUNDS) -> None:
    """Run `make` so many times; it may raise nothing but the project's own errors."""
    fuzz = Fuzz(name)
    taken = refused = 0
    before = rss_mb()
    for number in range(rounds):
        try:
            make(fuzz)
        except CasparianError as error:
            refused += 1
            assert str(error), number  # noqa: PT017 - any message will do
        else:
            taken += 1
    print(f"{name}: {taken} taken, {refused} refused")
    assert refused
    assert taken > rounds // 200, "what is mutated should be nearly sound"
    assert rss_mb() - before < GROWTH_MB


CONFIG = """\
[database]
db_location = "casparian_flow.duckdb"
[sentinel]
bind_address = "tcp://127.0.0.1:5555"
lease_ttl_seconds = 30
heartbeat_seconds = 5
max_retries = 3
[worker]
output_root = "output"
slots = 2
memory_mb = 1024
[scout]
interval_seconds = 5
settle_seconds = 2
[sinks.mssql]
port = 1433
"""
TOML_WORDS = (*ODD_TEXTS, "[sentinel]\n", "= nan", "= inf", "= -1", "= 1e400", "= 1979-05-27",
              "= [1,2]", "= {a=1}", '"""', "\ufeff", "[[worker]]\n", "= 0x" + "f" * 99)  # fmt: skip


def test_configuration_files(tmp_path: Path) -> None:
    file = tmp_path / "global_config.toml"

    def load(fuzz: Fuzz) -> None:
        text = fuzz.text_of(CONFIG, TOML_WORDS)
        raw = text.encode("utf-8", "surrogatepass")
        file.write_bytes(fuzz.bytes_of(raw) if fuzz.rng.random() < 0.2 else raw)
        load_settings(file)

    survive("configuration", load, ROUNDS // 4)


URIS = (
    "parquet://sales/daily?compression=gzip", "sqlite:///var/db/x.sqlite3?table=t&mode=replace",
    "duckdb://x.duckdb", "mssql://dbo.sales?chunksize=100", "csv://a/b/c", "sqlite://%2e%2e/x",
)  # fmt: skip
URI_WORDS = (*ODD_TEXTS, "%00", "%2e%2e%2f", "?", "&", "=", "://", "user:pw@", "..", "/.", "%ff",
             "mode=error", "chunksize=99999999999999999999999", "²")  # fmt: skip


def test_sink_uris_are_refused_or_read_back_the_same() -> None:
    def parse(fuzz: Fuzz) -> None:
        address = parse_sink_uri(fuzz.text_of(fuzz.rng.choice(URIS), URI_WORDS))
        assert parse_sink_uri(address.uri) == address
        assert ".." not in address.path.split("/")
        assert "\0" not in address.path

    survive("sink URIs", parse, ROUNDS * 3)


PYTHON_WORDS = (
    *ODD_TEXTS, "MANIFEST = PluginMetadata(", "class Handler:\n", "(" * 300, "[" * 3000, "**x",
    "9" * 5000, "1e999", "{1: 2}", "-" * 2000 + "1", "lambda: 0", "f'{x}'", "\f", "\\", "'''",
    "priority=10**9", "topic=b'x'", "outputs={'t': {'columns': []}}", "sinks={'*': ['csv://x']}",
    "not " * 500, "a." * 3000 + "b", "if x:\n " * 90,
)  # fmt: skip


def test_manifests() -> None:
    sources = [p.read_text() for p in sorted(EXAMPLES.glob("*.py"))]
    assert sources

    def read(fuzz: Fuzz) -> None:
        read_manifest(fuzz.text_of(fuzz.rng.choice(sources), PYTHON_WORDS))

    survive("manifests", read, ROUNDS)


CONTRACT = {
    "mode": "strict",
    "columns": [
        {"name": "id", "type": "int64", "nullable": False},
        {"name": "at", "type": {"kind": "timestamp_tz", "tz": "UTC"}},
        {"name": "day", "type": "date", "format": "%Y-%m-%d"},
        {"name": "price", "type": {"kind": "decimal", "precision": 10, "scale": 2}},
        {"name": "tags", "type": {"kind": "list", "item": "string"}},
        {
            "name": "where",
            "type": {"kind": "struct", "fields": [{"name": "x", "type": "float64"}]},
        },
    ],
    "quarantine": {"allow": True, "max_pct": 5.0},
}


def test_contracts() -> None:
    def parse(fuzz: Fuzz) -> None:
        value: Any = CONTRACT
        for _ in range(fuzz.rng.choice((1, 1, 3))):
            value = fuzz.json_of(value)
        text = fuzz.json_bytes(value).decode("utf-8", "surrogatepass")
        parse_contract(fuzz.text_of(text) if fuzz.rng.random() < 0.2 else text)

    survive("contracts", parse)


def test_locks() -> None:
    # The first packages, the root among them.
    lock = "[[package]]".join(LOCK.read_text().split("[[package]]")[:4])
    assert tomllib.loads(lock)

    def read(fuzz: Fuzz) -> None:
        found = read_lock(fuzz.text_of(lock, TOML_WORDS))
        found.problems()
        found.pyproject()

    survive("locks", read, ROUNDS // 4)


PATTERNS = ("*.csv", "!data/**/x?.txt", "/a/[a-z]*/", "a\\ b", "**/[!x]/**")
GLOB_WORDS = (*ODD_TEXTS, "**", "**/" * 50, "[", "]", "[!", "\\", "?" * 80, "[[:alpha:]]", "{a,b}")
PATHS = ("a/b/c.csv", "x" * 200, "a/" * 60 + "b", "data/ü/x1.txt", "udc\udcff.csv")


@pytest.mark.timeout(120)
def test_patterns_end_on_every_path() -> None:
    def match(fuzz: Fuzz) -> None:
        text = fuzz.text_of(fuzz.rng.choice(PATTERNS), GLOB_WORDS)
        rules = compile_rules([text], [])
        matches = compile_route(text)
        for path in PATHS:
            matches(path)
        assert rules is not None

    survive("patterns", match, ROUNDS // 2)


def _request(name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "version_id": 1, "plugin": "sales", "priority": 5, "force": True, "job_id": 7,
        "limit": 5, "offset": 0, "path": "/data", "root_id": 1, "scan_id": 1, "execute": True,
        "pattern": "*.csv", "tag": "csv", "rule_id": 1, "topic": "t", "uri": "csv://x",
        "directory": "/tmp/x", "forward": True, "reason": "r", "deleted": ["a"],
        "findings": [{"rel_path": "a.csv", "signature": [1, 2, 3, 4, 5]}],
    }  # fmt: skip
    wanted = OPERATIONS[name].signature.parameters
    return {"id": 3, "op": name, "args": {k: v for k, v in arguments.items() if k in wanted}}


def test_control_requests_and_replies() -> None:
    names = list(OPERATIONS)

    def ask(fuzz: Fuzz) -> None:
        name = fuzz.rng.choice(names)
        value = fuzz.json_of(_request(name)) if fuzz.rng.random() < 0.8 else _request(name)
        raw = fuzz.json_bytes(value)
        decode_arguments(decode_request([fuzz.bytes_of(raw) if fuzz.rng.random() < 0.2 else raw]))

    def answer(fuzz: Fuzz) -> None:
        row = {"id": 3, "ok": fuzz.rng.random() < 0.7, "result": [{"id": 1, "path": "/x"}]}
        frames = [fuzz.json_bytes(fuzz.json_of(row))]
        reply = decode_reply(frames)
        result_of(OPERATIONS[fuzz.rng.choice(names)], reply, frames)

    survive("control requests", ask, ROUNDS * 3)
    survive("control replies", answer)


def test_arrow_batches() -> None:
    """Offsets, lengths and FlatBuffers tables that point anywhere."""
    import pyarrow as pa

    table = pa.RecordBatch.from_pydict(
        {
            "n": pa.array(range(50), pa.int32()),
            "text": pa.array(["ä" * (i % 7) if i % 5 else None for i in range(50)]),
            "list": pa.array([[i] * (i % 4) for i in range(50)], pa.list_(pa.int64())),
            "struct": pa.array([{"a": i, "b": str(i)} for i in range(50)]),
            "when": pa.array(range(50), pa.timestamp("us", "UTC")),
        }
    )
    body = bytes(encode(table))
    fuzz = Fuzz("Arrow batches")
    taken = 0
    for _ in range(ROUNDS * 3):
        try:
            batch = decode(fuzz.bytes_of(body))
        except HostileBatchError:
            continue
        taken += 1
        assert batch.num_rows <= BATCH_ROWS_MAX
        assert batch.slice(1).equals(batch.slice(1))
    print(f"{taken} batches taken")


def test_json_texts_of_great_depth_are_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for read in (
        parse_contract,
        lambda text: decode_request([text.encode()]),
        lambda text: decode_request([json.dumps({"id": 1, "op": "x"}).encode() + text.encode()]),
    ):
        with pytest.raises(CasparianError):
            read(deep)
