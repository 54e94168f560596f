"""The Helm chart in tests: programs that read it, and what it renders."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from cluster.harness.cache import ROOT as CACHE
from cluster.harness.cache import cached, digest
from cluster.harness.errors import HarnessError
from cluster.harness.progress import run_logged
from cluster.harness.tools import tool

Manifest = dict[str, Any]

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "casparian"
VALUES = Path(__file__).parent / "chart" / "values"
NAMESPACE = "flow"
PROMETHEUS_PACKAGE = "prometheus"
APIS = (
    "monitoring.coreos.com/v1/ServiceMonitor",
    "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy",
)


def helm() -> Path:
    """The program, built once from its Go module where the machine has none."""
    return tool("helm")


def promtool() -> Path:
    """The machine's, or the one in Debian's package, which is unpacked and not installed.

    Raises:
        HarnessError: there is neither.
    """
    found = shutil.which("promtool")
    return Path(found) if found else cached("promtool", digest(PROMETHEUS_PACKAGE), _unpack)


def _unpack(target: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise HarnessError("there is no promtool", "install Prometheus, which brings it along")
    log, folder = CACHE / "logs" / "promtool.log", target.with_suffix(".deb")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        download = ["apt-get", "download", "-o=APT::Sandbox::User=root", PROMETHEUS_PACKAGE]
        run_logged(download, f"fetching Debian's package {PROMETHEUS_PACKAGE}", log, cwd=folder)
        (package,) = folder.glob("*.deb")
        run_logged(["dpkg-deb", "-x", package, folder], f"unpacking {package.name}", log)
        shutil.copy2(folder / "usr" / "bin" / "promtool", target)
    finally:
        shutil.rmtree(folder)


def run_helm(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it; what it said is in the failure."""
    done = subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"helm {' '.join(map(str, arguments))}\n{done.stderr}")
    return done


@cache
def rendered(
    *names: str, sets: tuple[str, ...] = (), apis: tuple[str, ...] = APIS
) -> tuple[Manifest, ...]:
    """The objects for values files of `tests/chart/values`, and `--set` values; do not change them.

    Each has the path of its template in the annotation-like key `_template`.
    """
    return tuple(_objects(rendered_text(*names, sets=sets, apis=apis)))


def rendered_text(*names: str, sets: tuple[str, ...] = (), apis: tuple[str, ...] = APIS) -> str:
    """As `rendered`, as helm prints it."""
    arguments: list[str | Path] = ["template", "casparian", CHART, "--namespace", NAMESPACE]
    for name in names:
        arguments += ["--values", VALUES / f"{name}.yaml"]
    for value in sets:
        arguments += ["--set-json", value]
    for api in apis:
        arguments += ["--api-versions", api]
    return run_helm(*arguments).stdout


def _objects(text: str) -> Iterator[Manifest]:
    template = ""
    for part in ("\n" + text).split("\n---"):
        for line in part.splitlines():
            if line.startswith("# Source: "):
                template = line.removeprefix("# Source: casparian/")
        found = yaml.load(part, Loader=yaml.CSafeLoader)
        if found:
            yield {**found, "_template": template}


def clean(objects: Sequence[Manifest]) -> list[Manifest]:
    """Without what is not part of the objects."""
    return [{k: v for k, v in item.items() if k != "_template"} for item in objects]


def find(objects: Sequence[Manifest], kind: str, name: str = "") -> Manifest:
    """The one object of that kind, and of that name where one is given."""
    found = [o for o in objects if o["kind"] == kind and name in {"", o["metadata"]["name"]}]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def pod_templates(objects: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Each pod, or template of pods, with the kind that it is from."""
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "Pod":
            yield "Pod", item
        elif item["kind"] == "CronJob":
            yield "CronJob", spec["jobTemplate"]["spec"]["template"]
        elif item["kind"] in {"Job", "Deployment"}:
            yield item["kind"], spec["template"]
        elif item["kind"] == "StatefulSet":
            # As its controller makes them: with a volume for each claim.
            claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
            pod = spec["template"]["spec"]
            made = [{"name": c, "persistentVolumeClaim": {"claimName": f"{c}-0"}} for c in claims]
            yield "StatefulSet", {"spec": {**pod, "volumes": [*pod["volumes"], *made]}}


@cache
def schema() -> dict[str, Any]:
    """values.schema.json."""
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    return found


@cache
def defaults() -> dict[str, Any]:
    """values.yaml."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    return found


def settings_text(objects: Sequence[Manifest]) -> str:
    """config.toml of the operator."""
    text: str = find(objects, "ConfigMap", "casparian-settings")["data"]["config.toml"]
    return text
