"""Any table, cut into any batches: the rows written are the rows read, at every sink."""

import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sink_kit import Output, job_run, output_at

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
STAMP = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1))  # noqa: DTZ001 - naive on purpose
KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.int8(), st.integers(-128, 127)),
    (pa.uint32(), st.integers(0, 2**32 - 1)),
    (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    (pa.bool_(), st.booleans()),
    (pa.string(), TEXT),
    (pa.binary(), st.binary(max_size=8)),
    (pa.date32(), st.dates(date(1900, 1, 1), date(2200, 1, 1))),
    (pa.timestamp("us"), STAMP),
    (pa.decimal128(20, 4), st.decimals(-(10**9), 10**9, places=4)),
]
NAMES = ["a", "B b", 'c"d', "é", "select"]


@st.composite
def batches(draw: st.DrawFn) -> list[pa.RecordBatch]:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=len(NAMES)))
    schema = pa.schema([(NAMES[i], kind) for i, (kind, _) in enumerate(kinds)])
    cuts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    return [
        pa.RecordBatch.from_arrays(
            [
                pa.array(draw(st.lists(st.none() | v, min_size=n, max_size=n)), kind)
                for kind, v in kinds
            ],
            schema=schema,
        )
        for n in cuts
    ]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def parquet_rows(output: Output, final: str, names: list[str]) -> list[tuple[Any, ...]]:
    table = pq.read_table(Path(output.env.root.path) / final)
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def csv_rows(output: Output, final: str, names: list[str]) -> list[tuple[Any, ...]]:
    table = pyarrow.csv.read_csv(
        Path(output.env.root.path) / final,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    )
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def table_rows(output: Output, final: str, names: list[str]) -> list[tuple[Any, ...]]:
    columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
    sql = f'SELECT {columns} FROM "{final}" ORDER BY rowid'
    path = Path(output.env.root.path) / output.sink.address.path
    if output.uri.startswith("sqlite"):
        db = sqlite3.connect(path)
        try:
            return db.execute(sql).fetchall()
        finally:
            db.close()
    with duckdb.connect(str(path)) as connection:
        return connection.execute(sql).fetchall()


def as_sqlite(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S.%f}"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return f"{value:.4f}"
    return value


def check(output: Output, rows: list[pa.RecordBatch], job: int) -> None:
    names = rows[0].schema.names
    expected = [row for b in rows for row in zip(*(c.to_pylist() for c in b.columns), strict=True)]
    entry = output.put(job_run(job), *rows, topic=f"t{job}")
    assert entry.rows == len(expected)
    if not expected:
        assert entry.stage == ""
        return
    scheme = output.uri.partition(":")[0]
    if scheme == "parquet":
        assert parquet_rows(output, entry.final, names) == expected
    elif scheme == "csv":
        kinds = [rows[0].schema.field(name).type for name in names]
        found = csv_rows(output, entry.final, names)
        assert [from_text(row, kinds) for row in found] == expected
    else:
        found = table_rows(output, entry.final, names)
        if scheme == "sqlite":
            expected = [tuple(as_sqlite(v) for v in row) for row in expected]
        assert found == expected


def from_text(row: tuple[Any, ...], kinds: list[pa.DataType]) -> tuple[Any, ...]:
    readers: dict[pa.DataType, Any] = {
        pa.float64(): float,
        pa.bool_(): lambda text: text == "true",
        pa.string(): str,
        pa.binary(): bytes.fromhex,
        pa.date32(): date.fromisoformat,
        pa.timestamp("us"): datetime.fromisoformat,
        pa.decimal128(20, 4): Decimal,
    }
    pairs = zip(row, kinds, strict=True)
    return tuple(None if text is None else readers.get(kind, int)(text) for text, kind in pairs)


_jobs = iter(range(1, 10**9))


@pytest.mark.parametrize(
    ("uri", "examples"),
    [
        ("parquet://out", 60),
        ("csv://out", 60),
        ("sqlite://db.sqlite3", 60),
        ("duckdb://db.duckdb", 12),
    ],
)
def test_rows_written_are_rows_read(folder: Path, uri: str, examples: int) -> None:
    output = output_at(folder, uri)

    # A failing example is printed with the decorator that reproduces it.
    @settings(
        max_examples=examples,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(batches())
    def holds(rows: list[pa.RecordBatch]) -> None:
        check(output, rows, next(_jobs))

    holds()


def test_zoned_timestamps_are_the_same_instants_everywhere(folder: Path) -> None:
    moment = datetime(2024, 7, 1, 12, 30, tzinfo=UTC)
    rows = pa.record_batch({"t": pa.array([moment], pa.timestamp("us", "Europe/Paris"))})
    for uri in ("parquet://zoned", "duckdb://zoned.duckdb"):
        output = output_at(folder, uri)
        entry = output.put(job_run(next(_jobs)), rows)
        read = parquet_rows if uri.startswith("parquet") else table_rows
        assert read(output, entry.final, ["t"]) == [(moment,)]
