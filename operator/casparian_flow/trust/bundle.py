"""A plugin version as one file: source, lock file, manifest and signature (docs/artifact.md)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from casparian_flow.domain.lockfile import LOCK_BYTES_MAX
from casparian_flow.domain.records import Sample
from casparian_flow.domain.samples import (
    SAMPLE_NAME_MAX,
    SAMPLES_BYTES_MAX,
    SAMPLES_MAX,
    samples_problem,
)
from casparian_flow.trust.artifact import artifact_hash, framed, release_json, sample_digests
from casparian_flow.trust.errors import BundleError

SUFFIX = ".casparian"
BUNDLE_LABEL = b"casparian-flow bundle v1"
SOURCE_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 1 << 16
ENVELOPE_BYTES_MAX = 1 << 16
NAME_BYTES_MAX = 400
"""Of name and version each; their characters are checked where they are used."""
_HASH_CHARS = 64
_LENGTH_BYTES = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")

_LIMITS = {
    "name": NAME_BYTES_MAX,
    "version": NAME_BYTES_MAX,
    "source": SOURCE_BYTES_MAX,
    "lock file": LOCK_BYTES_MAX,
    "manifest": MANIFEST_BYTES_MAX,
    "artifact hash": _HASH_CHARS,
    "envelope": ENVELOPE_BYTES_MAX,
}
"""The parts in their order, with the most bytes each may have."""

_SAMPLES_PART_MAX = SAMPLES_BYTES_MAX + SAMPLES_MAX * (2 * _LENGTH_BYTES + SAMPLE_NAME_MAX)

BUNDLE_BYTES_MAX = (
    _LENGTH_BYTES
    + len(BUNDLE_LABEL)
    + sum(limit + _LENGTH_BYTES for limit in _LIMITS.values())
    + _LENGTH_BYTES
    + _SAMPLES_PART_MAX
)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A plugin version, signed or not. Nothing in it is to be believed before a policy said so.

    Attributes:
        source, lockfile, manifest_json: exact text; lockfile is "" for none.
        artifact_hash: what whoever made the bundle computed, 64 hex digits.
        envelope: the signature (trust/envelope.py), b"" for none.
        samples: files to try the version on, by name; the manifest holds their digests. Not there
            where a version is only to be loaded.
    """

    name: str
    version: str
    source: str
    lockfile: str
    manifest_json: str
    artifact_hash: str
    envelope: bytes = b""
    samples: tuple[Sample, ...] = ()

    def computed_hash(self) -> str:
        """The artifact hash of the parts as they are."""
        return artifact_hash(self.source, self.lockfile, self.manifest_json)

    def with_envelope(self, envelope: bytes) -> "Bundle":
        """The same version under another signature."""
        return replace(self, envelope=envelope)


def make_bundle(
    name: str, version: str, source: str, lockfile: str = "", samples: Iterable[Sample] = ()
) -> Bundle:
    """An unsigned bundle of these parts, with manifest and hash computed."""
    ordered = tuple(sorted(samples, key=lambda sample: sample.name))
    manifest_json = release_json(name, version, ordered)
    digest = artifact_hash(source, lockfile, manifest_json)
    return Bundle(name, version, source, lockfile, manifest_json, digest, samples=ordered)


def pack(bundle: Bundle) -> bytes:
    """The bundle as bytes; equal bundles give equal bytes, everywhere.

    Raises:
        BundleError: a part is too large or no valid Unicode.
    """
    chunks = [framed(BUNDLE_LABEL)]
    for (part, limit), value in zip(_LIMITS.items(), _values(bundle), strict=True):
        try:
            raw = value if isinstance(value, bytes) else value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BundleError(f"the {part} holds text that is not valid Unicode") from error
        if len(raw) > limit:
            raise _too_large(part, limit)
        chunks.append(framed(raw))
    if bundle.samples:
        chunks.append(framed(_packed_samples(bundle.samples)))
    return b"".join(chunks)


def unpack(data: bytes) -> Bundle:
    """Read a bundle. Its form is checked, not what it says: that is `TrustPolicy.check`'s task.

    There is one way only to write a bundle, so `pack(unpack(data)) == data`. The samples are those
    that the manifest names.

    Raises:
        BundleError: it is none, was cut off or has something behind its end; the message names
            the part.
    """
    if not data.startswith(framed(BUNDLE_LABEL)):
        raise BundleError(
            "this is no plugin bundle", hint="Make one with 'casparian publish --out'."
        )
    parts = dict(_parts(data, len(framed(BUNDLE_LABEL))))
    texts = {part: _text(part, raw) for part, raw in parts.items() if part not in _BINARY}
    if not _SHA256.fullmatch(texts["artifact hash"]):
        raise BundleError("the bundle's artifact hash is not 64 hex digits", hint=_DAMAGED)
    samples = _unpacked_samples(parts.get("samples", b""))
    check_samples(samples, texts["manifest"])
    return Bundle(
        name=texts["name"],
        version=texts["version"],
        source=texts["source"],
        lockfile=texts["lock file"],
        manifest_json=texts["manifest"],
        artifact_hash=texts["artifact hash"],
        envelope=parts["envelope"],
        samples=samples,
    )


