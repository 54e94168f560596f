"""The kinds `CasparianPlugin`, `SourceRoot` and `Approval`: what `crds/` is generated from.

The docstrings here are the manual that `kubectl explain` shows. `plugin_of`, `source_of` and
`approval_of` read objects as the API server gives them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from casparian_flow.domain.contracts import MAX_DEPTH
from casparian_flow.domain.errors import UsageError
from casparian_flow.kube.model_workers import Replicas, Workers
from casparian_flow.kube.schema_parts import (
    ANY_FIELDS,
    SET,
    Condition,
    Count,
    HexDigest,
    LabelName,
    LongText,
    ObjectName,
    Part,
    SecretKey,
    ShortText,
    Time,
    Volume,
    immutable,
    keyed,
    rules,
    text,
)

INLINE_CHARS_MAX = 65_536
"""Of `spec.source.inline`; larger bundles go into a ConfigMap."""
LIST_MAX = 100
VERSIONS_MAX = 20
"""Of the history in a plugin's status."""

_TOPIC_RULE = (
    (
        "self == '*' || (self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$') && "
        "!self.endsWith('_quarantine'))"
    ),
    (
        "write a topic's name (letters, digits, '_', '-', '.', not ending in _quarantine), or '*' "
        "for all topics without an entry of their own"
    ),
)
_URI_RULES = (
    (
        "self.matches('^(parquet|csv|sqlite|duckdb|mssql)://[^/?]|^(sqlite|duckdb):///')",
        (
            "write a sink as parquet://folder, csv://folder, sqlite://file.sqlite3, "
            "duckdb://file.duckdb or mssql://schema.table"
        ),
    ),
    (
        "!self.matches('^[a-z]+://[^/?]*@')",
        (
            "leave user and password out: give them as workers.env from a Secret, such as "
            "CASPARIAN_MSSQL_USER and CASPARIAN_MSSQL_PASSWORD"
        ),
    ),
    (
        "!self.matches('(^|[/:])[.][.]([/?]|$)')",
        "leave '..' out: write the path from the output volume's root",
    ),
    (
        (
            "!self.startsWith('sqlite:///') && !self.startsWith('duckdb:///') || "
            "self.matches('^[a-z]+:///outputs/.')"
        ),
        (
            "pods write below /outputs only: write sqlite://file.sqlite3 or sqlite:///outputs/"
            "file.sqlite3 (likewise duckdb)"
        ),
    ),
)
_PATTERN_RULE = (
    "self.matches('[^ ]') && !self.contains('\\n')",
    "write a pattern as in .gitignore, such as *.csv or reports/**; leave empty ones out",
)
_ANOTHER_ROOT = "files are known by the SourceRoot they are in; make another SourceRoot"
_SHORT_NAME_RULE = (
    "size(self.metadata.name) <= 63",
    "metadata.name is longer than 63 characters, and labels cannot hold it: choose a shorter name",
)


class ConfigMapSource(Part):
    """A bundle in a ConfigMap, which should be immutable."""

    name: ObjectName
    """The ConfigMap, in this namespace."""
    key: SecretKey
    """The key in its `binaryData` that holds the gzipped bundle."""
    digest: HexDigest
    """SHA-256 of the bundle (before gzip), 64 hex digits. Another bundle is not deployed."""


