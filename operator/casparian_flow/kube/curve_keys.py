"""The CURVE keys that the operator issues: one pair for each plugin version, Scout and so on.

A pair is derived from a master key and from whom it is for, so that the same pair comes out every
time: a Secret that somebody has edited is put right, and none has to be read back. The master keys
lie beside the ledger, for the operator alone. Of several the newest is issued, and all are
admitted: keys are changed by adding one, waiting until pods have the new Secrets, and removing the
old one (docs/kubernetes.md).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from casparian_flow.domain.errors import ConfigError
from casparian_flow.protocol.curve import SERVER_SECRET, CurvePair, secret_text

MASTER_BYTES: Final = 32
SENTINEL_FILE: Final = "sentinel.seed"
_LABEL: Final = b"casparian-flow curve key v1"
_FILE: Final = re.compile(r"master-([0-9]{1,6})\.key")
_Z85: Final = (
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
)


class KeyRing:
    """The keys of one installation.

    Args:
        masters: master keys, oldest first.
        sentinel: what the Sentinel's own pair is made from.
    """

    def __init__(self, masters: Sequence[bytes], sentinel: bytes) -> None:
        if not masters or any(len(key) != MASTER_BYTES for key in (*masters, sentinel)):
            raise ConfigError("there is no usable master key")
        self._masters = tuple(masters)
        self._sentinel = sentinel

    @classmethod
    def open(cls, folder: Path) -> "KeyRing":
        """Read the master keys of a folder, which is made with a first one if there is none.

        Raises:
            ConfigError: the folder or a key in it cannot be used.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _files(folder):
                add_master(folder)
            sentinel = folder / SENTINEL_FILE
            if not sentinel.exists():
                _write(sentinel, os.urandom(MASTER_BYTES))
            return cls([file.read_bytes() for file in _files(folder)], sentinel.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"the keys in {folder} cannot be used: {error.strerror}",
                hint="The folder has to be the operator's own, on the ledger's volume.",
            ) from error

    def issued(self, *whom: str) -> CurvePair:
        """The pair that somebody is given now.

        Args:
            whom: kind, namespace and names; different ones never share a pair.
        """
        return _derived(self._masters[-1], whom)

    def admitted(self, *whom: str) -> list[str]:
        """The public keys by which somebody may connect, of the old master keys too."""
        return [_derived(master, whom).public for master in self._masters]

    @property
    def server(self) -> CurvePair:
        """The Sentinel's own pair, which stays when master keys change: clients know its public
        half, and learn another only with their next Secret."""
        return _derived(self._sentinel, ("sentinel",))

    def write_server(self, folder: Path) -> None:
        """Put the Sentinel's pair where it reads it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / SERVER_SECRET, secret_text(self.server).encode())


def add_master(folder: Path) -> Path:
    """Make a new master key, from which keys are issued from then on; returns its file."""
    files = _files(folder)
    number = 1 + (_number(files[-1]) if files else 0)
    file = folder / f"master-{number}.key"
    _write(file, os.urandom(MASTER_BYTES))
    return file


def drop_old_masters(folder: Path) -> list[Path]:
    """Remove all master keys but the newest; returns their files."""
    old = _files(folder)[:-1]
    for file in old:
        file.unlink()
    return old


def folder_of(ledger: Path) -> Path:
    """Where the keys of the operator with this ledger are."""
    return ledger.parent / "curve"


def _files(folder: Path) -> list[Path]:
    return sorted((f for f in folder.iterdir() if _FILE.fullmatch(f.name)), key=_number)


def _number(file: Path) -> int:
    found = _FILE.fullmatch(file.name)
    return int(found[1]) if found else 0


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all, and for the owner's eyes only."""
    draft = file.with_name(f".{file.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _derived(master: bytes, whom: Sequence[str]) -> CurvePair:
    framed = b"".join(len(raw).to_bytes(4, "big") + raw for raw in (text.encode() for text in whom))
    seed = HKDF(SHA256(), 32, salt=None, info=_LABEL + framed).derive(master)
    # CURVE's key pairs are those of X25519.
    private = X25519PrivateKey.from_private_bytes(seed)
    secret = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return CurvePair(z85(public), z85(secret))


def z85(data: bytes) -> str:
    """Bytes, a multiple of four, as ZeroMQ writes keys (RFC 32).

    >>> z85(bytes.fromhex("864fd26fb559f75b"))
    'HelloWorld'
    """
    words = (int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4))
    return "".join(_Z85[word // 85**power % 85] for word in words for power in (4, 3, 2, 1, 0))
