"""From bytes to a syntax tree; refuses source that shows people other than what Python reads."""

import ast
import re
from itertools import islice

from casparian_flow.trust.bundle import SOURCE_BYTES_MAX
from casparian_flow.trust.gatekeeper_findings import Finding

NODES_MAX = 100_000
"""Nodes of the syntax tree; some ten thousand lines of code."""
_COOKIE = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_UTF8 = frozenset({"utf-8", "utf8"})
_LINE_END = re.compile(r"\r\n|\r|\n")
_HIDDEN = re.compile(
    "[\u202a-\u202e\u2066-\u2069]"  # turn the order of characters around ("Trojan Source")
    "|[\x01-\x08\x0b\x0e-\x1f\x7f]"  # steer a terminal
    "|\r(?!\n)"  # ends a line for Python, but not in every editor
)


def decode(source: bytes) -> tuple[str, Finding | None]:
    """The text of a source file, or why it has none."""
    if len(source) > SOURCE_BYTES_MAX:
        return "", Finding(
            0, 0, "G007", f"the source is larger than {SOURCE_BYTES_MAX // 1024} KiB"
        )
    if source.startswith(b"\xef\xbb\xbf"):
        return "", Finding(1, 1, "G003", "begins with a byte order mark; save it without one")
    try:
        text = source.decode("utf-8")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        return "", Finding(line, 1, "G001", "is not UTF-8 text")
    for number, line_text in enumerate(_LINE_END.split(text, 2)[:2], 1):
        cookie = _COOKIE.match(line_text)
        if cookie and cookie[1].lower().replace("_", "-") not in _UTF8:
            message = f"declares the encoding {cookie[1][:40]}; only UTF-8 is read"
            return "", Finding(number, 1, "G002", message)
    return text, _hidden(text)


def _hidden(text: str) -> Finding | None:
    null = text.find("\0")
    if null >= 0:
        return Finding(_line(text, null), 1, "G005", "holds a null byte; is it a text file?")
    found = _HIDDEN.search(text)
    if found is None:
        return None
    message = f"holds the invisible character U+{ord(found[0]):04X}; write an escape instead"
    return Finding(_line(text, found.start()), 1, "G004", message)


def _line(text: str, position: int) -> int:
    return len(_LINE_END.findall(text, 0, position)) + 1


def lines_of(text: str) -> list[str]:
    """The lines as Python counts them."""
    return _LINE_END.split(text)


def parse(text: str) -> tuple[ast.Module | None, Finding | None]:
    """The syntax tree of a source, or why it has none."""
    try:
        return ast.parse(text), None
    except SyntaxError as error:
        line, col = error.lineno or 0, max(error.offset or 0, 0)
        return None, Finding(line, col, "G006", f"is not valid Python: {error.msg}")
    except (RecursionError, MemoryError):
        return None, Finding(0, 0, "G007", "is nested too deeply to be read")
    except ValueError as error:
        return None, Finding(0, 0, "G006", f"is not valid Python: {error}")


def nodes_of(tree: ast.Module) -> tuple[list[ast.AST], Finding | None]:
    """All nodes of a tree, each before its children; or why there are too many to look at."""
    nodes = list(islice(ast.walk(tree), NODES_MAX + 1))
    if len(nodes) <= NODES_MAX:
        return nodes, None
    message = f"has more than {NODES_MAX} names, values and operators; a plugin is smaller"
    return [], Finding(0, 0, "G007", message)


def parse_expression(text: str) -> ast.Expression | None:
    """The syntax tree of one expression; None if the text is none."""
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
