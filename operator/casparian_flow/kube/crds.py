"""CustomResourceDefinitions from the models; `tools/crds.py` writes them into `crds/`.

pydantic's JSON schema is brought into the structural form that the API server wants: references
are resolved, "or null" goes, and every text, list and map has to have a bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from casparian_flow.domain.errors import require
from casparian_flow.kube.models import Approval, CasparianPlugin, SourceRoot
from casparian_flow.kube.names import (
    APPROVAL_KIND,
    APPROVALS,
    CATEGORY,
    GROUP,
    PLUGIN_KIND,
    PLUGINS,
    SOURCE_KIND,
    SOURCES,
    VERSION,
)
from casparian_flow.kube.schema_parts import ANY_FIELDS, INT_OR_STRING, VALIDATIONS, Part

Schema = dict[str, Any]

_KEPT: Final = frozenset(
    {
        "type",
        "format",
        "enum",
        "pattern",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "required",
    }
)
"""JSON Schema's words that mean the same in a structural schema."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `kubectl get`; `wide` ones are shown by `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False

    def to_json(self) -> Schema:
        shown: Schema = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return shown | ({"priority": 1} if self.wide else {})


@dataclass(frozen=True, slots=True)
class Definition:
    """A kind, as the API server is told of it."""

    kind: str
    plural: str
    short_name: str
    model: type[Part]
    columns: tuple[Column, ...]
    scale: bool = False

    @property
    def name(self) -> str:
        return f"{self.plural}.{GROUP}"

    @property
    def file_name(self) -> str:
        return f"{GROUP}_{self.plural}.yaml"


def _condition(kind: str, field: str = "status") -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


_AGE = Column("Age", ".metadata.creationTimestamp", "date")

DEFINITIONS: Final = (
    Definition(
        PLUGIN_KIND,
        PLUGINS,
        "cplugin",
        CasparianPlugin,
        (
            Column("Ready", _condition("Ready")),
            Column("Version", ".status.activeVersion"),
            Column("Workers", ".status.replicas", "integer"),
            Column("Queued", ".status.queued", "integer"),
            Column("Failed", ".status.failed", "integer"),
            Column("Reason", _condition("Ready", "reason"), wide=True),
            Column("Running", ".status.running", "integer", wide=True),
            Column("Wanted", ".spec.version", wide=True),
            Column("Signer", ".status.signer", wide=True),
            _AGE,
        ),
        scale=True,
    ),
    Definition(
        SOURCE_KIND,
        SOURCES,
        "sroot",
        SourceRoot,
        (
            Column("Ready", _condition("Ready")),
            Column("Files", ".status.files", "integer"),
            Column("Queued", ".status.queued", "integer"),
            Column("Errors", ".status.errors", "integer"),
            Column("Last Scan", ".status.lastScanTime", "date"),
            Column("Reason", _condition("Ready", "reason"), wide=True),
            Column("Schedule", ".spec.schedule", wide=True),
            Column("Versions", ".status.versions", "integer", wide=True),
            _AGE,
        ),
    ),
    Definition(
        APPROVAL_KIND,
        APPROVALS,
        "appr",
        Approval,
        (
            Column("Phase", ".status.phase"),
            Column("Operation", ".spec.operation.type"),
            Column("Plugin", ".spec.operation.plugin"),
            Column("Requested By", ".spec.requestedBy"),
            Column("Decided By", ".spec.decidedBy"),
            Column("Job", ".status.jobId", "integer"),
            Column("Expires", ".spec.expiresAt", wide=True),
            Column("Summary", ".spec.summary", wide=True),
            _AGE,
        ),
    ),
)


def definition_body(definition: Definition) -> Schema:
    """The CustomResourceDefinition of a kind, as it is applied."""
    subresources: Schema = {"status": {}}
    if definition.scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.workers.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": definition.name},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": definition.kind,
                "listKind": f"{definition.kind}List",
                "plural": definition.plural,
                "singular": definition.kind.lower(),
                "shortNames": [definition.short_name],
                "categories": [CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema_of(definition.model)},
                    "subresources": subresources,
                    "additionalPrinterColumns": [c.to_json() for c in definition.columns],
                }
            ],
        },
    }


