"""A plugin that runs the plugins it is given as files, so that one warm process serves many.

It is itself a complete plugin source (DRIVER is its text); `rows_of` is all there is to it.
"""

import sys
from pathlib import Path
from types import ModuleType

from casparian_flow.sdk import BasePlugin, FileEvent, PluginContext, PluginMetadata
from casparian_flow.sdk.plugin import deliver

MANIFEST = PluginMetadata(pattern="*", topic="out")


def rows_of(path: str) -> str:
    """Load and run a plugin as a host would; its rows or its error as text."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        module = sys.modules["hostile"] = ModuleType("hostile")
        exec(compile(source, "hostile.py", "exec"), module.__dict__)
        plugin = module.Handler()
        rows: list[object] = []
        plugin._publisher = lambda topic, batch: rows.extend(batch.to_pylist())
        plugin.configure(PluginContext(), {})
        deliver(plugin, FileEvent(path), "out")
    except Exception as error:  # noqa: BLE001 - whatever it does, the next one is to be tried
        return f"{type(error).__name__}: {error}"
    return repr(rows)


class Handler(BasePlugin):
    """Publishes what the given plugin publishes, as one row of text."""

    def execute(self, file_path: str) -> list[dict[str, str]]:
        return [{"told": rows_of(file_path)}]


DRIVER = "" if __name__ == "casparian_plugin" else Path(__file__).read_text(encoding="utf-8")
