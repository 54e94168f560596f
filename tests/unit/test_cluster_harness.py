"""The parts of the cluster harness that need no cluster."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.harness import cache, daemon, runtime, tools
from cluster.harness.errors import HarnessError
from cluster.harness.progress import run_logged


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    return tmp_path / "cache"


def writer(made: list[Path]) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        made.append(target)
        target.write_text("whole")

    return make


def test_an_entry_is_made_once_by_however_many_ask(root: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=cache.cached, args=("thing", "0" * 12, writer(made)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (root / f"thing-{'0' * 12}").read_text() == "whole"
    assert len(made) == 1


def test_an_entry_whose_making_failed_is_not_there_and_is_made_again(root: Path) -> None:
    def fail(target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise HarnessError("no", "space left")

    with pytest.raises(HarnessError, match="space left"):
        cache.cached("thing", "0" * 12, fail)
    assert not (root / f"thing-{'0' * 12}").exists()
    made: list[Path] = []
    assert cache.cached("thing", "0" * 12, writer(made)).read_text() == "whole"


def test_a_digest_changes_with_names_contents_and_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = cache.digest(tmp_path, "x")
    assert cache.digest("x", tmp_path) != first
    (tmp_path / "a").rename(tmp_path / "b")
    assert cache.digest(tmp_path, "x") != first
    (tmp_path / "b").rename(tmp_path / "a")
    assert cache.digest(tmp_path, "x") == first
    assert cache.digest("ab", "c") != cache.digest("a", "bc")


def test_every_program_has_a_module_that_pins_it() -> None:
    for module in tools.MODULES_PINNED:
        assert tools.version_of(module).startswith("v")
        assert (tools.MODULES / module / "go.sum").exists()
    assert {recipe.module for recipe in tools.RECIPES.values()} == {
        path.name for path in tools.MODULES.iterdir()
    }


def test_what_a_failed_command_has_said_is_in_the_hint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(HarnessError, match="out of paper") as failed:
        run_logged(["sh", "-c", "echo out of paper; exit 3"], "printing", log)
    assert failed.value.message == "printing failed with status 3"
    with pytest.raises(HarnessError, match="no-such-program is not installed"):
        run_logged(["no-such-program"], "trying", log)


def test_a_container_asks_for_no_capability_that_is_denied() -> None:
    process = {
        "capabilities": {"bounding": ["CAP_CHOWN", "CAP_SYS_RESOURCE"], "ambient": None},
        "oomScoreAdj": -500,
        "args": ["sh"],
    }
    assert runtime.without(process, {"CAP_SYS_RESOURCE"}) == {
        "capabilities": {"bounding": ["CAP_CHOWN"], "ambient": []},
        "oomScoreAdj": 0,
        "args": ["sh"],
    }


def test_only_what_could_be_ours_counts_as_left_behind() -> None:
    before = daemon.Facts(["eth0"], {"iptables": []}, "0", [], ["/"], [])
    after = daemon.Facts(
        ["eth0", "wg0", "br-0123456789ab"],
        {"iptables": ["filter :FORWARD DROP", "nat :DOCKER -", "filter -A INPUT -j ACCEPT"]},
        "1",
        ["/sys/fs/cgroup/memory/docker"],
        ["/", "/mnt/usb"],
        [],
    )
    left = [text for text in after.beyond(before) if not text.startswith("process")]
    assert left == [
        "interface br-0123456789ab",
        "iptables filter :FORWARD DROP",
        "iptables nat :DOCKER -",
        "control group /sys/fs/cgroup/memory/docker",
        "/proc/sys/net/ipv4/ip_forward is 1",
    ]


def test_who_shares_a_lock_keeps_out_only_those_that_want_it_alone(root: Path) -> None:
    with (
        cache.locked("users", shared=True),
        cache.locked("users", shared=True),
        cache.locked_if_free("users") as alone,
    ):
        assert not alone
    with cache.locked_if_free("users") as alone:
        assert alone
    assert root.exists()
