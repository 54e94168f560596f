"""Words of the wiring: what a plugin version, a rule, a source root and a worker may be."""

from collections.abc import Mapping
from enum import StrEnum

from casparian_flow.domain.errors import require


class PluginStatus(StrEnum):
    """Where a deployed plugin version stands."""

    PENDING = "PENDING"
    """Recorded by another program; no check has seen it."""
    STAGING = "STAGING"
    """Checked as far as reading goes; a worker is to try it before it gets jobs."""
    ACTIVE = "ACTIVE"
    """Jobs run with it; at most one version of a plugin."""
    SUPERSEDED = "SUPERSEDED"
    """Another version took its place; a rollback makes it active again."""
    REJECTED = "REJECTED"
    """A check or its trial refused it; `validation_error` tells why."""


VERSION_STEPS: Mapping[PluginStatus, frozenset[PluginStatus]] = {
    PluginStatus.PENDING: frozenset({PluginStatus.STAGING, PluginStatus.REJECTED}),
    PluginStatus.STAGING: frozenset(
        {PluginStatus.ACTIVE, PluginStatus.SUPERSEDED, PluginStatus.REJECTED}
    ),
    PluginStatus.ACTIVE: frozenset({PluginStatus.SUPERSEDED}),
    PluginStatus.SUPERSEDED: frozenset({PluginStatus.ACTIVE}),
    PluginStatus.REJECTED: frozenset(),
}
"""Where a version may go from where it stands."""


def check_step(old: PluginStatus, new: PluginStatus) -> None:
    """Raises InvariantError for a step that no version may take."""
    require(new in VERSION_STEPS[old], f"a plugin version goes not from {old} to {new}")


class TrialOutcome(StrEnum):
    """What a worker says of a plugin version that it tries."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    """The version is at fault."""
    AGAIN = "again"
    """The version is not at fault: a network or the worker's disk is, so it is tried again."""


class Origin(StrEnum):
    """Who made a row of the wiring; a deploy never changes what a user made."""

    AUTO = "auto"
    USER = "user"


class SourceType(StrEnum):
    LOCAL = "local"
    MANAGED = "managed"
    """A folder that this system fills itself."""


class WorkerStatus(StrEnum):
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"
    GONE = "GONE"
