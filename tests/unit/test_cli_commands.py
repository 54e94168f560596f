"""The commands against a scripted control plane: what they ask, print and return.

What goes in: a command line. What is observed: the calls made, both output streams, the exit
code. The control plane itself is not tested here; tests/acceptance runs the real one.
"""

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from casparian_flow.cli.app import run
from casparian_flow.cli.context import App
from casparian_flow.config import load_settings
from casparian_flow.domain.errors import ConflictError, LedgerLockedError, NotFoundError
from casparian_flow.sentinel.control import ControlClient

JOB = {"id": 7, "status": "FAILED", "plugin_name": "sales", "rel_path": "a\x1b[31m\n.csv"}


@dataclass
class ScriptedControl:
    """Answers from a table; an exception in it is raised. Remembers what it was asked."""

    answers: dict[str, Any]
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    closed: bool = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def close(self) -> None:
        self.closed = True


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    control: ScriptedControl

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Casparian = Callable[..., Outcome]


@pytest.fixture
def casparian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Casparian:
    monkeypatch.chdir(tmp_path)

    def call(*argv: str, **answers: Any) -> Outcome:
        control = ScriptedControl(answers)
        app = App(connector=lambda _settings: cast(ControlClient, control))
        code = run(argv, app)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err, control)

    return call


@pytest.mark.parametrize("message", [None, "", " \n", "Traceback\n  why\n"])
def test_a_message_without_a_word_in_it_can_be_listed_too(
    casparian: Casparian, message: str | None
) -> None:
    outcome = casparian("jobs", list_jobs=[{**JOB, "error_message": message}])
    assert outcome.code == 0
    assert ("why" in outcome.out) == bool(message and message.strip())


def test_jobs_are_shown_as_plain_columns_in_a_pipe_without_control_characters(
    casparian: Casparian,
) -> None:
    done = casparian("jobs", "--status", "failed", list_jobs=[JOB])
    assert done.code == 0
    assert done.control.calls[0][2]["status"] == "FAILED"
    assert "a\\x1b[31m\\n.csv" in done.out
    assert "\x1b" not in done.out
    assert done.out.splitlines()[0].split()[:3] == ["ID", "STATUS", "PLUGIN"]


def test_versions_of_a_name_too_long_for_the_disk_as_it_is_shown_can_be_asked_for(
    casparian: Casparian,
) -> None:
    name = "\\xf0" * 100
    done = casparian("versions", name, versions=[])
    assert done.code == 0
    assert done.control.calls[0][1] == (name,)


def test_json_is_all_that_is_on_standard_output(casparian: Casparian) -> None:
    done = casparian("jobs", "-o", "json", list_jobs=[JOB])
    assert done.json == [JOB]
    assert done.err == ""


def test_an_empty_list_is_an_empty_json_list_or_a_note_what_to_do(casparian: Casparian) -> None:
    assert casparian("jobs", "-o", "json", list_jobs=[]).json == []
    done = casparian("jobs", list_jobs=[])
    assert done.out == ""
    assert "casparian status" in done.err


def test_the_control_plane_is_left_in_order(casparian: Casparian) -> None:
    assert casparian("jobs", list_jobs=[]).control.closed
    assert casparian("jobs", list_jobs=LedgerLockedError("no")).control.closed


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no job 9", hint="Look."), 4),
        (ConflictError("no", hint="Look."), 5),
        (LedgerLockedError("no", hint="Look."), 6),
    ],
)
def test_an_error_is_one_line_and_a_hint_and_an_exit_code(
    casparian: Casparian, error: Exception, code: int
) -> None:
    done = casparian("job", "show", "9", show_job=error)
    assert done.code == code
    assert done.out == ""
    assert done.err == f"error: {error}\nhint: Look.\n"


def test_an_unexpected_error_shows_no_traceback_unless_debug_is_asked_for(
    casparian: Casparian,
) -> None:
    done = casparian("jobs", list_jobs=KeyError("x"))
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert "--debug" in done.err
    assert "Traceback" in casparian("--debug", "jobs", list_jobs=KeyError("x")).err


def test_a_wrong_option_is_exit_code_2(casparian: Casparian) -> None:
    done = casparian("jobs", "--status", "SLEEPING")
    assert done.code == 2
    assert "'running'" in done.err


def test_a_bad_configuration_is_exit_code_2_with_the_key(
    casparian: Casparian, tmp_path: Path
) -> None:
    (tmp_path / "global_config.toml").write_text("[worker]\nslotz = 1\n")
    done = casparian("jobs", list_jobs=[])
    assert done.code == 2
    assert "unknown key 'slotz'" in done.err
    assert "hint: Did you mean 'slots'?" in done.err


