"""Values: described, refused when unknown, and each with an effect."""

import copy
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import chart_kit
import jsonschema
import pytest
import yaml
from chart_kit import (
    CHART,
    VALUES,
    defaults,
    find,
    rendered,
    rendered_text,
    run_helm,
    schema,
    settings_text,
)

from casparian_flow.config import Settings, load_settings

ALL = sorted(path.stem for path in VALUES.glob("*.yaml"))
Path_ = tuple[str, ...]


def _properties(part: dict[str, Any], at: Path_ = ()) -> Iterator[tuple[Path_, dict[str, Any]]]:
    for name, inner in part.get("properties", {}).items():
        yield (*at, name), inner
        yield from _properties(inner, (*at, name))


@cache
def _everything() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((VALUES / "everything.yaml").read_text("utf-8"))
    return found


def _at(values: Any, path: Path_) -> Any:
    for name in path:
        values = values[name]
    return values


def _settings(tmp_path: Path, *names: str, sets: tuple[str, ...] = ()) -> Settings:
    file = tmp_path / "config.toml"
    file.write_text(settings_text(rendered(*names, sets=sets)), "utf-8")
    return load_settings(file)


@pytest.mark.parametrize("name", ALL)
def test_helm_lint_finds_nothing(name: str) -> None:
    run_helm("lint", "--strict", CHART, "--values", VALUES / f"{name}.yaml")


def test_every_value_has_a_description() -> None:
    lacking = [".".join(path) for path, part in _properties(schema()) if not part["description"]]
    assert not lacking


def test_the_values_file_and_the_schema_name_the_same_values() -> None:
    leaves = {path for path, part in _properties(schema()) if not part.get("properties")}
    leaves -= {("global",)}

    def named(values: dict[str, Any], at: Path_ = ()) -> Iterator[Path_]:
        for key, value in values.items():
            path = (*at, key)
            if path in leaves:
                yield path
            elif isinstance(value, dict):
                yield from named(value, path)
            else:
                yield path

    free = {("requests",), ("limits",)}
    missing = {path for path in leaves - set(named(defaults())) if path[-1:] not in free}
    assert set(named(defaults())) - leaves == set()
    assert missing == set()


def test_an_unknown_value_is_refused_wherever_it_stands() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    everything = _everything()
    validator.validate(everything)
    objects = [()] + [
        path for path, part in _properties(schema()) if part.get("additionalProperties") is False
    ]
    for path in objects:
        root = copy.deepcopy(everything)
        target = root
        for name in path:
            target = target.setdefault(name, {})
        target["unheardOf"] = 1
        assert not validator.is_valid(root), path


@pytest.mark.parametrize(
    "value", ["unheardOf=1", "operator.unheardOf=1", "worker.slots=-1", 'logging.level="LOUD"']
)
def test_helm_refuses_what_the_schema_does(value: str) -> None:
    done = run_helm("template", "x", CHART, "--set-json", value, check=False)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


def test_every_option_is_set_in_everything_to_another_than_its_default() -> None:
    same = []
    for path, part in _properties(schema()):
        if part.get("properties") or path in {("global",), ("storage", "existingClaim")}:
            continue
        if path in {("backup", "storage", "existingClaim")} or part["type"] == "boolean":
            continue
        try:
            given = _at(_everything(), path)
        except KeyError:
            given = None
        try:
            usual = _at(defaults(), path)
        except KeyError:
            usual = None
        if given is None or given == usual:
            same.append(".".join(path))
    assert same == []


def test_every_option_is_read_by_a_template() -> None:
    text = "\n".join(path.read_text("utf-8") for path in (CHART / "templates").rglob("*.*"))
    unread = [
        ".".join(path)
        for path, part in _properties(schema())
        if path != ("global",)
        and not part.get("properties")
        and path[-1] not in {"requests", "limits"}
        and not re.search(rf"\.{path[-1]}\b", text)
    ]
    assert unread == []


def test_each_switch_changes_what_is_rendered() -> None:
    # A certificate would be another one each time.
    usual = 'admissionPolicies.stamp="auto"'
    before = rendered_text("everything", sets=(usual,))
    idle = []
    for path, part in _properties(schema()):
        if part.get("type") != "boolean":
            continue
        try:
            now = _at(_everything(), path)
        except KeyError:
            now = _at(defaults(), path)
        flipped = f"{'.'.join(path)}={str(not now).lower()}"
        if rendered_text("everything", sets=(usual, flipped)) == before:
            idle.append(".".join(path))
    assert idle == []


def test_the_operator_reads_its_settings_as_they_were_given(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "everything")
    assert settings.operator.namespace == "flow"
    assert settings.operator.watch_namespaces == ("flow", "finance")
    assert settings.operator.worker_image == "registry.example/flow/worker:2"
    assert settings.operator.image_pull_secrets == ("registry",)
    assert settings.operator.worker_resources == {
        "requests": {"cpu": "0.5", "memory": "1Gi"},
        "limits": {"memory": "2Gi"},
    }
    assert settings.operator.scratch_size == "30Gi"
    assert settings.operator.environments_storage_class == "shared"
    assert settings.operator.index_url == "https://index.example/simple"
    assert settings.operator.wheelhouse_claim == "wheels"
    assert settings.operator.resync_seconds == 7.5
    assert settings.sentinel.heartbeat_seconds == 2.5
    assert settings.worker.memory_mb == 512
    assert settings.sandbox.require == ("seccomp",)
    assert settings.logging.level == "DEBUG"
    assert settings.sinks.mssql.server == "sql.example.org"
    assert settings.trust.allowed_signers == ("alice", "bob@example.org")
    (key,) = settings.trust.keys["alice"]
    assert key.scopes == ("sales_*",)
    assert key.not_after is not None
    assert key.not_after.year == 2027
    assert settings.trust.keys["bob@example.org"][0].scopes == ("*",)
    assert list(settings.trust.revoked.values()) == ['lost "laptop"']
    assert settings.trust.azure.tenant_id == "t"
    assert settings.retention.dead_letter_hours == 5.5


@pytest.mark.parametrize("name", ALL)
def test_every_form_of_the_settings_is_valid(name: str, tmp_path: Path) -> None:
    settings = _settings(tmp_path, name)
    assert settings.database.db_location == Path("/var/lib/casparian/ledger.duckdb")
    assert settings.operator.listen_host == "0.0.0.0"
    assert settings.approvals.allow_self is False


def test_large_numbers_stay_numbers(tmp_path: Path) -> None:
    sets = ("worker.recycleAfter=10000000", "retention.apiJobHours=1000000")
    settings = _settings(tmp_path, sets=sets)
    assert settings.worker.recycle_after == 10_000_000
    assert settings.retention.api_job_hours == 1_000_000


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    text = 'x"\n[trust]\nallow_unsigned = true\n#\\ <&> ☃ {{ .Release.Name }}'
    sets = (f"trust.libraries={chart_kit.json.dumps([text])}",)
    settings = _settings(tmp_path, sets=sets)
    assert settings.trust.libraries == (text,)
    assert settings.trust.allow_unsigned is False


def test_only_what_a_running_operator_does_not_read_anew_restarts_it() -> None:
    def pod(*sets: str) -> Any:
        return find(rendered(sets=sets), "StatefulSet")["spec"]["template"]

    assert pod('trust.allowedSigners=["carol"]') == pod()
    assert pod("sentinel.maxRetries=1") != pod()


def test_the_text_of_the_settings_is_toml_without_a_trace_of_templates() -> None:
    for name in ALL:
        text = settings_text(rendered(name))
        tomllib.loads(text)
        assert "{{" not in text
        assert "<no value>" not in text
