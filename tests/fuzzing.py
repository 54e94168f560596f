"""Structure-aware mutation from a seed: values, texts, JSON objects and frames that almost fit."""

import json
import os
import random
import struct
from collections.abc import Sequence
from typing import Any

import psutil

from casparian_flow.protocol.frames import HEADER, VERSION, Op

SEED = int(os.environ.get("CASPARIAN_FUZZ_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
FRAMES = int(os.environ.get("CASPARIAN_FUZZ_FRAMES", "100000"))
"""Wire frames; the other suites draw a fraction of it."""

ODD_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308,
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "\0", "\n", "a" * 300, "a" * 9_000, "../../etc/passwd", "\ud800", "\u202e", "é́",
    "'; DROP TABLE cf_meta; --", "%s%n{0}", "*", "NaN", "-", "\x7f\x1b[2J", "𝕏" * 70,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None})


Bodies = Sequence[tuple[Op, dict[str, Any]]]


class Fuzz:
    """All chance of one test; the same seed makes the same draws."""

    def __init__(self, name: str, seed: int = SEED) -> None:
        print(f"CASPARIAN_FUZZ_SEED={seed} ({name})")
        self.rng = random.Random(f"{seed} {name}")

    def value(self) -> Any:
        return self.rng.choice((*ODD_NUMBERS, *ODD_TEXTS, *ODD_VALUES))

    def bytes_of(self, data: bytes) -> bytes:
        """The same bytes, but for a few: flipped, cut, doubled, moved or replaced."""
        raw = bytearray(data)
        rng = self.rng
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(raw) + 1)
            match rng.randrange(6):
                case 0 if raw:
                    raw[at % len(raw)] ^= 1 << rng.randrange(8)
                case 1:
                    del raw[at:]
                case 2:
                    raw[at:at] = raw[at : at + rng.randrange(64)]
                case 3:
                    del raw[at : at + rng.randrange(1, 16)]
                case 4:
                    raw[at : at + 4] = rng.choice(
                        (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x01")
                    )
                case _:
                    raw[at:at] = rng.randbytes(rng.randrange(1, 16))
        return bytes(raw)

    def text_of(self, text: str, words: Sequence[str] = ODD_TEXTS) -> str:
        """The same text with words cut out, doubled, swapped or put in."""
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 4))):
            start = rng.randrange(len(text) + 1)
            end = min(len(text), start + rng.choice((0, 1, 1, 5, 40)))
            match rng.randrange(4):
                case 0:
                    text = text[:start] + text[end:]
                case 1:
                    text = text[:end] + text[start:end] * rng.choice((1, 3, 200)) + text[end:]
                case 2:
                    text = text[:start] + rng.choice(words) + text[end:]
                case _:
                    other = rng.randrange(len(text) + 1)
                    text = text[:start] + text[other : other + 30] + text[end:]
        return text

    def json_of(self, value: Any, depth: int = 0) -> Any:
        """The same JSON value with one thing in it dropped, replaced, added or nested."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.9:
            changed = dict(value)
            key = rng.choice(list(changed))
            match rng.randrange(6):
                case 0:
                    del changed[key]
                case 1:
                    changed[rng.choice(ODD_TEXTS)] = self.value()
                case 2:
                    changed[key] = self.value()
                case _:
                    changed[key] = self.json_of(changed[key], depth + 1)
            return changed
        if isinstance(value, list) and value and rng.random() < 0.8:
            items = list(value)
            at = rng.randrange(len(items))
            match rng.randrange(4):
                case 0:
                    return items * rng.choice((0, 2, 300))
                case 1:
                    items.insert(at, self.value())
                case _:
                    items[at] = self.json_of(items[at], depth + 1)
            return items
        if isinstance(value, str) and rng.random() < 0.5:
            return self.text_of(value)
        if rng.random() < 0.03:
            nested: Any = value  # thrice as deep is what the standard library still writes
            for _ in range(rng.choice((5, 60, 250))):
                nested = [nested]
            return nested
        return self.value()

    def json_bytes(self, value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=self.rng.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")

    def message(
        self, bodies: Sequence[tuple[Op, dict[str, Any]]], jobs: Sequence[int]
    ) -> list[bytes]:
        """One ZeroMQ message of a peer that knows the protocol and breaks it in one place or two.

        Args:
            bodies: sound messages to begin with.
            jobs: job ids that exist, or nearly.
        """
        rng = self.rng
        if rng.random() < 0.06:
            return self._batch(bodies, jobs)
        op, body = rng.choice(bodies)
        payload = self.json_bytes(self.json_of(body) if rng.random() < 0.6 else body)
        if rng.random() < 0.1:
            payload = self.bytes_of(payload)
        frames = [self._header(op, rng.choice(jobs), len(payload)), payload]
        if rng.random() < 0.1:
            frames[0] = self.bytes_of(frames[0])
        match rng.randrange(60):
            case 0:
                frames.append(payload)
            case 1:
                frames.pop()
            case 2:
                frames = [b""]
            case 3:
                frames.reverse()
        return frames

    def _header(self, op: int, job: int, length: int) -> bytes:
        rng = self.rng
        values = [VERSION, op, 0, job, length]
        if rng.random() < 0.1:
            at = rng.randrange(5)
            values[at] = rng.choice((0, 1, 9, 17, 0xFF, values[at] + 1))
        limits = (0xFF, 0xFF, 0xFFFF, 2**64 - 1, 2**32 - 1)
        return HEADER.pack(*(v & limit for v, limit in zip(values, limits, strict=True)))

    def _batch(
        self, bodies: Sequence[tuple[Op, dict[str, Any]]], jobs: Sequence[int]
    ) -> list[bytes]:
        rng = self.rng
        parts = []
        for _ in range(rng.choice((0, 1, 3, 20))):
            op, body = rng.choice(bodies)
            payload = self.json_bytes(self.json_of(body) if rng.random() < 0.3 else body)
            code = Op.BATCH if rng.random() < 0.05 else op
            parts.append(self._header(code, rng.choice(jobs), len(payload)) + payload)
        whole = b"".join(parts)
        if rng.random() < 0.3:
            whole = self.bytes_of(whole)
        if rng.random() < 0.02:
            whole = struct.pack("!BBHQI", VERSION, Op.HEARTBEAT, 0, 0, 0) * 5000
        return [HEADER.pack(VERSION, Op.BATCH, 0, 0, len(whole)), whole]


def rss_mb(pid: int | None = None) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20