def test_init_makes_a_configuration_and_folders_and_never_overwrites(
    casparian: Casparian, tmp_path: Path
) -> None:
    done = casparian("init")
    assert done.code == 0
    assert (tmp_path / "inbox").is_dir()
    assert "casparian source add inbox" in done.out
    assert casparian("init", "-o", "json").json["made"] == []
    (tmp_path / "global_config.toml").write_text("# mine\n[worker]\nslots = 3\n")
    casparian("init")
    config = (tmp_path / "global_config.toml").read_text()
    assert config.startswith("# mine\n[worker]\nslots = 3\n")
    assert load_settings(tmp_path / "global_config.toml").trust.allowed_signers == ("local",)
    assert casparian("init", "-o", "json").json["made"] == []


def test_init_makes_a_key_that_only_its_owner_may_read(
    casparian: Casparian, tmp_path: Path
) -> None:
    casparian("init")
    key = tmp_path / "keys" / "local.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    casparian("init")
    assert key.read_bytes() == before


def test_what_init_writes_is_a_valid_configuration(casparian: Casparian, tmp_path: Path) -> None:
    casparian("init", "here")
    shown = casparian("--config", "here/global_config.toml", "config", "show", "-o", "json")
    assert shown.json["settings"]["worker"]["output_root"] == str(tmp_path / "here" / "output")


def test_source_add_gives_the_absolute_path_and_the_patterns(
    casparian: Casparian, tmp_path: Path
) -> None:
    (tmp_path / "inbox").mkdir()
    done = casparian(
        "source", "add", "inbox", "--ignore", "*.bak", add_source={"id": 1, "path": "/x"}
    )
    name, args, kwargs = done.control.calls[0]
    assert (name, args) == ("add_source", (str(tmp_path / "inbox"),))
    assert kwargs == {"settle_seconds": None, "include": ("*.bak",)[:0], "ignore": ("*.bak",)}


def test_source_add_refuses_what_is_no_folder(casparian: Casparian) -> None:
    done = casparian("source", "add", "nowhere")
    assert (done.code, "not a folder" in done.err) == (2, True)


def test_source_remove_names_the_root_by_its_recorded_path(
    casparian: Casparian, tmp_path: Path
) -> None:
    (tmp_path / "inbox").mkdir()
    roots = [{"id": 1, "path": str(tmp_path / "inbox")}]
    done = casparian("source", "remove", "inbox", list_sources=roots, remove_source=None)
    assert done.control.calls[-1][:2] == ("remove_source", (str(tmp_path / "inbox"),))
    unknown = casparian("source", "remove", "other", list_sources=roots)
    assert (unknown.code, "casparian source list" in unknown.err) == (4, True)


def test_scan_without_a_source_tells_how_to_add_one(casparian: Casparian) -> None:
    done = casparian("scan", list_sources=[])
    assert done.code == 2
    assert "casparian source add" in done.err


def test_cancel_says_cancelled_or_too_late(casparian: Casparian) -> None:
    done = casparian("job", "cancel", "3", cancel_job={"outcome": "cancelled", "status": "ABORTED"})
    assert (done.code, done.out) == (0, "job 3: cancelled\n")
    late = casparian("job", "cancel", "3", cancel_job={"outcome": "too_late", "status": "STAGED"})
    assert (late.code, "too late, committing" in late.err) == (5, True)
    over = casparian("job", "cancel", "3", cancel_job={"outcome": "already", "status": "FAILED"})
    assert (over.code, "ended already (FAILED)" in over.out) == (0, True)


def test_job_show_tells_what_the_reason_means(casparian: Casparian) -> None:
    row = {**JOB, "reason": "timeout", "outputs": [], "history": ["2026 LEASED"]}
    done = casparian("job", "show", "7", show_job=row)
    assert "the plugin ran longer than the job timeout" in done.out
    assert "2026 LEASED" in done.out


def test_job_logs_keep_lines_and_lose_control_characters(casparian: Casparian) -> None:
    logs = [{"attempt": 1, "log": "one\ntwo\x1b[2J"}, {"attempt": 2, "log": "three"}]
    done = casparian("job", "logs", "7", job_log=logs)
    assert done.out == "--- attempt 1\none\ntwo\\x1b[2J\n--- attempt 2\nthree\n"


def test_resolve_needs_a_decision(casparian: Casparian) -> None:
    assert casparian("job", "resolve", "3").code == 2
    done = casparian("job", "resolve", "3", "--abandon", resolve_job={"status": "FAILED"})
    assert done.control.calls[0] == ("resolve_job", (3,), {"forward": False})


def test_replay_needs_to_know_which(casparian: Casparian) -> None:
    assert casparian("replay").code == 2
    done = casparian("replay", "17", "21", replay=[30, 31])
    assert done.control.calls[0][2] == {"plugin": None, "job_ids": (17, 21)}
    assert done.out == "queued as job 30, 31\n"


def test_backfill_is_a_dry_run_unless_told_otherwise(casparian: Casparian) -> None:
    done = casparian("backfill", "sales", backfill={"jobs": 4, "bytes_gone": ["old.csv"]})
    assert done.control.calls[0][2] == {"execute": False, "force": False}
    assert "add --execute" in done.out
    assert "old.csv" in done.err


