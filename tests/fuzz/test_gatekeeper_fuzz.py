"""The Gatekeeper answers every input, in bounded time.

CASPARIAN_FUZZ_SOURCES sets how many mutated sources are tried, CASPARIAN_FUZZ_SEED which.
"""

import os
import random
import time
from pathlib import Path

import pytest
from gatekeeper_corpus import BYPASSES, ORDINARY, PANDAS_STYLE, plugin

from casparian_flow.trust.gatekeeper import FINDINGS_MAX, inspect
from casparian_flow.trust.gatekeeper_findings import Finding
from casparian_flow.trust.gatekeeper_lists import Profile

SOURCES = int(os.environ.get("CASPARIAN_FUZZ_SOURCES", "20000"))
SEED = int(os.environ.get("CASPARIAN_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)
SLOWEST_S = 10.0
EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"

WORDS = (
    r"( ) [ ] { } : ; , . = == := -> * ** @ ... \ # f' b' rb' \x00 \N{DASH} 0x 1e999 1_0 1j é ｅ "
    "None lambda yield await async def class match case type import from global nonlocal try "
    "except* with __class__ __import__ eval getattr open os MANIFEST Handler BasePlugin "
    "PluginMetadata casparian_flow.sdk /etc/passwd {0.__class__}"
)
TOKENS = [
    *WORDS.split(),
    *("'", '"', "'''", '"""', "\t", "\r", "\f", "\n", "\0", "\ufeff", "\u202e", "\U0010ffff"),
]
RAW = (b"\xff", b"\xfe", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"# coding: utf-7\n")


def seeds() -> list[bytes]:
    bodies = [plugin(body) for body in PANDAS_STYLE]
    bodies += [plugin("pass", before) for before in ORDINARY.values()]
    bodies += [code for _, code in BYPASSES]
    bodies += [plugin(code) for _, code in BYPASSES[::9]]
    examples = [path.read_bytes() for path in EXAMPLES.rglob("*.py")]
    return [body.encode() for body in bodies] + examples


def mutate(rng: random.Random, source: bytes, others: list[bytes]) -> bytes:
    data = bytearray(source)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + int(rng.expovariate(0.1)))
        match rng.randrange(14):
            case 0:
                del data[start:end]
            case 1:
                data[start:end] = rng.choice(TOKENS).encode()
            case 2:
                data[start:start] = f" {rng.choice(TOKENS)} ".encode()
            case 3:
                data[start:start] = data[start:end] * rng.randint(1, 30)
            case 4:
                other = rng.choice(others)
                cut = rng.randint(0, len(other))
                data[start:end] = other[cut : cut + rng.randint(0, 80)]
            case 5 if start < len(data):
                data[start] = rng.randrange(256)
            case 6:
                data[start:start] = rng.choice(RAW)
            case 7 | 8 | 9 | 10 | 11:  # keeps the syntax whole more often than not
                line = data.rfind(b"\n", 0, start) + 1
                data[line:line] = rng.choice(others) + b"\n"
            case _:
                data[start:start] = rng.choice([b"(", b"[", b"-", b"not ", b"a.", b"f'{"]) * (
                    rng.randint(1, 120)
                )
    return bytes(data[:20_000])


@pytest.mark.timeout(max(120, SOURCES // 100))
def test_every_mutated_source_is_answered_in_bounded_time() -> None:
    print(f"CASPARIAN_FUZZ_SEED={SEED} CASPARIAN_FUZZ_SOURCES={SOURCES}")
    rng = random.Random(SEED)
    corpus = seeds()
    clean = slowest = 0.0
    rules: set[str] = set()
    for number in range(SOURCES):
        source = mutate(rng, rng.choice(corpus), corpus)
        began = time.process_time()
        try:
            findings = inspect(source, rng.choice([Profile.STRICT, Profile.STANDARD]))
        except BaseException:
            print(f"source {number}: {source!r}")
            raise
        took = time.process_time() - began
        assert took < SLOWEST_S, source
        slowest = max(slowest, took)
        _check_form(findings, source)
        clean += not findings
        rules.update(finding.rule_id for finding in findings)
    print(f"{clean:.0f} passed, {len(rules)} rules were broken, slowest {slowest:.3f} s")
    if SOURCES >= 20_000:
        assert clean > SOURCES / 1000, "the mutations leave too little valid source"
        assert len(rules) > 25, sorted(rules)


def _check_form(findings: list[Finding], source: bytes) -> None:
    assert len(findings) <= FINDINGS_MAX
    assert findings == sorted(findings)
    lines = source.count(b"\n") + source.count(b"\r") + 2
    for finding in findings:
        assert 0 <= finding.line <= lines, (finding, source)
        assert finding.col >= 0
        assert finding.rule_id.startswith("G")
        assert finding.message


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_random_bytes_are_answered(length: int) -> None:
    rng = random.Random(length)
    for _ in range(50):
        assert inspect(rng.randbytes(length)) != []
