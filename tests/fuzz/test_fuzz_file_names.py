"""Whatever a file may be called on Linux: noticed, versioned, run and published like any other."""

import os
import sqlite3
from pathlib import Path

from acceptance_kit import make_flow
from fuzzing import FRAMES, Fuzz

NAMES = max(60, min(2_000, FRAMES // 1_500))
NAME_BYTES_MAX = 255

PLUGIN = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*", topic="seen", sinks={"seen": ["parquet://seen", "sqlite://seen.sqlite3"]}
)

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input("r") as file:
            self.publish("seen", [{"mark": file.read()}])
"""
FIXED = (
    b"new\nline", b"tab\there", b"carriage\rreturn", b"\x1b[31mred", b"latin-1 \xe9",
    b"\xff\xfe\xfd", b"\xed\xa0\x80", b"a" * 255, "ä".encode() * 127, b" leading and trailing ",
    b"-rf", b"--help",
    b"~", b"$HOME", b"`id`", b"$(id)", b"'; DROP TABLE cf_file_location; --", b'"quoted"', b"%s%n",
    b"%2e%2e%2f", b"\\", b"a\\b", b"*", b"?", b"[x", b"!not", b"#comment", b"{a,b}", b"a:b", b"a|b",
    "e\u0301".encode(), "\u00e9".encode(), "\u202egnp.exe".encode(), "𝕏".encode() * 60, b"con",
    b"a.csv?table=x", b"\x01\x02\x7f", b"_cf_job_id", b"replace", "\ufeffbom".encode(),
)  # fmt: skip


def names(fuzz: Fuzz) -> list[bytes]:
    """Distinct, in the order drawn; none is one that Scout leaves out by default."""
    found = dict.fromkeys(FIXED)
    while len(found) < NAMES:
        raw = fuzz.bytes_of(fuzz.rng.choice(FIXED)) + fuzz.rng.choice((b"", b".csv", b"\n"))
        raw = raw.replace(b"/", b"").replace(b"\0", b"")[:NAME_BYTES_MAX]
        if raw and not raw.startswith(b".") and not raw.endswith(b".tmp"):
            found[raw] = None
    return list(found)


def test_files_of_any_name_go_all_the_way_through(tmp_path: Path) -> None:
    flow = make_flow(tmp_path / "flow")
    flow.publish("seen", PLUGIN)
    fuzz = Fuzz("file names")
    expected = []
    for number, raw in enumerate(names(fuzz)):
        folder = flow.inbox
        if number % 7 == 0:
            folder /= os.fsdecode(fuzz.rng.choice(FIXED)[:200] + b" folder")
            folder.mkdir(exist_ok=True)
        (folder / os.fsdecode(raw)).write_text(f"mark {number:05}")
        expected.append(f"mark {number:05}")
    flow.run("source", "add", str(flow.inbox))
    flow.work_off()
    assert sorted(flow.table("seen")["mark"].to_pylist()) == expected
    with sqlite3.connect(flow.folder / "output" / "seen.sqlite3") as database:
        rows = database.execute("SELECT mark FROM seen").fetchall()
    database.close()
    assert sorted(row[0] for row in rows) == expected
    assert flow.counts() == {"COMPLETED": len(expected)}
    listed = flow.json("files", "--limit", "5000")
    assert len(listed) == len(expected)
    flow.run("files", "--limit", "5000")
    for row in listed[:10]:
        assert len(flow.json("versions", str(flow.inbox / row["rel_path"]))) == 1
