"""`publish`, `deploy`, `verify` and `keys` on a real ledger and real keys; no worker runs."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from publish_kit import PLUGIN, Desk
from signing_kit import KEY, signed_bundle

from casparian_flow.config import load_settings
from casparian_flow.trust import keys as key_files
from casparian_flow.trust.bundle import pack, unpack


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_first_publish_after_init_is_signed_and_trusted(desk: Desk) -> None:
    row = desk.publish("-o", "json").json
    assert (row["plugin"], row["version"], row["unchanged"]) == ("sales", "1.0.0", False)
    (listed,) = desk.run("plugins", "-o", "json").json
    assert (listed["signer"], len(listed["key_id"])) == ("local", 64)
    assert desk.publish("-o", "json").json["unchanged"]
    told = desk.run("verify", "sales", code=0).out
    assert "signed by local" in told
    assert row["artifact_hash"] in told


def test_a_dry_run_and_a_bundle_in_a_file_leave_the_ledger_alone(desk: Desk) -> None:
    assert "would be deployed" in desk.publish("--dry-run").out
    bundle = desk.bundle()
    assert not desk.database.exists()
    assert "cannot be written" in desk.publish("--out", "no/such/folder", code=2).err
    desk.run("deploy", bundle.name, code=0)
    assert desk.versions() != []


def test_a_bundle_is_verified_with_a_public_key_alone(desk: Desk, tmp_path: Path) -> None:
    bundle = desk.bundle()
    desk.config.write_text("")  # nobody is trusted here
    assert "nobody trusts" in desk.run("verify", bundle.name, code=8).err
    assert "signed by local" in desk.run("verify", bundle.name, "--key", "keys/local.pub").out
    other = key_files.save(key_files.generate(), tmp_path / "elsewhere", "other")
    public = str(other.with_suffix(".pub"))
    assert desk.run("verify", bundle.name, "--key", public, "-o", "json", code=8).json["code"] == (
        "unknown_key"
    )


def test_every_changed_byte_of_a_bundle_is_noticed_and_nothing_of_it_is_deployed(
    desk: Desk,
) -> None:
    data = desk.bundle().read_bytes()
    parts = unpack(data)
    places = {
        "source": data.index(b"read_csv"),
        "manifest": data.index(parts.manifest_json.encode()) + 10,
        "envelope": data.index(parts.envelope) + len(parts.envelope) // 2,
        "artifact hash": data.index(parts.artifact_hash.encode()) + 5,
    }
    for part, place in places.items():
        changed = bytearray(data)
        changed[place] = ord("0") if changed[place] != ord("0") else ord("1")
        desk.write("changed.casparian", bytes(changed))
        done = desk.run("deploy", "changed.casparian")
        assert done.code in {2, 8}, (part, done)
        assert "error: " in done.err, (part, done)
    source = data.replace(b"read_csv", b"read_tsv")
    desk.write("changed.casparian", source)
    assert "the source does not match" in desk.run("verify", "changed.casparian", code=8).err
    for cut in (0, 1, 30, len(data) // 2, len(data) - 1):
        desk.write("changed.casparian", data[:cut])
        assert desk.run("deploy", "changed.casparian").code == 2
        assert desk.run("verify", "changed.casparian").code == 2
    assert desk.versions() == []
    assert not desk.database.exists() or desk.run("rules", "-o", "json").json == []


def test_a_byte_changed_in_the_ledger_is_named_by_verify(desk: Desk) -> None:
    desk.publish()
    desk.tamper("UPDATE cf_plugin_manifest SET source_code = source_code || ' '")
    assert "the source does not match" in desk.run("verify", "sales", code=8).err


def test_each_step_is_named_on_a_terminal_and_nothing_in_a_pipe(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.publish("--dry-run").err == ""
    shown = []
    monkeypatch.setattr(
        "casparian_flow.cli.publish.Steps._line", lambda _, name, mark, __: shown.append(name)
    )
    desk.publish()
    assert shown == ["look", "lock", "artifact", "authenticate", "sign", "gatekeeper", "deploy"]


BAD_PLUGINS = {
    "a missing file": (None, "is no file"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "a null byte": (b"x = 1\0", "null byte"),
    "ten megabytes": (b"#" * 10_000_000, "larger than 1024 KiB"),
    "a syntax error": (PLUGIN + "\ndef (:\n", "sales.py:"),
    "no Handler": (PLUGIN.replace("class Handler", "class Loader"), "must be named Handler"),
    "a computed MANIFEST": (PLUGIN.replace('"*.csv"', "str(1)"), "not a literal"),
    "no MANIFEST": (PLUGIN.replace("MANIFEST", "OTHER"), "no MANIFEST"),
    "an unknown scheme": (
        PLUGIN.replace('topic="sales"', 'topic="sales", sinks={"sales": "ftp://x"}'),
        "unknown scheme",
    ),
    "a forbidden import": (PLUGIN + "\nimport os\n", "G101"),
    "a forbidden call": (PLUGIN + "\neval('1')\n", "G201"),
    "two script blocks": (
        PLUGIN + "\n# /// script\n# dependencies = []\n# ///\n" * 2,
        "more than one script block",
    ),
    "an unreadable script block": (
        PLUGIN + "\n# /// script\n# dependencies = [\n# ///\n",
        "not valid TOML",
    ),
}


@pytest.mark.parametrize("what", BAD_PLUGINS)
def test_a_bad_plugin_is_told_clearly_and_nothing_is_deployed(desk: Desk, what: str) -> None:
    content, message = BAD_PLUGINS[what]
    desk.plugin.unlink()
    if content is not None:
        desk.write("sales.py", content)
    done = desk.publish(code=2)
    assert message in done.err
    assert done.err.startswith("error: ")
    assert not desk.database.exists()


@pytest.mark.parametrize("version", ["one", "1.0.0-", "1.0 0", "9" * 60])
def test_a_version_that_is_none_is_refused(desk: Desk, version: str) -> None:
    done = desk.run("publish", "sales.py", "--version", version, code=2)
    assert "is not a PEP 440 version" in done.err


def test_a_key_that_others_may_read_or_that_is_not_there_signs_nothing(desk: Desk) -> None:
    key = desk.folder / "keys" / "local.key"
    key.chmod(0o644)
    assert "may be read or changed by others" in desk.publish(code=2).err
    key.chmod(0o600)
    key.write_text("no key")
    assert "no PKCS8 PEM private key" in desk.publish(code=2).err
    key.unlink()
    done = desk.publish(code=4)
    assert "no key to sign with" in done.err
    assert "casparian init" in done.err
    assert not desk.database.exists()


def test_a_key_that_cannot_be_read_is_told(desk: Desk) -> None:
    key = desk.folder / "keys" / "local.key"
    key.unlink()
    key.mkdir()
    assert "cannot be read: Is a directory" in desk.publish(code=2).err


def test_a_version_cannot_be_published_with_other_bytes(desk: Desk) -> None:
    desk.publish()
    desk.write("sales.py", PLUGIN + "# changed\n")
    done = desk.publish(code=5)
    assert "versions are immutable" in done.err
    assert "1.0.1" in done.err


def hours_from_now(hours: float) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--not-after", hours_from_now(-1)], "was valid until"),
        (["--not-before", hours_from_now(1)], "is valid from"),
        (["--scope", "orders_*"], "may sign orders_* only"),
    ],
)
def test_a_key_out_of_its_time_or_scope_deploys_nothing(
    desk: Desk, options: list[str], message: str
) -> None:
    """The clock that counts is the one of whoever records the deploy."""
    key_files.save(KEY, desk.folder / "keys", "ann")
    desk.run("keys", "trust", "ann", *options, code=0)
    done = desk.publish("--key", "keys/ann.key", code=8)
    assert message in done.err
    assert desk.versions() == []


def test_an_unsigned_bundle_passes_only_where_that_is_allowed(desk: Desk) -> None:
    unsigned = pack(unpack(signed_bundle(PLUGIN, "sales")).with_envelope(b""))
    desk.write("sales.casparian", unsigned)
    assert "it is not signed" in desk.run("deploy", "sales.casparian", code=8).err
    desk.config.write_text(
        desk.config.read_text().replace("[trust]", "[trust]\nallow_unsigned = true")
    )
    desk.run("deploy", "sales.casparian", code=0)


def test_keys_are_made_listed_shown_trusted_and_revoked(desk: Desk) -> None:
    made = desk.run("keys", "generate", "ann", "-o", "json", code=0).json
    file = Path(made["file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "never overwritten" in desk.run("keys", "generate", "ann", code=2).err
    assert desk.run("keys", "show", "ann", "-o", "json").json["public"] == made["public"]
    assert desk.publish("--key", "keys/ann.key", code=8).err.count("nobody trusts here") == 1
    desk.run("keys", "trust", "ann", "--signer", "Ann", "--scope", "sal*", code=0)
    assert "trusted already" in desk.run("keys", "trust", "ann", code=5).err
    desk.publish("--key", "keys/ann.key")
    states = {r["name"]: r["state"] for r in desk.run("keys", "list", "-o", "json").json}
    assert states == {"local": "trusted", "ann": "trusted"}
    desk.run("keys", "revoke", made["key_id"][:16], "--reason", "lost", code=0)
    assert "revoked already" in desk.run("keys", "revoke", "ann", code=5).err
    assert "was revoked: lost" in desk.run("verify", "sales", code=8).err
    states = {r["name"]: r["state"] for r in desk.run("keys", "list", "-o", "json").json}
    assert states["ann"] == "revoked: lost"


def test_the_configuration_keeps_its_words_when_keys_change(desk: Desk) -> None:
    before = desk.config.read_text()
    desk.config.write_text("# first\n" + before.replace("[worker]", "[worker] # of mine"))
    desk.run("keys", "generate", "ann")
    desk.run("keys", "trust", "ann")
    desk.run("keys", "revoke", "ann")
    text = desk.config.read_text()
    assert text.startswith("# first\n")
    assert "[worker] # of mine" in text
    assert "# interval_seconds = 10" in text


def test_a_trust_section_in_another_style_is_changed_soundly_or_not_at_all(desk: Desk) -> None:
    public = desk.run("keys", "show", "local", "-o", "json").json["public"]
    desk.run("keys", "generate", "ann")
    desk.config.write_text(f'[trust]\n[trust.keys]\nlocal = [ {{ public = "{public}" }} ]\n')
    desk.run("keys", "trust", "ann", "--signer", "local", code=0)
    assert len(load_settings(desk.config).trust.keys["local"]) == 2
    before = f'[trust]\nkeys = {{ local = [ {{ public = "{public}" }} ] }}\n'
    desk.config.write_text(before)
    assert "nothing was changed" in desk.run("keys", "trust", "ann", code=2).err
    assert desk.config.read_text() == before
    assert list(desk.folder.glob(".global*")) == []


def test_a_broken_trust_section_is_told_with_its_key(desk: Desk) -> None:
    desk.config.write_text(desk.config.read_text() + '\n[[trust.keys.bob]]\npublic = "nonsense"\n')
    done = desk.publish(code=2)
    assert "[trust]" in done.err
    assert "neither PEM nor base64" in done.err
