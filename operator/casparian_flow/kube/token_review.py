"""Whose token a worker or a person has shown, by the API server's word."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from casparian_flow.domain.errors import NotPermittedError
from casparian_flow.kube import names
from casparian_flow.kube.client import KubeClient
from casparian_flow.sentinel.admission import PodIdentity, Review

_ACCOUNT = "system:serviceaccount:"
_POD = "authentication.kubernetes.io/pod-name"


def reviewer(client: KubeClient) -> Review:
    """Judges tokens by TokenReview."""

    def review(token: str) -> PodIdentity | None:
        return pod_identity(client.review(token))

    return review


def pod_identity(status: Mapping[str, Any]) -> PodIdentity | None:
    """What a TokenReview's status proves; None unless it is a pod's token, made for us.

    A token that is bound to no pod proves nothing about one: anybody who may make tokens for the
    account could have it.
    """
    if not status.get("authenticated") or names.TOKEN_AUDIENCE not in status.get("audiences", ()):
        return None
    user = status.get("user", {})
    username = str(user.get("username", ""))
    namespace, colon, account = username.removeprefix(_ACCOUNT).partition(":")
    pods = user.get("extra", {}).get(_POD, ())
    if not username.startswith(_ACCOUNT) or not colon or len(pods) != 1:
        return None
    return PodIdentity(namespace, account, str(pods[0]))


def caller_reviewer(
    client: KubeClient,
    audiences: Sequence[str],
    users: Collection[str],
    groups: Collection[str],
) -> Callable[[str], str | None]:
    """Judges tokens of callers by TokenReview: whose it is, None for one that proves nothing.

    Raises, when called:
        NotPermittedError: the token is good, and its owner may not call.
        KubeError: the API server cannot be asked.
    """

    def review(token: str) -> str | None:
        return caller_of(client.review(token, audiences), audiences, users, groups)

    return review


def caller_of(
    status: Mapping[str, Any],
    audiences: Sequence[str],
    users: Collection[str],
    groups: Collection[str],
) -> str | None:
    """Who a TokenReview's status says it is, by Kubernetes' name; as `caller_reviewer`."""
    if not status.get("authenticated") or not set(audiences) & set(status.get("audiences", ())):
        return None
    user = status.get("user", {})
    name = str(user.get("username", ""))
    if not name:
        return None
    if name not in users and not set(groups) & set(user.get("groups") or ()):
        raise NotPermittedError(
            f"{name} may not call this server",
            hint="[mcp] allowed_users and allowed_groups say who may.",
        )
    return name
