"""Signed plugins for tests: a key that everybody knows, and a policy that trusts it.

The key is the same in every process, since what one has signed another may have to trust.
"""

import hashlib
import textwrap
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casparian_flow.domain.records import Sample
from casparian_flow.trust.bundle import Bundle, make_bundle, pack
from casparian_flow.trust.envelope import sign, statement_of
from casparian_flow.trust.gatekeeper_lists import Profile
from casparian_flow.trust.policy import TrustedKey, TrustPolicy, trust_only
from casparian_flow.trust.rules import TrustRules

SIGNER = "tests"
WALL_US = 1_760_000_000_000_000
KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"for tests only").digest())


def signed(
    source: str,
    name: str = "under_test",
    version: str = "1.0.0",
    lockfile: str = "",
    samples: Iterable[Sample] = (),
) -> Bundle:
    """A plugin version signed with KEY; the source is dedented."""
    bundle = make_bundle(name, version, textwrap.dedent(source), lockfile, samples)
    statement = statement_of(bundle, publisher=SIGNER, now_us=WALL_US)
    return bundle.with_envelope(sign(statement, KEY))


def signed_bundle(
    source: str, name: str = "under_test", version: str = "1.0.0", lockfile: str = ""
) -> bytes:
    """The same as the bytes of a `.casparian` file."""
    return pack(signed(source, name, version, lockfile))


def policy() -> TrustPolicy:
    """Trusts KEY for everything, always."""
    return trust_only(KEY.public_key(), SIGNER)


def policy_for(key: TrustedKey, **others: object) -> TrustPolicy:
    """Trusts one key under SIGNER's name, with the policy's other fields as given."""
    return TrustPolicy((SIGNER,), {SIGNER: (key,)}, **others)  # type: ignore[arg-type]


def rules() -> TrustRules:
    """Trusts KEY for everything; a TrustSource."""
    return TrustRules(policy())


def lax_rules() -> TrustRules:
    """Likewise, and lets pass every source."""
    return TrustRules(policy(), Profile.OFF)


__all__ = [
    "KEY",
    "SIGNER",
    "WALL_US",
    "lax_rules",
    "policy",
    "policy_for",
    "rules",
    "signed",
    "signed_bundle",
]