def schema_of(model: type[Part]) -> Schema:
    """The structural schema of a kind.

    Raises:
        InvariantError: a field has no bound or no description.
    """
    document = model.model_json_schema(by_alias=True)
    del document["properties"]["metadata"]  # the API server's own
    found = _structural(document, document.get("$defs", {}), model.__name__)
    properties = found["properties"]
    properties["status"] = _without_defaults(properties["status"])
    found["properties"] = {
        "apiVersion": {
            "type": "string",
            "description": f"{GROUP}/{VERSION}.",
        },
        "kind": {"type": "string", "description": f"{model.__name__}."},
        "metadata": {"type": "object"},
        "spec": properties["spec"],
        "status": properties["status"],
    }
    found["required"] = ["spec"]
    return found


def _structural(given: Mapping[str, Any], parts: Mapping[str, Any], where: str) -> Schema:
    node = _resolved(given, parts)
    found: Schema = {}
    if node.get("description"):
        found["description"] = node["description"]
    found |= {key: node[key] for key in sorted(_KEPT & set(node))}
    found |= {key: node[key] for key in sorted(node) if key.startswith("x-kubernetes-")}
    if node.get("default") not in (None, "", []):
        found["default"] = node["default"]
    if node.get(INT_OR_STRING):
        found.pop("type", None)
    elif "properties" in node:
        found["properties"] = {
            name: _field(value, parts, f"{where}.{name}")
            for name, value in node["properties"].items()
        }
        if found.get("default") == {}:
            # Rules are tried on a default before the fields in it get theirs.
            own = found["properties"].items()
            found["default"] = {name: f["default"] for name, f in own if "default" in f}
    elif isinstance(node.get("additionalProperties"), Mapping):
        found["additionalProperties"] = _structural(node["additionalProperties"], parts, where)
    if "items" in node:
        found["items"] = _structural(node["items"], parts, f"{where}[]")
    _require_bound(found, where)
    return found


def _field(given: Mapping[str, Any], parts: Mapping[str, Any], where: str) -> Schema:
    found = _structural(given, parts, where)
    require(found.get("description"), f"{where} has no description")
    return found


def _resolved(given: Mapping[str, Any], parts: Mapping[str, Any]) -> Schema:
    """A schema with its reference followed and its "or null" taken away."""
    node = dict(given)
    if not node.get(INT_OR_STRING) and "anyOf" in node:
        (inner,) = (option for option in node.pop("anyOf") if option.get("type") != "null")
        return _joined(_resolved(inner, parts), node)
    if "$ref" in node:
        name = node.pop("$ref").rpartition("/")[2]
        return _joined(_resolved(parts[name], parts), node)
    node["description"] = _prose(str(node.get("description", "")))
    return node


def _joined(inner: Schema, outer: Mapping[str, Any]) -> Schema:
    """What a class says and what the field of that class adds; both their rules hold."""
    joined = inner | {key: value for key, value in outer.items() if key != "title"}
    rules = [*outer.get(VALIDATIONS, ()), *inner.get(VALIDATIONS, ())]
    if rules:
        joined[VALIDATIONS] = rules
    own = _prose(str(outer.get("description", "")))
    of_class = str(inner.get("description", ""))
    # The class's first paragraph says what the field's description says; the others add to it.
    more = of_class.partition("\n\n")[2] if own else of_class
    joined["description"] = "\n\n".join(text for text in (own, more) if text)
    return joined


def _prose(text: str) -> str:
    """Paragraphs of one line each."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")).strip()


def _require_bound(node: Schema, where: str) -> None:
    if node.get(ANY_FIELDS) or "enum" in node:
        return
    kind = node.get("type")
    if kind == "object" and "additionalProperties" in node:
        require("maxProperties" in node, f"{where} has no bound")
    elif kind == "array":
        require("maxItems" in node, f"{where} has no bound")
    elif kind == "string":
        require("maxLength" in node, f"{where} has no bound")


def _without_defaults(node: Schema) -> Schema:
    """A status says what its writer wrote, and nothing else."""
    found = {key: value for key, value in node.items() if key != "default"}
    if "properties" in node:
        found["properties"] = {k: _without_defaults(v) for k, v in node["properties"].items()}
    if "items" in node:
        found["items"] = _without_defaults(node["items"])
    return found
