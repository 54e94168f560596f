"""Where the programs that tests on Kubernetes need can and cannot be had."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from cluster.harness import cache, tools
from cluster.harness.errors import HarnessError
from kube_kit import collection

FOLDER = Path(__file__).parents[1] / "kube_api"


@dataclass
class _Item:
    path: Path
    markers: list[Any] = field(default_factory=list)

    def add_marker(self, marker: Any) -> None:
        self.markers.append(marker)


@dataclass
class _Session:
    config: pytest.Config
    items: list[_Item]


def _prepared(config: pytest.Config, **more: Any) -> tuple[_Item, _Item]:
    """An item of the folder and another one, after what the folder's conftest does."""
    mine, other = _Item(FOLDER / "test_a.py"), _Item(FOLDER.parent / "unit" / "test_b.py")
    session = cast(pytest.Session, _Session(config, [mine, other]))
    collection.prepare_for(session, FOLDER, **more)
    return mine, other


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that people would see."""
    lines: list[str] = []
    monkeypatch.setattr(collection, "say", lines.append)
    return lines


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Go, whose own programs and cache are of no use."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    monkeypatch.setattr(tools, "_of_the_machine", lambda _: None)


@pytest.mark.usefixtures("bare")
def test_without_go_and_programs_the_tests_are_skipped_and_say_what_to_install(
    pytestconfig: pytest.Config, said: list[str]
) -> None:
    mine, other = _prepared(pytestconfig)
    (line,) = said
    assert line.startswith("SKIPPED: all 1 tests of tests/kube_api")
    assert "install Go" in line
    (marker,) = mine.markers
    assert marker.name == "skip"
    assert "install Go" in marker.kwargs["reason"]
    assert other.markers == []


@pytest.mark.usefixtures("bare")
def test_programs_that_were_built_before_need_no_go(tmp_path: Path) -> None:
    assert tools.unavailable(["helm", "etcd"]) == ["helm", "etcd"]
    built = cache.ROOT / f"helm-{tools._inputs(tools.RECIPES['helm'])}"
    built.parent.mkdir()
    built.touch()
    assert tools.unavailable(["helm", "etcd"]) == ["etcd"]


def test_where_go_is_there_nothing_is_skipped_and_what_fails_is_left_to_the_tests(
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    said: list[str],
) -> None:
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\nexit 1\n")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def fails() -> None:
        raise HarnessError("it did not compile", "look at the log")

    monkeypatch.setattr(collection, "prepare", fails)
    mine, _ = _prepared(pytestconfig)
    assert mine.markers == []
    assert said == ["tests/kube_api will fail: it did not compile\nlook at the log"]
