"""Trials in a worker's real plugin machinery."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plugin_runs import handler, make_plugin

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import SinkSpec
from casparian_flow.domain.records import Sample
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.protocol import messages as m
from casparian_flow.trust.artifact import release_json
from casparian_flow.trust.rules import nobody
from casparian_worker import environments
from casparian_worker.mailbox import Mailbox
from casparian_worker.runtime import PluginRuntime
from casparian_worker.trial import TrialRoom
from casparian_worker.worker_events import TrialNews

LOCK = (Path(__file__).parent.parent / "data" / "excel_reader.uv.lock").read_text()
CONTRACT = '{"columns": [{"name": "n", "type": "int64", "nullable": false}]}'
READS = "for line in open(file_path):\n    self.publish('out', [{'n': line.strip()}])"


class Room:
    """A trial room, and the answers it gives."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.runtime = PluginRuntime(
            scratch_root=str(folder / "scratch"),
            cache_root=str(folder / "cache"),
            **options,  # type: ignore[arg-type]
        )
        self.mailbox = Mailbox()
        self.room = TrialRoom(self.runtime, 4, self.mailbox, SystemClock())
        self.progress: list[str] = []

    def run(self, source: str, *samples: Sample, **options: object) -> m.TrialResult:
        """Try a plugin and wait for the end."""
        plugin = make_plugin(source, **options)  # type: ignore[arg-type]
        sinks = (SinkSpec("out", "parquet://out", schema_json=CONTRACT),)
        manifest = release_json("under_test", "1.0.0", samples)
        self.room.start(
            m.Trial("t-1", replace(plugin, sinks=sinks, manifest_json=manifest), samples)
        )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for event in self.mailbox.drain():
                assert isinstance(event, TrialNews)
                if event.result.outcome != TrialOutcome.RUNNING:
                    return event.result
                self.progress.append(event.result.message)
            time.sleep(0.02)
        raise AssertionError("the trial did not end")

    def close(self) -> None:
        self.room.close()
        self.runtime.close()
        self.mailbox.close()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.close()


def test_without_samples_a_plugin_is_loaded_and_configured(room: Room) -> None:
    body = "raise AssertionError('no file was to be read')"
    assert room.run(handler(body)).outcome == TrialOutcome.PASSED
    configured = handler(body) + "    def configure(self, ctx, config):\n        config['k']\n"
    refused = room.run(configured)
    assert (refused.outcome, refused.reason) == (TrialOutcome.FAILED, Reason.PLUGIN_INVALID)
    assert "KeyError: 'k'" in refused.message
    assert room.run(configured, parameters='{"k": 1}').outcome == TrialOutcome.PASSED


def test_samples_are_read_and_their_rows_held_against_the_contract(room: Room) -> None:
    passed = room.run(handler(READS), Sample("a.txt", b"1\n2\n"), Sample("b.txt", b"3\n"))
    assert (passed.outcome, passed.rows) == (TrialOutcome.PASSED, {"out": 3})
    broken = room.run(handler(READS), Sample("a.txt", b"1\n"), Sample("b.txt", b"many\n"))
    assert broken.outcome == TrialOutcome.FAILED
    assert "many" in broken.message or "'n'" in broken.message


def test_a_plugin_that_dies_on_a_sample_fails_with_its_name_and_log(room: Room) -> None:
    died = room.run(handler("print('so far'); import os; os._exit(3)"), Sample("a.txt", b""))
    assert (died.outcome, died.reason) == (TrialOutcome.FAILED, Reason.EXITED)
    assert died.message.startswith("sample a.txt: ")
    assert "so far" in died.log


def test_samples_that_were_not_signed_are_not_run(room: Room) -> None:
    plugin = replace(
        make_plugin(handler("pass")), manifest_json=release_json("under_test", "1.0.0")
    )
    room.room.start(m.Trial("t-1", plugin, (Sample("a.txt", b""),)))
    until = time.monotonic() + 30
    events = room.mailbox.drain()
    while not events and time.monotonic() < until:
        time.sleep(0.02)
        events = room.mailbox.drain()
    (news,) = events
    assert isinstance(news, TrialNews)
    assert news.result.reason == Reason.UNTRUSTED


def test_a_worker_that_does_not_trust_the_plugin_leaves_it_to_others(tmp_path: Path) -> None:
    room = Room(tmp_path, trust=nobody)
    told = room.run(handler("pass"))
    room.close()
    assert (told.outcome, told.reason) == (TrialOutcome.AGAIN, Reason.UNTRUSTED)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("error sending request for url: dns error", TrialOutcome.AGAIN),
        ("No solution found when resolving dependencies", TrialOutcome.FAILED),
    ],
)
def test_an_environment_that_cannot_be_made_is_told_by_name(
    said: str, outcome: TrialOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setattr(environments, "uv_program", lambda: str(uv))
    room = Room(tmp_path)
    told = room.run(handler("pass"), lockfile=LOCK)
    room.close()
    assert (told.outcome, told.reason) == (outcome, Reason.ENVIRONMENT)
    assert said in told.message
    assert any(line.startswith("building an environment") for line in room.progress)
