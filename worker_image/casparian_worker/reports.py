"""What the worker tells of a run's rows, beside how many they were (http_types.RowsReport)."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from casparian_flow.protocol.http_types import (
    RowsReport,
    TopicReport,
    ViolationSummary,
    ViolationType,
    encode_payload,
)
from casparian_flow.protocol.limits import REPORT_CHARS_MAX

TOPICS_MAX: Final = 100
VIOLATIONS_MAX: Final = 100


def encode_report(topics: Iterable[TopicReport]) -> str:
    """JSON text within its bound; "" if there is nothing to tell.

    A report beyond it loses its sample rows, then the samples of its violations.
    """
    told = [t for t in topics if t.violations or t.sample][:TOPICS_MAX]
    for shorten in (_whole, _without_sample, _without_values):
        text = encode_payload(RowsReport(topics=[shorten(t) for t in told])) if told else ""
        if len(text) <= REPORT_CHARS_MAX:
            return text
    return ""


def _whole(report: TopicReport) -> TopicReport:
    return report


def _without_sample(report: TopicReport) -> TopicReport:
    return _changed(report, report.violations[:VIOLATIONS_MAX])


def _without_values(report: TopicReport) -> TopicReport:
    bare = [
        ViolationSummary(violation_type=v.violation_type, column_name=v.column_name, count=v.count)
        for v in report.violations[:VIOLATIONS_MAX]
    ]
    return _changed(report, bare)


def _changed(report: TopicReport, violations: list[ViolationSummary]) -> TopicReport:
    return TopicReport(
        topic=report.topic, rows=report.rows, bad_rows=report.bad_rows, violations=violations
    )


def refusal_report(diagnostics: Mapping[str, Any]) -> str:
    """The report of an output that was refused, from what the refusal knows (validate.py)."""
    if "violations" in diagnostics:
        found = [_of_values(v) for v in diagnostics["violations"]]
    else:
        found = _of_columns(diagnostics)
    return encode_report([TopicReport(violations=found)])


def _of_values(violation: Mapping[str, Any]) -> ViolationSummary:
    return ViolationSummary(
        violation_type=ViolationType(violation["violation_type"]),
        column_name=violation["column_name"],
        count=violation["count"],
        samples=violation["samples"],
    )


def _of_columns(diagnostics: Mapping[str, Any]) -> list[ViolationSummary]:
    found = [_column(ViolationType.COLUMN_MISSING, n) for n in diagnostics.get("missing", ())]
    found += [_column(ViolationType.COLUMN_EXTRA, n) for n in diagnostics.get("extra", ())]
    found += [
        _column(ViolationType.TYPE_MISMATCH, wrong["column"], [wrong["actual"]])
        for wrong in diagnostics.get("types", ())
    ]
    if diagnostics.get("order"):
        found.append(_column(ViolationType.COLUMN_ORDER_MISMATCH, None, diagnostics["actual"]))
    return found


def _column(kind: ViolationType, name: str | None, samples: Iterable[str] = ()) -> ViolationSummary:
    return ViolationSummary(violation_type=kind, column_name=name, count=1, samples=list(samples))


def violations_report(violations: Iterable[Mapping[str, Any]]) -> list[ViolationSummary]:
    """Violations of values as the validator tells them."""
    return [_of_values(v) for v in violations]
