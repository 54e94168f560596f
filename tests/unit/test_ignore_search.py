"""One search through a directory's names leaves out what asking for every file does."""

import random

from casparian_flow.services.ignore import IgnoreRules, compile_rules

SEED = 20_260_101
PATTERNS = (
    "*.tmp", "*.bak", "!*.bak", "!keep.tmp", "notes", "!notes", "a/", "!a/", "b.bak/", "!b/",
    "**/a/", "!.env", ".env", "!important.bak", "a/b/", "!a/b/", "*.d", "!x.d",
)  # fmt: skip
NAMES = ("a", "b", "b.bak", "x.d", "notes", "keep.tmp", "c.tmp", "important.bak", ".env", "c.csv")


def kept_by_asking(rules: IgnoreRules, prefix: str, names: list[str]) -> list[str]:
    return [name for name in names if not rules.ignores_file(prefix + name, name)]


def is_walked(rules: IgnoreRules, folders: list[str]) -> bool:
    paths = ["/".join(folders[: depth + 1]) for depth in range(len(folders))]
    return not any(rules.ignores_directory(path) for path in paths)


def test_searching_all_names_at_once_never_misses_an_ignored_file() -> None:
    chance = random.Random(SEED)
    print("seed", SEED)
    searched = 0
    for _ in range(3_000):
        rules = compile_rules(chance.sample(PATTERNS, chance.randrange(1, 7)))
        folders = chance.sample(NAMES, chance.randrange(3))
        names = chance.sample(NAMES, chance.randrange(1, 6))
        if rules.slow or not is_walked(rules, folders):
            continue
        prefix = "".join(f"{folder}/" for folder in folders)
        if not rules.may_ignore("\0" + "\0".join(names) + "\0"):
            searched += 1
            assert kept_by_asking(rules, prefix, names) == names, (rules.patterns, prefix, names)
    assert searched > 100


def test_a_negated_pattern_does_not_make_a_scan_ask_for_every_file() -> None:
    assert not compile_rules(["*.bak", "!important.bak", "cache/"]).slow
