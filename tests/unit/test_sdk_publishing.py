"""What a plugin may publish, and that the SDK works without Casparian around it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from casparian_flow.domain.outputs import TOPIC_PATTERN
from casparian_flow.sdk import (
    BATCH_BYTES,
    BATCH_ROWS_MAX,
    BasePlugin,
    FileEvent,
    PermanentError,
    PluginMetadata,
    TransientError,
    record_batches,
)
from casparian_flow.sdk import plugin as plugin_module

ROWS: list[dict[str, Any]] = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]


class Capsule:
    """Rows behind nothing but the Arrow PyCapsule interface."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)  # type: ignore[no-untyped-call]


class ArrayCapsule:
    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self._batch.__arrow_c_array__(requested_schema)  # type: ignore[no-untyped-call]


def rows_of(data: Any) -> list[dict[str, Any]]:
    return [row for batch in record_batches(data) for row in batch.to_pylist()]


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.to_batches()[0],
        lambda t: t.to_reader(),
        pl.from_arrow,
        lambda t: t.to_pandas(),
        Capsule,
        lambda t: ArrayCapsule(t.to_batches()[0]),
        lambda t: ROWS,
        lambda t: iter(ROWS),
        lambda t: [t.slice(0, 1), t.slice(1)],
        lambda t: (part for part in (t.slice(0, 1).to_pandas(), ROWS[1])),
    ],
)
def test_every_kind_of_rows_is_the_same_rows(make: Any) -> None:
    assert rows_of(make(pa.Table.from_pylist(ROWS))) == ROWS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"a": [1]}, "one dict may mean a row or columns"),
        ("text", "cannot publish str"),
        (7, "cannot publish int"),
        ([1, 2], "cannot publish int"),
        ([[{"a": 1}]], "item 0 is list"),
        ([None], "item 0 is NoneType"),
        (pd.Series([1]), "use series.to_frame()"),
        (pl.Series([1]), "use series.to_frame()"),
        (pl.DataFrame({"a": [1]}).lazy(), "call .collect() first"),
        (np.array([1]), "cannot publish numpy.ndarray"),
        ([{"a": 1}, {"a": "x"}], "column 'a'"),
        ([{"a": 2**70}], "column 'a': a number is too large"),
        ([{1: 2}], "a column named 1"),
        (pd.DataFrame({"ok": [1, 2], "mixed": [1, "x"]}), "column 'mixed'"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "several columns named 'a'"),
        (pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), "several columns named 'a'"),
    ],
)
def test_anything_else_is_a_type_error_that_says_what_it_was(data: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        list(record_batches(data))
    assert words in str(caught.value)


def test_columns_of_all_rows_count_and_not_only_the_firsts() -> None:
    assert rows_of([{"a": 1}, {"b": 2}]) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_a_lists_column_has_one_type_however_long_the_list() -> None:
    rows = [{"x": None}] * (BATCH_ROWS_MAX + 10) + [{"x": 1.5}]
    types = {str(batch.schema.field("x").type) for batch in record_batches(rows)}
    assert types == {"double"}


def test_a_named_index_becomes_columns_and_an_unnamed_one_goes() -> None:
    frame = pd.DataFrame({"k": ["x", "x", "y"], "v": [1, 2, 3]})
    assert rows_of(frame.groupby("k").sum()) == [{"k": "x", "v": 3}, {"k": "y", "v": 3}]
    assert rows_of(frame[frame.v > 1]) == [{"k": "x", "v": 2}, {"k": "y", "v": 3}]


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"c": pd.Categorical(["x", "y", "x"])}),
        pl.DataFrame({"c": pl.Series(["x", "y", "x"], dtype=pl.Categorical)}),
        pa.table({"c": pa.array(["x", "y", "x"]).dictionary_encode()}),
        pa.table({"c": pa.array(["x", "y", "x"], pa.string_view())}),
    ],
)
def test_encodings_are_decoded(data: Any) -> None:
    batches = list(record_batches(data))
    assert all(str(b.schema.field("c").type) in {"string", "large_string"} for b in batches)
    assert rows_of(data) == [{"c": "x"}, {"c": "y"}, {"c": "x"}]


def test_nested_encodings_are_decoded_too() -> None:
    inner = pa.dictionary(pa.int8(), pa.string())
    table = pa.table({"l": pa.array([["x"]], pa.list_(inner)), "n": [1]})
    assert str(next(record_batches(table)).schema.field("l").type) == "list<item: string>"


def test_batches_are_bounded_in_rows_and_bytes() -> None:
    narrow = list(record_batches(pa.table({"n": range(200_000)})))
    assert [b.num_rows for b in narrow] == [65_536, 65_536, 65_536, 3_392]
    wide = list(record_batches(pa.table({"t": ["x" * 100_000] * 500})))
    assert all(b.nbytes <= BATCH_BYTES for b in wide)
    assert sum(b.num_rows for b in wide) == 500


