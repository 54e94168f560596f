"""What was found out about a bundle, as decisions are made on it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from casparian_flow.kube import names
from casparian_flow.kube.reasons import VerifiedReason

FILE_SCHEMES = frozenset({"parquet", "csv"})
EMBEDDED_SCHEMES = frozenset({"sqlite", "duckdb"})
"""Databases that are files: two machines that write one destroy it."""


@dataclass(frozen=True, slots=True)
class TopicWiring:
    """Where a topic goes, and what its rows must look like ("" for no contract)."""

    uris: tuple[str, ...]
    contract: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A bundle that was read and checked; all but reason and message only where it may run.

    Attributes:
        name: the plugin's own.
        lock_hash: of the environment, "" for none.
        bundle: as it was signed; `compressed` as objects hold it.
        topics: by name, or `*`.
    """

    reason: VerifiedReason
    message: str
    name: str = ""
    version: str = ""
    artifact_hash: str = ""
    signer: str = ""
    lock_hash: str = ""
    bundle: bytes = field(default=b"", repr=False)
    compressed: bytes = field(default=b"", repr=False)
    topics: Mapping[str, TopicWiring] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.reason is VerifiedReason.VERIFIED

    def uris(self) -> list[str]:
        """All sinks; a topic that nothing names goes to Parquet."""
        found = [uri for topic in self.topics.values() for uri in topic.uris]
        return found or ["parquet://any"]

    def embedded(self) -> list[str]:
        """Database files that the sinks write, as paths of the output volume."""
        paths = (
            u.partition("://")[2].partition("?")[0]
            for u in self.uris()
            if scheme(u) in EMBEDDED_SCHEMES
        )
        return sorted({path.removeprefix(f"{names.OUTPUTS_PATH}/") for path in paths})

    @property
    def writes_files(self) -> bool:
        return any(scheme(u) in FILE_SCHEMES | EMBEDDED_SCHEMES for u in self.uris())

    @property
    def writes_to_servers(self) -> bool:
        return any(scheme(u) not in FILE_SCHEMES | EMBEDDED_SCHEMES for u in self.uris())


def scheme(uri: str) -> str:
    return uri.partition("://")[0]
