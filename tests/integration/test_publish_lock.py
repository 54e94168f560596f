"""Locks made and kept by the real uv, from a small package index on loopback."""

import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from publish_kit import PLUGIN, Desk

from casparian_flow.services.locking import script_block

WHEELS = {"pyarrow": "99.0.0", "tiny": "1.2.0"}
SCRIPT = '# /// script\n# requires-python = ">=3.11"\n# dependencies = ["tiny<2"]\n# ///\n'
PROJECT = """\
[project]
name = "sales"
version = "0"
requires-python = ">=3.11"
dependencies = ["tiny", "pyarrow"]
[tool.uv]
package = false
"""


def wheel(name: str, version: str) -> bytes:
    info = f"{name}-{version}.dist-info"
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return held.getvalue()


class Index(http.server.BaseHTTPRequestHandler):
    """A simple repository (PEP 503) of WHEELS."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        parts = self.path.strip("/").split("/")
        name = parts[1] if len(parts) > 1 else ""
        if name not in WHEELS:
            self.send_error(404)
            return
        file = f"{name}-{WHEELS[name]}-py3-none-any.whl"
        data = wheel(name, WHEELS[name])
        if len(parts) == 2:
            digest = hashlib.sha256(data).hexdigest()
            data = f'<a href="/simple/{name}/{file}#sha256={digest}">{file}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if len(parts) == 2 else "application/zip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815 - named by http.server

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    desk = Desk(tmp_path)
    desk.variables = {
        "UV_DEFAULT_INDEX": f"http://127.0.0.1:{server.server_port}/simple/",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "no_proxy": "127.0.0.1",
    }
    yield desk
    server.shutdown()
    server.server_close()


def lock_in(desk: Desk, name: str) -> str:
    return (desk.folder / name).read_text()


def test_a_script_block_is_locked_with_what_every_plugin_needs_and_the_lock_is_kept(
    desk: Desk,
) -> None:
    desk.write("sales.py", SCRIPT + PLUGIN)
    first = desk.publish("--dry-run", "-o", "json").json["artifact_hash"]
    lock = lock_in(desk, "sales.uv.lock")
    assert 'name = "tiny"' in lock
    assert 'name = "pyarrow"' in lock
    before = Index.asked
    desk.variables = {**desk.variables, "UV_OFFLINE": "1"}
    assert desk.publish("--dry-run", "-o", "json").json["artifact_hash"] == first
    assert Index.asked == before, "a fresh lock needs no network"


def test_a_project_beside_the_plugin_is_locked_and_a_stale_lock_renewed(desk: Desk) -> None:
    desk.write("pyproject.toml", PROJECT)
    desk.publish("--dry-run")
    assert 'name = "tiny"' in lock_in(desk, "uv.lock")
    desk.write("pyproject.toml", PROJECT.replace('"tiny", ', ""))
    desk.publish("--dry-run")
    assert 'name = "tiny"' not in lock_in(desk, "uv.lock")


def test_a_conflict_shows_uv_s_own_words_and_nothing_is_deployed(desk: Desk) -> None:
    desk.write("sales.py", SCRIPT.replace("tiny<2", "tiny>2") + PLUGIN)
    done = desk.publish(code=2)
    assert "No solution found" in done.err
    assert "tiny" in done.err
    assert not (desk.folder / "sales.uv.lock").exists()
    assert not desk.database.exists()


def test_a_stale_lock_without_network_shows_uv_s_own_words(desk: Desk) -> None:
    desk.write("sales.py", SCRIPT + PLUGIN)
    desk.variables = {**desk.variables, "UV_OFFLINE": "1"}
    done = desk.publish(code=2)
    assert "uv could not lock" in done.err
    assert "fresh lock beside it" in done.err


def test_a_lock_that_no_worker_could_use_is_refused_at_once(desk: Desk) -> None:
    desk.write("pyproject.toml", PROJECT.replace(', "pyarrow"', ""))
    assert "the lock lacks pyarrow" in desk.publish(code=2).err


def test_a_plugin_without_needs_of_its_own_has_no_lock(desk: Desk) -> None:
    desk.write("pyproject.toml", "[tool.ruff]\nline-length = 100\n")
    desk.publish("--dry-run")
    assert not list(desk.folder.glob("*uv.lock"))


def test_the_script_block_is_read_as_pep_723_says() -> None:
    assert script_block("x = 1\n") is None
    assert script_block("#  /// script\n# a = 1\n# ///\n") is None
    assert script_block("# /// script\n# a = 1\n#\n# b = 2\n# ///\n") == "a = 1\n\nb = 2\n"
    assert script_block("# /// other\n# a = 1\n# ///\n") is None
