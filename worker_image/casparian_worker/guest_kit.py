"""What a plugin process is started with: the interpreter, and the modules it needs of ours.

These modules lie in a folder of their own: nothing else of the worker's code can be imported by a
plugin, whichever environment it runs in. The folder is named by its content, so that several
workers and versions share a cache.
"""

import hashlib
import os
import py_compile
import shutil
import sys
import tempfile
from pathlib import Path

import casparian_flow
import casparian_worker

_PACKAGES = {
    "casparian_flow": ("sdk",),
    "casparian_worker": ("sandbox",),
}
_MODULES = {
    "casparian_flow": (),
    "casparian_worker": ("bridge.py", "arrow_ipc.py", "clearing.py", "guest.py", "guest_plugin.py"),
}
_INIT = '"""The part of Casparian Flow that plugins may import."""\n'


def base_python() -> str:
    """The interpreter behind the worker's own environment.

    An environment's own `bin/python` is never run, since a wheel may have replaced it.
    """
    base: str = getattr(sys, "_base_executable", sys.executable)
    return os.path.realpath(base)


def kit_files() -> dict[str, bytes]:
    """Relative path → content of every file in the kit."""
    roots = {
        "casparian_flow": _package_folder(casparian_flow.__file__),
        "casparian_worker": _package_folder(casparian_worker.__file__),
    }
    files: dict[str, bytes] = {}
    for package, root in roots.items():
        files[f"{package}/__init__.py"] = _INIT.encode()
        for name in _MODULES[package]:
            files[f"{package}/{name}"] = (root / name).read_bytes()
        for folder in _PACKAGES[package]:
            for path in sorted((root / folder).glob("*.py")):
                files[f"{package}/{folder}/{path.name}"] = path.read_bytes()
    return files


def kit_name(files: dict[str, bytes]) -> str:
    """Names a kit by its content."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def install_kit(cache: str) -> str:
    """The kit's folder beneath `cache`, made if it is not there; it is named `kit_name`.

    Raises:
        OSError: the folder cannot be written.
    """
    files = kit_files()
    final = Path(cache, "kits", kit_name(files))
    if final.is_dir():
        return str(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".kit-", dir=final.parent))
    try:
        _write(staged, files)
        try:
            staged.rename(final)
        except OSError:
            if not final.is_dir():  # another worker was first
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return str(final)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.chmod(0o755)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        # Compiled here, since the plugin's user may write nothing.
        py_compile.compile(
            str(path),
            dfile=name,
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    for parent, folders, names in os.walk(folder):
        for entry in folders:
            os.chmod(os.path.join(parent, entry), 0o755)  # noqa: S103 - holds public code only
        for entry in names:
            os.chmod(os.path.join(parent, entry), 0o644)


def _package_folder(file: str | None) -> Path:
    if file is None:
        raise FileNotFoundError("the package has no folder of its own")
    return Path(file).parent