def test_a_generator_of_rows_is_streamed() -> None:
    made = 0

    def rows() -> Iterator[dict[str, int]]:
        nonlocal made
        for made in range(1_000_000):
            yield {"i": made}

    batches = record_batches(rows())
    assert next(batches).num_rows == 1024
    assert made < 2000


def test_a_table_without_rows_still_names_its_columns() -> None:
    (batch,) = record_batches(pa.table({"a": pa.array([], pa.int32())}))
    assert (batch.num_rows, batch.schema.names) == (0, ["a"])
    assert list(record_batches([])) == []


MANIFEST = PluginMetadata(pattern="*.txt", topic="rows", parameters={"times": 2})


class Handler(BasePlugin):
    def configure(self, ctx: object, config: Any) -> None:
        self.times = config["times"]

    def execute(self, file_path: str) -> Any:
        self.publish("log", [{"path": file_path}])
        return pd.DataFrame({"n": range(self.times)})


def test_a_plugin_runs_without_casparian() -> None:
    tables = Handler().run("a.txt")
    assert tables["log"].to_pylist() == [{"path": "a.txt"}]
    assert tables["rows"].to_pylist() == [{"n": 0}, {"n": 1}]
    assert Handler().run("a.txt", parameters={"times": 1})["rows"].num_rows == 1


def test_returned_and_yielded_rows_may_name_their_topic() -> None:
    class Yielding(BasePlugin):
        def execute(self, file_path: str) -> Any:
            yield {"a": 1}
            yield {"a": 2}
            yield "other", [{"b": 1}]
            yield None
            yield {"a": 3}

    plugin = Yielding()
    plugin_module.deliver(plugin, FileEvent("x"), "main")
    assert plugin.published["main"].to_pylist() == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert plugin.published["other"].to_pylist() == [{"b": 1}]


def test_a_generator_that_names_every_topic_needs_none_of_its_own() -> None:
    class Yielding(BasePlugin):
        def execute(self, file_path: str) -> Any:
            yield "other", [{"b": 1}]

    plugin = Yielding()
    plugin_module.deliver(plugin, FileEvent("x"), "")
    assert plugin.published["other"].num_rows == 1


def test_returned_rows_without_a_topic_are_told_what_to_do() -> None:
    class Returning(BasePlugin):
        def execute(self, file_path: str) -> Any:
            return [{"a": 1}]

    with pytest.raises(TypeError, match="MANIFEST names no topic"):
        plugin_module.deliver(Returning(), FileEvent("x"), "")


@pytest.mark.parametrize("topic", ["", "../x", ".hidden", "a b", "x" * 101, None, 7])
def test_impossible_topics_are_refused(topic: Any) -> None:
    with pytest.raises(ValueError, match="topic"):
        BasePlugin().publish(topic, [{"a": 1}])


def test_sdk_and_worker_agree_on_what_a_topic_is() -> None:
    assert plugin_module._TOPIC.pattern == TOPIC_PATTERN.pattern


def test_errors_say_whether_trying_again_helps() -> None:
    assert (TransientError().transient, PermanentError().transient) == (True, False)


def test_the_sdk_imports_nothing_else_of_ours_and_no_pandas() -> None:
    code = (
        "import sys, casparian_flow.sdk; print([m for m in sys.modules if m.startswith("
        "('casparian_flow.', 'casparian_worker', 'pandas', 'polars'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = eval(out.stdout)
    assert all(name.startswith("casparian_flow.sdk") for name in loaded), loaded


class Opener(BasePlugin):
    """Publishes what it reads from the open input."""

    def execute(self, file_path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        with self.open_input() as file:
            yield "raw", [{"size": len(file.read())}]
        with self.open_input("r", encoding="latin-1", newline="") as text:
            yield "text", [{"line": line} for line in text]


def test_a_plugin_opens_what_it_was_handed_as_bytes_and_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nb".encode("latin-1"))
    tables = Opener().run(str(path))
    assert tables["raw"].to_pylist() == [{"size": 4}]
    assert tables["text"].to_pylist() == [{"line": "é\r\n"}, {"line": "b"}]


def test_there_is_no_input_outside_of_a_file_and_none_to_write_to(tmp_path: Path) -> None:
    plugin = Opener()
    with pytest.raises(ValueError, match="no file is being processed"):
        plugin.open_input()
    (tmp_path / "a.txt").write_text("")
    plugin.run(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="no file is being processed"):
        plugin.open_input()
    with pytest.raises(ValueError, match="'rb' or 'r'"):
        plugin.open_input("w")  # type: ignore[call-overload]
