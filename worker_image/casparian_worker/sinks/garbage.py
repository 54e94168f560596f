"""Stages that nobody will publish.

Files in the output root are found by looking there. Staging tables are on the server, so they are
found through the sinks that the worker knows. What may go is the Sentinel's to say (STAGES,
DISCARD): age alone never decides.
"""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from casparian_flow.domain.outputs import parse_sink_uri
from casparian_worker.sinks.base import SinkEnvironment
from casparian_worker.sinks.files import delete_stage_files, list_stage_files
from casparian_worker.sinks.registry import sink_for


def list_stages(env: SinkEnvironment, uris: Iterable[str] = ()) -> set[str]:
    """Tokens that have a stage somewhere.

    Args:
        uris: sinks whose own staging places are looked at, too (those of mssql://).

    Raises:
        SinkError: a place could not be looked at.
    """
    tokens = set(list_stage_files(env.root))
    for uri in _with_own_place(uris):
        tokens |= sink_for(uri, env).list_stages()
    return tokens


def delete_stages(env: SinkEnvironment, tokens: AbstractSet[str], uris: Iterable[str] = ()) -> int:
    """Delete the stages of these tokens; returns how many files and tables went.

    Raises:
        SinkError: one could not be deleted.
    """
    deleted = delete_stage_files(env.root, tokens)
    for uri in _with_own_place(uris):
        deleted += sink_for(uri, env).delete_stages(tokens)
    return deleted


def _with_own_place(uris: Iterable[str]) -> list[str]:
    return sorted({uri for uri in uris if parse_sink_uri(uri).scheme == "mssql"})
