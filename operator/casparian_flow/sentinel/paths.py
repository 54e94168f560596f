"""Where a ledger's side files are: control socket and snapshots, derived from its path alone.

Every process that knows the ledger's path finds the same socket, so nothing has to be told where
a Sentinel listens.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from casparian_flow.domain.errors import ConfigError, UsageError

SOCKET_PATH_BYTES_MAX = 107
"""`sockaddr_un.sun_path` has 108 bytes on Linux, one of them for the closing NUL."""
IN_MEMORY = ":memory:"


def state_folder(database: str | Path) -> Path:
    """The folder beside the ledger for everything that may be deleted while nothing runs."""
    real = Path(os.path.realpath(database))
    return real.with_name(real.name + ".state")


def snapshot_folder(database: str | Path) -> Path:
    return state_folder(database) / "snapshots"


def control_address(database: str | Path, configured: str = "") -> str:
    """The ZeroMQ address of the control socket of the ledger at `database`.

    It is in the ledger's state folder, or, where that path is too long for a socket, in the
    user's runtime folder under a digest of the ledger's path.

    Raises:
        UsageError: an in-memory ledger, which no other process could reach, without `configured`.
    """
    if configured:
        return configured
    if str(database) == IN_MEMORY:
        raise UsageError(
            "an in-memory ledger has no control socket of its own",
            hint="Give the ledger a file, or set control_address.",
        )
    path = state_folder(database) / "control.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        path = _runtime_folder() / f"{digest}.sock"
    return f"ipc://{path}"


def private_folder(folder: Path) -> Path:
    """Make `folder` with mode 0700, or tighten one of ours.

    Raises:
        ConfigError: it is a link, no folder, or belongs to somebody else.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"cannot use the folder {folder}: {error.strerror}",
            hint="Make it writable, or move the ledger (db_location).",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(
            f"the folder {folder} does not belong to this user",
            hint="Remove it, or move the ledger (db_location).",
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _runtime_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and len(os.fsencode(runtime)) < SOCKET_PATH_BYTES_MAX - 40:
        return Path(runtime) / "casparian"
    return Path(tempfile.gettempdir()) / f"casparian-{os.geteuid()}"
