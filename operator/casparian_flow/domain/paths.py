r"""File names as text, reversibly.

Names on disk are bytes; the ledger holds text. A name that is valid UTF-8 stands as itself.
Bytes that are not become `\xNN`; a backslash that would read as such an escape becomes `\x5c`.
"""

import os
import re

_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_LITERAL = re.compile(r"\\(?=x[0-9a-f]{2})")


def path_to_text(path: str | bytes) -> str:
    r"""Text for a path as the operating system gave it (surrogate escapes included).

    >>> path_to_text(b"data/caf\xc3\xa9.csv")
    'data/café.csv'
    >>> path_to_text(b"bad\xff.csv")
    'bad\\xff.csv'
    """
    text = os.fsdecode(path)
    escaped = _LITERAL.sub(r"\\x5c", text) if "\\" in text else text
    try:
        escaped.encode("utf-8")
    except UnicodeEncodeError:
        return "".join(
            f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in escaped
        )
    return escaped


def text_to_path(text: str) -> str:
    r"""The path, as Python's os functions take it, that `path_to_text` described.

    >>> os.fsencode(text_to_path('bad\\xff.csv'))
    b'bad\xff.csv'
    """
    if "\\x" not in text:
        return text
    raw = _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), text.encode("utf-8"))
    return os.fsdecode(raw)
