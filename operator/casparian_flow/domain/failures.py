"""Why an attempt failed: stable names for machines, one line of meaning for people."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    PLUGIN_ERROR = "plugin_error"
    PLUGIN_INVALID = "plugin_invalid"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    EXITED = "exited"
    TRUNCATED = "truncated"
    PROTOCOL = "protocol"
    RESERVED_COLUMN = "reserved_column"
    CONTRACT = "contract"
    QUARANTINE_LIMIT = "quarantine_limit"
    SINK = "sink"
    SINK_CONFLICT = "sink_conflict"
    UNTRUSTED = "untrusted"
    ENVIRONMENT = "environment"
    SANDBOX = "sandbox"
    DISK_FULL = "disk_full"
    LEASE_LOST = "lease_lost"
    SOURCE_CHANGED = "source_changed"
    SOURCE_MISSING = "source_missing"
    SOURCE_UNREADABLE = "source_unreadable"
    SUPERSEDED = "superseded"
    DUPLICATE_OUTPUT = "duplicate_output"
    PLUGIN_CHANGED = "plugin_changed"
    CANCELLED = "cancelled"
    BUSY = "busy"
    NEED_PLUGIN = "need_plugin"
    DRAINING = "draining"
    STALE_TOKEN = "stale_token"
    ABANDONED = "abandoned"
    WORKER_ERROR = "worker_error"


@dataclass(frozen=True, slots=True)
class ReasonRule:
    meaning: str
    transient: bool
    """Whether another attempt on the same bytes may end differently."""


RULES: dict[Reason, ReasonRule] = {
    Reason.PLUGIN_ERROR: ReasonRule("the plugin raised an exception", True),
    Reason.PLUGIN_INVALID: ReasonRule("the plugin cannot be loaded", False),
    Reason.TIMEOUT: ReasonRule("the plugin ran longer than the job timeout", True),
    Reason.OUT_OF_MEMORY: ReasonRule("the plugin exceeded its memory limit", True),
    Reason.CRASHED: ReasonRule("the plugin process was ended by a signal", True),
    Reason.EXITED: ReasonRule("the plugin ended its own process", True),
    Reason.TRUNCATED: ReasonRule("the plugin's output stopped without its end marker", True),
    Reason.PROTOCOL: ReasonRule("the plugin process broke the bridge protocol", False),
    Reason.RESERVED_COLUMN: ReasonRule("the plugin emitted a column reserved for lineage", False),
    Reason.CONTRACT: ReasonRule("the output does not fit the topic's contract", False),
    Reason.QUARANTINE_LIMIT: ReasonRule("more bad rows than the quarantine policy allows", False),
    Reason.SINK: ReasonRule("a sink failed", True),
    Reason.SINK_CONFLICT: ReasonRule("the sink holds other data under this output's name", False),
    Reason.UNTRUSTED: ReasonRule("the worker's trust rules refuse the plugin's code", False),
    Reason.ENVIRONMENT: ReasonRule("the plugin's environment could not be made", False),
    Reason.SANDBOX: ReasonRule("the sandbox refused or could not be set up", False),
    Reason.DISK_FULL: ReasonRule("no space left for scratch or output", True),
    Reason.LEASE_LOST: ReasonRule("the worker stopped answering while it ran the job", True),
    Reason.SOURCE_CHANGED: ReasonRule("the file's bytes are no longer this version's", False),
    Reason.SOURCE_MISSING: ReasonRule("the file is no longer at its path", False),
    Reason.SOURCE_UNREADABLE: ReasonRule("the file could not be read", True),
    Reason.SUPERSEDED: ReasonRule("a newer version's result is already in place", False),
    Reason.DUPLICATE_OUTPUT: ReasonRule("this output was already published by another job", False),
    Reason.PLUGIN_CHANGED: ReasonRule("the plugin is not the one this job was made for", False),
    Reason.CANCELLED: ReasonRule("cancelled on request", False),
    Reason.BUSY: ReasonRule("the worker had no free slot in time", True),
    Reason.NEED_PLUGIN: ReasonRule("the worker had not received the plugin's code", True),
    Reason.DRAINING: ReasonRule("the worker is shutting down", True),
    Reason.STALE_TOKEN: ReasonRule("the attempt is no longer the job's current one", False),
    Reason.ABANDONED: ReasonRule("an operator gave the granted outputs up", False),
    Reason.WORKER_ERROR: ReasonRule("the worker itself failed", True),
}
