"""Environments built by the real uv from a real, small lock. The wheels come from the registry."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plugin_runs import Bench, handler

from casparian_flow.domain.failures import Reason
from casparian_worker.environments import EnvironmentCache, environment_key
from casparian_worker.plugin_events import LaunchError
from casparian_worker.runtime import PluginRuntime

LOCK = (Path(__file__).parent.parent / "data" / "excel_reader.uv.lock").read_text()
BODY = """
    import importlib.util, openpyxl, sys
    book = openpyxl.Workbook(); book.active.append(["x"]); book.save("t.xlsx")
    value = openpyxl.load_workbook("t.xlsx").active["A1"].value
    return [{"value": value, "pandas": importlib.util.find_spec("pandas") is not None,
             "prefix": sys.prefix}]
"""


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_SH)
print(1, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def runtime(cache: str, tmp_path: Path) -> Iterator[PluginRuntime]:
    runtime = PluginRuntime(scratch_root=str(tmp_path / "scratch"), cache_root=cache)
    yield runtime
    runtime.close()


def test_a_locked_plugin_runs_with_its_own_packages_and_no_others(
    runtime: PluginRuntime, cache: str, tmp_path: Path
) -> None:
    bench = Bench(runtime, tmp_path)
    row = bench.run(handler(BODY), lockfile=LOCK).rows()[0]
    assert row["value"] == "x"
    assert row["pandas"] is False, "the worker's packages must not leak in"
    assert str(row["prefix"]).startswith(os.path.realpath(cache))


UV_DOUBLE = """#!/bin/sh
[ "$1" = venv ] || exit 0
echo built >> "$0.log"
sleep 0.3
mkdir -p "$2/lib/python3.11/site-packages"
"""


def test_an_environment_is_built_once_for_several_slots_of_one_worker(tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text(UV_DOUBLE)
    uv.chmod(0o755)
    cache = EnvironmentCache(str(tmp_path / "cache"), uv=str(uv))
    with ThreadPoolExecutor(4) as slots:
        environments = set(slots.map(cache.obtain, [LOCK] * 4))
    assert len(environments) == 1
    assert Path(f"{uv}.log").read_text() == "built\n"
    cache.close()


def test_a_byte_changed_in_an_environment_is_named_and_nothing_is_run_with_it(
    tmp_path: Path,
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(UV_DOUBLE + 'echo "x = 1" > "$2/lib/tiny.py"\n')
    uv.chmod(0o755)
    cache = EnvironmentCache(str(tmp_path / "cache"), uv=str(uv))
    prefix = Path(cache.obtain(LOCK).prefix)
    file = prefix / "lib" / "tiny.py"
    before = file.stat()
    file.touch()
    cache.obtain(LOCK)  # other times, the same bytes
    file.write_text("x = 2\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(LaunchError, match=r"lib/tiny\.py was changed") as caught:
            cache.obtain(LOCK)
        assert caught.value.reason == Reason.ENVIRONMENT
    file.write_text("x = 1\n")
    cache.obtain(LOCK)
    (prefix / "lib" / "more.pth").write_text("import os")
    with pytest.raises(LaunchError, match=r"lib/more\.pth was added"):
        cache.obtain(LOCK)
    (prefix / "lib" / "more.pth").unlink()
    file.unlink()
    with pytest.raises(LaunchError, match=r"lib/tiny\.py was removed"):
        cache.obtain(LOCK)
    cache.close()


def test_an_environment_is_built_once_for_several_workers(cache: str) -> None:
    told: list[str] = []
    caches = [EnvironmentCache(cache + "-shared") for _ in range(3)]
    threads = [threading.Thread(target=c.obtain, args=(LOCK, told.append)) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([line for line in told if line.startswith("building")]) == 1
    for each in caches:
        each.close()
    assert not list(Path(cache + "-shared", "environments").glob(".build-*"))


def test_unused_environments_go_when_the_cache_is_too_large(tmp_path: Path) -> None:
    folder = tmp_path / "environments"
    for key, used in (("a" * 40, 100), ("b" * 40, 200), ("c" * 40, 300)):
        (folder / key / "venv").mkdir(parents=True)
        ready = folder / key / "ready.json"
        ready.write_text('{"bytes": 600}')
        os.utime(ready, (used, used))
    cache = EnvironmentCache(str(tmp_path), max_bytes=1000)
    assert cache.clean(keep="a" * 40) == ["b" * 40, "c" * 40]
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["a" * 40]


def test_an_environment_in_use_by_another_worker_stays(tmp_path: Path) -> None:
    key = "a" * 40
    folder = tmp_path / "environments"
    (folder / key).mkdir(parents=True)
    (folder / key / "ready.json").write_text('{"bytes": 600}')
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD,
            str(folder / f"{key}.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    cache = EnvironmentCache(str(tmp_path), max_bytes=100)
    assert cache.clean() == []
    holder.communicate()
    assert cache.clean() == [key]


def test_a_half_built_environment_is_never_used(tmp_path: Path) -> None:
    key = environment_key(LOCK)
    wreck = tmp_path / "environments" / key / "venv"
    wreck.mkdir(parents=True)
    (wreck / "half").write_text("")
    cache = EnvironmentCache(str(tmp_path))
    environment = cache.obtain(LOCK)
    assert not Path(environment.prefix, "half").exists()
    assert Path(environment.site[0], "pyarrow").is_dir()
    cache.close()


def test_a_lock_without_pyarrow_fails_the_job_with_the_reason(
    runtime: PluginRuntime, tmp_path: Path
) -> None:
    lock = LOCK[: LOCK.index('[[package]]\nname = "pyarrow"')]
    failed = Bench(runtime, tmp_path).run(handler("pass"), lockfile=lock).failed
    assert failed.reason is Reason.ENVIRONMENT
    assert failed.transient is False
    assert "lacks pyarrow" in failed.message


def test_uvs_own_message_is_kept(tmp_path: Path) -> None:
    cache = EnvironmentCache(str(tmp_path))
    with pytest.raises(LaunchError, match=r"uv tree failed: .*Python") as caught:
        cache.obtain(LOCK.replace('">=3.11"', '">=3.99"', 1))
    assert caught.value.transient is False
    assert not list((tmp_path / "environments").glob(".build-*"))


def test_an_unreachable_registry_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    lock = LOCK.replace("https://pypi.org/simple", "http://127.0.0.1:9/simple")
    with pytest.raises(LaunchError) as caught:
        EnvironmentCache(str(tmp_path)).obtain(lock)
    assert caught.value.transient is True


def test_a_missing_uv_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="uv cannot be run") as caught:
        EnvironmentCache(str(tmp_path), uv=str(tmp_path / "no-uv")).obtain(LOCK)
    assert "casparian-flow[worker]" in caught.value.hint
