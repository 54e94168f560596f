"""The metrics, and docs/metrics.md beside them."""

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from casparian_flow.sentinel.broker import Observation
from casparian_flow.sentinel.metrics import (
    COUNTERS,
    OTHER,
    PLUGINS_MAX,
    Gauges,
    Histogram,
    SentinelMetrics,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")


def section(heading: str) -> dict[str, str]:
    """The first and last cell of each row of the table under a heading."""
    body = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT, re.M | re.S)
    assert body
    rows = [line.strip("|").split("|") for line in body[1].splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): row[-1].strip() for row in rows}


def exposed(metrics: SentinelMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_every_counter_is_documented_in_the_code_s_words() -> None:
    assert section("Counters of the Sentinel") == {
        f"casparian_{name}_total": text for name, text in COUNTERS.items()
    }


def test_every_other_metric_is_documented_with_its_kind() -> None:
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", exposed(SentinelMetrics()), re.M))
    for kind in ("gauge", "histogram"):
        documented = set(section(f"{kind.capitalize()}s of the Sentinel"))
        assert documented == {name for name, is_a in kinds.items() if is_a == kind}


def test_the_counters_of_earlier_versions_keep_their_names() -> None:
    kept = [
        *(
            f"casparian_jobs_{what}_total"
            for what in (
                "dispatched",
                "completed",
                "failed",
                "aborted",
                "rejected",
                "requeued",
                "retried",
            )
        ),
        "casparian_workers_registered_total",
        "casparian_workers_cleaned_up_total",
        "casparian_messages_sent_total",
        "casparian_messages_received_total",
        "casparian_protocol_errors_total",
        "casparian_db_errors_total",
    ]
    text = exposed(SentinelMetrics())
    assert [name for name in kept if f"\n{name} 0.0\n" not in text] == []


def test_broker_and_shell_counters_are_added_up() -> None:
    metrics = SentinelMetrics()
    metrics.gauges = Gauges(
        {("sales", "QUEUED"): 4}, workers=2, ledger_up=True, counters={"protocol_errors": 3}
    )
    metrics.count("protocol_errors", 2)
    text = exposed(metrics)
    assert "casparian_protocol_errors_total 5.0" in text
    assert 'casparian_queue_depth{plugin="sales",status="QUEUED"} 4.0' in text
    assert "casparian_workers 2.0" in text
    assert "casparian_ledger_up 1.0" in text


def test_a_histogram_counts_a_bound_s_own_value_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    histogram.observe(1.5, times=3)
    histogram.observe(9.0)
    assert histogram.buckets() == [("1.0", 1), ("2.0", 4), ("+Inf", 5)]
    assert histogram.total == pytest.approx(14.5)


def test_job_durations_are_kept_by_plugin_up_to_a_bound() -> None:
    metrics = SentinelMetrics()
    metrics.observe_jobs(Observation(f"p{i}", "completed", 0.1) for i in range(PLUGINS_MAX + 5))
    text = exposed(metrics)
    assert text.count("casparian_job_duration_seconds_count{") == PLUGINS_MAX + 1
    assert f'count{{outcome="completed",plugin="{OTHER}"}} 5.0' in text
