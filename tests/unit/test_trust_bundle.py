"""Bundles and envelopes: exact round trips, and every changed byte is noticed and named."""

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signing_kit import KEY, SIGNER, WALL_US, policy, signed, signed_bundle

from casparian_flow.domain.records import Sample
from casparian_flow.trust import bundle as bundles
from casparian_flow.trust.artifact import artifact_hash, release_json
from casparian_flow.trust.bundle import Bundle, make_bundle, pack, unpack
from casparian_flow.trust.envelope import (
    Statement,
    pre_authentication_encoding,
    read_envelope,
    sign,
    statement_of,
    verify,
)
from casparian_flow.trust.errors import BundleError, EnvelopeError
from casparian_flow.trust.keys import generate, key_id
from casparian_flow.trust.policy import Code

SOURCE = "from casparian_flow.sdk import *\nprint('é')\n"
LOCK = 'version = 1\nrequires-python = ">=3.11"\n'
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(texts, texts, texts, texts, texts, st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_a_bundle_comes_back_exactly_and_in_one_form_only(
    name: str, version: str, source: str, lock: str, manifest: str, envelope: bytes
) -> None:
    given_bundle = Bundle(name, version, source, lock, manifest, "a" * 64, envelope)
    packed = pack(given_bundle)
    assert unpack(packed) == given_bundle
    assert pack(unpack(packed)) == packed


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_whatever_bytes_are_no_bundle_are_refused_clearly(tail: bytes) -> None:
    head = pack(signed("x = 1\n"))[:32]
    for data in (tail, head + tail):
        with pytest.raises(BundleError):
            unpack(data)


def parts_of(data: bytes) -> list[tuple[str, int, int]]:
    """(part, first byte, one after the last) of a bundle's parts, lengths left out."""
    names = ["label", "name", "version", "source", "lock file", "manifest", "hash", "envelope"]
    found, start = [], 0
    for name in names:
        size = int.from_bytes(data[start : start + 8], "big")
        found.append((name, start + 8, start + 8 + size))
        start += 8 + size
    assert start == len(data)
    return found


def test_every_flipped_byte_is_noticed_and_named() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    data = signed_bundle(SOURCE, lockfile=LOCK)
    codes: dict[str, set[str]] = {}
    messages: dict[str, set[str]] = {}
    parts = parts_of(data)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.randrange(8)
        part = next((name for name, a, b in parts if a <= position < b), "length")
        try:
            verdict = policy().check(unpack(bytes(changed)), deployed_at_us=WALL_US)
        except BundleError as error:
            codes.setdefault(part, set()).add("refused")
            messages.setdefault(part, set()).add(str(error))
            continue
        assert not verdict.ok, (part, position)
        codes.setdefault(part, set()).add(verdict.code)
        messages.setdefault(part, set()).add(verdict.message)
    assert codes["label"] == {"refused"}
    assert codes["length"] == {"refused"}
    assert codes["name"] <= {"refused", Code.NAME_MISMATCH}
    assert codes["version"] <= {"refused", Code.VERSION_MISMATCH}
    assert codes["source"] <= {"refused", Code.HASH_MISMATCH}
    assert codes["lock file"] <= {"refused", Code.HASH_MISMATCH}
    assert codes["hash"] <= {"refused", Code.HASH_MISMATCH}
    assert codes["envelope"] <= {Code.MALFORMED, Code.BAD_SIGNATURE, Code.UNKNOWN_KEY}
    for part in ("source", "lock file"):
        told = [m for m in messages[part] if "UTF-8" not in m]
        assert told
        assert all(f"the {part} does not match" in message for message in told)
    assert all("hash" in message for message in messages["hash"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_bundle_that_was_cut_off_names_the_part(share: float) -> None:
    data = signed_bundle(SOURCE)
    with pytest.raises(BundleError, match=r"ends|no plugin bundle"):
        unpack(data[: int(len(data) * share)])


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(BundleError, match="3 bytes follow"):
        unpack(signed_bundle(SOURCE) + b"abc")


@pytest.mark.parametrize("part", ["name", "version", "source", "lock file", "manifest", "envelope"])
def test_each_part_has_a_limit_both_ways(part: str) -> None:
    limits = bundles._LIMITS
    values = dict.fromkeys(limits, "") | {"envelope": b"", "artifact hash": "a" * 64}
    values[part] = b"x" * (limits[part] + 1) if part == "envelope" else "x" * (limits[part] + 1)
    with pytest.raises(BundleError, match=f"{part} is larger than"):
        pack(Bundle(*values.values()))  # type: ignore[arg-type]
    label = len(bundles.BUNDLE_LABEL).to_bytes(8, "big") + bundles.BUNDLE_LABEL
    before = list(limits).index(part)
    huge = label + bytes(8) * before + (2**63).to_bytes(8, "big")
    with pytest.raises(BundleError, match=f"{part} is larger than"):
        unpack(huge)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(BundleError, match="source holds text that is not valid Unicode"):
        pack(make_bundle("p", "1.0.0", "x = '\ud800'"))
    data = bytearray(pack(make_bundle("p", "1.0.0", "x = 'abc'")))
    data[data.index(b"abc")] = 0xFF
    with pytest.raises(BundleError, match="source is not UTF-8"):
        unpack(bytes(data))


HASH_SCRIPT = (
    "import sys\nfrom casparian_flow.trust.bundle import make_bundle, pack\n"
    "b = make_bundle('p', '1.0.0', 'print(1)\\n', 'lock')\n"
    "sys.stdout.write(b.artifact_hash + ' ' + __import__('hashlib').sha256(pack(b)).hexdigest())"
)


def test_hash_and_bundle_are_the_same_in_every_process() -> None:
    answers = set()
    for seed in ("0", "1", "random"):
        environment = dict(
            os.environ, PYTHONHASHSEED=seed, LC_ALL="C" if seed == "1" else "C.UTF-8"
        )
        done = subprocess.run(
            [sys.executable, "-c", HASH_SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        answers.add(done.stdout)
    here = make_bundle("p", "1.0.0", "print(1)\n", "lock")
    assert answers == {f"{here.artifact_hash} {hashlib.sha256(pack(here)).hexdigest()}"}
    assert here.artifact_hash == artifact_hash("print(1)\n", "lock", release_json("p", "1.0.0"))


def statement(**changes: object) -> Statement:
    plain = statement_of(make_bundle("p", "1.0.0", SOURCE), publisher=SIGNER, now_us=WALL_US)
    fields = {name: getattr(plain, name) for name in Statement.__slots__}
    return Statement(**(fields | changes))


def test_an_envelope_is_dsse_around_an_in_toto_statement() -> None:
    raw = sign(statement(), KEY)
    document = json.loads(raw)
    payload = base64.b64decode(document["payload"])
    assert document["payloadType"] == "application/vnd.in-toto+json"
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "p-1.0.0", "digest": {"sha256": statement().artifact_hash}}],
        "predicateType": "urn:casparian-flow:plugin-release:v1",
        "predicate": {
            "plugin": "p",
            "version": "1.0.0",
            "publisher": SIGNER,
            "createdAt": "2025-10-09T08:53:20Z",
            "digests": dict(statement().digests),
        },
    }
    signed_text = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload
    (entry,) = document["signatures"]
    assert entry["keyid"] == key_id(KEY.public_key())
    KEY.public_key().verify(base64.b64decode(entry["sig"]), signed_text)


def test_the_pre_authentication_encoding_is_the_specifications() -> None:
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_signing_is_deterministic_and_verifies_with_the_public_key_alone() -> None:
    assert sign(statement(), KEY) == sign(statement(), KEY)
    verified = verify(sign(statement(), KEY), {key_id(KEY.public_key()): KEY.public_key()})
    assert verified.statement == statement()
    assert verified.key_id == key_id(KEY.public_key())


def test_an_envelope_by_another_key_does_not_verify() -> None:
    other = generate()
    mine = key_id(KEY.public_key())
    with pytest.raises(EnvelopeError, match="no key"):
        verify(sign(statement(), other), {mine: KEY.public_key()})
    posing = json.loads(sign(statement(), other))
    posing["signatures"][0]["keyid"] = mine
    with pytest.raises(EnvelopeError, match="does not match"):
        verify(json.dumps(posing).encode(), {mine: KEY.public_key()})


def test_a_signature_over_another_payload_type_does_not_count() -> None:
    document = json.loads(sign(statement(), KEY))
    document["payloadType"] = "text/plain"
    with pytest.raises(EnvelopeError, match="does not match"):
        verify(json.dumps(document).encode(), {key_id(KEY.public_key()): KEY.public_key()})


def envelope_with(**changes: object) -> bytes:
    return json.dumps(json.loads(sign(statement(), KEY)) | changes).encode()


ENTRY = json.loads(sign(statement(), KEY))["signatures"][0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "malformed"),
        (b"{}", "malformed"),
        (b"[" * 100_000, "larger than"),
        (b"[" * 60_000, "malformed"),
        (b"\xff", "malformed"),
        (b"null", "malformed"),
        (envelope_with(extra=1), "malformed"),
        (envelope_with(payload=1), "malformed"),
        (envelope_with(payload="é"), "not base64"),
        (envelope_with(payload="A"), "not base64"),
        (envelope_with(payload="ab\n=="), "not base64"),
        (envelope_with(payload="QR=="), "canonical"),
        (envelope_with(signatures=[]), "0 signatures"),
        (envelope_with(signatures=[ENTRY, ENTRY]), "2 signatures"),
        (envelope_with(signatures=[ENTRY | {"keyid": "x"}]), "key id"),
        (envelope_with(signatures=[ENTRY | {"keyid": ENTRY["keyid"].upper()}]), "key id"),
        (envelope_with(signatures=[ENTRY | {"sig": "AAAA"}]), "3 bytes"),
        (envelope_with(payloadType="é"), "payload type"),
    ],
)
def test_a_malformed_envelope_is_refused_clearly(raw: bytes, message: str) -> None:
    with pytest.raises(EnvelopeError, match=message):
        read_envelope(raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"plugin": "x" * 401},
        {"plugin": "a\nb"},
        {"publisher": "\x1b[2J"},
        {"version": "\ud800"},
        {"artifact_hash": "A" * 64},
        {"digests": {"source": "a" * 64, "lockfile": "", "manifest": "a" * 64}},
        {"created_at": "yesterday"},
        {"created_at": "2025-10-09T08:53:20+02:00"},
    ],
)
def test_nothing_is_signed_that_would_be_refused_later(changes: dict[str, object]) -> None:
    with pytest.raises(EnvelopeError):
        sign(statement(**changes), KEY)


