"""One line of work on a cluster: a folder of files, a plugin, what it writes."""

import itertools
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from acceptance_kit import wait_for
from cluster.release import API_VERSION, FLOW, Release, condition

PATIENCE_S = 180.0
_numbers = itertools.count(1)
WORDS = """\
import time
import pyarrow as pa
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", topic="words")

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input() as file:
            words = file.read().decode().split()
        time.sleep({seconds})
        self.publish("words", pa.table({{"word": words}}))
"""


@dataclass
class Line:
    """Object and files of one name: a SourceRoot, a plugin on it, volumes for input and output."""

    release: Release
    name: str
    inbox: Path = field(init=False)
    outputs: Path = field(init=False)
    written: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        cluster = self.release.cluster
        self.inbox = cluster.shared_claim(FLOW, f"{self.name}-in")
        self.outputs = cluster.shared_claim(FLOW, f"{self.name}-out")

    # -- objects ------------------------------------------------------------------------------

    def watch(self, **spec: Any) -> None:
        """Make the SourceRoot; it is scanned when asked, unless a schedule is given."""
        volume = {"persistentVolumeClaim": {"claimName": f"{self.name}-in"}}
        defaults = {"volume": volume, "schedule": "0 0 1 1 *", "settleSeconds": 0}
        self.release.kube.apply(
            {
                "apiVersion": API_VERSION,
                "kind": "SourceRoot",
                "metadata": {"name": self.name, "namespace": FLOW},
                "spec": defaults | spec,
            }
        )

    def scan(self) -> None:
        """Ask for a scan at once, as people do, and wait until it has ended."""
        asked = f"{next(_numbers)}"
        self.release.kube.kubectl(
            *("annotate", "sourceroot", self.name, "-n", FLOW, "--overwrite"),
            f"casparian.io/scan={asked}",
        )

        def done() -> bool:
            jobs = self.release.kube.list("batch/v1", "Job", FLOW)
            mine = [
                j
                for j in jobs
                if j["metadata"].get("annotations", {}).get("casparian.io/scan-request") == asked
                and j["metadata"]["name"].startswith(f"scan-{self.name}-")
            ]
            return any(j.get("status", {}).get("succeeded") for j in mine)

        wait_for("the scan", done, PATIENCE_S)

    def apply_plugin(self, source: str, version: str = "1.0.0", **workers: Any) -> None:
        """Publish a version, as people do, and apply what that writes."""
        person = self.release.person
        file = person.write(f"plugins/{self.name}.py", textwrap.dedent(source))
        manifest = person.folder / f"{self.name}-{version}.yaml"
        person.run(
            *("publish", str(file), "--name", self.name, "--version", version),
            *("--emit-manifest", str(manifest)),
        )
        claim = {"persistentVolumeClaim": {"claimName": f"{self.name}-out"}}
        settings = {"minReplicas": 1, "maxReplicas": 1, "outputs": claim}
        for body in yaml.safe_load_all(manifest.read_text()):
            body["metadata"]["namespace"] = FLOW
            if body["kind"] == "CasparianPlugin":
                body["spec"] |= {"sourceRoots": [self.name], "workers": settings | workers}
            self.release.kube.apply(body)

    def plugin(self) -> dict[str, Any]:
        found = self.release.kube.find(API_VERSION, "CasparianPlugin", self.name, FLOW)
        assert found is not None
        return found

    def await_ready(self, version: str = "1.0.0") -> dict[str, Any]:
        """Until the plugin is Ready, with this version the active one; returns the object."""

        def ready() -> bool:
            body = self.plugin()
            active = body.get("status", {}).get("activeVersion")
            return active == version and condition(body, "Ready").get("status") == "True"

        try:
            wait_for(f"{self.name} {version} to be Ready", ready, PATIENCE_S)
        except AssertionError:
            raise AssertionError(self.plugin().get("status")) from None
        return self.plugin()

    def pods(self) -> list[dict[str, Any]]:
        """Its workers' pods that have not ended."""
        selector = f"casparian.io/plugin={self.name},app.kubernetes.io/component=worker"
        return self.release.kube.list("v1", "Pod", FLOW, selector)

    def remove(self) -> None:
        """Delete both objects; nothing may hold that up."""
        for plural in ("casparianplugin", "sourceroot"):
            self.release.kube.kubectl(
                *("delete", plural, self.name, "-n", FLOW, "--ignore-not-found", "--timeout=60s")
            )

    # -- files and rows -----------------------------------------------------------------------

    def write_files(self, count: int) -> None:
        """Files of three words each, no word twice."""
        for _ in range(count):
            number = len(self.written) // 3
            words = [f"{self.name}-{number}-{n}" for n in range(3)]
            (self.inbox / f"{number:04}.txt").write_text(" ".join(words))
            self.written += words

    def table(self, topic: str) -> pa.Table:
        """All published rows of a topic."""
        paths = sorted((self.outputs / topic).glob("*.parquet"))
        tables = [pq.read_table(path) for path in paths]
        return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})

    def published(self) -> int:
        """How many files of `write_files` are in the output."""
        return len(list((self.outputs / "words").glob("*.parquet")))

    def await_published(self, files: int) -> None:
        try:
            wait_for(f"{files} files", lambda: self.published() >= files, PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; {self.published()}: {self.plugin()['status']}"
            ) from None

    def check_nothing_lost_or_doubled(self) -> None:
        """Every word that was written is there once, and nothing else is."""
        rows = self.table("words")
        found = Counter(rows["word"].to_pylist() if rows.num_rows else [])
        assert found == Counter(self.written), found - Counter(self.written)


def words(seconds: float) -> str:
    """A plugin that takes so long for each file."""
    return WORDS.format(seconds=seconds)
