"""`casparian publish`, `deploy` and `verify`: a plugin's way from a file to a version that runs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casparian_flow.cli.context import App, output_option, pass_app
from casparian_flow.cli.output import many_lines, note, short_hash, show_data, to_json
from casparian_flow.cli.trials import await_trial, wait_option
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CasparianError, NotFoundError, UsageError
from casparian_flow.sentinel.api import Row

if TYPE_CHECKING:
    from casparian_flow.services.azure import Publisher
    from casparian_flow.trust.bundle import Bundle
    from casparian_flow.trust.keys import PrivateKey
    from casparian_flow.trust.policy import TrustPolicy
    from casparian_flow.trust.rules import TrustRules


class Steps:
    """Names each step on a terminal as it is taken; says nothing in a pipe."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._told = ""

    def tell(self, text: str) -> None:
        """What there is to say of the step under way."""
        self._told = text

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._told = ""
        try:
            yield
        except CasparianError:
            self._line(name, "✗", "red")
            raise
        self._line(name, "✓", "green")

    def _line(self, name: str, mark: str, style: str) -> None:
        if not self._shown:
            return
        from rich.console import Console
        from rich.text import Text

        line = Text.assemble((mark, style), " ", (f"{name:<13}", "bold"), many_lines(self._told))
        Console(stderr=True, no_color="NO_COLOR" in os.environ).print(line)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--version", "version", required=True, metavar="V", help="Version, such as 1.0.0.")
@click.option("--name", default="", help="Plugin name. Default: from MANIFEST, else the file name.")
@click.option("--publisher", default="", help="Who publishes, where only a key vouches for them.")
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False), help="Key to sign with.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the bundle.")
@click.option(
    "--emit-manifest",
    "manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write Kubernetes objects.",
)
@click.option("--dry-run", is_flag=True, help="Do all but the deploy.")
@wait_option
@output_option
@pass_app
def publish(
    app: App,
    file: Path,
    version: str,
    name: str,
    publisher: str,
    key: Path | None,
    out: Path | None,
    manifest: Path | None,
    dry_run: bool,
    wait_s: float,
) -> None:
    """Sign the plugin in FILE, deploy it, and wait until a worker has tried it.

    Its MANIFEST becomes a rule, topics and subscriptions. Versions are immutable: changed code
    needs a new one.

    What it needs beside the worker's packages stands in a 'pyproject.toml' beside it or in a script
    block (PEP 723); 'uv lock' then fixes it. Files in 'examples/' beside it that its pattern
    matches, or in 'examples/NAME/', are what it is tried on.

    It is signed with the key 'local', or the one given. With AZURE_TENANT_ID and AZURE_CLIENT_ID
    set, Azure AD is asked who you are.

    --out writes the bundle to a file and does not deploy it; 'casparian deploy' does so later.
    --emit-manifest writes it as a CasparianPlugin object (and a ConfigMap, if it is large) for
    'kubectl apply', and does not deploy it either.

    \b
    Examples:
      casparian publish my_plugin.py --version 1.0.0
      casparian publish my_plugin.py --version 1.0.0 --out my_plugin.casparian
      casparian publish my_plugin.py --version 1.0.0 --emit-manifest my_plugin.yaml
    """
    from casparian_flow.config_trust import rules_of
    from casparian_flow.services.publisher import bundled, locked, read_plugin, signed

    if manifest is not None and out is not None:
        raise UsageError(
            "--out and --emit-manifest write the same bundle in two forms",
            hint="Give one of them; equal bundles come from equal files.",
        )
    rules = rules_of(app.settings.trust)
    steps = Steps(shown=sys.stderr.isatty() and not app.json)
    with steps.step("look"):  # so that what the Gatekeeper will refuse is told before the rest
        draft = read_plugin(file, version=version, name=name)
        rules.require_source(draft.source, file.name)
        steps.tell(f"{draft.name} {draft.version}")
    with steps.step("lock"):
        lock = locked(draft)
        steps.tell(lock.told)
    with steps.step("artifact"):
        bundle = bundled(draft, lock.text)
        steps.tell(f"sha256 {short_hash(bundle.artifact_hash)}…")
    with steps.step("authenticate"):
        private = _signing_key(app, key)
        who = _authenticated(app, publisher)
        steps.tell(who.name if who else "by the key")
    with steps.step("sign"):
        bundle = signed(
            bundle,
            private,
            publisher=who.name if who else publisher,
            now_us=SystemClock().now().wall_us,
            identity=who.identity if who else None,
        )
        steps.tell(_key_told(private))
    with steps.step("gatekeeper"):
        rules.require_source(bundle.source, file.name)
        steps.tell(f"profile {rules.profile}")
    if manifest is not None:
        _emit(app, bundle, manifest)
    else:
        _hand_on(app, bundle, steps, out=out, dry_run=dry_run, wait_s=wait_s)


