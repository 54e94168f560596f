"""The signature over a plugin version: a DSSE envelope around an in-toto statement.

DSSE (Dead Simple Signing Envelope) signs the payload's exact bytes together with its type, so that
nothing has to be put into a canonical form before it is checked. docs/trust.md shows both formats.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from casparian_flow.trust.bundle import ENVELOPE_BYTES_MAX, Bundle
from casparian_flow.trust.errors import EnvelopeError
from casparian_flow.trust.keys import key_id

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:casparian-flow:plugin-release:v1"
PARTS = ("source", "lockfile", "manifest")
"""Names under which a statement gives each part's own digest, so that a mismatch can be named."""
SIGNATURE_BYTES = 64
_TEXT_MAX = 400
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


@dataclass(frozen=True, slots=True)
class Identity:
    """A publisher whom a directory has authenticated.

    Attributes:
        provider: who vouched, such as "azure".
        subject: the directory's own id of the person, which never changes.
        email: "" if the directory tells none.
    """

    provider: str
    tenant: str
    subject: str
    email: str = ""


@dataclass(frozen=True, slots=True)
class Statement:
    """What a publisher signs.

    Attributes:
        artifact_hash: the plugin version's, 64 hex digits.
        digests: SHA-256 of each of PARTS, 64 hex digits.
        publisher: who published, as authenticated there; "" if not said.
        created_at: RFC 3339 in UTC, by the publisher's clock; informative.
        identity: None if nobody but the key vouches for the publisher.
    """

    plugin: str
    version: str
    publisher: str
    artifact_hash: str
    digests: Mapping[str, str]
    created_at: str
    identity: Identity | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope taken apart, with nothing verified.

    Attributes:
        key_id: of the key said to have signed; only a hint which one to try.
        payload: the signed bytes.
        signature: 64 bytes.
    """

    key_id: str
    payload_type: str
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Verified:
    """A statement whose signature is right, and the key that made it."""

    key_id: str
    statement: Statement


def statement_of(
    bundle: Bundle, *, publisher: str, now_us: int, identity: Identity | None = None
) -> Statement:
    """What to sign for a bundle, over its parts as they are.

    Args:
        now_us: wall clock, microseconds since the epoch.
    """
    created = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)
    return Statement(
        plugin=bundle.name,
        version=bundle.version,
        publisher=publisher,
        artifact_hash=bundle.computed_hash(),
        digests=part_digests(bundle),
        created_at=created.isoformat().removesuffix("+00:00") + "Z",
        identity=identity,
    )


def part_digests(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of each of PARTS."""
    texts = (bundle.source, bundle.lockfile, bundle.manifest_json)
    return {
        part: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        for part, text in zip(PARTS, texts, strict=True)
    }


def sign(statement: Statement, private_key: Ed25519PrivateKey) -> bytes:
    """The signed envelope as JSON; the same statement and key give the same bytes.

    Raises:
        EnvelopeError: the statement holds text too long to be accepted again.
    """
    payload = _encode_statement(statement)
    _decode_statement(payload)  # what is signed here must be readable there
    signature = private_key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    document = _EnvelopeJson(
        payload=base64.b64encode(payload).decode("ascii"),
        payloadType=PAYLOAD_TYPE,
        signatures=[
            _SignatureJson(
                keyid=key_id(private_key.public_key()),
                sig=base64.b64encode(signature).decode("ascii"),
            )
        ],
    )
    return msgspec.json.encode(document)


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE: the bytes that are signed.

    >>> pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_envelope(data: bytes) -> Envelope:
    """Take an envelope apart without verifying it.

    Raises:
        EnvelopeError: it is too large, no JSON of the right shape, or has not exactly one
            signature.
    """
    if len(data) > ENVELOPE_BYTES_MAX:
        raise EnvelopeError(f"the envelope is larger than {ENVELOPE_BYTES_MAX // 1024} KiB")
    document = _decoded(data, _EnvelopeJson, "the envelope")
    if len(document.signatures) != 1:
        raise EnvelopeError(f"the envelope has {len(document.signatures)} signatures, want one")
    (entry,) = document.signatures
    if not _SHA256.fullmatch(entry.keyid):
        raise EnvelopeError("the envelope's key id is not 64 hex digits")
    signature = _base64(entry.sig, "signature")
    if len(signature) != SIGNATURE_BYTES:
        raise EnvelopeError(f"the signature has {len(signature)} bytes, want {SIGNATURE_BYTES}")
    if len(document.payloadType) > _TEXT_MAX or not document.payloadType.isascii():
        raise EnvelopeError("the envelope's payload type is not usable")
    return Envelope(
        entry.keyid, document.payloadType, _base64(document.payload, "payload"), signature
    )


