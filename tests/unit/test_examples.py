"""The example plugins, run as their authors would: without Casparian, on real files."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from casparian_flow.sdk import PermanentError

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"
DATA = Path(str(files("vega_datasets"))) / "_data"


class Loader:
    """Imports a plugin under a name of its own, as `manifest_of` expects, and forgets it after."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> Any:
        path = next(PLUGINS.rglob(f"{name}.py"))
        module_name = f"example_{name}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        self.names.append(module_name)
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def load() -> Iterator[Loader]:
    loader = Loader()
    yield loader
    for name in loader.names:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["airports", "seattle-weather", "us-employment", "la-riots"])
def test_csv_table_reads_what_pandas_reads(load: Loader, name: str) -> None:
    tables = load("csv_table").Handler().run(str(DATA / f"{name}.csv"))
    (topic,) = tables
    assert topic == name.replace("-", "_")
    assert tables[topic].num_rows == len(pd.read_csv(DATA / f"{name}.csv"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'name,note\nx,"a, ""b""\nc"\n', {"name": "x", "note": 'a, "b"\nc'}),
        ("\ufeffname,note\nx,y\n".encode(), {"name": "x", "note": "y"}),
        ("name,note\nJosé,ñ\n".encode("latin-1"), {"name": "José", "note": "ñ"}),
        ("name,note\nJosé,ñ\n".encode(), {"name": "José", "note": "ñ"}),
    ],
    ids=["quotes and line ends", "byte order mark", "latin-1", "utf-8"],
)
def test_csv_table_understands_the_files_people_have(
    load: Loader, tmp_path: Path, raw: bytes, expected: dict[str, str]
) -> None:
    file = tmp_path / "odd name (1).csv"
    file.write_bytes(raw)
    assert load("csv_table").Handler().run(str(file))["odd_name_1"].to_pylist() == [expected]


def test_json_records_reads_lists_and_lines_alike(load: Loader, tmp_path: Path) -> None:
    plugin = load("json_records")
    cars = plugin.Handler().run(str(DATA / "cars.json"))["cars"]
    assert cars.num_rows == len(json.loads((DATA / "cars.json").read_text()))
    lines = tmp_path / "lines.json"
    lines.write_text('{"a": 1, "b": {"c": [2]}}\n\n{"a": 3}\n')
    assert plugin.Handler().run(str(lines))["lines"].to_pylist() == [
        {"a": 1, "b": '{"c": [2]}'},
        {"a": 3, "b": None},
    ]


def test_json_records_names_the_line_that_is_no_json(load: Loader, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(PermanentError, match="line 2"):
        load("json_records").Handler().run(str(bad))


def test_stock_prices_hands_text_on_for_its_contract_to_judge(load: Loader) -> None:
    table = load("stock_prices").Handler().run(str(DATA / "stocks.csv"))["stock_prices"]
    assert table.schema.types == [pa.string()] * 3
    assert table.num_rows == len(pd.read_csv(DATA / "stocks.csv"))


def test_excel_sheets_makes_a_table_of_every_sheet(load: Loader, tmp_path: Path) -> None:
    book = tmp_path / "book.xlsx"
    with pd.ExcelWriter(book) as writer:
        pd.DataFrame({"a": [1, 2]}).to_excel(writer, sheet_name="First", index=False)
        pd.DataFrame({"b": ["x"]}).to_excel(writer, sheet_name="Other one", index=False)
    tables = load("excel_sheets").Handler().run(str(book))
    assert {name: t.to_pylist() for name, t in tables.items()} == {
        "First": [{"a": 1}, {"a": 2}],
        "Other_one": [{"b": "x"}],
    }


def test_every_example_has_a_manifest_that_can_be_deployed() -> None:
    from casparian_flow.services.manifest import read_manifest

    found = list(PLUGINS.rglob("*.py"))
    assert len(found) >= 4
    for path in found:
        manifest = read_manifest(path.read_text(), path.name)
        assert manifest.pattern
        assert manifest.description