def _emit(app: App, bundle: "Bundle", file: Path) -> None:
    from casparian_flow.kube.emit import objects_for, to_yaml

    emitted = objects_for(bundle)
    _write(file, to_yaml(emitted.objects).encode())
    command = emitted.next_command(str(file))
    facts: Row = {
        "plugin": bundle.name,
        "version": bundle.version,
        "artifact_hash": bundle.artifact_hash,
        "manifest": str(file),
        "next": command,
    }
    show_data(app, facts, f"{file} holds {emitted.told}\nnext: {command}")


def _hand_on(
    app: App, bundle: "Bundle", steps: Steps, *, out: Path | None, dry_run: bool, wait_s: float
) -> None:
    from casparian_flow.trust.bundle import pack

    facts: Row = {
        "plugin": bundle.name,
        "version": bundle.version,
        "artifact_hash": bundle.artifact_hash,
    }
    data = pack(bundle)
    if out is not None:
        _write(out, data)
        facts |= {"bundle": str(out), "message": f"{out} holds {bundle.name} {bundle.version}"}
    elif dry_run:
        facts |= {"message": f"{bundle.name} {bundle.version} would be deployed"}
    else:
        with steps.step("deploy"):
            facts = app.control.deploy(data)
            steps.tell(f"plugin id {facts.get('plugin_id')}")
        facts = await_trial(app.control, facts, timeout_s=wait_s, clock=SystemClock())
    show_data(app, facts, str(facts.get("message", "published")))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@wait_option
@output_option
@pass_app
def deploy(app: App, bundle: Path, wait_s: float) -> None:
    """Deploy the plugin in the file BUNDLE, which 'casparian publish --out' has made.

    \b
    Example:
      casparian deploy my_plugin.casparian
    """
    from casparian_flow.trust.bundle import unpack

    data = _read(bundle)
    unpack(data)  # a file that is none is told without asking the Sentinel
    row = app.control.deploy(data)
    row = await_trial(app.control, row, timeout_s=wait_s, clock=SystemClock())
    show_data(app, row, str(row.get("message", "deployed")))


