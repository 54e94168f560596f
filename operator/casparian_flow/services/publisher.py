"""The client's side of publishing: from a file to a signed bundle."""

from dataclasses import dataclass
from pathlib import Path

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import check_lock
from casparian_flow.domain.records import Sample
from casparian_flow.domain.samples import SAMPLES_BYTES_MAX, SAMPLES_MAX, samples_problem
from casparian_flow.services.locking import Locked, lock
from casparian_flow.services.manifest import plugin_name, plugin_version, read_manifest
from casparian_flow.services.patterns import compile_pattern
from casparian_flow.trust.bundle import SOURCE_BYTES_MAX, Bundle, make_bundle, pack
from casparian_flow.trust.envelope import Identity, sign, statement_of
from casparian_flow.trust.keys import PrivateKey

DEFAULT_VERSION = "1.0.0"
SAMPLES_FOLDER = "examples"


@dataclass(frozen=True, slots=True)
class Draft:
    """A plugin file that was read and looks like one that can be deployed.

    Attributes:
        pattern: which files it takes, as its MANIFEST says.
    """

    path: Path
    source: str
    name: str
    version: str
    pattern: str


def read_plugin(file: str | Path, *, version: str = "", name: str = "") -> Draft:
    """Read a plugin file and what its MANIFEST says.

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
    return Draft(
        path,
        source,
        plugin_name(name or manifest.name or path.stem),
        plugin_version(version or manifest.version or DEFAULT_VERSION),
        manifest.pattern,
    )


def locked(draft: Draft) -> Locked:
    """The plugin's lock file (services/locking.py), if a worker can make an environment from it.

    Raises:
        UsageError: it cannot be had, or no worker could use it.
    """
    found = lock(draft.path, draft.source, _read_text)
    check_lock(found.text)
    return found


def bundled(draft: Draft, lockfile: str) -> Bundle:
    """An unsigned bundle of a plugin with its lock file and samples.

    Raises:
        UsageError: its samples cannot be taken along, or a part is too large.
    """
    samples = read_samples(draft.path, draft.pattern)
    bundle = make_bundle(draft.name, draft.version, draft.source, lockfile, samples)
    pack(bundle)
    return bundle


def read_samples(plugin: Path, pattern: str) -> tuple[Sample, ...]:
    """The files that a plugin is to be tried on.

    All in `examples/STEM/` beside it, or else those in `examples/` that its pattern matches.

    Raises:
        UsageError: they cannot be read, or are too many, too large or oddly named.
    """
    folder = plugin.with_name(SAMPLES_FOLDER)
    own = folder / plugin.stem
    wanted = None if own.is_dir() else compile_pattern(pattern) if pattern else None
    if wanted is None and not own.is_dir():
        return ()
    found = _files_in(own if wanted is None else folder)
    if wanted is not None:
        found = [path for path in found if wanted.matches(path.name)]
    if len(found) > SAMPLES_MAX:
        raise _too_much(f"{found[0].parent} holds {len(found)} samples, at most {SAMPLES_MAX}")
    samples = tuple(Sample(path.name, _read_sample(path)) for path in found)
    problem = samples_problem(samples)
    if problem:
        raise _too_much(f"{folder}: {problem}")
    return samples


def _files_in(folder: Path) -> list[Path]:
    try:
        return (
            sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        )
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror or error}") from error


def _read_sample(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(SAMPLES_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _too_much(message: str) -> UsageError:
    return UsageError(
        message, hint="Samples are for a short trial: keep a few small files, and rename odd ones."
    )


def signed(
    bundle: Bundle,
    key: PrivateKey,
    *,
    publisher: str,
    now_us: int,
    identity: Identity | None = None,
) -> Bundle:
    """The bundle with a signature.

    Args:
        publisher: who publishes, as the statement tells it.
        now_us: wall clock, microseconds since the epoch.
        identity: of the publisher, where somebody vouched for it.

    Raises:
        EnvelopeError: the publisher's name cannot be told.
    """
    statement = statement_of(bundle, publisher=publisher, now_us=now_us, identity=identity)
    return bundle.with_envelope(sign(statement, key))


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
