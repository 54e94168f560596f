"""The only talk with the API server, apart from kopf's watches.

Requests go as plain JSON through the Kubernetes client, which knows how to find the server and to
prove who asks. What is made is made by server-side apply under one field manager, so that
applying the same again changes nothing, and fields of other managers stay theirs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config
from kubernetes.config.config_exception import ConfigException

from casparian_flow.domain.clock import Now, utc
from casparian_flow.domain.errors import CasparianError, ConfigError
from casparian_flow.kube import names
from casparian_flow.kube.kinds import EVENT, LEASE, Body, Kind, Manifest, kind_of

TIMEOUT_S = 20.0
"""For one request, all in all."""
CONNECTIONS = 16
"""Kept open: as many as threads that ask at once."""
PAGE = 500
"""Objects that one answer to a list holds."""
MANAGED = f"{names.MANAGED_BY_LABEL}={names.FIELD_MANAGER}"
"""Selects what the operator has made."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
_UNKNOWN_FIELD = "failed to create typed patch object"
"""Of an apply with a field that the kind does not have, or one twice; the answer is a 500."""
MESSAGE_CHARS_MAX = 1_000
"""Of an Event; the API server takes no more than 1,024."""


class KubeError(CasparianError):
    """The API server refused a request.

    Attributes:
        status: HTTP's, 0 if there was no answer.
        reason: the API's word for it, such as "Conflict".
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason


class KubeUnreachableError(KubeError):
    """The API server does not answer; later it may."""


class Listing(NamedTuple):
    """Objects as they were at a version of the whole store."""

    items: Sequence[Body]
    version: str


class KubeClient:
    """Requests to one API server; for any number of threads."""

    def __init__(self, configuration: Any, *, reporter: str = names.FIELD_MANAGER) -> None:
        configuration.connection_pool_maxsize = CONNECTIONS
        configuration.retries = False
        self.configuration = configuration
        self._api = kubernetes_client.ApiClient(configuration)
        self._reporter = reporter

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str | None = None) -> Self:
        """As the pod's ServiceAccount, or as a kubeconfig says where there is no pod.

        Raises:
            ConfigError: neither tells where a cluster is.
        """
        configuration = kubernetes_client.Configuration()
        try:
            if kubeconfig is None and context is None:
                try:
                    kubernetes_config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
                    return cls(configuration)
                except ConfigException:
                    pass  # not in a pod: a person's own configuration is taken
            kubernetes_config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=None if kubeconfig is None else str(kubeconfig),
                context=context,
                client_configuration=configuration,
                persist_config=False,
            )
        except (ConfigException, OSError, ValueError) as error:
            raise ConfigError(
                f"no cluster is configured: {error}",
                hint="Run it in a pod, or set KUBECONFIG to a file that names a cluster.",
            ) from error
        return cls(configuration)

    @staticmethod
    def namespace_of(context: str) -> str:
        """The namespace that a context of the kubeconfig is in.

        Raises:
            ConfigError: there is no such context.
        """
        try:
            contexts, _ = kubernetes_config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
        except (ConfigException, OSError, ValueError) as error:
            raise ConfigError(f"no cluster is configured: {error}") from error
        for found in contexts:
            if found["name"] == context:
                return str(found["context"].get("namespace") or "default")
        raise ConfigError(
            f"the kubeconfig has no context {context!r}",
            hint="'kubectl config get-contexts' lists them.",
        )

    # -- objects ------------------------------------------------------------------------------

    def list(self, kind: Kind, namespace: str, *, selector: str = "") -> Sequence[Body]:
        """Objects of a kind in a namespace; raises KubeError."""
        return self.listing(kind, namespace, selector=selector).items

    def listing(self, kind: Kind, namespace: str, *, selector: str = "") -> Listing:
        """Objects of a kind in a namespace, all of one moment.

        Raises:
            KubeError: on any page.
        """
        found = []
        proceed = ""
        while True:
            query = {"limit": str(PAGE), "labelSelector": selector, "continue": proceed}
            page = self._ask("GET", kind.path(namespace), query)
            # Items of a list do not say what they are.
            of = {"apiVersion": kind.api_version, "kind": kind.name}
            found += [{**of, **item} for item in page["items"]]
            proceed = page["metadata"].get("continue", "")
            if not proceed:
                return Listing(found, page["metadata"].get("resourceVersion", ""))

    def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        """One object, None if there is none."""
        try:
            return self._ask("GET", kind.path(namespace, name))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    def apply(self, manifest: Manifest) -> Body:
        """Make an object, or its fields that the manifest names, as the manifest says."""
        kind, meta = kind_of(manifest), manifest["metadata"]
        return self._apply(kind.path(meta["namespace"], meta["name"]), manifest)

    def apply_status(self, body: Body, status: Mapping[str, Any]) -> Body:
        """Write an object's status, all of it that is the operator's."""
        kind, meta = kind_of(body), body["metadata"]
        manifest = {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            # With its uid: a namesake made in the meantime has a status of its own.
            "metadata": {key: meta[key] for key in ("name", "namespace", "uid") if key in meta},
            "status": dict(status),
        }
        return self._apply(f"{kind.path(meta['namespace'], meta['name'])}/status", manifest)

    def _apply(self, path: str, manifest: Manifest) -> Body:
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
        return self._ask("PATCH", path, query, manifest, APPLY)

    def merge(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Body:
        """Change some fields of an object that others made."""
        query = {"fieldManager": self._reporter}
        return self._ask("PATCH", kind.path(namespace, name), query, patch, MERGE)

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        """Delete an object and, in the background, what it owns; one that is gone is gone."""
        try:
            self._ask("DELETE", kind.path(namespace, name), {}, {"propagationPolicy": "Background"})
        except KubeError as error:
            if error.status != 404:
                raise

    def create(self, manifest: Manifest) -> Body:
        """Raises KubeError, of status 409 if there is one already."""
        path = kind_of(manifest).path(manifest["metadata"]["namespace"])
        return self._ask("POST", path, {"fieldManager": names.FIELD_MANAGER}, manifest)

    # -- the rest -----------------------------------------------------------------------------

    def replace_lease(self, lease: Body) -> Body:
        """Write a Lease as it was read and changed.

        Raises:
            KubeError: of status 409 if somebody else has written it since.
        """
        meta = lease["metadata"]
        return self._ask("PUT", LEASE.path(meta["namespace"], meta["name"]), {}, lease)

    def emit(self, about: Body, *, type_: str, reason: str, message: str, now: Now) -> None:
        """Record an Event about an object."""
        meta = about["metadata"]
        at = f"{utc(now.wall_us).isoformat(timespec='microseconds')}Z"
        self.create(
            {
                "apiVersion": EVENT.api_version,
                "kind": EVENT.name,
                "metadata": {
                    "name": f"{meta['name']}.{now.wall_us:x}",
                    "namespace": meta["namespace"],
                },
                "involvedObject": {
                    "apiVersion": about["apiVersion"],
                    "kind": about["kind"],
                    "name": meta["name"],
                    "namespace": meta["namespace"],
                    "uid": meta.get("uid", ""),
                    "resourceVersion": meta.get("resourceVersion", ""),
                },
                "type": type_,
                "reason": reason,
                "message": message[:MESSAGE_CHARS_MAX],
                "source": {"component": self._reporter},
                "reportingComponent": self._reporter,
                "firstTimestamp": at[:19] + "Z",
                "lastTimestamp": at[:19] + "Z",
                "count": 1,
            }
        )

    def review(
        self, token: str, audiences: Sequence[str] = (names.TOKEN_AUDIENCE,)
    ) -> Mapping[str, Any]:
        """What the API server says of a token that is meant for us: a TokenReview's status.

        Args:
            audiences: one of these it has to be made for.

        Raises:
            KubeError: the server cannot be asked.
        """
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": list(audiences)},
        }
        answer = self._ask("POST", "/apis/authentication.k8s.io/v1/tokenreviews", {}, asked)
        status = answer.get("status", {})
        return status if isinstance(status, dict) else {}

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """One request.

        Raises:
            KubeUnreachableError: there was no answer.
            KubeError: the answer is a refusal.
        """
        words = urlencode({k: v for k, v in (query or {}).items() if v})
        url = f"{self.configuration.host}{quote(path)}" + (f"?{words}" if words else "")
        headers = {"Accept": "application/json", "User-Agent": self._reporter}
        if body is not None:
            headers["Content-Type"] = content_type
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        sent = None if body is None else json.dumps(body)
        try:
            answer = self._api.rest_client.pool_manager.request(
                method, url, body=sent, headers=headers, timeout=urllib3.Timeout(total=TIMEOUT_S)
            )
            data = answer.data
        except urllib3.exceptions.HTTPError as error:
            raise KubeUnreachableError(
                f"the API server does not answer: {error}",
                hint="It is asked again; work that runs goes on.",
            ) from error
        return _read(answer.status, data, f"{method} {path}")

    def connection(self) -> dict[str, Any]:
        """Where the API server is and how to prove who asks, as kopf's ConnectionInfo has it."""
        found = self.configuration
        # This renews a token that has been exchanged in the pod's file.
        header = found.get_api_key_with_prefix("BearerToken", alias="authorization")
        return {
            "server": found.host,
            "ca_path": found.ssl_ca_cert,
            "insecure": not found.verify_ssl,
            "certificate_path": found.cert_file,
            "private_key_path": found.key_file,
            "token": header.rpartition(" ")[2] if header else None,
        }

    def close(self) -> None:
        self._api.close()  # type: ignore[no-untyped-call]


def _read(status: int, data: bytes, asked: str) -> dict[str, Any]:
    try:
        found = json.loads(data) if data else {}
    except ValueError:
        found = {}
    if 200 <= status < 300 and isinstance(found, dict):
        return found
    told = found if isinstance(found, dict) else {}
    message = told.get("message") or data[:200].decode("utf-8", "replace")
    passing = status in {429, 500, 502, 503, 504} and not message.startswith(_UNKNOWN_FIELD)
    kind = KubeUnreachableError if passing else KubeError
    raise kind(f"{asked}: {message}", status=status, reason=str(told.get("reason", "")))