class BundleSource(Part):
    """Where the signed bundle of the version is, one of the two ways."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.inline) != has(self.configMap)",
                (
                    "give either inline or configMap; 'casparian publish --emit-manifest' writes "
                    "both the object and what it refers to"
                ),
            ),
        )
    )

    inline: (
        Annotated[
            str,
            text(
                4 * INLINE_CHARS_MAX,
                (
                    f"size(self) <= {INLINE_CHARS_MAX}",
                    (
                        "inline takes 64 KiB at most: put the gzipped bundle into a ConfigMap and "
                        "give configMap, as 'casparian publish --emit-manifest' does"
                    ),
                ),
                (
                    "self.matches('^([A-Za-z0-9+/]{4})+([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$')",
                    (
                        "write the gzipped bundle as base64 in one line, as 'casparian publish "
                        "--emit-manifest' does"
                    ),
                ),
            ),
        ]
        | None
    ) = None
    """The bundle, gzipped, as base64; up to 64 KiB of it."""
    config_map: ConfigMapSource | None = None
    """A ConfigMap that holds the bundle, gzipped."""


class Sink(Part):
    """A place where one topic's rows go."""

    topic: Annotated[str, text(100, _TOPIC_RULE)]
    """The topic, or `*` for all topics without a sink of their own."""
    uri: Annotated[str, text(2000, *_URI_RULES)]
    """Where to: `parquet://folder`, `csv://folder`, `sqlite://file.sqlite3`, `duckdb://file.duckdb`
    (below `workers.outputs`) or `mssql://schema.table`; docs/sinks.md lists the options."""
    mode: Literal["append", "replace", "error"] | None = None
    """What happens to rows of the same file's earlier versions: kept (`append`), removed in the
    same commit (`replace`), or the job fails (`error`). By default what the URI says."""


