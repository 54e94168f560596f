"""Sources for the Gatekeeper: ordinary plugins, and ways around its rules."""

import textwrap

HEAD = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pandas as pd
import numpy as np
import pyarrow as pa

MANIFEST = PluginMetadata(pattern="*.csv", topic="t")
"""


def plugin(body: str, before: str = "") -> str:
    """A plugin whose `execute` has this body."""
    return (
        HEAD
        + textwrap.dedent(before)
        + "\nclass Handler(BasePlugin):\n    def execute(self, file_path):\n"
        + textwrap.indent(textwrap.dedent(body).strip(), "        ")
        + "\n"
    )


PANDAS_STYLE = [
    "self.publish('t', pd.read_csv(file_path))",
    "self.publish('t', pd.read_csv(file_path, sep='/', dtype={'a': str}, encoding='latin-1'))",
    "for part in pd.read_csv(file_path, chunksize=1000):\n    self.publish('t', part)",
    "df = pd.read_excel(file_path, sheet_name=None)\nreturn [f for f in df.values()]",
    "df = pd.read_csv(file_path)\nhigh, low = df.high, df.low\ndf['range'] = high - low\nreturn df",
    "df = pd.read_csv(file_path)\nreturn df[df.open > 3].query('close > @high and volume < 5')",
    "limit = 3\nreturn pd.read_csv(file_path).query('price > @limit and `unit cost` < 2')",
    "df = pd.read_csv(file_path).rename(columns=str.lower).replace({'a': 'b'})\nreturn df",
    "df = pd.read_csv(file_path)\ndf['d'] = pd.to_datetime(df['d'], format='%d/%m/%Y')\nreturn df",
    "return pd.read_csv(file_path).groupby('k').agg({'v': ['sum', 'mean']}).reset_index()",
    "return pd.read_csv(file_path).apply(lambda row: row['a'] + row['b'], axis=1).to_frame('s')",
    "df = pd.read_parquet(file_path)\nreturn df.merge(df, on='__index_level_0__')",
    "t = pa.csv.read_csv(file_path)\nassert pa.types.is_integer(t.field('a').type)\nreturn t",
    "a = np.random.default_rng(1).normal(size=3)\nreturn [{'a': np.select([a > 0], [a])}]",
    "x = np.loadtxt(file_path, delimiter=',')\nreturn pd.DataFrame(x)",
    "with pa.input_stream(file_path) as f:\n    return [{'size': len(f.read())}]",
    "raise ValueError(f'{type(self).__name__}: bad file {file_path!r}')",
    "return [{'x': getattr(self, 'limit', 3), 'y': hasattr(self, '_cache')}]",
    "self._seen = self._seen + 1 if hasattr(self, '_seen') else 1\nreturn [{'n': self._seen}]",
    "yield from ({'line': i, 'text': str(i)} for i in range(3))",
    "print('open(the) file', file_path)\nreturn pd.read_csv(file_path)",
    "match file_path:\n    case str():\n        return [{'a': 1}]",
]


ORDINARY = {
    "standard library": """
        from __future__ import annotations
        import csv, json, re, math, io, collections.abc, datetime as dt
        import xml.etree.ElementTree as ET
        from collections import defaultdict
        from dataclasses import dataclass, field
        from decimal import Decimal
        from functools import lru_cache, partial
        from operator import attrgetter, itemgetter
        from pathlib import PurePath
        from typing import Any, Iterator, Literal
        from urllib.parse import urlsplit
        import urllib.parse
        import logging
        import enum

        log = logging.getLogger(__name__)
        KEY = attrgetter("name.first")

        class Kind(enum.Enum):
            A = "a"

        @dataclass(frozen=True)
        class Row:
            name: str
            tags: list[str] = field(default_factory=list)
            kind: Literal["a", "b"] = "a"
            def __post_init__(self) -> None: log.info("%s", self.name)
            def __eq__(self, other: object) -> bool: return isinstance(other, Row)
            def __hash__(self) -> int: return hash(self.name)

        @lru_cache(maxsize=10)
        def stem(path: str) -> "str | None":
            '''Not __class__, and no eval() either.'''
            return PurePath(path).stem

        def parts(text: str) -> Any:
            root = ET.fromstring(text)
            return urllib.parse.quote(urlsplit(text).path), root.tag
        """,
    "a base of one's own": """
        import abc
        class Base(BasePlugin, metaclass=abc.ABCMeta):
            def __init__(self):
                super().__init__()
        class Middle(Base): ...
        """,
    "an import that may fail": """
        try:
            import openpyxl
        except ImportError:
            openpyxl = None
        """,
    "a schema of pydantic": """
        from pydantic import BaseModel, Field, field_validator
        class Row(BaseModel):
            a: "list[int]"
            b: float = Field(gt=0, description="a number (positive)")
        """,
    "namespaces and addresses as data": """
        NS = {"x": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
        SEPARATORS = ("/", "//", "/a", "etc/")
        """,
    "the script's own start": "if __name__ == '__main__':\n    print('run me in Casparian')",
}


BYPASSES: list[tuple[str, str]] = [
    # Imports, in every form
    ("G101", "import os"),
    ("G101", "import os.path"),
    ("G101", "import os as pandas"),
    ("G101", "import json, subprocess"),
    ("G101", "from os import path"),
    ("G101", "from os.path import join"),
    ("G101", "from urllib.request import urlopen"),
    ("G101", "import urllib.request"),
    ("G101", "import http.client"),
    ("G101", "from subprocess import *"),
    ("G101", "if True:\n    def f():\n        class C:\n            import socket"),
    ("G101", "try:\n    import requests\nexcept ImportError:\n    requests = None"),
    ("G101", "lambda: None\nimport ctypes"),
    ("G101", "import pickle"),
    ("G101", "import cloudpickle"),
    ("G101", "import multiprocessing.pool"),
    ("G101", "import encodings"),
    ("G101", "import inspect"),
    ("G101", "import gc"),
    ("G101", "import code"),
    ("G101", "import casparian_flow.db.access"),
    ("G101", "import casparian_flow"),
    ("G101", "import casparian_worker"),
    ("G101", "import ｏｓ"),
    ("G101", "async def f():\n    async with x as y:\n        import signal"),
    ("G102", "from pandas import *"),
    ("G102", "from json import *"),
    ("G104", "from . import helper"),
    ("G104", "from .helper import x"),
    ("G303", "from pandas.io.json._json import os"),
    ("G305", "from pandas.io.common import get_handle"),
    ("G303", "from enum import sys"),
    ("G304", "from collections import _sys"),
    ("G305", "from casparian_flow import db"),
    ("G305", "from casparian_flow.sdk import convert"),
    ("G305", "from pathlib import Path"),
    ("G305", "from logging import handlers"),
    ("G305", "from pyarrow import fs"),
    ("G305", "import pyarrow.fs as data"),
    ("G305", "import pyarrow.flight"),
    ("G305", "import numpy.ctypeslib"),
    # Importing by name
    ("G103", "__import__('os')"),
    ("G103", "i = __import__"),
    ("G103", "import importlib"),
    ("G103", "from importlib import import_module as load"),
    ("G103", "import importlib.util"),
    ("G103", "import builtins"),
    ("G103", "import builtins as math"),
    ("G103", "from builtins import eval as float"),
    ("G103", "import runpy"),
    ("G103", "import pkgutil"),
    ("G301", "__builtins__['eval']('1')"),
    ("G301", "__builtins__.eval('1')"),
    ("G301", "__loader__.load_module('os')"),
    ("G305", "x.load_module('os')"),
    ("G301", "__spec__.loader"),
    ("G301", "print.__self__"),
    ("G301", "pd.__builtins__"),
    ("G401", "k = '__import__'"),
    ("G401", "k = '\\x5f\\x5fimport\\x5f\\x5f'"),
    ("G401", "k = b'__import__'"),
    ("G401", "k = '__imp' '' 'ort__'"),
    # Code from text
    ("G201", "eval('1')"),
    ("G201", "exec('1')"),
    ("G201", "compile('1', '', 'exec')"),
    ("G201", "e = eval"),
    ("G201", "(e := exec)('1')"),
    ("G201", "list(map(eval, ['1']))"),
    ("G201", "[eval][0]('1')"),
    ("G201", "{'f': exec}['f']('1')"),
    ("G201", "def f(run=eval):\n    return run('1')"),
    ("G201", "@exec\n@str\nclass C: ..."),
    ("G201", "class C:\n    __class_getitem__ = eval\nC['1']"),
    ("G201", "class C:\n    __add__ = staticmethod(exec)"),
    ("G201", "for f in (eval,):\n    f('1')"),
    ("G201", "from functools import partial\np = partial(eval, '1')"),
    ("G201", "sorted(['1'], key=eval)"),
    ("G201", "ｅｖａｌ('1')"),
    ("G201", "f'{eval(\"1\")}'"),
    ("G201", "f'{1:{eval(\"1\")}}'"),
    ("G201", "x: 'int' = (lambda: eval)()('1')"),
    ("G201", "with eval('x') as y: ..."),
    ("G201", "assert eval('1')"),
    ("G201", "print(*map(exec, ['1']))"),
    ("G201", "match 1:\n    case _ if eval('1'): ..."),
    ("G201", "X = [i for i in [1] if eval('1')]"),
    ("G301", "__build_class__"),
    ("G305", "import types\ntypes.FunctionType"),
    ("G305", "from types import CodeType"),
    ("G305", "import string\nstring.Formatter().get_field('0', (1,), {})"),
    ("G305", "import dataclasses\ndataclasses.make_dataclass('X', [])"),
    # Files
    ("G202", "open('x')"),
    ("G202", "o = open"),
    ("G202", "import io\nio.open('x')"),
    ("G202", "from io import open as fetch"),
    ("G202", "from io import FileIO"),
    ("G202", "import codecs\nc = codecs\nc.open('x')"),
    ("G202", "import gzip\ngzip.open('x')"),
    ("G202", "from bz2 import BZ2File"),
    ("G305", "import pathlib\npathlib.Path('x').read_text()"),
    ("G305", "import pathlib as p\nq = p\nq.Path"),
    ("G402", "p = '/etc/passwd'"),
    ("G402", "p = f'/proc/{1}/mem'"),
    ("G402", "p = b'/proc/self/environ'"),
    ("G402", "p = '../other/scratch'"),
    ("G402", "p = '~/.ssh/id_rsa'"),
    ("G402", "p = 'file:///secret'"),
    ("G402", "p = 's3://bucket/x'"),
    ("G403", "pd.read_csv('secrets.csv')"),
    ("G403", "pd.read_csv('https://example.com/x.csv')"),
    ("G403", "pd.read_json(path_or_buf='http://example.com/x')"),
    ("G403", "pd.read_csv(f'http://{1}/x')"),
    ("G403", "pd.read_csv('http:' + '//x')"),
    ("G403", "read = pd.read_csv\npd.read_html('ledger')"),
    ("G403", "from pandas import read_csv\nread_csv('secrets.csv')"),
    ("G403", "pa.memory_map('ledger.duckdb')"),
    ("G403", "np.fromfile('secret')"),
    ("G305", "pd.read_csv(x, storage_options={'a': 1})"),
    ("G305", "pd.read_parquet(x, filesystem=y)"),
    ("G305", "f = pa\nf.fs.LocalFileSystem()"),
    ("G305", "class C:\n    lib = pa\nC.lib.fs"),
    ("G305", "def f(m=pa):\n    return m.fs"),
    ("G305", "a, b = pa, np\na.fs"),
    # Attributes
    ("G301", "().__class__"),
    ("G301", "().__class__.__base__.__subclasses__()"),
    ("G301", "''.__class__.__mro__[1]"),
    ("G302", "type('').mro()"),
    ("G301", "object.__subclasses__()"),
    ("G301", "(lambda: 0).__globals__"),
    ("G301", "(lambda: 0).__code__"),
    ("G301", "Handler.execute.__globals__"),
    ("G301", "(lambda: 0).__ｇｌｏｂａｌｓ__"),
    ("G301", "[].__reduce_ex__(2)"),
    ("G301", "object.__getattribute__"),
    ("G301", "pd.__dict__['io']"),
    ("G301", "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__"),
    ("G301", "match 1:\n    case object(__class__=c): ..."),
    ("G301", "class C:\n    __match_args__ = ('a',)"),
    ("G301", "class C:\n    def f(self):\n        return __class__"),
    ("G301", "class C:\n    def __reduce__(self): ..."),
    ("G301", "class C:\n    def __init_subclass__(cls): ..."),
    ("G302", "x.tb_frame"),
    ("G302", "(i for i in ()).gi_frame.f_back.f_globals"),
    ("G302", "x.f_builtins"),
    ("G303", "pd.io.common.os"),
    ("G303", "pd.io.common.os.system('id')"),
    ("G303", "x.sys.modules"),
    ("G303", "np.ctypeslib.ctypes"),
    ("G303", "np.array([1]).ctypes.data"),
    ("G303", "import enum\nenum.sys"),
    ("G303", "import random\nrandom._os"),
    ("G304", "pd._libs"),
    ("G304", "from pandas import _libs"),
    ("G305", "pd.read_pickle(x)"),
    ("G305", "df.to_pickle('x')"),
    ("G305", "np.load(x, allow_pickle=True)"),
    ("G305", "np.load(x, allow_pickle=y)"),
    ("G305", "pa.foreign_buffer(1, 2)"),
    ("G305", "pa.Array._import_from_c(1, 2)"),
    ("G305", "np.lib.stride_tricks.as_strided(x, (9,))"),
    ("G305", "df.plot(backend='evil')"),
    ("G305", "import logging\nlogging.basicConfig(filename='x')"),
    ("G305", "import uuid\nuuid.getnode()"),
    # Names built at run time
    ("G203", "getattr(pd, 'i' + 'o')"),
    ("G203", "getattr(pd, name)"),
    ("G203", "g = getattr"),
    ("G203", "from functools import reduce\nreduce(getattr, ['io'], pd)"),
    ("G203", "getattr(*args)"),
    ("G203", "setattr(pd, f'{x}', 1)"),
    ("G203", "vars and delattr(x, y)"),
    ("G203", "import operator\noperator.attrgetter('a' + 'b')"),
    ("G203", "from operator import methodcaller as m\nm(x)"),
    ("G203", "from operator import attrgetter\nmap(attrgetter, x)"),
    ("G301", "getattr(x, '__class__')"),
    ("G301", "from operator import attrgetter\nattrgetter('__class__.__base__')(x)"),
    ("G303", "getattr(x, 'os')"),
    ("G204", "globals()['x']"),
    ("G204", "vars(pd)"),
    ("G204", "locals"),
    ("G205", "type('X', (), {})"),
    ("G205", "type(*args)"),
    ("G206", "class C(metaclass=print): ..."),
    ("G206", "class C(metaclass=lambda *a: 1): ..."),
    ("G401", "'{0.__class__}'.format(x)"),
    ("G401", "df.agg('to_pickle')"),
    ("G404", "df.query(text)"),
    ("G404", "df.query(f'a > {x}')"),
    ("G404", "df.eval('@pd.io')"),
    ("G404", "df.query('@f(1)')"),
    ("G404", "df.query('a.__class__')"),
    ("G305", "df.query('a.to_pickle(1)')"),
    # Text that becomes code
    ("G103", 'def f(x: \'__import__("os").system("id")\'): ...'),
    ("G201", "def f() -> 'eval(\"1\")': ..."),
    ("G201", "from typing import Optional\nX = Optional['exec(\"1\")']"),
    ("G201", "from typing import NamedTuple\nN = NamedTuple('N', [('a', 'eval(\"1\")')])"),
    ("G201", "x: \"list['eval(1)']\" = []"),
    ("G202", "X: 'open(\"/x\")' = 1"),
    ("G305", "from pydantic import create_model"),
    ("G305", "from pydantic import ImportString"),
    ("G305", "from typing import get_type_hints"),
    ("G305", "import typing as t\nt.ForwardRef('x')"),
]
"""(rule that must find it, code)."""
