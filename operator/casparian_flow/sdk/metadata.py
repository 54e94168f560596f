"""What a plugin says of itself, and what it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PluginMetadata:
    """The module's constant MANIFEST: how files find the plugin and where its rows go.

    It is read from the source text without running it, so every argument must be a literal.

    Attributes:
        pattern: files to process, in gitignore syntax, relative to the source root.
        topic: where returned rows go, and a topic with a default sink of its own.
        priority: 0 to 100; higher runs first.
        subscriptions: tags whose files are processed too.
        sinks: topic → sink URI (`parquet://sales`, `sqlite:///data/sales.sqlite3`, …) or a list
            of them; "*" stands for topics without one.
        version: of the plugin; `casparian publish --version` replaces it.
        outputs: topic → contract `{"columns": [{"name", "type", "nullable", "format"}, …]}`.
        parameters: defaults of what `configure` receives.
        name: of the plugin; the file's name without ".py" by default.
    """

    pattern: str = ""
    topic: str = ""
    priority: int = 50
    subscriptions: Sequence[str] = ()
    sinks: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1.0.0"
    description: str = ""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class FileEvent:
    """One file version to process, as `consume` receives it.

    Attributes:
        path: what to open; a private copy or the file itself, under its own base name.
        file_id: id of the file version in the ledger, 0 outside of Casparian.
        metadata: `content_hash` and `source_path` (where the file was found) within Casparian.
    """

    path: str
    file_id: int = 0
    event_type: str = "file_found"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PluginContext:
    """Where the plugin runs, as `configure` receives it, once per process.

    Attributes:
        scratch: the one folder the plugin may write to; emptied after each file.
    """

    plugin_name: str = ""
    plugin_version: str = ""
    scratch: str = ""
