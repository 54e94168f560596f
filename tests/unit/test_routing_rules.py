"""Patterns, ignore rules, routing and the walk's odd corners."""

import re
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casparian_flow.domain.errors import UsageError
from casparian_flow.services.ignore import compile_rules
from casparian_flow.services.patterns import compile_pattern
from casparian_flow.services.routing import (
    Match,
    Rule,
    Subscriber,
    check_tag,
    compile_rule_set,
    format_tags,
    parse_tags,
)

MATCHES = [
    ("*.csv", "a.csv", True),
    ("*.csv", "x/y/a.csv", True),
    ("*.csv", "a.csv.gz", False),
    ("*.csv", "dir.csv/readme", True),
    ("*.csv", "a.csv\n", False),
    ("*.csv", "line\nbreak/a.csv", True),
    ("/*.csv", "a.csv", True),
    ("/*.csv", "x/a.csv", False),
    ("data/**/*.json", "data/a/b/c.json", True),
    ("data/**/*.json", "data/c.json", True),
    ("data/**/*.json", "other/data/c.json", False),
    ("old/", "x/old/a", True),
    ("old/", "old", False),
    ("report", "report", True),
    ("report", "report2", False),
    ("a?c", "abc", True),
    ("a?c", "a/c", False),
    ("[ab]*.txt", "b1.txt", True),
    ("[!ab].txt", "c.txt", True),
    ("**", "any/thing", True),
    ("*", "any", True),
    ("a*b*c*d", "aXbYcZd", True),
    ("a*b*c*d", "adcb", False),
    ("*_*_*", "a_b_c", True),
    ("*a*", "xaxax", True),
    (r"\#x", "#x", True),
    ("*.tar.gz", "x.tar.gz", True),
    ("(x).csv", "(x).csv", True),
    ("é*", "été", True),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), MATCHES)
def test_patterns_match_as_in_gitignore(pattern: str, path: str, expected: bool) -> None:
    assert compile_pattern(pattern).matches(path) is expected


@pytest.mark.parametrize(
    "pattern", ["", "  ", "#x", "[", "[a-", "a\\", "/", "x" * 501, "a\0b", "**/" * 7, "[z--]x"]
)
def test_unusable_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError):
        compile_pattern(pattern)


def test_a_set_that_begins_with_a_bracket_compiles_without_a_warning() -> None:
    assert compile_pattern("a[[]*").matches("a[1]")
    assert compile_rules(["a[[]?*", "[[b]?/x*"]).problems == ()


def test_matching_cannot_be_made_to_backtrack_without_end() -> None:
    began = time.monotonic()
    assert not compile_pattern("*a" * 20 + "b").matches("a" * 255)
    assert time.monotonic() - began < 5.0


_part = st.text(alphabet="ab*?.", min_size=1, max_size=6).filter(lambda t: "**" not in t)


@settings(deadline=None, max_examples=300)
@given(pattern=_part, name=st.text(alphabet="ab.", min_size=1, max_size=8))
def test_one_part_globs_agree_with_a_plain_translation(pattern: str, name: str) -> None:
    plain = "".join({"*": "[^/]*", "?": "[^/]"}.get(c, re.escape(c)) for c in pattern)
    expected = re.fullmatch(plain, name) is not None
    assert compile_pattern(pattern).matches(name) is expected


def test_patterns_agree_with_git(tmp_path: Path) -> None:
    paths = ["a.csv", "x/a.csv", "x/y/b.json", "old/z", "data/q/r.json", "data/s.json", "report"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for pattern in ("*.csv", "/a.csv", "old/", "data/**/*.json", "x/*", "re?ort", "[a-x].csv"):
        (tmp_path / ".git/info/exclude").write_text(pattern + "\n")
        told = subprocess.run(
            ["git", "-C", str(tmp_path), "check-ignore", "--no-index", *paths],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        assert [p for p in paths if compile_pattern(pattern).matches(p)] == told, pattern


def test_defaults_and_dot_files_are_ignored() -> None:
    rules = compile_rules([])
    assert rules.ignores_directory(".git")
    assert rules.ignores_directory("x/__pycache__")
    assert not rules.ignores_directory(".hidden")
    for name in ("a.tmp", ".DS_Store", ".env"):
        assert rules.ignores_file("x/" + name, name)
    assert not rules.ignores_file("x/a.csv", "a.csv")


def test_a_negated_pattern_takes_a_file_back() -> None:
    rules = compile_rules(["*.log", "!keep.log", "!.env"])
    assert rules.ignores_file("a.log", "a.log")
    assert not rules.ignores_file("keep.log", "keep.log")
    assert not rules.ignores_file(".env", ".env")
    assert rules.ignores_file(".other", ".other")


def test_a_bad_pattern_disables_only_itself() -> None:
    rules = compile_rules(["[a-", "*.bak"])
    assert len(rules.problems) == 1
    assert rules.ignores_file("x.bak", "x.bak")
    assert rules.ignores_directory(".git")


def test_bad_include_patterns_are_told() -> None:
    rules = compile_rules([], ["[a-"])
    assert len(rules.problems) == 2
    assert not rules.ignores_file("a.csv", "a.csv")


@settings(deadline=None)
@given(
    names=st.lists(st.sampled_from(["a.tmp", ".x", "b.csv", "n", "n.bak", "tmp"]), max_size=6),
    patterns=st.lists(st.sampled_from(["*.bak", "n", "b*", "!a.tmp", "x/"]), max_size=4),
)
def test_the_quick_test_of_a_folder_never_misses_a_name(
    names: list[str], patterns: list[str]
) -> None:
    rules = compile_rules(patterns)
    joined = "\0" + "\0".join(names) + "\0"
    if not rules.slow and not rules.may_ignore(joined):
        assert not any(rules.ignores_file(name, name) for name in names)


def test_all_matching_rules_contribute_and_the_highest_priority_wins() -> None:
    rules = compile_rule_set(
        [Rule("*.csv", "csv", 5), Rule("in/*", "csv", 9), Rule("in/*", "inbox", 1)],
        [Subscriber("p", 1, frozenset({"csv", "inbox"})), Subscriber("q", 2, frozenset({"other"}))],
    )
    tags = rules.tags("in/a.csv")
    assert tags == {"csv": 9, "inbox": 1}
    assert rules.takers(tags) == [Match("p", 1, 9)]


def test_two_plugins_with_an_equal_pattern_both_get_the_file() -> None:
    rules = compile_rule_set(
        [Rule("*.csv", "auto_a", 1), Rule("*.csv", "auto_b", 2)],
        [Subscriber("a", 1, frozenset({"auto_a"})), Subscriber("b", 2, frozenset({"auto_b"}))],
    )
    assert [m.plugin for m in rules.takers(rules.tags("x.csv"))] == ["a", "b"]


def test_a_rule_that_cannot_be_compiled_is_told_and_the_others_hold() -> None:
    rules = compile_rule_set([Rule("[", "bad", 1), Rule("*", "all", 1)], [])
    assert len(rules.problems) == 1
    assert rules.tags("x") == {"all": 1}


def test_tags_are_stored_sorted_and_read_back() -> None:
    assert format_tags({"b", "a"}) == "a,b"
    assert parse_tags(" a, b,,") == {"a", "b"}


@pytest.mark.parametrize("tag", ["", "a,b", "a b", "x" * 51, "a\n"])
def test_unusable_tags_are_refused(tag: str) -> None:
    with pytest.raises(UsageError):
        check_tag(tag)
