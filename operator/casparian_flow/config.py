"""Settings, read from `global_config.toml`.

The file is looked for in this order: the path given on the command line, `$CASPARIAN_CONFIG`, the
current folder. Without one, every setting has its default. An environment variable
`CASPARIAN_<SECTION>__<KEY>` overrides the file. Relative paths are relative to the folder of the
file (without one: the current folder), so that a command means the same wherever it is started.

    from casparian_flow.config import settings
    settings.database.db_location

`settings` reads the file when it is first used; importing this module never fails.
"""

import difflib
import logging
import os
import stat
import tomllib
import types
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from casparian_flow.domain.errors import ConfigError
from casparian_flow.logs import LogFormat

CONFIG_NAME = "global_config.toml"
CONFIG_VARIABLE = "CASPARIAN_CONFIG"
ENVIRONMENT_PREFIX = "CASPARIAN_"
MAX_CONFIG_BYTES = 1 << 20
ADDRESS_PATTERN = r"^tcp://[^\s/]+:\d{1,5}$"

log = logging.getLogger(__name__)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DatabaseSettings(_Section):
    """The ledger."""

    db_location: Path = Path("casparian_flow.duckdb")
    """The ledger's DuckDB file, made on first run. Any file name will do, `.sqlite3` included."""
    memory_limit_mb: Annotated[int, Field(ge=64, le=1_048_576)] = 512
    """Mebibytes that DuckDB may use for the ledger; a million jobs fit into the default."""

    @field_validator("db_location", mode="before")
    @classmethod
    def _plain_path(cls, value: object) -> object:
        text = str(value)
        if "://" in text or text == ":memory:":
            raise ValueError("wants the path of a file: several processes have to reach the ledger")
        return value


class SentinelSettings(_Section):
    """The control plane."""

    bind_address: Annotated[str, Field(pattern=ADDRESS_PATTERN)] = "tcp://127.0.0.1:5555"
    """Where workers connect. Loopback by default: the wire has no encryption of its own."""
    control_address: Annotated[str, Field(pattern=r"^((ipc|tcp)://\S+)?$")] = ""
    """Where commands reach the Sentinel. Empty: a socket beside the ledger, for this user only."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of the Sentinel's Prometheus metrics on loopback; 0 turns them off."""
    lease_ttl_seconds: Annotated[float, Field(ge=1, le=3_600)] = 30.0
    """Seconds of silence after which a worker's jobs go to another; several heartbeats long."""
    heartbeat_seconds: Annotated[float, Field(ge=0.1, le=600)] = 5.0
    """Seconds between two heartbeats of a worker."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Retries of a failed job before it becomes a dead letter."""
    retry_base_seconds: Annotated[float, Field(ge=0.01, le=600)] = 4.0
    """Base of the delay before retry n, base**n seconds: 4, 16 and 64 by default."""
    breaker_failures: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Failures in a row that pause a plugin until `casparian plugin resume`."""

    @model_validator(mode="after")
    def _leases_outlive_heartbeats(self) -> Self:
        if self.lease_ttl_seconds <= 2 * self.heartbeat_seconds:
            raise ValueError("lease_ttl_seconds must be more than twice heartbeat_seconds")
        return self


class WireSettings(_Section):
    """Encryption and proof of identity between the Sentinel and other machines (docs/trust.md)."""

    curve_dir: Path | None = None
    """Folder of this process's CURVE keys: `client.key_secret` and `server.key`, at the operator's
    Sentinel `server.key_secret`. Empty: no encryption, for one machine."""
    token_file: Path | None = None
    """File with the token by which a pod proves which one it is; wants `curve_dir`."""

    @model_validator(mode="after")
    def _tokens_travel_encrypted(self) -> Self:
        if self.token_file is not None and self.curve_dir is None:
            raise ValueError("token_file wants curve_dir: a token is never sent in the clear")
        return self


class WorkerSettings(_Section):
    """The processes that run plugins."""

    connect: Annotated[str, Field(pattern=f"{ADDRESS_PATTERN}|^$")] = ""
    """The Sentinel's address as workers see it. Empty: the address it binds to."""
    slots: Annotated[int, Field(ge=0, le=1_024)] = 0
    """Plugins that one worker runs at a time; 0 means one for each processor."""
    output_root: Path = Path("output")
    """Folder below which file sinks write. Workers that share it can finish each other's jobs."""
    scratch: Path | None = None
    """Folder for copies of inputs and for plugins' own files. Empty: the system's temporary one."""
    cache_dir: Path | None = None
    """Folder of plugin environments, kept between runs. Empty: the user's cache folder."""
    job_timeout_seconds: Annotated[float, Field(ge=1, le=604_800)] = 300.0
    """Seconds after which a plugin that still runs is stopped."""
    memory_mb: Annotated[int, Field(ge=64, le=1_048_576)] = 2_048
    """Mebibytes that one plugin with its children may use."""
    pids: Annotated[int, Field(ge=1, le=32_768)] = 64
    """Processes and threads that one plugin may have."""
    log_kb: Annotated[int, Field(ge=1, le=1_024)] = 64
    """Kibibytes kept of what a plugin prints in one job; the end is kept."""
    recycle_after: Annotated[int, Field(ge=1, le=10_000_000)] = 1_000
    """Files that one plugin process serves before a fresh one takes over."""
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """Seconds that running jobs may go on when a worker is asked to stop."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of the worker's `/metrics`, `/healthz` and `/readyz`; 0 turns them off."""
    metrics_host: str = "127.0.0.1"
    """Address on which that port is opened. In a pod `0.0.0.0`, so that the node reaches it."""
    launcher: Path | None = None
    """Socket of the launcher in a pod's plugin container, where plugins run then. Empty: the worker
    starts their processes itself."""
    environments_read_only: bool = False
    """Whether `cache_dir` holds environments that were provisioned, and none is made here."""
    index_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    """Package index that environments are made from. Empty: the one that each lock file names."""
    wheelhouse: Path | None = None
    """Folder of wheels that environments are made from, without any index."""
    ca_file: Path | None = None
    """Certificates by which the index is trusted, in PEM. Empty: the system's."""


