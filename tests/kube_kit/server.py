"""etcd, kube-apiserver and, if asked for, kube-controller-manager on loopback."""

import base64
import json
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.harness.tools import API_TOOLS, tools

from kube_kit.authority import Authority, new_key, private_pem, public_pem
from kube_kit.client import ApiClient
from kube_kit.processes import Process, ServerFailedError, await_ready, free_ports, start

START_S = 60.0
SERVICES = "10.96.0.0/16"
ISSUER = "https://kubernetes.default.svc"
_NAMES = ("127.0.0.1", "localhost", "kubernetes.default.svc", "10.96.0.1")


def prepare() -> dict[str, Path]:
    """The programs that this needs; built now if need be, which takes minutes the first time.

    Raises:
        HarnessError: they cannot be built here; the hint says what to install.
    """
    return tools(API_TOOLS)


@contextmanager
def api_server(
    *,
    controllers: bool = False,
    mutating_policies: bool = True,
    flags: Sequence[str] = (),
) -> Iterator["ApiServer"]:
    """A fresh API server; it and all that it wrote is gone afterwards.

    Args:
        controllers: Run kube-controller-manager as well.
        mutating_policies: Serve MutatingAdmissionPolicy (v1beta1); clusters before 1.34 do not.
        flags: More command line arguments of kube-apiserver.
    """
    programs = prepare()
    with tempfile.TemporaryDirectory(prefix="kube-kit-") as folder:
        server = ApiServer(Path(folder), programs, mutating_policies=mutating_policies, flags=flags)
        try:
            server.start()
            if controllers:
                server.start_controllers()
            yield server
        finally:
            server.close()


