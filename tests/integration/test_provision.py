"""Environments provisioned by the real uv from wheels that are made here; nothing is fetched."""

import base64
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from signing_kit import KEY, SIGNER, signed

from casparian_flow.domain.failures import Reason
from casparian_flow.engine.provision import main
from casparian_flow.trust.bundle import Bundle, pack
from casparian_flow.trust.keys import public_text
from casparian_worker.environments import EnvironmentCache
from casparian_worker.plugin_events import LaunchError

WHEEL = "pyarrow-1.0.0-py3-none-any.whl"
ELSEWHERE = "http://127.0.0.1:9/simple"
LOCK = """
version = 1
revision = 3
requires-python = ">=3.11"

[[package]]
name = "demo"
version = "0.1.0"
source = {{ virtual = "." }}
dependencies = [{{ name = "pyarrow" }}]

[package.metadata]
requires-dist = [{{ name = "pyarrow" }}]

[[package]]
name = "pyarrow"
version = "1.0.0"
source = {{ registry = "{index}" }}
wheels = [{{ url = "{index}/{wheel}", hash = "sha256:{digest}" }}]
"""
PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.csv", topic="sales")


class Handler(BasePlugin):
    def execute(self, file_path: str):
        return []
"""


def make_wheel(folder: Path, text: str = "made = 'here'\n") -> str:
    """A wheel named as what every lock must have; returns its digest."""
    folder.mkdir(exist_ok=True)
    info = "pyarrow-1.0.0.dist-info"
    files = {
        "pyarrow.py": text,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: pyarrow\nVersion: 1.0.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        raw = hashlib.sha256(content.encode()).digest()
        digest = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(zipfile.ZipInfo(name), content)
    return hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()


@dataclass
class Site:
    """A wheelhouse, a volume for environments, a bundle and settings."""

    folder: Path
    lock: str

    @property
    def environments(self) -> Path:
        return self.folder / "environments"

    @property
    def termination_log(self) -> Path:
        return self.folder / "termination-log"

    def arguments(self, bundle: Bundle, *, packed: bool = False) -> list[str]:
        file = self.folder / "bundle"
        file.write_bytes(gzip.compress(pack(bundle)) if packed else pack(bundle))
        self.termination_log.touch()
        return [
            "--bundle", str(file), "--environments", str(self.environments),
            "--termination-log", str(self.termination_log),
        ]  # fmt: skip

    def run(
        self, bundle: Bundle, *, packed: bool = False, wheelhouse: bool = True, **settings: str
    ) -> Result:
        folder = {"CASPARIAN_WORKER__WHEELHOUSE": str(self.folder / "wheels")}
        wheels = folder if wheelhouse else {}
        arguments = self.arguments(bundle, packed=packed)
        return CliRunner().invoke(main, arguments, env=environment(self.folder, wheels | settings))

    def bundle(self, lock: str = "") -> Bundle:
        return signed(PLUGIN, lockfile=lock or self.lock)

    def told(self) -> str:
        return self.termination_log.read_text()

    def kept(self) -> list[str]:
        return [p.name for p in (self.environments / "environments").glob("*/ready.json")]


def environment(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    file = folder / "config.toml"
    file.touch()
    return {
        "CASPARIAN_CONFIG": str(file),
        "CASPARIAN_TRUST__ALLOWED_SIGNERS": json.dumps([SIGNER]),
        "CASPARIAN_TRUST__KEYS": json.dumps({SIGNER: [{"public": public_text(KEY.public_key())}]}),
        "UV_HTTP_RETRIES": "0",
        **settings,
    }


@pytest.fixture
def site(tmp_path: Path) -> Site:
    digest = make_wheel(tmp_path / "wheels")
    return Site(tmp_path, LOCK.format(index=ELSEWHERE, wheel=WHEEL, digest=digest))


def test_a_lock_is_provisioned_once_and_then_only_read(site: Site) -> None:
    reader = EnvironmentCache(str(site.environments), read_only=True)
    with pytest.raises(LaunchError, match="is not provisioned") as caught:
        reader.obtain(site.lock)
    assert (caught.value.reason, caught.value.transient) == (Reason.ENVIRONMENT, True)
    assert not site.environments.exists()

    done = subprocess.run(
        [sys.executable, "-m", "casparian_worker.provision", *site.arguments(site.bundle())],
        env=os.environ
        | environment(site.folder, {"CASPARIAN_WORKER__WHEELHOUSE": str(site.folder / "wheels")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert site.told().endswith("is ready")
    before = {p: p.stat().st_mtime_ns for p in site.environments.rglob("*")}
    assert site.run(site.bundle(), packed=True).exit_code == 0
    found = reader.obtain(site.lock)
    assert Path(found.site[0], "pyarrow.py").read_text() == "made = 'here'\n"
    after = {p: p.stat().st_mtime_ns for p in site.environments.rglob("*")}
    marker = next(p for p in before if p.name == "ready.json")
    assert {p for p in after if after[p] != before.get(p)} == {marker}, "it was made again"
    reader.obtain(site.lock)
    assert after == {p: p.stat().st_mtime_ns for p in site.environments.rglob("*")}

    Path(found.site[0], "pyarrow.py").write_text("made = 'elsewhere'\n")
    with pytest.raises(LaunchError, match=r"pyarrow\.py was changed"):
        reader.obtain(site.lock)


@contextmanager
def index(folder: Path) -> Iterator[str]:
    """A package index of the wheels in a folder."""
    page = folder / "simple" / "pyarrow"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<a href="/{WHEEL}">{WHEEL}</a>')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("variable", ["CASPARIAN_WORKER__INDEX_URL", "UV_DEFAULT_INDEX"])
def test_another_index_than_the_locks_gives_the_locked_bytes(site: Site, variable: str) -> None:
    with index(site.folder / "wheels") as url:
        done = site.run(site.bundle(), wheelhouse=False, **{variable: url})
    assert done.exit_code == 0, site.told()
    assert len(site.kept()) == 1


def test_an_index_that_is_away_may_be_tried_again(site: Site) -> None:
    done = site.run(site.bundle(), wheelhouse=False)
    assert done.exit_code == 75
    assert "127.0.0.1:9" in site.told()
    assert not list((site.environments / "environments").glob(".build-*"))


def test_other_bytes_than_the_locked_ones_are_refused_in_uvs_words(site: Site) -> None:
    make_wheel(site.folder / "wheels", "made = 'by somebody else'\n")
    done = site.run(site.bundle())
    assert done.exit_code == 1
    assert "Hash mismatch for `pyarrow==1.0.0`" in site.told()
    assert len(site.termination_log.read_bytes()) <= 4096
    assert site.kept() == []


def test_a_bundle_that_is_not_trusted_gets_no_environment(site: Site) -> None:
    done = site.run(site.bundle(), CASPARIAN_TRUST__ALLOWED_SIGNERS="[]")
    assert done.exit_code == 8
    assert not site.environments.exists()
    assert site.told()


def test_a_plugin_without_a_lock_file_needs_none(site: Site) -> None:
    done = site.run(signed(PLUGIN))
    assert done.exit_code == 0
    assert "needs no environment" in site.told()
    assert not site.environments.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", gzip.compress(b"x")[:-4], b"\x1f\x8b"])
def test_what_is_no_bundle_is_refused(site: Site, content: bytes) -> None:
    arguments = site.arguments(site.bundle())
    (site.folder / "bundle").write_bytes(content)
    done = CliRunner().invoke(main, arguments, env=environment(site.folder, {}))
    assert done.exit_code in {1, 2, 8}
    assert "bundle" in site.told()
