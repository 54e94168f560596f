"""Gatekeeper: reads a plugin's source and lists what it may not do, without running any of it.

It is policy, not the sandbox. It tells an honest author early what will not work, and makes a
dishonest one write something conspicuous; whoever means to can hide a name from any reader of
source text. What keeps a plugin from doing harm is the process it runs in (docs/sandbox.md).

The source is walked once, without recursion, so that time and memory stay bounded by its size.
Scopes are not told apart: a name is what it may be anywhere in the file.
"""

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from casparian_flow.trust.gatekeeper_findings import Finding
from casparian_flow.trust.gatekeeper_lists import (
    ARCHIVE_OPENERS,
    ATTRIBUTE_BUILTINS,
    ATTRIBUTE_MAKERS,
    ATTRIBUTES,
    CODE_BUILTINS,
    DEFAULT_WHITELIST,
    DENIED,
    FRAME_ATTRIBUTES,
    MEMBERS,
    MODULE_ATTRIBUTES,
    MODULE_DUNDERS,
    NETWORK_KEYWORDS,
    OPENERS,
    PLAIN_DUNDERS,
    PLAIN_METACLASSES,
    READER_KEYWORDS,
    READERS,
    SCOPE_BUILTINS,
    SDK,
    STDLIB,
    TELLING_DUNDERS,
    Profile,
)
from casparian_flow.trust.gatekeeper_names import Names
from casparian_flow.trust.gatekeeper_shape import check_shape, manifest_value
from casparian_flow.trust.gatekeeper_text import decode, lines_of, nodes_of, parse, parse_expression

FINDINGS_MAX = 200
INNER_CHARS_MAX = 2_000
"""Longest text within a source that is looked at as an expression."""
INNER_TOTAL_MAX = 50_000
"""Characters of such texts altogether."""
INNER_DEPTH_MAX = 3

_DUNDER = re.compile(r"__[A-Za-z][A-Za-z0-9_]*__")
_WORD = re.compile(r"[A-Za-z_]\w*")
_FAR_LOCAL = re.compile(r"@\s*\w+\s*[.(\[]")
"""In a pandas expression: a local variable of which more than the value is used."""
_PLACE = re.compile(
    r"/(bin|boot|dev|etc|home|lib|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var)(/|$)"
    r"|~/|\.\./|(file|ftp|gs|gcs|s3|s3a|abfss?|hdfs|ssh|sftp|unix|ipc)://"
)
_PROSE = re.compile(r"[\n{\[<]")
"""What data have and names of files have not."""


def inspect(
    source: bytes,
    profile: Profile = Profile.STRICT,
    whitelist: Collection[str] = DEFAULT_WHITELIST,
) -> list[Finding]:
    """Everything in a plugin's source that breaks a rule, in the order of the text.

    Never raises, whatever the bytes are, and runs none of them.

    Args:
        source: the file's exact bytes.
        whitelist: libraries that may be imported, as they are imported (`pandas`, or `a.b` for a
            part of one). What the plugin's own lock file holds does not count: it is the author
            who wrote that.

    Returns:
        At most FINDINGS_MAX findings; empty if the source may pass.
    """
    if profile == Profile.OFF:
        return []
    text, problem = decode(source)
    if problem is not None:
        return [problem]
    with warnings.catch_warnings():
        # A doubtful escape in a plugin's string is its author's business.
        warnings.simplefilter("ignore")
        tree, problem = parse(text)
        if problem is not None or tree is None:
            return [problem] if problem else []
        nodes, problem = nodes_of(tree)
        if problem is not None:
            return [problem]
        allowed = frozenset(name.replace("-", "_") for name in whitelist)
        inspector = _Inspector(tree, nodes, profile, allowed)
        inspector.run()
    found = {(f.line, f.col, f.rule_id): f for f in reversed(inspector.findings)}
    lines = lines_of(text)
    return _capped(sorted(_in_characters(f, lines) for f in found.values()))


