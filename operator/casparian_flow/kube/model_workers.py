"""`spec.workers` of a CasparianPlugin: how many pods run the plugin, and what they are given."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from casparian_flow.kube.schema_parts import (
    ANY_FIELDS,
    INT_OR_STRING,
    ObjectName,
    Part,
    SecretKey,
    Volume,
    keyed,
    rules,
    text,
)

REPLICAS_MAX = 1000

Scaling = Literal["queue", "external"]
Replicas = Annotated[int, Field(ge=0, le=REPLICAS_MAX, json_schema_extra={"format": "int32"})]
Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra={
            INT_OR_STRING: True,
            "maxLength": 32,
            "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|"
            r"([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
        }
    ),
]
Quantities = Annotated[dict[str, Quantity], Field(max_length=16)]
LabelText = Annotated[str, Field(max_length=253)]


class Resources(Part):
    """What the scheduler sets aside for a container, and what it may use at most."""

    requests: Quantities = Field(default_factory=dict)
    """Set aside, by resource: `cpu: 500m`, `memory: 1Gi`."""
    limits: Quantities = Field(default_factory=dict)
    """At most, by resource. The plugin itself is held somewhat below the memory limit, so that a
    plugin that takes too much fails its job and not the whole container. Without one it is what
    the settings allow one plugin, for each slot and once more, and a tenth."""


class SecretKeyRef(Part):
    """A key of a Secret of the namespace."""

    name: ObjectName
    """The Secret's name."""
    key: SecretKey
    """The key in it."""
    optional: bool = False
    """Whether pods start without the variable while the Secret or the key is missing."""


class EnvSource(Part):
    """Where a variable's value comes from."""

    secret_key_ref: SecretKeyRef
    """A key of a Secret."""


class EnvVar(Part):
    """A variable of the container that writes to the sinks; the plugin does not see it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.value) != has(self.valueFrom)",
                "give either value or valueFrom.secretKeyRef",
            ),
            (
                "!has(self.value) || !self.name.matches('(?i)(password|passwd|secret|token)')",
                (
                    "do not write secrets into the object: put the value into a Secret and give "
                    "valueFrom.secretKeyRef"
                ),
            ),
            (
                # They would win over the settings file, whom the worker trusts included, or have
                # the container that holds keys and passwords load code from elsewhere.
                (
                    "!self.name.matches('(?i)^(CASPARIAN_|LD_|PYTHON|GLIBC_|GCONV_|OPENSSL_|"
                    "POD_|NODE_NAME$|PATH$|HOME$|TMPDIR$)') || "
                    "self.name.matches('^CASPARIAN_MSSQL_')"
                ),
                (
                    "the worker's own variables and those of its interpreter are not the object's: "
                    "use another name, such as CASPARIAN_MSSQL_SERVER"
                ),
            ),
        )
    )

    name: Annotated[
        str,
        text(
            100,
            (
                "self.matches('^[A-Za-z_][A-Za-z0-9_]*$')",
                "write a variable's name: letters, digits and '_', such as CASPARIAN_MSSQL_USER",
            ),
        ),
    ]
    """Its name, such as `CASPARIAN_MSSQL_PASSWORD`."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, where that is no secret."""
    value_from: EnvSource | None = None
    """Where the value is taken from."""


class Toleration(Part):
    """A taint of nodes that the pods bear, as in a pod."""

    key: LabelText | None = None
    """The taint's key; none means every taint, with `operator: Exists`."""
    operator: Literal["Exists", "Equal"] | None = None
    """Equal by default."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """The taint's value, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Which effect of the taint; none means every one."""
    toleration_seconds: Annotated[int, Field(json_schema_extra={"format": "int64"})] | None = None
    """How long a NoExecute taint is borne; for ever by default."""


class OutputVolume(Volume):
    """The volume below which file sinks write; workers mount it at `/outputs`.

    Sinks of one plugin that write Parquet or CSV may share it with any number of workers. It has to
    allow hard links (NFS, Azure Files over NFS and block devices do; SMB and blob mounts do not).
    """

    sub_path: Annotated[
        str,
        text(
            253,
            (
                "!self.startsWith('/') && !self.matches('(^|/)[.][.](/|$)')",
                (
                    "write a folder of the volume without '..' and without '/' at the beginning, "
                    "such as warehouse/sales"
                ),
            ),
        ),
    ] = ""
    """A folder of the volume to use instead of all of it."""


class Workers(Part):
    """How many pods run the plugin, where, and with what."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.scaling != 'queue' || self.minReplicas <= self.maxReplicas",
                "minReplicas is above maxReplicas: raise maxReplicas or lower minReplicas",
            ),
            (
                "self.scaling != 'external' || has(self.replicas)",
                (
                    "scaling: external needs replicas, which kubectl scale or an HPA then changes; "
                    "or write scaling: queue"
                ),
            ),
            (
                "self.scaling != 'queue' || !has(self.replicas)",
                (
                    "replicas belongs to scaling: external; under scaling: queue write minReplicas "
                    "and maxReplicas"
                ),
            ),
        )
    )

    scaling: Scaling = "queue"
    """Who decides how many workers there are: `queue`: the operator, by how many jobs wait, between
    `minReplicas` and `maxReplicas`; `external`: `replicas`, as set by hand, `kubectl scale` or an
    HPA."""
    min_replicas: Replicas = 0
    """Under `scaling: queue`: workers kept while no job waits. From 0 the first job waits for a
    pod."""
    max_replicas: Annotated[
        int, Field(ge=1, le=REPLICAS_MAX, json_schema_extra={"format": "int32"})
    ] = 1
    """Under `scaling: queue`: workers at most. Outputs to a SQLite or DuckDB file allow 1 only."""
    replicas: Replicas | None = None
    """Under `scaling: external`: workers wanted."""
    resources: Resources = Field(default_factory=Resources)
    """Of the container that runs the plugin's code."""
    node_selector: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)
    ] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints of nodes that the pods bear."""
    affinity: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={ANY_FIELDS: True, "type": "object"})
    ] = None
    """Rules about nodes and other pods, as in `pod.spec.affinity`."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra=keyed("name"))] = Field(
        default_factory=list
    )
    """Variables for the sinks, such as a SQL Server's address and password. The container that runs
    the plugin does not get them."""
    outputs: OutputVolume | None = None
    """Where file sinks write. Without it only sinks that are servers (mssql) can be used."""
