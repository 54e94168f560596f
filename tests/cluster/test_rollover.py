"""A new version takes over while there is work to do."""

from acceptance_kit import wait_for
from cluster.line import PATIENCE_S, Line, words
from cluster.release import FLOW, Release

FILES = 60


def test_a_new_version_takes_over_mid_load_with_nothing_lost_or_doubled(release: Release) -> None:
    line = Line(release, "rollover")
    line.watch()
    line.apply_plugin(words(0.5), "1.0.0")
    line.await_ready("1.0.0")
    line.write_files(FILES)
    line.scan()
    line.await_published(3)
    line.apply_plugin(words(0.51), "2.0.0")
    line.await_ready("2.0.0")
    line.await_published(FILES)
    line.check_nothing_lost_or_doubled()
    by = line.table("words")["_cf_parser_version"].to_pylist()
    assert set(by) == {"1.0.0", "2.0.0"}, "both versions had work to do"

    def old_is_at_zero() -> bool:
        replicas = {
            d["metadata"]["labels"]["casparian.io/version"]: d["spec"]["replicas"]
            for d in release.kube.list("apps/v1", "Deployment", FLOW)
            if d["metadata"]["labels"].get("casparian.io/plugin") == line.name
        }
        return replicas == {"1.0.0": 0, "2.0.0": 1}

    wait_for("the old Deployment at zero", old_is_at_zero, PATIENCE_S)
    history = [v["version"] for v in line.plugin()["status"]["versions"]]
    assert history == ["2.0.0", "1.0.0"]
    line.remove()
