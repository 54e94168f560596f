"""A user's folder and the commands run in it, in this process, on a real ledger."""

import io
import json
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb

from casparian_flow.cli.app import run as run_cli

PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pandas as pd

MANIFEST = PluginMetadata(pattern="*.csv", topic="sales")


class Handler(BasePlugin):
    def execute(self, file_path: str):
        self.publish("sales", pd.read_csv(file_path))
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Desk:
    """One folder after `casparian init`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables: Mapping[str, str] = {}
        assert self.run("init").code == 0
        self.plugin = self.write("sales.py", PLUGIN)

    @property
    def config(self) -> Path:
        return self.folder / "global_config.toml"

    @property
    def database(self) -> Path:
        return self.folder / "casparian_flow.duckdb"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, *argv: str, code: int | None = None) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with (
            chdir(self.folder),
            mock.patch.dict("os.environ", self.variables),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            found = run_cli(list(argv))
        done = Done(found, out.getvalue(), err.getvalue())
        assert code is None or done.code == code, (argv, done)
        return done

    def publish(self, *argv: str, code: int = 0) -> Done:
        return self.run("publish", "sales.py", "--version", "1.0.0", *argv, code=code)

    def bundle(self, name: str = "sales.casparian") -> Path:
        """A signed bundle of the plugin, in a file."""
        self.publish("--out", name)
        return self.folder / name

    def versions(self) -> list[tuple[str, str]]:
        """Every version that was accepted, with its status."""
        if not self.database.exists():
            return []
        rows = self.run("plugins", "-o", "json", code=0).json
        return [(r["version"], r["status"]) for r in rows if r["status"] != "REJECTED"]

    def tamper(self, statement: str) -> None:
        """Change the closed ledger behind its back."""
        with duckdb.connect(str(self.database)) as connection:
            connection.execute(statement)
