"""Who may make and decide approvals, as the API server judges it.

People: rita has asked, ann and bob may approve, pat may patch approvals but not approve, eve edits
plugins. The operator's account makes the objects. Nothing of ours runs.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kube_kinds import OPERATOR, install, manifest
from kube_kit import ApiClient, ApiError, ApiServer
from kube_people import await_stamp, bind, operator_of, people, role

from casparian_flow.kube.names import API_VERSION

APPROVED = {"spec": {"decision": "approved"}}
REJECTED = {"spec": {"decision": "rejected", "reason": "not in March"}}


@pytest.fixture(scope="module")
def operator(api: ApiServer) -> ApiClient:
    """The operator's account, once the policies are in force."""
    install(api)
    space = people(api, api.namespace("first-decision"))
    client = operator_of(api, space)
    await_stamp(api, client, space)
    return client


@pytest.fixture
def desk(api: ApiServer, operator: ApiClient, space: str) -> str:
    """A namespace with the people in their roles."""
    return people(api, space)


def ask(operator: ApiClient, space: str, **changes: Any) -> dict[str, Any]:
    return operator.create(manifest("Approval", space, **changes))


def decide(
    api: ApiServer, user: str, space: str, patch: dict[str, Any], name: str = "sales"
) -> dict[str, Any]:
    return api.client_for(user).patch(API_VERSION, "Approval", name, patch, space)