class Quarantine(Part):
    """How many rows that break the contract are let off."""

    allow: bool = True
    """Whether bad rows go to the quarantine; if not, one of them fails the job."""
    max_percent: Annotated[float, Field(ge=0, le=100)] = 10.0
    """Percent of a topic's rows in one job above which the job fails with nothing written."""
    max_count: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Rows of a topic in one job above which it fails likewise; no limit by default."""


class Column(Part):
    """One column of a contract."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.type != 'decimal' || has(self.precision)",
                "type: decimal needs precision (1 to 38), and scale for digits after the point",
            ),
            (
                "!has(self.scale) || has(self.precision) && self.scale <= self.precision",
                (
                    "scale is above precision: precision counts all digits, scale those after the "
                    "point"
                ),
            ),
            (
                "self.type == 'decimal' || !has(self.precision) && !has(self.scale)",
                "precision and scale belong to type: decimal",
            ),
            (
                "(self.type == 'timestamp_tz') == has(self.tz)",
                "type: timestamp_tz needs tz, such as UTC or Europe/Zurich; other types have none",
            ),
            (
                "(self.type == 'list') == has(self.item)",
                "type: list needs item, the type of its elements; other types have none",
            ),
            (
                "(self.type == 'struct') == has(self.fields)",
                "type: struct needs fields, a list of name and type; other types have none",
            ),
            (
                (
                    "!has(self.format) || self.type in ['date', 'time', 'timestamp', "
                    "'timestamp_tz'] && self.format.contains('%')"
                ),
                (
                    "format is a strptime pattern such as '%d.%m.%Y', for date, time and "
                    "timestamps only"
                ),
            ),
        )
    )

    name: Annotated[
        str,
        text(
            200,
            (
                "size(self) > 0 && !self.startsWith('_cf_')",
                "write the column's name; those that begin with _cf_ are added to every row",
            ),
        ),
    ]
    """The column's name."""
    type: Literal[
        "null",
        "boolean",
        "int64",
        "float64",
        "date",
        "timestamp",
        "time",
        "duration",
        "string",
        "binary",
        "decimal",
        "timestamp_tz",
        "list",
        "struct",
    ] = "string"
    """Its type; docs/contracts.md says what each takes."""
    nullable: bool = True
    """Whether a value may be missing."""
    format: Annotated[str, Field(max_length=100)] | None = None
    """strptime pattern for text that stands for a date or time; ISO 8601 by default."""
    precision: Annotated[int, Field(ge=1, le=38)] | None = None
    """Digits of a decimal in all."""
    scale: Annotated[int, Field(ge=0, le=38)] | None = None
    """Digits of a decimal after the point; 0 by default."""
    tz: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Time zone of a timestamp_tz."""
    item: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={"type": "object", ANY_FIELDS: True})
    ] = None
    """Type of a list's elements: an object with `type` and what goes with that type, as in a
    column."""
    fields_: Annotated[
        list[dict[str, Any]] | None,
        Field(
            alias="fields",
            max_length=LIST_MAX,
            json_schema_extra={"items": {"type": "object", ANY_FIELDS: True}},
        ),
    ] = None
    """Members of a struct: objects with `name`, `type` and what goes with that type, as in a
    column."""
    description: Annotated[str, Field(max_length=1000)] | None = None
    """For people."""

    def to_json(self) -> dict[str, Any]:
        """The column as `domain.contracts.parse_contract` reads it."""
        kind = _contract_type(to_body(self))
        column = {"name": self.name, "type": kind, "nullable": self.nullable}
        return column | ({"format": self.format} if self.format else {})


def _contract_type(given: Mapping[str, Any], depth: int = 0) -> Any:
    """A type as contracts write it; what is wrong with it, their reader tells."""
    kind = given.get("type")
    if depth > MAX_DEPTH:
        return kind
    compound: dict[str, Any] = {"kind": kind}
    match kind:
        case "decimal":
            return compound | {"precision": given.get("precision"), "scale": given.get("scale", 0)}
        case "timestamp_tz":
            return compound | {"tz": given.get("tz")}
        case "list" if isinstance(given.get("item"), Mapping):
            return compound | {"item": _contract_type(given["item"], depth + 1)}
        case "struct" if isinstance(given.get("fields"), list):
            members = [
                {"name": member.get("name"), "type": _contract_type(member, depth + 1)}
                for member in given["fields"]
                if isinstance(member, Mapping)
            ]
            return compound | {"fields": members}
    return kind


class TopicContract(Part):
    """What the rows of one topic must look like; rows that do not are quarantined."""

    topic: Annotated[
        str,
        text(100, _TOPIC_RULE, ("self != '*'", "a contract belongs to one topic: write its name")),
    ]
    """The topic."""
    mode: Literal["strict", "allow_extra", "allow_missing_optional"] = "strict"
    """`strict`: exactly these columns, in this order; `allow_extra`: others may follow, in any
    order; `allow_missing_optional`: nullable ones may be missing, in any order."""
    columns: Annotated[
        list[Column],
        Field(min_length=1, max_length=500, json_schema_extra=keyed("name")),
    ]
    """The columns, in order."""
    quarantine: Quarantine | None = None
    """For this topic instead of `spec.quarantine`."""

    def to_json(self) -> dict[str, Any]:
        """The contract as `domain.contracts.parse_contract` reads it."""
        document: dict[str, Any] = {
            "mode": self.mode,
            "columns": [column.to_json() for column in self.columns],
        }
        if self.quarantine is not None:
            document["quarantine"] = {
                "allow": self.quarantine.allow,
                "max_pct": self.quarantine.max_percent,
                "max_count": self.quarantine.max_count,
            }
        return document


class PluginSpec(Part):
    """What is wanted: which version of the plugin runs, over which files, and where its rows go."""

    version: Annotated[
        str,
        text(
            50,
            (
                (
                    "self.matches('^([0-9]+!)?[0-9]+([.][0-9]+)*((a|b|rc)[0-9]+)?([.]post[0-9]+)?"
                    "([.]dev[0-9]+)?([+][a-z0-9]+([.][a-z0-9]+)*)?$')"
                ),
                (
                    "write a version such as 1.0.0 or 1.1.0rc1, the one that 'casparian publish "
                    "--version' was given, in quotes"
                ),
            ),
        ),
    ]
    """The version that is to run; the bundle must be of it. Versions are immutable: changed code
    needs a new one. An earlier version, with its bundle, rolls back to it."""
    source: BundleSource
    """The signed bundle of that version."""
    sinks: Annotated[
        list[Sink], Field(max_length=LIST_MAX, json_schema_extra=keyed("topic", "uri"))
    ] = Field(default_factory=list)
    """Where rows go, by topic. What the plugin's MANIFEST says of a topic that is listed here does
    not count; a topic that neither lists goes to `parquet://TOPIC`."""
    source_roots: Annotated[list[LabelName], Field(max_length=32, json_schema_extra=SET)] = Field(
        default_factory=list
    )
    """Names of the SourceRoots of this namespace whose files the plugin gets; its workers mount
    them, read-only. Empty means all of the namespace."""
    contract: Annotated[
        list[TopicContract], Field(max_length=20, json_schema_extra=keyed("topic"))
    ] = Field(default_factory=list)
    """What rows must look like, by topic, instead of what the MANIFEST says of that topic."""
    quarantine: Quarantine | None = None
    """How many rows that break a contract are let off, in every topic."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra={"default": {}})
    """How many pods run the plugin, where, and with what."""
    suspend: bool = False
    """Stops handing out jobs of this plugin, and takes its idle workers away. Jobs still queue."""


