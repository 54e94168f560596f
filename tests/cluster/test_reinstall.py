"""Upgrades and removals while there is work to do: nothing hangs, nothing is lost."""

import time

from cluster.line import Line, words
from cluster.release import API_VERSION, FLOW, Release, condition

FILES = 24
UNINSTALL_S = 150.0
"""Its hook gives up after 90 s, and says so."""


def test_an_upgrade_with_jobs_in_flight_loses_and_doubles_nothing(release: Release) -> None:
    line = Line(release, "upgraded")
    line.watch()
    line.apply_plugin(words(0.3))
    line.await_ready()
    line.write_files(FILES)
    line.scan()
    line.await_published(3)
    before = release.operator_uid()
    release.install(sentinel={"maxRetries": 4})
    assert release.operator_uid() != before, "other settings, another pod"
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    line.remove()


def test_a_reinstall_on_the_same_volume_goes_on_where_the_work_was(release: Release) -> None:
    line, gone = Line(release, "resumed"), Line(release, "gone")
    for each in (line, gone):
        each.watch()
    line.apply_plugin(words(0.3))
    line.await_ready()
    line.write_files(FILES)
    line.scan()
    line.await_published(3)

    began = time.monotonic()
    release.helm("uninstall", "casparian")
    assert time.monotonic() - began < UNINSTALL_S
    stopped = line.published()
    assert stopped < FILES, "there was work left"
    # Also while nobody is there to hear of it.
    release.kube.delete(API_VERSION, "SourceRoot", "gone", FLOW, gone=True)
    assert condition(line.plugin(), "Verified")["status"] == "True", "the object is kept"

    release.install()
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    roots = {s["name"]: s["active"] for s in release.casparian("source", "list")}
    assert roots.get(f"{FLOW}/gone") is not True
    line.remove()
