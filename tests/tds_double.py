"""A server that speaks enough TDS for pymssql, with SQLite behind it.

It is the wire that is real here: packets, pre-login, login, SQL batches, result sets, errors and
bulk copy, as in [MS-TDS]. The statements that the sink sends are recorded as they came, and a
small translation lets SQLite carry them out, so that transactions, locks and duplicate keys are
those of an engine. What is not translated is answered with error 102, as SQL Server does for
what it cannot parse.
"""

import json
import re
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SQL_BATCH, TABULAR, ATTENTION, BULK, LOGIN7, PRELOGIN = 0x01, 0x04, 0x06, 0x07, 0x10, 0x12
COLMETADATA, ERROR, LOGINACK, ROW, ENVCHANGE, DONE = 0x81, 0xAA, 0xAD, 0xD1, 0xE3, 0xFD
INTN, BITN, FLTN, VARBINARY, NVARCHAR = 0x26, 0x68, 0x6D, 0xA5, 0xE7
MAX = 0xFFFF
PASSWORD = "secret"
COLLATION = bytes([0x09, 0x04, 0xD0, 0x00, 0x34])
SYNTAX_ERROR, DUPLICATE_KEY, LOGIN_FAILED = 102, 2627, 18456


class SqlError(Exception):
    def __init__(self, number: int, message: str, severity: int = 16) -> None:
        super().__init__(message)
        self.number = number
        self.severity = severity


@dataclass
class Column:
    name: str
    type: str
    """bigint, int, float, bit, varbinary or nvarchar, without a length."""
    long: bool = False
    """Whether the length is (max)."""


@dataclass
class Result:
    columns: list[Column] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    count: int | None = None


@dataclass
class TdsDouble:
    """The double, seen from the test. It is a process of its own: pymssql waits for the answers
    to bulk copy without letting go of the interpreter's lock.

    Attributes:
        folder: what the two share: the engine's file, the statements, and orders to fail.
        port: where it listens, on loopback.
    """

    folder: Path
    port: int = 0

    @property
    def statements(self) -> list[str]:
        """Every SQL batch so far, but for the SETs of the driver's own login."""
        path = self.folder / "statements"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def fail(self, piece: str, number: int) -> None:
        """Answer the next statement that has `piece` in it with this error; 0 carries it out
        and cuts the connection before the answer."""
        (self.folder / "fault").write_text(json.dumps([piece, number]))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        db = sqlite3.connect(self.folder / "server.sqlite3")
        try:
            return db.execute(sql).fetchall()
        finally:
            db.close()


@contextmanager
def tds_double(folder: Path) -> Iterator[TdsDouble]:
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield TdsDouble(folder, int(server.stdout.readline()))
        finally:
            server.kill()


def main(folder: Path) -> None:
    """Serve until killed; the port is the first line of output."""
    db = sqlite3.connect(folder / "server.sqlite3")
    db.execute("PRAGMA journal_mode=WAL")
    db.close()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            Session(self.request, folder).serve()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


