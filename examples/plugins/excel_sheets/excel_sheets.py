"""Every sheet of an Excel file becomes a table. Shows a plugin with an environment of its own.

`openpyxl` need not be installed on the worker: the `uv.lock` beside this file pins what the plugin
needs, and the worker makes an environment from it, once per lock file.
"""

import re

import pandas as pd

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.xlsx",
    topic="sheet",
    sinks={"*": "parquet://sheets"},
    description="Excel sheets as Parquet tables",
)


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        for name, frame in pd.read_excel(file_path, sheet_name=None).items():
            topic = re.sub(r"[^A-Za-z0-9_]+", "_", str(name)).strip("_") or "sheet"
            self.publish(topic, frame)