class ScoutSettings(_Section):
    """Watching the source roots."""

    interval_seconds: Annotated[float, Field(ge=0.1, le=86_400)] = 10.0
    """Seconds between two scans of a root; file system events only make the next one sooner."""
    settle_seconds: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    """Seconds a file must have stood still before it is read, so that none is taken half-written.
    A root may have a value of its own."""


class MssqlSettings(_Section):
    """The server behind `mssql://` sinks."""

    server: str = ""
    """Host name of the SQL Server."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 1433
    """TCP port of the SQL Server."""
    user: str = ""
    """Login name."""
    password: SecretStr = SecretStr("")
    """Password; better in `CASPARIAN_SINKS__MSSQL__PASSWORD`, which leaves no copy on disk."""
    database: str = ""
    """Database in which the tables are."""


class SinksSettings(_Section):
    """Connections of the sinks that need one."""

    mssql: MssqlSettings = MssqlSettings()


class LoggingSettings(_Section):
    """What the services say about themselves."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""
    format: LogFormat = "text"
    """Lines for people, or one JSON object a line."""


class ApprovalsSettings(_Section):
    """Requests that wait for a person."""

    allow_self: bool | None = None
    """Whether who asked may approve it too. Unset: only while workers connect on this machine
    alone, so that one person is behind everything."""


