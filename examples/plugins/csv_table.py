"""Any CSV file becomes a table of its own: the topic is the file's name.

Reads block by block, so that memory stays flat however large the file is. Understands quotes,
line ends inside quotes, a byte order mark, and Latin-1 where the file is no UTF-8.
"""

import codecs
import re
from pathlib import PurePath
from typing import BinaryIO

from pyarrow import csv

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.csv",
    topic="table",
    subscriptions=["csv"],
    sinks={"*": "parquet://tables"},
    description="CSV files as Parquet tables",
)


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        with self.open_input() as file:
            encoding = encoding_of(file)
            file.seek(0)
            reader = csv.open_csv(
                file,
                read_options=csv.ReadOptions(block_size=4 << 20, encoding=encoding),
                parse_options=csv.ParseOptions(newlines_in_values=True),
            )
            self.publish(topic_of(file_path), reader)


def encoding_of(file: BinaryIO) -> str:
    """UTF-8 if the whole file is, else Latin-1."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def topic_of(path: str) -> str:
    """The file's name, without what a topic may not have."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", PurePath(path).stem).strip("_")[:100] or "table"
