"""The ready queue: one lane a plugin, so that no plugin's jobs hold up another's.

Order within a lane, and between the heads of lanes, is priority (higher first), then age (job
id). Standard library only.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from casparian_flow.domain.ids import JobId
from casparian_flow.domain.records import Health, Job, PluginSpec

Rank = tuple[int, int]
"""(-priority, job id): smaller comes first."""


@dataclass(slots=True)
class Lane:
    """The jobs of one plugin that could be leased now, with what decides whether they may be."""

    plugin: str
    health: Health
    spec: PluginSpec | None = None
    ready: list[Rank] = field(default_factory=list)
    failed_jobs: set[JobId] = field(default_factory=set)
    """Distinct jobs that failed since the last success; the circuit breaker counts these."""

    @property
    def runnable(self) -> bool:
        return self.spec is not None and not self.health.paused


class ReadyQueue:
    """All lanes, and the jobs that wait for their time.

    Removal is lazy: a job that has left QUEUED is dropped when its rank is met.
    """

    def __init__(self, is_queued: Callable[[JobId], bool]) -> None:
        self._is_queued = is_queued
        self.lanes: dict[str, Lane] = {}
        self._delayed: list[tuple[float, Rank, str]] = []

    def lane(self, plugin: str) -> Lane:
        lane = self.lanes.get(plugin)
        if lane is None:
            lane = self.lanes[plugin] = Lane(plugin, Health(plugin))
        return lane

    def push(self, job: Job) -> None:
        heapq.heappush(self.lane(job.plugin).ready, (-job.priority, job.job_id))

    def push_delayed(self, job: Job, due_mono: float) -> None:
        heapq.heappush(self._delayed, (due_mono, (-job.priority, job.job_id), job.plugin))

    def release_due(self, now_mono: float) -> None:
        """Move every job whose time has come to its lane."""
        delayed = self._delayed
        while delayed and delayed[0][0] <= now_mono:
            _, rank, plugin = heapq.heappop(delayed)
            if self._is_queued(JobId(rank[1])):
                heapq.heappush(self.lane(plugin).ready, rank)

    @property
    def next_due(self) -> float | None:
        """When the earliest delayed job is due, on the monotonic clock."""
        return self._delayed[0][0] if self._delayed else None

    def head(self, lane: Lane) -> Rank | None:
        ready = lane.ready
        while ready:
            if self._is_queued(JobId(ready[0][1])):
                return ready[0]
            heapq.heappop(ready)
        return None

    def best_first(self, offer: Callable[[Lane], bool]) -> Iterator[JobId]:
        """Take jobs out, best rank over all runnable lanes first.

        Args:
            offer: asked before a lane's head is taken; False sets the lane aside for this round,
                which is what keeps one plugin without workers from holding up the others.
        """
        heads = [
            (rank, name)
            for name, lane in self.lanes.items()
            if lane.runnable and (rank := self.head(lane)) is not None
        ]
        heapq.heapify(heads)
        while heads:
            lane = self.lanes[heads[0][1]]
            if not offer(lane):
                heapq.heappop(heads)
                continue
            rank = heapq.heappop(lane.ready)
            yield JobId(rank[1])
            following = self.head(lane)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (following, lane.plugin))

    def depth(self) -> dict[str, int]:
        """Ready and delayed jobs by plugin, stale ranks included (an upper bound, cheap)."""
        depth = Counter({name: len(lane.ready) for name, lane in self.lanes.items()})
        depth.update(plugin for _, _, plugin in self._delayed)
        return dict(depth)
