"""The operator lets backups fetch copies of the ledger, and nobody else by their key."""

import base64
from pathlib import Path

import pytest
from kube_kinds import install
from kube_kit import ApiServer
from kube_operator import operator, operator_config
from ledger_kit import ManualClock

from casparian_flow.db import exchange
from casparian_flow.domain.errors import NotPermittedError
from casparian_flow.kube.client import KubeClient
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.service_access import BACKUP, keep_service_secret, service_keys
from casparian_flow.protocol.curve import CLIENT_SECRET, SERVER_PUBLIC
from casparian_flow.sentinel.control import remote
from casparian_flow.services.backup import backup

ACCOUNT = "casparian-backup"


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


def _key_files(api: ApiServer, space: str, folder: Path) -> Path:
    """The Secret, as a pod mounts it."""
    secret = api.client.wait(lambda: api.client.find("v1", "Secret", ACCOUNT, space))
    folder.mkdir(exist_ok=True)
    assert set(secret["data"]) == {CLIENT_SECRET, SERVER_PUBLIC}
    for name, text in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(text))
    return folder


def test_a_backup_is_made_with_the_key_in_the_secret_and_nothing_else_can_be(
    api: ApiServer, space: str, tmp_path: Path
) -> None:
    config = operator_config(tmp_path, space, (space,), backup_account=ACCOUNT)
    with operator(api, config) as running:
        keys = _key_files(api, space, tmp_path / "keys")
        with remote(running.sentinel.remote_control_address, curve_dir=keys) as control:
            made = backup(control, tmp_path / "backups", keep=1, clock=ManualClock())
            assert "cf_processing_queue" in exchange.read_manifest(made).tables
            with pytest.raises(NotPermittedError):
                control.list_jobs()


def test_an_edited_secret_is_put_right_and_a_right_one_is_left_alone(
    api: ApiServer, space: str, tmp_path: Path
) -> None:
    keys = KeyRing.open(tmp_path / "curve")
    client = KubeClient.connect(api.kubeconfig)
    assert keep_service_secret(client, BACKUP, keys, space, ACCOUNT)
    right = api.client.get("v1", "Secret", ACCOUNT, space)
    assert not keep_service_secret(client, BACKUP, keys, space, ACCOUNT)
    api.client.patch("v1", "Secret", ACCOUNT, {"data": {SERVER_PUBLIC: "YWhh"}}, space)
    assert keep_service_secret(client, BACKUP, keys, space, ACCOUNT)
    assert api.client.get("v1", "Secret", ACCOUNT, space)["data"] == right["data"]
    client.close()


def test_without_backups_there_is_no_key(tmp_path: Path) -> None:
    keys = KeyRing.open(tmp_path / "curve")
    assert service_keys(BACKUP, keys, "flow", "") == {}
    (whom,) = service_keys(BACKUP, keys, "flow", ACCOUNT).values()
    assert (whom.kind, whom.namespace, whom.service_account) == ("backup", "flow", ACCOUNT)
