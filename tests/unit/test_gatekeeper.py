"""What the Gatekeeper lets through, what it finds, and that it says where."""

import ast
import textwrap
import time

import pytest
from gatekeeper_corpus import BYPASSES, HEAD, ORDINARY, PANDAS_STYLE, plugin

import casparian_flow.sdk
from casparian_flow.db import schema
from casparian_flow.services.manifest import MAX_SOURCE_BYTES
from casparian_flow.trust.bundle import SOURCE_BYTES_MAX
from casparian_flow.trust.gatekeeper import FINDINGS_MAX, inspect
from casparian_flow.trust.gatekeeper_lists import DEFAULT_WHITELIST, SDK_NAMES, Profile


def rules(source: str | bytes, profile: Profile = Profile.STRICT) -> set[str]:
    raw = source.encode() if isinstance(source, str) else source
    return {finding.rule_id for finding in inspect(raw, profile)}


@pytest.mark.parametrize("body", PANDAS_STYLE)
def test_plugins_in_the_style_of_pandas_pass(body: str) -> None:
    assert inspect(plugin(body).encode()) == []


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_python_passes(name: str) -> None:
    source = plugin("return [{'a': 1}]", ORDINARY[name])
    if "from __future__" in source:
        source = source.replace("from __future__ import annotations\n", "")
        source = "from __future__ import annotations\n" + source
    ast.parse(source)
    assert inspect(source.encode()) == []


ALIASED = {
    "names": """
        from casparian_flow.sdk import BasePlugin as B, PluginMetadata as M
        MANIFEST = M(pattern='*')
        class Handler(B): ...
        """,
    "the module": """
        import casparian_flow.sdk
        MANIFEST = casparian_flow.sdk.PluginMetadata(pattern='*')
        class Handler(casparian_flow.sdk.BasePlugin): ...
        """,
    "assignments": """
        import casparian_flow.sdk as s
        Base = s.BasePlugin
        Again = Base
        MANIFEST: s.PluginMetadata = s.PluginMetadata(pattern='*')
        class Handler(Again): ...
        """,
    "classes between": """
        from casparian_flow import sdk
        MANIFEST = sdk.PluginMetadata(pattern='*', priority=-1)
        class Mixin: ...
        class Mine(sdk.BasePlugin): ...
        class Handler(Mixin, Mine): ...
        """,
    "a star": """
        from casparian_flow.sdk import *
        MANIFEST = PluginMetadata(pattern='*')
        class Handler(BasePlugin): ...
        """,
}


@pytest.mark.parametrize("way", ALIASED)
def test_aliased_bases_are_followed_to_the_sdk(way: str) -> None:
    assert inspect(textwrap.dedent(ALIASED[way]).encode()) == []


@pytest.mark.parametrize(("rule", "code"), BYPASSES, ids=[c for _, c in BYPASSES])
def test_a_way_around_is_found(rule: str, code: str) -> None:
    """Once at module level, once within the plugin's own method."""
    ast.parse(code)
    assert rule in rules(plugin("pass", code))
    if "import *" not in code:
        assert rule in rules(plugin(code))


@pytest.mark.parametrize(("rule", "code"), BYPASSES, ids=[c for _, c in BYPASSES])
def test_a_way_around_is_found_with_files_allowed_too(rule: str, code: str) -> None:
    if code.startswith(("import pathlib", "import gzip")) or code in {
        "from pathlib import Path",
        "from bz2 import BZ2File",
    }:
        assert rules(plugin("pass", code), Profile.STANDARD) == set()
    else:
        assert rule in rules(plugin("pass", code), Profile.STANDARD)


@pytest.mark.parametrize(
    "call",
    ["open(file_path)", "open(file_path, 'rb')", "open(file_path, mode='r', encoding='utf-8-sig')"],
)
def test_the_standard_profile_lets_a_plugin_open_its_input_for_reading(call: str) -> None:
    source = plugin(f"with {call} as f:\n    return [{{'n': len(f.read())}}]")
    assert rules(source, Profile.STANDARD) == set()
    assert rules(source) == {"G202"}


