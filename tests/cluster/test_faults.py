"""Pods are killed while there is work to do: nothing is lost, nothing is doubled."""

from cluster.harness.faults import Faults
from cluster.line import Line, words
from cluster.release import FLOW, NAMESPACE, OPERATOR_POD, Release
from kube_kit.pods import await_ready

FILES = 24


def test_the_operator_is_killed_three_times_during_load(release: Release, faults: Faults) -> None:
    line = Line(release, "kills")
    line.watch()
    line.apply_plugin(words(0.3))
    line.await_ready()
    line.write_files(FILES)
    line.scan()
    (worker,) = line.pods()
    for number in range(1, 4):
        line.await_published(number * 4)
        before = release.operator_uid()
        faults.kill_pod(NAMESPACE, OPERATOR_POD)
        release.await_operator(other_than=before)
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    assert release.casparian("status")["sentinel"]["epoch"] >= 4
    uids = [pod["metadata"]["uid"] for pod in line.pods()]
    assert uids == [worker["metadata"]["uid"]], "its workers went on"
    line.remove()


def test_workers_are_killed_and_evicted_during_load(release: Release, faults: Faults) -> None:
    line = Line(release, "evicted")
    line.watch()
    line.apply_plugin(words(0.3))
    line.await_ready()
    line.write_files(FILES)
    line.scan()
    for done, fault in ((3, faults.kill_pod), (8, faults.evict)):
        line.await_published(done)
        (pod,) = [p for p in line.pods() if "deletionTimestamp" not in p["metadata"]]
        fault(FLOW, pod["metadata"]["name"])
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    line.remove()


def test_each_container_of_a_worker_is_killed_during_load(release: Release, faults: Faults) -> None:
    line = Line(release, "contained")
    line.watch()
    line.apply_plugin(words(0.3))
    line.await_ready()
    line.write_files(FILES)
    line.scan()
    for done, container in ((3, "plugin"), (8, "worker")):
        line.await_published(done)
        (pod,) = line.pods()
        await_ready(release.kube, FLOW, pod["metadata"]["name"])
        faults.kill_container(FLOW, pod["metadata"]["name"], container)
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    line.remove()
