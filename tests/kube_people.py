"""People with roles in a namespace of a test's API server.

rita, ann and bob may approve, pat may patch approvals but not approve, eve edits plugins. The
operator's account makes approvals and writes their status.
"""

from kube_kinds import OPERATOR, manifest
from kube_kit import ApiClient, ApiError, ApiServer

from casparian_flow.kube.names import API_VERSION

RBAC = "rbac.authorization.k8s.io"


def bind(api: ApiServer, space: str, role: str, *users: str, kind: str = "ClusterRole") -> None:
    subjects = [{"kind": "User", "name": user, "apiGroup": RBAC} for user in users]
    api.client.apply(
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{role}-{'-'.join(users)}".replace(":", "."), "namespace": space},
            "roleRef": {"kind": kind, "name": role, "apiGroup": RBAC},
            "subjects": subjects,
        }
    )


def role(api: ApiServer, space: str, name: str, *verbs: str) -> None:
    rules = [
        {"apiGroups": ["casparian.io"], "resources": ["approvals"], "verbs": list(verbs)},
        {"apiGroups": ["casparian.io"], "resources": ["approvals/status"], "verbs": ["patch"]},
    ]
    api.client.apply(
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "Role",
            "metadata": {"name": name, "namespace": space},
            "rules": rules,
        }
    )


def people(api: ApiServer, space: str) -> str:
    """Give the people their roles in a namespace, and the operator its rights."""
    bind(api, space, "casparian-approver", "ann", "bob", "rita")
    bind(api, space, "casparian-editor", "eve")
    role(api, space, "patcher", "get", "patch", "update")
    bind(api, space, "patcher", "pat", kind="Role")
    role(api, space, "operator", "get", "list", "watch", "create")
    bind(api, space, "operator", ":".join(("system:serviceaccount", *OPERATOR)), kind="Role")
    return space


def operator_of(api: ApiServer, space: str) -> ApiClient:
    """The operator's account, once the policy that guards approvals is in force."""
    if not api.client.find("v1", "Namespace", OPERATOR[0]):
        api.namespace(OPERATOR[0])
        api.account(*OPERATOR)

    def guarded() -> bool:
        try:
            api.client.create(manifest("Approval", space), dry_run=True)
        except ApiError as error:
            return "made by the operator alone" in str(error)
        return False

    api.client.wait(guarded)
    return api.client_for_account(*OPERATOR)


def await_stamp(api: ApiServer, operator: ApiClient, space: str) -> None:
    """Wait until a decision is stamped: new policies and kinds take a moment to be known."""
    operator.create(manifest("Approval", space, name="first-decision"))
    ann = api.client_for("ann")
    api.client.wait(lambda: not refusal(ann, space, "first-decision", decision="approved"), 30)


def refusal(client: ApiClient, space: str, name: str = "sales", **decision: str) -> str:
    """What the server says to a decision; "" if it takes it."""
    try:
        client.patch(API_VERSION, "Approval", name, {"spec": decision}, space)
    except ApiError as error:
        return str(error)
    return ""
