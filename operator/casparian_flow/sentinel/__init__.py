"""The control plane's heart: broker, its shells, and the calls others may make.

What is exported here is loaded when it is first named, so that whoever imports only the broker or
the API needs neither zmq nor duckdb.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casparian_flow.db.api_storage import ApiStorage
    from casparian_flow.db.job_queue import DbConnection, JobDetails, JobQueue
    from casparian_flow.sentinel.server import Sentinel, SentinelConfig

_HOMES = {
    "ApiStorage": "casparian_flow.db.api_storage",
    "DbConnection": "casparian_flow.db.job_queue",
    "JobDetails": "casparian_flow.db.job_queue",
    "JobQueue": "casparian_flow.db.job_queue",
    "Sentinel": "casparian_flow.sentinel.server",
    "SentinelConfig": "casparian_flow.sentinel.server",
}

__all__ = ["ApiStorage", "DbConnection", "JobDetails", "JobQueue", "Sentinel", "SentinelConfig"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