class Session:
    """One connection."""

    def __init__(self, peer: socket.socket, folder: Path) -> None:
        self._peer = peer
        self._folder = folder
        self._bulk_table = ""

    def serve(self) -> None:
        self._db = sqlite3.connect(
            self._folder / "server.sqlite3", isolation_level=None, timeout=10
        )
        try:
            while True:
                kind, message = self._receive()
                if not self._answer(kind, message):
                    return
        except (ConnectionError, EOFError):
            pass
        finally:
            self._db.close()

    def _answer(self, kind: int, message: bytes) -> bool:
        if kind == PRELOGIN:
            self._send(prelogin())
        elif kind == LOGIN7:
            return self._login(message)
        elif kind == SQL_BATCH:
            return self._batch(message)
        elif kind == BULK:
            self._send(done(self._bulk(message)))
        elif kind == ATTENTION:
            self._send(struct.pack("<BHHQ", DONE, 0x20, 0, 0))
        else:
            raise ConnectionError(f"packet type {kind}")
        return True

    def _receive(self) -> tuple[int, bytes]:
        message = b""
        while True:
            kind, status, length = struct.unpack(">BBH", self._exactly(4))
            self._exactly(4)
            message += self._exactly(length - 8)
            if status & 1:
                return kind, message

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._peer.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _send(self, tokens: bytes) -> None:
        size = 4096 - 8
        pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)] or [b""]
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces)
            header = struct.pack(">BBHHBB", TABULAR, last, len(piece) + 8, 0, number & 255, 0)
            self._peer.sendall(header + piece)

    def _login(self, message: bytes) -> bool:
        offset, length = struct.unpack_from("<HH", message, 44)
        hidden = message[offset : offset + 2 * length]
        swapped = bytes(((b ^ 0xA5) << 4 | (b ^ 0xA5) >> 4) & 0xFF for b in hidden)
        if swapped.decode("utf-16le") != PASSWORD:
            self._send(error_token(SqlError(LOGIN_FAILED, "Login failed.", 14)) + done(None, True))
            return False
        name = varchar8("Microsoft SQL Server")
        body = bytes([1, 0x74, 0, 0, 4]) + name + bytes([16, 0, 0, 0])
        database = bytes([1]) + varchar8("casparian") + varchar8("master")
        packet_size = bytes([4]) + varchar8("4096") + varchar8("4096")
        tokens = b"".join(
            struct.pack("<BH", ENVCHANGE, len(change)) + change
            for change in (database, packet_size)
        )
        self._send(tokens + struct.pack("<BH", LOGINACK, len(body)) + body + done(None))
        return True

    def _batch(self, message: bytes) -> bool:
        (headers,) = struct.unpack_from("<I", message)
        sql = message[headers:].decode("utf-16le").strip()
        if not re.match(r"(?i)set |use ", sql) or "XACT_ABORT" in sql:
            with (self._folder / "statements").open("a") as file:
                file.write(json.dumps(sql) + "\n")
        fault = self._fault(sql)
        try:
            if fault:
                raise SqlError(fault, f"provoked error {fault}")
            result = self._execute(sql)
        except SqlError as error:
            if self._db.in_transaction:  # SET XACT_ABORT ON
                self._db.execute("ROLLBACK")
            self._send(error_token(error) + done(None, True))
            return True
        if fault == 0:
            return False
        self._send(result_tokens(result) + done(result.count))
        return True

    def _fault(self, sql: str) -> int | None:
        path = self._folder / "fault"
        if not path.exists():
            return None
        piece, number = json.loads(path.read_text())
        if piece not in sql:
            return None
        path.unlink()
        return int(number)

    # -- the engine

    def _execute(self, sql: str) -> Result:
        for pattern, action in self._actions():
            match = re.match(pattern, sql, re.IGNORECASE | re.DOTALL)
            if match:
                return action(match)
        return self._run(sql)

    def _actions(self) -> list[tuple[str, Any]]:
        name = r"N?'([^']*)'"
        return [
            (r"set fmtonly on\s+select \* from (\S+) set fmtonly off", self._metadata),
            (r"(set|use) ", lambda m: Result()),
            (r"begin tran", lambda m: self._run("BEGIN IMMEDIATE")),
            (r"commit tran", lambda m: self._run("COMMIT")),
            (r"if @@trancount > 0 rollback", self._rollback),
            (rf"if object_id\({name}, N'U'\) is null (create table .*)", self._create_missing),
            (rf"if object_id\({name}, N'U'\) is not null (drop table .*)", self._drop_present),
            (rf"select column_name, data_type .* = {name} and .* = {name}", self._columns),
            (rf"select table_name from .* = {name} and", self._tables),
            (rf"select column_id, type_name.*object_id\({name}\)", self._column_types),
            (r"insert bulk (\S+) ?\(", self._insert_bulk),
            (r"alter table (\S+) alter column (\w+) (\S+) null", self._change_type),
        ]

    def _run(self, sql: str) -> Result:
        try:
            cursor = self._db.execute(translated(sql))
            rows = cursor.fetchall()
        except sqlite3.IntegrityError as error:
            raise SqlError(DUPLICATE_KEY, "Violation of PRIMARY KEY constraint", 14) from error
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise SqlError(1222, "Lock request time out period exceeded") from error
            raise SqlError(SYNTAX_ERROR, f"{error}: {sql}") from error
        columns = []
        for position, described in enumerate(cursor.description or ()):
            numbers = all(isinstance(row[position], int | None) for row in rows)
            columns.append(Column(described[0], "bigint" if numbers else "nvarchar"))
        return Result(columns, rows, cursor.rowcount if not columns else len(rows))

    def _rollback(self, _: re.Match[str]) -> Result:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        return Result()

    def _table_columns(self, table: str) -> list[Column]:
        rows = self._db.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
        return [
            Column(name, re.split(r"[( ]", kind)[0].lower(), long="_max" in kind)
            for name, kind in rows
        ]

    def _create_missing(self, match: re.Match[str]) -> Result:
        return Result() if self._table_columns(bare(match[1])) else self._run(match[2])

    def _drop_present(self, match: re.Match[str]) -> Result:
        return self._run(match[2]) if self._table_columns(bare(match[1])) else Result()

    def _columns(self, match: re.Match[str]) -> Result:
        found = self._table_columns(f"{match[1]}.{match[2]}")
        kinds = [Column("COLUMN_NAME", "nvarchar"), Column("DATA_TYPE", "nvarchar")]
        return Result(kinds, [(c.name, c.type.removesuffix("_max")) for c in found])

    def _tables(self, match: re.Match[str]) -> Result:
        rows = self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = [name.partition(".")[2] for (name,) in rows if name.startswith(match[1] + ".")]
        stages = [(name,) for name in names if name.startswith("_cf_stage_")]
        return Result([Column("TABLE_NAME", "nvarchar")], stages)

    def _column_types(self, match: re.Match[str]) -> Result:
        kinds = [
            Column("column_id", "int"),
            Column("system_type_name", "nvarchar"),
            Column("is_identity", "bit"),
        ]
        found = self._table_columns(bare(match[1]))
        return Result(kinds, [(i, c.type.removesuffix("_max"), 0) for i, c in enumerate(found, 1)])

    def _metadata(self, match: re.Match[str]) -> Result:
        return Result(self._table_columns(bare(match[1])))

    def _change_type(self, match: re.Match[str]) -> Result:
        table, column, kind = bare(match[1]), match[2], translated(match[3])
        old = dict(self._db.execute("SELECT name, type FROM pragma_table_info(?)", (table,)))
        self._db.execute("PRAGMA writable_schema = ON")
        self._db.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ?",
            (f"{column} {old[column]}", f"{column} {kind}", table),
        )
        self._db.execute("PRAGMA writable_schema = RESET")
        return Result()

    def _insert_bulk(self, match: re.Match[str]) -> Result:
        self._bulk_table = bare(match[1])
        return Result()

    def _bulk(self, message: bytes) -> int:
        rows = BulkReader(message).rows()
        if rows:
            markers = ", ".join("?" * len(rows[0]))
            self._db.executemany(f'INSERT INTO "{self._bulk_table}" VALUES ({markers})', rows)
        return len(rows)


