"""What the names in a plugin's source stand for, as far as imports and plain assignments tell.

Scopes and order are ignored on purpose: a name that means a module anywhere means it everywhere.
That errs on the side of a finding.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator

from casparian_flow.trust.gatekeeper_lists import SDK, SDK_NAMES

SEGMENTS_MAX = 12
MEANINGS_MAX = 8
"""Most modules and members that one name may stand for before it counts as a disguise."""

Edge = tuple[str, tuple[str, ...], str]
"""An assignment `target = root.attributes`, as (root, attributes, target)."""


class Names:
    """Maps names to the dotted names of what they may stand for."""

    def __init__(self, nodes: Iterable[ast.AST]) -> None:
        self._meanings: dict[str, set[str]] = defaultdict(set)
        self._edges: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        self.disguised: set[str] = set()
        """Names with more meanings than anybody needs."""
        self._pending: list[tuple[str, str]] = []
        for node in nodes:
            for root, attributes, target in _edges(node):
                self._edges[root].append((attributes, target))
            self._pending.extend(_imports(node))
        self._spread()

    def meanings(self, expression: ast.expr) -> Iterator[str]:
        """Dotted names that an expression may stand for; none where nothing is known."""
        chain = dotted(expression)
        if chain is None:
            return
        root, attributes = chain
        for meaning in sorted(self._meanings.get(root, ())):
            yield ".".join((meaning, *attributes))
        for position, attribute in enumerate(attributes, 1):
            for meaning in sorted(self._meanings.get(f".{attribute}", ())):
                yield ".".join((meaning, *attributes[position:]))

    def _spread(self) -> None:
        while self._pending:
            name, meaning = self._pending.pop()
            known = self._meanings[name]
            if meaning in known:
                continue
            if len(known) >= MEANINGS_MAX:
                self.disguised.add(name)
                continue
            known.add(meaning)
            for attributes, target in self._edges.get(name, ()):
                longer = ".".join((meaning, *attributes))
                if longer.count(".") < SEGMENTS_MAX:
                    self._pending.append((target, longer))


def dotted(expression: ast.expr) -> tuple[str, tuple[str, ...]] | None:
    """The root and the attributes of `root.a.b`; the root is "" where it is no name.

    None for what is neither a name nor an attribute, and for a very long chain.
    """
    attributes: list[str] = []
    node = expression
    while isinstance(node, ast.Attribute):
        if len(attributes) >= SEGMENTS_MAX:
            return None
        attributes.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return node.id, tuple(reversed(attributes))
    return ("", tuple(reversed(attributes))) if attributes else None


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname:
                yield alias.asname, alias.name
            else:
                root = alias.name.partition(".")[0]
                yield root, root
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for alias in node.names:
            if alias.name != "*":
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
            elif node.module == SDK:
                yield from ((name, f"{SDK}.{name}") for name in sorted(SDK_NAMES))


def _edges(node: ast.AST) -> Iterator[Edge]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _paired(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield from _paired(node.target, node.value)
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaulted = positional[len(positional) - len(node.defaults) :]
        yield from _defaults(zip(defaulted, node.defaults, strict=False))
        yield from _defaults(zip(node.kwonlyargs, node.kw_defaults, strict=False))


def _defaults(pairs: Iterable[tuple[ast.arg, ast.expr | None]]) -> Iterator[Edge]:
    for argument, default in pairs:
        chain = dotted(default) if default is not None else None
        if chain is not None:
            yield (*chain, argument.arg)


def _paired(target: ast.expr, value: ast.expr) -> Iterator[Edge]:
    """Assignments of one name to one chain; tuples are taken apart one level deep."""
    if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
        pairs = list(zip(target.elts, value.elts, strict=False))
    else:
        pairs = [(target, value)]
    for left, right in pairs:
        chain = dotted(right)
        if chain is None:
            continue
        if isinstance(left, ast.Name):
            yield (*chain, left.id)
            yield (*chain, f".{left.id}")  # in a class it is an attribute, too
        elif isinstance(left, ast.Attribute):
            yield (*chain, f".{left.attr}")
