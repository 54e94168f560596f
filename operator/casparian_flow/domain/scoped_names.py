"""Names within a namespace: `NAMESPACE/NAME`, or the plain name on a machine without namespaces.

Plugins and source roots of different namespaces never meet: a rule of one namespace matches no
file of another's roots, and equal plain names are different scoped names.
"""

import re
from typing import NamedTuple

from casparian_flow.domain.errors import UsageError

SEPARATOR = "/"
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123), as Kubernetes wants it of namespaces."""
_ROOT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class ScopedName(NamedTuple):
    """A scoped name taken apart; the namespace is "" for a plain one."""

    namespace: str
    name: str


def scoped(namespace: str, name: str) -> str:
    """A name under its namespace.

    >>> scoped("team-a", "sales")
    'team-a/sales'
    >>> scoped("", "sales")
    'sales'
    """
    return f"{namespace}{SEPARATOR}{name}" if namespace else name


def split(name: str) -> ScopedName:
    """Take a scoped name apart.

    >>> split("team-a/sales")
    ScopedName(namespace='team-a', name='sales')
    >>> split("sales")
    ScopedName(namespace='', name='sales')
    """
    namespace, _, plain = name.rpartition(SEPARATOR)
    return ScopedName(namespace, plain)


def plain(name: str) -> str:
    """The name within its namespace: what an author calls a plugin, and what is signed."""
    return split(name).name


def namespace_of(name: str) -> str:
    return split(name).namespace


def check_namespace(namespace: str) -> str:
    """A namespace fit for the ledger, "" included.

    Raises:
        UsageError: it is no DNS label.
    """
    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise UsageError(
            f"namespace {namespace[:80]!r} is not usable",
            hint="Use up to 63 lower-case letters, digits and '-', as Kubernetes does.",
        )
    return namespace


def check_root_name(name: str) -> str:
    """A source root's plain name fit for the ledger, "" (it has none) included.

    Raises:
        UsageError: it has other characters, or too many.
    """
    if name and not _ROOT.fullmatch(name):
        raise UsageError(
            f"source root name {name[:80]!r} is not usable",
            hint="Use up to 253 letters, digits, '-', '_' and '.', a letter or digit at its ends.",
        )
    return name