@pytest.mark.parametrize(
    "call",
    [
        "open(file_path, 'w')",
        "open(file_path, 'r+')",
        "open(file_path, mode)",
        "open('ledger.duckdb')",
        "open(file='secret')",
        "open(file_path, opener=x)",
        "open(*a)",
        "open(**a)",
        "map(open, [file_path])",
    ],
)
def test_the_standard_profile_refuses_every_other_open(call: str) -> None:
    assert "G202" in rules(plugin(call), Profile.STANDARD)


def test_off_checks_nothing() -> None:
    assert inspect(b"import os", Profile.OFF) == []
    assert inspect(b"\xff\0", Profile.OFF) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("G501", "x = 1"),
        ("G501", "class handler: ..."),
        ("G501", "if True:\n    class Handler: ..."),
        ("G501", "def Handler(): ..."),
        ("G501", ""),
        ("G502", "class Handler: ..."),
        ("G502", "class BasePlugin: ...\nclass Handler(BasePlugin): ..."),
        ("G502", "from pandas import DataFrame as BasePlugin\nclass Handler(BasePlugin): ..."),
        ("G502", "class Handler(Later): ...\nfrom casparian_flow.sdk import BasePlugin"),
        ("G503", "x = 1"),
        ("G503", "MANIFEST = {'pattern': '*'}"),
        ("G503", "MANIFEST = dict(pattern='*')"),
        ("G503", "def PluginMetadata(**k): ...\nMANIFEST = PluginMetadata(pattern='*')"),
        ("G503", "MANIFEST: int"),
        ("G503", "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata('*')"),
        ("G503", "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata(**{'a': 1})"),
        ("G503", "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata(pattern='*' + x)"),
        ("G503", "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata(sinks={**x})"),
        ("G503", "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata(pattern=f'{x}')"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\nHandler = print"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\nclass Handler(BasePlugin): ..."),
        ("G504", HEAD + "class Handler(BasePlugin): ...\nMANIFEST = 1"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\nimport json as Handler"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\ndef f():\n    global MANIFEST"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\ndel MANIFEST"),
        ("G504", HEAD + "class Handler(BasePlugin): ...\nfor Handler in []: ..."),
    ],
)
def test_what_is_no_plugin_is_told_so(rule: str, source: str) -> None:
    assert rule in rules(source)


@pytest.mark.parametrize(
    ("rule", "line", "raw"),
    [
        ("G001", 2, b"x = 1\ny = '\xff'\n"),
        ("G002", 1, b"# -*- coding: latin-1 -*-\n"),
        ("G002", 2, b"#!/usr/bin/python\n# vim: set fileencoding=utf-7 :\n"),
        ("G002", 2, b"\r\n# coding=rot13\r\n"),
        ("G003", 1, b"\xef\xbb\xbfx = 1\n"),
        ("G004", 2, "x = 1\n# \u202e } ;'nimda' =! resu fi\n".encode()),
        ("G004", 1, "x = 'a\u2066b'".encode()),
        ("G004", 1, b"# hidden\rimport os\n"),
        ("G004", 1, b"# \x1b[2K\n"),
        ("G005", 3, b"\n\nx = '\0'"),
        ("G006", 2, b"x = 1\nif:\n"),
        ("G006", 1, b"x = " + b"9" * 5000),
        ("G006", 1, b"(" * 300),
        ("G007", 0, b"x = 1\n" * 200_000),
        ("G007", 0, b"x = 1\n" * 100_000),
        ("G007", 0, b"-" * 100_000 + b"1"),
    ],
    ids=lambda v: v[:30] if isinstance(v, bytes) else v,
)
def test_source_that_is_not_what_it_seems_is_refused(rule: str, line: int, raw: bytes) -> None:
    (finding,) = inspect(raw)
    assert (finding.rule_id, finding.line) == (rule, line)


