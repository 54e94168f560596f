"""How many workers a plugin version should have. Pure.

Out at once: a job that waits for a pod waits long enough. In after a while of quiet, and never
below the workers that hold something: a pod that is asked to end finishes what it runs, and the
idle ones are marked as the first to go, so that nothing is lost or done again.
"""

import math
from dataclasses import dataclass
from typing import Final

from casparian_flow.kube.model_workers import Workers
from casparian_flow.kube.reconcile_plugin import Counts

QUIET_S: Final = 60.0
"""How long less has to be enough before workers go."""
IDLE_COST: Final = -100
BUSY_COST: Final = 100
"""`pod-deletion-cost`: of two pods the one with the lower cost goes first."""
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"


@dataclass(frozen=True, slots=True)
class Scaled:
    """What was wanted last.

    Attributes:
        replicas: how many.
        enough_since: since when fewer would do, in seconds; None if they would not.
    """

    replicas: int = 0
    enough_since: float | None = None


def wanted(
    workers: Workers,
    counts: Counts,
    last: Scaled,
    *,
    now: float,
    slots: int = 1,
) -> Scaled:
    """How many workers there should be from now on.

    Args:
        slots: jobs that one worker runs at a time.
        now: seconds, on a clock that only moves forward.
    """
    if workers.scaling == "external":
        replicas = workers.replicas or 0
        return Scaled(max(replicas, 1) if counts.trial else replicas)
    need = math.ceil((counts.queued + counts.running) / max(1, slots))
    if counts.trial:
        need = max(need, 1)
    target = min(max(need, workers.min_replicas), workers.max_replicas)
    if target >= last.replicas:
        return Scaled(target)
    since = now if last.enough_since is None else last.enough_since
    if now - since < QUIET_S and last.replicas <= workers.max_replicas:
        return Scaled(last.replicas, since)
    busy = counts.workers - counts.idle
    return Scaled(min(last.replicas, max(target, busy)), since)
