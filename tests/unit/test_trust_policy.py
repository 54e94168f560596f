"""The trust policy: each refusal has its code, and says what does not match."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from signing_kit import KEY, SIGNER, WALL_US, policy, policy_for, signed

from casparian_flow.trust.bundle import Bundle, make_bundle
from casparian_flow.trust.envelope import sign, statement_of
from casparian_flow.trust.errors import PolicyError, UntrustedError
from casparian_flow.trust.keys import generate, key_id
from casparian_flow.trust.policy import Code, TrustedKey, TrustPolicy, trust_only

PUBLIC = KEY.public_key()
ID = key_id(PUBLIC)
SOURCE = "x = 1\n"
HOUR_US = 3_600_000_000


def code_of(bundle: Bundle, trust: TrustPolicy, at_us: int = WALL_US) -> Code:
    return trust.check(bundle, deployed_at_us=at_us).code


def test_a_signed_bundle_is_trusted_and_the_verdict_says_by_whom() -> None:
    verdict = policy().check(signed(SOURCE, "sales"), deployed_at_us=WALL_US)
    assert verdict.ok
    assert (verdict.code, verdict.signer, verdict.key_id) == (Code.TRUSTED, SIGNER, ID)
    assert verdict.publisher == SIGNER
    assert verdict.message == f"sales 1.0.0 is signed by tests (key {ID[:16]})"
    assert verdict.require() is verdict


def test_the_empty_policy_trusts_nobody() -> None:
    assert code_of(signed(SOURCE), TrustPolicy()) is Code.UNKNOWN_KEY
    assert code_of(make_bundle("p", "1", SOURCE), TrustPolicy()) is Code.UNSIGNED


def test_unsigned_passes_only_where_that_is_allowed_and_with_the_right_hash() -> None:
    unsigned = make_bundle("p", "1.0.0", SOURCE)
    lenient = TrustPolicy(allow_unsigned=True)
    assert lenient.check(unsigned, deployed_at_us=0).ok
    assert code_of(unsigned, lenient) is Code.UNSIGNED
    assert not policy().check(unsigned, deployed_at_us=0).ok
    altered = replace(unsigned, source="x = 2\n")
    assert code_of(altered, lenient) is Code.HASH_MISMATCH


def test_a_signature_is_checked_even_where_none_is_needed() -> None:
    altered = replace(signed(SOURCE), source="x = 2\n")
    trust = policy_for(TrustedKey(PUBLIC), allow_unsigned=True)
    assert code_of(altered, trust) is Code.HASH_MISMATCH
    assert code_of(signed(SOURCE), TrustPolicy(allow_unsigned=True)) is Code.UNKNOWN_KEY


def rehashed(bundle: Bundle, **changes: str) -> Bundle:
    """Altered, with an artifact hash that fits the altered parts."""
    altered = replace(bundle, **changes)  # type: ignore[arg-type]
    return replace(altered, artifact_hash=altered.computed_hash())


BUNDLE = signed(SOURCE, "sales", "1.0.0", "version = 1\n")
RENAMED = '{"name":"other","version":"1.0.0"}'
RAISED = '{"name":"sales","version":"2.0.0"}'
SPACED = '{"name":"sales", "version":"1.0.0"}'


@pytest.mark.parametrize(
    ("bundle", "code", "message"),
    [
        (replace(BUNDLE, source="x = 2\n"), Code.HASH_MISMATCH, "the source does not match"),
        (replace(BUNDLE, lockfile=""), Code.HASH_MISMATCH, "the lock file does not match"),
        (replace(BUNDLE, manifest_json=SPACED), Code.HASH_MISMATCH, "the manifest does not match"),
        (rehashed(BUNDLE, source="y"), Code.HASH_MISMATCH, "the source does not match what was s"),
        (
            rehashed(BUNDLE, source="y", lockfile="z"),
            Code.HASH_MISMATCH,
            "the source and the lock file do not match what was signed",
        ),
        (
            replace(BUNDLE, artifact_hash="0" * 64),
            Code.HASH_MISMATCH,
            "the recorded hash does not match the artifact hash",
        ),
        (replace(BUNDLE, name="other"), Code.NAME_MISMATCH, "the manifest says sales"),
        (replace(BUNDLE, version="2.0.0"), Code.VERSION_MISMATCH, "the manifest says 1.0.0"),
        (
            rehashed(BUNDLE, name="other", manifest_json=RENAMED),
            Code.NAME_MISMATCH,
            "the signed statement says sales",
        ),
        (
            rehashed(BUNDLE, version="2.0.0", manifest_json=RAISED),
            Code.VERSION_MISMATCH,
            "the signed statement says 1.0.0",
        ),
        (replace(BUNDLE, manifest_json="{"), Code.MALFORMED, "manifest is not valid JSON"),
        (replace(BUNDLE, manifest_json="[]"), Code.MALFORMED, "lacks the plugin's name"),
        (replace(BUNDLE, manifest_json="\ud800"), Code.MALFORMED, "manifest is not valid JSON"),
        (replace(BUNDLE, envelope=b"{}"), Code.MALFORMED, "the envelope is malformed"),
        (replace(BUNDLE, envelope=signed("y").envelope), Code.NAME_MISMATCH, "under_test"),
        (
            replace(BUNDLE, envelope=signed("y", "sales").envelope),
            Code.HASH_MISMATCH,
            "the source and the lock file do not match what was signed",
        ),
    ],
)
def test_what_does_not_match_is_named(bundle: Bundle, code: Code, message: str) -> None:
    verdict = policy().check(bundle, deployed_at_us=WALL_US)
    assert (verdict.ok, verdict.code) == (False, code)
    assert message in verdict.message
    assert verdict.signer == ""
    with pytest.raises(UntrustedError) as caught:
        verdict.require()
    assert (caught.value.code, caught.value.hint) == (code, verdict.hint)
    assert caught.value.exit_code == 8


def test_a_posing_key_and_a_foreign_key_are_told_apart() -> None:
    other = generate()
    bundle = make_bundle("p", "1.0.0", SOURCE)
    envelope = sign(statement_of(bundle, publisher="", now_us=WALL_US), other)
    assert code_of(bundle.with_envelope(envelope), policy()) is Code.UNKNOWN_KEY
    posing = json.loads(envelope)
    posing["signatures"][0]["keyid"] = ID
    assert code_of(bundle.with_envelope(json.dumps(posing).encode()), policy()) is (
        Code.BAD_SIGNATURE
    )


def test_a_key_counts_only_while_its_signer_is_allowed() -> None:
    trust = TrustPolicy(("somebody",), {SIGNER: (TrustedKey(PUBLIC),)})
    verdict = trust.check(signed(SOURCE), deployed_at_us=WALL_US)
    assert verdict.code is Code.UNKNOWN_SIGNER
    assert SIGNER in verdict.message


@pytest.mark.parametrize(
    ("scopes", "fits"),
    [
        (("*",), True),
        (("sales",), True),
        (("sal*",), True),
        (("x", "sale?"), True),
        (("Sales",), False),
        (("sale",), False),
        (("sales_*",), False),
        (("[!s]*",), False),
    ],
)
def test_scopes_are_globs_of_plugin_names(scopes: tuple[str, ...], fits: bool) -> None:
    verdict = policy_for(TrustedKey(PUBLIC, scopes)).check(BUNDLE, deployed_at_us=WALL_US)
    assert verdict.ok is fits
    assert verdict.code is (Code.TRUSTED if fits else Code.OUT_OF_SCOPE)
    assert verdict.signer == SIGNER


@pytest.mark.parametrize(
    ("deployed_at_us", "code"),
    [
        (WALL_US - HOUR_US - 1, Code.NOT_YET_VALID),
        (WALL_US - HOUR_US, Code.TRUSTED),
        (WALL_US + HOUR_US, Code.TRUSTED),
        (WALL_US + HOUR_US + 1, Code.EXPIRED),
        (0, Code.NOT_YET_VALID),
        (2**63, Code.EXPIRED),
        (-(2**63), Code.NOT_YET_VALID),
    ],
)
def test_validity_is_judged_at_the_deploy(deployed_at_us: int, code: Code) -> None:
    key = TrustedKey(PUBLIC, not_before_us=WALL_US - HOUR_US, not_after_us=WALL_US + HOUR_US)
    verdict = policy_for(key).check(BUNDLE, deployed_at_us=deployed_at_us)
    assert verdict.code is code
    if not verdict.ok:
        assert "UTC" in verdict.message
        assert "clock" in verdict.hint


def test_a_revoked_key_counts_never_and_the_reason_is_told() -> None:
    for trust in (
        policy_for(TrustedKey(PUBLIC), revoked={ID: "laptop stolen"}),
        policy_for(TrustedKey(PUBLIC), revoked={ID: "laptop stolen"}, allow_unsigned=True),
        TrustPolicy(revoked={ID: "laptop stolen"}),
    ):
        verdict = trust.check(BUNDLE, deployed_at_us=0)
        assert (verdict.ok, verdict.code, verdict.key_id) == (False, Code.REVOKED, ID)
        assert "revoked: laptop stolen" in verdict.message
        assert trust.revocation(ID) == "laptop stolen"
        assert trust.revocation("0" * 64) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustPolicy(keys={"": ()}), "name of a signer"),
        (lambda: TrustPolicy(keys={"a\n": ()}), "name of a signer"),
        (lambda: policy_for(TrustedKey(PUBLIC, ())), "no usable scopes"),
        (lambda: policy_for(TrustedKey(PUBLIC, ("",))), "no usable scopes"),
        (lambda: policy_for(TrustedKey(PUBLIC, ("x" * 201,))), "no usable scopes"),
        (lambda: policy_for(TrustedKey(PUBLIC, ("*",), 2, 1)), "which is never"),
        (lambda: TrustPolicy(revoked={ID[:16]: ""}), "no key id"),
        (
            lambda: TrustPolicy(keys={"a": (TrustedKey(PUBLIC),), "b": (TrustedKey(PUBLIC),)}),
            "listed twice, under a and b",
        ),
        (lambda: TrustPolicy(keys={"a": (TrustedKey(PUBLIC), TrustedKey(PUBLIC))}), "twice"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(
    make: Callable[[], TrustPolicy], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def test_a_message_of_hostile_text_stays_on_one_line() -> None:
    hostile = replace(BUNDLE, name="a\n\x1b[2J" * 100)
    message = trust_only(PUBLIC, "me").check(hostile, deployed_at_us=0).message
    assert message.isprintable()
    assert len(message) < 500
