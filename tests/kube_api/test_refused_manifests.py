"""What the API server refuses of our kinds, and what its message says to write instead."""

from typing import Any

import pytest
from kube_kinds import install, manifest
from kube_kit import ApiError, ApiServer

PLUGIN = "CasparianPlugin"
ROOT = "SourceRoot"
APPROVAL = "Approval"


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


def sink(uri: str, topic: str = "sales", **more: Any) -> list[dict[str, Any]]:
    return [{"topic": topic, "uri": uri, **more}]


def column(**fields: Any) -> list[dict[str, Any]]:
    return [{"topic": "sales", "columns": [{"name": "price", **fields}]}]


def variable(**fields: Any) -> dict[str, Any]:
    return {"workers__env": [fields]}


SECRET = {"secretKeyRef": {"name": "sql", "key": "password"}}
CLAIM = {"claimName": "inbox"}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Versions
    (PLUGIN, {"version": None}, "spec.version: Required value"),
    (PLUGIN, {"version": "v1.0.0"}, "write a version such as 1.0.0"),
    (PLUGIN, {"version": "latest"}, "write a version such as 1.0.0"),
    (PLUGIN, {"version": ""}, "write a version such as 1.0.0"),
    (PLUGIN, {"version": 1.0}, 'must be of type string: "number"'),
    (PLUGIN, {"version": "1." * 30 + "0"}, "may not be more than 50"),
    # Bundles
    (PLUGIN, {"source": None}, "spec.source: Required value"),
    (PLUGIN, {"source": {}}, "give either inline or configMap"),
    (
        PLUGIN,
        {"source__configMap": {"name": "b", "key": "k", "digest": "0" * 64}},
        "give either inline or configMap",
    ),
    (PLUGIN, {"source__inline": "import os\nprint()"}, "as base64 in one line"),
    (PLUGIN, {"source__inline": "aGVsbG8"}, "as base64 in one line"),
    (PLUGIN, {"source__inline": "AAAA" * 20_000}, "put the gzipped bundle into a ConfigMap"),
    (
        PLUGIN,
        {"source": {"configMap": {"name": "b", "key": "k", "digest": "sha256:00"}}},
        "64 hex digits, as 'sha256sum' prints it",
    ),
    (
        PLUGIN,
        {"source": {"configMap": {"name": "My_Bundle", "key": "k", "digest": "0" * 64}}},
        "small letters, digits, '-' and '.'",
    ),
    # Sinks
    (PLUGIN, {"sinks": sink("s3://bucket/sales")}, "write a sink as parquet://folder"),
    (PLUGIN, {"sinks": sink("/data/sales.parquet")}, "write a sink as parquet://folder"),
    (PLUGIN, {"sinks": sink("parquet://")}, "write a sink as parquet://folder"),
    (PLUGIN, {"sinks": sink("parquet://../other")}, "leave '..' out"),
    (PLUGIN, {"sinks": sink("csv://sales/../../etc")}, "leave '..' out"),
    (PLUGIN, {"sinks": sink("mssql://sa:pw@server/sales")}, "give them as workers.env"),
    (PLUGIN, {"sinks": sink("sqlite:///var/db/x.sqlite3")}, "pods write below /outputs only"),
    (PLUGIN, {"sinks": sink("duckdb:///x.duckdb")}, "pods write below /outputs only"),
    (PLUGIN, {"sinks": sink("csv://x", topic="sales data")}, "write a topic's name"),
    (PLUGIN, {"sinks": sink("csv://x", topic="sales_quarantine")}, "write a topic's name"),
    (PLUGIN, {"sinks": sink("csv://x", mode="overwrite")}, '"append", "replace", "error"'),
    (PLUGIN, {"sinks": [*sink("csv://x"), *sink("csv://x")]}, "Duplicate value"),
    # Contracts and quarantine
    (PLUGIN, {"contract": [{"topic": "sales", "columns": []}]}, "at least 1 items"),
    (PLUGIN, {"contract": column(type="integer")}, '"int64"'),
    (PLUGIN, {"contract": column(type="decimal")}, "needs precision (1 to 38)"),
    (PLUGIN, {"contract": column(type="decimal", precision=2, scale=4)}, "scale is above"),
    (PLUGIN, {"contract": column(type="float64", scale=2)}, "belong to type: decimal"),
    (PLUGIN, {"contract": column(type="timestamp_tz")}, "needs tz, such as UTC"),
    (PLUGIN, {"contract": column(type="list")}, "needs item, the type of its elements"),
    (PLUGIN, {"contract": column(type="struct")}, "needs fields, a list of name and type"),
    (PLUGIN, {"contract": column(type="date", format="dd.mm.yyyy")}, "such as '%d.%m.%Y'"),
    (
        PLUGIN,
        {"contract": [{"topic": "sales", "columns": [{"name": "_cf_job_id"}]}]},
        "are added to every row",
    ),
    (
        PLUGIN,
        {"contract": [{"topic": "*", "columns": [{"name": "id"}]}]},
        "a contract belongs to one topic",
    ),
    (PLUGIN, {"quarantine": {"maxPercent": 120}}, "less than or equal to 100"),
    # Workers
    (PLUGIN, {"workers__minReplicas": 3}, "raise maxReplicas or lower minReplicas"),
    (PLUGIN, {"workers__maxReplicas": 0}, "greater than or equal to 1"),
    (PLUGIN, {"workers__minReplicas": -1}, "greater than or equal to 0"),
    (PLUGIN, {"workers__replicas": 3}, "write minReplicas and maxReplicas"),
    (PLUGIN, {"workers__scaling": "external"}, "external needs replicas"),
    (PLUGIN, {"workers__scaling": "hpa"}, '"queue", "external"'),
    (PLUGIN, {"workers__resources": {"limits": {"memory": "2 GB"}}}, "limits.memory"),
    (PLUGIN, variable(name="CASPARIAN_MSSQL_USER"), "give either value or valueFrom"),
    (PLUGIN, variable(name="X", value="1", valueFrom=SECRET), "give either value or valueFrom"),
    (
        PLUGIN,
        variable(name="CASPARIAN_MSSQL_PASSWORD", value="hunter2"),
        "put the value into a Secret",
    ),
    (PLUGIN, variable(name="MSSQL-USER", value="sa"), "letters, digits and '_'"),
    *(
        (PLUGIN, variable(name=name, value="/x"), "the worker's own variables")
        for name in (
            "CASPARIAN_CONFIG",
            "CASPARIAN_TRUST__ALLOW_UNSIGNED",
            "casparian_sandbox__require",
            "LD_AUDIT",
            "PYTHONUSERBASE",
            "POD_NAME",
        )
    ),
    (PLUGIN, {"workers__outputs": {}}, "give either persistentVolumeClaim or csi"),
    (
        PLUGIN,
        {"workers__outputs": {"persistentVolumeClaim": CLAIM, "subPath": "/data"}},
        "without '..' and without '/' at the beginning",
    ),
    (PLUGIN, {"sourceRoots": ["Inbox_1"]}, "write a SourceRoot's name"),
    (PLUGIN, {"sourceRoots": ["inbox", "inbox"]}, "Duplicate value"),
    # Source roots
    (ROOT, {"volume": None}, "spec.volume: Required value"),
    (ROOT, {"volume": {"hostPath": {"path": "/data"}}}, "for nfs or hostPath make a Persistent"),
    (ROOT, {"volume": {"nfs": {"server": "x", "path": "/"}}}, "and name the claim on it"),
    (
        ROOT,
        {"volume": {"persistentVolumeClaim": CLAIM, "csi": {"driver": "x"}}},
        "give either persistentVolumeClaim or csi",
    ),
    (ROOT, {"path": "/inbox"}, "such as inbox/sales"),
    (ROOT, {"path": "inbox/../../etc"}, "such as inbox/sales"),
    (ROOT, {"schedule": "every 5 minutes"}, "such as '*/5 * * * *'"),
    (ROOT, {"schedule": "* * * *"}, "such as '*/5 * * * *'"),
    (ROOT, {"schedule": "@often"}, "or @hourly"),
    (ROOT, {"settleSeconds": -1}, "greater than or equal to 0"),
    (ROOT, {"settleSeconds": "2s"}, "must be of type integer"),
    (ROOT, {"include": ["*.csv", ""]}, "write a pattern as in .gitignore"),
    (ROOT, {"ignore": ["a\nb"]}, "write a pattern as in .gitignore"),
    # Approvals, whoever makes them
    (APPROVAL, {"decidedBy": "ann"}, "write decision: approved or rejected"),
    (APPROVAL, {"reason": "fine"}, "write decision: approved or rejected"),
    (APPROVAL, {"expiresAt": "tomorrow"}, "expiresAt"),
    (APPROVAL, {"decision": "yes"}, '"approved", "rejected"'),
]


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    REFUSED,
    ids=[f"{kind}-{'-'.join(c)}-{n}" for n, (kind, c, _) in enumerate(REFUSED)],
)
def test_a_bad_manifest_is_refused_with_what_to_write_instead(
    api: ApiServer, kind: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ApiError) as refused:
        api.client.create(manifest(kind, "default", **changes), dry_run=True)
    assert refused.value.code == 422
    assert told in str(refused.value)


def test_a_name_that_no_label_can_hold_is_refused(api: ApiServer) -> None:
    for kind in (PLUGIN, ROOT):
        with pytest.raises(ApiError, match="choose a shorter name"):
            api.client.create(manifest(kind, "default", name="x" * 64), dry_run=True)


def test_a_misspelt_field_is_refused_by_name_when_kubectl_applies_it(
    api: ApiServer, space: str
) -> None:
    import json

    body = json.dumps(manifest(PLUGIN, space, minReplicas=2))
    done = api.client.kubectl("apply", "-f", "-", stdin=body, check=False)
    assert done.returncode == 1
    assert 'unknown field "spec.minReplicas"' in done.stderr


def test_a_source_root_stays_with_its_files(api: ApiServer, space: str) -> None:
    api.client.create(manifest(ROOT, space))
    for change in (
        {"volume": {"persistentVolumeClaim": {"claimName": "other"}}},
        {"path": "inbox"},
    ):
        with pytest.raises(ApiError, match="make another SourceRoot"):
            api.client.patch("casparian.io/v1alpha1", ROOT, "sales", {"spec": change}, space)
    api.client.patch(
        "casparian.io/v1alpha1", ROOT, "sales", {"spec": {"schedule": "@hourly"}}, space
    )