@pytest.mark.parametrize("words", [("topics",), ("topics", "list"), ("topics", "-o", "json")])
def test_topics_lists_by_itself(casparian: Casparian, words: tuple[str, ...]) -> None:
    topic = {"plugin_name": "sales", "topic_name": "rows", "uri": "parquet://rows"}
    topic["mode"] = "append"
    assert "parquet://rows" in casparian(*words, list_topics=[topic]).out


def test_topics_shows_each_sink_in_a_line_with_the_mode_in_force(casparian: Casparian) -> None:
    uris = "parquet://my rows\nsqlite://rows.db?mode=error"
    topic = {"plugin_name": "sales", "topic_name": "rows", "uri": uris, "mode": "replace"}
    _, first, second = casparian("topics", list_topics=[topic]).out.splitlines()
    assert first.split() == ["sales", "rows", "parquet://my", "rows", "replace"]
    assert second.split() == ["sales", "rows", "sqlite://rows.db?mode=error", "error"]


def test_backfill_says_when_there_is_nothing_to_queue(casparian: Casparian) -> None:
    done = casparian("backfill", "sales", backfill={"jobs": 0, "bytes_gone": []})
    assert done.out.startswith("nothing to queue")
    one = casparian("backfill", "sales", backfill={"jobs": 1, "bytes_gone": []})
    assert one.out == "1 job would be queued; add --execute\n"


def test_an_address_that_is_none_is_told_with_an_example(casparian: Casparian) -> None:
    done = casparian("worker", "--connect", "foo")
    assert done.code == 2
    assert "the command line: key 'connect' in section [worker]" in done.err
    assert "tcp://127.0.0.1:5555 (found 'foo')" in done.err


def test_topics_set_hands_on_uri_mode_and_contract(casparian: Casparian, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    done = casparian(
        *("topics", "set", "sales", "rows", "csv://x", "--mode", "replace", "--schema", "c.json"),
        set_topic=None,
    )
    assert done.control.calls[0][2] == {"uri": "csv://x", "mode": "replace", "schema_json": "{}"}


def test_rules_are_listed_added_and_removed(casparian: Casparian) -> None:
    assert "auto_sales" in casparian("rules", list_rules=[{"id": 1, "tag": "auto_sales"}]).out
    added = casparian("rules", "add", "*.csv", "csv", "-o", "json", add_rule=5)
    assert added.json["id"] == 5
    assert casparian("rules", "remove", "5", remove_rule=None).code == 0


def test_status_names_cause_and_cure(casparian: Casparian) -> None:
    sandbox = {"landlock": "no kernel", "seccomp": "applied (some)", "rlimits": "applied"}
    status = {
        "sentinel": None,
        "jobs": {"QUEUED": 2, "COMPLETED": 0},
        "workers": [{"worker_id": "w", "status": "IDLE", "sandbox": sandbox}],
        "causes": [{"cause": "no worker is connected", "cure": "Run 'casparian start'."}],
    }
    done = casparian("status", status=status)
    assert "not running" in done.out
    assert "2 queued" in done.out
    assert "no worker is connected\n  -> Run 'casparian start'." in done.out
    assert "no kernel" in done.out
    assert "seccomp" not in done.out
    assert casparian("status", "-o", "json", status=status).json == status


def test_ledger_check_fails_if_a_rule_is_broken(casparian: Casparian) -> None:
    assert casparian("ledger", "check", check=[]).code == 0
    done = casparian("ledger", "check", check=["job 1 has no version"])
    assert (done.code, done.out) == (1, "job 1 has no version\n")


def test_ledger_import_never_touches_an_existing_ledger(
    casparian: Casparian, tmp_path: Path
) -> None:
    (tmp_path / "casparian_flow.duckdb").write_bytes(b"precious")
    (tmp_path / "dump").mkdir()
    done = casparian("ledger", "import", "dump")
    assert done.code == 5
    assert (tmp_path / "casparian_flow.duckdb").read_bytes() == b"precious"


def test_version_prints_the_version(casparian: Casparian) -> None:
    done = casparian("version", "-o", "json")
    assert done.json["version"].count(".") == 2


def test_config_show_hides_the_password(
    casparian: Casparian, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASPARIAN_SINKS__MSSQL__PASSWORD", "hunter2")
    for form in ("table", "json"):
        assert "hunter2" not in casparian("config", "show", "-o", form).out


def test_every_command_has_help_with_a_summary_and_no_dangling_option() -> None:
    import click

    from casparian_flow.cli.app import cli

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, (path, parameter.name)
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                walk(child, (*path, name))

    walk(cli, ())


def test_history_is_told_in_plain_words(casparian: Casparian) -> None:
    data = {"completion": "SUCCESS", "metrics": {"rows": 3, "bytes": 9}}
    entry = {"at": "2026-01-02T03:04:05Z", "kind": "COMPLETED", "attempt": 1, "data": data}
    done = casparian("job", "show", "1", show_job={"id": 1, "history": [entry]})
    assert "attempt 1  completion=SUCCESS, metrics: rows=3, bytes=9" in done.out
