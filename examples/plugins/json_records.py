"""JSON files with a list of records, and JSON lines, become tables in one SQLite database.

The table is named after the file. A new version of a file replaces the rows of the one before.
Files named `.jsonl` want a rule: `casparian rules add '*.jsonl' auto_json_records`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, TextIO

from casparian_flow.sdk import BasePlugin, PermanentError, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.json",
    topic="records",
    sinks={"*": "sqlite://records.sqlite3?mode=replace"},
    description="JSON records as SQLite tables",
)


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        topic = re.sub(r"[^A-Za-z0-9_]+", "_", PurePath(file_path).stem) or "records"
        with self.open_input("r", encoding="utf-8-sig") as file:
            self.publish(topic, records(file))


def records(file: TextIO) -> Iterator[dict[str, Any]]:
    """The records of a file, one by one."""
    if file.read(4096).lstrip().startswith("["):
        file.seek(0)
        yield from map(flat, json.load(file))
        return
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield flat(json.loads(line))
            except json.JSONDecodeError as error:
                raise PermanentError(f"line {number}: {error.msg}") from error


def flat(record: Any) -> dict[str, Any]:
    """A record whose nested values are JSON text, because a table has no place for them."""
    if not isinstance(record, dict):
        raise PermanentError(f"expected records, found {type(record).__name__}")
    return {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in record.items()}
