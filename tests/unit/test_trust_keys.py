"""Keys on disk: who may read them, and what is refused."""

import base64
import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from casparian_flow.trust import keys
from casparian_flow.trust.errors import KeyFileError


def test_a_saved_key_reads_back_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    private = keys.generate()
    file = keys.save(private, tmp_path / "keys", "me")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert keys.load_private(file).private_bytes_raw() == private.private_bytes_raw()
    public = keys.load_public(file.with_suffix(".pub"))
    assert public.public_bytes_raw() == private.public_key().public_bytes_raw()


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = keys.save(keys.generate(), tmp_path, "me")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_key_id_is_the_sha256_of_the_raw_public_key() -> None:
    public = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    assert keys.key_id(public) == hashlib.sha256(public.public_bytes_raw()).hexdigest()
    assert keys.short_id(keys.key_id(public)) == keys.key_id(public)[:16]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o644, 0o666])
def test_a_private_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = keys.save(keys.generate(), tmp_path, "me")
    file.chmod(mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}") as caught:
        keys.load_private(file)
    assert f"chmod 600 {file}" in caught.value.hint


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    file = keys.save(keys.generate(), tmp_path, "me")
    before = file.read_bytes()
    with pytest.raises(KeyFileError, match="exists already"):
        keys.save(keys.generate(), tmp_path, "me")
    assert file.read_bytes() == before


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "me.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError):
        keys.save(keys.generate(), tmp_path, "me")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", "../me", "a/b", ".hidden", "-rf", "a b", "a\n", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be the name"):
        keys.save(keys.generate(), tmp_path, name)


def write(file: Path, raw: bytes) -> Path:
    file.write_bytes(raw)
    file.chmod(0o600)
    return file


def test_what_is_no_private_key_is_told_apart(tmp_path: Path) -> None:
    rsa_pem = rsa.generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    locked = keys.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    public = keys.public_pem(keys.generate().public_key()).encode()
    for raw, message in [
        (rsa_pem, "not an Ed25519 key"),
        (locked, "encrypted"),
        (public, "no PKCS8 PEM"),
        (b"", "no PKCS8 PEM"),
        (b"\0\xff" * 100, "no PKCS8 PEM"),
        (rsa_pem[:300], "no PKCS8 PEM"),
        (b"x" * 20_000, "too large"),
    ]:
        with pytest.raises(KeyFileError, match=message):
            keys.load_private(write(tmp_path / "k.key", raw))


def test_what_is_no_file_is_told_apart(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    for file, message in [
        (tmp_path / "none.key", "there is no key"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "pipe.key", "no regular file"),
    ]:
        with pytest.raises(KeyFileError, match=message):
            keys.load_private(file)


def test_public_keys_are_read_as_pem_and_as_one_line() -> None:
    public = keys.generate().public_key()
    for text in (
        keys.public_pem(public),
        keys.public_text(public),
        keys.public_text(public) + "\n",
    ):
        assert keys.parse_public(text).public_bytes_raw() == public.public_bytes_raw()


def test_what_is_no_public_key_is_refused() -> None:
    private = keys.generate()
    rsa_pem = (
        rsa.generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )
    for text, message in [
        (keys.private_pem(private), "private key where a public one"),
        (rsa_pem, "not an Ed25519"),
        (base64.b64encode(bytes(31)).decode(), "neither PEM nor base64"),
        ("", "neither"),
        ("é", "neither"),
        ("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----", "no readable PEM"),
        ("-----BEGIN \ud800", "no readable PEM"),
        ("A" * 20_000, "too long"),
    ]:
        with pytest.raises(KeyFileError, match=message):
            keys.parse_public(text)


def test_keys_are_listed_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    assert keys.list_keys(tmp_path / "none") == []
    mine, theirs = keys.generate(), keys.generate().public_key()
    keys.save(mine, tmp_path, "mine")
    keys.save(keys.generate(), tmp_path, "open").chmod(0o644)
    (tmp_path / "theirs.pub").write_text(keys.public_pem(theirs))
    (tmp_path / "broken.pub").write_bytes(b"\xff")
    (tmp_path / "notes.txt").write_text("no key")
    listed = {key.name: key for key in keys.list_keys(tmp_path)}
    assert sorted(listed) == ["broken", "mine", "open", "theirs"]
    assert listed["mine"] == keys.KeyFile("mine", keys.key_id(mine.public_key()), private=True)
    assert listed["theirs"] == keys.KeyFile("theirs", keys.key_id(theirs), private=False)
    assert "mode 0644" in listed["open"].problem
    assert "no text" in listed["broken"].problem
