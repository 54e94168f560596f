"""Ed25519 keys on disk: PKCS8 PEM for the private half, SubjectPublicKeyInfo PEM for the public."""

import base64
import binascii
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from casparian_flow.trust.errors import KeyFileError

PrivateKey = Ed25519PrivateKey
PublicKey = Ed25519PublicKey
PRIVATE_SUFFIX = ".key"
PUBLIC_SUFFIX = ".pub"
KEY_FILE_BYTES_MAX = 16_384
RAW_BYTES = 32
SHORT_ID_CHARS = 16
"""Digits of a key id that listings show; 64 bits do not collide by chance."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A key pair found in a folder.

    Attributes:
        key_id: "" where the file cannot be used.
        private: whether the private half is there too.
        problem: why it cannot be used, "" if it can.
    """

    name: str
    key_id: str
    private: bool
    problem: str = ""


def generate() -> Ed25519PrivateKey:
    """A new private key from the operating system's random numbers."""
    return Ed25519PrivateKey.generate()


def key_id(public: Ed25519PublicKey) -> str:
    """The key's name: SHA-256 of its 32 raw bytes, as 64 hex digits."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def short_id(full: str) -> str:
    """A key id as listings show it."""
    return full[:SHORT_ID_CHARS]


def public_pem(public: Ed25519PublicKey) -> str:
    """The public key as PEM text."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def public_text(public: Ed25519PublicKey) -> str:
    """The public key as one line for a configuration file: base64 of its raw bytes."""
    return base64.b64encode(public.public_bytes_raw()).decode("ascii")


def parse_public(text: str) -> Ed25519PublicKey:
    """Read a public key from PEM text or from base64 of its 32 raw bytes.

    Raises:
        KeyFileError: it is neither, or a key of another kind.
    """
    if len(text) > KEY_FILE_BYTES_MAX:
        raise KeyFileError("the public key is too long to be one")
    if "-----BEGIN" not in text:
        return _raw_public(text.strip())
    if "PRIVATE KEY" in text:
        raise KeyFileError(
            "this is a private key where a public one is wanted",
            hint=f"Give the {PUBLIC_SUFFIX} file; a private key never leaves its owner.",
        )
    try:
        loaded = load_pem_public_key(text.encode("utf-8", "surrogatepass"))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError("the public key is no readable PEM", hint=_PUBLIC_HINT) from error
    if not isinstance(loaded, Ed25519PublicKey):
        raise KeyFileError("the public key is not an Ed25519 key", hint=_PUBLIC_HINT)
    return loaded


_PUBLIC_HINT = "Give PEM text, or base64 of the key's 32 bytes, as 'casparian keys show' prints it."


def _raw_public(text: str) -> Ed25519PublicKey:
    try:
        raw = base64.b64decode(text, validate=True)
        if len(raw) == RAW_BYTES:
            return Ed25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError):
        pass
    raise KeyFileError("the public key is neither PEM nor base64 of 32 bytes", hint=_PUBLIC_HINT)


def save(private: Ed25519PrivateKey, folder: Path, name: str) -> Path:
    """Write a key pair as NAME.key (mode 0600) and NAME.pub; the folder is made if missing (0700).

    Returns:
        The path of the private key.

    Raises:
        KeyFileError: the name is unfit, the key exists already, or a file cannot be written.
    """
    file = folder / f"{checked_name(name)}{PRIVATE_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(file, private_pem(private), 0o600)
        _create(file.with_suffix(PUBLIC_SUFFIX), public_pem(private.public_key()), 0o644)
    except FileExistsError as error:
        raise KeyFileError(
            f"{error.filename} exists already; a key is never overwritten",
            hint="Choose another name, or move the old key away.",
        ) from error
    except OSError as error:
        raise KeyFileError(f"{file} cannot be written: {error.strerror or error}") from error
    return file


def private_pem(private: Ed25519PrivateKey) -> str:
    """The private key as unencrypted PKCS8 PEM text; whoever reads it can sign."""
    raw = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return raw.decode("ascii")


def checked_name(name: str) -> str:
    """A name fit for a key's files.

    Raises:
        KeyFileError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError(
            f"{name[:80]!r} cannot be the name of a key",
            hint="Use at most 64 letters, digits, '_', '-' and '.', beginning with none of '-.'.",
        )
    return name


def _create(file: Path, text: str, mode: int) -> None:
    # O_EXCL also refuses to write through a symbolic link that somebody left there.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        os.fchmod(descriptor, mode)  # whatever the umask took away or left
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)


def load_private(file: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        KeyFileError: it cannot be read, is readable by others than its owner, is encrypted, or is
            no Ed25519 key.
    """
    pem = _read(file, private=True)
    try:
        loaded = load_pem_private_key(pem, password=None)
    except TypeError as error:  # how cryptography says "encrypted"
        raise KeyFileError(
            f"{file} is encrypted with a passphrase",
            hint="Keep it unencrypted with mode 0600: nobody is there to type it.",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{file} is no PKCS8 PEM private key", hint=_PRIVATE_HINT) from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise KeyFileError(f"{file} is not an Ed25519 key", hint=_PRIVATE_HINT)
    return loaded


_PRIVATE_HINT = "Make one with 'casparian keys generate'."


def load_public(file: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        KeyFileError: it cannot be read or is no Ed25519 public key.
    """
    try:
        return parse_public(_read(file, private=False).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{file} is no text", hint=_PUBLIC_HINT) from error
    except KeyFileError as error:
        if str(file) in str(error):
            raise
        raise KeyFileError(f"{file}: {error}", hint=error.hint) from error


def _read(file: Path, *, private: bool) -> bytes:
    try:
        # O_NONBLOCK: a pipe left in the key's place must not hold the command up.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"{file} is no regular file")
            # Asked of the open file, so that it cannot be exchanged in between.
            if private and stat.S_IMODE(found.st_mode) & 0o077:
                raise KeyFileError(
                    f"{file} may be read or changed by others "
                    f"(mode {stat.S_IMODE(found.st_mode):04o})",
                    hint=f"Run 'chmod 600 {file}'. If others could read it, make a new key.",
                )
            raw = stream.read(KEY_FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise KeyFileError(f"there is no key {file}", hint=_PRIVATE_HINT) from error
    except OSError as error:
        raise KeyFileError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(raw) > KEY_FILE_BYTES_MAX:
        raise KeyFileError(f"{file} is too large to be a key")
    return raw


def list_keys(folder: Path) -> list[KeyFile]:
    """Every key in a folder by name; one that cannot be used is listed with the reason."""
    try:
        names = {
            path.stem for path in folder.iterdir() if path.suffix in {PRIVATE_SUFFIX, PUBLIC_SUFFIX}
        }
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeyFileError(f"{folder} cannot be read: {error.strerror or error}") from error
    return [_described(folder, name) for name in sorted(names)]


def _described(folder: Path, name: str) -> KeyFile:
    file = folder / f"{name}{PRIVATE_SUFFIX}"
    private = file.exists()
    try:
        public = (
            load_private(file).public_key()
            if private
            else load_public(file.with_suffix(PUBLIC_SUFFIX))
        )
    except KeyFileError as error:
        return KeyFile(name, "", private, str(error))
    return KeyFile(name, key_id(public), private)
