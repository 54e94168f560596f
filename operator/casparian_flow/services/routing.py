"""Which tags a path gets, and which plugins want them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from casparian_flow.domain.errors import UsageError
from casparian_flow.services.patterns import compile_pattern

MANUAL_PRIORITY = 50
"""Of a job that only a manual tag asked for; the MANIFEST's default too."""


class Rule(NamedTuple):
    """A routing rule: paths that match `pattern` get `tag`."""

    pattern: str
    tag: str
    priority: int


class Subscriber(NamedTuple):
    """An active plugin version and the tags it takes."""

    plugin: str
    manifest_id: int
    tags: frozenset[str]


class Match(NamedTuple):
    """A plugin that wants a file, and how urgently."""

    plugin: str
    manifest_id: int
    priority: int


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All routing rules and subscriptions, compiled for many paths.

    Attributes:
        problems: one line per rule whose pattern could not be compiled; it matches nothing.
    """

    problems: tuple[str, ...]
    _matchers: tuple[tuple[Callable[[str], bool], tuple[Rule, ...]], ...]
    _takers: Mapping[str, tuple[Subscriber, ...]]

    def tags(self, path: str) -> dict[str, int]:
        """Every tag of a path with its highest priority; all matching rules contribute."""
        tags: dict[str, int] = {}
        for matches, rules in self._matchers:
            if matches(path):
                for rule in rules:
                    tags[rule.tag] = max(rule.priority, tags.get(rule.tag, rule.priority))
        return tags

    def takers(self, tags: Mapping[str, int]) -> list[Match]:
        """The plugins subscribed to any of `tags`, each once, at its highest priority."""
        found: dict[str, Match] = {}
        for tag, priority in tags.items():
            for taker in self._takers.get(tag, ()):
                known = found.get(taker.plugin)
                if known is None or known.priority < priority:
                    found[taker.plugin] = Match(taker.plugin, taker.manifest_id, priority)
        return [found[name] for name in sorted(found)]


def compile_rule_set(rules: Iterable[Rule], subscribers: Iterable[Subscriber]) -> RuleSet:
    """Compile rules; equal patterns are matched once, and one bad pattern disables only itself."""
    by_pattern: dict[str, list[Rule]] = {}
    for rule in rules:
        by_pattern.setdefault(rule.pattern, []).append(rule)
    problems = []
    matchers = []
    for text, group in by_pattern.items():
        try:
            matchers.append((compile_route(text), tuple(group)))
        except UsageError as error:
            problems.append(f"routing rule for tag {group[0].tag!r}: {error}")
    takers: dict[str, list[Subscriber]] = {}
    for subscriber in subscribers:
        for tag in subscriber.tags:
            takers.setdefault(tag, []).append(subscriber)
    return RuleSet(
        tuple(problems), tuple(matchers), {tag: tuple(who) for tag, who in takers.items()}
    )


def compile_route(pattern: str) -> Callable[[str], bool]:
    """The predicate of a routing pattern.

    Raises:
        UsageError: it is malformed or begins with "!", which would route nothing.
    """
    compiled = compile_pattern(pattern)
    if compiled.negated:
        raise UsageError(
            f"routing pattern {pattern!r} begins with '!'",
            hint="A rule says which files get a tag; leave others out by an ignore pattern.",
        )
    return compiled.matches


def parse_tags(text: str) -> frozenset[str]:
    """Read a comma-separated list of tags as the ledger stores it."""
    return frozenset(t for t in (part.strip() for part in text.split(",")) if t)


def format_tags(tags: Iterable[str]) -> str:
    """Tags as the ledger stores them: sorted, comma-separated."""
    return ",".join(sorted(tags))


def check_tag(tag: str) -> str:
    """A tag fit for the ledger.

    Raises:
        UsageError: it is empty, too long, or has a comma, white space or a control character.
    """
    if not 1 <= len(tag) <= 50 or "," in tag or not tag.isprintable() or any(map(str.isspace, tag)):
        raise UsageError(
            f"tag {tag[:60]!r} is not usable",
            hint="Use 1 to 50 printable characters without commas or spaces.",
        )
    return tag
