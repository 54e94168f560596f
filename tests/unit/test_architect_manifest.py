"""Reading MANIFEST from source text: what is taken, and how each mistake is told."""

import contextlib
import random
from dataclasses import replace

import pytest
from signing_kit import SIGNER, WALL_US, policy, signed

from casparian_flow.domain.errors import UsageError
from casparian_flow.sdk import PluginMetadata
from casparian_flow.services.architect import auto_tag, declare, prepare
from casparian_flow.services.manifest import (
    _FIELDS,
    ManifestError,
    plugin_version,
    read_manifest,
)
from casparian_flow.trust.artifact import artifact_hash, release_json
from casparian_flow.trust.errors import UntrustedError
from casparian_flow.trust.policy import TrustPolicy

HEAD = "from casparian_flow.sdk import BasePlugin, PluginMetadata\n"
HANDLER = "class Handler(BasePlugin):\n    pass\n"


def plugin(arguments: str, handler: str = HANDLER) -> str:
    return f"{HEAD}MANIFEST = PluginMetadata({arguments})\n{handler}"


def test_every_field_is_read() -> None:
    manifest = read_manifest(
        plugin(
            'pattern="in/*.csv", topic="sales", priority=7, subscriptions=["csv", "csv"], '
            'sinks={"sales": ["parquet://x", "sqlite:///d/b.sqlite3"], "*": "csv://rest"}, '
            'version="1.0", description="d", name="my_plugin", parameters={"b": [1], "a": None}, '
            'outputs={"sales": {"columns": [{"name": "id", "type": "int64"}]}}'
        )
    )
    assert manifest.pattern == "in/*.csv"
    assert manifest.priority == 7
    assert manifest.subscriptions == ("csv",)
    assert [s.uri for s in manifest.sinks["sales"]] == ["parquet://x", "sqlite:///d/b.sqlite3"]
    assert manifest.parameters_json == '{"a":null,"b":[1]}'
    assert manifest.topics() == ["sales", "*"]
    assert manifest.version == "1.0"


def test_the_printed_plugin_of_the_workflow_is_read() -> None:
    manifest = read_manifest(
        plugin(
            '\n    pattern="*.csv",  # rule\n    topic="sales_data",\n    priority=50,\n'
            '    subscriptions=["csv"]\n'
        )
    )
    assert (manifest.topic, manifest.priority, manifest.subscriptions) == (
        "sales_data",
        50,
        ("csv",),
    )


def test_the_reader_knows_exactly_the_fields_of_the_sdk() -> None:
    assert set(_FIELDS) == set(PluginMetadata.__dataclass_fields__)


@pytest.mark.parametrize("call", ["sdk.PluginMetadata", "casparian_flow.sdk.PluginMetadata"])
def test_a_qualified_name_is_accepted(call: str) -> None:
    assert read_manifest(f'MANIFEST: object = {call}(pattern="*")\n{HANDLER}').pattern == "*"


MISTAKES = {
    "no manifest": (HEAD + HANDLER, "no MANIFEST at module level"),
    "in a function": (f"def f():\n    MANIFEST = 1\n{HANDLER}", "no MANIFEST at module level"),
    "twice": (plugin('pattern="*"') + 'MANIFEST = PluginMetadata(pattern="x")\n', "lines 2, 5"),
    "a dict": (f"MANIFEST = {{}}\n{HANDLER}", "plugin.py:1: MANIFEST must be a literal"),
    "another call": (f"MANIFEST = make()\n{HANDLER}", "must be a literal PluginMetadata"),
    "dynamic value": (plugin('pattern="*" + x'), "plugin.py:2: pattern is not a literal"),
    "f-string": (plugin('pattern=f"{x}"'), "pattern is not a literal"),
    "call inside": (plugin('topic=str(1), pattern="*"'), "topic is not a literal"),
    "star star": (plugin("**options"), r"cannot be built with '\*\*'"),
    "positional": (plugin('"*.csv"'), "keyword arguments only"),
    "unknown field": (plugin('patern="*"'), "no field 'patern'"),
    "nothing routed": (plugin('topic="x"'), "neither a pattern nor subscriptions"),
    "pattern type": (plugin("pattern=1"), "pattern: want a string, not int"),
    "bad pattern": (plugin('pattern="[a-"'), "not valid gitignore"),
    "negated pattern": (plugin('pattern="!*.csv"'), "begins with '!'"),
    "priority type": (plugin('pattern="*", priority="50"'), "want a whole number, not str"),
    "priority bool": (plugin('pattern="*", priority=True'), "want a whole number, not bool"),
    "priority range": (plugin('pattern="*", priority=10**9'), "priority"),
    "tag with comma": (plugin('subscriptions=["a,b"]'), "tag 'a,b' is not usable"),
    "tags not a list": (plugin('subscriptions="csv"'), "want a list, not str"),
    "topic name": (plugin('pattern="*", topic="../x"'), "topic '../x' is not usable"),
    "quarantine topic": (plugin('pattern="*", topic="x_quarantine"'), "not usable"),
    "unknown scheme": (plugin('pattern="*", sinks={"a": "ftp://x"}'), "unknown scheme 'ftp'"),
    "sink leaves root": (plugin('pattern="*", sinks={"a": "parquet://../x"}'), "output root"),
    "contract": (plugin('pattern="*", outputs={"a": {"columns": []}}'), "outputs"),
    "parameters": (plugin('pattern="*", parameters={"a": {1, 2}}'), "cannot be written as JSON"),
    "version": (plugin('pattern="*", version="one"'), "not a PEP 440 version"),
    "name": (plugin('pattern="*", name="a b"'), "plugin name 'a b'"),
    "wrong class": (plugin('pattern="*"', "class Sales(B):\n    pass\n"), "must be named Handler"),
    "no class": (plugin('pattern="*"', ""), "plugin class must be named Handler; found no class"),
    "syntax": ("x = = 1\n", "plugin.py:1: invalid syntax"),
    "null byte": ("x = 1\n\n\0", "plugin.py:3: holds a null byte"),
    "too large": ("#" * (1 << 20) + "\n", "larger than 1024 KiB"),
    "nested": ("x = " + "(" * 5_000 + ")" * 5_000, "plugin.py"),
    "deep operators": ("x = " + "-" * 50_000 + "1", "plugin.py"),
    "deep attributes": ("x = a" + ".b" * 50_000, "plugin.py"),
    "deep value": (plugin('pattern="*", parameters={"a": ' + "[" * 150 + "]" * 150 + "}"), ""),
    "surrogate": (plugin('pattern="*", description="\\ud800"'), "valid text"),
    "indentation": ("if x:\nMANIFEST = 1", "plugin.py:2"),
}


