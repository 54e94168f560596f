"""What tests say to an API server: a small client over HTTPS, and kubectl beside it."""

import base64
import http.client
import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import yaml

Manifest = dict[str, Any]
Manifests = Manifest | str | Path | Sequence[Manifest]

ANSWER_S = 30.0
WAIT_S = 60.0
PATCHES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}
_APPLY = "application/apply-patch+yaml"  # takes JSON too, as every JSON document is YAML


class ApiError(Exception):
    """The server refused; `code`, `reason` (such as Forbidden, Invalid) and `message` are its."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class _Resource:
    plural: str
    namespaced: bool


@dataclass
class ApiClient:
    """One caller, as its kubeconfig says. Not for several threads."""

    kubeconfig: Path
    kubectl_path: Path
    _resources: dict[str, dict[str, _Resource]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = yaml.safe_load(self.kubeconfig.read_text())
        current = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], current["cluster"])["cluster"]
        user = _named(config["users"], current["user"])["user"]
        self.server: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        self._headers = {"Accept": "application/json"}
        if "token" in user:
            self._headers["Authorization"] = f"Bearer {user['token']}"
        if "client-certificate-data" in user:
            self._present(user)

    def _present(self, user: Mapping[str, str]) -> None:
        """Load a client certificate; ssl takes one from a file only."""
        pem = self.kubeconfig.with_suffix(".pem")
        pem.touch(mode=0o600)
        parts = (user["client-certificate-data"], user["client-key-data"])
        pem.write_bytes(b"".join(base64.b64decode(part) for part in parts))
        self._tls.load_cert_chain(pem)
        pem.unlink()

    # Objects, by apiVersion and kind

    def apply(self, *manifests: Manifests, manager: str = "kube-kit") -> list[Manifest]:
        """Server-side apply, in this order; new CRDs are waited for.

        Raises:
            ApiError: one was refused; those before it are applied.
        """
        applied = []
        for manifest in load(*manifests):
            body = json.dumps(manifest).encode()
            query = {"fieldManager": manager, "force": "true"}
            path = self.path(manifest)
            applied.append(self._object("PATCH", path, body, query=query, content=_APPLY))
            if manifest["kind"] == "CustomResourceDefinition":
                self._await_definition(manifest)
        return applied

    def create(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Create one object; `metadata.generateName` is honoured."""
        query = {"dryRun": "All"} if dry_run else {}
        return self._object("POST", self._collection_of(manifest), manifest, query=query)

    def replace(self, manifest: Manifest, *, subresource: str = "") -> Manifest:
        """Put one object in place of what is there."""
        return self._object("PUT", self.path(manifest, subresource), manifest)

    def get(
        self, api_version: str, kind: str, name: str, namespace: str = "", subresource: str = ""
    ) -> Manifest:
        """One object."""
        path = self.path(_reference(api_version, kind, name, namespace), subresource)
        return self._object("GET", path)

    def find(self, api_version: str, kind: str, name: str, namespace: str = "") -> Manifest | None:
        """One object, or None if there is none."""
        try:
            return self.get(api_version, kind, name, namespace)
        except ApiError as error:
            if error.code != http.client.NOT_FOUND:
                raise
            return None

    def list(
        self, api_version: str, kind: str, namespace: str = "", selector: str = ""
    ) -> list[Manifest]:
        """All objects of a kind, of one namespace or of all."""
        resource = self.resource(api_version, kind)
        path = _collection(api_version, resource.plural, namespace)
        query = {"labelSelector": selector} if selector else {}
        items: list[Manifest] = self.request("GET", path, query=query)["items"]
        return [{"apiVersion": api_version, "kind": kind, **item} for item in items]

    def patch(
        self,
        api_version: str,
        kind: str,
        name: str,
        patch: Any,
        namespace: str = "",
        *,
        subresource: str = "",
        form: str = "merge",
    ) -> Manifest:
        """Patch one object; `form` is merge, json or strategic."""
        path = self.path(_reference(api_version, kind, name, namespace), subresource)
        return self._object("PATCH", path, patch, content=PATCHES[form])

    def delete(
        self, api_version: str, kind: str, name: str, namespace: str = "", *, gone: bool = False
    ) -> None:
        """Delete one object; with `gone`, wait until it is."""
        path = self.path(_reference(api_version, kind, name, namespace))
        self.request("DELETE", path, {"propagationPolicy": "Background"})
        if gone:
            self.wait(lambda: self.find(api_version, kind, name, namespace) is None)

    def wait(self, condition: Callable[[], Any], seconds: float = WAIT_S) -> Any:
        """Ask every 50 ms until the answer is true, and return it.

        Raises:
            TimeoutError: it did not become true.
        """
        end = time.monotonic() + seconds
        while not (answer := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds:.0f} s: {condition}")
            time.sleep(0.05)
        return answer

    # Requests

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Any:
        """One request; the answer is parsed if it is JSON, else text.

        Raises:
            ApiError: the answer is no success.
            OSError: the server cannot be reached.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = self._headers | ({"Content-Type": content} if data is not None else {})
        connection = http.client.HTTPSConnection(
            urlsplit(self.server).netloc, timeout=ANSWER_S, context=self._tls
        )
        try:
            target = f"{path}?{urlencode(query)}" if query else path
            connection.request(method, target, data, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        parsed = json.loads(text) if answer.headers.get_content_subtype() == "json" else text
        if answer.status >= http.client.BAD_REQUEST:
            raise _refusal(answer.status, parsed)
        return parsed

    def _object(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Manifest:
        answer: Manifest = self.request(method, path, body, query=query, content=content)
        return answer

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as this caller.

        Raises:
            AssertionError: it failed, and `check` is on; the text has what it said.
        """
        done = subprocess.run(
            [self.kubectl_path, *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.kubeconfig.parent)}
            | {"PATH": os.environ["PATH"]},
        )
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    # Paths

    def path(self, manifest: Manifest, subresource: str = "") -> str:
        """The path of the object that a manifest names."""
        path = f"{self._collection_of(manifest)}/{quote(manifest['metadata']['name'])}"
        return f"{path}/{subresource}" if subresource else path

    def _collection_of(self, manifest: Manifest) -> str:
        resource = self.resource(manifest["apiVersion"], manifest["kind"])
        namespace = manifest["metadata"].get("namespace", "default") if resource.namespaced else ""
        return _collection(manifest["apiVersion"], resource.plural, namespace)

    def resource(self, api_version: str, kind: str) -> _Resource:
        """What the server calls a kind.

        Raises:
            ApiError: it does not serve that version, or no such kind in it.
        """
        if kind not in self._resources.get(api_version, {}):
            listed = self.request("GET", _group(api_version))["resources"]
            self._resources[api_version] = {
                each["kind"]: _Resource(each["name"], each["namespaced"])
                for each in listed
                if "/" not in each["name"]
            }
        found = self._resources[api_version].get(kind)
        if found is None:
            raise ApiError(404, "NotFound", f"{api_version} has no {kind}")
        return found

    def _await_definition(self, definition: Manifest) -> None:
        path = self.path(definition)

        def established() -> bool:
            conditions = self.request("GET", path).get("status", {}).get("conditions") or []
            return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

        self.wait(established)
        spec = definition["spec"]
        for version in spec["versions"]:
            if version["served"]:
                served = f"{spec['group']}/{version['name']}"
                self.wait(partial(self._serves, served, spec["names"]["kind"]))

    def _serves(self, api_version: str, kind: str) -> bool:
        try:
            self.resource(api_version, kind)
        except ApiError as error:
            if error.code not in {http.client.NOT_FOUND, http.client.SERVICE_UNAVAILABLE}:
                raise
            return False
        return True


def load(*manifests: Manifests) -> Iterator[Manifest]:
    """Manifests as dicts; a Path is a YAML file, a str is YAML, both of any number of documents."""
    for given in manifests:
        if isinstance(given, dict):
            yield from given["items"] if given.get("kind") == "List" else [given]
        elif isinstance(given, str | Path):
            text = given if isinstance(given, str) else given.read_text()
            yield from load(*(each for each in yaml.safe_load_all(text) if each))
        else:
            yield from load(*given)


def _reference(api_version: str, kind: str, name: str, namespace: str) -> Manifest:
    where = {"namespace": namespace} if namespace else {}
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, **where}}


def _group(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _collection(api_version: str, plural: str, namespace: str) -> str:
    within = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{_group(api_version)}{within}/{plural}"


def _named(entries: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(entry for entry in entries if entry["name"] == name)


def _refusal(code: int, answer: Any) -> ApiError:
    if isinstance(answer, dict) and answer.get("kind") == "Status":
        return ApiError(code, answer.get("reason", ""), answer.get("message", ""))
    return ApiError(code, http.client.responses.get(code, ""), str(answer))