class McpSettings(_Section):
    """The MCP server, `casparian mcp serve`."""

    allowed_paths: tuple[Path, ...] = ()
    """Folders that tools may look into, with all beneath. Empty: the source roots."""
    redaction: Literal["none", "truncate", "hash"] = "hash"
    """Least that is done to text values before a client sees them; a call may ask for more."""
    audit_log: Path = Path("mcp_audit.ndjson")
    """File of one line of JSON for each call, for its owner's eyes only."""
    approval_minutes: Annotated[float, Field(ge=0.01, le=10_080)] = 60.0
    """Minutes after which a request that nobody decided on expires."""
    query_timeout_seconds: Annotated[float, Field(ge=0.1, le=600)] = 30.0
    """Seconds that one query may take."""
    query_memory_mb: Annotated[int, Field(ge=64, le=65_536)] = 512
    """Mebibytes that one query may use."""
    host: str = "127.0.0.1"
    """Address to listen on with `--http`. Beyond loopback a token is needed."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8765
    """TCP port with `--http`; 0 takes a free one."""
    token: SecretStr = SecretStr("")
    """Bearer token of every HTTP request, 32 characters or more; better in
    `CASPARIAN_MCP__TOKEN`, which leaves no copy on disk. Empty: none, on loopback only."""
    token_review: bool = False
    """With `--http`: every request carries a token of its caller's own, and the API server of
    Kubernetes says whose it is. Requests are then made in that name."""
    token_audiences: tuple[str, ...] = ("casparian-mcp",)
    """For whom such tokens have to be made; one of these is enough."""
    allowed_users: tuple[str, ...] = ()
    """Kubernetes users who may call, such as `system:serviceaccount:finance:ann`."""
    allowed_groups: tuple[str, ...] = ()
    """Kubernetes groups whose members may call. With neither users nor groups nobody may."""


class RetentionSettings(_Section):
    """How long history is kept. 0 keeps it for ever; what an output's lineage refers to always
    stays."""

    api_job_hours: Annotated[float, Field(ge=0, le=1e6)] = 720.0
    """Hours that a finished job of the API is kept."""
    api_event_hours: Annotated[float, Field(ge=0, le=1e6)] = 168.0
    """Hours that events of finished jobs of the API are kept."""
    job_hours: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Hours that ended jobs without outputs, of versions that are not current, are kept."""
    version_hours: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Hours that a file's oldest versions are kept after they were seen, if no job is left."""
    dead_letter_hours: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Hours that dead letters are kept."""
    interval_minutes: Annotated[float, Field(ge=0.01, le=10_080)] = 60.0
    """Minutes between two clean-ups."""


class SandboxSettings(_Section):
    """What must hold around a plugin."""

    require: tuple[str, ...] | None = None
    """Measures without which a worker refuses to run plugins. Unset: in a pod (`[worker] launcher`)
    those of docs/sandbox.md, else none; what the system allows is applied, and `casparian status`
    shows the rest."""


class OperatorSettings(_Section):
    """The operator on Kubernetes, `casparian operator`. The Helm chart writes them."""

    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")] = "casparian"
    """First part of the names of this installation's own objects, such as its Lease."""
    namespace: str = ""
    """Its own namespace. Empty: the one that its pod runs in."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose objects it looks after. Empty: its own."""
    sentinel_host: str = ""
    """Host by which pods reach the Sentinel. Empty: `NAME-sentinel.NAMESPACE.svc`."""
    listen_host: str = "127.0.0.1"
    """Address on which health and metrics are served; in a pod 0.0.0.0."""
    health_port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port of `/livez` and `/readyz`; 0 turns them off."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 9090
    """Port of `/metrics`; 0 turns it off."""
    resync_seconds: Annotated[float, Field(ge=1, le=30)] = 15.0
    """Seconds between two looks at all objects, which repair what somebody else has changed."""
    kept_versions: Annotated[int, Field(ge=0, le=20)] = 2
    """Earlier versions of a plugin whose Deployments are kept, at zero replicas."""
    worker_image: str = ""
    """Image of the pods of workers, provisioning and Scouts."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes pull that image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with which they pull it; each namespace has its own of these names."""
    worker_resources: dict[str, dict[str, str]] = {}
    """Requests and limits of plugin containers whose CasparianPlugin names none. Without a limit of
    memory it is (`[worker] slots` + 1) × `memory_mb` and a tenth."""
    scratch_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$")] = "10Gi"
    """Most that a worker pod holds of copies of inputs, and most that its plugins may have in
    temporary files; a pod beyond either is evicted."""
    network_policies: bool = True
    """Whether every Deployment and Scout gets a NetworkPolicy."""
    environments_storage_class: str = ""
    """Storage class whose volumes many nodes can mount; locked environments are made on one, once
    for each lock file. Empty: no volume, every pod makes its own in an init container."""
    environments_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$")] = "10Gi"
    """Size of that volume, one in each namespace."""
    index_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    """Package index for environments. Empty: the one in the lock file."""
    index_ca_config_map: str = ""
    """ConfigMap in each namespace whose `ca.crt` is believed when the index is asked."""
    wheelhouse_claim: str = ""
    """PersistentVolumeClaim in each namespace with wheels, for clusters without an index."""
    backup_account: str = ""
    """ServiceAccount in the operator's namespace that may fetch copies of the ledger; its key goes
    into a Secret of the same name. Empty: nobody's."""
    mcp_account: str = ""
    """Likewise, ServiceAccount of the MCP server, which may look and ask."""


class TrustedKeySettings(_Section):
    """One public key of a signer."""

    public: str
    """The key: one line of base64, as `casparian keys show` prints it."""
    scopes: tuple[str, ...] = ("*",)
    """Names of plugins that it may sign; `*`, `?` and `[…]` are wildcards."""
    not_before: datetime | None = None
    """First moment of a deploy for which the key counts. UTC unless it names another zone."""
    not_after: datetime | None = None
    """Last moment of a deploy for which the key counts."""


class AzureSettings(_Section):
    """Azure AD, where publishers show who they are. Used when tenant and client are known, by
    default from the variables AZURE_TENANT_ID and AZURE_CLIENT_ID."""

    tenant_id: str = ""
    """The directory's id. Empty: what AZURE_TENANT_ID says."""
    client_id: str = ""
    """The application's id. Empty: what AZURE_CLIENT_ID says."""
    authority: Annotated[str, Field(pattern=r"^(https://\S+)?$")] = ""
    """Address of the authority. Empty: `https://login.microsoftonline.com/TENANT`."""
    group: str = ""
    """Id of a group that a publisher must be in. Empty: everybody of the directory may publish."""


