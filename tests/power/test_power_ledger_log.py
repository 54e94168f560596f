"""The ledger's write-ahead log cut, zeroed and flipped wherever power or a disk might do so."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import power_cuts
import pytest
from power_cuts import Case, History, Kind, judge, record

SEED = int(os.environ.get("CASPARIAN_POWER_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
CUTS = int(os.environ.get("CASPARIAN_POWER_CUTS", "1000"))
PARTS = 2
SECONDS_PER_CUT = 2.0


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.mark.timeout(120 + CUTS * SECONDS_PER_CUT)
def test_nothing_acknowledged_is_lost_wherever_the_log_is_cut_zeroed_or_flipped(
    history: History, tmp_path: Path
) -> None:
    folder = tmp_path / "cuts"
    history.save(folder)
    print(f"CASPARIAN_POWER_SEED={SEED}, {CUTS} cases over a log of {len(history.wal)} bytes")
    tests = Path(power_cuts.__file__).parent
    command = [sys.executable, power_cuts.__file__, str(folder), str(SEED), str(CUTS)]
    children = [
        subprocess.Popen(
            [*command, str(part), str(PARTS)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tests)},
        )
        for part in range(PARTS)
    ]
    met: Counter[str] = Counter()
    wrong: list[str] = []
    for child in children:
        found = json.loads(child.communicate()[0])
        met.update(found["met"])
        wrong += found["wrong"]
    print(dict(met))
    assert not wrong, (SEED, wrong)
    assert met.total() == CUTS
    assert sum(n for kind, n in met.items() if kind.startswith("CUT")) >= CUTS // 2


def test_each_bit_of_the_log_s_first_bytes_matters_or_is_harmless(
    history: History, tmp_path: Path
) -> None:
    """DuckDB protects the log's own header by no checksum."""
    last = len(history.truths) - 1
    wrong = []
    for bit in range(8 * 8):
        flipped = bytearray(history.wal)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged = History(history.file, bytes(flipped), history.marks, history.truths)
        case = Case(Kind.SHORT, last, len(flipped), 0)  # the whole log, as it is
        verdict = judge(damaged, case, tmp_path / "one", thorough=bit % 16 == 0)
        if verdict.wrong:
            wrong.append((bit, verdict))
    assert not wrong


def test_the_judge_sees_a_silent_loss(history: History, tmp_path: Path) -> None:
    """Without the mark the same log opens as if nothing were missing: that is what it is for."""
    last = len(history.truths) - 1
    unmarked = History(
        history.file, history.wal, [history.marks[0]] * len(history.marks), history.truths
    )
    case = Case(Kind.SHORT, last, history.truths[2].wal_bytes, 0)
    assert judge(history, case, tmp_path / "marked", thorough=False).outcome == "refused"
    assert "silent loss" in judge(unmarked, case, tmp_path / "bare", thorough=False).wrong