def test_samples_travel_in_order_and_are_signed_by_digest() -> None:
    samples = (Sample("b.csv", b"\x00\xff"), Sample("a b.csv", b""))
    bundle = signed(SOURCE, samples=samples)
    assert [sample.name for sample in bundle.samples] == ["a b.csv", "b.csv"]
    assert unpack(pack(bundle)) == bundle
    assert policy().check(bundle, deployed_at_us=WALL_US).ok
    assert bundle.artifact_hash != signed(SOURCE).artifact_hash
    for carried, told in (
        ((samples[0],), "'a b.csv' is missing"),
        ((samples[0], Sample("a b.csv", b"x")), "'a b.csv' does not match"),
        ((*samples, Sample("c", b"")), "'c' does not match"),
    ):
        with pytest.raises(BundleError, match=told):
            unpack(pack(replace(bundle, samples=carried)))


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ((Sample("../a", b""),), "no name for a sample"),
        ((Sample("a", b""), Sample("a", b"")), "two samples"),
        (tuple(Sample(str(n), b"") for n in range(17)), "17 samples"),
        ((Sample("a", bytes(262_145)),), "262145 bytes"),
    ],
)
def test_samples_beyond_their_bounds_are_refused(samples: tuple[Sample, ...], told: str) -> None:
    with pytest.raises(BundleError, match=told):
        pack(make_bundle("p", "1.0.0", SOURCE, samples=samples))


def test_every_flipped_byte_behind_the_envelope_is_noticed() -> None:
    plain = len(signed_bundle(SOURCE))
    data = pack(signed(SOURCE, samples=(Sample("a.csv", b"1\n"), Sample("b.csv", b"2\n"))))
    assert len(data) > plain
    for position in range(len(data) - 54, len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(BundleError):
                unpack(bytes(changed))