def _in_characters(finding: Finding, lines: list[str]) -> Finding:
    """The column counted in characters; the parser counts bytes."""
    if not 1 <= finding.line <= len(lines):
        return finding
    before = lines[finding.line - 1].encode()[: max(finding.col - 1, 0)]
    return finding._replace(col=len(before.decode(errors="ignore")) + 1)


def _capped(findings: list[Finding]) -> list[Finding]:
    if len(findings) <= FINDINGS_MAX:
        return findings
    rest = len(findings) - FINDINGS_MAX + 1
    last = findings[FINDINGS_MAX - 1]
    more = Finding(last.line, last.col, last.rule_id, f"{last.message} (and {rest - 1} more)")
    return [*findings[: FINDINGS_MAX - 1], more]


class _Inspector:
    """One inspection."""

    def __init__(
        self,
        tree: ast.Module,
        nodes: list[ast.AST],
        profile: Profile,
        whitelist: frozenset[str],
    ) -> None:
        self.findings: list[Finding] = []
        self._tree = tree
        self._nodes = nodes
        self._inner_trees: list[ast.Expression] = []
        """Kept, so that no node's id() is used twice."""
        self._profile = profile
        self._may_open = profile == Profile.STANDARD
        self._reading = _READING_ONLY if self._may_open else _READING
        self._whitelist = whitelist
        self._names = Names(nodes)
        self._accepted: set[int] = set()
        """Nodes that a rule higher up has already judged harmless, by id()."""
        self._line: int | None = None
        """Where the text stands that is being looked at as an expression."""
        self._inner: list[tuple[str, int, int]] = []
        self._inner_chars = 0
        self._checks: dict[type[ast.AST], Callable[[Any], None]] = {
            ast.Import: self._import,
            ast.ImportFrom: self._import_from,
            ast.Name: self._name,
            ast.Attribute: self._attribute,
            ast.MatchClass: self._match_class,
            ast.Call: self._call,
            ast.ClassDef: self._class,
            ast.FunctionDef: self._function,
            ast.AsyncFunctionDef: self._function,
            ast.Constant: self._constant,
        }

    def run(self) -> None:
        self._accept_prose()
        self.findings.extend(check_shape(self._tree, self._nodes, self._names))
        for name in sorted(self._names.disguised):
            self._report_at(0, 0, "G305", f"{name} stands for too many things to be told apart")
        self._walk(self._nodes)
        for depth in range(INNER_DEPTH_MAX):
            pending, self._inner = self._inner, []
            for text, line, col in pending:
                self._look_inside(text, line, col, depth)

    def _walk(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:  # a parent comes before its children
            check = self._checks.get(type(node))
            if check is not None:
                check(node)

    def _report(self, node: ast.AST, rule_id: str, message: str) -> None:
        line, col = getattr(node, "lineno", 0), getattr(node, "col_offset", -1) + 1
        self._report_at(line, col, rule_id, message)

    def _report_at(self, line: int, col: int, rule_id: str, message: str) -> None:
        if self._line is not None:
            line, message = self._line, f"in text: {message}"
        self.findings.append(Finding(line, col, rule_id, message))

    def _accept_prose(self) -> None:
        """Docstrings are for people, and MANIFEST's literals are checked where they are read."""
        for node in self._nodes:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                self._accepted.add(id(node.value))
        value = manifest_value(self._tree)
        if value is not None:
            constants = (n for n in ast.walk(value) if isinstance(n, ast.Constant))
            self._accepted.update(id(node) for node in constants)

    # Imports

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._module(node, _normal(alias.name))

    def _import_from(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._report(node, "G104", "relative import; a plugin is one file")
            return
        module = _normal(node.module or "")
        if module != "casparian_flow" and not self._module(node, module):
            return
        for alias in node.names:
            if alias.name == "*":
                if module != SDK:
                    self._report(node, "G102", f"'from {module} import *' hides what is imported")
                continue
            self._attribute_name(node, alias.name)
            self._qualified(node, f"{module}.{alias.name}")

    def _module(self, node: ast.AST, module: str) -> bool:
        """Report a module that may not be imported; whether it may."""
        if module == SDK or module in STDLIB[self._profile]:
            return True
        segments = module.split(".")
        prefixes = {".".join(segments[:n]) for n in range(1, len(segments) + 1)}
        if prefixes & self._whitelist:
            for segment in segments[1:]:
                self._attribute_name(node, segment)
            self._qualified(node, module)
            return True
        if segments[0] in {"importlib", "imp", "builtins", "runpy", "pkgutil"}:
            self._report(node, "G103", f"import of {module}, which imports by name")
        else:
            self._report(node, "G101", f"import of {module}: {self._advice(segments[0])}")
        return False

    def _advice(self, root: str) -> str:
        if root == "casparian_flow":
            return f"a plugin may use {SDK} only"
        if root in _INSTEAD:
            return f"not allowed; {_INSTEAD[root]}"
        return "not in the whitelist; an operator can add it"

    def _qualified(self, node: ast.AST, name: str) -> None:
        """Judge a member of a module by its full name."""
        segments = name.split(".")
        for n in range(1, len(segments)):
            prefix, member = ".".join(segments[:n]), segments[n]
            allowed = MEMBERS.get(prefix)
            if allowed is not None and member not in allowed and not self._lifted(prefix, member):
                instead = _INSTEAD.get(prefix, f"allowed: {', '.join(sorted(allowed)[:12])}")
                self._report(node, "G305", f"{prefix}.{member} may not be used; {instead}")
                return
            whole = f"{prefix}.{member}"
            if whole in OPENERS or (whole in ARCHIVE_OPENERS and not self._may_open):
                self._report(node, "G202", f"{whole}: {self._reading}")
                return
            if whole in DENIED:
                self._report(node, "G305", f"{whole} may not be used")
                return
            if member.startswith("_") and not _is_dunder(member):
                self._report(node, "G304", f"{whole} is private to its library")
                return

    def _lifted(self, module: str, member: str) -> bool:
        if f"{module}.{member}" in self._whitelist:
            return True
        return self._may_open and module == "pathlib"

    # Names and attributes

    def _name(self, node: ast.Name) -> None:
        if id(node) in self._accepted:
            return
        name = node.id
        if name == "__import__":
            self._report(node, "G103", "__import__ imports by name; use an import statement")
        elif _is_dunder(name) and name not in PLAIN_DUNDERS | MODULE_DUNDERS:
            self._report(node, "G301", f"{name} leads into the interpreter")
        elif not isinstance(node.ctx, ast.Load):
            return
        elif name in CODE_BUILTINS:
            self._report(node, "G201", f"{name} runs text as code")
        elif name == "open":
            if self._line is None:
                self._report(node, "G202", f"open: {self._reading}")
        elif name in ATTRIBUTE_BUILTINS:
            message = f"{name} is allowed as a call with a written-out name only"
            self._report(node, "G203", message)
        elif name in SCOPE_BUILTINS:
            self._report(node, "G204", f"{name} gives away a scope of the interpreter")
        else:
            self._denied_meaning(node)

    def _denied_meaning(self, node: ast.expr) -> None:
        for meaning in self._names.meanings(node):
            if meaning in ATTRIBUTE_MAKERS and id(node) not in self._accepted:
                message = f"{meaning} is allowed as a call with written-out names only"
                self._report(node, "G203", message)
            self._qualified(node, meaning)

    def _attribute(self, node: ast.Attribute) -> None:
        self._attribute_name(node, node.attr)
        self._denied_meaning(node)

    def _match_class(self, node: ast.MatchClass) -> None:
        for name in node.kwd_attrs:
            self._attribute_name(node, name)

    def _attribute_name(self, node: ast.AST, name: str) -> None:
        """Judge an attribute by its name alone, for nobody knows what it is asked of."""
        if _is_dunder(name):
            if name not in PLAIN_DUNDERS:
                self._report(node, "G301", f".{name} leads into the interpreter")
        elif name in FRAME_ATTRIBUTES:
            self._report(node, "G302", f".{name} leads into the interpreter")
        elif name.strip("_") in MODULE_ATTRIBUTES:
            message = f".{name} may be a module; for a column write [{name!r}]"
            self._report(node, "G303", message)
        elif name in ATTRIBUTES:
            self._report(node, "G305", f".{name} may not be used")

    # Calls

    def _call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name):
            self._call_of_name(node, function)
        if isinstance(function, ast.Attribute) and function.attr in {"query", "eval"}:
            self._pandas_expression(node)
        for meaning in self._names.meanings(function):
            if meaning in ATTRIBUTE_MAKERS and self._plain_names(node, node.args):
                self._accepted.add(id(function))
        self._keywords(node)
        called = getattr(function, "attr", getattr(function, "id", ""))
        if called in READERS:
            self._reader(node, called)

    def _call_of_name(self, node: ast.Call, function: ast.Name) -> None:
        if function.id in ATTRIBUTE_BUILTINS:
            if len(node.args) >= 2 and self._plain_names(node, node.args[1:2]):
                self._accepted.add(id(function))
        elif function.id == "open":
            if self._line is not None:
                self._report(node, "G202", f"open: {self._reading}")
            elif self._may_open and _opens_for_reading(node):
                self._accepted.add(id(function))
        elif function.id == "type" and (
            len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred)
        ):
            self._report(node, "G205", "type(…) makes a class at run time; write a class statement")

    def _plain_names(self, node: ast.Call, arguments: list[ast.expr]) -> bool:
        """Whether the arguments are names written out; each is judged as an attribute."""
        if not arguments:
            return False
        for argument in arguments:
            if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                return False
            for name in argument.value.split("."):
                self._attribute_name(node, name)
        return True

    def _pandas_expression(self, node: ast.Call) -> None:
        """`query` and `eval` of pandas have a language of their own, with attributes and calls."""
        if not node.args:
            return
        first = node.args[0]
        if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
            message = "the expression is computed; write it out, or filter with df[condition]"
            self._report(node, "G404", message)
            return
        text = first.value
        if _FAR_LOCAL.search(text) or "__" in text:
            self._report(node, "G404", "the expression reaches beyond columns and plain variables")
            return
        for word in _WORD.findall(text):
            self._attribute_name(node, word)

    def _keywords(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", "")
        for keyword in node.keywords:
            value = keyword.value
            plain = isinstance(value, ast.Constant) and not value.value
            if keyword.arg == "allow_pickle" and not plain:
                self._report(node, "G305", "allow_pickle: a pickle runs code when it is read")
            elif keyword.arg in NETWORK_KEYWORDS and not plain:
                self._report(node, "G305", f"{keyword.arg}= reads from elsewhere than the input")
            elif (keyword.arg == "backend" and called == "plot") or (
                keyword.arg in {"filename", "handlers"} and called == "basicConfig"
            ):
                self._report(node, "G305", f"{keyword.arg}= may not be given to {called}")

    def _reader(self, node: ast.Call, called: str) -> None:
        places = [*node.args[:1], *(k.value for k in node.keywords if k.arg in READER_KEYWORDS)]
        for place in places:
            text = _beginning(place)
            if text and not _PROSE.search(text):
                message = f"{called} of a fixed place; a plugin reads the file it is handed"
                self._report(place, "G403", message)

    # Classes and functions

    def _class(self, node: ast.ClassDef) -> None:
        for keyword in node.keywords:
            if keyword.arg == "metaclass" and not any(
                meaning in PLAIN_METACLASSES for meaning in self._names.meanings(keyword.value)
            ):
                self._report(keyword.value, "G206", "metaclass other than ABCMeta and EnumMeta")

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if _is_dunder(node.name) and node.name not in PLAIN_DUNDERS:
            self._report(node, "G301", f"{node.name} is called by the interpreter itself")

    # Text

    def _constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bytes):
            value = value.decode("latin-1")
        if not isinstance(value, str) or id(node) in self._accepted:
            return
        for word in _DUNDER.findall(value):
            if word in TELLING_DUNDERS:
                self._report(node, "G401", f"text spells {word}, which leads into the interpreter")
                break
        if value in ATTRIBUTES or value == "plotting.backend":
            self._report(node, "G401", f"text spells {value}, which may not be used")
        if _PLACE.match(value):
            message = f"text names a place ({value[:40]!r}); a plugin reads the file it is handed"
            self._report(node, "G402", message)
        if "(" in value:
            self._remember(value, node)

    def _remember(self, text: str, node: ast.Constant) -> None:
        """Keep text that may be code, such as an annotation that a library evaluates."""
        if len(text) > INNER_CHARS_MAX:
            return
        self._inner_chars += len(text)
        if self._inner_chars <= INNER_TOTAL_MAX:
            line = node.lineno if self._line is None else self._line
            self._inner.append((text, line, node.col_offset + 1))
        elif self._inner_chars - len(text) <= INNER_TOTAL_MAX:
            self._report(node, "G405", "more text that may be code than can be checked")

    def _look_inside(self, text: str, line: int, col: int, depth: int) -> None:
        tree = parse_expression(text)
        if tree is None or isinstance(tree.body, ast.Constant):
            return
        if depth + 1 == INNER_DEPTH_MAX:
            self._report_at(line, col, "G405", "text within text within text that may be code")
            return
        self._inner_trees.append(tree)
        self._line = line
        try:
            before = len(self.findings)
            self._walk(ast.walk(tree))
            self.findings[before:] = [f._replace(col=col) for f in self.findings[before:]]
        finally:
            self._line = None


