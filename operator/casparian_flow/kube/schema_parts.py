"""What the models of our kinds are made of: a base class, bounded texts and their CEL rules.

A CEL rule and its message stand where the field does. The rules are the API server's to check;
nothing here evaluates them. Every text, list and map has a bound, so that the API server can tell
what a rule costs at most.
"""

from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

VALIDATIONS: Final = "x-kubernetes-validations"
LIST_TYPE: Final = "x-kubernetes-list-type"
LIST_KEYS: Final = "x-kubernetes-list-map-keys"
ANY_FIELDS: Final = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING: Final = "x-kubernetes-int-or-string"

Item = TypeVar("Item")


class Part(BaseModel):
    """Base of every object in a spec or status; fields are camelCase in JSON."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",  # the API server has pruned what it does not know
        use_attribute_docstrings=True,
    )


def rules(*given: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for a field or class, each an expression over `self` and the message if it fails.

    A rule that mentions `oldSelf` is checked at updates only.
    """
    return {VALIDATIONS: [{"rule": rule, "message": message} for rule, message in given]}


def text(most: int, *given: tuple[str, str], **extra: Any) -> Any:
    """A field of text with at most so many characters and with rules."""
    return Field(max_length=most, json_schema_extra=(rules(*given) if given else {}) | extra)


def immutable(instead: str) -> tuple[str, str]:
    """The rule of a field that keeps its first value; the message says what to do instead."""
    return ("self == oldSelf", f"cannot be changed: {instead}")


def keyed(*keys: str) -> dict[str, Any]:
    """A list that server-side apply merges by these fields, and in which no two agree in them."""
    return {LIST_TYPE: "map", LIST_KEYS: list(keys)}


SET: Final[dict[str, Any]] = {LIST_TYPE: "set"}

_DNS_LABEL: Final = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_DNS_NAME: Final = "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"

ObjectName = Annotated[
    str,
    text(
        253,
        (
            f"self.matches('{_DNS_NAME}')",
            "write an object's name: small letters, digits, '-' and '.', such as sales-inbox",
        ),
    ),
]
LabelName = Annotated[
    str,
    text(
        63,
        (
            f"self.matches('{_DNS_LABEL}')",
            "write a SourceRoot's name: small letters, digits and '-', such as sales-inbox",
        ),
    ),
]
SecretKey = Annotated[
    str,
    text(
        253,
        (
            "self.matches('^[-._a-zA-Z0-9]+$')",
            "write a key of the object's data: letters, digits, '-', '_' and '.'",
        ),
    ),
]
HexDigest = Annotated[
    str,
    text(
        64,
        (
            "self.matches('^[0-9a-f]{64}$')",
            "write the SHA-256 of the bundle as 64 hex digits, as 'sha256sum' prints it",
        ),
    ),
]
ShortText = Annotated[str, Field(max_length=253)]
LongText = Annotated[str, Field(max_length=4096)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
"""RFC 3339 in UTC."""
Count = Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})]


class Condition(Part):
    """One judgement about the object, in the form that all of Kubernetes uses."""

    type: Annotated[str, Field(min_length=1, max_length=63)]
    """What is judged."""
    status: Annotated[str, Field(json_schema_extra={"enum": ["True", "False", "Unknown"]})]
    """Whether it holds: True, False or Unknown."""
    reason: Annotated[str, Field(min_length=1, max_length=63)]
    """Why, in one word for machines; docs/crds.md lists them."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """Why, for people, with what to do next."""
    observed_generation: Count = 0
    """The `metadata.generation` that was judged; an older one than the object's is out of date."""
    last_transition_time: Time
    """When `status` last changed."""


class ClaimVolume(Part):
    """A PersistentVolumeClaim of the namespace."""

    claim_name: ObjectName
    """Its name."""


class LocalReference(Part):
    """An object of the same namespace."""

    name: ObjectName
    """Its name."""


class CsiVolume(Part):
    """An inline CSI volume, made together with each pod."""

    driver: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the CSI driver, such as `blob.csi.azure.com`."""
    fs_type: Annotated[str, Field(max_length=63)] | None = None
    """File system to mount; the driver's usual one by default."""
    volume_attributes: Annotated[
        dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64)
    ] = Field(default_factory=dict)
    """What the driver wants to know."""
    node_publish_secret_ref: LocalReference | None = None
    """Secret with what the driver needs to mount it."""


class Volume(Part):
    """Where files are: a PersistentVolumeClaim or an inline CSI volume, one of the two.

    Other kinds (nfs, hostPath) need a PersistentVolume and a claim on it: Pod Security
    `restricted` lets no pod mount them by itself.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.persistentVolumeClaim) != has(self.csi)",
                (
                    "give either persistentVolumeClaim or csi; for nfs or hostPath make a "
                    "PersistentVolume and name the claim on it"
                ),
            ),
        )
    )

    persistent_volume_claim: ClaimVolume | None = None
    """A claim of this namespace."""
    csi: CsiVolume | None = None
    """An inline volume of a CSI driver that Pod Security `restricted` allows."""