class ApiServer:
    """See `api_server`. Not for several threads.

    Attributes:
        client: The cluster's administrator (`system:masters`).
        kubeconfig: The same, for programs.
        url: Where it listens; the same after `stop` and `start`.
        authority: Signs client certificates that it trusts, and servers' of webhooks.
    """

    def __init__(
        self,
        folder: Path,
        programs: Mapping[str, Path],
        *,
        mutating_policies: bool,
        flags: Sequence[str],
    ) -> None:
        self.folder = folder
        self.authority = Authority()
        self._programs = programs
        self._flags = (*_gates(mutating_policies=mutating_policies), *flags)
        self._processes: dict[str, Process] = {}
        self._credentials()
        self._etcd_port = self._port = 0

    # Life

    def start(self) -> None:
        """Start it, the first time or after `stop`; returns when it is ready.

        Raises:
            ServerFailedError: it did not become ready.
        """
        if "etcd" not in self._processes:
            self._start_etcd()
        if self._port:
            self._start_api()
            return
        for last in (False, False, True):
            (self._port,) = free_ports(1)
            try:
                self._start_api()
                break
            except ServerFailedError as failure:
                if last or not failure.port_taken:
                    raise
        self.client = self._client("admin", self._certified("admin", ("system:masters",)))
        self.kubeconfig = self.client.kubeconfig

    def stop(self, *, hard: bool = False) -> None:
        """Take the server away; its data stay. Connections break, later ones are refused."""
        self._processes["kube-apiserver"].stop(hard=hard)

    def start_controllers(self) -> None:
        """Run kube-controller-manager, without its wait for leadership."""
        self._processes["kube-controller-manager"] = start(
            "kube-controller-manager",
            [
                self._programs["kube-controller-manager"],
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                "--secure-port=0",
                f"--root-ca-file={self.folder / 'ca.crt'}",
                f"--service-account-private-key-file={self.folder / 'accounts.key'}",
                # There are no nodes and no volumes to look after.
                "--controllers=*,-node-ipam-controller,-node-lifecycle-controller",
            ],
            self.folder,
        )

    def close(self) -> None:
        """Stop all of it."""
        for process in reversed(self._processes.values()):
            process.stop(hard=process.name == "etcd")

    # Callers

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def client_for(self, user: str, groups: Sequence[str] = ()) -> ApiClient:
        """A user with these groups (and `system:authenticated`), by client certificate."""
        return self._client(user, self._certified(user, groups))

    def client_for_account(self, namespace: str, name: str) -> ApiClient:
        """A ServiceAccount, which is made if there is none, by token."""
        self.account(namespace, name)
        token = self.token(namespace, name)
        return self._client(f"{namespace}.{name}", {"token": token})

    def token(
        self,
        namespace: str,
        account: str,
        *,
        audiences: Sequence[str] = (),
        seconds: int = 3600,
        pod: Mapping[str, Any] | None = None,
    ) -> str:
        """A ServiceAccount's token, as the kubelet would project it.

        Args:
            audiences: Whom it is for; the API server itself if none.
            seconds: How long it is valid, 600 at least.
            pod: The pod (as the server returned it) that it is bound to.
        """
        spec: dict[str, Any] = {"audiences": list(audiences), "expirationSeconds": seconds}
        if pod is not None:
            meta = pod["metadata"]
            bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
            spec["boundObjectRef"] = bound
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.client.request("POST", path, asked)["status"]["token"])

    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """Make a namespace with its `default` ServiceAccount; returns its name."""
        meta = {"name": name, "labels": dict(labels or {})}
        self.client.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        self.account(name, "default")
        return name

    def account(self, namespace: str, name: str) -> None:
        """Make a ServiceAccount if there is none."""
        meta = {"name": name, "namespace": namespace}
        self.client.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})

    # What happened

    def requests(self, **fields: str) -> list[dict[str, Any]]:
        """Completed requests in order, from the audit log (level Metadata).

        Args:
            fields: What to keep: `verb`, `user` (name), `resource`, `namespace`, `name`.
        """
        lines = (self.folder / "audit.log").read_text().splitlines()
        return [event for event in map(json.loads, lines) if _matches(event, fields)]

    def etcd_bytes(self) -> int:
        """Bytes in use in etcd's database; those of older revisions count until compaction."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._etcd_port}/metrics", timeout=10) as r:
            for line in r.read().decode().splitlines():
                if line.startswith("etcd_mvcc_db_total_size_in_use_in_bytes "):
                    return int(float(line.split()[1]))
        raise LookupError("etcd does not tell its size")

    def log(self, name: str = "kube-apiserver") -> str:
        """What one of the processes has said."""
        return self._processes[name].log.read_text(errors="replace")

    # Parts

    def _credentials(self) -> None:
        (self.folder / "ca.crt").write_bytes(self.authority.pem)
        self.authority.server(_NAMES).write(self.folder, "server")
        key = new_key()
        (self.folder / "accounts.key").write_bytes(private_pem(key))
        (self.folder / "accounts.pub").write_bytes(public_pem(key))
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived", "ResponseStarted"],
            "omitManagedFields": True,
            "rules": [
                # Its own loops, and questions whether it is alive.
                {"level": "None", "users": ["system:apiserver"]},
                {"level": "None", "nonResourceURLs": ["/readyz*", "/healthz*", "/livez*"]},
                {"level": "Metadata"},
            ],
        }
        (self.folder / "audit.json").write_text(json.dumps(policy))

    def _start_etcd(self) -> None:
        for last in (False, False, True):
            self._etcd_port, peer = free_ports(2)
            url, peer_url = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, peer))
            shutil.rmtree(self.folder / "etcd", ignore_errors=True)
            etcd = start(
                "etcd",
                [
                    self._programs["etcd"],
                    f"--data-dir={self.folder / 'etcd'}",
                    f"--listen-client-urls={url}",
                    f"--advertise-client-urls={url}",
                    f"--listen-peer-urls={peer_url}",
                    f"--initial-advertise-peer-urls={peer_url}",
                    f"--initial-cluster=default={peer_url}",
                    # Its data need not survive the machine.
                    "--unsafe-no-fsync",
                    "--log-level=warn",
                ],
                self.folder,
            )
            self._processes["etcd"] = etcd
            try:
                await_ready(etcd, partial(_answers, f"{url}/health"), START_S)
                return
            except ServerFailedError as failure:
                etcd.stop(hard=True)
                if last or not failure.port_taken:
                    raise

    def _start_api(self) -> None:
        within = self.folder
        api = start(
            "kube-apiserver",
            [
                self._programs["kube-apiserver"],
                f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",
                f"--secure-port={self._port}",
                f"--tls-cert-file={within / 'server.crt'}",
                f"--tls-private-key-file={within / 'server.key'}",
                f"--client-ca-file={within / 'ca.crt'}",
                f"--service-account-issuer={ISSUER}",
                f"--service-account-key-file={within / 'accounts.pub'}",
                f"--service-account-signing-key-file={within / 'accounts.key'}",
                f"--service-cluster-ip-range={SERVICES}",
                "--authorization-mode=RBAC",
                "--allow-privileged=true",
                f"--audit-policy-file={within / 'audit.json'}",
                f"--audit-log-path={within / 'audit.log'}",
                *self._flags,
            ],
            within,
        )
        self._processes["kube-apiserver"] = api
        trust = ssl.create_default_context(cadata=self.authority.pem.decode())
        await_ready(api, lambda: _answers(f"{self.url}/readyz", trust), START_S)

    def _certified(self, user: str, groups: Sequence[str]) -> dict[str, str]:
        pair = self.authority.client(user, groups)
        return {
            "client-certificate-data": base64.b64encode(pair.certificate).decode(),
            "client-key-data": base64.b64encode(pair.key).decode(),
        }

    def _client(self, name: str, credentials: Mapping[str, str]) -> ApiClient:
        safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.folder, prefix=f"{safe}-", suffix=".kubeconfig", delete=False
        ) as file:
            json.dump(_kubeconfig(self.url, self.authority.pem, name, credentials), file)
        return ApiClient(Path(file.name), self._programs["kubectl"])


def _gates(*, mutating_policies: bool) -> tuple[str, ...]:
    served = str(mutating_policies).lower()
    return (
        f"--feature-gates=MutatingAdmissionPolicy={served}",
        f"--runtime-config=admissionregistration.k8s.io/v1beta1={served}",
    )


def _kubeconfig(
    url: str, authority: bytes, user: str, credentials: Mapping[str, str]
) -> dict[str, Any]:
    trusted = base64.b64encode(authority).decode()
    cluster = {"server": url, "certificate-authority-data": trusted}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "kube-kit", "cluster": cluster}],
        "users": [{"name": user, "user": dict(credentials)}],
        "contexts": [{"name": "kube-kit", "context": {"cluster": "kube-kit", "user": user}}],
        "current-context": "kube-kit",
    }


def _answers(url: str, trust: ssl.SSLContext | None = None) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5, context=trust) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def _matches(event: Mapping[str, Any], fields: Mapping[str, str]) -> bool:
    subject = event.get("objectRef", {})
    facts = {"verb": event["verb"], "user": event["user"]["username"], **subject}
    return all(facts.get(name) == wanted for name, wanted in fields.items())
