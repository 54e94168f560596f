"""Reading global_config.toml: what is found, what is refused, and in which words."""

import logging
import os
from pathlib import Path

import pytest

from casparian_flow import config
from casparian_flow.config import load_settings, overridden, worker_address
from casparian_flow.domain.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "global_config.toml"
    file.write_text(text)
    return file


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(file: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    return caught.value


def test_without_a_file_every_setting_has_its_default_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = load_settings()
    assert found.database.db_location == tmp_path / "casparian_flow.duckdb"
    assert found.sentinel.bind_address == "tcp://127.0.0.1:5555"
    assert "every setting has its default" in caplog.text


def test_the_file_of_the_first_documentation_is_honoured(tmp_path: Path) -> None:
    write(tmp_path, '[database]\ndb_location = "casparian_flow.sqlite3"\n')
    assert load_settings().database.db_location == tmp_path / "casparian_flow.sqlite3"


def test_relative_paths_are_relative_to_the_file_not_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "conf"
    inner.mkdir()
    file = write(inner, '[worker]\noutput_root = "out"\nscratch = "/var/scratch"\n')
    monkeypatch.chdir("/")
    found = load_settings(file)
    assert found.database.db_location == inner / "casparian_flow.duckdb"
    assert found.worker.output_root == inner / "out"
    assert found.worker.scratch == Path("/var/scratch")


def test_the_path_comes_from_the_argument_then_the_variable_then_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "[worker]\nslots = 1\n")
    (tmp_path / "two.toml").write_text("[worker]\nslots = 2\n")
    (tmp_path / "three.toml").write_text("[worker]\nslots = 3\n")
    assert load_settings().worker.slots == 1
    monkeypatch.setenv("CASPARIAN_CONFIG", str(tmp_path / "two.toml"))
    assert load_settings().worker.slots == 2
    assert load_settings(tmp_path / "three.toml").worker.slots == 3


def test_a_variable_of_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "[worker]\nslots = 1\nmemory_mb = 100\n")
    monkeypatch.setenv("CASPARIAN_WORKER__SLOTS", "7")
    monkeypatch.setenv("CASPARIAN_SINKS__MSSQL__PASSWORD", "hunter2")
    found = load_settings()
    assert (found.worker.slots, found.worker.memory_mb) == (7, 100)
    assert found.sinks.mssql.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(found)


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere.toml")
    assert "there is no configuration file" in str(error)
    assert "casparian init" in error.hint


def test_an_unknown_key_is_named_with_its_section_its_file_and_the_nearest_key(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, "[worker]\nslotz = 4\n")
    error = refusal(file)
    assert str(error) == f"{file}: unknown key 'slotz' in section [worker]"
    assert error.hint == "Did you mean 'slots'?"
    assert error.exit_code == 2


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, '[database]\nbind_address = "tcp://127.0.0.1:1"\n'))
    assert error.hint == "'bind_address' belongs into [sentinel]."


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "[databse]\n"))
    assert "unknown key 'databse' at the top level" in str(error)
    assert error.hint == "Did you mean 'database'?"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, '[worker]\nslots = "many"\n[scout]\ninterval = 1\n'))
    assert "key 'slots' in section [worker]" in str(error)
    assert "'many'" in str(error)
    assert "unknown key 'interval' in section [scout]" in str(error)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[worker]\nslots = -1\n", "'slots'"),
        ("[worker]\nmemory_mb = 1.5\n", "'memory_mb'"),
        ('[sentinel]\nbind_address = "127.0.0.1:5555"\n', "'bind_address'"),
        ('[database]\ndb_location = "postgres://x/y"\n', "wants the path of a file"),
        ('[database]\ndb_location = ":memory:"\n', "wants the path of a file"),
        ('[logging]\nlevel = "LOUD"\n', "'level'"),
        ("[sentinel]\nlease_ttl_seconds = 5\n", "more than twice heartbeat_seconds"),
        ("database = 3\n", "'database'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, text: str, part: str) -> None:
    assert part in str(refusal(write(tmp_path, text)))


def test_a_password_that_does_not_fit_is_not_printed(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "[sinks.mssql]\npassword = 4711\n"))
    assert "4711" not in str(error)


def test_bad_toml_is_told_with_its_line(tmp_path: Path) -> None:
    assert "line 2" in str(refusal(write(tmp_path, "[worker]\nslots = = 3\n")))


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"# " + b"x" * (1 << 20), "larger than"),
        (b"[worker]\n\xff = 1\n", "not UTF-8 (byte 9)"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"a = " + b"1" * 5000, "not valid TOML"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, raw: bytes, part: str) -> None:
    file = tmp_path / "global_config.toml"
    file.write_bytes(raw)
    assert part in str(refusal(file))


def test_a_folder_or_a_fifo_is_refused_without_waiting_on_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "no regular file" in str(refusal(fifo))
    assert "directory" in str(refusal(tmp_path))


def test_settings_are_read_on_first_use_not_on_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = config._LazySettings()
    write(tmp_path, "[worker]\nslots = 5\n")
    assert lazy.worker.slots == 5
    write(tmp_path, "[worker]\nslots = 6\n")
    assert lazy.worker.slots == 5


def test_an_override_is_checked_like_the_file(tmp_path: Path) -> None:
    base = load_settings()
    assert overridden(base, "sentinel", bind_address="tcp://127.0.0.1:6000").sentinel != (
        base.sentinel
    )
    assert overridden(base, "sentinel", bind_address=None) == base
    with pytest.raises(ConfigError, match="bind_address"):
        overridden(base, "sentinel", bind_address="nonsense")


@pytest.mark.parametrize(
    ("bind", "connect"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://*:7000", "tcp://127.0.0.1:7000"),
        ("tcp://0.0.0.0:7000", "tcp://127.0.0.1:7000"),
    ],
)
def test_a_worker_on_this_machine_finds_the_sentinel(bind: str, connect: str) -> None:
    assert worker_address(overridden(load_settings(), "sentinel", bind_address=bind)) == connect
