"""What is collected for a decision: judgements that are remembered, files that two would write."""

from itertools import count
from typing import Any

import pytest
from kube_states import SITE, plugin_body
from signing_kit import lax_rules, signed

from casparian_flow.domain.clock import Now
from casparian_flow.kube import gather
from casparian_flow.kube.bundles import inlined
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.gather import Gatherer, Surroundings
from casparian_flow.kube.judgement import judge
from casparian_flow.kube.kinds import ref_of
from casparian_flow.kube.ledger_view import Look
from casparian_flow.kube.names import ARTIFACT_HASH
from casparian_flow.kube.store import Store
from casparian_flow.trust.bundle import pack

SOURCE = """
    from casparian_flow.sdk import PluginMetadata

    MANIFEST = PluginMetadata(pattern="*.csv", topic="rows")


    class Handler:
        def execute(self, ctx):
            pass
"""
RULES = lax_rules()
CLAIM = {"persistentVolumeClaim": {"claimName": "out"}}
versions = count(1)


class Looks:
    last = Look()

    def since(self, moment: float) -> Look:
        return self.last


class NoPods:
    def list(self, *_: Any, **__: Any) -> list[Any]:
        return []


class Still:
    def now(self) -> Now:
        return Now(1000.0, 1_700_000_000_000_000)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def gatherer(store: Store) -> Gatherer:
    nothing: Any = None
    client: Any = NoPods()
    looks: Any = Looks()
    ring = KeyRing([b"m" * 32], b"s" * 32)
    return Gatherer(
        Surroundings(
            store=store, client=client, looks=looks, control=lambda: nothing,
            trust=lambda: RULES, site=lambda: SITE, keys=lambda: ring, replicas=lambda _: {},
            clock=Still(),
        )
    )  # fmt: skip


def writer(store: Store, name: str, file: str, outputs: dict[str, Any], **spec: Any) -> Any:
    """A plugin that writes a SQLite file; each is younger than the one before."""
    body = plugin_body(
        name,
        spec={
            "source": {"inline": inlined(pack(signed(SOURCE, name)))},
            "sinks": [{"topic": "*", "uri": f"sqlite://{file}"}],
            "workers": {"outputs": outputs},
            **spec,
        },
    )
    number = next(versions)
    body["metadata"]["creationTimestamp"] = f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z"
    body["metadata"]["resourceVersion"] = str(number)
    store.put(body)
    return body


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((CLAIM, "a/rows.sqlite3"), ({**CLAIM, "subPath": "a"}, "rows.sqlite3")),
        (({**CLAIM, "subPath": "a/b"}, "x.sqlite3"), ({**CLAIM, "subPath": "a/"}, "b/x.sqlite3")),
    ],
)  # fmt: skip
def test_one_database_file_under_two_folders_of_a_volume_is_one_file(
    store: Store, gatherer: Gatherer, first: Any, second: Any
) -> None:
    writer(store, "older", first[1], first[0])
    younger = writer(store, "younger", second[1], second[0])
    found = gatherer.plugin(younger, since=0.0).shared_files
    assert found == {second[1]: "older"}


def test_two_volumes_that_a_driver_makes_are_two(store: Store, gatherer: Gatherer) -> None:
    def volume(share: str) -> dict[str, Any]:
        return {"csi": {"driver": "blob.csi.azure.com", "volumeAttributes": {"share": share}}}

    writer(store, "older", "rows.sqlite3", volume("a"))
    other = writer(store, "other", "rows.sqlite3", volume("b"))
    same = writer(store, "same", "rows.sqlite3", volume("a"))
    assert gatherer.plugin(other, since=0.0).shared_files == {}
    assert gatherer.plugin(same, since=0.0).shared_files == {"rows.sqlite3": "older"}


def test_of_an_object_one_judgement_is_kept_and_none_of_one_that_is_gone(
    store: Store, gatherer: Gatherer, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    def counted(plugin: Any, *rest: Any) -> Any:
        judged.append(plugin.metadata.generation)
        return judge(plugin, *rest)

    monkeypatch.setattr(gather, "judge", counted)
    body = writer(store, "sales", "rows.sqlite3", CLAIM)
    for generation in (1, 1, 2, 1):
        body["metadata"]["generation"] = generation
        gatherer.plugin(body, since=0.0)
    assert judged == [1, 2, 1]
    gatherer.forget(ref_of(body))
    gatherer.plugin(body, since=0.0)
    assert judged == [1, 2, 1, 1]


def test_a_deployment_that_gets_no_pods_says_why(store: Store, gatherer: Gatherer) -> None:
    body = writer(store, "sales", "rows.sqlite3", CLAIM)
    said = 'pods "worker-sales" is forbidden: exceeded quota: small'
    failure = {"type": "ReplicaFailure", "status": "True", "message": said}
    store.put(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "worker-sales",
                "namespace": "flow",
                "uid": "d",
                "resourceVersion": "1",
                "annotations": {ARTIFACT_HASH: "1" * 64},
                "ownerReferences": [{"uid": body["metadata"]["uid"]}],
            },
            "spec": {"replicas": 1, "selector": {"matchLabels": {"a": "b"}}},
            "status": {"conditions": [failure]},
        }
    )
    failing = gatherer.plugin(body, since=0.0).failing
    assert failing == {"1" * 64: f"no pod can be made: {said}"}
