"""Which files a scan leaves out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from casparian_flow.domain.errors import UsageError
from casparian_flow.services.patterns import Pattern, compile_pattern, compile_source

DEFAULT_IGNORES = (".git/", "__pycache__/", "*.tmp", ".DS_Store")
"""Beside files whose name begins with a dot; those can be had back by a pattern such as `!.env`."""


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """Compiled ignore and include rules of one source root.

    As in gitignore the last pattern that matches decides, and an ignored directory is not
    descended into, so nothing below it can be had back. Directories whose name begins with a dot
    are walked unless a pattern names them.

    Attributes:
        problems: one line per pattern that could not be compiled and was left out.
        suffixes, literals: names that are ignored without looking further; empty if some pattern
            is negated, since then order matters.
        slow: whether every file has to be asked for by `ignores_file`. A negated pattern is no
            reason: it only has back what another one left out, by a name that `may_ignore` sees.
    """

    patterns: tuple[Pattern, ...]
    include: tuple[Pattern, ...]
    problems: tuple[str, ...]
    suffixes: tuple[str, ...]
    literals: frozenset[str]
    slow: bool
    _marks: tuple[str, ...]
    _rest: Callable[[str], bool]

    def may_ignore(self, joined: str) -> bool:
        """Whether any of several names might be left out, unless `slow`.

        One search through all names of a directory is much cheaper than a question per name.

        Args:
            joined: the names with a NUL before, between and after them.
        """
        return any(mark in joined for mark in self._marks)

    def ignores_directory(self, path: str) -> bool:
        """Whether the directory at relative `path` (without "/" at its end) is left out."""
        return self._decide(path + "/", default=False)

    def ignores_file(self, path: str, name: str) -> bool:
        """Whether the file at relative `path` is left out; its directories are not asked again."""
        if self.include and not any(p.matches(path) for p in self.include):
            return True
        hidden = name[:1] == "."
        if self.suffixes or self.literals:
            return (
                hidden
                or name.endswith(self.suffixes)
                or name in self.literals
                or (self._rest(path))
            )
        return self._decide(path, default=hidden)

    def _decide(self, path: str, *, default: bool) -> bool:
        for pattern in reversed(self.patterns):
            if pattern.matches(path):
                return not pattern.negated
        return default


def compile_rules(ignore: Iterable[str], include: Sequence[str] = ()) -> IgnoreRules:
    """Compile the defaults and a root's own patterns; a bad one disables only itself."""
    problems: list[str] = []
    patterns = _compile([*DEFAULT_IGNORES, *ignore], problems)
    wanted = _compile(include, problems)
    if include and not wanted:
        problems.append("no include pattern is valid: every file is taken")
    ordered = any(p.negated for p in patterns)
    simple = () if ordered else patterns
    ignoring = [p for p in patterns if not p.negated]
    rest = [p for p in ignoring if not (p.suffix or p.literal or p.directory_only)]
    return IgnoreRules(
        patterns=patterns,
        include=wanted,
        problems=tuple(problems),
        suffixes=tuple(p.suffix for p in simple if p.suffix),
        literals=frozenset(p.literal for p in simple if p.literal),
        slow=bool(wanted) or bool(rest),
        _marks=(
            "\0.",
            *(p.suffix + "\0" for p in ignoring if p.suffix),
            *(f"\0{p.literal}\0" for p in ignoring if p.literal),
        ),
        _rest=_any_of([] if ordered else rest),
    )


def _compile(texts: Iterable[str], problems: list[str]) -> tuple[Pattern, ...]:
    compiled = []
    for text in texts:
        if not text.strip() or text.startswith("#"):
            continue
        try:
            compiled.append(compile_pattern(text))
        except UsageError as error:
            problems.append(f"{error}; the pattern is left out, the others hold")
    return tuple(compiled)


def _any_of(patterns: Sequence[Pattern]) -> Callable[[str], bool]:
    if not patterns:
        return lambda _path: False
    # Group names would clash when patterns are joined.
    sources = [p.regex.pattern.replace("(?P<ps_d>", "(?:") for p in patterns]
    search = compile_source("|".join(f"(?:{s})" for s in sources)).match
    return lambda path: search(path) is not None
