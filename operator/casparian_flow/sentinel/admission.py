"""Who may connect from other machines: public keys, and whom each of them stands for.

The operator issues a key pair for each plugin version, Scout, backup job and MCP server, and tells
the Sentinel of the public halves here. A key alone lets its owner connect; a worker shows by its
pod's token as well that it is the pod it says it is (docs/trust.md).
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from casparian_flow.domain.errors import UsageError
from casparian_flow.protocol.curve import is_key


@dataclass(frozen=True, slots=True)
class Principal:
    """For whom a key stands.

    Attributes:
        namespace, service_account: of the pods that hold the key.
        plugin, artifact_hash: the one plugin version of a worker; the plugin's scoped name.
        root: the scoped name of a Scout's source root.
    """

    kind: Literal["worker", "scout", "backup", "mcp"]
    namespace: str
    service_account: str
    plugin: str = ""
    artifact_hash: str = ""
    root: str = ""

    def __str__(self) -> str:
        of = self.plugin or self.root
        return f"{self.kind} {self.namespace}/{self.service_account}" + (f" of {of}" if of else "")


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """What a token proves."""

    namespace: str
    service_account: str
    pod: str = ""


Review = Callable[[str], PodIdentity | None]
"""Judges a token: whose it is, None if it is none that counts. It may take its time, and raises
CasparianError if it cannot tell at present. Called in several threads."""


class Admission:
    """The keys that are admitted now. `replace` and `principal` may be called from any thread.

    Args:
        review: judges the tokens of workers; None = a key is proof enough, as in tests.

    Attributes:
        version: grows with every `replace`.
    """

    def __init__(self, review: Review | None = None) -> None:
        self.review = review
        self.version = 0
        self._keys: Mapping[str, Principal] = {}
        self._lock = threading.Lock()

    def replace(self, keys: Mapping[str, Principal]) -> None:
        """Admit these public keys (Z85), and no others, from now on.

        For a new key in place of an old one admit both, hand the new one out, then drop the old
        one. Who is connected with a key that is dropped ends what it holds, but gets no more jobs
        and cannot connect again.

        Raises:
            UsageError: a key is none, or a worker's has no plugin version; nothing is changed.
        """
        for key, principal in keys.items():
            if not is_key(key):
                raise UsageError(f"a key of {principal} is no CURVE key in Z85")
            if principal.kind == "worker" and not (principal.plugin and principal.artifact_hash):
                raise UsageError(f"a key of {principal} names no plugin version")
            if principal.kind == "scout" and not principal.root:
                raise UsageError(f"a key of {principal} names no source root")
        with self._lock:
            self._keys = dict(keys)
            self.version += 1

    def principal(self, key: str) -> Principal | None:
        """Whom a public key (Z85) stands for; None for one that is not admitted."""
        return self._keys.get(key)
