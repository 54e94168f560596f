"""Our kinds as people use them: examples applied, `kubectl get`, `scale` and `explain`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from kube_kinds import REPOSITORY, install, manifest
from kube_kit import ApiError, ApiServer
from kube_states import SITE
from publish_kit import Desk
from signing_kit import signed

from casparian_flow.kube.bundles import bundle_digest, from_inlined
from casparian_flow.kube.emit import objects_for, to_yaml
from casparian_flow.kube.manifests_provision import FINAL_CODES, provision_job
from casparian_flow.kube.models import plugin_of
from casparian_flow.kube.names import API_VERSION, BUNDLE_KEY
from casparian_flow.trust.bundle import unpack

EXAMPLES = REPOSITORY / "examples" / "k8s"
PLAIN = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
LAYERED = sorted(path.parent.name for path in EXAMPLES.glob("*/kustomization.yaml"))


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


@pytest.mark.parametrize("name", PLAIN)
def test_an_example_is_taken_as_it_is(api: ApiServer, space: str, name: str) -> None:
    done = api.client.kubectl("apply", "-n", space, "-f", str(EXAMPLES / name))
    wanted = list(yaml.safe_load_all((EXAMPLES / name).read_text("utf-8")))
    assert done.stdout.count(" created") == len(wanted)
    assert "arning" not in done.stderr


@pytest.mark.parametrize("name", LAYERED)
def test_settings_are_laid_over_what_publish_has_written(
    api: ApiServer, space: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder)
    plugin = str(REPOSITORY / "examples" / "plugins" / "stock_prices.py")
    Desk(tmp_path).run(
        "publish", plugin, "--name", "stock-prices", "--version", "1.0.0",
        "--emit-manifest", str(folder / "plugin.yaml"), code=0,
    )  # fmt: skip
    api.client.kubectl("apply", "-n", space, "-k", str(folder))
    found = plugin_of(api.client.get(API_VERSION, "CasparianPlugin", "stock-prices", space))
    (settings,) = yaml.safe_load_all((folder / "settings.yaml").read_text("utf-8"))
    assert found.spec.sinks[0].uri == settings["spec"]["sinks"][0]["uri"]
    assert found.spec.workers.scaling == settings["spec"]["workers"]["scaling"]
    assert unpack(from_inlined(found.spec.source.inline or "")).name == "stock-prices"


def test_a_plugin_with_a_lock_file_of_400_kb_is_applied_by_kubectl_and_comes_back_whole(
    api: ApiServer, space: str
) -> None:
    lock = (REPOSITORY / "uv.lock").read_text("utf-8")[:400_000]
    bundle = signed("class Handler: pass\n", "sales", lockfile=lock)
    emitted = objects_for(bundle)
    assert not emitted.server_side
    api.client.kubectl("apply", "-n", space, "-f", "-", stdin=to_yaml(emitted.objects))
    source = plugin_of(api.client.get(API_VERSION, "CasparianPlugin", "sales", space)).spec.source
    assert source.config_map is not None
    holder = api.client.get("v1", "ConfigMap", source.config_map.name, space)
    packed = from_inlined(holder["binaryData"][source.config_map.key])
    assert bundle_digest(packed) == source.config_map.digest
    assert unpack(packed) == bundle
    change = {"binaryData": {BUNDLE_KEY: "AAAA"}}
    with pytest.raises(ApiError, match="field is immutable"):
        api.client.patch("v1", "ConfigMap", source.config_map.name, change, space)


def test_get_shows_what_people_look_for(api: ApiServer, space: str) -> None:
    now = "2026-01-01T00:00:00Z"
    ready = {"status": "True", "reason": "Ready", "message": "", "lastTransitionTime": now}
    status = {
        "conditions": [{"type": "Ready", **ready}],
        "activeVersion": "1.0.0",
        "replicas": 2,
        "queued": 7,
        "failed": 3,
    }
    api.client.create(manifest("CasparianPlugin", space))
    api.client.patch(
        API_VERSION, "CasparianPlugin", "sales", {"status": status}, space, subresource="status"
    )
    api.client.create(manifest("SourceRoot", space, name="inbox"))
    shown = api.client.kubectl("get", "casparian", "-n", space).stdout.splitlines()
    assert shown[0].split() == ["NAME", "READY", "VERSION", "WORKERS", "QUEUED", "FAILED", "AGE"]
    assert shown[1].split()[1:6] == ["True", "1.0.0", "2", "7", "3"]
    assert any(line.startswith("sourceroot.casparian.io/inbox") for line in shown)
    for short in ("cplugin", "sroot", "appr"):
        api.client.kubectl("get", short, "-n", space)
    waited = api.client.kubectl(
        "wait", "--for=condition=Ready", "casparianplugin/sales", "-n", space, "--timeout=5s"
    )
    assert "condition met" in waited.stdout


def test_scale_sets_replicas_under_external_scaling_only(api: ApiServer, space: str) -> None:
    external = {"workers__scaling": "external", "workers__replicas": 1}
    api.client.create(manifest("CasparianPlugin", space, **external))
    api.client.create(manifest("CasparianPlugin", space, name="queued"))
    api.client.patch(
        API_VERSION, "CasparianPlugin", "sales",
        {"status": {"replicas": 1, "selector": "casparian.io/plugin=sales"}},
        space, subresource="status",
    )  # fmt: skip
    api.client.kubectl("scale", "casparianplugin/sales", "--replicas=5", "-n", space)
    scale = api.client.get(API_VERSION, "CasparianPlugin", "sales", space, "scale")
    assert scale["spec"]["replicas"] == 5
    assert scale["status"] == {"replicas": 1, "selector": "casparian.io/plugin=sales"}
    refused = api.client.kubectl(
        "scale", "casparianplugin/queued", "--replicas=5", "-n", space, check=False
    )
    assert "under scaling: queue write minReplicas and maxReplicas" in refused.stderr


def test_explain_is_the_manual(api: ApiServer) -> None:
    for path, told in {
        "casparianplugin": "One object for each plugin",
        "casparianplugin.spec.source.configMap.digest": "SHA-256 of the bundle",
        "casparianplugin.spec.workers.outputs": "hard links",
        "casparianplugin.status.conditions.observedGeneration": "out of date",
        "sourceroot.spec.volume": "need a PersistentVolume",
        "approval.spec.decision": "needs the verb `approve`",
    }.items():
        explained = " ".join(api.client.kubectl("explain", path).stdout.split())
        assert told in explained, path


def test_an_update_of_the_status_leaves_the_generation_alone(api: ApiServer, space: str) -> None:
    made = api.client.create(manifest("SourceRoot", space))
    after = api.client.patch(
        API_VERSION, "SourceRoot", "sales", {"status": {"files": 3}}, space, subresource="status"
    )
    assert after["metadata"]["generation"] == made["metadata"]["generation"]
    assert json.dumps(after["status"]) == '{"files": 3}'


def test_objects_of_equal_names_in_two_namespaces_are_two(api: ApiServer, space: str) -> None:
    other = api.namespace(f"{space}-other")
    for where in (space, other):
        api.client.create(manifest("SourceRoot", where))
    api.client.delete(API_VERSION, "SourceRoot", "sales", other, gone=True)
    assert api.client.find(API_VERSION, "SourceRoot", "sales", space)


def test_the_job_that_makes_an_environment_is_taken_with_its_final_exit_codes(
    api: ApiServer, space: str
) -> None:
    job = provision_job(replace(SITE, storage_class="nfs"), space, "e" * 64, "sales")
    (final, _) = api.client.create(job, dry_run=True)["spec"]["podFailurePolicy"]["rules"]
    assert final["onExitCodes"]["values"] == list(FINAL_CODES)
