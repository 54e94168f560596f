"""The client's side of publishing: from a file to a deployed version."""

from pathlib import Path

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import LOCK_BYTES_MAX
from casparian_flow.sentinel.api import ControlApi, Row
from casparian_flow.services.architect import prepare
from casparian_flow.services.manifest import MAX_SOURCE_BYTES, plugin_name, read_manifest

DEFAULT_VERSION = "1.0.0"
LOCKFILE = "uv.lock"


def publish(
    control: ControlApi,
    file: str | Path,
    *,
    version: str = "",
    name: str = "",
    publisher: str = "",
) -> Row:
    """Check a plugin file and deploy it; a `uv.lock` beside it goes along.

    Args:
        version: "" takes the MANIFEST's, or 1.0.0 if it has none.
        name: "" takes the MANIFEST's, or the file's name without its suffix.

    Returns:
        What `ControlApi.deploy` returns.

    Raises:
        UsageError: the file or what is in it cannot be deployed; nothing was sent.
        ConflictError: the version was deployed before with other bytes.
    """
    path = Path(file)
    if path.suffix != ".py":
        raise UsageError(f"{path} is no Python file", hint="Give the plugin's .py file.")
    source = _read_text(path, MAX_SOURCE_BYTES)
    manifest = read_manifest(source, path.name)
    beside = path.with_name(LOCKFILE)
    release = prepare(
        plugin=plugin_name(name or manifest.name or path.stem),
        version=version or manifest.version or DEFAULT_VERSION,
        source_code=source,
        lockfile=_read_text(beside, LOCK_BYTES_MAX) if beside.is_file() else "",
        publisher=publisher,
    )
    return control.deploy(
        plugin_name=release.plugin,
        version=release.version,
        source_code=release.source_code,
        lockfile=release.lockfile,
        artifact_hash=release.artifact_hash,
        publisher=release.publisher,
    )


def _read_text(path: Path, limit: int) -> str:
    """A text file's exact characters: no newline is translated, for they are hashed."""
    try:
        if not path.is_file():
            raise UsageError(f"{path} is no file", hint="Check the path.")
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > limit:
        raise UsageError(f"{path} is larger than {limit // 1024} KiB")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path}:{line}: is not UTF-8 text", hint="Save the file as UTF-8."
        ) from error