def test_an_approver_decides_once_and_the_server_writes_who_it_was(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    ask(operator, desk)
    decided = decide(api, "ann", desk, REJECTED)["spec"]
    assert (decided["decision"], decided["decidedBy"]) == ("rejected", "ann")
    with pytest.raises(ApiError, match="the decision is final"):
        decide(api, "bob", desk, APPROVED)
    with pytest.raises(ApiError, match="the decision is final"):
        decide(api, "ann", desk, {"spec": {"decision": None}})
    with pytest.raises(ApiError, match="decidedBy is who decided"):
        decide(api, "bob", desk, {"spec": {"decidedBy": "bob"}})
    with pytest.raises(ApiError, match="belongs to the decision"):
        decide(api, "ann", desk, {"spec": {"reason": "after all"}})


def test_the_printed_command_works_as_it_is(api: ApiServer, operator: ApiClient, desk: str) -> None:
    ask(operator, desk)
    patch = '{"spec":{"decision":"approved"}}'
    done = api.client_for("ann").kubectl(
        "patch", "approval", "sales", "--type=merge", "-p", patch, "-n", desk
    )
    assert "patched" in done.stdout
    shown = api.client_for("bob").kubectl("get", "appr", "sales", "-n", desk, "-o", "json").stdout
    assert json.loads(shown)["spec"]["decidedBy"] == "ann"


def test_who_asked_cannot_decide_even_with_the_verb(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    ask(operator, desk)
    with pytest.raises(ApiError, match="rita has asked for this and cannot decide it"):
        decide(api, "rita", desk, APPROVED)


def test_who_asked_is_judged_by_the_object_as_it_was(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    ask(operator, desk)
    with pytest.raises(ApiError, match="cannot"):
        decide(api, "rita", desk, {"spec": {"decision": "approved", "requestedBy": "eve"}})
    with pytest.raises(ApiError, match="requestedBy cannot be changed"):
        decide(api, "ann", desk, {"spec": {"decision": "approved", "requestedBy": "eve"}})
    with pytest.raises(ApiError, match="digest cannot be changed"):
        decide(api, "ann", desk, {"spec": {"decision": "approved", "digest": "1" * 64}})


def test_without_the_verb_nobody_decides(api: ApiServer, operator: ApiClient, desk: str) -> None:
    ask(operator, desk)
    with pytest.raises(ApiError, match=r"pat may not decide .* needs the verb approve"):
        decide(api, "pat", desk, APPROVED)
    for user in ("eve", "nobody"):
        with pytest.raises(ApiError, match="cannot patch resource"):
            decide(api, user, desk, APPROVED)
    with pytest.raises(ApiError, match="cannot patch resource"):
        operator.patch(API_VERSION, "Approval", "sales", APPROVED, desk)
    elsewhere = api.namespace(f"{desk}-other")
    role(api, elsewhere, "operator", "create")
    bind(api, elsewhere, "operator", ":".join(("system:serviceaccount", *OPERATOR)), kind="Role")
    ask(operator, elsewhere)
    with pytest.raises(ApiError, match="cannot patch resource"):
        decide(api, "ann", elsewhere, APPROVED)


def test_nobody_decides_in_another_name(api: ApiServer, operator: ApiClient, desk: str) -> None:
    ask(operator, desk)
    given = {"spec": {"decision": "approved", "decidedBy": "bob"}}
    assert decide(api, "ann", desk, given)["spec"]["decidedBy"] == "ann"


def test_who_may_patch_cannot_touch_the_request(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    ask(operator, desk)
    for field, value in (
        ("approvalId", "other"),
        ("summary", "Run nothing"),
        ("expiresAt", "2040-01-01T00:00:00Z"),
        ("operation", {"type": "run", "plugin": "finance/other"}),
        ("requestedBy", None),
    ):
        with pytest.raises(ApiError, match=f"{field} cannot be changed"):
            decide(api, "pat", desk, {"spec": {field: value}})
    with pytest.raises(ApiError, match="come with a decision"):
        decide(api, "pat", desk, {"spec": {"decidedBy": "pat"}})


def test_the_operator_alone_makes_approvals_and_without_a_decision(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    with pytest.raises(ApiError, match="made by the operator alone"):
        api.client.create(manifest("Approval", desk))
    for given in ({"decision": "approved"}, {"decision": "approved", "decidedBy": "ann"}):
        with pytest.raises(ApiError, match="made without a decision"):
            ask(operator, desk, **given)
    assert "decision" not in ask(operator, desk)["spec"]


def test_of_racing_approvers_one_decides_and_the_others_learn_it(
    api: ApiServer, operator: ApiClient, desk: str
) -> None:
    users = ("ann", "bob") * 4
    clients = {user: api.client_for(user) for user in set(users)}
    ask(operator, desk)

    def race(n: int) -> tuple[str, str]:
        """Who is told to have decided, and what the server said else."""
        patch = APPROVED if users[n] == "ann" else REJECTED
        try:
            spec = clients[users[n]].patch(API_VERSION, "Approval", "sales", patch, desk)["spec"]
        except ApiError as error:
            return "", str(error)
        return str(spec["decidedBy"]), ""

    with ThreadPoolExecutor(len(users)) as pool:
        answers = list(pool.map(race, range(len(users))))
    spec = api.client.get(API_VERSION, "Approval", "sales", desk)["spec"]
    assert {who for who, _ in answers if who} == {spec["decidedBy"]}
    refused = [said for who, said in answers if not who]
    assert all("the decision is final" in said or "409" in said for said in refused), refused
    assert (spec["decision"] == "approved") == (spec["decidedBy"] == "ann")


@pytest.mark.parametrize("phase", ["Expired", "Stale"])
def test_what_is_over_cannot_be_decided_any_more(
    api: ApiServer, operator: ApiClient, desk: str, phase: str
) -> None:
    ask(operator, desk)
    status = {"status": {"phase": phase}}
    operator.patch(API_VERSION, "Approval", "sales", status, desk, subresource="status")
    with pytest.raises(ApiError, match=f"this request is {phase}"):
        decide(api, "ann", desk, APPROVED)


def test_by_its_status_nobody_decides(api: ApiServer, operator: ApiClient, desk: str) -> None:
    ask(operator, desk)
    sly = APPROVED | {"status": {"phase": "Approved"}}
    after = operator.patch(API_VERSION, "Approval", "sales", sly, desk, subresource="status")
    assert "decision" not in after["spec"]
    assert after["status"]["phase"] == "Approved"
