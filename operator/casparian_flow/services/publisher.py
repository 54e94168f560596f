"""The client's side of publishing: from a file to a signed bundle."""

from pathlib import Path

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import LOCK_BYTES_MAX
from casparian_flow.services.manifest import plugin_name, plugin_version, read_manifest
from casparian_flow.trust.bundle import SOURCE_BYTES_MAX, Bundle, make_bundle
from casparian_flow.trust.envelope import sign, statement_of
from casparian_flow.trust.keys import PrivateKey

DEFAULT_VERSION = "1.0.0"
LOCKFILE = "uv.lock"


def build(file: str | Path, *, version: str = "", name: str = "") -> Bundle:
    """An unsigned bundle of a plugin file; a `uv.lock` beside it goes along.

    Args:
        version: "" takes the MANIFEST's, or 1.0.0 if it has none.
        name: "" takes the MANIFEST's, or the file's name without its suffix.

    Raises:
        UsageError: the file or what is in it cannot be deployed.
    """
    path = Path(file)
    if path.suffix != ".py":
        raise UsageError(f"{path} is no Python file", hint="Give the plugin's .py file.")
    source = _read_text(path, SOURCE_BYTES_MAX)
    manifest = read_manifest(source, path.name)
    beside = path.with_name(LOCKFILE)
    return make_bundle(
        plugin_name(name or manifest.name or path.stem),
        plugin_version(version or manifest.version or DEFAULT_VERSION),
        source,
        _read_text(beside, LOCK_BYTES_MAX) if beside.is_file() else "",
    )


def signed(bundle: Bundle, key: PrivateKey, *, publisher: str, now_us: int) -> Bundle:
    """The bundle with a signature.

    Args:
        publisher: who publishes, as the statement tells it.
        now_us: wall clock, microseconds since the epoch.

    Raises:
        EnvelopeError: the publisher's name cannot be told.
    """
    return bundle.with_envelope(sign(statement_of(bundle, publisher=publisher, now_us=now_us), key))


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
