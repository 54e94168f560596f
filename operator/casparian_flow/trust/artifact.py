"""The hash that names a plugin version's exact bytes (docs/artifact.md)."""

import hashlib
import json
from collections.abc import Iterable

from casparian_flow.domain.records import Sample

ARTIFACT_LABEL = b"casparian-flow artifact v1"
"""Separates these digests from every other use of SHA-256, and from later encodings."""


def artifact_hash(source: str, lockfile: str = "", manifest_json: str = "") -> str:
    """SHA-256 over a plugin's source, its lock file and its manifest: 64 hex digits.

    Each part is preceded by its length as eight big-endian bytes, and the whole by a label framed
    the same way, so that no two different triples share an encoding. Text is hashed as UTF-8,
    exactly as given: no newline is changed.

    Args:
        source: text of the plugin's module.
        lockfile: text of its uv.lock, "" for none.
        manifest_json: canonical JSON of the manifest shipped beside it, "" for none.
    """
    digest = hashlib.sha256()
    for part in (
        ARTIFACT_LABEL,
        *(t.encode("utf-8", "surrogatepass") for t in (source, lockfile, manifest_json)),
    ):
        digest.update(framed(part))
    return digest.hexdigest()


def framed(part: bytes) -> bytes:
    """The part behind its length as eight big-endian bytes."""
    return len(part).to_bytes(8, "big") + part


def environment_hash(lockfile: str) -> str:
    """SHA-256 of a lock file's text, the name of the environment it makes; "" for no lock file."""
    return hashlib.sha256(lockfile.encode("utf-8")).hexdigest() if lockfile else ""


def release_json(plugin_name: str, version: str, samples: Iterable[Sample] = ()) -> str:
    """The manifest of a plugin that is one source file: what the source itself cannot fix.

    Everything else a plugin declares stands in its source. Canonical JSON, so that whoever holds
    name, version and samples can make the same text.
    """
    document: dict[str, object] = {"name": plugin_name, "version": version}
    digests = sample_digests(samples)
    if digests:
        document["samples"] = digests
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def sample_digests(samples: Iterable[Sample]) -> dict[str, str]:
    """Name → SHA-256 of each sample, by name."""
    found = {sample.name: hashlib.sha256(sample.content).hexdigest() for sample in samples}
    return dict(sorted(found.items()))
