"""A Kubernetes API server for tests, without nodes: etcd and kube-apiserver as plain processes.

    with api_server() as api:
        api.client.apply(crd, policies)                        # cluster admin; dict, YAML or Path
        space = api.namespace("flow")                          # with its `default` ServiceAccount
        ann = api.client_for("ann", groups=["data"])           # a user, by client certificate
        bot = api.client_for_account(space, "operator")        # a ServiceAccount, by token
        ann.patch("casparian.io/v1alpha1", "Approval", "a1", {"spec": ...}, space)
        ann.kubectl("get", "approvals", "-n", space)           # the same, as a person types it
        os.environ["KUBECONFIG"] = str(bot.kubeconfig)         # for programs under test

Answers that are refusals raise `ApiError` with code, reason and message. RBAC, PodSecurity,
ValidatingAdmissionPolicy and MutatingAdmissionPolicy are on. `api_server(controllers=True)` runs
kube-controller-manager as well: owned objects are collected, Deployments get their ReplicaSets and
pods (which stay Pending), namespaces end. `api.stop()` and `api.start()` take the server away and
bring it back with its data; `api.requests()` is its audit log.

Ready in about 3 s, of which `tests/kube_api/conftest.py` shares one among its tests. It listens on
loopback only, its processes end with the test process, its files are in a folder that is removed.
"""

from kube_kit.client import ApiClient, ApiError, Manifest
from kube_kit.server import ApiServer, api_server, prepare

__all__ = ["ApiClient", "ApiError", "ApiServer", "Manifest", "api_server", "prepare"]
