"""Reading a plugin's MANIFEST from its source, without running any of it (docs/manifest.md)."""

import ast
import difflib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.outputs import (
    ANY_TOPIC,
    QUARANTINE_SUFFIX,
    TOPIC_PATTERN,
    SinkAddress,
    parse_sink_uri,
)
from casparian_flow.domain.scoped_names import SEPARATOR, check_namespace, scoped, split
from casparian_flow.services.routing import check_tag, compile_route

MAX_SOURCE_BYTES = 1 << 20
MAX_LIST = 100
"""Most subscriptions, topics or sinks of one topic."""
PLUGIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,98}")
HANDLER = "Handler"
DEFAULT_PRIORITY = 50
PRIORITIES = range(-1_000_000, 1_000_001)


class ManifestError(UsageError):
    """A plugin's source cannot be deployed as it is."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a plugin declares about itself.

    Attributes:
        name, version: "" where the MANIFEST does not say.
        pattern: which files it takes (gitignore syntax), "" for none.
        topic: the topic it mainly publishes to, "" for none.
        sinks: topic → canonical URIs, for topics whose sinks the author chose.
        outputs: topic → contract as JSON text.
        parameters_json: canonical JSON object handed to `configure`.
    """

    name: str = ""
    version: str = ""
    pattern: str = ""
    topic: str = ""
    priority: int = DEFAULT_PRIORITY
    subscriptions: tuple[str, ...] = ()
    sinks: Mapping[str, tuple[SinkAddress, ...]] = field(default_factory=dict)
    description: str = ""
    outputs: Mapping[str, str] = field(default_factory=dict)
    parameters_json: str = "{}"

    def topics(self) -> list[str]:
        """Every topic it names, each once, the main one first."""
        named = [self.topic] if self.topic else []
        return list(dict.fromkeys([*named, *self.sinks, *self.outputs]))


def read_manifest(source: str, filename: str = "plugin.py") -> Manifest:
    """Read and check the MANIFEST of a plugin's source.

    The source must assign `MANIFEST = PluginMetadata(...)` once, at module level, with keyword
    arguments that are literals, and define a class named Handler.

    Args:
        source: text of the module.
        filename: what errors call it.

    Raises:
        ManifestError: saying what is wrong and in which line.
    """
    tree = _parse(source, filename)
    _require_handler(tree, filename)
    call = _manifest_call(tree, filename)
    return _Reader(filename, call).read()


def plugin_name(name: str) -> str:
    """A name fit for a plugin.

    Raises:
        ManifestError: it is empty, too long or has other characters.
    """
    if not PLUGIN_NAME.fullmatch(name):
        raise ManifestError(
            f"plugin name {name[:120]!r} is not usable",
            hint="Use letters, digits, '_', '-' and '.', beginning with a letter or '_'; "
            "give it as name= in MANIFEST or rename the file.",
        )
    return name


def scoped_plugin_name(name: str) -> str:
    """A plugin's name with its namespace, if it has one.

    Raises:
        UsageError: either is not usable.
    """
    namespace, plain = split(name)
    if check_namespace(namespace) or SEPARATOR not in name:
        return scoped(namespace, plugin_name(plain))
    raise ManifestError(f"plugin name {name[:120]!r} has an empty namespace")


def plugin_version(text: str) -> str:
    """A version in its normal PEP 440 form.

    Raises:
        ManifestError: it is none.
    """
    try:
        if len(text) <= 50:
            return str(Version(text))
    except InvalidVersion:
        pass
    raise ManifestError(
        f"version {text[:60]!r} is not a PEP 440 version", hint="Use a form such as 1.0.0."
    )