def verify(data: bytes, keys: Mapping[str, Ed25519PublicKey]) -> Verified:
    """Check an envelope's signature, and only then read its statement.

    Args:
        keys: the keys that count, by key id.

    Raises:
        EnvelopeError: it is malformed, signed by none of the keys, or the signature is wrong.
    """
    envelope = read_envelope(data)
    public = keys.get(envelope.key_id)
    if public is None:
        raise EnvelopeError(f"no key {envelope.key_id[:16]}… is at hand")
    if not signature_holds(envelope, public):
        raise EnvelopeError("the signature does not match what it is said to sign")
    return Verified(envelope.key_id, read_statement(envelope))


def signature_holds(envelope: Envelope, public: Ed25519PublicKey) -> bool:
    """Whether this key signed this payload as this type."""
    signed = pre_authentication_encoding(envelope.payload_type, envelope.payload)
    try:
        public.verify(envelope.signature, signed)
    except InvalidSignature:
        return False
    return True


def read_statement(envelope: Envelope) -> Statement:
    """What an envelope's payload says; to be believed only if the signature holds.

    Raises:
        EnvelopeError: it is no statement about one plugin version.
    """
    if envelope.payload_type != PAYLOAD_TYPE:
        raise EnvelopeError(f"the payload type is not {PAYLOAD_TYPE}")
    return _decode_statement(envelope.payload)


class _SignatureJson(msgspec.Struct, forbid_unknown_fields=True):
    keyid: str
    sig: str


class _EnvelopeJson(msgspec.Struct, forbid_unknown_fields=True):
    payload: str
    payloadType: str  # noqa: N815 - DSSE's name
    signatures: list[_SignatureJson]


class _SubjectJson(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    digest: dict[str, str]


class _IdentityJson(msgspec.Struct, forbid_unknown_fields=True):
    provider: str
    tenant: str
    subject: str
    email: str


class _PredicateJson(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    plugin: str
    version: str
    publisher: str
    createdAt: str  # noqa: N815 - in-toto's style
    digests: dict[str, str]
    identity: _IdentityJson | None = None


class _StatementJson(msgspec.Struct, forbid_unknown_fields=True):
    type: str = msgspec.field(name="_type")
    subject: list[_SubjectJson]
    predicateType: str  # noqa: N815 - in-toto's name
    predicate: _PredicateJson


def _encode_statement(statement: Statement) -> bytes:
    document = _StatementJson(
        type=STATEMENT_TYPE,
        subject=[
            _SubjectJson(
                name=f"{statement.plugin}-{statement.version}",
                digest={"sha256": statement.artifact_hash},
            )
        ],
        predicateType=PREDICATE_TYPE,
        predicate=_PredicateJson(
            plugin=statement.plugin,
            version=statement.version,
            publisher=statement.publisher,
            createdAt=statement.created_at,
            digests={part: statement.digests[part] for part in PARTS},
            identity=_identity_json(statement.identity),
        ),
    )
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError as error:
        raise EnvelopeError("a name in the statement is not valid Unicode") from error


def _decode_statement(payload: bytes) -> Statement:
    document = _decoded(payload, _StatementJson, "the signed statement")
    predicate = document.predicate
    if document.type != STATEMENT_TYPE or document.predicateType != PREDICATE_TYPE:
        raise EnvelopeError("the signed statement is of another type")
    if len(document.subject) != 1 or set(document.subject[0].digest) != {"sha256"}:
        raise EnvelopeError("the signed statement is not about one SHA-256 digest")
    digests = [document.subject[0].digest["sha256"], *predicate.digests.values()]
    if set(predicate.digests) != set(PARTS) or not all(map(_SHA256.fullmatch, digests)):
        raise EnvelopeError("the signed statement has digests that are none")
    names: tuple[str, ...] = (predicate.plugin, predicate.version, predicate.publisher)
    if predicate.identity is not None:
        names += msgspec.structs.astuple(predicate.identity)
    if any(len(text) > _TEXT_MAX or not (text or "x").isprintable() for text in names):
        raise EnvelopeError("a name in the signed statement is too long or has control characters")
    if not _INSTANT.fullmatch(predicate.createdAt):
        raise EnvelopeError("the signed statement's createdAt is not an RFC 3339 instant in UTC")
    return Statement(
        plugin=predicate.plugin,
        version=predicate.version,
        publisher=predicate.publisher,
        artifact_hash=digests[0],
        digests=predicate.digests,
        created_at=predicate.createdAt,
        identity=_identity_of(predicate.identity),
    )


def _identity_json(identity: Identity | None) -> _IdentityJson | None:
    if identity is None:
        return None
    return _IdentityJson(identity.provider, identity.tenant, identity.subject, identity.email)


def _identity_of(found: _IdentityJson | None) -> Identity | None:
    if found is None:
        return None
    return Identity(found.provider, found.tenant, found.subject, found.email)


def _decoded(data: bytes, kind: type[Any], what: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise EnvelopeError(f"{what} is malformed: {error}") from error


def _base64(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EnvelopeError(f"the envelope's {what} is not base64") from error
    # Unused bits at the end could be anything otherwise, and a changed byte go unnoticed.
    if base64.b64encode(raw).decode("ascii") != text:
        raise EnvelopeError(f"the envelope's {what} is not base64 in its canonical form")
    return raw