def bare(name: str) -> str:
    """`[dbo].[t]` as the double's table name, `dbo.t`."""
    return name.replace("[", "").replace("]", "")


def translated(sql: str) -> str:
    """Our T-SQL for SQLite, outside of text literals."""
    pieces = re.split(r"('(?:[^']|'')*')", sql)
    return "".join(p if n % 2 else _translated(p) for n, p in enumerate(pieces))


def _translated(sql: str) -> str:
    sql = re.sub(r"\[(\w+)\]\.\[([^]]+)\]", r'"\1.\2"', sql)
    sql = re.sub(r"\[((?:[^]]|\]\])+)\]", lambda m: '"' + m[1].replace("]]", "]") + '"', sql)
    sql = re.sub(r"\bN$", "", sql)
    sql = re.sub(r"(nvarchar|varbinary)\(max\)", r"\1_max", sql)
    sql = re.sub(r"SUBSTRING\((\w+), 2, DATALENGTH\(\1\)\)", r"substr(\1, 2)", sql)
    sql = re.sub(r"CAST\(STUFF\((\w+), 1, 1, N?$", r"iif(1, substr(\1, 2), ", sql)
    sql = re.sub(r"STUFF\((\w+), 1, 1, N?$", r"iif(1, substr(\1, 2), ", sql)
    sql = re.sub(r"^\) AS [a-z0-9]+\(?[\d,]*\)?\)?", ")", sql)
    return re.sub(r"(ALTER TABLE \S+) ADD ", r"\1 ADD COLUMN ", sql)


