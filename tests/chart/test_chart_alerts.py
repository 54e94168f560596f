"""Alerts played by promtool; dashboard and alerts name metrics that there are."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import chart_kit
import pytest
import yaml
from chart_kit import ROOT, find, rendered

SCENARIOS = Path(__file__).parent / "alerts" / "scenarios.yaml"
SUFFIX = re.compile(r"_(bucket|sum|count)$")
METRIC = re.compile(r"\bcasparian_[a-z_]+")
DOCUMENTED = re.compile(r"`(casparian_[a-z_]+)")


def _spec() -> dict[str, Any]:
    found: dict[str, Any] = find(rendered("everything"), "PrometheusRule")["spec"]
    return found


def _dashboard() -> dict[str, Any]:
    text = find(rendered("everything"), "ConfigMap", "casparian-dashboard")["data"]
    found: dict[str, Any] = json.loads(text["casparian.json"])
    return found


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as they are rendered, in a file for promtool."""
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump(_spec()))
    return file


def _promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [chart_kit.promtool(), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules(rules: Path) -> None:
    _promtool("check", "rules", rules)


def test_each_alert_fires_when_it_should_and_only_then(rules: Path) -> None:
    # Without their texts, which the scenarios would only repeat.
    plain = yaml.safe_load(rules.read_text())
    for group in plain["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations")
    folder = rules.parent / "played"
    folder.mkdir()
    (folder / "rules.yaml").write_text(yaml.safe_dump(plain))
    (folder / "scenarios.yaml").write_text(SCENARIOS.read_text())
    _promtool("test", "rules", folder / "scenarios.yaml")


def test_every_alert_has_a_scenario_in_which_it_fires() -> None:
    fired = {
        expected["alertname"]
        for test in yaml.safe_load(SCENARIOS.read_text())["tests"]
        for expected in test["alert_rule_test"]
        if expected["exp_alerts"]
    }
    assert fired == {rule["alert"] for group in _spec()["groups"] for rule in group["rules"]}


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for group in _spec()["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert rule["annotations"]["summary"].endswith(".")
            assert len(rule["annotations"]["description"]) > 20
            assert "NAMESPACE" not in json.dumps(rule)


def test_alerts_and_dashboard_name_documented_metrics_only() -> None:
    documented = set(DOCUMENTED.findall((ROOT / "docs" / "metrics.md").read_text()))
    worker = (ROOT / "docs" / "worker.md").read_text()
    table = worker[worker.index("## Metrics") :]
    documented |= {
        f"casparian_worker_{name}_total"
        for name in re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)
    }
    expressions = [rule["expr"] for group in _spec()["groups"] for rule in group["rules"]]
    expressions += [t["expr"] for panel in _dashboard()["panels"] for t in panel["targets"]]
    expressions += [v["query"]["query"] for v in _dashboard()["templating"]["list"][1:]]
    used = {SUFFIX.sub("", name) for text in expressions for name in METRIC.findall(text)}
    assert len(used) > 15
    assert used - documented == set()


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        assert panel["description"]