@click.command()
@click.argument("what", metavar="FILE|NAME")
@click.option("--version", "version", default="", help="Of the plugin NAME. Default: the newest.")
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Trust this public key alone, instead of what the configuration says.",
)
@output_option
@pass_app
def verify(app: App, what: str, version: str, key: Path | None) -> None:
    """Check the signature of a bundle FILE, or of the deployed plugin NAME.

    For a FILE nothing but this command is needed: no Sentinel, no network. Exits with 8 if it is
    not to be trusted, and names what does not match.

    \b
    Examples:
      casparian verify my_plugin.casparian --key publisher.pub
      casparian verify my_plugin
    """
    from casparian_flow.config_trust import rules_of
    from casparian_flow.trust.rules import TrustRules

    rules = TrustRules(_trusting(key)) if key is not None else rules_of(app.settings.trust)
    bundle, deployed_at_us = _wanted(app, what, version)
    verdict = rules.policy.check(bundle, deployed_at_us=deployed_at_us)
    # With a key alone the question is who signed, not what may run here.
    findings = _findings(rules, bundle) if verdict.ok and key is None else ""
    facts = {
        "plugin": bundle.name,
        "version": bundle.version,
        "artifact_hash": bundle.artifact_hash,
        "ok": verdict.ok and not findings,
        "code": "gatekeeper" if findings else str(verdict.code),
        "message": findings or verdict.message,
        "signer": verdict.signer,
        "key_id": verdict.key_id,
        "publisher": verdict.publisher,
    }
    if app.json:
        click.echo(to_json(facts))
    if findings:
        rules.require_source(bundle.source, f"{bundle.name}.py")
    verdict.require()
    if not app.json:
        told = f" published by {verdict.publisher}" if verdict.publisher else ""
        click.echo(many_lines(f"{verdict.message}{told}\nartifact {bundle.artifact_hash}"))


def _findings(rules: "TrustRules", bundle: "Bundle") -> str:
    try:
        rules.require_source(bundle.source, f"{bundle.name}.py")
    except CasparianError as error:
        return str(error)
    return ""


def _trusting(key: Path) -> "TrustPolicy":
    from casparian_flow.trust.keys import load_public
    from casparian_flow.trust.policy import trust_only

    return trust_only(load_public(key), key.stem)


def _wanted(app: App, what: str, version: str) -> "tuple[Bundle, int]":
    """The bundle that is meant, and the moment for which its key is judged."""
    from casparian_flow.trust.bundle import SUFFIX, unpack

    now_us = SystemClock().now().wall_us
    if what.endswith(SUFFIX) or os.sep in what or Path(what).is_file():
        return unpack(_read(Path(what))), now_us
    row = app.control.plugin_bundle(what, version)
    return unpack(_bytes(row)), int(row["deployed_at_us"] or now_us)


def _bytes(row: Row) -> bytes:
    import base64

    return base64.b64decode(row["bundle"])


def _signing_key(app: App, given: Path | None) -> "PrivateKey":
    from casparian_flow.services.trust_file import key_file
    from casparian_flow.trust.keys import load_private

    file = given or key_file(app.settings)
    if given is None and not file.exists():
        raise NotFoundError(
            f"there is no key to sign with ({file})",
            hint="'casparian init' makes one and trusts it; 'casparian keys' does so in steps.",
        )
    return load_private(file)


def _key_told(private: "PrivateKey") -> str:
    from casparian_flow.trust.keys import key_id, short_id

    return f"with key {short_id(key_id(private.public_key()))}"


def _authenticated(app: App, publisher: str) -> "Publisher | None":
    """Who publishes by Azure AD; None where that is not set up."""
    from casparian_flow.services import azure

    trust = app.settings.trust
    directory = azure.directory_of(trust.azure, os.environ)
    if directory is None:
        return None
    if publisher:
        raise UsageError(
            "Azure AD tells who publishes, so --publisher is not taken",
            hint="Leave it out, or unset AZURE_TENANT_ID and AZURE_CLIENT_ID.",
        )
    return azure.authenticate(directory, trust.keys_folder / azure.CACHE_NAME, note)


def _read(file: Path) -> bytes:
    from casparian_flow.trust.bundle import BUNDLE_BYTES_MAX

    try:
        with file.open("rb") as stream:
            data = stream.read(BUNDLE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(data) > BUNDLE_BYTES_MAX:
        raise UsageError(f"{file} is too large to be a plugin bundle")
    return data


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all; a bundle of before is replaced."""
    staged = file.with_name(f".{file.name}.new")
    try:
        staged.write_bytes(data)
        os.replace(staged, file)
    except OSError as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise UsageError(f"{file} cannot be written: {error.strerror or error}") from error
