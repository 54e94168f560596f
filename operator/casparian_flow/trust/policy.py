"""Who may publish what: decides whether a plugin version may be deployed, loaded and run.

The same check runs in the Sentinel at deploy and in the worker before each load, over the very
bytes that are about to be stored or imported. A key's validity is judged at the recorded time of
the deploy, so that a version outlives its key's expiry; revocation counts from the moment it is
known. The checks are listed in `TrustPolicy.check` in their order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from casparian_flow.trust.bundle import Bundle, manifest_names
from casparian_flow.trust.envelope import (
    PARTS,
    Envelope,
    Identity,
    Statement,
    part_digests,
    read_envelope,
    read_statement,
    signature_holds,
)
from casparian_flow.trust.errors import BundleError, EnvelopeError, PolicyError, UntrustedError
from casparian_flow.trust.keys import key_id, short_id

SCOPE_CHARS_MAX = 200
ANY_PLUGIN = ("*",)
_KEY_ID = re.compile(r"[0-9a-f]{64}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Code(StrEnum):
    """What a check found; stable, for machines."""

    TRUSTED = "trusted"
    UNSIGNED = "unsigned"
    """There is no signature. With `allow_unsigned` this is no refusal."""
    UNKNOWN_SIGNER = "unknown_signer"
    """The key belongs to somebody who is not among `allowed_signers`."""
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    HASH_MISMATCH = "hash_mismatch"
    """The source, lock file or manifest is not what was hashed or signed."""
    NAME_MISMATCH = "name_mismatch"
    VERSION_MISMATCH = "version_mismatch"
    OUT_OF_SCOPE = "out_of_scope"
    NOT_YET_VALID = "not_yet_valid"
    EXPIRED = "expired"
    REVOKED = "revoked"
    MALFORMED = "malformed"
    """The envelope, the statement or the manifest cannot be read."""


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """One public key of a signer.

    Attributes:
        scopes: names of plugins it may sign, as globs (`*`, `?`, `[…]`; case counts).
        not_before_us, not_after_us: first and last instant of a deploy for which it counts, as
            microseconds since the epoch; None for no bound.
    """

    public: Ed25519PublicKey
    scopes: tuple[str, ...] = ANY_PLUGIN
    not_before_us: int | None = None
    not_after_us: int | None = None

    @property
    def key_id(self) -> str:
        return key_id(self.public)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a check.

    Attributes:
        ok: whether the version may be deployed or run.
        message: what was found, for people; names what does not match.
        hint: what to do next, "" if nothing.
        signer, key_id: who signed; "" unless the signature holds (REVOKED may name a key without
            that).
        publisher, identity: as the signed statement says, "" and None without one.
    """

    ok: bool
    code: Code
    message: str
    hint: str = ""
    signer: str = ""
    key_id: str = ""
    publisher: str = ""
    identity: Identity | None = None

    def require(self) -> "Verdict":
        """This verdict, if it is favourable.

        Raises:
            UntrustedError: otherwise.
        """
        if not self.ok:
            raise UntrustedError(self.message, code=self.code, hint=self.hint)
        return self