class TrustSettings(_Section):
    """Whose plugins may run, and what their sources may do."""

    allowed_signers: tuple[str, ...] = ()
    """Signers whose keys count. Empty: nobody's, so that no signed plugin runs."""
    keys: dict[str, tuple[TrustedKeySettings, ...]] = {}
    """Public keys by signer, as `[[trust.keys.NAME]]` tables. `casparian keys trust` adds one."""
    revoked: dict[str, str] = {}
    """Reason by key id (64 hex digits). `casparian keys revoke` adds one."""
    allow_unsigned: bool = False
    """Whether plugins without any signature may run. One with a signature is always checked."""
    gatekeeper: Literal["strict", "standard", "off"] = "strict"
    """What sources may do: `strict`, `standard` (they may open files) or `off` (no checks)."""
    libraries: tuple[str, ...] = ()
    """Libraries that plugins may import beside the usual ones (pandas, pyarrow, numpy …)."""
    keys_folder: Path = Path("keys")
    """Folder of this user's own keys."""
    signing_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")] = "local"
    """Name of the key in `keys_folder` with which `casparian publish` signs."""
    azure: AzureSettings = AzureSettings()


class Settings(BaseSettings):
    """All settings, one attribute for each section of the file."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
    )

    database: DatabaseSettings = DatabaseSettings()
    sentinel: SentinelSettings = SentinelSettings()
    wire: WireSettings = WireSettings()
    worker: WorkerSettings = WorkerSettings()
    scout: ScoutSettings = ScoutSettings()
    sinks: SinksSettings = SinksSettings()
    logging: LoggingSettings = LoggingSettings()
    sandbox: SandboxSettings = SandboxSettings()
    approvals: ApprovalsSettings = ApprovalsSettings()
    mcp: McpSettings = McpSettings()
    retention: RetentionSettings = RetentionSettings()
    trust: TrustSettings = TrustSettings()
    operator: OperatorSettings = OperatorSettings()

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """Where they were read, or would have been; None for settings made in a program."""
        return self._file

    def read_from(self, file: Path) -> Self:
        """These settings, with the place that they were read from."""
        self._file = file
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file, whose values come in as arguments."""
        return env_settings, init_settings


def config_path(given: str | os.PathLike[str] | None = None) -> tuple[Path, bool]:
    """Where the configuration file is, and whether somebody asked for that very file."""
    named = os.fspath(given) if given else os.environ.get(CONFIG_VARIABLE, "")
    if named:
        return Path(named).absolute(), True
    return Path.cwd() / CONFIG_NAME, False


def load_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Read and check the settings; paths in the result are absolute.

    Args:
        path: the file; None looks for it as the module's docstring says.

    Raises:
        ConfigError: a file that was asked for is missing, is no readable TOML of at most
            MAX_CONFIG_BYTES, or has an unknown key or a value that does not fit.
    """
    file, asked = config_path(path)
    try:
        text = _read(file)
    except FileNotFoundError:
        if asked:
            raise ConfigError(
                f"there is no configuration file {file}",
                hint="Make one with 'casparian init', or correct the path.",
            ) from None
        log.info("no %s in %s: every setting has its default", CONFIG_NAME, file.parent)
        text = ""
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # not TOML, or a number without end
        raise ConfigError(
            f"{file} is not valid TOML: {error}", hint="Correct the line named above."
        ) from error
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply") from None
    try:
        loaded = Settings(**values)
    except ValidationError as error:
        raise _explained(error, file, values) from error
    except ValueError as error:
        # pydantic-settings refuses an unreadable environment variable in this way.
        raise ConfigError(
            str(error), hint=f"Correct the {ENVIRONMENT_PREFIX}* variables."
        ) from error
    log.debug("settings read from %s", file)
    return _anchored(loaded, file.parent).read_from(file)


def overridden(base: Settings, section: str, **values: object) -> Settings:
    """The settings with some keys of one section replaced; None leaves a key as it is.

    Raises:
        ConfigError: a value does not fit.
    """
    given = {key: value for key, value in values.items() if value is not None}
    current: BaseModel = getattr(base, section)
    try:
        changed = type(current).model_validate({**current.model_dump(), **given})
    except ValidationError as error:
        raise _explained(error, Path("the command line"), {section: given}, section) from error
    return base.model_copy(update={section: changed})


def worker_address(base: Settings) -> str:
    """Where a worker on this machine finds the Sentinel."""
    if base.worker.connect:
        return base.worker.connect
    host, _, port = base.sentinel.bind_address.removeprefix("tcp://").rpartition(":")
    everywhere = host in {"*", "0.0.0.0"}  # noqa: S104 - compared with, not bound to
    return f"tcp://{'127.0.0.1' if everywhere else host}:{port}"


def _read(file: Path) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{file} is no regular file")
            raw = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start})") from error


def _explained(
    error: ValidationError, file: Path, values: Mapping[str, Any], *outer: str
) -> ConfigError:
    """What is wrong with `values`; the error's places are relative to the section `outer`."""
    problems: list[str] = []
    hints: list[str] = []
    for item in error.errors(include_url=False):
        location = [*outer, *(str(part) for part in item["loc"])]
        origin = str(file) if _present(values, location) else f"{file} or the environment"
        section, key = ".".join(location[:-1]), location[-1]
        place = f"in section [{section}]" if section else "at the top level"
        if item["type"] == "extra_forbidden":
            problems.append(f"{origin}: unknown key {key!r} {place}")
            hints.append(_suggestion(location))
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = _PLAIN_WORDS.get(item["type"], message)
            found = "" if key in {"password", "token"} else f" (found {item['input']!r})"
            problems.append(f"{origin}: key {key!r} {place}: {message}{found}")
    return ConfigError("\n".join(problems), hint=" ".join(dict.fromkeys(hints)) or _VALUE_HINT)