@pytest.mark.parametrize(("source", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_is_told_with_its_place(source: str, message: str) -> None:
    if message:
        with pytest.raises(ManifestError, match=message):
            read_manifest(source)
    else:
        read_manifest(source)


def test_the_classes_found_are_listed() -> None:
    with pytest.raises(ManifestError, match=r"found A \(line 3\), B \(line 5\)"):
        read_manifest(plugin('pattern="*"', "class A:\n    pass\nclass B:\n    pass\n"))


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(plugin('patern="*"'))
    assert caught.value.hint == "Did you mean 'pattern'?"


def test_reading_runs_nothing(tmp_path: object) -> None:
    source = "raise SystemExit\nimport os\nos._exit(1)\n" + plugin('pattern="*"')
    assert read_manifest(source).pattern == "*"


def test_mutated_sources_are_read_or_refused_and_nothing_else() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    base = plugin('pattern="*.csv", topic="t", sinks={"t": "parquet://x"}, parameters={"a": [1]}')
    alphabet = "()[]{}'\",=\\\n\0*#:. aé\ud800١" + base
    for _ in range(2_000):
        chars = list(base)
        for _ in range(rng.randrange(1, 6)):
            position = rng.randrange(len(chars))
            chars[position : position + rng.randrange(3)] = rng.choice(alphabet)
        with contextlib.suppress(UsageError):
            read_manifest("".join(chars))


@pytest.mark.parametrize(
    ("text", "normal"), [("1.0.0", "1.0.0"), ("v1.0", "1.0"), ("1.0RC1", "1.0rc1")]
)
def test_versions_are_normalised(text: str, normal: str) -> None:
    assert plugin_version(text) == normal


def test_parts_of_an_artifact_cannot_be_shifted_into_each_other() -> None:
    hashes = {
        artifact_hash("ab", "c", "d"),
        artifact_hash("a", "bc", "d"),
        artifact_hash("ab", "", "cd"),
        artifact_hash("ab", "cd", ""),
        artifact_hash("abcd", "", ""),
    }
    assert len(hashes) == 5


def test_the_artifact_hash_is_the_documented_one() -> None:
    # Computed by hand from docs/artifact.md; a change here breaks every deployed plugin.
    assert artifact_hash("print(1)\n", "", release_json("p", "1.0.0")) == (
        "2f325b58940d80a42cc55c7486bfc55f832755379d292952b6577c7743dd5556"
    )


def test_only_what_a_policy_lets_pass_becomes_a_release() -> None:
    bundle = signed(plugin('pattern="*"'), "p")
    verdict = policy().check(bundle, deployed_at_us=WALL_US)
    release = prepare(bundle, verdict)
    assert (release.plugin, release.signer, release.publisher) == ("p", SIGNER, SIGNER)
    with pytest.raises(UntrustedError, match="not signed"):
        prepare(bundle, TrustPolicy().check(replace(bundle, envelope=b""), deployed_at_us=WALL_US))


def test_a_version_that_is_not_in_its_normal_form_is_refused() -> None:
    bundle = signed(plugin('pattern="*"'), "p", "v1.0")
    with pytest.raises(UsageError, match="normal form") as caught:
        prepare(bundle, policy().check(bundle, deployed_at_us=WALL_US))
    assert "1.0" in caught.value.hint


def test_topics_without_a_sink_get_the_wildcards_or_a_parquet_one() -> None:
    plain = declare("p", read_manifest(plugin('pattern="*", topic="a"')))
    assert plain.topics["a"].uris == ("parquet://a",)
    wild = declare("p", read_manifest(plugin('pattern="*", topic="a", sinks={"*": "csv://all"}')))
    assert wild.topics["a"].uris == ("csv://all",)


def test_auto_tags_of_long_names_stay_short_and_distinct() -> None:
    first, second = auto_tag("p" * 60 + "1"), auto_tag("p" * 60 + "2")
    assert first != second
    assert max(len(first), len(second)) <= 50
