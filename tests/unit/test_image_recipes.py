"""The images' recipes agree with the project, and what makes them small leaves libraries whole."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import duckdb
import pymssql
import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ("Dockerfile.operator", "Dockerfile.worker")
MIB = 1 << 20


@pytest.fixture(scope="module")
def slim_image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slim_image", ROOT / "tools" / "slim_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recipe(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def _uv_version(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", RECIPES)
def test_images_are_made_with_the_uv_that_the_project_uses(name: str) -> None:
    made_with = _uv_version(_recipe(name), r"^ARG UV_VERSION=(\S+)$")
    assert made_with == _uv_version((ROOT / "Makefile").read_text("utf-8"), r"^UV_VERSION := (\S+)")
    lock = (ROOT / "uv.lock").read_text("utf-8")
    assert made_with == _uv_version(lock, r'^name = "uv"\nversion = "([^"]+)"')


@pytest.mark.parametrize("name", RECIPES)
def test_images_run_as_nobody_in_particular_on_any_base(name: str) -> None:
    text = _recipe(name)
    assert text.count("FROM ${BASE_IMAGE}") == 2
    assert "ARG BASE_IMAGE=python:3.12-slim-bookworm" in text
    assert "USER 10001:10001" in text
    # Who has no name in the image's list of users has this one: kopf asks for it.
    assert "LOGNAME=casparian" in text
    assert "--require-hashes --only-binary :all:" in text


def test_the_two_recipes_differ_in_what_they_install_and_in_names() -> None:
    operator, worker = (_recipe(name).splitlines() for name in RECIPES)
    steps = [line for line in operator if line.startswith(("RUN", "COPY", "ARG", "ENV", "USER"))]
    assert [line for line in steps if line not in worker] == []


def test_what_a_worker_installs_has_no_client_of_kubernetes(tmp_path: Path) -> None:
    extras = re.findall(r"--extra \S+", _recipe("Dockerfile.worker"))
    assert extras
    uv = Path(sys.executable).with_name("uv")
    listed = subprocess.run(
        [
            *(uv, "export", "--quiet", "--frozen", "--offline", "--no-dev", "--no-emit-project"),
            *(part for extra in extras for part in extra.split()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = set(re.findall(r"^([a-z0-9-]+)==", listed, re.MULTILINE))
    assert {"pandas", "pyarrow", "duckdb", "pymssql", "uv"} <= names
    assert not names & {"kopf", "kubernetes", "sqlalchemy", "mcp"}


def _libraries() -> list[Path]:
    """Libraries as a wheel brings them, padded to pages of 2 MiB."""
    padded = Path(pymssql.__file__).parents[1] / "pymssql.libs"
    assert padded.is_dir()
    return sorted(padded.iterdir())


def test_a_library_without_its_padding_still_loads(slim_image: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "libs"
    folder.mkdir()
    originals = [path for path in _libraries() if path.exists()]
    for path in originals:
        shutil.copy2(path, folder / path.name)
        slim_image._close_gaps(folder / path.name)
    before = sum(path.stat().st_size for path in originals)
    after = sum((folder / path.name).stat().st_size for path in originals)
    assert before - after > 20 * MIB
    # In the order in which they need one another, from this folder.
    left = sorted(folder.iterdir())
    environment = {"LD_LIBRARY_PATH": str(folder)}
    code = "import ctypes, sys; [ctypes.CDLL(p) for p in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *left], env=environment, check=True)


def test_what_is_no_library_is_left_alone(slim_image: ModuleType, tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\x7fELF", b"text" * 9999, b"\x7fELF\x01\x01" * 99)):
        file = tmp_path / f"lib{number}.so"
        file.write_bytes(content)
        slim_image._close_gaps(file)
        assert file.read_bytes() == content


def test_names_of_one_library_become_links_to_it(slim_image: ModuleType, tmp_path: Path) -> None:
    for name in ("libx.so", "libx.so.1", "libx.so.1.2"):
        (tmp_path / name).write_bytes(b"the same")
    (tmp_path / "liby.so").write_bytes(b"another")
    slim_image._share_equal(tmp_path)
    assert not (tmp_path / "libx.so").is_symlink()
    assert (tmp_path / "libx.so.1.2").readlink() == Path("libx.so")
    assert (tmp_path / "libx.so.1.2").read_bytes() == b"the same"
    assert not (tmp_path / "liby.so").is_symlink()


def test_a_stripped_library_that_cannot_be_loaded_is_not_taken(
    slim_image: ModuleType, tmp_path: Path
) -> None:
    """Some strip tools misplace the segments of a library that was altered after linking."""
    if shutil.which("strip") is None:
        pytest.fail("there is no `strip`: install binutils")
    numpy = Path(duckdb.__file__).parents[1] / "numpy.libs"
    for path in numpy.iterdir():
        shutil.copy2(path, tmp_path / path.name)
    slim_image._strip(tmp_path)
    for path in sorted(tmp_path.iterdir(), key=lambda path: "openblas" in path.name):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