_PLAIN_WORDS = {
    "path_type": "wants a path, in quotes",
    "string_pattern_mismatch": "wants an address such as tcp://127.0.0.1:5555",
}
"""By pydantic's kind of error; only addresses have a pattern."""
_VALUE_HINT = "docs/configuration.md lists every key with its unit and range."


def _present(values: Mapping[str, Any], location: list[str]) -> bool:
    node: Any = values
    for part in location:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _suggestion(location: list[str]) -> str:
    model: type[BaseModel] = Settings
    for part in location[:-1]:
        inner = model.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return _VALUE_HINT
        model = inner
    known = list(model.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]!r}?"
    homes = [f"[{section}]" for section, key, _ in keys() if key == location[-1]]
    if homes:
        return f"{location[-1]!r} belongs into {homes[0]}."
    return "Known there: " + ", ".join(known) + "."


def _anchored(loaded: Settings, folder: Path) -> Settings:
    """Make every path absolute, from the configuration file's folder."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else folder / path.expanduser()

    location = cast(Path, absolute(loaded.database.db_location))
    worker = loaded.worker
    return loaded.model_copy(
        update={
            "database": loaded.database.model_copy(update={"db_location": location}),
            "wire": loaded.wire.model_copy(
                update={
                    "curve_dir": absolute(loaded.wire.curve_dir),
                    "token_file": absolute(loaded.wire.token_file),
                }
            ),
            "worker": worker.model_copy(
                update={
                    "output_root": absolute(worker.output_root),
                    "scratch": absolute(worker.scratch),
                    "cache_dir": absolute(worker.cache_dir),
                    "launcher": absolute(worker.launcher),
                    "wheelhouse": absolute(worker.wheelhouse),
                    "ca_file": absolute(worker.ca_file),
                }
            ),
            "mcp": loaded.mcp.model_copy(
                update={
                    "allowed_paths": tuple(
                        folder / path.expanduser() for path in loaded.mcp.allowed_paths
                    ),
                    "audit_log": absolute(loaded.mcp.audit_log),
                }
            ),
            "trust": loaded.trust.model_copy(
                update={"keys_folder": absolute(loaded.trust.keys_folder)}
            ),
        }
    )


def keys(
    model: type[BaseModel] = Settings, section: str = ""
) -> Iterator[tuple[str, str, FieldInfo]]:
    """Every (section, key, field), sections in the order of the file."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{section}.{name}" if section else name)
        else:
            yield section, name, field


def type_name(annotation: Any) -> str:
    """A setting's type in a reader's words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if origin in {Union, types.UnionType}:
        return type_name(next(a for a in get_args(annotation) if a is not type(None)))
    if origin is tuple:
        return "list of text"
    if origin is dict:
        return "table"
    names = {int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, "text")


class _LazySettings:
    """Stands for the settings until somebody asks for one."""

    def __init__(self) -> None:
        self._loaded: Settings | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._loaded is None:
            self._loaded = load_settings()
        return getattr(self._loaded, name)


settings: Settings = cast(Settings, _LazySettings())
"""The settings of this process, read on first use."""
