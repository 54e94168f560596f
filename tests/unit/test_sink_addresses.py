"""Sink URIs as users write them, and the keys that are made from them."""

from itertools import product
from typing import Any

import pytest

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.outputs import (
    SCHEMES,
    SinkMode,
    SinkSpec,
    output_key,
    parse_mode,
    parse_sink_uri,
    sink_id,
    sinks_for,
    slice_key,
)


@pytest.mark.parametrize(
    ("uri", "path", "table"),
    [
        ("parquet://sales/daily", "sales/daily", ""),
        ("parquet://sales//./daily/", "sales/daily", ""),
        ("csv://one", "one", ""),
        ("sqlite:///var/db/x.sqlite3", "/var/db/x.sqlite3", ""),
        ("sqlite:////var//db/x.sqlite3", "/var/db/x.sqlite3", ""),
        ("sqlite://db/x.sqlite3?table=sales", "db/x.sqlite3", "sales"),
        ("duckdb://db/x.duckdb", "db/x.duckdb", ""),
        ("mssql://dbo.sales", "dbo.sales", ""),
        ("parquet://caf%C3%A9", "café", ""),
    ],
)
def test_a_sink_uri_is_read_as_users_write_it(uri: str, path: str, table: str) -> None:
    address = parse_sink_uri(uri)
    assert (address.path, address.table) == (path, table)
    assert parse_sink_uri(address.uri) == address


def test_options_are_read_and_do_not_change_where_the_rows_go() -> None:
    address = parse_sink_uri("parquet://sales?compression=gzip&mode=replace")
    assert (address.compression, address.mode) == ("gzip", SinkMode.REPLACE)
    assert address.identity == parse_sink_uri("parquet://sales").identity
    assert parse_sink_uri("mssql://sales?chunksize=500").chunksize == 500


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("parquet://../outside", "leaves the output root"),
        ("parquet://a/../../outside", "leaves the output root"),
        ("parquet://a/%2e%2e/%2e%2e/outside", "leaves the output root"),
        ("sqlite:///../etc/passwd", "leaves the output root"),
        ("sqlite://db/../../x", "leaves the output root"),
        ("parquet://", "names no path"),
        ("parquet://.stage/x", "begins with a dot"),
        ("parquet://a/.slices", "begins with a dot"),
        ("parquet://%00", "control characters"),
        ("parquet://a\nb", "control characters"),
        ("parquet://%ff", "not UTF-8"),
        ("parquet://a\udcff", "not valid Unicode"),
        ("parquet://" + "a" * 2000, "too long"),
        ("s3://bucket/x", "unknown scheme 's3'"),
        ("sales.parquet", "unknown scheme"),
        ("parquet://a?compression=zip", "unknown compression 'zip'"),
        ("parquet://a?table=t", "unknown option 'table'"),
        ("parquet://a?mode=append&mode=error", "an option twice"),
        ("parquet://a?mode", "not key=value"),
        ("parquet://a?mode=upsert", "unknown sink mode"),
        ("sqlite://db?table=a;drop", "no plain identifier"),
        ("mssql://a.b.c", "mssql://schema.table"),
        ("mssql://drop table", "mssql://schema.table"),
        ("mssql://t?chunksize=0", "1 to 1000000"),
        ("mssql://t?chunksize=\u0661", "1 to 1000000"),
    ],
)
def test_a_sink_uri_that_cannot_be_used_is_refused_in_words(uri: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sink_uri(uri)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mssql://sa:hunter2@server/sales",
        "postgres://sa:hunter2@server/sales",
        "postgres://sa:hun@hunter2@server/sales",
        "parquet://a?password=hunter2",
        "mssql://sa:hunter2@server\n/sales",
    ],
)
def test_a_password_in_a_sink_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sink_uri(uri)
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_no_two_places_share_an_identity() -> None:
    uris = [f"{scheme}://{path}" for scheme, path in product(SCHEMES, ("a", "b"))]
    uris += ["sqlite://a?table=t", "sqlite://a?table=u", "sqlite:///a", "duckdb://a?table=t"]
    assert len({parse_sink_uri(uri).identity for uri in uris}) == len(uris)


def test_an_output_key_tells_everything_apart_that_makes_a_result() -> None:
    parts: list[Any] = ["1edeadbe", 1, "artifact", "parameters", "topic", "sink", 0]
    others: list[Any] = ["2edeadbe", 2, "artifac", "tparameters", "topi", "csink", 1]
    keys = {output_key(*parts)}
    for changed, other in enumerate(others):
        keys.add(output_key(*parts[:changed], other, *parts[changed + 1 :]))
    assert len(keys) == 1 + len(parts)
    # What leaves one part and joins the next makes another key.
    assert output_key("1e", 1, "ab", "c", "t", "s", 0) != output_key(
        "1e", 1, "a", "bc", "t", "s", 0
    )


def test_a_slice_is_one_file_under_one_plugin_topic_and_sink() -> None:
    sink = sink_id(parse_sink_uri("parquet://sales"), "root", SinkMode.REPLACE)
    assert slice_key("1e", 1, "p", "t", sink) == slice_key("1e", 1, "p", "t", sink)
    assert slice_key("1e", 1, "p", "t", sink) != slice_key("1e", 2, "p", "t", sink)
    assert sink != sink_id(parse_sink_uri("parquet://sales"), "other", SinkMode.REPLACE)
    assert sink != sink_id(parse_sink_uri("parquet://sales"), "root", SinkMode.APPEND)


def test_a_topic_goes_to_its_own_sinks_else_the_wildcards_else_to_parquet() -> None:
    own, wild = SinkSpec("sales", "csv://own"), SinkSpec("*", "csv://rest")
    assert sinks_for("sales", [own, wild]) == [own]
    assert sinks_for("other", [own, wild]) == [wild]
    assert [s.uri for s in sinks_for("other", [own])] == ["parquet://other"]


def test_only_the_three_modes_are_known() -> None:
    assert [parse_mode(mode) for mode in ("append", "replace", "error")] == list(SinkMode)
    with pytest.raises(UsageError, match="unknown sink mode 'upsert'"):
        parse_mode("upsert")
