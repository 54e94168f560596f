"""`casparian keys`: the keys that sign plugins, and whose keys count here."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casparian_flow.cli.context import App, CommandGroup, output_option, pass_app
from casparian_flow.cli.output import (
    Column,
    note,
    show_data,
    show_pairs,
    show_rows,
    to_json,
    yes_no,
)
from casparian_flow.config import Settings, TrustedKeySettings
from casparian_flow.domain.errors import NotFoundError, SentinelUnreachableError, UsageError
from casparian_flow.sentinel.api import Row

if TYPE_CHECKING:
    from casparian_flow.trust.keys import PublicKey

COLUMNS = (
    Column("key_id", "KEY", lambda value: str(value)[:16]),
    Column("name", "FILE"),
    Column("private", "PRIVATE", yes_no),
    Column("signer", "SIGNER"),
    Column("scopes", "SCOPES", ", ".join),
    Column("not_after", "UNTIL"),
    Column("state", "STATE"),
)


@click.group(cls=CommandGroup)
def keys() -> None:
    """Make keys, and say whose count."""


@keys.command("generate")
@click.argument("name", default="")
@output_option
@pass_app
def generate(app: App, name: str) -> None:
    """Make a key pair called NAME, by default the one that 'publish' signs with.

    The private half is readable by you alone and never leaves this machine. Nobody trusts the new
    key before 'casparian keys trust'.
    """
    from casparian_flow.trust import keys as key_files

    trust = app.settings.trust
    name = name or trust.signing_key
    private = key_files.generate()
    file = key_files.save(private, trust.keys_folder, name)
    public = private.public_key()
    found = {"name": name, "key_id": key_files.key_id(public), "file": str(file)}
    show_data(
        app,
        found | {"public": key_files.public_text(public)},
        f"made {file}\nkey id {found['key_id']}\n'casparian keys trust {name}' makes it count here",
    )


@keys.command("list")
@output_option
@pass_app
def list_keys(app: App) -> None:
    """List your keys and the trusted ones."""
    show_rows(app, _known(app.settings), COLUMNS, empty="no key yet: 'casparian keys generate'")


@keys.command("show")
@click.argument("name", default="")
@output_option
@pass_app
def show(app: App, name: str) -> None:
    """Show the public half of the key NAME, to hand to whoever should trust it.

    By default it is the key that 'publish' signs with.
    """
    from casparian_flow.trust import keys as key_files

    public = _public(app.settings, name or app.settings.trust.signing_key)
    found = {
        "key_id": key_files.key_id(public),
        "public": key_files.public_text(public),
        "pem": key_files.public_pem(public),
    }
    if app.json:
        click.echo(to_json(found))
        return
    show_pairs([("key id", found["key_id"]), ("public", found["public"])])
    click.echo(found["pem"], nl=False)


@keys.command("trust")
@click.argument("key", metavar="NAME|FILE")
@click.option("--signer", default="", help="Whose key it is. Default: the key's name.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="GLOB",
    help="Plugins that it may sign, such as 'sales_*'; may be repeated. Default: all.",
)
@click.option("--not-before", type=click.DateTime(), metavar="TIME", help="First moment, in UTC.")
@click.option("--not-after", type=click.DateTime(), metavar="TIME", help="Last moment, in UTC.")
@output_option
@pass_app
def trust(
    app: App,
    key: str,
    signer: str,
    scopes: tuple[str, ...],
    not_before: datetime | None,
    not_after: datetime | None,
) -> None:
    """Let a key count: one of your own by its NAME, or somebody's public key in FILE.

    It is written into the section [trust] of the configuration file.

    \b
    Example:
      casparian keys trust ann.pub --signer ann --scope 'sales_*' --not-after 2027-01-01
    """
    from casparian_flow.services.trust_file import trust_key
    from casparian_flow.trust.keys import key_id

    public = _public(app.settings, key)
    config = _config(app)
    signer = signer or Path(key).stem
    trust_key(
        config,
        signer,
        public,
        scopes=scopes or ("*",),
        not_before=_utc(not_before),
        not_after=_utc(not_after),
    )
    show_data(
        app,
        {"key_id": key_id(public), "signer": signer, "config": str(config)},
        f"{config} now trusts key {key_id(public)[:16]} of {signer}",
    )
    _tell_sentinel(app)


@keys.command("revoke")
@click.argument("key", metavar="NAME|FILE|ID")
@click.option("--reason", default="", help="Shown wherever the key is refused.")
@output_option
@pass_app
def revoke(app: App, key: str, reason: str) -> None:
    """Let a key count no more, also for what it has signed before.

    Plugins that it has signed are paused at once; publish them anew, signed with another key.
    """
    from casparian_flow.services.trust_file import revoke_key

    key_id = _key_id(app.settings, key)
    config = _config(app)
    revoke_key(config, key_id, reason)
    show_data(
        app,
        {"key_id": key_id, "reason": reason, "config": str(config)},
        f"{config} now refuses key {key_id[:16]}",
    )
    _tell_sentinel(app)


def _tell_sentinel(app: App) -> None:
    """Have a running Sentinel look at its plugins again; it reads the file itself."""
    from casparian_flow.sentinel.control import remote
    from casparian_flow.sentinel.paths import control_address

    settings = app.settings
    address = control_address(settings.database.db_location, settings.sentinel.control_address)
    try:
        with remote(address) as control:
            control.reload()
    except SentinelUnreachableError:
        note("no Sentinel runs here; it counts from the next start")


def _config(app: App) -> Path:
    file = app.settings.file
    if file is None or not file.exists():
        raise UsageError(
            "there is no configuration file to write this into", hint="Run 'casparian init' first."
        )
    return file


def _known(settings: Settings) -> list[Row]:
    from casparian_flow.trust import keys as key_files

    rows: dict[str, Row] = {}
    unusable: list[Row] = []
    for own in key_files.list_keys(settings.trust.keys_folder):
        row = {"key_id": own.key_id, "name": own.name, "private": own.private}
        if own.problem:
            unusable.append(row | {"state": own.problem})
        else:
            rows[own.key_id] = row | {"state": "not trusted"}
    for signer, trusted in settings.trust.keys.items():
        for key in trusted:
            key_id = key_files.key_id(key_files.parse_public(key.public))
            rows[key_id] = {
                "key_id": key_id,
                "name": "",
                "private": False,
                **rows.get(key_id, {}),
                **_trusted(settings, signer, key),
            }
    for key_id, reason in settings.trust.revoked.items():
        known = rows.get(key_id, {"key_id": key_id, "name": "", "private": False})
        rows[key_id] = known | {"state": f"revoked: {reason}" if reason else "revoked"}
    return [*rows.values(), *unusable]


def _trusted(settings: Settings, signer: str, key: TrustedKeySettings) -> Row:
    allowed = signer in settings.trust.allowed_signers
    return {
        "signer": signer,
        "scopes": list(key.scopes),
        "not_before": key.not_before.isoformat() if key.not_before else None,
        "not_after": key.not_after.isoformat() if key.not_after else None,
        "state": "trusted" if allowed else "not trusted: not among allowed_signers",
    }


def _public(settings: Settings, given: str) -> "PublicKey":
    """The public key that a name or a file means."""
    from casparian_flow.trust import keys as key_files

    file = Path(given)
    if file.suffix == key_files.PUBLIC_SUFFIX or "/" in given:
        return key_files.load_public(file)
    folder = settings.trust.keys_folder
    private = folder / f"{key_files.checked_name(given)}{key_files.PRIVATE_SUFFIX}"
    if private.exists():
        return key_files.load_private(private).public_key()
    public = private.with_suffix(key_files.PUBLIC_SUFFIX)
    if public.exists():
        return key_files.load_public(public)
    raise NotFoundError(f"no key {given!r} in {folder}", hint="'casparian keys list' lists them.")


def _key_id(settings: Settings, given: str) -> str:
    """The id of a key by name, file, id, or the beginning of a known id."""
    from casparian_flow.trust.keys import SHORT_ID_CHARS, key_id

    digits = given.lower()
    if len(digits) >= SHORT_ID_CHARS and all(c in "0123456789abcdef" for c in digits):
        known = {str(row["key_id"]) for row in _known(settings)}
        found = [key for key in known if key.startswith(digits)]
        if len(digits) == 64 or len(found) == 1:
            return digits if len(digits) == 64 else found[0]
        raise NotFoundError(
            f"no known key begins with {given}", hint="'casparian keys list' lists them."
        )
    return key_id(_public(settings, given))


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
