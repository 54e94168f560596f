"""Samples: the few small files that a plugin may bring along to be tried on."""

import re
from collections.abc import Iterable

from casparian_flow.domain.records import Sample

SAMPLES_MAX = 16
SAMPLES_BYTES_MAX = 256 * 1024
"""Of all samples of one plugin version together."""
SAMPLE_NAME_MAX = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@ -]*")


def samples_problem(samples: Iterable[Sample]) -> str:
    """What is wrong with a version's samples, "" if nothing is.

    >>> samples_problem([Sample("sales.csv", b"id\\n1\\n")])
    ''
    >>> samples_problem([Sample("../sales.csv", b"")])
    "'../sales.csv' is no name for a sample"
    """
    names: set[str] = set()
    size = 0
    for sample in samples:
        if len(sample.name) > SAMPLE_NAME_MAX or not _NAME.fullmatch(sample.name):
            return f"{sample.name[:SAMPLE_NAME_MAX]!r} is no name for a sample"
        if sample.name in names:
            return f"two samples are called {sample.name!r}"
        names.add(sample.name)
        size += len(sample.content)
    if len(names) > SAMPLES_MAX:
        return f"there are {len(names)} samples, at most {SAMPLES_MAX} may be"
    if size > SAMPLES_BYTES_MAX:
        return f"the samples have {size} bytes together, at most {SAMPLES_BYTES_MAX} may be"
    return ""