def test_utf8_may_be_declared() -> None:
    for cookie in ("# -*- coding: utf-8 -*-", "# coding=UTF8", "# vim: fileencoding=utf_8"):
        assert inspect(f"{cookie}\n{plugin('pass')}".encode()) == []


def test_findings_are_listed_in_order_with_line_and_column_in_characters() -> None:
    source = plugin("x = 'äöü'; eval(x); import os\nexec(x)")
    line = source[: source.index("eval(")].count("\n") + 1
    places = [(f.line, f.col, f.rule_id) for f in inspect(source.encode())]
    assert places == [(line, 20, "G201"), (line, 29, "G101"), (line + 1, 9, "G201")]
    assert str(inspect(source.encode())[1]).startswith(f"{line}:29 G101 import of os")


def test_what_stands_in_text_is_reported_where_the_text_stands() -> None:
    (finding,) = inspect(plugin("pass", "\n\nX: 'eval(1)' = 1").encode())
    assert finding.line == HEAD.count("\n") + 3
    assert finding.message.startswith("in text: ")


def test_the_list_of_findings_is_bounded_and_says_how_many_there_are() -> None:
    findings = inspect(plugin("eval(1)\n" * 1000).encode())
    assert len(findings) == FINDINGS_MAX
    assert findings[-1].message.endswith("(and 800 more)")


def test_a_name_with_too_many_meanings_is_a_disguise() -> None:
    aliases = "".join(f"x = pd.a{n}\n" for n in range(20)) + "x = pa\nx.fs\n"
    assert "G305" in rules(plugin("pass", aliases))


def test_the_whitelist_decides_which_libraries_may_be_imported() -> None:
    source = plugin("pass", "import polars\nfrom google.protobuf import message").encode()
    assert [f.rule_id for f in inspect(source)] == ["G101", "G101"]
    wider = [*DEFAULT_WHITELIST, "polars", "google.protobuf"]
    assert inspect(source, whitelist=wider) == []
    assert "G101" in {
        f.rule_id for f in inspect(plugin("import google.cloud").encode(), whitelist=wider)
    }
    assert {f.rule_id for f in inspect(plugin("pass").encode(), whitelist=[])} == {"G101"}


def test_the_lists_are_in_step_with_the_ledger_the_sdk_and_the_manifest_reader() -> None:
    assert {name for name, _ in schema.WHITELIST} == DEFAULT_WHITELIST
    assert set(casparian_flow.sdk.__all__) == SDK_NAMES
    assert SOURCE_BYTES_MAX == MAX_SOURCE_BYTES


HARD = {
    "attributes": "x = a" + ".b" * 900,
    "nested brackets": "x = " + "[" * 90 + "]" * 90,
    "nested text": "x = " + repr("f(" + repr("f(" + repr("f(" + repr("f(1)") + ")") + ")") + ")"),
    "many aliases": "".join(f"a{n + 1} = a{n}.x\n" for n in range(20_000)) + "a0 = pd\n",
    "aliases in a ring": "".join(f"a{n} = a{(n + 1) % 500}.x\n" for n in range(500)) + "a0 = pd\n",
    "one name, many targets": "".join(f"b{n} = pd\npd = b{n}.x\n" for n in range(10_000)),
    "many strings": "x = [" + "'f(x)'," * 90_000 + "]",
    "long string": "x = '" + "(" * 900_000 + "'",
    "dunder text": "x = '" + "__a" * 300_000 + "'",
    "many operators": "x = 1" + "+1" * 900,
    "wide operators": "x = [" + "1+1," * 24_000 + "]",
    "many findings": "eval(1)\n" * 24_000,
}


@pytest.mark.parametrize("name", HARD)
def test_time_is_bounded_by_the_size_of_the_source(name: str) -> None:
    source = plugin("pass", HARD[name]).encode()
    assert len(source) < SOURCE_BYTES_MAX
    began = time.process_time()
    inspect(source)
    assert time.process_time() - began < 15.0