class PluginVersion(Part):
    """A version that was active at some time."""

    version: ShortText
    """Its number."""
    artifact_hash: ShortText
    """SHA-256 of its code, lock file and manifest."""
    signer: ShortText = ""
    """Who had signed it."""
    deployed_at: Time | None = None
    """When it first became active."""


class PluginStatus(Part):
    """What there is. The operator alone writes it."""

    observed_generation: Count = 0
    """The `metadata.generation` that this status belongs to."""
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra=keyed("type"))] = (
        Field(default_factory=list)
    )
    """Verified, Provisioned, Deployed, Ready: each says how far the wanted version is."""
    plugin: ShortText = ""
    """The plugin's own name, as its bundle has it; commands call it NAMESPACE/NAME."""
    active_version: ShortText = ""
    """The version that jobs run on now."""
    artifact_hash: ShortText = ""
    """SHA-256 of the active version's code, lock file and manifest."""
    signer: ShortText = ""
    """Who signed the active version."""
    versions: Annotated[list[PluginVersion], Field(max_length=VERSIONS_MAX)] = Field(
        default_factory=list
    )
    """Versions that were active, the newest first."""
    replicas: Replicas = 0
    """Worker pods of the active version."""
    ready_replicas: Replicas = 0
    """Worker pods of the active version that are ready."""
    selector: Annotated[str, Field(max_length=1024)] = ""
    """Label selector of these pods, for an HPA."""
    queued: Count = 0
    """Jobs that wait."""
    running: Count = 0
    """Jobs that run."""
    failed: Count = 0
    """Jobs that failed for good and were not replayed or dismissed."""


class SourceSpec(Part):
    """Which folder is watched, and how."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                # On the field itself it would miss a path that is added or taken away.
                "(has(self.path) ? self.path : '') == (has(oldSelf.path) ? oldSelf.path : '')",
                "path cannot be changed: " + _ANOTHER_ROOT,
            ),
        )
    )

    volume: Annotated[
        Volume,
        Field(
            json_schema_extra=rules(
                immutable(_ANOTHER_ROOT),
            )
        ),
    ]
    """The volume with the files. Scout and workers mount it read-only."""
    path: Annotated[
        str,
        text(
            1024,
            (
                "!self.startsWith('/') && !self.matches('(^|/)[.][.](/|$)')",
                (
                    "write a folder of the volume without '..' and without '/' at the beginning, "
                    "such as inbox/sales; leave it out for all of the volume"
                ),
            ),
        ),
    ] = ""
    """A folder of the volume to watch instead of all of it."""
    schedule: Annotated[
        str,
        text(
            100,
            (
                (
                    "self.matches('^@(yearly|annually|monthly|weekly|daily|midnight|hourly)$|"
                    "^([0-9A-Za-z*/,?#-]+ +){4}[0-9A-Za-z*/,?#-]+$')"
                ),
                (
                    "write five fields as in crontab, such as '*/5 * * * *' for every five "
                    "minutes, or @hourly"
                ),
            ),
        ),
    ] = "*/5 * * * *"
    """When to scan, as in crontab, by the cluster's clock; every five minutes by default. The
    annotation `casparian.io/scan=now` scans at once."""
    settle_seconds: Annotated[int, Field(ge=0, le=86_400)] = 2
    """How long a file must have stood still before it is read: longer than writers pause."""
    include: Annotated[
        list[Annotated[str, text(500, _PATTERN_RULE)]],
        Field(max_length=LIST_MAX, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(default_factory=list)
    """Patterns as in .gitignore of files to take; all others are left out. Empty takes all."""
    ignore: Annotated[
        list[Annotated[str, text(500, _PATTERN_RULE)]],
        Field(max_length=LIST_MAX, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(default_factory=list)
    """Patterns as in .gitignore of files to leave out, beside hidden ones; the last match counts,
    `!pattern` has files back."""
    suspend: bool = False
    """Stops scanning; what is known of the files stays."""


class SourceStatus(Part):
    """What there is. The operator alone writes it."""

    observed_generation: Count = 0
    """The `metadata.generation` that this status belongs to."""
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra=keyed("type"))] = (
        Field(default_factory=list)
    )
    """Ready and Scanned."""
    last_scan_time: Time | None = None
    """When the last scan ended."""
    last_scan_seconds: Annotated[float, Field(ge=0)] | None = None
    """How long it took."""
    files: Count = 0
    """Files that are there, as of the last scan."""
    versions: Count = 0
    """File versions that are known."""
    queued: Count = 0
    """Jobs that wait for files of this root."""
    errors: Count = 0
    """What the last scan could not read."""
    node_name: ShortText = ""
    """The node to which pods are held, where the volume allows one node only."""
    last_scan_request: ShortText = ""
    """The value of the annotation `casparian.io/scan` that was carried out last."""


class Operation(Part):
    """What would be done."""

    type: Annotated[str, Field(min_length=1, max_length=63)]
    """`run`: a plugin over a folder's files; `schema_promote`: a schema becomes a contract."""
    plugin: ShortText
    """The plugin, as NAMESPACE/NAME."""
    version: ShortText = ""
    """Its version; empty for the active one."""
    input_dir: LongText = ""
    """The folder with the files."""
    file_count: Count = 0
    """How many files there were when it was asked for."""
    output: LongText = ""
    """The sink, or the output whose contract it is."""


