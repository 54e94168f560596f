"""What every command shares: the settings, the way to the control plane, the form of output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from casparian_flow.config import Settings, load_settings
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.paths import path_to_text
from casparian_flow.sentinel.api import ApiStore, ControlApi, Row

if TYPE_CHECKING:
    from casparian_flow.kube.context import ClusterSession
    from casparian_flow.sentinel.control import ControlClient

SENTENCE_CHARS = 200
"""Of a command's first sentence, in the help of its group."""
F = TypeVar("F", bound=Callable[..., Any])


def connect(settings: Settings) -> "ControlClient":
    """The running Sentinel's control API, or the ledger opened in this process."""
    from casparian_flow.sentinel.control import connect as connect_control

    news = news_of_ledger(settings)
    control = connect_control(settings)
    for line in news:
        click.echo(line, err=True)
    return control


def news_of_ledger(settings: Settings) -> list[str]:
    """A line to show if the ledger is about to be made, so that nobody makes one unawares."""
    location = settings.database.db_location
    return [] if location.exists() else [f"ledger: making {location} (DuckDB)"]


@dataclass
class App:
    """State of one invocation.

    Attributes:
        connector: how the control plane is reached; tests put a double here.
        output: "table" for people or "json" for programs.
        cluster: context of the kubeconfig whose operator is asked; "" = this machine.
    """

    config: Path | None = None
    debug: bool = False
    output: str = "table"
    connector: Callable[[Settings], "ControlClient"] = connect
    cluster: str = ""
    _settings: Settings | None = field(default=None, repr=False)
    _control: "ControlClient | None" = field(default=None, repr=False)
    _session: "ClusterSession | None" = field(default=None, repr=False)

    @property
    def settings(self) -> Settings:
        """Raises ConfigError."""
        if self._settings is None:
            self._settings = load_settings(self.config)
        return self._settings

    @property
    def control(self) -> ControlApi:
        """Connected on first use; closed at the end of the command."""
        return self._connected()

    @property
    def api(self) -> ApiStore:
        """Jobs, events and approvals of the API, over the same connection."""
        return self._connected().api

    @property
    def session(self) -> "ClusterSession":
        """The operator of `cluster`; connected on first use."""
        if self._session is None:
            try:
                from casparian_flow.kube.context import ClusterSession
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"--context needs the library {error.name}",
                    hint="Install it: pip install 'casparian-flow[kubernetes]'.",
                ) from error
            namespace = self.settings.operator.namespace
            self._session = ClusterSession.open(self.cluster, namespace)
        return self._session

    def _connected(self) -> "ControlClient":
        if self.cluster:
            return self.session.control
        if self._control is None:
            self._control = self.connector(self.settings)
        return self._control

    @property
    def json(self) -> bool:
        return self.output == "json"

    def close(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.close()
        session, self._session = self._session, None
        if session is not None:
            session.close()


class CommandGroup(click.Group):
    """A group whose help tells the first sentence of each command whole, on lines as needed."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(n, c.get_short_help_str(SENTENCE_CHARS)) for n, c in commands if c is not None]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


pass_app = click.make_pass_decorator(App)


def _choose_output(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(App).output = value


output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    expose_value=False,
    callback=_choose_output,
    help="Form of the answer: a table for people (default) or JSON for programs.",
)


def limit_option(default: int = 50) -> Callable[[F], F]:
    return click.option(
        "--limit",
        type=click.IntRange(1, 100_000),
        default=default,
        show_default=True,
        metavar="N",
        help="Show at most N.",
    )


def absolute_text(path: str) -> str:
    """The path as the ledger writes it: absolute, without links on the way, as text."""
    whole = Path(path).absolute()
    return path_to_text(str(whole.parent.resolve() / whole.name))


def source_named(control: ControlApi, path: str) -> Row:
    """The source root at `path`.

    Raises:
        NotFoundError: no such root.
    """
    wanted = path_to_text(str(Path(path).resolve()))
    for row in control.list_sources():
        if row.get("path") in {wanted, absolute_text(path), path}:
            return row
    raise NotFoundError(
        f"{path} is not a source root",
        hint="'casparian source list' lists them; 'casparian source add FOLDER' adds one.",
    )