_READING = (
    "use self.open_input(), or let a library read the path, such as pandas.read_csv(path); "
    f"the profile {Profile.STANDARD} lets plugins open files"
)
_READING_ONLY = "allowed as open(path) for reading only, called so, with the mode written out"
_INSTEAD = {
    "os": "for names of files use pathlib.PurePath",
    "shutil": "the plugin's scratch folder is emptied for it",
    "sys": "raise PermanentError or TransientError to end a job",
    "pathlib": "pathlib.PurePath has no access to files",
    "pickle": "a pickle runs code when it is read",
    "requests": "a plugin has no network",
    "socket": "a plugin has no network",
    "subprocess": "a plugin starts no programs",
}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


def _opens_for_reading(node: ast.Call) -> bool:
    """Whether a call of open has a mode written out that only reads, and no opener of its own."""
    allowed = {"mode", "encoding", "errors", "newline", "buffering", "file"}
    if any(k.arg not in allowed for k in node.keywords) or len(node.args) > 6:
        return False
    if any(isinstance(argument, ast.Starred) for argument in node.args):
        return False
    place = next((k.value for k in node.keywords if k.arg == "file"), None)
    if _beginning(node.args[0] if node.args else place) is not None:
        return False
    modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
    return all(isinstance(m, ast.Constant) and m.value in {"r", "rb", "rt"} for m in modes)


def _beginning(place: ast.expr | None) -> str | None:
    """The text with which a place begins that is written out in the source; None if it is not."""
    for _ in range(INNER_DEPTH_MAX):
        match place:
            case ast.Constant(value=str(text)):
                return text
            case ast.Constant(value=bytes(raw)):
                return raw.decode("latin-1")
            case ast.JoinedStr(values=[first, *_]) | ast.BinOp(left=first, op=ast.Add()):
                place = first
            case _:
                return None
    return None
