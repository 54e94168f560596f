"""A bundle within an object: gzipped, so that the lock file of a real plugin fits."""

import base64
import binascii
import gzip
import hashlib
import io
import zlib

from casparian_flow.trust.bundle import BUNDLE_BYTES_MAX
from casparian_flow.trust.errors import BundleError

_REDO = "Write the object anew with 'casparian publish --emit-manifest'."


def zipped(bundle: bytes) -> bytes:
    """A bundle as gzip, without time or name in it: equal bundles give equal bytes."""
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=stream, mtime=0) as file:
        file.write(bundle)
    return stream.getvalue()


def unzipped(data: bytes) -> bytes:
    """The bundle in gzipped bytes; never more than a bundle may have is held.

    Raises:
        BundleError: it is no gzip, was cut off, or holds more than a bundle may.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            bundle = file.read(BUNDLE_BYTES_MAX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BundleError(f"the bundle is no readable gzip: {error}", hint=_REDO) from error
    if len(bundle) > BUNDLE_BYTES_MAX:
        raise BundleError("what is gzipped is larger than any bundle", hint=_REDO)
    return bundle


def inlined(bundle: bytes) -> str:
    """A bundle as the text of `spec.source.inline`, or of a ConfigMap's `binaryData`."""
    return base64.b64encode(zipped(bundle)).decode("ascii")


def from_inlined(text: str) -> bytes:
    """The bundle in such a text.

    Raises:
        BundleError: it is no base64, or what `unzipped` refuses.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BundleError(f"the bundle is no base64: {error}", hint=_REDO) from error
    return unzipped(data)


def bundle_digest(bundle: bytes) -> str:
    """What `spec.source.configMap.digest` says of a bundle: SHA-256, hex."""
    return hashlib.sha256(bundle).hexdigest()
