"""Whether a source has the shape of a plugin: one class Handler, one literal MANIFEST."""

import ast
from collections.abc import Iterable, Iterator, Sequence

from casparian_flow.trust.gatekeeper_findings import Finding
from casparian_flow.trust.gatekeeper_lists import SDK
from casparian_flow.trust.gatekeeper_names import Names

HANDLER = "Handler"
MANIFEST = "MANIFEST"


def check_shape(tree: ast.Module, nodes: Sequence[ast.AST], names: Names) -> Iterator[Finding]:
    """What keeps a module from being a plugin.

    Args:
        nodes: all nodes of the tree.
    """
    yield from _check_handler(tree, names)
    yield from _check_manifest(tree, names)
    for name in (HANDLER, MANIFEST):
        places = sorted(_bindings(nodes, name))
        for line, col in places[1:]:
            yield Finding(
                line, col + 1, "G504", f"{name} is bound again (first in line {places[0][0]})"
            )


def manifest_value(tree: ast.Module) -> ast.expr | None:
    """What MANIFEST is assigned at module level, None if nothing."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == MANIFEST for t in targets):
            return node.value
    return None


def _check_handler(tree: ast.Module, names: Names) -> Iterator[Finding]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    handlers = [node for node in classes if node.name == HANDLER]
    if not handlers:
        message = "has no class Handler(BasePlugin) at module level"
        yield Finding(0, 0, "G501", message)
        return
    plugins = _plugins(classes, names)
    for node in handlers:
        if node not in plugins:
            message = f"Handler does not derive from {SDK}.BasePlugin"
            yield Finding(node.lineno, node.col_offset + 1, "G502", message)


def _plugins(classes: list[ast.ClassDef], names: Names) -> set[ast.ClassDef]:
    """The module's classes that derive from BasePlugin, directly or by way of each other."""
    derived: set[ast.ClassDef] = set()
    derived_names: set[str] = set()
    for node in classes:  # a base stands before what derives from it
        if any(_is_plugin(base, names, derived_names) for base in node.bases):
            derived.add(node)
            derived_names.add(node.name)
        else:
            derived_names.discard(node.name)
    return derived


def _is_plugin(base: ast.expr, names: Names, derived: set[str]) -> bool:
    if isinstance(base, ast.Name) and base.id in derived:
        return True
    return f"{SDK}.BasePlugin" in names.meanings(base)


def _check_manifest(tree: ast.Module, names: Names) -> Iterator[Finding]:
    value = manifest_value(tree)
    if value is None:
        yield Finding(0, 0, "G503", "has no MANIFEST = PluginMetadata(...) at module level")
        return
    line, col = value.lineno, value.col_offset + 1
    if not isinstance(value, ast.Call) or f"{SDK}.PluginMetadata" not in names.meanings(value.func):
        yield Finding(line, col, "G503", f"MANIFEST is no call of {SDK}.PluginMetadata")
        return
    if value.args or any(keyword.arg is None for keyword in value.keywords):
        yield Finding(line, col, "G503", "MANIFEST takes keyword arguments only, without '**'")
    for keyword in value.keywords:
        if not is_literal(keyword.value):
            yield Finding(
                keyword.value.lineno,
                keyword.value.col_offset + 1,
                "G503",
                f"MANIFEST's {keyword.arg or 'argument'} is not a literal value",
            )


def is_literal(expression: ast.expr) -> bool:
    """Whether an expression is written out: constants, and lists, tuples, sets, dicts of them."""
    pending: list[ast.expr | None] = [expression]
    while pending:
        match pending.pop():
            case ast.Constant():
                pass
            case ast.UnaryOp(
                op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float())
            ):
                pass
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                pending.extend(items)
            case ast.Dict(keys=keys, values=values):
                pending.extend(keys)
                pending.extend(values)
            case _:  # also None: `**` within a dict
                return False
    return True


def _bindings(nodes: Iterable[ast.AST], name: str) -> Iterator[tuple[int, int]]:
    """Where a name is bound, deleted or declared global, in any scope."""
    for node in nodes:
        match node:
            case ast.Name(id=found, ctx=ast.Store() | ast.Del()):
                same = found == name
            case ast.ClassDef(name=found) | ast.FunctionDef(name=found):
                same = found == name
            case ast.AsyncFunctionDef(name=found):
                same = found == name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                same = any((alias.asname or alias.name) == name for alias in aliases)
            case ast.Global(names=listed):
                same = name in listed
            case ast.MatchAs(name=found) | ast.MatchStar(name=found):
                same = found == name
            case ast.ExceptHandler(name=found):
                same = found == name
            case _:
                continue
        if same:
            yield node.lineno, node.col_offset
