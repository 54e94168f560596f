"""Deciding approvals on a cluster whose API server cannot write by itself who decides."""

import base64
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from kube_kinds import install, manifest
from kube_kit import ApiServer, api_server
from kube_people import operator_of, people, refusal

from casparian_flow.domain.errors import UsageError
from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.stamp import StampServer, answer


@pytest.fixture(scope="module")
def older() -> Iterator[ApiServer]:
    """An API server without MutatingAdmissionPolicy."""
    with api_server(mutating_policies=False) as server:
        install(server, stamp=False)
        yield server


def review(
    before: dict[str, Any] | None, after: dict[str, Any], user: str = "ann"
) -> dict[str, Any]:
    """The webhook's response to an update."""
    request = {
        "uid": "u1",
        "userInfo": {"username": user},
        "oldObject": None if before is None else {"spec": before},
        "object": {"spec": after},
    }
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    found: dict[str, Any] = json.loads(answer(json.dumps(body).encode()))
    assert found["apiVersion"] == "admission.k8s.io/v1"
    assert found["response"]["uid"] == "u1"
    assert found["response"]["allowed"]
    return dict(found["response"])


def test_a_first_decision_is_stamped_and_nothing_else() -> None:
    patch = review({}, {"decision": "approved", "decidedBy": "bob"})["patch"]
    assert json.loads(base64.b64decode(patch)) == [
        {"op": "add", "path": "/spec/decidedBy", "value": "ann"}
    ]
    decided = {"decision": "approved", "decidedBy": "bob"}
    assert "patch" not in review(decided, decided)
    assert "patch" not in review({}, {})
    assert "patch" not in review(None, {"summary": "x"})


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b'{"request": 3}', b"[" * 100_000, b"\xff"]
)
def test_what_is_no_review_is_refused(body: bytes) -> None:
    with pytest.raises(UsageError, match="no AdmissionReview"):
        answer(body)


def test_a_folder_without_a_certificate_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no usable") as refused:
        StampServer(tmp_path, 0, "127.0.0.1")
    assert "Secret" in refused.value.hint


@pytest.fixture
def webhook(older: ApiServer, tmp_path: Path) -> Iterator[int]:
    """The webhook as its pod runs it, and the API server told of it; gives its port."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    older.authority.server(["127.0.0.1"]).write(folder, "tls")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        sys.executable, "-m", "casparian_flow.kube.stamp",
        "--certificates", str(folder), "--port", str(port),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream, env=dict(os.environ))
    try:
        older.client.wait(lambda: "stamping decisions" in log.read_text(), seconds=60)
        older.client.apply(configuration(older, port))
        yield port
    finally:
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
        older.client.delete(
            "admissionregistration.k8s.io/v1",
            "MutatingWebhookConfiguration",
            "casparian-approval-stamp",
        )


def configuration(server: ApiServer, port: int) -> dict[str, Any]:
    """As the chart has it, but for where the webhook is."""
    rule = {
        "apiGroups": ["casparian.io"],
        "apiVersions": ["*"],
        "operations": ["UPDATE"],
        "resources": ["approvals"],
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "casparian-approval-stamp"},
        "webhooks": [
            {
                "name": "stamp.casparian.io",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "clientConfig": {
                    "url": f"https://127.0.0.1:{port}/stamp",
                    "caBundle": base64.b64encode(server.authority.pem).decode(),
                },
                "rules": [rule],
            }
        ],
    }


def test_without_a_stamp_nobody_decides_in_another_name(older: ApiServer) -> None:
    space = people(older, older.namespace("bare"))
    operator_of(older, space).create(manifest("Approval", space))
    ann = older.client_for("ann")
    assert "policy casparian-approval-stamp is missing" in refusal(ann, space, decision="approved")
    other = refusal(ann, space, decision="approved", decidedBy="bob")
    assert "decidedBy is not who decides" in other
    assert not refusal(ann, space, decision="approved", decidedBy="ann")


def test_with_the_webhook_the_printed_command_works_as_it_is(
    older: ApiServer, webhook: int
) -> None:
    space = people(older, older.namespace("stamped"))
    operator = operator_of(older, space)
    for name in ("first", "sales", "third"):
        operator.create(manifest("Approval", space, name=name))
    ann = older.client_for("ann")
    # The API server takes a moment to know of the webhook.
    older.client.wait(lambda: not refusal(ann, space, "first", decision="approved"))
    patch = '{"spec":{"decision":"approved"}}'
    ann.kubectl("patch", "approval", "sales", "--type=merge", "-p", patch, "-n", space)
    spec = older.client.get(API_VERSION, "Approval", "sales", space)["spec"]
    assert spec["decidedBy"] == "ann"
    rita = older.client_for("rita")
    assert "cannot decide it" in refusal(rita, space, "third", decision="approved")


def test_the_webhook_bears_with_odd_callers(older: ApiServer, webhook: int) -> None:
    context = ssl.create_default_context(cadata=older.authority.pem.decode())
    with socket.create_connection(("127.0.0.1", webhook)) as silent:
        silent.sendall(b"GET / HTTP/1.0\r\n\r\n")  # no TLS
        for method, path, body, wanted in (
            ("GET", "/healthz", None, 200),
            ("GET", "/stamp", None, 404),
            ("POST", "/other", b"{}", 404),
            ("POST", "/stamp", b"{}", 400),
        ):
            caller = HTTPSConnection("127.0.0.1", webhook, timeout=10, context=context)
            caller.request(method, path, body)
            assert caller.getresponse().status == wanted
            caller.close()
    huge = HTTPSConnection("127.0.0.1", webhook, timeout=10, context=context)
    huge.putrequest("POST", "/stamp")
    huge.putheader("Content-Length", str(1 << 40))
    huge.endheaders()
    assert huge.getresponse().status == 413
    huge.close()
