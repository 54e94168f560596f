"""Make the environment of an image small: what `Dockerfile.worker` and `Dockerfile.operator` run.

    python tools/slim_image.py /opt/casparian

Takes out what only developers of the libraries need, debugging symbols and padding, makes bytecode
(an image's files are read-only later), and prints what is left. Standard library only.
"""

import compileall
import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
LARGEST = 12
UNUSED = (
    # The asynchronous twin of the client, which nothing here imports.
    "kubernetes/aio",
    "numpy/**/tests",
    "numpy/_core/include",
    "numpy/_core/lib",
    "numpy/f2py",
    "pandas/tests",
    "pyarrow/include",
    "pyarrow/src",
    "pyarrow/tests",
    # Remote file systems and services, which plugins cannot reach.
    "pyarrow/*flight*",
    "pyarrow/*_s3*",
    "pyarrow/_pyarrow_cpp_tests*",
    # Colours for other languages than Python; rich shows tracebacks only.
    "pygments/lexers/[a-oq-z]*.py",
    "pygments/lexers/_*_builtins.py",
    "**/*.a",
    "**/*.pxd",
    "**/*.pyi",
    "**/*.pyx",
)
GAP_BYTES_MIN = 256 << 10
"""Padding of a library that is worth taking out."""
PAGE = 4096
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_LOAD = 1
_X86_64 = 62


def main(environment: Path) -> None:
    (packages,) = environment.glob("lib/python3.*/site-packages")
    before = _bytes(environment)
    _prune(packages)
    _share_equal(packages)
    _strip(packages)
    for library in _libraries(packages):
        _close_gaps(library)
    compileall.compile_dir(packages, quiet=2, workers=0)
    print(f"== {environment}: {before / MIB:.0f} MiB, now {_bytes(environment) / MIB:.0f} MiB")
    parts = {path.name: _bytes(path) for path in (*packages.iterdir(), environment / "bin")}
    for name in sorted(parts, key=parts.__getitem__, reverse=True)[:LARGEST]:
        print(f"{parts[name] / MIB:7.1f}  {name}")


def _prune(packages: Path) -> None:
    for pattern in UNUSED:
        for path in list(packages.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _libraries(packages: Path) -> Iterator[Path]:
    found = (*packages.rglob("*.so"), *packages.rglob("*.so.*"))
    return (path for path in found if path.is_file() and not path.is_symlink())


def _share_equal(packages: Path) -> None:
    """Names of one library become links, which a wheel cannot hold."""
    first: dict[tuple[Path, str], Path] = {}
    for path in sorted(_libraries(packages), key=lambda path: (len(path.name), path.name)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        kept = first.setdefault((path.parent, digest), path)
        if kept != path:
            path.unlink()
            path.symlink_to(kept.name)


def _strip(packages: Path) -> None:
    """Symbols that nothing links against; left alone where there is no `strip`."""
    if shutil.which("strip") is None:
        print("== no strip here: libraries keep their symbols")
        return
    for path in _libraries(packages):
        stripped = path.with_name(f".{path.name}.stripped")
        command = ["strip", "--strip-unneeded", "-o", str(stripped), str(path)]
        done = subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
        # A library that was altered after it was linked may be refused, or misplaced.
        if done and _loadable(stripped.read_bytes()):
            shutil.copymode(path, stripped)
            stripped.replace(path)
        stripped.unlink(missing_ok=True)


def _loadable(data: bytes) -> bool:
    """Whether each segment's place agrees with its address within a page."""
    return all(s[0] != _LOAD or (s[3] - s[2]) % PAGE == 0 for s in _segments(data))


def _segments(data: bytes) -> list[list[int]]:
    """Of each: type, flags, offset, address, its double, bytes, bytes in memory, alignment."""
    header = _HEADER.unpack_from(data)
    return [list(_SEGMENT.unpack_from(data, header[5] + header[9] * n)) for n in range(header[10])]


def _close_gaps(library: Path) -> None:
    """Move the segments of a library together.

    Some are laid out for pages of 2 MiB, with zeros up to the next such page between any two
    segments. Addresses stay as they are; only places in the file change. The table of sections,
    which only linkers and debuggers read, goes.
    """
    data = library.read_bytes()
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        return
    header = list(_HEADER.unpack_from(data))
    machine, table, size = header[2], header[5], header[9]
    if machine != _X86_64:
        return
    segments = _segments(data)
    moved, end = _closer(segments)
    # The table of segments has to be in the first of them, which stays in its place.
    if table + size * len(segments) > moved[0][1] or len(data) - end < GAP_BYTES_MIN:
        return
    packed = bytearray(end)
    for old, length, new in moved:
        packed[new : new + length] = data[old : old + length]
    for number, segment in enumerate(segments):
        kind, offset = segment[0], segment[2]
        for old, length, new in moved:
            if old <= offset < old + length:
                segment[2] = offset - old + new
                break
        if kind == _LOAD:
            segment[7] = PAGE
        _SEGMENT.pack_into(packed, table + size * number, *segment)
    header[6] = header[12] = header[13] = 0
    _HEADER.pack_into(packed, 0, *header)
    library.write_bytes(packed)


def _closer(segments: list[list[int]]) -> tuple[list[tuple[int, int, int]], int]:
    """(old offset, length, new offset) of each loaded segment, and the file's new length."""
    loads = sorted((s[2], s[5], s[3]) for s in segments if s[0] == _LOAD)
    moved: list[tuple[int, int, int]] = []
    end = 0
    for old, length, address in loads:
        # A place in the file has to agree with the address within a page.
        new = end + (address - end) % PAGE if moved else old
        moved.append((old, length, new))
        end = new + length
    return moved, end


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
