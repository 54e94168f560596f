"""Backups of a ledger: fetched from a running Sentinel by a key, exported, imported again."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from ledger_kit import ManualClock
from scripted_worker import seed
from signing_kit import lax_rules

from casparian_flow.cli.app import cli
from casparian_flow.db import exchange
from casparian_flow.domain.errors import CasparianError, LedgerError, SentinelUnreachableError
from casparian_flow.protocol.curve import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    SERVER_SECRET,
    CurvePair,
    public_text,
    secret_text,
)
from casparian_flow.sentinel.admission import Admission, Principal
from casparian_flow.sentinel.control import ControlClient, connect, remote
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
from casparian_flow.services.backup import backup

FILES = 7


def _pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(public.decode(), secret.decode())


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Sentinel]:
    seed(tmp_path / "ledger.duckdb", files=FILES, plugins=("alpha",))
    server, client = _pair(), _pair()
    own, theirs = tmp_path / "server", tmp_path / "client"
    for folder in (own, theirs):
        folder.mkdir()
    (own / SERVER_SECRET).write_text(secret_text(server))
    (theirs / SERVER_PUBLIC).write_text(public_text(server.public))
    (theirs / CLIENT_SECRET).write_text(secret_text(client))
    admission = Admission(None)
    admission.replace({client.public: Principal("backup", "flow", "casparian-backup")})
    running = Sentinel(
        SentinelConfig(
            bind_address="tcp://127.0.0.1:*",
            remote_control_address="tcp://127.0.0.1:*",
            database=tmp_path / "ledger.duckdb",
            trust=lax_rules,
            curve_dir=own,
            admission=admission,
        )
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    assert running.wait_started(20)
    yield running
    running.stop()
    thread.join(30)


@pytest.fixture
def control(sentinel: Sentinel, tmp_path: Path) -> Iterator[ControlClient]:
    with remote(sentinel.remote_control_address, curve_dir=tmp_path / "client") as client:
        yield client


def _jobs(database: Path) -> list[dict[str, Any]]:
    with connect(database) as ledger:
        return ledger.list_jobs(limit=1000)


def _restore(export: Path, database: Path) -> None:
    """As docs/install-kubernetes.md tells a person to do it."""
    database.parent.mkdir(exist_ok=True)
    config = database.with_suffix(".toml")
    config.write_text(f'[database]\ndb_location = "{database}"\n')
    arguments = ["--config", str(config), "ledger", "import", str(export)]
    cli.main(arguments, standalone_mode=False)


def test_what_was_backed_up_comes_back(
    control: ControlClient, sentinel: Sentinel, tmp_path: Path
) -> None:
    before = sentinel.control.list_jobs(limit=1000)
    made = backup(control, tmp_path / "backups", keep=3, clock=ManualClock())
    assert exchange.read_manifest(made).tables["cf_processing_queue"] == FILES
    assert [path.name for path in (tmp_path / "backups").iterdir()] == [made.name]
    assert list((tmp_path / "ledger.duckdb.state").rglob("*.duckdb")) == []

    _restore(made, tmp_path / "restored" / "ledger.duckdb")
    after = _jobs(tmp_path / "restored" / "ledger.duckdb")
    assert [(job["id"], job["status"]) for job in after] == [
        (job["id"], job["status"]) for job in before
    ]
    # What the lost ledger gave out after the backup is not given out again.
    with connect(tmp_path / "restored" / "ledger.duckdb") as ledger:
        again = ledger.submit(
            version_id=before[0]["file_version_id"], plugin="alpha", priority=None, force=True
        )
    assert again > max(job["id"] for job in before) + 1000


def test_the_sentinel_goes_on_meanwhile_and_the_next_backup_has_what_came(
    control: ControlClient, sentinel: Sentinel, tmp_path: Path
) -> None:
    clock = ManualClock()
    first = backup(control, tmp_path / "backups", keep=3, clock=clock)
    job = sentinel.control.list_jobs(limit=1)[0]["id"]
    sentinel.control.cancel_job(job)
    clock.seconds += 1
    second = backup(control, tmp_path / "backups", keep=3, clock=clock)
    assert first.name < second.name
    _restore(second, tmp_path / "restored" / "ledger.duckdb")
    restored = {row["id"]: row["status"] for row in _jobs(tmp_path / "restored" / "ledger.duckdb")}
    assert restored[job] == "ABORTED"


def test_the_newest_stay_and_what_is_not_a_backup_is_left_alone(
    control: ControlClient, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    for name in ("ledger-20200101T000000Z", "ledger-20200102T000000Z", "notes", "lost+found"):
        (folder / name).mkdir(parents=True)
    (folder / ".ledger-20200103T000000Z.draft").mkdir()
    made = backup(control, folder, keep=2, clock=ManualClock())
    assert {path.name for path in folder.iterdir()} == {
        "ledger-20200102T000000Z",
        "notes",
        "lost+found",
        made.name,
    }


def test_a_backup_that_fails_leaves_nothing_and_deletes_nothing(
    control: ControlClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    (folder / "ledger-20200101T000000Z").mkdir(parents=True)

    def broken(name: str, offset: int) -> bytes:
        raise SentinelUnreachableError("gone")

    monkeypatch.setattr(control, "snapshot_part", broken, raising=False)
    with pytest.raises(SentinelUnreachableError):
        backup(control, folder, keep=1, clock=ManualClock())
    assert [path.name for path in folder.iterdir()] == ["ledger-20200101T000000Z"]


def test_a_damaged_copy_is_no_backup(
    control: ControlClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        control, "snapshot_part", lambda name, offset: b"" if offset else b"x" * 9999, raising=False
    )
    with pytest.raises(LedgerError):
        backup(control, tmp_path / "backups", keep=1, clock=ManualClock())
    assert list((tmp_path / "backups").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(control: ControlClient, tmp_path: Path) -> None:
    (tmp_path / "backups").write_text("a file")
    with pytest.raises(CasparianError, match="no backup in"):
        backup(control, tmp_path / "backups", keep=1, clock=ManualClock())


def test_the_command_backs_up_a_sentinel_elsewhere(
    sentinel: Sentinel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "client.toml"
    config.write_text(f'[wire]\ncurve_dir = "{tmp_path / "client"}"\n')
    address = sentinel.remote_control_address
    arguments = ["--config", str(config), "ledger", "backup", "--connect", address]
    cli.main([*arguments, str(tmp_path / "backups")], standalone_mode=False)
    (made,) = (tmp_path / "backups").iterdir()
    assert str(made) in capsys.readouterr().out