def _parse(source: str, filename: str) -> ast.Module:
    if len(source) > MAX_SOURCE_BYTES or len(source.encode("utf-8", "surrogatepass")) > (
        MAX_SOURCE_BYTES
    ):
        raise ManifestError(f"{filename}: larger than {MAX_SOURCE_BYTES // 1024} KiB")
    if "\0" in source:
        line = source.count("\n", 0, source.index("\0")) + 1
        raise ManifestError(f"{filename}:{line}: holds a null byte; is it a text file?")
    try:
        with warnings.catch_warnings():
            # A doubtful escape in a plugin's string is its author's business.
            warnings.simplefilter("ignore")
            return ast.parse(source, filename)
    except SyntaxError as error:
        raise ManifestError(f"{filename}:{error.lineno or 0}: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ManifestError(f"{filename}: nested too deeply to be read") from error
    except ValueError as error:
        raise ManifestError(f"{filename}: not readable as Python: {error}") from error


def _require_handler(tree: ast.Module, filename: str) -> None:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    if any(node.name == HANDLER for node in classes):
        return
    listed = ", ".join(f"{c.name} (line {c.lineno})" for c in classes[:10]) or "no class"
    raise ManifestError(
        f"{filename}: plugin class must be named Handler; found {listed}",
        hint="Rename the class that inherits from BasePlugin to Handler.",
    )


def _manifest_call(tree: ast.Module, filename: str) -> ast.Call:
    found: list[tuple[int, ast.expr | None]] = []
    for node in tree.body:
        match node:
            case ast.Assign(targets=targets, value=value):
                named = any(isinstance(t, ast.Name) and t.id == "MANIFEST" for t in targets)
            case ast.AnnAssign(target=ast.Name(id="MANIFEST"), value=value):
                named = True
            case _:
                continue
        if named:
            found.append((node.lineno, value))
    if not found:
        raise ManifestError(
            f"{filename}: no MANIFEST at module level",
            hint='Add MANIFEST = PluginMetadata(pattern="*.csv", topic="my_topic").',
        )
    if len(found) > 1:
        lines = ", ".join(str(line) for line, _ in found)
        raise ManifestError(f"{filename}: MANIFEST is assigned more than once (lines {lines})")
    line, value = found[0]
    if not isinstance(value, ast.Call) or _called(value.func) != "PluginMetadata":
        raise ManifestError(
            f"{filename}:{line}: MANIFEST must be a literal PluginMetadata(...) call",
            hint="It is read without running the plugin, so it cannot be computed.",
        )
    return value


def _called(func: ast.expr) -> str:
    match func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


@dataclass(slots=True)
class _Reader:
    """Turns the call's keywords into a Manifest, with line numbers in every complaint."""

    filename: str
    call: ast.Call

    def read(self) -> Manifest:
        if self.call.args:
            raise self._error(
                self.call.args[0].lineno, "PluginMetadata takes keyword arguments only"
            )
        values: dict[str, Any] = {}
        for keyword in self.call.keywords:
            line = keyword.value.lineno
            if keyword.arg is None:
                raise self._error(line, "MANIFEST cannot be built with '**'")
            convert = _FIELDS.get(keyword.arg)
            if convert is None:
                raise self._unknown(line, keyword.arg)
            values[_TARGETS.get(keyword.arg, keyword.arg)] = self._value(
                keyword.arg, keyword.value, convert
            )
        if not values.get("pattern") and not values.get("subscriptions"):
            raise self._error(
                self.call.lineno,
                "MANIFEST has neither a pattern nor subscriptions, so no file would reach it",
            )
        return Manifest(**values)

    def _value(self, name: str, node: ast.expr, convert: Callable[[Any], Any]) -> Any:
        try:
            literal = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise self._error(
                node.lineno,
                f"{name} is not a literal value",
                hint="MANIFEST is read without running the plugin, so it cannot be computed.",
            ) from error
        try:
            return convert(literal)
        except (UsageError, _WrongTypeError) as error:
            hint = error.hint if isinstance(error, UsageError) else ""
            raise self._error(node.lineno, f"{name}: {error}", hint=hint) from error

    def _unknown(self, line: int, name: str) -> ManifestError:
        near = difflib.get_close_matches(name, _FIELDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "It takes " + ", ".join(_FIELDS) + "."
        return self._error(line, f"PluginMetadata has no field {name!r}", hint=hint)

    def _error(self, line: int, message: str, *, hint: str = "") -> ManifestError:
        return ManifestError(f"{self.filename}:{line}: {message}", hint=hint)


class _WrongTypeError(Exception):
    """A literal is of another type than its field."""


def _text(limit: int) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise _WrongTypeError(f"want a string, not {type(value).__name__}")
        if len(value) > limit or not _is_storable(value):
            raise _WrongTypeError(f"want at most {limit} characters of valid text")
        return value

    return convert


def _is_storable(text: str) -> bool:
    return "\0" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def _name(value: Any) -> str:
    text = _text(99)(value)
    return plugin_name(text) if text else ""


def _version(value: Any) -> str:
    text = _text(50)(value)
    return plugin_version(text) if text else ""


def _pattern(value: Any) -> str:
    text = _text(500)(value)
    if text:
        compile_route(text)
    return text


def _topic(value: Any) -> str:
    text = _text(100)(value)
    return check_topic(text) if text else ""


def check_topic(text: str) -> str:
    """A topic's name, or the wildcard.

    Raises:
        UsageError: it is not usable as one.
    """
    if text == ANY_TOPIC:
        return text
    if not TOPIC_PATTERN.fullmatch(text) or text.endswith(QUARANTINE_SUFFIX):
        raise UsageError(
            f"topic {text[:120]!r} is not usable",
            hint="Use letters, digits, '_', '-' and '.'; names ending in "
            f"{QUARANTINE_SUFFIX} are kept for quarantined rows.",
        )
    return text


def _priority(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongTypeError(f"want a whole number, not {type(value).__name__}")
    if value not in PRIORITIES:
        raise _WrongTypeError(f"want {PRIORITIES.start} to {PRIORITIES.stop - 1}")
    return value


def _subscriptions(value: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(check_tag(_text(50)(tag)) for tag in _items(value)))


def _items(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple | set | frozenset):
        raise _WrongTypeError(f"want a list, not {type(value).__name__}")
    if len(value) > MAX_LIST:
        raise _WrongTypeError(f"want at most {MAX_LIST} items")
    return sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)


def _mapping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _WrongTypeError("want a dict with strings as keys")
    if len(value) > MAX_LIST:
        raise _WrongTypeError(f"want at most {MAX_LIST} entries")
    return value


def _sinks(value: Any) -> dict[str, tuple[SinkAddress, ...]]:
    sinks = {}
    for topic, uris in _mapping(value).items():
        listed = [uris] if isinstance(uris, str) else _items(uris)
        if not listed:
            raise _WrongTypeError(f"topic {topic!r} has no sink")
        sinks[check_topic(topic)] = tuple(parse_sink_uri(_text(2000)(uri)) for uri in listed)
    return sinks


def _outputs(value: Any) -> dict[str, str]:
    outputs = {}
    for topic, contract in _mapping(value).items():
        if check_topic(topic) == ANY_TOPIC:
            raise _WrongTypeError("a contract belongs to one topic, not to '*'")
        outputs[topic] = _json(_mapping(contract))
        parse_contract(outputs[topic])
    return outputs


def _parameters(value: Any) -> str:
    return _json(_mapping(value))


def _json(value: Any) -> str:
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise _WrongTypeError(f"cannot be written as JSON: {error}") from error
    if not _is_storable(text):
        raise _WrongTypeError("holds text that is not valid Unicode")
    return text


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "pattern": _pattern,
    "topic": _topic,
    "priority": _priority,
    "subscriptions": _subscriptions,
    "sinks": _sinks,
    "outputs": _outputs,
    "parameters": _parameters,
    "name": _name,
    "version": _version,
    "description": _text(2000),
}
_TARGETS = {"parameters": "parameters_json"}