class _RefusalError(Exception):
    """Leaves the checks at the first one that fails."""

    def __init__(self, code: Code, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class _Signer:
    name: str
    key: TrustedKey


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """Whose signatures count. An empty policy trusts nobody.

    Attributes:
        allowed_signers: names of signers whose keys count.
        keys: each signer's keys.
        revoked: key id (64 hex digits) → reason.
        allow_unsigned: whether a version without any signature may run. One with a signature is
            always checked.
    """

    allowed_signers: tuple[str, ...] = ()
    keys: Mapping[str, tuple[TrustedKey, ...]] = field(default_factory=dict)
    revoked: Mapping[str, str] = field(default_factory=dict)
    allow_unsigned: bool = False
    _by_id: dict[str, _Signer] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the policy itself.

        Raises:
            PolicyError: a key has two owners, a signer no name, a window or scope makes no sense,
                or a revocation names no key id.
        """
        by_id: dict[str, _Signer] = {}
        for signer, keys in self.keys.items():
            if not signer or not signer.isprintable():
                raise PolicyError(f"{signer!r} cannot be the name of a signer")
            for key in keys:
                _check_key(signer, key)
                other = by_id.setdefault(key.key_id, _Signer(signer, key))
                if other.key is not key:
                    raise PolicyError(
                        f"key {short_id(key.key_id)} is listed twice, under {other.name} and "
                        f"{signer}",
                        hint="Give each key to one signer, once, with all of its scopes.",
                    )
        for revoked in self.revoked:
            if not _KEY_ID.fullmatch(revoked):
                raise PolicyError(
                    f"{revoked[:80]!r} is no key id",
                    hint="Revoke by the 64 hex digits that 'casparian keys show' prints.",
                )
        object.__setattr__(self, "_by_id", by_id)

    def check(self, bundle: Bundle, *, deployed_at_us: int) -> Verdict:
        """Judge a plugin version by its exact parts. Never raises.

        Args:
            deployed_at_us: when the Sentinel recorded the deploy, or now while deploying;
                microseconds since the epoch.
        """
        try:
            _check_names(bundle)
            if not bundle.envelope:
                return self._unsigned(bundle)
            envelope = _read(bundle)
            signer = self._signer(envelope)
            _check_signature(envelope, signer)
            statement = _statement(envelope)
            _check_statement(bundle, statement)
            self._check_revocation(envelope.key_id, signer.name)
            _check_scope(signer, bundle.name)
            _check_window(signer, deployed_at_us)
        except _RefusalError as refusal:
            return self._refused(refusal, bundle)
        return Verdict(
            True,
            Code.TRUSTED,
            f"{bundle.name} {bundle.version} is signed by {signer.name} "
            f"(key {short_id(envelope.key_id)})",
            signer=signer.name,
            key_id=envelope.key_id,
            publisher=statement.publisher,
            identity=statement.identity,
        )

    def revocation(self, key_id: str) -> str | None:
        """Why a key was revoked, "" if no reason was given; None if it was not."""
        return self.revoked.get(key_id)

    def _unsigned(self, bundle: Bundle) -> Verdict:
        _check_own_hash(bundle, None)
        if not self.allow_unsigned:
            raise _RefusalError(
                Code.UNSIGNED,
                "it is not signed",
                "Publish it with a trusted key, or set allow_unsigned = true in [trust].",
            )
        message = f"{bundle.name} {bundle.version} is not signed; allow_unsigned lets it pass"
        return Verdict(True, Code.UNSIGNED, message)

    def _signer(self, envelope: Envelope) -> _Signer:
        signer = self._by_id.get(envelope.key_id)
        if signer is None:
            self._check_revocation(envelope.key_id, "")
            raise _RefusalError(
                Code.UNKNOWN_KEY,
                f"it is signed with key {short_id(envelope.key_id)}, which nobody trusts here",
                "Add the signer's public key to [trust] with 'casparian keys trust'.",
            )
        if signer.name not in self.allowed_signers:
            raise _RefusalError(
                Code.UNKNOWN_SIGNER,
                f"its signer {signer.name} is not among allowed_signers",
                f"Add {signer.name!r} to allowed_signers in [trust].",
            )
        return signer

    def _check_revocation(self, key_id: str, signer: str) -> None:
        reason = self.revocation(key_id)
        if reason is None:
            return
        owner = f" of {signer}" if signer else ""
        raise _RefusalError(
            Code.REVOKED,
            f"key {short_id(key_id)}{owner} was revoked" + (f": {reason}" if reason else ""),
            "Publish a new version, signed with another key.",
        )

    def _refused(self, refusal: _RefusalError, bundle: Bundle) -> Verdict:
        message = f"{_shown(bundle.name)} {_shown(bundle.version)}: {refusal.message}"
        if refusal.code not in _SIGNATURE_HOLDS:
            return Verdict(False, refusal.code, message, refusal.hint)
        envelope = read_envelope(bundle.envelope)
        signer = self._by_id.get(envelope.key_id)
        name = signer.name if signer else ""
        return Verdict(False, refusal.code, message, refusal.hint, name, envelope.key_id)


_SIGNATURE_HOLDS = frozenset({Code.REVOKED, Code.OUT_OF_SCOPE, Code.NOT_YET_VALID, Code.EXPIRED})
"""Refusals of a key rather than of what it signed."""
_REPUBLISH = "The bytes were altered after they were signed; publish the plugin again."


def trust_only(public: Ed25519PublicKey, signer: str) -> TrustPolicy:
    """A policy that trusts one key for everything, always: what `verify` needs."""
    return TrustPolicy((signer,), {signer: (TrustedKey(public),)})


def _check_key(signer: str, key: TrustedKey) -> None:
    if not key.scopes or any(not s or len(s) > SCOPE_CHARS_MAX for s in key.scopes):
        raise PolicyError(
            f"a key of {signer} has no usable scopes",
            hint='Scopes are globs of plugin names, such as ["sales_*"]; "*" stands for all.',
        )
    if (
        key.not_before_us is not None
        and key.not_after_us is not None
        and key.not_before_us > key.not_after_us
    ):
        raise PolicyError(
            f"a key of {signer} is valid from {_instant(key.not_before_us)} "
            f"until {_instant(key.not_after_us)}, which is never"
        )


def _check_names(bundle: Bundle) -> None:
    try:
        name, version = manifest_names(bundle.manifest_json)
    except BundleError as error:
        raise _RefusalError(Code.MALFORMED, str(error), _REPUBLISH) from error
    _same(Code.NAME_MISMATCH, "name", "the manifest", name, bundle.name)
    _same(Code.VERSION_MISMATCH, "version", "the manifest", version, bundle.version)


def _same(code: Code, what: str, where: str, found: str, given: str) -> None:
    if found != given:
        message = f"the {what} does not match: {where} says {_shown(found)}"
        raise _RefusalError(code, message, _REPUBLISH)


def _check_own_hash(bundle: Bundle, statement: Statement | None) -> None:
    actual = bundle.computed_hash()
    if bundle.artifact_hash == actual:
        return
    raise _RefusalError(
        Code.HASH_MISMATCH,
        f"{_differing(bundle, statement)} not match the artifact hash: "
        f"given {_shown(bundle.artifact_hash)[:16]}…, computed {actual[:16]}…",
        _REPUBLISH,
    )


def _read(bundle: Bundle) -> Envelope:
    try:
        return read_envelope(bundle.envelope)
    except EnvelopeError as error:
        raise _RefusalError(Code.MALFORMED, str(error), _REPUBLISH) from error


def _check_signature(envelope: Envelope, signer: _Signer) -> None:
    if not signature_holds(envelope, signer.key.public):
        raise _RefusalError(
            Code.BAD_SIGNATURE,
            f"the signature does not match: it was not made by key {short_id(envelope.key_id)} "
            f"of {signer.name} over this statement",
            _REPUBLISH,
        )


def _statement(envelope: Envelope) -> Statement:
    try:
        return read_statement(envelope)
    except EnvelopeError as error:
        raise _RefusalError(Code.MALFORMED, str(error), _REPUBLISH) from error


def _check_statement(bundle: Bundle, statement: Statement) -> None:
    where = "the signed statement"
    _same(Code.NAME_MISMATCH, "name", where, statement.plugin, bundle.name)
    _same(Code.VERSION_MISMATCH, "version", where, statement.version, bundle.version)
    _check_own_hash(bundle, statement)
    if statement.artifact_hash != bundle.artifact_hash:
        raise _RefusalError(
            Code.HASH_MISMATCH,
            f"{_differing(bundle, statement)} not match what was signed: "
            f"signed {statement.artifact_hash[:16]}…, found {bundle.artifact_hash[:16]}…",
            _REPUBLISH,
        )


def _differing(bundle: Bundle, statement: Statement | None) -> str:
    """Which part is not the one that was signed: subject and verb of a sentence."""
    if statement is None:
        return "the source, the lock file or the manifest does"
    actual = part_digests(bundle)
    words = dict(zip(PARTS, ("the source", "the lock file", "the manifest"), strict=True))
    found = [words[part] for part in PARTS if actual[part] != statement.digests[part]]
    if not found:
        return "the parts are those that were signed, but the recorded hash does"
    return f"{' and '.join(found)} {'does' if len(found) == 1 else 'do'}"


def _check_scope(signer: _Signer, plugin: str) -> None:
    if not any(fnmatchcase(plugin, scope) for scope in signer.key.scopes):
        raise _RefusalError(
            Code.OUT_OF_SCOPE,
            f"key {short_id(signer.key.key_id)} of {signer.name} may sign "
            f"{', '.join(signer.key.scopes)} only",
            "Sign with a key whose scopes include the plugin, or widen them in [trust].",
        )


def _check_window(signer: _Signer, deployed_at_us: int) -> None:
    key, known = signer.key, f"key {short_id(signer.key.key_id)} of {signer.name}"
    when = f"the deploy is at {_instant(deployed_at_us)}"
    if key.not_before_us is not None and deployed_at_us < key.not_before_us:
        raise _RefusalError(
            Code.NOT_YET_VALID,
            f"{known} is valid from {_instant(key.not_before_us)}, and {when}",
            "Deploy later; if the time is wrong, set the Sentinel's clock.",
        )
    if key.not_after_us is not None and deployed_at_us > key.not_after_us:
        raise _RefusalError(
            Code.EXPIRED,
            f"{known} was valid until {_instant(key.not_after_us)}, and {when}",
            "Sign with a newer key; if the time is wrong, set the Sentinel's clock.",
        )


def _instant(us: int) -> str:
    try:
        text = (_EPOCH + timedelta(microseconds=us)).isoformat(sep=" ", timespec="seconds")
    except OverflowError:
        return f"{us} µs after 1970"
    return text.removesuffix("+00:00") + " UTC"


def _shown(text: str) -> str:
    """Text of unknown origin, fit for a line of a message."""
    return text[:120] if text.isprintable() else repr(text[:120])
