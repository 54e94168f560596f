"""From a URI to its sink."""

from collections.abc import Callable, Mapping
from typing import Final

from casparian_flow.domain.outputs import SinkAddress, parse_sink_uri
from casparian_worker.sinks.base import Sink, SinkEnvironment
from casparian_worker.sinks.csv import csv_sink
from casparian_worker.sinks.duckdb import DuckDbSink
from casparian_worker.sinks.mssql import MssqlSink
from casparian_worker.sinks.parquet import parquet_sink
from casparian_worker.sinks.sqlite import SqliteSink

_SINKS: Final[Mapping[str, Callable[[SinkAddress, SinkEnvironment], Sink]]] = {
    "parquet": parquet_sink,
    "csv": csv_sink,
    "sqlite": SqliteSink,
    "duckdb": DuckDbSink,
    "mssql": MssqlSink,
}


def sink_for(uri: str, env: SinkEnvironment) -> Sink:
    """The sink of a URI.

    Raises:
        UsageError: the URI is none (domain.outputs.parse_sink_uri).
    """
    address = parse_sink_uri(uri)
    return _SINKS[address.scheme](address, env)
