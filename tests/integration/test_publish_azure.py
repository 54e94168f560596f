"""Publishers authenticated by Azure AD's device code flow; the directory is on loopback."""

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure_double import CLIENT, TENANT, AzureDouble
from cryptography.hazmat.primitives.asymmetric import rsa
from publish_kit import Desk

from casparian_flow.trust.bundle import unpack
from casparian_flow.trust.envelope import read_envelope, read_statement


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[AzureDouble]:
    with AzureDouble(tmp_path) as double:
        yield double


@pytest.fixture
def desk(tmp_path: Path, azure: AzureDouble) -> Desk:
    desk = Desk(tmp_path)
    with desk.config.open("a") as file:
        file.write(f'\n[trust.azure]\nauthority = "{azure.authority}"\n')
    desk.variables = {
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "REQUESTS_CA_BUNDLE": str(azure.certificate),
        "no_proxy": "127.0.0.1",
    }
    return desk


def test_whom_the_directory_knows_is_in_the_signature_and_in_the_publisher_record(
    desk: Desk, azure: AzureDouble
) -> None:
    azure.answers = ["authorization_pending", ""]
    told = desk.publish().err
    assert "open https://login.example/device in a browser and type the code ABCD-EFGH" in told
    assert azure.polls[1] - azure.polls[0] >= 0.9, "the interval is kept"
    desk.variables = {}
    (row,) = desk.run(
        "sql", "SELECT name, email, azure_oid FROM cf_publisher", "-o", "json", code=0
    ).json
    assert row == {
        "name": "Ann Example",
        "email": "ann@example.org",
        "azure_oid": "oid-of-ann",
    }


def test_a_second_publish_asks_for_no_code_and_the_tokens_are_the_owner_s_alone(
    desk: Desk, azure: AzureDouble
) -> None:
    azure.answers = [""]
    bundle = unpack(desk.bundle().read_bytes())
    identity = read_statement(read_envelope(bundle.envelope)).identity
    assert identity is not None
    assert (identity.provider, identity.tenant, identity.subject) == (
        "azure", TENANT, "oid-of-ann",
    )  # fmt: skip
    cache = desk.folder / "keys" / "azure_tokens.json"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert desk.publish("--dry-run").err == ""
    assert azure.refreshes == 1
    cache.chmod(0o644)
    assert "may be read by others" in desk.publish("--dry-run", code=2).err


def test_slow_down_makes_the_next_question_wait_longer(desk: Desk, azure: AzureDouble) -> None:
    azure.answers = ["slow_down", ""]
    began = time.monotonic()
    desk.publish("--dry-run")
    assert azure.polls[1] - began >= 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("authorization_declined", "the sign-in was declined"),
        ("expired_token", "the code has expired"),
        ("invalid_client", "Azure AD refuses (invalid_client): invalid_client it is"),
    ],
)
def test_a_sign_in_that_fails_deploys_nothing(
    desk: Desk, azure: AzureDouble, answer: str, message: str
) -> None:
    azure.answers = [answer]
    assert message in desk.publish(code=8).err
    assert not desk.database.exists()
    assert not (desk.folder / "keys" / "azure_tokens.json").exists()


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"aud": "somebody-else"}, "Audience"),
        ({"iss": "https://elsewhere/v2.0"}, "ssuer"),
        ({"exp": 1_000_000_000, "nbf": 1_000_000_000}, "expired"),
        ({"oid": None}, "oid"),
        ({"tid": "another"}, "of the directory another"),
        ({"name": "Ann\x1b[31m"}, "control characters"),
    ],
)
def test_a_token_that_is_not_sound_is_refused(
    desk: Desk, azure: AzureDouble, claims: dict[str, object], message: str
) -> None:
    azure.answers, azure.claims = [""], claims
    assert message in desk.publish(code=8).err
    assert not desk.database.exists()


def test_a_token_signed_with_a_key_that_is_not_published_is_refused(
    desk: Desk, azure: AzureDouble
) -> None:
    azure.answers = [""]
    azure.sign_with = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert "not sound: Signature verification failed" in desk.publish(code=8).err


def test_a_group_may_be_required(desk: Desk, azure: AzureDouble) -> None:
    azure.answers = [""]
    with desk.config.open("a") as file:
        file.write('group = "publishers"\n')
    desk.publish("--dry-run")
    azure.claims = {"groups": ["others"]}
    assert "is not in the group publishers" in desk.publish("--dry-run", code=8).err


def test_half_a_setting_and_an_authority_that_is_not_there_are_told(
    desk: Desk, azure: AzureDouble
) -> None:
    known = desk.variables
    desk.variables = {"AZURE_TENANT_ID": TENANT}
    assert "wants both a tenant and a client" in desk.publish(code=2).err
    desk.variables = known
    assert "so --publisher is not taken" in desk.publish("--publisher", "ann", code=2).err
    text = desk.config.read_text().replace(azure.authority, f"https://127.0.0.1:1/{TENANT}")
    desk.config.write_text(text)
    assert "cannot be used" in desk.publish(code=8).err
