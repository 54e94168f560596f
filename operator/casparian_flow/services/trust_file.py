"""Changes the `[trust]` section of a configuration file, leaving all else in it as it is.

Everything is read, changed and checked first, then the file is replaced as a whole: a reader sees
the old one or the new one, and comments, order and layout stay the user's.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Table

from casparian_flow.config import Settings, load_settings
from casparian_flow.config_trust import rules_of
from casparian_flow.domain.errors import ConfigError, ConflictError
from casparian_flow.trust import keys
from casparian_flow.trust.policy import ANY_PLUGIN


def ensure_own_key(settings: Settings) -> bool:
    """Make this user's key and trust it, if the settings trust nobody so far.

    Returns:
        Whether anything was changed.

    Raises:
        KeyFileError: the key cannot be made or used.
        ConfigError: the configuration file cannot be changed.
    """
    trust = settings.trust
    if trust.keys or trust.allowed_signers or settings.file is None:
        return False
    file = key_file(settings)
    private = keys.load_private(file) if file.exists() else _make(settings)
    trust_key(settings.file, trust.signing_key, private.public_key())
    return True


def key_file(settings: Settings) -> Path:
    """Where the key is with which this user signs."""
    return settings.trust.keys_folder / f"{settings.trust.signing_key}{keys.PRIVATE_SUFFIX}"


def _make(settings: Settings) -> keys.PrivateKey:
    private = keys.generate()
    keys.save(private, settings.trust.keys_folder, settings.trust.signing_key)
    return private


def trust_key(
    config: Path,
    signer: str,
    public: keys.PublicKey,
    *,
    scopes: Sequence[str] = ANY_PLUGIN,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> None:
    """Add a signer's key to `[trust]`, and the signer to those allowed.

    Raises:
        ConflictError: the key is there already.
        ConfigError: the file cannot be read or written, or would not be valid.
    """
    wanted = keys.key_id(public)

    def change(trust: Table) -> None:
        signers = _child(trust, "keys", tomlkit.table(is_super_table=True))
        for known, entries in signers.items():
            if any(keys.key_id(keys.parse_public(str(e["public"]))) == wanted for e in entries):
                raise ConflictError(
                    f"key {keys.short_id(wanted)} is trusted already, as {known}'s",
                    hint=f"Edit [[trust.keys.{known}]] in {config} to change its scopes or times.",
                )
        entry = tomlkit.table()
        entry["public"] = keys.public_text(public)
        if tuple(scopes) != ANY_PLUGIN:
            entry["scopes"] = list(scopes)
        if not_before is not None:
            entry["not_before"] = not_before
        if not_after is not None:
            entry["not_after"] = not_after
        entries = _child(signers, signer, tomlkit.aot())
        entries.append(entry)
        allowed = _child(trust, "allowed_signers", tomlkit.array(), first=True)
        if signer not in list(allowed):
            allowed.append(signer)

    _edit(config, change)


def revoke_key(config: Path, key_id: str, reason: str) -> None:
    """Add a key's id to `[trust.revoked]`.

    Raises:
        ConflictError: it is revoked already.
        ConfigError: the file cannot be read or written, or would not be valid.
    """

    def change(trust: Table) -> None:
        revoked = _child(trust, "revoked", tomlkit.table())
        if key_id in revoked:
            raise ConflictError(f"key {keys.short_id(key_id)} is revoked already")
        revoked[key_id] = reason

    _edit(config, change)


def _child(parent: Any, name: str, empty: Any, *, first: bool = False) -> Any:
    """What stands under a name, put there empty if nothing does."""
    if name not in parent:
        if first and isinstance(parent, Table):
            # Before the tables below it, where TOML wants plain keys.
            rest = [(key, parent.pop(key)) for key in list(parent)]
            parent[name] = empty
            for key, value in rest:
                parent[key] = value
        else:
            parent[name] = empty
    found = parent[name]
    if isinstance(empty, AoT) and not isinstance(found, AoT):
        # Written inline: an array of inline tables takes one more of them.
        return _Inline(found)
    return found


class _Inline:
    """Makes an inline array take tables as an array of tables does."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def append(self, entry: Table) -> None:
        inline = tomlkit.inline_table()
        inline.update(entry.unwrap())
        self._array.append(inline)


def _edit(config: Path, change: Callable[[Table], None]) -> None:
    try:
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        document = tomlkit.parse(text)
        if "trust" not in document:
            document["trust"] = tomlkit.table()
        trust: Any = document["trust"]
        change(trust)
        fresh = tomlkit.dumps(document)
    except (TOMLKitError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"section [trust] of {config} cannot be changed: {error}",
            hint="Correct it by hand; docs/configuration.md tells its keys.",
        ) from error
    except OSError as error:
        raise ConfigError(f"{config} cannot be read: {error.strerror or error}") from error
    _replace(config, fresh)


def _replace(config: Path, text: str) -> None:
    """Write the file anew, unless the text is none that can be loaded."""
    target = config.resolve()  # a link stays one
    name = ""
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, mode)
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
        try:
            rules_of(load_settings(name).trust)
        except ConfigError as error:
            raise ConfigError(
                f"section [trust] of {config} cannot be changed as it is written: nothing was "
                "changed",
                hint="Write it as docs/publishing.md shows, or add the key by hand.",
            ) from error
        os.replace(name, target)
        name = ""
    except OSError as error:
        raise ConfigError(
            f"{config} cannot be written: {error.strerror or error}",
            hint="Run the command as the user who owns the file.",
        ) from error
    finally:
        if name:
            with suppress(OSError):
                os.unlink(name)
