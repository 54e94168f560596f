"""The ledger as decisions look at it: one look for all plugins and roots, shared by who asks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.wiring import Origin, PluginStatus
from casparian_flow.kube.reconcile_plugin import Counts, LedgerVersion, LedgerView
from casparian_flow.kube.reconcile_source import LedgerSource
from casparian_flow.kube.verdict import TopicWiring
from casparian_flow.protocol.http_types import Approval as Request
from casparian_flow.protocol.http_types import ApprovalStatus as Standing
from casparian_flow.sentinel.control_plane import ControlPlane

REQUESTS_MAX = 10_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Look:
    """What the ledger had at one moment, by scoped names.

    Attributes:
        taken_at: seconds, when the look began.
        seconds: how long it took.
    """

    plugins: Mapping[str, LedgerView] = field(default_factory=dict)
    sources: Mapping[str, LedgerSource] = field(default_factory=dict)
    taken_at: float = -1.0
    seconds: float = 0.0

    def plugin(self, scoped: str) -> LedgerView:
        return self.plugins.get(scoped, LedgerView())


class LedgerLooks:
    """Looks at the ledger; for any number of threads.

    Args:
        control: gives the control plane.
    """

    def __init__(self, control: Callable[[], ControlPlane], clock: Clock) -> None:
        self._control = control
        self._clock = clock
        self._lock = threading.Lock()
        self._last = Look()
        self._requests_lock = threading.Lock()
        self._requests: Mapping[str, Request] = {}
        self._requests_at = -1.0

    @property
    def last(self) -> Look:
        """The last look, however old."""
        return self._last

    def since(self, moment: float) -> Look:
        """A look that began at or after this moment; those who wait share one.

        Raises:
            CasparianError: the ledger cannot be read.
        """
        with self._lock:
            if self._last.taken_at < moment:
                self._last = self._take()
            return self._last

    def _take(self) -> Look:
        control, began = self._control(), self._clock.now().mono
        plugins = views_of(
            control.list_plugins(),
            control.plugin_counts(),
            control.list_topics(),
            control.plugin_roots(),
        )
        counts = {row["root_id"]: row for row in control.source_counts()}
        sources = {
            row["name"]: _source({**row, **counts.get(row["id"], {})})
            for row in control.list_sources()
            if row["name"]
        }
        return Look(plugins, sources, began, self._clock.now().mono - began)

    def requests(self, moment: float) -> Mapping[str, Request]:
        """Requests by id, as they were at or after this moment: apart, since there may be many and
        the queue is looked at every second.

        Raises:
            CasparianError: the ledger cannot be read.
        """
        with self._requests_lock:
            if self._requests_at < moment:
                self._requests_at = self._clock.now().mono
                api = self._control().api
                # Those that wait count however many newer ones there are.
                listed = [
                    *api.list_approvals(None, REQUESTS_MAX),
                    *api.list_approvals(Standing.PENDING, REQUESTS_MAX),
                ]
                self._requests = {request.approval_id: request for request in listed}
            return self._requests


Row = Mapping[str, Any]


def views_of(
    versions: Sequence[Row],
    counts: Sequence[Row],
    topics: Sequence[Row],
    roots: Mapping[str, frozenset[str]],
) -> dict[str, LedgerView]:
    """Every plugin from the answers of `list_plugins`, `plugin_counts`, `list_topics` and
    `plugin_roots`."""
    found: dict[str, list[Row]] = {}
    for row in versions:
        found.setdefault(row["plugin_name"], []).append(row)
    counted: dict[str, dict[str, Counts]] = {}
    for row in counts:
        counted.setdefault(row["plugin_name"], {})[row["artifact_hash"]] = Counts(
            queued=int(row["queued"]),
            running=int(row["running"]),
            failed=int(row["failed"]),
            workers=int(row["workers"]),
            idle=int(row["idle"]),
            trial=row["trial"],
        )
    wired: dict[str, dict[str, TopicWiring]] = {}
    for row in topics:
        # What a deploy wired follows the MANIFEST by itself.
        if row.get("origin") == Origin.USER.value:
            uris = tuple(line for line in row["uri"].splitlines() if line)
            wiring = TopicWiring(uris, row.get("schema_json") or "")
            wired.setdefault(row["plugin_name"], {})[row["topic_name"]] = wiring
    return {
        plugin: LedgerView(
            [_version(row) for row in rows],
            rows[0]["pause_reason"] if rows[0]["paused"] else None,
            counted.get(plugin, {}),
            wired.get(plugin, {}),
            roots.get(plugin, frozenset()),
        )
        for plugin, rows in found.items()
    }


def _version(row: Row) -> LedgerVersion:
    return LedgerVersion(
        row["version"],
        row["artifact_hash"],
        PluginStatus(row["status"]),
        row["signer"] or "",
        row["validation_error"] or "",
        instant(row["deployed_at"]),
        micros(row["deployed_at"]),
    )


def _source(row: Row) -> LedgerSource:
    return LedgerSource(
        root_id=int(row["id"]),
        active=bool(row["active"]),
        settle_seconds=row["settle_seconds"],
        include=tuple(row["include"]),
        ignore=tuple(row["ignore"]),
        files=int(row["files"]),
        versions=int(row.get("versions") or 0),
        queued=int(row.get("queued") or 0),
        last_scan=instant(row["last_scan"]),
        last_scan_seconds=row.get("last_scan_seconds"),
        complete=bool(row["last_scan_complete"]) if row["last_scan"] else True,
        problems=tuple(row["problems"]),
    )


def _moment(value: object) -> datetime | None:
    if isinstance(value, str) and value:
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def instant(value: object) -> str:
    """A ledger's time as objects have it: RFC 3339 in whole seconds, "" for none."""
    moment = _moment(value)
    if moment is None:
        return ""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micros(value: object) -> int:
    """A ledger's time as microseconds since the epoch, 0 for none."""
    moment = _moment(value)
    return 0 if moment is None else (moment - _EPOCH) // timedelta(microseconds=1)
