"""One signed plugin in two namespaces, with a real worker for each, over CURVE and with tokens."""

from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
from curve_kit import Cluster, hold, until
from signing_kit import signed_bundle
from worker_process import worker_process

from casparian_flow.sentinel.admission import Principal
from casparian_flow.sentinel.api import ControlApi
from casparian_flow.services.scout import scan

PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", topic="lines")


class Handler(BasePlugin):
    def configure(self, context, parameters):
        self.name = context.plugin_name

    def execute(self, file_path):
        with open(file_path) as file:
            self.publish("lines", [{"text": file.read(), "plugin": self.name}])
"""


def trial_of(control: ControlApi, plugin: str) -> str:
    """How its trial stands, as who starts workers is told."""
    rows = {row["plugin_name"]: row for row in control.plugin_counts()}
    assert (rows[plugin]["status"], rows[plugin]["workers"]) == ("STAGING", 0)
    return str(rows[plugin]["trial"])


def test_equal_files_and_plugins_of_two_namespaces_give_outputs_of_their_own(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        control = cluster.sentinel.control
        for namespace in ("a", "b"):
            row = control.deploy(signed_bundle(PLUGIN, "lines", "1.0.0"), namespace)
            inbox = tmp_path / namespace
            inbox.mkdir()
            (inbox / "same.txt").write_text("the same")
            root = control.add_source(
                str(inbox), settle_seconds=0.0, name="inbox", namespace=namespace
            )
            scan(root["id"], control)
            until(lambda name=row["plugin"]: trial_of(control, name) == "waits for a worker")
            principal = Principal(
                "worker", namespace, "lines", f"{namespace}/lines", row["artifact_hash"]
            )
            keys = tmp_path / f"keys-{namespace}"
            hold(keys, cluster.admit(principal, token=f"token of {namespace}"))
            (keys / "token").write_text(f"token of {namespace}")
            stack.enter_context(
                worker_process(
                    cluster.sentinel.bind_address,
                    tmp_path,
                    name=f"worker-{namespace}",
                    CASPARIAN_WIRE__CURVE_DIR=str(keys),
                    CASPARIAN_WIRE__TOKEN_FILE=str(keys / "token"),
                )
            )
        until(lambda: cluster.status("COMPLETED") == 2, 90)
        assert {job["plugin_name"] for job in control.list_jobs()} == {"a/lines", "b/lines"}
        outputs = control.on_ledger(lambda ledger: ledger.query("SELECT * FROM cf_output"))
        for column in ("output_key", "slice_key", "final"):
            assert len({output[column] for output in outputs}) == 2
        found = [pq.read_table(path).to_pylist() for path in tmp_path.glob("output/lines/*")]
        assert len(found) == 2
        assert all(rows[0]["text"] == "the same" for rows in found)
        # An author knows nothing of namespaces.
        assert {rows[0]["plugin"] for rows in found} == {"lines"}
        assert control.check() == []
