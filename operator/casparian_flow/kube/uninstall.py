"""What comes before `helm uninstall`: the operator stops, workers go to zero, Scouts pause.

    python -m casparian_flow.kube.uninstall --timeout 90

The operator goes first, since it would repair what is changed here. Jobs that were under way stay
in the ledger and go on with the next install on its volume. Whatever the API server says, and
however slow pods are, this ends within the timeout, so that an uninstall never hangs.
"""

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from casparian_flow.config import load_settings
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.kube import names
from casparian_flow.kube.client import MANAGED, KubeClient, KubeError
from casparian_flow.kube.kinds import CRON_JOB, DEPLOYMENT, POD, Kind
from casparian_flow.logs import start_logging

STATEFUL_SET: Final = Kind("apps/v1", "StatefulSet", "statefulsets")
OPERATOR: Final = "casparian-operator"
OPERATOR_POD: Final = f"{OPERATOR}-0"
WORKERS: Final = f"{MANAGED},{names.COMPONENT_LABEL}={names.WORKER}"
POLL_S: Final = 0.5

log = logging.getLogger(__name__)


def quiesce(
    client: KubeClient,
    namespace: str,
    watched: tuple[str, ...],
    *,
    timeout_s: float,
    clock: Clock,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Stop the operator in `namespace`, then its workers and Scouts in the watched ones.

    Returns:
        What could not be done, or not be waited for, in words; nothing is raised for it.
    """
    began = clock.now().mono
    troubles: list[str] = []

    def wait(what: str, share: float, left: Callable[[], int]) -> None:
        deadline = began + share * timeout_s
        while _counted(left, what, troubles):
            if clock.now().mono >= deadline:
                troubles.append(f"{what} had not ended after {deadline - began:.0f} s")
                return
            sleep(POLL_S)

    _try(
        troubles,
        f"scaling StatefulSet {OPERATOR}",
        lambda: client.merge(STATEFUL_SET, namespace, OPERATOR, {"spec": {"replicas": 0}}),
    )
    wait("the operator", 0.5, lambda: int(client.get(POD, namespace, OPERATOR_POD) is not None))
    for place in watched:
        _try(troubles, f"pausing what is in {place}", partial(_pause, client, place))
    wait(
        "workers",
        1.0,
        lambda: sum(len(client.list(POD, place, selector=WORKERS)) for place in watched),
    )
    return troubles


def _pause(client: KubeClient, namespace: str) -> None:
    for deployment in client.list(DEPLOYMENT, namespace, selector=MANAGED):
        name = deployment["metadata"]["name"]
        client.merge(DEPLOYMENT, namespace, name, {"spec": {"replicas": 0}})
        log.info("scaled Deployment %s/%s to 0", namespace, name)
    for cron_job in client.list(CRON_JOB, namespace, selector=MANAGED):
        name = cron_job["metadata"]["name"]
        client.merge(CRON_JOB, namespace, name, {"spec": {"suspend": True}})
        log.info("suspended CronJob %s/%s", namespace, name)


def _try(troubles: list[str], what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except KubeError as error:
        if error.status != 404:
            troubles.append(f"{what}: {error}")


def _counted(left: Callable[[], int], what: str, troubles: list[str]) -> int:
    """How many are left; none where that cannot be asked, since waiting would tell nothing."""
    try:
        return left()
    except KubeError as error:
        troubles.append(f"waiting for {what}: {error}")
        return 0


def main() -> None:
    """Read settings and the one argument, and do it."""
    parser = argparse.ArgumentParser(description="Stop the operator, workers and Scouts.")
    parser.add_argument("--timeout", type=float, default=90.0, help="Seconds, all in all.")
    timeout_s = parser.parse_args().timeout
    settings = load_settings()
    start_logging(settings.logging.level, settings.logging.format)
    operator = settings.operator
    watched = operator.watch_namespaces or (operator.namespace,)
    client = KubeClient.connect()
    try:
        troubles = quiesce(
            client, operator.namespace, watched, timeout_s=timeout_s, clock=SystemClock()
        )
    finally:
        client.close()
    for trouble in troubles:
        log.warning("%s", trouble)
    log.info("the ledger's volume stays; a later install in %s goes on", operator.namespace)


if __name__ == "__main__":
    main()