_SPEC_FINAL = tuple(
    (
        (
            f"has(self.{name}) == has(oldSelf.{name}) && "
            f"(!has(self.{name}) || self.{name} == oldSelf.{name})"
        ),
        f"{name} cannot be changed: a request is decided as it was made; ask again for another",
    )
    for name in (
        "approvalId",
        "operation",
        "summary",
        "digest",
        "requestedBy",
        "createdAt",
        "expiresAt",
    )
)


class ApprovalSpec(Part):
    """The request, and the decision on it. All but the decision is the operator's to write."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_SPEC_FINAL,
            (
                "!has(oldSelf.decision) || has(self.decision) && self.decision == oldSelf.decision",
                "the decision is final: ask again if something else is wanted",
            ),
            (
                (
                    "!has(oldSelf.decision) || has(self.decidedBy) == has(oldSelf.decidedBy) && "
                    "(!has(self.decidedBy) || self.decidedBy == oldSelf.decidedBy)"
                ),
                "decidedBy is who decided, and stays so",
            ),
            (
                (
                    "!has(oldSelf.decision) || has(self.reason) == has(oldSelf.reason) && "
                    "(!has(self.reason) || self.reason == oldSelf.reason)"
                ),
                "the reason belongs to the decision, which is final",
            ),
            (
                "has(self.decision) || !has(self.decidedBy) && !has(self.reason)",
                "decidedBy and reason come with a decision: write decision: approved or rejected",
            ),
        )
    )

    approval_id: Annotated[str, Field(min_length=1, max_length=253)]
    """The request's id in the ledger, as `casparian mcp list` shows it."""
    operation: Operation
    """What would be done."""
    summary: Annotated[str, Field(max_length=4096)]
    """The same in one sentence."""
    digest: Annotated[str, Field(max_length=64)] = ""
    """SHA-256 over what the approval is given for: code, file versions, sink and parameters. If any
    of it changes, the request becomes Stale and starts nothing."""
    requested_by: Annotated[str, Field(max_length=1024)] = ""
    """Who asked, by the name that the API server knows them by; they cannot decide it."""
    created_at: Time | None = None
    """When it was asked for."""
    expires_at: Time
    """Until when it can be decided."""
    decision: Literal["approved", "rejected"] | None = None
    """The decision: `approved` or `rejected`, once. It needs the verb `approve` on approvals."""
    decided_by: Annotated[str, Field(max_length=1024)] | None = None
    """Who decided. The API server writes it."""
    reason: Annotated[str, Field(max_length=4096)] | None = None
    """Why, in the decider's words; given together with the decision."""


