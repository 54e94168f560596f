"""Whose token a worker has shown, by the API server's word."""

from collections.abc import Mapping
from typing import Any

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
