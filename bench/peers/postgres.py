"""A PostgreSQL of the bench's own: a temporary folder, a unix socket, an unprivileged user."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

USERS = ("postgres", "nobody")
"""Who runs the server where the bench itself runs as root, which PostgreSQL refuses to."""


class UnavailableError(Exception):
    """There is no PostgreSQL here; the text says what to install."""


@contextmanager
def server() -> Iterator[str]:
    """Run a server with its default settings (fsync on); yields a connection string.

    Raises:
        UnavailableError: PostgreSQL is not installed.
    """
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="casparian-pg-"))
    user, become = _unprivileged()
    if os.geteuid() == 0:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*arguments: str) -> None:
        subprocess.run(
            arguments, check=True, cwd=folder, preexec_fn=become,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    data = str(folder / "data")
    control = [str(programs / "pg_ctl"), "-D", data, "-l", str(folder / "log"), "-w"]
    try:
        run(
            str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "bench",
            "-E", "UTF8", "--no-locale",
        )  # fmt: skip
        run(*control, "-o", f"-k {folder} -c listen_addresses=''", "start")
        try:
            yield f"host={folder} user=bench dbname=postgres"
        finally:
            run(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        raise UnavailableError("PostgreSQL is not installed (Debian: apt install postgresql)")
    return Path(on_path).resolve().parent


def _unprivileged() -> tuple[pwd.struct_passwd, Callable[[], None]]:
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()), lambda: None
    user = _first_known(USERS)

    def become() -> None:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    return user, become


def _first_known(names: Sequence[str]) -> pwd.struct_passwd:
    for name in names:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise UnavailableError(f"none of the users {', '.join(names)} exists to run PostgreSQL")
