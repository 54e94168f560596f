"""What pods say of why they do not run. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from casparian_flow.kube.kinds import Body

FAILING: Final = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
    }
)
"""Reasons why a container waits that time alone does not cure."""


def problem_of(pods: Iterable[Body]) -> str:
    """The first reason found why a pod does not run, "" if all may yet."""
    return next((told for pod in pods for told in _problems(pod)), "")


def not_made(deployment: Body) -> str:
    """Why a Deployment gets no pods at all, as by a quota or Pod Security; "" if it does."""
    for condition in deployment.get("status", {}).get("conditions", ()):
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return f"no pod can be made: {condition.get('message', '')}"
    return ""


def _problems(pod: Body) -> Iterator[str]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for container in (
        *status.get("initContainerStatuses", ()),
        *status.get("containerStatuses", ()),
    ):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in FAILING:
            said = last_words(container) or waiting.get("message", "")
            yield f"pod {name}, container {container['name']}: {waiting['reason']}: {said}"
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield f"pod {name} finds no node: {condition.get('message', '')}"


def last_words(container: Mapping[str, Any]) -> str:
    """What a container left in its termination message, "" if nothing."""
    for state in ("state", "lastState"):
        said = container.get(state, {}).get("terminated", {}).get("message", "")
        if said:
            return str(said).strip()
    return ""


def last_words_of(pods: Iterable[Body]) -> str:
    """What the newest pod that failed said at its end, "" if nothing."""
    newest = sorted(pods, key=lambda p: p["metadata"].get("creationTimestamp", ""), reverse=True)
    for pod in newest:
        for container in pod.get("status", {}).get("containerStatuses", ()):
            said = last_words(container)
            if said:
                return said
    return ""


def nodes_of(pods: Iterable[Body], claim: str) -> list[str]:
    """Where pods that have not ended and mount a claim are, by name."""
    found = set()
    for pod in pods:
        spec = pod.get("spec", {})
        ended = pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
        claims = {
            v.get("persistentVolumeClaim", {}).get("claimName") for v in spec.get("volumes", ())
        }
        if claim in claims and spec.get("nodeName") and not ended:
            found.add(spec["nodeName"])
    return sorted(found)
