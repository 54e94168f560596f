"""Files of CURVE keys, by which both ends of a ZeroMQ connection know each other.

A folder holds `server.key` (the Sentinel's public key) and `client.key_secret` (one's own pair), as
a pod gets them in a Secret; the Sentinel's has `server.key_secret`. The files are those that
ZeroMQ's own tools write: `public-key = "…"` and `secret-key = "…"`, each key 40 characters of Z85.
Nothing is kept between two readings, so that a key is changed by changing its file.
"""

import re
from pathlib import Path
from typing import NamedTuple

from casparian_flow.domain.errors import ConfigError

SERVER_PUBLIC = "server.key"
SERVER_SECRET = "server.key_secret"
CLIENT_SECRET = "client.key_secret"
FILE_BYTES_MAX = 16_384
TOKEN_BYTES_MAX = 16_384
"""Of the file with a pod's token; those of Kubernetes have about 1,200."""
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LINE = r'^\s*{name}\s*=\s*"([^"\n]*)"\s*$'


class CurvePair(NamedTuple):
    """A key pair in Z85."""

    public: str
    secret: str


class ClientKeys(NamedTuple):
    """What a client needs: its own pair, and the one public key that its server may have."""

    own: CurvePair
    server: str


def is_key(text: str) -> bool:
    """Whether `text` could be a key in Z85."""
    return _KEY.fullmatch(text) is not None


def public_text(public: str) -> str:
    """Content of a file with a public key."""
    return f'metadata\ncurve\n    public-key = "{public}"\n'


def secret_text(pair: CurvePair) -> str:
    """Content of a file with a pair; for its owner's eyes only."""
    return f'{public_text(pair.public)}    secret-key = "{pair.secret}"\n'


def client_keys(folder: Path) -> ClientKeys:
    """The keys of a worker or of another client.

    Raises:
        ConfigError: a file is missing or is none of keys.
    """
    path = folder / SERVER_PUBLIC
    server = _key(_read(path), path)
    return ClientKeys(read_pair(folder / CLIENT_SECRET), server)


def server_keys(folder: Path) -> CurvePair:
    """The Sentinel's own pair.

    Raises:
        ConfigError: the file is missing or is none of keys.
    """
    return read_pair(folder / SERVER_SECRET)


def read_pair(path: Path) -> CurvePair:
    """Raises:
    ConfigError: the file is missing or holds no pair.
    """
    text = _read(path)
    return CurvePair(_key(text, path), _key(text, path, "secret-key"))


def read_token(path: Path) -> str:
    """The token by which a pod proves which one it is.

    Raises:
        ConfigError: the file is missing, empty, or far too large.
    """
    token = _read(path, TOKEN_BYTES_MAX).strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{path} holds no token", hint=_HINT)
    return token


_HINT = "In a pod the operator mounts it; see docs/trust.md, 'Trust on the wire'."


def _read(path: Path, limit: int = FILE_BYTES_MAX) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from error
    if len(raw) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes", hint=_HINT)
    return raw.decode("utf-8", "replace")


def _key(text: str, path: Path, name: str = "public-key") -> str:
    found = re.search(_LINE.format(name=name), text, re.MULTILINE)
    if found is None or not is_key(found[1]):
        # Never a word of what the file holds: it may be a secret.
        raise ConfigError(f"{path} holds no {name} of CURVE", hint=_HINT)
    return found[1]
