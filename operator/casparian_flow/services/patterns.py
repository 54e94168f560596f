"""Patterns in gitignore syntax over relative paths with "/" between parts.

pathspec translates them; what is added here: a pattern that cannot be compiled is an error and
not silently dead, names may hold newlines, matching cannot be made to backtrack without end, and
the two commonest shapes (`*.csv`, `name`) avoid regular expressions altogether.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from casparian_flow.domain.errors import UsageError

MAX_PATTERN_CHARS = 500
MAX_DOUBLE_STARS = 6
"""Each `**` multiplies the ways to split a path; deeper patterns are refused, not slow."""

_STAR = "[^/]*"
_PLAIN = re.compile(r"(?:\\.|[^\\\[\]()*+?|^$./{}]|\[\^/\])*", re.DOTALL)
_LITERAL = re.compile(r"[^\\*?\[\]!#/\s][^\\*?\[\]/\s]*")


@dataclass(frozen=True)
class Pattern:
    """One compiled pattern.

    Attributes:
        text: as the user wrote it.
        negated: whether it began with "!".
        suffix: what names end with, for patterns of the shape `*.csv`, else "".
        literal: the name itself, for patterns without wildcard or slash, else "".
        directory_only: whether it ends with "/".
    """

    text: str
    negated: bool
    regex: re.Pattern[str]
    suffix: str
    literal: str
    directory_only: bool

    @cached_property
    def matches(self) -> Callable[[str], bool]:
        """Whether a path, or one of the directories above it, matches.

        A directory is asked for with a "/" at its end.
        """
        if self.suffix:
            suffix, inner = self.suffix, self.suffix + "/"
            return lambda path: path.endswith(suffix) or inner in path
        match = self.regex.match
        return lambda path: match(path) is not None


@lru_cache(maxsize=4096)
def compile_pattern(text: str) -> Pattern:
    """Compile one pattern.

    Raises:
        UsageError: it is empty, a comment, too long, too complex or malformed.

    >>> compile_pattern("*.csv").matches("2024/sales.csv")
    True
    >>> compile_pattern("/top/*.csv").matches("2024/top/sales.csv")
    False
    """
    if not text.strip() or len(text) > MAX_PATTERN_CHARS or "\0" in text:
        raise UsageError(
            f"pattern {text[:60]!r} is empty, longer than {MAX_PATTERN_CHARS} characters "
            "or holds a NUL"
        )
    if text.startswith("#"):
        raise UsageError(
            f"pattern {text!r} reads as a comment", hint="Write \\# for a name that begins with #."
        )
    if text.count("**") > MAX_DOUBLE_STARS:
        raise UsageError(f"pattern {text!r} has more than {MAX_DOUBLE_STARS} '**'")
    negated, regex = _translate(text)
    body = text[1:] if text.startswith("!") else text
    return Pattern(
        text=text,
        negated=negated,
        regex=regex,
        suffix=body[1:] if body[:1] == "*" and _LITERAL.fullmatch(body[1:]) else "",
        literal=body if _LITERAL.fullmatch(body) else "",
        directory_only=body.endswith("/"),
    )


def _translate(text: str) -> tuple[bool, re.Pattern[str]]:
    try:
        with _no_future_sets():
            translated = GitIgnoreSpecPattern(text)
        if translated.regex is None or translated.include is None:
            raise _malformed(text)
        source = _bounded(translated.regex.pattern).replace("|$)", r"|\Z)")
        return not translated.include, compile_source(source)
    except (ValueError, re.error) as error:
        raise _malformed(text) from error


def compile_source(source: str) -> re.Pattern[str]:
    """Compile what `Pattern.regex.pattern` gave, or several of them joined."""
    with _no_future_sets():
        return re.compile(source, re.DOTALL)


@contextmanager
def _no_future_sets() -> Iterator[None]:
    """Python warns of "[[" in a set, which may mean more one day; in gitignore it never does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _malformed(text: str) -> UsageError:
    return UsageError(
        f"pattern {text!r} is not valid gitignore syntax",
        hint="Check for an unclosed '[' or a backslash at the end.",
    )


def _bounded(source: str) -> str:
    """Commit to the first place where the text between two stars of one part fits.

    That is where a glob may always commit; without it `*a*a*a*b` takes time exponential in its
    stars on a name full of "a".
    """
    first, *pieces = source.split(_STAR)
    built = [first]
    for i, piece in enumerate(pieces):
        commits = i < len(pieces) - 1 and _PLAIN.fullmatch(piece)
        built.append(f"(?>[^/]*?{piece})" if commits else _STAR + piece)
    return "".join(built)