class ApprovalStatus(Part):
    """What came of it. The operator alone writes it."""

    observed_generation: Count = 0
    """The `metadata.generation` that this status belongs to."""
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra=keyed("type"))] = (
        Field(default_factory=list)
    )
    """Decided and Started."""
    phase: Literal["Pending", "Approved", "Rejected", "Expired", "Stale"] = "Pending"
    """Where it stands. Expired: nobody decided in time. Stale: what was asked for has changed."""
    job_id: Count | None = None
    """The API job that it has started."""
    message: LongText = ""
    """What has changed, where it is Stale."""


Kind = TypeVar("Kind", bound="Resource")


class Metadata(Part):
    """What is used of an object's metadata."""

    name: str
    """The object's name."""
    namespace: str = ""
    """Its namespace."""
    uid: str = ""
    """Its identity; another object of the same name later has another."""
    generation: int = 0
    """Raised by each change of the spec."""
    resource_version: str = ""
    """Raised by each change."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Its annotations."""
    deletion_timestamp: str | None = None
    """There if it is being deleted."""


class Resource(Part):
    """Base of the kinds."""

    metadata: Metadata
    """The object's name and so on."""


class CasparianPlugin(Resource):
    """A plugin: which signed version of it runs, over which files, and where its rows go.

    One object for each plugin; its versions follow one another in it. 'casparian publish
    --emit-manifest' writes one.
    """

    model_config = ConfigDict(json_schema_extra=rules(_SHORT_NAME_RULE))

    spec: PluginSpec
    """What is wanted."""
    status: PluginStatus = Field(default_factory=PluginStatus)
    """What there is; the operator writes it."""


class SourceRoot(Resource):
    """A folder of a volume that is watched: its files become jobs of the plugins that take them.

    A Scout CronJob scans it by `schedule`. Which plugin takes a file is said by the plugins'
    MANIFESTs. Files are never changed.
    """

    model_config = ConfigDict(json_schema_extra=rules(_SHORT_NAME_RULE))

    spec: SourceSpec
    """What is wanted."""
    status: SourceStatus = Field(default_factory=SourceStatus)
    """What there is; the operator writes it."""


class Approval(Resource):
    """A request that waits for a person's decision, such as a run that a language model asked for.

    The operator makes one for each request in the ledger. Decide it by 'kubectl patch approval NAME
    --type=merge -p {"spec":{"decision":"approved"}}'; who asked cannot decide.
    """

    model_config = ConfigDict(json_schema_extra=rules(_SHORT_NAME_RULE))

    spec: ApprovalSpec
    """The request and the decision."""
    status: ApprovalStatus = Field(default_factory=ApprovalStatus)
    """What came of it; the operator writes it."""


def plugin_of(body: Mapping[str, Any]) -> CasparianPlugin:
    """Read a CasparianPlugin.

    Raises:
        UsageError: it is none; the message names the field.
    """
    return _read(CasparianPlugin, body)


def source_of(body: Mapping[str, Any]) -> SourceRoot:
    """Read a SourceRoot.

    Raises:
        UsageError: it is none; the message names the field.
    """
    return _read(SourceRoot, body)


def approval_of(body: Mapping[str, Any]) -> Approval:
    """Read an Approval.

    Raises:
        UsageError: it is none; the message names the field.
    """
    return _read(Approval, body)


def _read(kind: type[Kind], body: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{kind.__name__}: {where}: {first['msg']}",
            hint=f"'kubectl explain {kind.__name__.lower()}' tells what it takes.",
        ) from error


def to_body(part: Part) -> dict[str, Any]:
    """A spec or status as JSON for the API server, without what has no value."""
    return part.model_dump(mode="json", by_alias=True, exclude_none=True)
