"""Words of the wiring: what a plugin version, a rule, a source root and a worker may be."""

from enum import StrEnum


class PluginStatus(StrEnum):
    """Where a deployed plugin version stands."""

    PENDING = "PENDING"
    """Recorded, not yet checked."""
    STAGING = "STAGING"
    """Being checked."""
    ACTIVE = "ACTIVE"
    """Jobs run with it; at most one version of a plugin."""
    SUPERSEDED = "SUPERSEDED"
    """A later version took its place."""
    REJECTED = "REJECTED"
    """A check refused it; `validation_error` tells why."""


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
