"""The wire between Sentinel and worker (its grammar is protocol.md), and the API's types.

The types of the API are loaded when they are first named: the pure parts import this package
too, and do without msgspec.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casparian_flow.protocol.http_types import (
        Approval,
        ApprovalBinding,
        ApprovalOperation,
        ApprovalStatus,
        Event,
        EventType,
        HttpJob,
        HttpJobStatus,
        HttpJobType,
        JobProgress,
        JobResult,
        OutputInfo,
        ViolationSummary,
        ViolationType,
    )

__all__ = [
    "Approval",
    "ApprovalBinding",
    "ApprovalOperation",
    "ApprovalStatus",
    "Event",
    "EventType",
    "HttpJob",
    "HttpJobStatus",
    "HttpJobType",
    "JobProgress",
    "JobResult",
    "OutputInfo",
    "ViolationSummary",
    "ViolationType",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("casparian_flow.protocol.http_types"), name)
