"""Plugins that take the files of some source roots of their namespace only."""

from pathlib import Path

from signing_kit import lax_rules, signed_bundle

from casparian_flow.sentinel.local import LocalControl
from casparian_flow.services.scout import scan

PLUGIN = """
from casparian_flow.sdk import PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", topic="lines")


class Handler:
    def execute(self, file_path):
        pass
"""


def test_a_plugin_gets_the_files_of_its_chosen_roots_by_scan_and_by_backfill(
    tmp_path: Path,
) -> None:
    with LocalControl.open(tmp_path / "l.duckdb", trust=lax_rules, trials=False) as control:
        control.choose_roots("a/few", ["one"])
        for name in ("few", "all"):
            control.deploy(signed_bundle(PLUGIN, name), "a")
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "x.txt").write_text(name)
            row = control.add_source(str(folder), settle_seconds=0.0, name=name, namespace="a")
            scan(row["id"], control)
        jobs = sorted((j["plugin_name"], j["source_root"]) for j in control.list_jobs())
        one, two = (str(tmp_path / name) for name in ("one", "two"))
        assert jobs == [("a/all", one), ("a/all", two), ("a/few", one)]
        assert control.backfill("a/few", execute=False)["jobs"] == 0

        counted = [(c["versions"], c["queued"]) for c in control.source_counts()]
        assert counted == [(1, 2), (1, 1)]
        assert all(c["last_scan_seconds"] is not None for c in control.source_counts())

        control.choose_roots("a/few", [])
        assert control.backfill("a/few", execute=False)["jobs"] == 1
        control.choose_roots("a/few", ["three"])
        assert control.backfill("a/few", execute=False)["jobs"] == 0
        assert control.check() == []