# -- tokens


def prelogin() -> bytes:
    version, encryption = bytes([16, 0, 0, 0, 0, 0]), bytes([2])  # encryption: not supported
    head = struct.pack(">BHHBHHB", 0, 11, 6, 1, 17, 1, 0xFF)
    return head + version + encryption


def varchar8(text: str) -> bytes:
    return bytes([len(text)]) + text.encode("utf-16le")


def done(count: int | None, failed: bool = False) -> bytes:
    status = (0x02 if failed else 0) | (0x10 if count is not None else 0)
    return struct.pack("<BHHQ", DONE, status, 0, max(count or 0, 0))


def error_token(error: SqlError) -> bytes:
    text = str(error)
    body = struct.pack("<iBBH", error.number, 1, error.severity, len(text))
    body += text.encode("utf-16le") + varchar8("double") + varchar8("") + struct.pack("<i", 1)
    return struct.pack("<BH", ERROR, len(body)) + body


def result_tokens(result: Result) -> bytes:
    if not result.columns:
        return b""
    tokens = struct.pack("<BH", COLMETADATA, len(result.columns))
    for column in result.columns:
        tokens += struct.pack("<IH", 0, 1) + type_info(column) + varchar8(column.name)
    for row in result.rows:
        tokens += bytes([ROW])
        for column, value in zip(result.columns, row, strict=True):
            tokens += encoded(column, value)
    return tokens


def type_info(column: Column) -> bytes:
    base = column.type.removesuffix("_max")
    if base in ("bigint", "int"):
        return bytes([INTN, 8])
    if base == "bit":
        return bytes([BITN, 1])
    if base == "float":
        return bytes([FLTN, 8])
    length = MAX if column.long else 8000
    if base == "varbinary":
        return struct.pack("<BH", VARBINARY, length)
    return struct.pack("<BH", NVARCHAR, length) + COLLATION


def encoded(column: Column, value: Any) -> bytes:
    if column.type in ("bigint", "int"):
        return b"\0" if value is None else struct.pack("<Bq", 8, value)
    if column.type == "bit":
        return b"\0" if value is None else struct.pack("<BB", 1, value)
    if value is None:
        return struct.pack("<H", 0xFFFF)
    raw = str(value).encode("utf-16le")
    return struct.pack("<H", len(raw)) + raw


class BulkReader:
    """Reads what bulk copy sends: column metadata, rows, DONE."""

    def __init__(self, message: bytes) -> None:
        self._data = message
        self._at = 0

    def rows(self) -> list[tuple[Any, ...]]:
        columns: list[tuple[int, int]] = []
        rows = []
        while self._at < len(self._data):
            token = self._take("<B")
            if token == COLMETADATA:
                columns = [self._column() for _ in range(self._take("<H"))]
            elif token == ROW:
                rows.append(tuple(self._value(*column) for column in columns))
            elif token == DONE:
                break
            else:
                raise ConnectionError(f"bulk token {token:#x}")
        return rows

    def _take(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def _bytes(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _column(self) -> tuple[int, int]:
        self._bytes(6)  # user type, flags
        kind = self._take("<B")
        length = self._take("<H") if kind in (VARBINARY, NVARCHAR) else self._take("<B")
        if kind == NVARCHAR:
            self._bytes(5)
        self._bytes(2 * self._take("<B"))
        return kind, length

    def _value(self, kind: int, length: int) -> Any:
        if kind in (VARBINARY, NVARCHAR):
            raw = self._long() if length == MAX else self._short()
            return raw.decode("utf-16le") if raw is not None and kind == NVARCHAR else raw
        raw = self._bytes(self._take("<B"))
        if not raw:
            return None
        if kind == FLTN:
            return struct.unpack("<d", raw)[0]
        return int.from_bytes(raw, "little", signed=kind == INTN)

    def _short(self) -> bytes | None:
        count = self._take("<H")
        return None if count == 0xFFFF else self._bytes(count)

    def _long(self) -> bytes | None:
        if self._take("<Q") == 0xFFFFFFFFFFFFFFFF:
            return None
        raw = b""
        while count := self._take("<I"):
            raw += self._bytes(count)
        return raw


if __name__ == "__main__":
    main(Path(sys.argv[1]))