def check_samples(samples: Iterable[Sample], manifest_json: str) -> None:
    """Make sure that these are the samples which a manifest names, all of them.

    Raises:
        BundleError: they are not; the message names the first that differs.
    """
    given = sample_digests(samples)
    named = _named_samples(manifest_json)
    for name in sorted(set(given) | set(named)):
        if given.get(name) != named.get(name):
            missing = "is missing" if name not in given else "does not match the manifest"
            raise BundleError(f"sample {name[:SAMPLE_NAME_MAX]!r} {missing}", hint=_DAMAGED)


def _named_samples(manifest_json: str) -> dict[str, object]:
    try:
        document: Any = msgspec.json.decode(manifest_json.encode("utf-8"))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}  # what else is wrong with it, the policy tells
    samples = document.get("samples") if isinstance(document, dict) else None
    return samples if isinstance(samples, dict) else {}


def manifest_names(manifest_json: str) -> tuple[str, str]:
    """Name and version that a manifest gives.

    Raises:
        BundleError: it is no JSON object with these two as text.
    """
    try:
        document: Any = msgspec.json.decode(manifest_json.encode("utf-8"))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError("the manifest is not valid JSON") from error
    name, version = (
        (document.get("name"), document.get("version"))
        if isinstance(document, dict)
        else (None, None)
    )
    if not isinstance(name, str) or not isinstance(version, str):
        raise BundleError("the manifest lacks the plugin's name or version")
    return name, version


_BINARY = frozenset({"envelope", "samples"})
_DAMAGED = "The file was cut off or altered: fetch it again, or publish the plugin again."


def _values(bundle: Bundle) -> tuple[str | bytes, ...]:
    return (
        bundle.name,
        bundle.version,
        bundle.source,
        bundle.lockfile,
        bundle.manifest_json,
        bundle.artifact_hash,
        bundle.envelope,
    )


def _parts(data: bytes, start: int) -> Iterator[tuple[str, bytes]]:
    for part, limit in _LIMITS.items():
        body = start + _LENGTH_BYTES
        if body > len(data):
            raise BundleError(f"the bundle ends before its {part}", hint=_DAMAGED)
        size = int.from_bytes(data[start:body], "big")
        if size > limit:
            raise _too_large(part, limit)
        start = body + size
        if start > len(data):
            raise BundleError(f"the bundle ends within its {part}", hint=_DAMAGED)
        yield part, data[body:start]
    if start == len(data):
        return
    body = start + _LENGTH_BYTES
    size = int.from_bytes(data[start:body], "big")
    if body + size == len(data) and 0 < size <= _SAMPLES_PART_MAX:
        yield "samples", data[body:]
    else:
        raise BundleError(f"{len(data) - start} bytes follow the bundle's end", hint=_DAMAGED)


def _packed_samples(samples: tuple[Sample, ...]) -> bytes:
    problem = samples_problem(samples)
    if problem:
        raise BundleError(problem)
    ordered = sorted(samples, key=lambda sample: sample.name)
    return b"".join(
        framed(part) for sample in ordered for part in (sample.name.encode(), sample.content)
    )


def _unpacked_samples(data: bytes) -> tuple[Sample, ...]:
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        body = start + _LENGTH_BYTES
        start = body + int.from_bytes(data[start:body], "big")
        if start > len(data) or len(pieces) >= 2 * SAMPLES_MAX:
            raise BundleError("the bundle's samples cannot be read", hint=_DAMAGED)
        pieces.append(data[body:start])
    if len(pieces) % 2:
        raise BundleError("the bundle's samples cannot be read", hint=_DAMAGED)
    names = [_text("samples", name) for name in pieces[::2]]
    samples = tuple(map(Sample, names, pieces[1::2]))
    problem = samples_problem(samples)
    if problem or names != sorted(names):
        raise BundleError(problem or "the bundle's samples are not in order", hint=_DAMAGED)
    return samples


def _text(part: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"the bundle's {part} is not UTF-8 (byte {error.start})", hint=_DAMAGED
        ) from error


def _too_large(part: str, limit: int) -> BundleError:
    size = f"{limit} bytes" if limit < 1024 else f"{limit // 1024} KiB"
    return BundleError(f"the bundle's {part} is larger than {size}", hint=_DAMAGED)
